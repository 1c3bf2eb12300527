"""The OCTAV fixed point of each group, from many candidates tried at once: for accelerators.

There a pass over the data costs little more than the start of its kernels, so that two passes
with 32 thresholds each are much cheaper than ten with one.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_CANDIDATES = 32
# The first candidates but 0, over the mean of what is not 0. Few fixed points lie beyond: the
# largest element alone must be as much as thousands of others.
_LOWEST, _HIGHEST = 0.5, 2048.0
_LOG_RATIO = math.log(_HIGHEST / _LOWEST) / (_CANDIDATES - 2)


def bracketed(magnitude: jax.Array, axes: tuple[int, ...], c: jax.Array) -> jax.Array:
    """The least fixed point of OCTAV's recursion (arXiv:2206.06501, equation 6) in each group.

    Candidates a third apart say between which two it lies, and candidates between those two where:
    to 1 % of its value, from where two steps of Newton's take it on. Beyond 2,048 means the second
    ones reach to the largest element, a thirtieth of that apart.

    Args:
      magnitude: at least 0, any shape.
      axes: the axes reduced.
      c: the noise constant.

    Returns:
      Thresholds in the dtype of c, of the shape of ``magnitude`` with ``axes`` at length 1; 0 for
      zeros, not finite beside what is not.
    """
    magnitude = magnitude.astype(c.dtype)[..., None]
    total, nonzero, largest = _summary(magnitude, axes)
    mean = total / jnp.maximum(nonzero, 1)
    # Computed, since constants would be kept for a backward pass that computes all of this again.
    index = lax.iota(c.dtype, _CANDIDATES)
    candidates = mean * jnp.where(index > 0, _LOWEST * jnp.exp((index - 1) * _LOG_RATIO), 0)
    excess, above = _beyond(magnitude, candidates, axes)
    below, _ = _below(candidates, excess, above, nonzero, c)
    last = jnp.max(jnp.where(below, candidates, 0), -1, keepdims=True)
    end = jnp.maximum(candidates[..., -1:], largest)
    next_ = jnp.min(jnp.where(below, end, candidates), -1, keepdims=True)
    candidates = last + (next_ - last) * (index / (_CANDIDATES - 1))
    below, found = _below(candidates, *_beyond(magnitude, candidates, axes), nonzero, c)
    # Where even 0 is not below, all is 0 or something is not finite, and so is what was found.
    s = jnp.max(jnp.where(below, found, 0), -1, keepdims=True)
    s = jnp.where(below[..., :1], s, found[..., :1])
    excess, above = _beyond(magnitude, s, axes)
    _, found = _below(s, excess, above, nonzero, c)
    return jnp.where(above > 0, found, s)[..., 0]


def _summary(magnitude: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The sum of each group, how many of it are not 0, and the largest, in one pass."""
    zero = np.zeros((), magnitude.dtype)
    found = lax.reduce(
        (magnitude, (magnitude > 0).astype(magnitude.dtype), magnitude),
        (zero, zero, zero),
        lambda a, b: (a[0] + b[0], a[1] + b[1], lax.max(a[2], b[2])),
        axes,
    )
    total, nonzero, largest = (jnp.expand_dims(part, axes) for part in found)
    return total, nonzero, largest


def _beyond(
    magnitude: jax.Array, candidates: jax.Array, axes: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    """By how much the elements of each group lie beyond each candidate, in all, and how many do."""
    excess = magnitude - jnp.minimum(magnitude, candidates)
    zero = np.zeros((), excess.dtype)
    sums = lax.reduce(
        (excess, (excess > 0).astype(excess.dtype)),
        (zero, zero),
        lambda a, b: (a[0] + b[0], a[1] + b[1]),
        axes,
    )
    return jnp.expand_dims(sums[0], axes), jnp.expand_dims(sums[1], axes)


def _below(
    candidates: jax.Array, excess: jax.Array, above: jax.Array, nonzero: jax.Array, c: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Which candidates all lie below the fixed point, and where a step from each leads."""
    weight = c * (nonzero - above) + above
    found = (excess + candidates * above) / jnp.where(weight > 0, weight, 1)
    beyond = jnp.logical_not(found > candidates)
    return jnp.cumsum(beyond, -1) == 0, found
