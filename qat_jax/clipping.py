"""Clipping: how the threshold of each group is found.

A clipping rule is a frozen value with one method, ``threshold(x, format, axes)``: a pure reduction
of x over ``axes``, which stay with length 1. Thresholds are float32 (float64 for float64 input),
0 for a group of zeros and not finite for a group that holds NaN or infinity. Nothing here is
differentiated: gradients are the business of ``gradients``.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qat_jax.formats import Int
from qat_jax.granularity import normalize_axes

# Elements that are added up in one go.
_BLOCK = 8192


class Clipping(Protocol):
    """What the library asks of a clipping rule; write your own with this one method."""

    def threshold(self, x: jax.Array, format: Int, axes: tuple[int, ...]) -> jax.Array:
        """The threshold of each group of x, with ``axes`` kept at length 1."""
        ...


@dataclasses.dataclass(frozen=True)
class AbsMax:
    """The largest magnitude: nothing is clipped ("max scaling")."""

    def threshold(self, x: jax.Array, format: Int, axes: tuple[int, ...]) -> jax.Array:
        """Max of |x| (of max(x, 0) for an unsigned format) over ``axes``."""
        x = lax.stop_gradient(x)
        largest = jnp.max(format.magnitude(x), axis=axes, keepdims=True, initial=0)
        return largest.astype(accumulation_dtype(x))


@dataclasses.dataclass(frozen=True)
class Fixed:
    """Thresholds given in advance.

    Attributes:
      value: one threshold for every group, or a tuple with one for each group in order.
    """

    value: float | tuple[float, ...]

    def __post_init__(self) -> None:
        if not all(v >= 0 and math.isfinite(v) for v in np.ravel(self.value)):
            raise ValueError(f"thresholds are finite and not negative, unlike {self.value!r}")

    def threshold(self, x: jax.Array, format: Int, axes: tuple[int, ...]) -> jax.Array:
        """The given thresholds, in the shape of the groups of x."""
        del format
        shape = _keepdims_shape(x, axes)
        value = np.asarray(self.value)
        if value.ndim and value.size != math.prod(shape):
            raise ValueError(f"Fixed holds {value.size} thresholds for {math.prod(shape)} groups")
        value = value.reshape(shape) if value.ndim else np.broadcast_to(value, shape)
        return jnp.asarray(value, accumulation_dtype(x))


@dataclasses.dataclass(frozen=True)
class Octav:
    """The threshold of least mean squared error, by Newton-Raphson (OCTAV).

    Minimises J(s) = c s² P(0 < |x| ≤ s) + E[(|x| - s)²; |x| > s] by iterating

        s ← Σ |x| 1{|x| > s} / (c #{0 < |x| ≤ s} + #{|x| > s})

    (arXiv:2206.06501, equation 6) from the mean of |x| over the non-zero elements. Exact zeros
    carry no rounding noise and are left out. The fixed point lies up to 3 % beyond the minimum of
    J at 2 bits, since the recursion drops the derivative of the indicators; from 4 bits up there
    is no difference to speak of.

    Attributes:
      iterations: Newton steps after the mean; a static count. On Gaussian and Laplace data the
        paper's 10 come within 1e-4 of the fixed point at up to 7 bits, and at 8 within 1e-2,
        where 11 come within 1e-3.
      noise: the constant c. ``"grid"`` is 1/(12 L²), right for every grid; ``"paper"`` the
        paper's 4**-B/3 (signed) or 4**-B/12 (unsigned), which differ from it on narrow grids.
    """

    iterations: int = 10
    noise: Literal["grid", "paper"] = "grid"

    def __post_init__(self) -> None:
        if self.iterations < 0:
            raise ValueError(f"iterations is a count, not {self.iterations}")
        if self.noise not in ("grid", "paper"):
            raise ValueError(f'noise is "grid" or "paper", not {self.noise!r}')

    def threshold(self, x: jax.Array, format: Int, axes: tuple[int, ...]) -> jax.Array:
        """The fixed point for each group of x."""
        x = lax.stop_gradient(x)
        # The paper's constants are those of the plain grid, whatever grid is used.
        model = format if self.noise == "grid" else dataclasses.replace(format, narrow=False)
        c = 1 / (12 * jnp.square(model.grid(x).steps))
        groups = _groups_last(x, axes)
        dtype = accumulation_dtype(x)
        c = jnp.asarray(c, dtype)

        def newton(_: int, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            s, nonzero = carry
            total, above = _tail(groups, s, format)
            # All elements but the zeros lie above the first s, which is 0. That step has no
            # rounding noise to weigh and so lands on the mean: the start needs no code of its own.
            nonzero = jnp.maximum(nonzero, above)
            weight = c * (nonzero - above) + above
            # Nothing lies above an s of 0, of infinity, or that rounding took to the maximum: stay.
            step = total / jnp.where(weight > 0, weight, 1)
            return jnp.where(total == 0, s, step), nonzero

        # Zeros like a sum over x, which is never computed: inside shard_map a loop's state has to
        # vary over the mesh from the start, as x does.
        start = jnp.zeros_like(jnp.sum(groups, range(x.ndim - len(axes), groups.ndim)), dtype)
        # A loop, not an unrolled chain: on the CPU it keeps XLA from recomputing x in every pass.
        s, _ = lax.fori_loop(0, self.iterations + 1, newton, (start, start.astype(jnp.int32)))
        return s.reshape(_keepdims_shape(x, axes))


def octav(
    x: jax.Array,
    format: Int,
    axis: int | tuple[int, ...] | None = None,
    *,
    iterations: int = 10,
    noise: Literal["grid", "paper"] = "grid",
) -> jax.Array:
    """OCTAV thresholds of an array: see `Octav` for the method and its parameters.

    Args:
      x: floating-point array of any shape.
      format: the format that x is to be quantised to.
      axis: the axes reduced, all by default.
      iterations: Newton steps.
      noise: which noise constant.

    Returns:
      float32 (float64 for float64 x) of x's shape with the reduced axes at length 1.

    Example:
      >>> x = jax.random.normal(jax.random.key(0), (1000, 1000))
      >>> print(octav(x, Int(4)).round(2))  # the fixed point of a Gaussian
      [[2.56]]
    """
    x = jnp.asarray(x)
    axes = tuple(range(x.ndim)) if axis is None else normalize_axes(axis, x.ndim)
    return Octav(iterations, noise).threshold(x, format, axes)


def accumulation_dtype(x: jax.Array) -> np.dtype:
    """The dtype of sums and scales over x: float32, or float64 where x is."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"quantisers take floating-point arrays, not {x.dtype}: cast it first")
    return jnp.promote_types(x.dtype, jnp.float32)


def _keepdims_shape(x: jax.Array, axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(1 if axis in axes else size for axis, size in enumerate(x.shape))


def _groups_last(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Move the reduced axes to the end, where reductions are fast, and split the long ones.

    Axes are not merged: that would gather a sharded array. Zeros fill the last block of a split
    axis; they count for nothing.
    """
    size = math.prod(x.shape[axis] for axis in axes)
    if size > np.iinfo(np.int32).max:
        raise ValueError(f"a group of {size} elements is more than an int32 can count")
    kept = tuple(axis for axis in range(x.ndim) if axis not in axes)
    x = x.transpose(kept + axes)
    for axis in reversed(range(len(kept), x.ndim)):
        length = x.shape[axis]
        if length > _BLOCK:
            blocks = -(-length // _BLOCK)
            padding = [(0, 0)] * x.ndim
            padding[axis] = (0, blocks * _BLOCK - length)
            x = jnp.pad(x, padding)
            x = x.reshape(*x.shape[:axis], blocks, _BLOCK, *x.shape[axis + 1 :])
    return x


def _tail(groups: jax.Array, s: jax.Array, format: Int) -> tuple[jax.Array, jax.Array]:
    """Sum and count of the magnitudes above s in each group, from one pass.

    The count is an int32: exact, and XLA's CPU backend vectorises the pair only then.
    """
    magnitude = format.magnitude(groups).astype(s.dtype)
    inside = magnitude <= jnp.expand_dims(s, range(s.ndim, groups.ndim))  # NaN is not
    zero = np.zeros((), s.dtype)
    pair = jnp.where(inside, zero, magnitude), jnp.where(inside, 0, 1).astype(jnp.int32)

    def reduce(pair: Sequence[jax.Array], axes: range) -> Sequence[jax.Array]:
        start = zero, np.int32(0)
        return lax.reduce(pair, start, lambda a, b: (a[0] + b[0], a[1] + b[1]), axes)

    # Blocks first, then their sums: rounding errors grow with the length of a chain of additions.
    first = groups.ndim
    while first > s.ndim and math.prod(groups.shape[first - 1 :]) <= _BLOCK:
        first -= 1
    total, above = reduce(reduce(pair, range(first, groups.ndim)), range(s.ndim, first))
    return total, above
