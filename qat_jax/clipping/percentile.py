"""A percentile of the magnitudes."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax

from qat_jax.clipping.groups import arranged, count, keepdims_shape, largest_of, sums
from qat_jax.clipping.loops import repeat
from qat_jax.clipping.protocol import accumulation_dtype
from qat_jax.formats import Format


@dataclasses.dataclass(frozen=True)
class Percentile:
    """The magnitude that a given share of a group does not exceed.

    Interpolated linearly between the two magnitudes next to it, as NumPy does. The first of them is
    found two bits a pass, from 16 passes over the data (32 in float64).

    Attributes:
      percent: the share, above 0 and at most 100, which is the largest magnitude. 99.9, 99.99 and
        99.999 are those of Wu et al., "Integer quantization for deep learning inference"
        (arXiv:2004.09602, section 3.3).
    """

    percent: float

    def __post_init__(self) -> None:
        if not 0 < self.percent <= 100:
            raise ValueError(f"percent lies above 0 and at most at 100, unlike {self.percent!r}")

    def threshold(self, x: jax.Array, format: Format, axes: tuple[int, ...]) -> jax.Array:
        """The percentile of |x| (of max(x, 0) for an unsigned format) of each group of x."""
        x = lax.stop_gradient(x)
        dtype = accumulation_dtype(x)
        shape = keepdims_shape(x, axes)
        size = math.prod(x.shape[axis] for axis in axes)
        if size == 0:
            return jnp.zeros(shape, dtype)
        groups, axes = arranged(x, axes)
        # By the absolute value no zero has a sign, which order would not know.
        magnitude = jnp.abs(format.magnitude(groups)).astype(dtype)
        # In Python's precision: a float32 cannot count beyond 2**24. The zeros that fill up blocks
        # come first.
        below, share = divmod(self.percent / 100 * (size - 1), 1)
        rank = math.prod(magnitude.shape[axis] for axis in axes) - size + int(below)
        lower = jnp.expand_dims(_at_rank(magnitude, rank, axes), axes)
        not_above = jnp.sum(magnitude <= lower, axes, jnp.int32, keepdims=True)
        next_above = jnp.where(magnitude > lower, magnitude, jnp.inf)
        next_above = jnp.min(next_above, axes, keepdims=True)
        upper = jnp.where((not_above > rank + 1) | jnp.isinf(next_above), lower, next_above)
        threshold = (1 - share) * lower + share * upper
        largest = largest_of(magnitude, axes, keepdims=True)
        return jnp.where(jnp.isfinite(largest), threshold, largest).reshape(shape)


def _at_rank(magnitude: jax.Array, rank: int, axes: tuple[int, ...]) -> jax.Array:
    """The element of each group that ``rank`` others precede in ascending order.

    Numbers without a sign are ordered as the integers of the same bits, and the element sought is
    the largest integer that has no more than ``rank`` others below it.
    """
    width = jnp.finfo(magnitude.dtype).bits
    bits = lax.bitcast_convert_type(magnitude, f"int{width}")

    def try_bits(i: jax.Array, found: jax.Array) -> jax.Array:
        # The sign bit is 0; of the odd number of others the last pass tries one once more.
        shift = jnp.maximum(width - 3 - 2 * i, 0).astype(found.dtype)
        candidates = [found | found.dtype.type(two) << shift for two in (1, 2, 3)]
        lies_below = (bits < jnp.expand_dims(candidate, axes) for candidate in candidates)
        for candidate, below in zip(candidates, sums([*map(count, lies_below)], axes), strict=True):
            found = jnp.where(below <= rank, candidate, found)
        return found

    nothing = jnp.zeros_like(jnp.sum(bits, axes), bits.dtype)
    found = repeat(width // 2, try_bits, nothing)
    return lax.bitcast_convert_type(found, magnitude.dtype)
