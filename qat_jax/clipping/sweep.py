"""The best of evenly spaced thresholds."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from qat_jax.clipping.groups import keepdims_shape, rescaled, sums, unit_groups
from qat_jax.counts import settle_count
from qat_jax.formats import Format

# Points tried in one pass: XLA's CPU backend uses vectors for several sums, mostly not for one.
_TOGETHER = 2


@dataclasses.dataclass(frozen=True)
class MseSweep:
    """The best of ``points`` thresholds, evenly spaced up to the largest magnitude.

    The squared error is that of quantising to the format itself. This is the sweep that OCTAV is
    compared with (arXiv:2206.06501, section 5) and VS-Quant's "mse" (arXiv:2102.04503). It takes
    a pass over the data for two points, and misses an optimum far below an outlier: see `Exact`.

    Attributes:
      points: how many; a static count.
    """

    points: int = 100

    def __post_init__(self) -> None:
        settle_count(self, "points", "points is a count of at least 1")

    def threshold(self, x: jax.Array, format: Format, axes: tuple[int, ...]) -> jax.Array:
        """The threshold of least squared error for each group of x."""
        x = lax.stop_gradient(x)
        grid = format.grid(x)
        groups, group_axes, largest = unit_groups(x, format, axes)

        def squared_error(point: jax.Array) -> jax.Array:
            step = point * (1 / grid.steps)
            return jnp.square(groups - grid.round(groups / step) * step)

        def try_points(
            i: jax.Array, best: tuple[jax.Array, jax.Array]
        ) -> tuple[jax.Array, jax.Array]:
            error, threshold = best
            first = i * _TOGETHER + 1
            # What lies beyond the last is the last once more, which is no better.
            tried = [jnp.minimum(first + k, self.points) for k in range(_TOGETHER)]
            points = [index.astype(largest.dtype) / self.points for index in tried]
            errors = sums([squared_error(point) for point in points], group_axes)
            for point, at_point in zip(points, errors, strict=True):
                better = at_point < error
                error = jnp.where(better, at_point, error)
                threshold = jnp.where(better, point, threshold)
            return error, threshold

        start = jnp.full_like(largest, jnp.inf), jnp.ones_like(largest)
        passes = -(-self.points // _TOGETHER)
        _, threshold = lax.fori_loop(0, passes, try_points, start)
        return rescaled(threshold, largest).reshape(keepdims_shape(x, axes))
