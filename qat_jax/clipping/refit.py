"""Thresholds near the largest magnitude, refitted to the codes that they lead to."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qat_jax.clipping.groups import keepdims_shape, rescaled, sums, unit_groups
from qat_jax.clipping.loops import repeat
from qat_jax.counts import settle_count
from qat_jax.formats import FloatGrid, Format, Grid

Candidate = Callable[[jax.Array], jax.Array]
Loop = Callable[[int, Callable[[jax.Array, Any], Any], Any], Any]


@dataclasses.dataclass(frozen=True)
class Refit:
    """The best of a few steps near the largest magnitude's, each refitted: for vectors.

    A step leads to codes, and codes to the step that suits them best, by least squares. In vectors
    of 16 to 64 elements so few steps are worth trying that they cost little more than `Octav`'s
    iterations, and leave less error than `MseSweep` of a hundred thresholds
    (`results/thresholds_cpu_jax012.json`): of Gaussian numbers in signed codes of up to 4 bits,
    E2M1 too, within 3 % of the least, which `Exact` finds by trying all.

    The largest magnitude gets from one and a quarter codes below the highest, but two thirds of it
    at least, to √(n/12) beyond it, evenly: clipping it by more would cost more than rounding all n
    elements does. Of more than some hundred elements that is too wide a range for few points: take
    `Octav`.

    Attributes:
      points: how many steps are tried, one a pass over the data; a static count.
    """

    points: int = 8

    def __post_init__(self) -> None:
        settle_count(self, "points", "points is a count of at least 2", least=2)

    def threshold(self, x: jax.Array, format: Format, axes: tuple[int, ...]) -> jax.Array:
        """The threshold of each group of x."""
        x = lax.stop_gradient(x)
        grid = format.grid(x)
        groups, group_axes, largest = unit_groups(x, format, axes)
        size = math.prod(x.shape[axis] for axis in axes)
        middles = format.midpoints
        spacing = middles[-1] - (middles[-2] if len(middles) > 1 else -middles[-1])
        # Codes of the largest magnitude: the first, and how far it is to the last.
        first = grid.high - jnp.minimum(1.25 * spacing, grid.high / 3)
        span = grid.high + spacing * math.sqrt(size / 12) - first

        def candidate(i: jax.Array) -> jax.Array:
            code = first + i.astype(largest.dtype) / (self.points - 1) * span
            return jnp.zeros_like(largest) + 1 / code

        step = best_refit(groups, group_axes, 1.0, grid, candidate, self.points, repeat)
        return rescaled(step * grid.steps, largest).reshape(keepdims_shape(x, axes))


def best_refit(
    x: jax.Array,
    axes: tuple[int, ...],
    weight: jax.Array | float,
    grid: Grid | FloatGrid,
    candidate: Candidate,
    count: int,
    loop: Loop,
) -> jax.Array:
    """The step of least weighted error among the refitted candidates; 0 for groups of zeros."""

    def try_candidate(
        i: jax.Array, best: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        error, refitted = refit(x, axes, weight, candidate(i), grid)
        better = error < best[0]  # NaN, where the candidate is 0, is not
        return jnp.where(better, error, best[0]), jnp.where(better, refitted, best[1])

    zero = jnp.zeros_like(candidate(jnp.int32(0)))
    return loop(count, try_candidate, (zero + jnp.inf, zero))[1]


def refit(
    x: jax.Array,
    axes: tuple[int, ...],
    weight: jax.Array | float,
    step: jax.Array,
    grid: Grid | FloatGrid,
) -> tuple[jax.Array, jax.Array]:
    """The error of the best step for the codes that a step leads to, and that step.

    With codes q and what is left, r = x - Δ q, it is Δ + Σ r q / Σ q², and its error
    Σ r² - (Σ r q)² / Σ q². Sums of what is left, not of x: a small error would drown in x².
    """
    wide = jnp.expand_dims(step, axes)
    codes = grid.round(x / wide)
    rest = x - codes * wide
    terms = weight * rest * rest, weight * rest * codes, weight * codes * codes
    square, cross, energy = sums(terms, axes)
    shift = cross / jnp.where(energy > 0, energy, 1)
    return square - shift * cross, step + shift
