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
# A last axis below this length joins the one before it.
_SHORT = 256
# Partial sums of an axis that is summed alone.
_PARTIAL = 16
# Groups of at most so many elements are reduced all at once, one a lane.
_SMALL = 256
# A longer axis of such groups is reduced in two steps, the first one of so many elements: XLA's CPU
# backend uses lanes for a pair of sums only where the reduction is short.
_UNROLLED = 16
# So many groups whose elements are neighbours in memory are turned at a time: more would be read
# from beyond a cache once for each element of a group. Fewer than sixteen times that lie in one,
# and would be too few parts for devices that share them.
_TURNED = 1024
_TURNS = 16


def keepdims_shape(x: jax.Array, axes: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of x with ``axes`` at length 1."""
    return tuple(1 if axis in axes else size for axis, size in enumerate(x.shape))


def arranged(x: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, tuple[int, ...]]:
    """An array with ``axes`` where reductions are fast, and where that is.

    Of many small groups they come before the last axis, the longer ones split: a processor's lanes
    then run across the groups instead of along one that is soon over. The axes of the groups
    themselves are merged from the end until the last is long enough for that; a leading one may be
    sharded, which gathers nothing. Otherwise they come last (`groups_last`).

    What a reduction over the new axes returns has one entry for each group;
    ``jnp.expand_dims(…, axes)`` spreads it over the groups again.
    """
    if len(axes) < x.ndim and math.prod(x.shape[axis] for axis in axes) <= _SMALL:
        kept = tuple(axis for axis in range(x.ndim) if axis not in axes)
        sizes = [size for axis in axes for size in _parts(x.shape[axis])]
        lanes = [x.shape[axis] for axis in kept]
        while len(lanes) > 1 and lanes[-1] < _SHORT:
            lanes[-2:] = [lanes[-2] * lanes[-1]]
        if x.ndim - 1 not in axes:
            return x.transpose(axes + kept).reshape(*sizes, *lanes), tuple(range(len(sizes)))
        lanes[-1:] = _turned(lanes[-1])
        x = x.transpose(kept + axes).reshape(*lanes, *sizes)
        place = len(lanes) - 1
        return jnp.moveaxis(x, place, -1), tuple(range(place, place + len(sizes)))
    groups = groups_last(x, axes)
    return groups, tuple(range(x.ndim - len(axes), groups.ndim))


def side_by_side(groups: jax.Array, axes: tuple[int, ...]) -> bool:
    """Whether `arranged` groups are small ones, one a lane."""
    return groups.ndim - 1 not in axes


def _parts(size: int) -> tuple[int, ...]:
    """Lengths of the axes that an axis of small groups is split into."""
    return (size // _UNROLLED, _UNROLLED) if size % _UNROLLED == 0 and size > _UNROLLED else (size,)


def _turned(lanes: int) -> tuple[int, int]:
    """How many times how many groups are turned."""
    if lanes < _TURNS * _TURNED:
        return 1, lanes
    length = _divisor(lanes, _TURNED, _TURNED // 16) or lanes
    return lanes // length, length


def groups_last(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Move the reduced axes to the end, where reductions are fast, and split the long ones.

    The first axis, along which arrays are sharded, is never merged with another: that would gather
    the array; of others the last are, where they are short. Zeros fill the last block of a split
    axis; they count for nothing. No axis is left alone: along the first, `sums` adds all arrays as
    one, which is slow for more than partial sums.
    """
    size = math.prod(x.shape[axis] for axis in axes)
    if size > np.iinfo(np.int32).max:
        raise ValueError(f"a group of {size} elements is more than an int32 can count")
    kept = tuple(axis for axis in range(x.ndim) if axis not in axes)
    x = x.transpose(kept + axes)
    while x.ndim > len(kept) + 2 and x.shape[-1] < _SHORT:
        x = x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])
    for axis in reversed(range(len(kept), x.ndim)):
        if x.shape[axis] > _BLOCK:
            x = _split(x, axis, _block(x.shape[axis]))
    if x.ndim == len(kept) + 1 and x.shape[-1] > _PARTIAL:
        x = _split(x, x.ndim - 1, -(-x.shape[-1] // _PARTIAL))
    return x


def _block(size: int) -> int:
    """How long the blocks of an axis are: up to `_BLOCK`, a divisor if there is a fair one."""
    return _divisor(size, _BLOCK, _BLOCK // 8) or _BLOCK


def _divisor(size: int, most: int, beyond: int) -> int | None:
    """The largest divisor of a size up to ``most`` and beyond another number, if there is one."""
    return next((length for length in range(most, beyond, -1) if size % length == 0), None)


def _split(x: jax.Array, axis: int, length: int) -> jax.Array:
    """An axis as blocks of a length, the last of them filled with zeros."""
    blocks = -(-x.shape[axis] // length)
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, blocks * length - x.shape[axis])
    x = jnp.pad(x, padding)
    return x.reshape(*x.shape[:axis], blocks, length, *x.shape[axis + 1 :])


def sums(values: Sequence[jax.Array], axes: tuple[int, ...]) -> Sequence[jax.Array]:
    """Sums of several arrays over the axes of `arranged` groups, from one pass over the data.

    Blocks first, then their sums: rounding errors grow with the length of a chain of additions.
    Along the first summed axis, which is the one that devices share, all arrays are added as one,
    so that one message tells every device all the sums.

    Returns:
      The sums, in the dtype of the first array; those of integers are exact along all other axes.
    """
    shape = values[0].shape
    dtype = values[0].dtype
    kept = len(shape) - len(axes)
    zeros = tuple(np.zeros((), value.dtype) for value in values)

    def add(a: Sequence[jax.Array], b: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
        return tuple(p + q for p, q in zip(a, b, strict=True))

    if side_by_side(values[0], axes):
        parts = tuple(values)
        for axis in reversed(axes):
            parts = lax.reduce(parts, zeros, add, (axis,))
        return [part.astype(dtype) for part in parts]
    first = len(shape)
    while first > kept and math.prod(shape[first - 1 :]) <= _BLOCK:
        first -= 1
    first = max(first, min(kept + 1, len(shape)))
    parts = tuple(values)
    for summed in (range(first, len(shape)), range(kept + 1, first)):
        parts = lax.reduce(parts, zeros, add, summed)
    together = jnp.stack([part.astype(dtype) for part in parts], axis=-1)
    if len(shape) > kept:
        together = jnp.sum(together, axis=kept)
    return [together[..., index] for index in range(len(values))]


def count(flags: jax.Array) -> jax.Array:
    """Flags as `sums` adds them up: int32, since only then XLA's CPU backend uses vectors."""
    return jnp.where(flags, 1, 0).astype(jnp.int32)


def largest_of(magnitude: jax.Array, axes: Sequence[int], keepdims: bool = False) -> jax.Array:
    """Maximum over ``axes``; 0 of nothing, infinity beside NaN.

    A maximum of XLA's CPU backend loses a NaN that a number follows, so none must reach it. It also
    writes what it is the maximum of to memory first, here an array without NaN, unless it is one
    of two results of a reduction: so the other one, where that is fast, says whether there was NaN.
    """
    axes = tuple(sorted(axes))
    # The first of several is left to a maximum alone, which devices know how to share.
    inner = axes[1:] or axes
    slow = len(axes) == 1 and axes[0] < magnitude.ndim - 1 and magnitude.shape[axes[0]] > _UNROLLED
    beside_nan = jnp.isnan(magnitude)
    if axes and not slow:
        magnitude, beside_nan = (
            jnp.expand_dims(found, inner)
            for found in lax.reduce(
                (magnitude, beside_nan.astype(np.int32)),
                (np.zeros((), magnitude.dtype), np.int32(0)),
                lambda a, b: (lax.max(a[0], b[0]), lax.max(a[1], b[1])),
                inner,
            )
        )
    magnitude = jnp.where(beside_nan > 0, jnp.inf, magnitude)
    return jnp.max(magnitude, axis=axes, keepdims=keepdims, initial=0)


def merged(groups: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """`arranged` groups as the rows of a matrix, zeros of their blocks included.

    It may gather a sharded array.
    """
    last = jnp.moveaxis(groups, axes, range(groups.ndim - len(axes), groups.ndim))
    kept = groups.ndim - len(axes)
    return last.reshape(math.prod(last.shape[:kept]), math.prod(last.shape[kept:]))


def unit_groups(
    x: jax.Array, format: Format, axes: tuple[int, ...]
) -> tuple[jax.Array, tuple[int, ...], jax.Array]:
    """Groups of x divided by their largest magnitudes.

    Squares of such numbers neither overflow nor vanish. What an unsigned format cannot hold is 0.

    Returns:
      The `arranged` groups, their axes, and one magnitude for each group.
    """
    groups, axes = arranged(x, axes)
    groups = groups.astype(accumulation_dtype(x))
    magnitude = format.magnitude(groups)
    largest = largest_of(magnitude, axes)
    divisor = jnp.expand_dims(jnp.where(_is_zero(largest), 1, largest), axes)
    return jnp.sign(groups) * magnitude / divisor, axes, largest


def rescaled(unit: jax.Array, largest: jax.Array) -> jax.Array:
    """Thresholds of x from those of its `unit_groups`: 0 for zeros, not finite beside NaN or ∞."""
    threshold = jnp.minimum(unit * largest, jnp.finfo(largest.dtype).max)
    threshold = jnp.where(jnp.isfinite(largest), threshold, largest)
    return jnp.where(_is_zero(largest), 0, threshold)


def _is_zero(largest: jax.Array) -> jax.Array:
    """Whether a group holds only zeros, or subnormal numbers, which CPUs may flush to 0."""
    return largest < jnp.finfo(largest.dtype).tiny
