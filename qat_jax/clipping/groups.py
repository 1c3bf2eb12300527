"""Groups of elements that share a threshold: their layout and their sums."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qat_jax.clipping.protocol import accumulation_dtype
from qat_jax.formats import Format

# Elements that are added up in one go.
_BLOCK = 8192


def keepdims_shape(x: jax.Array, axes: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of x with ``axes`` at length 1."""
    return tuple(1 if axis in axes else size for axis, size in enumerate(x.shape))


def groups_last(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
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


def sums(values: Sequence[jax.Array], kept: int) -> Sequence[jax.Array]:
    """Sums of several arrays over all axes but the first ``kept``, from one pass over the data.

    Blocks first, then their sums: rounding errors grow with the length of a chain of additions.
    Along the first summed axis, which is the one that devices share, all arrays are added as one,
    so that one message tells every device all the sums.

    Returns:
      The sums, in the dtype of the first array; those of integers are exact along all other axes.
    """
    shape = values[0].shape
    first = len(shape)
    while first > kept and math.prod(shape[first - 1 :]) <= _BLOCK:
        first -= 1
    first = max(first, min(kept + 1, len(shape)))

    def add(a: Sequence[jax.Array], b: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
        return tuple(p + q for p, q in zip(a, b, strict=True))

    zeros = tuple(np.zeros((), value.dtype) for value in values)
    parts = tuple(values)
    for axes in (range(first, len(shape)), range(kept + 1, first)):
        parts = lax.reduce(parts, zeros, add, axes)
    dtype = values[0].dtype
    together = jnp.stack([part.astype(dtype) for part in parts], axis=-1)
    if len(shape) > kept:
        together = jnp.sum(together, axis=kept)
    return [together[..., index] for index in range(len(values))]


def largest_of(magnitude: jax.Array, axes: Sequence[int], keepdims: bool = False) -> jax.Array:
    """Maximum over ``axes``; 0 of nothing, NaN beside NaN.

    XLA's CPU backend alone loses a NaN that a number follows.
    """
    axes = tuple(axes)
    largest = jnp.max(magnitude, axis=axes, keepdims=keepdims, initial=0)
    unknown = jnp.any(jnp.isnan(magnitude), axis=axes, keepdims=keepdims)
    return jnp.where(unknown, jnp.nan, largest)


def merged(groups: jax.Array, kept: int) -> jax.Array:
    """Groups in the layout of `groups_last` as the rows of a matrix, zeros of the blocks included.

    It may gather a sharded array.
    """
    return groups.reshape(math.prod(groups.shape[:kept]), math.prod(groups.shape[kept:]))


def unit_groups(x: jax.Array, format: Format, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Groups of x divided by their largest magnitudes, and these.

    Squares of such numbers neither overflow nor vanish. What an unsigned format cannot hold is 0.

    Returns:
      The groups, in the layout of `groups_last`, and one magnitude for each.
    """
    groups = groups_last(x, axes).astype(accumulation_dtype(x))
    magnitude = format.magnitude(groups)
    trailing = range(x.ndim - len(axes), groups.ndim)
    largest = largest_of(magnitude, trailing)
    divisor = jnp.expand_dims(jnp.where(_is_zero(largest), 1, largest), trailing)
    return jnp.sign(groups) * magnitude / divisor, largest


def rescaled(unit: jax.Array, largest: jax.Array) -> jax.Array:
    """Thresholds of x from those of its `unit_groups`: 0 for zeros, not finite beside NaN or ∞."""
    threshold = jnp.minimum(unit * largest, jnp.finfo(largest.dtype).max)
    threshold = jnp.where(jnp.isfinite(largest), threshold, largest)
    return jnp.where(_is_zero(largest), 0, threshold)


def _is_zero(largest: jax.Array) -> jax.Array:
    """Whether a group holds only zeros, or subnormal numbers, which CPUs may flush to 0."""
    return largest < jnp.finfo(largest.dtype).tiny
