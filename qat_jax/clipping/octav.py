"""OCTAV: the threshold of least mean squared error, by Newton-Raphson."""

import dataclasses
import functools
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from qat_jax.clipping.bracket import bracketed
from qat_jax.clipping.groups import arranged, count, keepdims_shape, side_by_side, sums
from qat_jax.clipping.loops import repeat, while_loop
from qat_jax.clipping.protocol import accumulation_dtype, uniform
from qat_jax.counts import settle_count
from qat_jax.formats import Format, Int
from qat_jax.granularity import normalize_axes

# Beyond a count of fewer elements a second one finds place in a float32.
_PACKED = 512
# Newton steps after the mean, unless their count is given: the paper's.
_ITERATIONS = 10
# Groups of so many elements are searched in a sample first: every seventeenth run of 64 neighbours.
# Seventeen is prime to the widths of images and layers, so that no column or channel is left out.
_LARGE = 1 << 17
_RUN = 64
_STRIDE = 17
# Groups of fewer elements are cheaper to search again and again than with many thresholds at once.
_FEW = 64
# Iterations that a start may take to settle.
_SETTLING = 13
# A refined threshold that moves by no more than this share is settled …
_SETTLED = 0.02
# … if that is no more than so many standard deviations of rounding noise, beside which clipping by
# more would show. At a threshold of 1 that deviation is the root of the noise constant.
_SETTLED_NOISE = 0.5


@dataclasses.dataclass(frozen=True)
class Octav:
    """The threshold of least mean squared error, by Newton-Raphson (OCTAV).

    Minimises J(s) = c s² P(0 < |x| ≤ s) + E[(|x| - s)²; |x| > s] by iterating

        s ← Σ |x| 1{|x| > s} / (c #{0 < |x| ≤ s} + #{|x| > s})

    (arXiv:2206.06501, equation 6) from the mean of |x| over the non-zero elements. Exact zeros
    carry no rounding noise and are left out. The fixed point lies up to 3 % beyond the minimum of
    J at 2 bits, since the recursion drops the derivative of the indicators; from 4 bits up there
    is no difference to speak of.

    Every iteration reads the data once. Of large groups most are spent on a sample, a seventeenth
    of the elements, and those on all of them end when the threshold has settled, mostly after one
    or two. Groups of up to 256 elements, such as vectors, are searched side by side, one a lane of
    the processor. In training, `refined` begins where the last step's search ended.

    Attributes:
      iterations: Newton steps from the mean of all elements, a static count. None, the default, is
        ten, the paper's; of groups of 131,072 elements or more, ten on a sample and then as many on
        the whole as it takes (the error is measured in `results/searches_resnet20.json`). On
        accelerators `bracketed` stands for the ten, in groups of 64 elements or more. On Gaussian
        and Laplace data ten come within 1e-4 of the fixed point at up to 7 bits, and at 8 within
        1e-2, where 11 come within 1e-3.
      noise: the constant c. ``"grid"`` is 1/(12 L²), right for every grid; ``"paper"`` the
        paper's 4**-B/3 (signed) or 4**-B/12 (unsigned), which differ from it on narrow grids.
    """

    iterations: int | None = None
    noise: Literal["grid", "paper"] = "grid"

    def __post_init__(self) -> None:
        if self.iterations is not None:
            settle_count(self, "iterations", "iterations is a count", least=0)
        if self.noise not in ("grid", "paper"):
            raise ValueError(f'noise is "grid" or "paper", not {self.noise!r}')

    def threshold(self, x: jax.Array, format: Format, axes: tuple[int, ...]) -> jax.Array:
        """The fixed point for each group of x; a ValueError if the codes are not evenly spaced."""
        problem = self._problem(x, format, axes)
        if self.iterations is not None:
            s = problem.iterate(self.iterations)
            return s.reshape(keepdims_shape(x, axes))
        return lax.platform_dependent(
            cpu=lambda: problem.search().reshape(keepdims_shape(x, axes)),
            default=lambda: self.at_once(x, format, axes),
        )

    def at_once(self, x: jax.Array, format: Format, axes: tuple[int, ...]) -> jax.Array:
        """What `threshold` does on accelerators by default: few kernels and few decisions.

        See `bracketed`; of large groups, in a sample, from where the whole settles.
        """
        problem = self._problem(x, format, axes)
        if problem.is_large():
            sample = problem.sample()
            start = bracketed(format.magnitude(sample.groups), sample.axes, problem.c)
            s = problem.settle(start.reshape(problem.zeros.shape), ahead=1)
        elif math.prod(x.shape[axis] for axis in axes) < _FEW:
            s = problem.iterate(_ITERATIONS)
        else:
            s = bracketed(format.magnitude(lax.stop_gradient(x)), axes, problem.c)
        return s.reshape(keepdims_shape(x, axes))

    def refined(
        self, x: jax.Array, format: Format, axes: tuple[int, ...], start: jax.Array
    ) -> jax.Array:
        """The fixed point for each group of x, from thresholds that were right a little before.

        Iterates until no threshold moves by more than 2 %, or, of finer grids, a seventh of a
        step (see `settled`; the error is measured in `results/searches_resnet20.json`). A start
        beyond all of its group, from which no iteration leads down, is halved, and where that does
        not help the search begins from nothing.

        Args:
          x: floating-point array.
          format: the format that x is to be quantised to.
          axes: the axes reduced.
          start: thresholds of x's shape with ``axes`` at length 1; those not finite begin anew.
        """
        problem = self._problem(x, format, axes)
        start = lax.stop_gradient(start).astype(problem.zeros.dtype)
        start = start.reshape(problem.zeros.shape)
        s = lax.platform_dependent(
            start, cpu=problem.settle, default=functools.partial(problem.settle, ahead=1)
        )
        return s.reshape(keepdims_shape(x, axes))

    def _problem(self, x: jax.Array, format: Format, axes: tuple[int, ...]) -> "_Problem":
        format = uniform(format, self)
        x = lax.stop_gradient(x)
        # The paper's constants are those of the plain grid, whatever grid is used.
        model = format if self.noise == "grid" else dataclasses.replace(format, narrow=False)
        groups, group_axes = arranged(x, axes)
        dtype = accumulation_dtype(x)
        c = noise_constant(x, model)
        if side_by_side(groups, group_axes):
            # They are written anew, so that magnitudes cost nothing.
            groups, format = format.magnitude(groups), dataclasses.replace(format, signed=False)
        # Zeros like a sum over x, which is never computed: inside shard_map a loop's state has to
        # vary over the mesh from the start, as x does.
        zeros = jnp.zeros_like(jnp.sum(groups, group_axes), dtype)
        return _Problem(groups, group_axes, format, c, zeros)


