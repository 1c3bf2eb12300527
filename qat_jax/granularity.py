"""Granularity: which elements of an array share a scale."""

import dataclasses
import operator
from collections.abc import Sequence

ChannelAxis = int | Sequence[int] | None


@dataclasses.dataclass(frozen=True)
class PerTensor:
    """One scale for the whole array."""

    def group_axes(self, ndim: int, channel_axis: ChannelAxis) -> tuple[int, ...]:
        """The axes along which elements share a scale: all of them."""
        del channel_axis
        return tuple(range(ndim))


@dataclasses.dataclass(frozen=True)
class PerChannel:
    """One scale for each index of the channel axes.

    Inside an operation the channel axes of an operand are those that survive the contraction, so
    that every scale can be taken out of the sum: the output channels of a weight, the tokens or
    examples of an activation.
    """

    def group_axes(self, ndim: int, channel_axis: ChannelAxis) -> tuple[int, ...]:
        """The axes along which elements share a scale: all but the channel axes."""
        if channel_axis is None:
            raise ValueError("PerChannel needs channel_axis: the axis, or axes, with a scale each")
        kept = normalize_axes(channel_axis, ndim)
        return tuple(axis for axis in range(ndim) if axis not in kept)


Granularity = PerTensor | PerChannel


def normalize_axes(axes: int | Sequence[int], ndim: int) -> tuple[int, ...]:
    """Axes as sorted non-negative integers; a ValueError for one that the array lacks."""
    wanted = (axes,) if isinstance(axes, int) else tuple(operator.index(axis) for axis in axes)
    for axis in wanted:
        if not -ndim <= axis < ndim:
            raise ValueError(f"axis {axis} does not exist in an array of {ndim} dimensions")
    return tuple(sorted({axis % ndim for axis in wanted}))
