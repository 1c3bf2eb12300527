"""Scales: how the scale of a group is itself stored.

A rule maps the thresholds of the groups to what is stored and to the step that makes the codes.
The two differ where the codes come from the exact scale and are multiplied by the stored one.
"""

import dataclasses
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from qat_jax.clipping import AbsMax, Clipping
from qat_jax.clipping.groups import largest_of
from qat_jax.formats import Float, Int
from qat_jax.granularity import ChannelAxis, Granularity, PerTensor


class StoredScale(NamedTuple):
    """The steps of an array's groups as they are stored. A pytree.

    Attributes:
      values: one number for each group, in the dtype of storage.
      coarse: what they are multiples of, one number for each coarse group, in float32 (float64
        for a float64 array); None where the values are the steps themselves.
    """

    values: jax.Array
    coarse: jax.Array | None = None

    def step(self, dtype: Any) -> jax.Array:
        """The step between neighbouring codes of each group."""
        values = self.values.astype(dtype)
        return values if self.coarse is None else values * self.coarse


class Scale(Protocol):
    """What the library asks of a rule."""

    def store(
        self, threshold: jax.Array, steps: ArrayLike, channel_axis: ChannelAxis
    ) -> tuple[StoredScale, jax.Array]:
        """The stored scale, and the step that makes the codes.

        Args:
          threshold: of each group, not negative, compact (see `Groups.reduce`); NaN where a
            group is not finite.
          steps: L, the code at the threshold.
          channel_axis: the axis or axes with a coarse scale each, for rules with coarse scales.
        """
        ...

    @property
    def bits(self) -> int:
        """Bits of a stored scale, those of a coarse one not counted."""
        ...


@dataclasses.dataclass(frozen=True)
class FloatScale:
    """A floating-point number for each group.

    Attributes:
      dtype: "float32" (wider for float64 arrays), "float16" or "bfloat16". The shorter ones round
        the scale first, to at most their largest number; codes come from the rounded one, and
        saturate.
    """

    dtype: Literal["float32", "float16", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "float16", "bfloat16"):
            raise ValueError(f"scales are float32, float16 or bfloat16, not {self.dtype!r}")

    def store(
        self, threshold: jax.Array, steps: ArrayLike, channel_axis: ChannelAxis
    ) -> tuple[StoredScale, jax.Array]:
        """Threshold / L, rounded to the dtype."""
        del channel_axis
        step = exact_step(threshold, steps)
        if self.dtype == "float32":
            return StoredScale(step), step
        largest = jnp.finfo(self.dtype).max.astype(step.dtype)  # NaN is not more
        stored = StoredScale(jnp.minimum(step, largest).astype(self.dtype))
        return stored, stored.step(step.dtype)

    @property
    def bits(self) -> int:
        """32 or 16."""
        return 8 * jnp.dtype(self.dtype).itemsize


@dataclasses.dataclass(frozen=True)
class IntScale:
    """Unsigned integers under a coarse floating-point scale (VS-Quant's two levels).

    With s = threshold / L for each vector and γ for each coarse group

        γ = t / (2**M - 1),  s_q = min(round(s / γ), 2**M - 1),  x_q = round(x / s),

    and x̂ = x_q s_q γ, where t is the maximum of s or another threshold of it
    (arXiv:2102.04503, equations 7a to 7j).

    Attributes:
      bits: M, the bits of s_q: 2 to 16.
      coarse: which vectors share γ, by whole axes. The paper's are ``PerChannel()`` for weights
        (the output channel) and ``PerTensor()`` for activations (the layer).
      clipping: the rule that finds t among the s of a coarse group; the paper's is the maximum.
      codes: what x is divided by. ``"float"``, the paper's: s, although s_q γ multiplies
        afterwards. ``"stored"``: s_q γ, with which x̂ is the number of the final grid that lies
        nearest to x.
      order: ``"vector-first"``, the paper's: s_q is s / γ rounded to the nearest integer.
        ``"coarse-first"``: the coarse scale is there first, and each vector takes the least
        multiple of γ that clips nothing within its threshold, so s_q = ⌈s / γ⌉. With codes of s
        that would make every vector longer, so it needs ``codes="stored"``.
      zero: of a scale that rounds to zero. ``"zero"``, the paper's: it is zero, and so is its
        vector, which an accelerator can skip. ``"one"``: it becomes 1.

    Raises:
      ValueError: an option is unknown, or does not go with the others.

    Example:
      >>> from qat_jax import Int, PerVector, Quantizer, quantize
      >>> vs = Quantizer(Int(4, narrow=True), PerVector(2), AbsMax(), scale=IntScale(4))
      >>> q = quantize(jnp.array([0.875, 0.125, 13.125, 0.0]), vs, vector_axis=0)
      >>> q.codes, q.scale, q.coarse.round(4)
      (Array([7, 1, 7, 0], dtype=int8), Array([ 1, 15], dtype=uint8), Array([0.125], dtype=float32))
    """

    bits: int
    coarse: Granularity = PerTensor()
    clipping: Clipping = AbsMax()
    codes: Literal["float", "stored"] = "float"
    order: Literal["vector-first", "coarse-first"] = "vector-first"
    zero: Literal["zero", "one"] = "zero"

    def __post_init__(self) -> None:
        object.__setattr__(self, "bits", self._format.bits)  # checked, and a Python integer
        for name, known in _OPTIONS.items():
            if getattr(self, name) not in known:
                raise ValueError(f"IntScale.{name} is one of {known}, not {getattr(self, name)!r}")
        if self.order == "coarse-first" and self.codes == "float":
            raise ValueError('order="coarse-first" needs codes="stored": s_q γ is never below s')

    def store(
        self, threshold: jax.Array, steps: ArrayLike, channel_axis: ChannelAxis
    ) -> tuple[StoredScale, jax.Array]:
        """s_q and γ; s or s_q γ."""
        step = exact_step(threshold, steps)
        groups = self.coarse.groups(step.ndim, channel_axis, None)
        if groups.runs > 1 or groups.vector_size is not None:  # parts of an axis
            raise ValueError(f"IntScale.coarse is PerTensor() or PerChannel(), not {self.coarse}")
        limit = groups.reduce(step, lambda x, axes: self.clipping.threshold(x, self._format, axes))
        grid = self._format.grid(step)
        coarse = exact_step(limit, grid.high)
        ratio = step * reciprocal(coarse)
        if self.order == "coarse-first":
            # A ratio that only rounding took beyond an integer does not need the next one.
            ratio = jnp.ceil(ratio * (1 - 4 * jnp.finfo(ratio.dtype).eps))
        ratio = grid.round(ratio)
        if self.zero == "one":
            ratio = jnp.where((ratio == 0) & (step > 0), 1, ratio)
        # Integers cannot hold a NaN; the coarse scale has it.
        values = jnp.where(jnp.isnan(ratio), 0, ratio).astype(self._format.code_dtype)
        stored = StoredScale(values, coarse)
        return stored, step if self.codes == "float" else stored.step(step.dtype)

    @property
    def _format(self) -> Int:
        return Int(self.bits, signed=False, narrow=True)