def octav(
    x: jax.Array,
    format: Int,
    axis: int | tuple[int, ...] | None = None,
    *,
    iterations: int | None = None,
    noise: Literal["grid", "paper"] = "grid",
) -> jax.Array:
    """OCTAV thresholds of an array: see `Octav` for the method and its parameters.

    Args:
      x: floating-point array of any shape.
      format: the format that x is to be quantised to.
      axis: the axes reduced, all by default.
      iterations: Newton steps, if their count is to be given.
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
    return _threshold(x, Octav(iterations, noise), format, axes)


# Compiled once for a shape: called on arrays, a loop alone would be compiled every time.
@functools.partial(jax.jit, static_argnums=(1, 2, 3), inline=True)
def _threshold(x: jax.Array, rule: Octav, format: Int, axes: tuple[int, ...]) -> jax.Array:
    return rule.threshold(x, format, axes)


class _Problem(NamedTuple):
    """What is searched: groups, and the weight of their rounding noise.

    Attributes:
      groups: the elements, or their magnitudes (see `arranged`).
      axes: of the groups.
      format: what they are quantised to; unsigned where they are magnitudes.
      c: the noise constant.
      zeros: one for each group, in the dtype of thresholds.
    """

    groups: jax.Array
    axes: tuple[int, ...]
    format: Int
    c: jax.Array
    zeros: jax.Array

    def search(self) -> jax.Array:
        """Thresholds found by the fewest passes over the elements."""
        if self.is_large():
            return self.settle(self.sample().iterate(_ITERATIONS))
        return self.iterate(_ITERATIONS)

    def is_large(self) -> bool:
        """Whether a sample of each group is worth searching first."""
        elements = math.prod(self.groups.shape[axis] for axis in self.axes)
        return elements >= _LARGE and self._runs().shape[-2] >= _STRIDE

    def sample(self) -> "_Problem":
        """The same of every seventeenth run."""
        sample = self._runs()[..., ::_STRIDE, :]
        return self._replace(groups=sample, axes=tuple(range(self.axes[0], sample.ndim)))

    def _runs(self) -> jax.Array:
        """Large groups as runs of neighbours, [..., runs, elements].

        The first axis of the groups, which may be sharded, is left alone if others are long enough;
        otherwise a run is a row.
        """
        shape, first = self.groups.shape, self.axes[0]
        run = _RUN if shape[-1] % _RUN == 0 else shape[-1]
        if math.prod(shape[first + 1 :]) >= _STRIDE * run:
            return self.groups.reshape(*shape[: first + 1], -1, run)
        return self.groups.reshape(*shape[:first], -1, shape[-1])

    def iterate(self, iterations: int) -> jax.Array:
        """Thresholds after so many Newton steps from the mean."""
        # From 0, where all but the zeros lie above and no rounding noise weighs, the first step
        # lands on the mean: the start needs no code of its own. A loop, not an unrolled chain: on
        # the CPU it keeps XLA from recomputing x in every pass.
        return repeat(iterations + 1, lambda _, s: self.newton(s)[0], self.zeros)

    def settle(self, start: jax.Array, ahead: int = 0) -> jax.Array:
        """Thresholds that have settled, from some nearby; those not finite begin anew.

        Args:
          start: where to begin.
          ahead: steps before the loop, whose every decision makes an accelerator wait for its host.
        """
        start = jnp.where(jnp.isfinite(start), start, 0) + self.zeros

        def unsettled(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> jax.Array:
            s, last = carry
            return (i == 0) | ((i < _SETTLING) & ~settled(s, last, self.c))

        def newton(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            s, last = carry
            found, above, inside = self.newton(s)
            # Beyond all elements no iteration leads down: half the start first, then the beginning.
            beyond = (above == 0) & ((i == 0) | ((i == 1) & (s == last / 2)))
            lower = jnp.where((i == 0) & (inside > 0), s / 2, 0)
            return jnp.where(beyond, lower, found), s

        carry = start, start
        for i in range(ahead):
            carry = newton(jnp.int32(i), carry)
        s, _ = while_loop(
            lambda i, carry: unsettled(i + ahead, carry),
            lambda i, carry: newton(i + ahead, carry),
            carry,
        )
        return s

    def newton(self, s: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The next s, from one pass over the groups (equation 6), and what it rests on.

        Those are the counts of what lies above this s and of what lies inside and is not 0.

        What lies above s is summed as excess over it. Whatever is summed depends on s: XLA would
        compute all else, such as magnitudes, ahead of a loop and write it to memory.
        """
        wide = jnp.expand_dims(s, self.axes)
        x = self.groups.astype(s.dtype)
        clipped = jnp.minimum(x, wide)
        if self.format.signed is False:
            nonzero = clipped > 0
        else:
            clipped = jnp.maximum(clipped, -wide)
            nonzero = clipped != 0
        excess = jnp.abs(x - clipped)
        above = count(excess != 0)  # NaN is
        if math.prod(x.shape[axis] for axis in self.axes) < _PACKED:
            # Of short groups both counts in one number: a third one to add would double the time.
            excess, packed = sums((excess, above + _PACKED * count(nonzero)), self.axes)
            nonzero = jnp.floor(packed / _PACKED)
            above = packed - _PACKED * nonzero
        else:
            excess, above, nonzero = sums((excess, above, count(nonzero)), self.axes)
        # At s = 0 all is clipped to 0.
        inside = jnp.maximum(nonzero - above, 0)
        weight = self.c * inside + above
        found = (excess + s * above) / jnp.where(weight > 0, weight, 1)
        # Nothing lies above an s of 0, or that rounding took to the maximum: stay.
        return jnp.where((above == 0) | ~jnp.isfinite(s), s, found), above, inside


def noise_constant(x: jax.Array, format: Format) -> jax.Array:
    """The mean square of rounding noise at a threshold of 1, 1/(12 L²)."""
    return jnp.asarray(1 / (12 * jnp.square(format.grid(x).steps)), accumulation_dtype(x))


def settled(s: jax.Array, before: jax.Array, c: jax.Array) -> jax.Array:
    """Whether an iteration moved no threshold by so much that another one would matter.

    Args:
      s: thresholds after it.
      before: thresholds before it.
      c: the noise constant of the grid.

    Returns:
      bool []; False beside NaN.
    """
    share = jnp.minimum(_SETTLED, _SETTLED_NOISE * jnp.sqrt(c))
    return jnp.all(jnp.abs(s - before) <= share * s)
