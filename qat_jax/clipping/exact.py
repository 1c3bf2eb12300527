"""The threshold of least squared error, whatever the data and the format."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qat_jax.clipping.groups import keepdims_shape, merged, rescaled, unit_groups
from qat_jax.clipping.loops import repeat
from qat_jax.clipping.refit import Candidate, best_refit, refit
from qat_jax.formats import FloatGrid, Format, Grid

# Up to so many breakpoints, each is tried.
_BREAKPOINTS = 4096
# The histogram that stands for a larger group, and the candidates tried on it.
_BINS_PER_OCTAVE = 512
_OCTAVES = 16
_CANDIDATES_PER_OCTAVE = 64
_REFINEMENTS = 3


@dataclasses.dataclass(frozen=True)
class Exact:
    """The global minimum of Σ (x - x̂)² over all thresholds, on the format's own codes, or near it.

    As the step Δ shrinks, the codes q of a group change only at breakpoints Δ = |x| / m, with m a
    middle between two codes. In between, the best step is Δ + Σ r q / Σ q², where r = x - Δ q, and
    its error Σ r² - (Σ r q)² / Σ q².

    - Groups with at most 4096 breakpoints (elements times middles: 16 elements at up to 8 bits,
      512 at 4) try them all, a pass over the data for each. The answer is exact, but for rounding.
    - Larger groups try about 64 steps an octave, as far down as √n below the largest of n
      magnitudes: beyond that, clipping the largest costs more than all the others are worth.
      Groups of more than 16,386 elements do so on a histogram of bins 1/512 of an octave wide,
      which takes about as long whatever their size. Three refits of the step to the data follow.
      On Gaussian data the error is within 1 % of the least at up to 6 bits. At 8 the minima lie
      closer than the candidates: at worst it is 38 % beyond the least in groups of 33 elements,
      18 % of 64, 9 % of 256, 3 % of 1,024 and 2 % of 8,192, half of the time at most 2 %.
    """

    def threshold(self, x: jax.Array, format: Format, axes: tuple[int, ...]) -> jax.Array:
        """The best threshold of each group of x."""
        x = lax.stop_gradient(x)
        grid = format.grid(x)
        groups, group_axes, largest = unit_groups(x, format, axes)
        size = math.prod(x.shape[axis] for axis in axes)
        if size == 0:
            return jnp.zeros(keepdims_shape(x, axes), largest.dtype)
        middles = format.midpoints
        tries_all = size * len(middles) <= _BREAKPOINTS
        if tries_all:
            candidates = _breakpoints(groups, group_axes, middles)
            step = best_refit(groups, group_axes, 1.0, grid, *candidates, repeat)
        elif size <= 2 * _BINS:
            candidates = _logarithmic(jnp.zeros_like(largest), size, grid)
            step = best_refit(groups, group_axes, 1.0, grid, *candidates, _one_function)
        else:
            candidates = _logarithmic(jnp.zeros_like(largest.reshape(-1)), size, grid)
            support, weight = _histogram(merged(groups, group_axes))
            step = best_refit(support, (1,), weight, grid, *candidates, _one_function)
            step = step.reshape(largest.shape)
        if not tries_all:
            step = _refined(groups, group_axes, step, grid)
        return rescaled(step * grid.steps, largest).reshape(keepdims_shape(x, axes))


_BINS = _OCTAVES * _BINS_PER_OCTAVE + 1  # one more for the largest itself


def _breakpoints(
    groups: jax.Array, axes: tuple[int, ...], middles: np.ndarray
) -> tuple[Candidate, int]:
    """Steps a little below each breakpoint of each group, and how many."""
    # Far enough for the quotient to round up.
    below = jnp.asarray((1 - 1e-6) / middles, groups.dtype)
    elements = merged(groups, axes).T
    shape = tuple(size for axis, size in enumerate(groups.shape) if axis not in axes)

    def candidate(i: jax.Array) -> jax.Array:
        element = lax.dynamic_index_in_dim(elements, i // len(middles), keepdims=False)
        return (jnp.abs(element) * below[i % len(middles)]).reshape(shape)

    return candidate, elements.shape[0] * len(middles)


def _logarithmic(like: jax.Array, size: int, grid: Grid | FloatGrid) -> tuple[Candidate, int]:
    """Evenly spaced logarithms of steps for groups of a largest magnitude of 1, and how many.

    Thresholds reach from 4, where the largest magnitude gets the first of Int(2)'s codes, down to
    1 / (2 √size).
    """
    octaves = 3 + math.ceil(math.log2(size) / 2)

    def candidate(i: jax.Array) -> jax.Array:
        threshold = 4 * jnp.exp2(-i.astype(like.dtype) / _CANDIDATES_PER_OCTAVE)
        return like + threshold * (1 / grid.steps)

    return candidate, octaves * _CANDIDATES_PER_OCTAVE


def _histogram(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Numbers that stand for those of any row, and how often each occurs in each row.

    The bins are the leading bits of a float32. The fewer than 2**31 numbers below 2**-16 of the
    largest are left out: together they have less than half of its energy.
    """
    drop = 23 - int(math.log2(_BINS_PER_OCTAVE))
    lowest = (127 - _OCTAVES) * _BINS_PER_OCTAVE
    middle = (np.arange(lowest, lowest + _BINS, dtype=np.int32) << drop) + (1 << (drop - 1))
    positive = middle.view(np.float32)
    support = jnp.asarray(np.concatenate([positive, -positive]), rows.dtype)

    leading = lax.bitcast_convert_type(jnp.abs(rows).astype(jnp.float32), jnp.int32) >> drop
    index = leading - lowest
    signed = jnp.where(rows < 0, index + _BINS, index)
    signed = jnp.where(index < 0, 2 * _BINS, signed)  # not counted
    counts = jax.vmap(lambda row: jnp.bincount(row, length=2 * _BINS))(signed)
    return support[None], counts.astype(rows.dtype)


def _one_function(count: int, step: Callable[[jax.Array, Any], Any], state: Any) -> Any:
    """A loop that XLA may compile as a whole, which on long groups is faster than `repeat`."""
    return lax.fori_loop(0, count, step, state)


def _refined(
    groups: jax.Array, axes: tuple[int, ...], step: jax.Array, grid: Grid | FloatGrid
) -> jax.Array:
    """The best step after alternating between codes and step on the data itself (Lloyd)."""

    def refine(
        _: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        least, best, step = carry
        error, refitted = refit(groups, axes, 1.0, step, grid)
        better = error < least
        return jnp.where(better, error, least), jnp.where(better, refitted, best), refitted

    return _one_function(_REFINEMENTS, refine, (jnp.full_like(step, jnp.inf), step, step))[1]
