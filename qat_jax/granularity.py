"""Granularity: which elements of an array share a scale.

A granularity is a frozen value with one method, ``groups``, which says where in an array of a
given rank the groups lie. Scales are kept compact: one number a group, with the array's own number
of dimensions.
"""

import dataclasses
import math
import operator
from collections.abc import Callable, Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from qat_jax.counts import settle_count

ChannelAxis = int | Sequence[int] | None
VectorAxis = int | Sequence[int] | None

_LONGEST_VECTOR = 256


@dataclasses.dataclass(frozen=True)
class Groups:
    """Where the groups of an array lie.

    Attributes:
      axes: the axes along which elements share a scale, ascending.
      vector_size: elements of a vector; the axes, adjacent and read in order, are cut into
        vectors of so many elements, the last one shorter. None: the axes are not cut.
      runs: the first axis is cut into so many equal runs, which share no scale.
    """

    axes: tuple[int, ...]
    vector_size: int | None = None
    runs: int = 1

    def reduce(
        self, x: jax.Array, reduction: Callable[[jax.Array, tuple[int, ...]], jax.Array]
    ) -> jax.Array:
        """One number for each group.

        Args:
          x: the array.
          reduction: maps an array and the axes to reduce to an array with these axes at length 1.
            It never sees an element that is not in x: the shorter last vectors are reduced by
            themselves.

        Returns:
          An array of x's rank. The reduced axes have length 1; of those cut into vectors the
          first has one entry for each vector.
        """
        if self.runs > 1:
            length = self._run_length(x.shape)
            x = x.reshape(self.runs, length, *x.shape[1:])
            return jnp.squeeze(reduction(x, (1, *(axis + 1 for axis in self.axes[1:]))), 1)
        if self.vector_size is None:
            return reduction(x, self.axes)
        first, before, after = self._split(x.shape)
        length = self._length(x.shape)
        whole = length // self.vector_size
        cut = whole * self.vector_size
        x = x.reshape(*before, length, *after)
        parts = []
        if whole or not length:
            vectors = jax.lax.slice_in_dim(x, 0, cut, axis=first)
            vectors = vectors.reshape(*before, whole, self.vector_size, *after)
            parts.append(jnp.squeeze(reduction(vectors, (first + 1,)), first + 1))
        if cut < length:
            rest = jax.lax.slice_in_dim(x, cut, length, axis=first)
            parts.append(reduction(rest, (first,)))
        reduced = jnp.concatenate(parts, first) if len(parts) > 1 else parts[0]
        return jnp.expand_dims(reduced, self.axes[1:])

    def expand(self, scale: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """A compact array, ready to be multiplied with one of the original shape.

        Args:
          scale: what `reduce` returned, or anything that broadcasts to that or to ``shape``.
          shape: of the original array.

        Returns:
          An array that broadcasts to ``shape``.
        """
        if scale.ndim != len(shape):
            return scale
        if self.runs > 1 and scale.shape[0] == self.runs:
            runs, *others = scale.shape
            repeated = (runs, self._run_length(shape), *others)
            # Not jnp.repeat, which does not know what to do on a mesh of explicit axes.
            return jnp.broadcast_to(scale[:, None], repeated).reshape(-1, *others)
        compact = self.compact_shape(shape)
        if self.vector_size is None or any(scale.shape[a] != compact[a] for a in self.axes):
            return scale  # not one number for each vector: it broadcasts as it is
        first, before, after = self._split(scale.shape)
        count = scale.shape[first]
        length = self._length(shape)
        scale = scale.reshape(*before, count, 1, *after)
        scale = jnp.broadcast_to(scale, (*before, count, self.vector_size, *after))
        scale = scale.reshape(*before, count * self.vector_size, *after)
        scale = jax.lax.slice_in_dim(scale, 0, length, axis=first)
        return scale.reshape(*before, *(shape[axis] for axis in self.axes), *after)

    def compact_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of one number for each group of an array of a shape."""
        compact = [1 if axis in self.axes else size for axis, size in enumerate(shape)]
        if self.runs > 1:
            compact[0] = self.runs
        if self.vector_size is not None:
            compact[self.axes[0]] = -(-self._length(shape) // self.vector_size)
        return tuple(compact)

    def has_rest(self, shape: tuple[int, ...]) -> bool:
        """Whether vectors of two lengths occur."""
        if self.vector_size is None:
            return False
        whole, rest = divmod(self._length(shape), self.vector_size)
        return whole > 0 and rest > 0

    def _run_length(self, shape: tuple[int, ...]) -> int:
        if shape[0] % self.runs:
            raise ValueError(
                f"{shape[0]} examples cannot be cut into {self.runs} equal shards: "
                "choose a batch size that can"
            )
        return shape[0] // self.runs

    def _length(self, shape: tuple[int, ...]) -> int:
        return math.prod(shape[axis] for axis in self.axes)

    def _split(self, shape: tuple[int, ...]) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
        first, last = self.axes[0], self.axes[-1]
        return first, shape[:first], shape[last + 1 :]


class Granularity(Protocol):
    """What the library asks of a granularity."""

    def groups(self, ndim: int, channel_axis: ChannelAxis, vector_axis: VectorAxis) -> Groups:
        """Where the groups of an array of a rank lie."""
        ...


@dataclasses.dataclass(frozen=True)
class PerTensor:
    """One scale for the whole array."""

    def groups(self, ndim: int, channel_axis: ChannelAxis, vector_axis: VectorAxis) -> Groups:
        """All axes share a scale."""
        del channel_axis, vector_axis
        return Groups(tuple(range(ndim)))


@dataclasses.dataclass(frozen=True)
class PerShard:
    """One scale for each shard of a batch, for activations that are split over devices.

    What devices find for themselves needs no collective, where `PerTensor` needs one in every
    iteration of a search. The shards are counted here and not on the machine, so a network
    computes the same on any number of devices.

    Attributes:
      count: the equal parts of the leading axis, 1 or more.
    """

    count: int

    def __post_init__(self) -> None:
        settle_count(self, "count", "a batch has at least 1 shard")

    def groups(self, ndim: int, channel_axis: ChannelAxis, vector_axis: VectorAxis) -> Groups:
        """All axes share a scale, the leading one within its shard."""
        del channel_axis, vector_axis
        return Groups(tuple(range(ndim)), runs=self.count)


@dataclasses.dataclass(frozen=True)
class PerChannel:
    """One scale for each index of the channel axes.

    Inside an operation the channel axes of an operand are those that survive the contraction, so
    that every scale can be taken out of the sum: the output channels of a weight, the tokens or
    examples of an activation.
    """

    def groups(self, ndim: int, channel_axis: ChannelAxis, vector_axis: VectorAxis) -> Groups:
        """All axes but the channel axes share a scale."""
        del vector_axis
        if channel_axis is None:
            raise ValueError("PerChannel needs channel_axis: the axis, or axes, with a scale each")
        kept = normalize_axes(channel_axis, ndim)
        return Groups(tuple(axis for axis in range(ndim) if axis not in kept))


@dataclasses.dataclass(frozen=True)
class PerVector:
    """One scale for each vector of consecutive elements of the contracted dimension.

    This is VS-Quant's granularity (arXiv:2102.04503, section 4). Inside an operation a vector lies
    along the input features: of a linear layer's token, of a convolution's pixel or kernel
    position. The last vector is shorter if ``size`` does not divide the dimension, the only one
    if it exceeds it.

    A depthwise kernel has one input feature, and a scale for each element would be no
    quantisation; its vectors run through the kernel's window, which is what is summed up there.
    Its input's vectors run along the features of a pixel as elsewhere.

    Attributes:
      size: V, the elements of a vector, 1 to 256.
    """

    size: int

    def __post_init__(self) -> None:
        says = f"vectors have 1 to {_LONGEST_VECTOR} elements"
        settle_count(self, "size", says, most=_LONGEST_VECTOR)

    def groups(self, ndim: int, channel_axis: ChannelAxis, vector_axis: VectorAxis) -> Groups:
        """The vector axes, cut; all others have scales of their own."""
        del channel_axis
        axes = () if vector_axis is None else normalize_axes(vector_axis, ndim)
        if not axes:  # None, or an operand of which nothing is contracted
            raise ValueError("PerVector needs vector_axis: the axis along which vectors lie")
        if axes != tuple(range(axes[0], axes[0] + len(axes))):
            raise ValueError(f"vectors run through adjacent axes, not {axes}: transpose the array")
        return Groups(axes, self.size)


def normalize_axes(axes: int | Sequence[int], ndim: int) -> tuple[int, ...]:
    """Axes as sorted non-negative integers; a ValueError for one that the array lacks."""
    several = (axes,) if isinstance(axes, int | np.integer) else axes
    wanted = tuple(operator.index(axis) for axis in several)
    for axis in wanted:
        if not -ndim <= axis < ndim:
            raise ValueError(f"axis {axis} does not exist in an array of {ndim} dimensions")
    return tuple(sorted({axis % ndim for axis in wanted}))
