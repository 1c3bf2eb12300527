"""The threshold that loses least information about the distribution of magnitudes."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax

from qat_jax.clipping.groups import keepdims_shape, merged, rescaled, unit_groups
from qat_jax.clipping.protocol import uniform
from qat_jax.counts import settle_count
from qat_jax.formats import Format


@dataclasses.dataclass(frozen=True)
class Entropy:
    """The threshold of least Kullback-Leibler divergence (TensorRT's calibration).

    A group's non-zero magnitudes are counted in evenly spaced bins up to the largest. For a
    threshold at the upper edge of bin i,

    - P is the counts of the bins below it, with all that lies above added to the last of them;
    - Q is the same bins without what lies above, merged into as many runs as there are codes
      ≥ 0, each run's count spread evenly over those of its bins that are not empty;

    and, both normalised, KL(P‖Q) = Σ P log(P/Q) decides. It is infinite where P's last bin holds
    nothing but what was added. Sources: Migacz, "8-bit inference with TensorRT" (GTC 2017);
    Wu et al. (arXiv:2004.09602, section 3.3).

    A histogram has at most as many bins as its group has elements, and a threshold at least as
    many bins as there are codes: groups with no more elements than codes, such as short vectors,
    keep their largest magnitude. In groups of a few hundred elements, such as a channel of weights,
    most bins are empty and the divergence is mostly chance. The data is read twice; each candidate
    then costs a pass over the histograms.

    Attributes:
      bins: of the histogram; a static count.
      candidates: thresholds tried, evenly spaced in bins; a static count.
    """

    bins: int = 2048
    candidates: int = 128

    def __post_init__(self) -> None:
        for name in ("bins", "candidates"):
            settle_count(self, name, f"{name} is a count of at least 1")

    def threshold(self, x: jax.Array, format: Format, axes: tuple[int, ...]) -> jax.Array:
        """The threshold for each group of x; a ValueError if the codes are not evenly spaced."""
        format = uniform(format, self)
        x = lax.stop_gradient(x)
        levels = jnp.asarray(format.grid(x).high, jnp.int32) + 1
        groups, group_axes, largest = unit_groups(x, format, axes)
        bins = min(self.bins, max(1, math.prod(x.shape[axis] for axis in axes)))
        counts = _histogram(merged(groups, group_axes), bins)
        spare = jnp.maximum(bins - levels, 0)

        def try_end(k: jax.Array, best: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            divergence, end = best
            candidate = bins - spare * k // max(self.candidates - 1, 1)
            at_candidate = _divergence(counts, candidate, levels).reshape(largest.shape)
            at_candidate = at_candidate.astype(largest.dtype)
            better = at_candidate < divergence
            return jnp.where(better, at_candidate, divergence), jnp.where(better, candidate, end)

        start = jnp.full_like(largest, jnp.inf), jnp.full_like(largest, bins, jnp.int32)
        _, end = lax.fori_loop(0, self.candidates, try_end, start)
        unit = end.astype(largest.dtype) / bins
        return rescaled(unit, largest).reshape(keepdims_shape(x, axes))


def _histogram(groups: jax.Array, bins: int) -> jax.Array:
    """Counts of each row's non-zero magnitudes, of at most 1, in bins from 0 to 1."""
    magnitude = jnp.abs(groups)
    index = jnp.minimum((magnitude * bins).astype(jnp.int32), bins - 1)
    outside = bins  # not counted
    index = jnp.where(magnitude > 0, index, outside)
    return jax.vmap(lambda row: jnp.bincount(row, length=bins))(index).astype(jnp.int32)


def _divergence(counts: jax.Array, end: jax.Array, levels: jax.Array) -> jax.Array:
    """KL(P‖Q) of each row of a histogram clipped at bin ``end``, which may be infinite."""
    bins = counts.shape[1]
    bin = jnp.arange(bins)
    level = bin * levels // end
    first, past = (jnp.minimum(-(-edge * end // levels), bins) for edge in (level, level + 1))

    def run_sums(values: jax.Array) -> tuple[jax.Array, jax.Array]:
        until = jnp.pad(jnp.cumsum(values, axis=1), [(0, 0), (1, 0)])
        return until[:, past] - until[:, first], until[:, end][:, None]

    merged, inside = run_sums(counts)
    occupied, _ = run_sums((counts > 0).astype(jnp.int32))
    total = jnp.sum(counts, axis=1, keepdims=True)
    clipped = counts + jnp.where(bin == end - 1, total - inside, 0)
    p = clipped / jnp.maximum(total, 1)
    q = jnp.where(counts > 0, merged / jnp.maximum(occupied, 1) / jnp.maximum(inside, 1), 0)
    counted = (bin < end) & (p > 0)
    ratio = jnp.where(counted, p, 1) / jnp.where(counted, q, 1)
    return jnp.sum(p * jnp.log(ratio), axis=1)
