"""The best of evenly spaced thresholds."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from qat_jax.clipping.groups import keepdims_shape, rescaled, sums, unit_groups
from qat_jax.formats import Format


@dataclasses.dataclass(frozen=True)
class MseSweep:
    """The best of ``points`` thresholds, evenly spaced up to the largest magnitude.

    The squared error is that of quantising to the format itself. This is the sweep that OCTAV is
    compared with (arXiv:2206.06501, section 5) and VS-Quant's "mse" (arXiv:2102.04503). It takes
    a pass over the data for each point, and misses an optimum far below an outlier: see `Exact`.

    Attributes:
      points: how many; a static count.
    """

    points: int = 100

    def __post_init__(self) -> None:
        if self.points < 1:
            raise ValueError(f"points is a count of at least 1, not {self.points!r}")

    def threshold(self, x: jax.Array, format: Format, axes: tuple[int, ...]) -> jax.Array:
        """The threshold of least squared error for each group of x."""
        x = lax.stop_gradient(x)
        grid = format.grid(x)
        groups, group_axes, largest = unit_groups(x, format, axes)

        def try_point(
            i: jax.Array, best: tuple[jax.Array, jax.Array]
        ) -> tuple[jax.Array, jax.Array]:
            error, threshold = best
            point = i.astype(largest.dtype) / self.points
            step = point * (1 / grid.steps)
            rest = groups - grid.round(groups / step) * step
            (at_point,) = sums([jnp.square(rest)], group_axes)
            better = at_point < error
            return jnp.where(better, at_point, error), jnp.where(better, point, threshold)

        start = jnp.full_like(largest, jnp.inf), jnp.ones_like(largest)
        _, threshold = lax.fori_loop(1, self.points + 1, try_point, start)
        return rescaled(threshold, largest).reshape(keepdims_shape(x, axes))