_OPTIONS = {
    "codes": ("float", "stored"),
    "order": ("vector-first", "coarse-first"),
    "zero": ("zero", "one"),
}


@dataclasses.dataclass(frozen=True)
class E4M3:
    """8-bit floating-point scales under one float32 for the whole array (NVFP4's).

    The largest scale is stored as 448, the largest E4M3 number; codes come from the stored scale.
    Source: NVIDIA, "Pretraining Large Language Models with NVFP4" (arXiv:2509.25149), appendix B.
    """

    def store(
        self, threshold: jax.Array, steps: ArrayLike, channel_axis: ChannelAxis
    ) -> tuple[StoredScale, jax.Array]:
        """E4M3 multiples of a common float32."""
        del channel_axis
        step = exact_step(threshold, steps)
        grid = Float(4, 3).grid(step)
        coarse = exact_step(largest_of(step, range(step.ndim), keepdims=True), grid.high)
        values = grid.round(step * reciprocal(coarse))
        stored = StoredScale(values.astype(jnp.float8_e4m3fn), coarse)
        return stored, stored.step(step.dtype)

    @property
    def bits(self) -> int:
        """8."""
        return 8


@dataclasses.dataclass(frozen=True)
class E8M0:
    """Powers of two: the shared exponents of the OCP microscaling formats.

    The exponent is ⌊log2 threshold⌋ - ⌊log2 L⌋, at least -127 and at most 127; codes come from the
    stored scale and saturate. Of float32 arrays those under 2**-127, a number that CPUs flush to 0,
    are 0. With ``AbsMax`` this is the conversion of the OCP Microscaling
    Formats (MX) Specification 1.0, section 6.3.
    """

    def store(
        self, threshold: jax.Array, steps: ArrayLike, channel_axis: ChannelAxis
    ) -> tuple[StoredScale, jax.Array]:
        """A power of two."""
        del channel_axis
        _, exponent = jnp.frexp(threshold)
        _, highest = jnp.frexp(jnp.asarray(steps, threshold.dtype))
        exponent = jnp.clip(exponent - highest, -127, 127)
        step = jnp.ldexp(jnp.ones_like(threshold), exponent)
        step = jnp.where((threshold == 0) | (step < jnp.finfo(step.dtype).tiny), 0, step)
        step = jnp.where(jnp.isfinite(threshold), step, jnp.nan)
        values = jnp.where(step == 0, 2.0**-127, step)  # the format has no 0
        return StoredScale(values.astype(jnp.float8_e8m0fnu)), step

    @property
    def bits(self) -> int:
        """8."""
        return 8


def exact_step(threshold: jax.Array, steps: ArrayLike) -> jax.Array:
    """Threshold / L, 0 where that is too small for its reciprocal and NaN where it is infinite."""
    # A product with 1/L, not a quotient: compilers may turn a division by a constant into one.
    step = threshold * (1 / steps)
    step = jnp.where(jnp.isinf(step), jnp.nan, step)
    return jnp.where(step < jnp.finfo(step.dtype).tiny, 0, step)  # NaN is not less


def reciprocal(step: jax.Array) -> jax.Array:
    """1 / step, and 0 for 0: what has no step quantises to 0."""
    return jnp.where(step == 0, 0, 1 / jnp.where(step == 0, 1, step))
