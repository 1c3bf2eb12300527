"""OCTAV: the threshold of least mean squared error, by Newton-Raphson."""

import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qat_jax.clipping.groups import arranged, keepdims_shape, sums
from qat_jax.clipping.protocol import accumulation_dtype, uniform
from qat_jax.formats import Format, Int
from qat_jax.granularity import normalize_axes

# A refined threshold that moves by no more than this share is settled.
_SETTLED = 0.02


@dataclasses.dataclass(frozen=True)
class Octav:
    """The threshold of least mean squared error, by Newton-Raphson (OCTAV).

    Minimises J(s) = c s² P(0 < |x| ≤ s) + E[(|x| - s)²; |x| > s] by iterating

        s ← Σ |x| 1{|x| > s} / (c #{0 < |x| ≤ s} + #{|x| > s})

    (arXiv:2206.06501, equation 6) from the mean of |x| over the non-zero elements. Exact zeros
    carry no rounding noise and are left out. The fixed point lies up to 3 % beyond the minimum of
    J at 2 bits, since the recursion drops the derivative of the indicators; from 4 bits up there
    is no difference to speak of.

    Every iteration reads the data once. Groups of up to 256 elements, such as vectors, are searched
    side by side, one a lane of the processor. In training, `refined` begins where the last step's
    search ended, and is then done after one iteration, mostly.

    Attributes:
      iterations: Newton steps after the mean; a static count. On Gaussian and Laplace data the
        paper's 10 come within 1e-4 of the fixed point at up to 7 bits, and at 8 within 1e-2,
        where 11 come within 1e-3.
      noise: the constant c. ``"grid"`` is 1/(12 L²), right for every grid; ``"paper"`` the
        paper's 4**-B/3 (signed) or 4**-B/12 (unsigned), which differ from it on narrow grids.
    """

    iterations: int = 10
    noise: Literal["grid", "paper"] = "grid"

    def __post_init__(self) -> None:
        if self.iterations < 0:
            raise ValueError(f"iterations is a count, not {self.iterations}")
        if self.noise not in ("grid", "paper"):
            raise ValueError(f'noise is "grid" or "paper", not {self.noise!r}')

    def threshold(self, x: jax.Array, format: Format, axes: tuple[int, ...]) -> jax.Array:
        """The fixed point for each group of x; a ValueError if the codes are not evenly spaced."""
        problem = self._problem(x, format, axes)

        def newton(_: int, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            s, nonzero = carry
            total, above = problem.tail(s)
            # All elements but the zeros lie above the first s, which is 0. That step has no
            # rounding noise to weigh and so lands on the mean: the start needs no code of its own.
            nonzero = jnp.maximum(nonzero, above)
            return problem.newton(s, total, above, nonzero), nonzero

        # A loop, not an unrolled chain: on the CPU it keeps XLA from recomputing x in every pass.
        start = (problem.zeros, problem.zeros)
        s, _ = lax.fori_loop(0, self.iterations + 1, newton, start)
        return s.reshape(keepdims_shape(x, axes))

    def refined(
        self, x: jax.Array, format: Format, axes: tuple[int, ...], start: jax.Array
    ) -> jax.Array:
        """The fixed point for each group of x, from thresholds that were right a little before.

        Iterates until no threshold moves by more than 2 %, which near the fixed point an iteration
        takes most of away, and the error grows with the square of what is left
        (`results/carried_*.json`). A start beyond all of its group, from which no iteration leads
        down, is replaced by 0.

        Args:
          x: floating-point array.
          format: the format that x is to be quantised to.
          axes: the axes reduced.
          start: thresholds of x's shape with ``axes`` at length 1; those not finite begin anew.
        """
        problem = self._problem(x, format, axes)
        start = start.astype(problem.zeros.dtype).reshape(problem.zeros.shape)
        start = jnp.where(jnp.isfinite(start), start, 0) + problem.zeros

        def unsettled(carry: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
            i, s, last = carry
            moves = ~(jnp.abs(s - last) <= _SETTLED * s)  # NaN never settles
            return (i == 0) | ((i < self.iterations + 2) & jnp.any(moves))

        def newton(
            carry: tuple[jax.Array, jax.Array, jax.Array],
        ) -> tuple[jax.Array, jax.Array, jax.Array]:
            i, s, _ = carry
            total, above, nonzero = problem.tail_and_nonzero(s)
            found = problem.newton(s, total, above, nonzero)
            return i + 1, jnp.where((i == 0) & (total == 0), 0, found), s

        _, s, _ = lax.while_loop(unsettled, newton, (jnp.int32(0), start, start))
        return s.reshape(keepdims_shape(x, axes))

    def _problem(self, x: jax.Array, format: Format, axes: tuple[int, ...]) -> "_Problem":
        format = uniform(format, self)
        x = lax.stop_gradient(x)
        # The paper's constants are those of the plain grid, whatever grid is used.
        model = format if self.noise == "grid" else dataclasses.replace(format, narrow=False)
        c = 1 / (12 * jnp.square(model.grid(x).steps))
        groups, group_axes = arranged(x, axes)
        dtype = accumulation_dtype(x)
        # Zeros like a sum over x, which is never computed: inside shard_map a loop's state has to
        # vary over the mesh from the start, as x does.
        zeros = jnp.zeros_like(jnp.sum(groups, group_axes), dtype)
        return _Problem(groups, group_axes, format, jnp.asarray(c, dtype), zeros)


def octav(
    x: jax.Array,
    format: Int,
    axis: int | tuple[int, ...] | None = None,
    *,
    iterations: int = 10,
    noise: Literal["grid", "paper"] = "grid",
) -> jax.Array:
    """OCTAV thresholds of an array: see `Octav` for the method and its parameters.

    Args:
      x: floating-point array of any shape.
      format: the format that x is to be quantised to.
      axis: the axes reduced, all by default.
      iterations: Newton steps.
      noise: which noise constant.

    Returns:
      float32 (float64 for float64 x) of x's shape with the reduced axes at length 1.

    Example:
      >>> x = jax.random.normal(jax.random.key(0), (1000, 1000))
      >>> print(octav(x, Int(4)).round(2))  # the fixed point of a Gaussian
      [[2.56]]
    """
    x = jnp.asarray(x)
    axes = tuple(range(x.ndim)) if axis is None else normalize_axes(axis, x.ndim)
    return Octav(iterations, noise).threshold(x, format, axes)


class _Problem(NamedTuple):
    """What is searched: groups, and the weight of their rounding noise.

    Attributes:
      groups: the elements (see `arranged`).
      axes: of the groups.
      format: what they are quantised to.
      c: the noise constant.
      zeros: one for each group, in the dtype of thresholds.
    """

    groups: jax.Array
    axes: tuple[int, ...]
    format: Int
    c: jax.Array
    zeros: jax.Array

    def newton(
        self, s: jax.Array, total: jax.Array, above: jax.Array, nonzero: jax.Array
    ) -> jax.Array:
        """The next s, from the sum and the count of the magnitudes above it (equation 6)."""
        weight = self.c * (nonzero - above) + above
        # Nothing lies above an s of 0, of infinity, or that rounding took to the maximum: stay.
        return jnp.where(total == 0, s, total / jnp.where(weight > 0, weight, 1))

    def tail(self, s: jax.Array) -> Sequence[jax.Array]:
        """Sum and count of the magnitudes above s in each group, from one pass."""
        return sums(self._above(s), self.axes)

    def tail_and_nonzero(self, s: jax.Array) -> Sequence[jax.Array]:
        """`tail`, and the count of what is not 0."""
        nonzero = jnp.where(self._magnitude == 0, 0, 1).astype(jnp.int32)
        return sums((*self._above(s), nonzero), self.axes)

    @property
    def _magnitude(self) -> jax.Array:
        return self.format.magnitude(self.groups).astype(self.zeros.dtype)

    def _above(self, s: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Magnitudes, 0 where not above s, and whether they are.

        Counted with int32: XLA's CPU backend vectorises the pair only then.
        """
        inside = self._magnitude <= jnp.expand_dims(s, self.axes)  # NaN is not
        above = jnp.where(inside, np.zeros((), s.dtype), self._magnitude)
        return above, jnp.where(inside, 0, 1).astype(jnp.int32)
