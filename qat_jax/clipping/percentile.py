"""A percentile of the magnitudes."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax

from qat_jax.clipping.groups import groups_last, keepdims_shape, largest_of
from qat_jax.clipping.loops import repeat
from qat_jax.clipping.protocol import accumulation_dtype
from qat_jax.formats import Format


@dataclasses.dataclass(frozen=True)
class Percentile:
    """The magnitude that a given share of a group does not exceed.

    Interpolated linearly between the two magnitudes next to it, as NumPy does. Bisection finds the
    first of them bit by bit, from 31 passes over the data (63 in float64).

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
        groups = groups_last(x, axes)
        # By the absolute value no zero has a sign, which order would not know.
        magnitude = jnp.abs(format.magnitude(groups)).astype(dtype)
        trailing = tuple(range(x.ndim - len(axes), magnitude.ndim))
        # In Python's precision: a float32 cannot count beyond 2**24. The zeros that fill up blocks
        # come first.
        below, share = divmod(self.percent / 100 * (size - 1), 1)
        rank = math.prod(magnitude.shape[axis] for axis in trailing) - size + int(below)
        lower = _at_rank(magnitude, rank, trailing)
        not_above = jnp.sum(magnitude <= lower, trailing, jnp.int32, keepdims=True)
        next_above = jnp.where(magnitude > lower, magnitude, jnp.inf)
        next_above = jnp.min(next_above, trailing, keepdims=True)
        upper = jnp.where((not_above > rank + 1) | jnp.isinf(next_above), lower, next_above)
        threshold = (1 - share) * lower + share * upper
        largest = largest_of(magnitude, trailing, keepdims=True)
        return jnp.where(jnp.isfinite(largest), threshold, largest).reshape(shape)


def _at_rank(magnitude: jax.Array, rank: int, axes: tuple[int, ...]) -> jax.Array:
    """The element of each group that ``rank`` others precede in ascending order.

    Numbers without a sign are ordered as the integers of the same bits, and the element sought is
    the largest integer that has no more than ``rank`` others below it.
    """
    last_bit = jnp.finfo(magnitude.dtype).bits - 1
    bits = lax.bitcast_convert_type(magnitude, f"uint{last_bit + 1}")

    def try_bit(i: jax.Array, found: jax.Array) -> jax.Array:
        candidate = found | jnp.ones_like(found) << (last_bit - 1 - i).astype(found.dtype)
        below = jnp.sum(bits < candidate, axes, jnp.int32, keepdims=True)
        return jnp.where(below <= rank, candidate, found)

    nothing = jnp.zeros_like(jnp.max(bits, axes, keepdims=True))
    found = repeat(last_bit, try_bit, nothing)
    return lax.bitcast_convert_type(found, magnitude.dtype)
