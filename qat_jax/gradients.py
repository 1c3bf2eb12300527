"""Gradients: what the backward pass believes about a quantiser.

A rule maps (x, lower, upper, g) to the gradient of x, where g is the gradient of the quantised
array and [lower, upper] is what the threshold s leaves unclipped: [-s, s], or [0, s] on an
unsigned grid; of a group of zeros lower and upper are both 0. Write your own as a function with
that signature; x and g have x's dtype, the bounds at least float32, and what it returns is cast to
that of g.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

GradientRule = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]
ThresholdGradient = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]

_WHICH = np.arange(8, dtype=np.uint8)[:, None]  # bit of eight


def ste(x: jax.Array, lower: jax.Array, upper: jax.Array, g: jax.Array) -> jax.Array:
    """Straight-through estimator: 1 everywhere (arXiv:2206.06501, section 4)."""
    del x, lower, upper
    return g


def pwl(x: jax.Array, lower: jax.Array, upper: jax.Array, g: jax.Array) -> jax.Array:
    """Piece-wise linear: 1 where x is not clipped, 0 where it is (arXiv:2206.06501, section 4)."""
    return _unless(_is_clipped(x, lower, upper), g)


def mad(x: jax.Array, lower: jax.Array, upper: jax.Array, g: jax.Array) -> jax.Array:
    """Magnitude-aware differentiation: 1 where x is not clipped, s/|x| where it is.

    Clipping is read as multiplication by α = clip(x)/x, and α is held constant
    (arXiv:2206.06501, section 4, equation 9). s is the clipping threshold, not the step.
    """
    inside = (x >= lower) & (x <= upper)
    # Only a clipped x divides, and a clipped x is not 0.
    scale = jnp.where(inside, 1, jnp.clip(x, lower, upper) / jnp.where(inside, 1, x))
    return (g * jax.lax.stop_gradient(scale)).astype(g.dtype)


_RULES: dict[str, GradientRule] = {"ste": ste, "pwl": pwl, "mad": mad}


def gradient_rule(gradient: str | GradientRule) -> GradientRule:
    """The rule of a name, or the rule itself; a ValueError lists the names."""
    if callable(gradient):
        return gradient
    if gradient not in _RULES:
        raise ValueError(f"no gradient {gradient!r}: there are {', '.join(_RULES)}, or a function")
    return _RULES[gradient]


def with_gradient(
    forward: Callable[[jax.Array, jax.Array], jax.Array],
    bounds: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]],
    gradient: str | GradientRule,
    threshold_gradient: ThresholdGradient | None = None,
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Give ``forward(x, threshold)`` the backward pass of a rule.

    What waits for the backward pass is x and the threshold, or, where the rule is `pwl`, one bit
    for each element of x: a layer that keeps its quantised input need not keep x beside it. The
    threshold gets no gradient, unless a rule for it is given, which asks for x: nothing is
    differentiated through a search.

    Args:
      forward: maps x and its thresholds to an array of x's shape and dtype.
      bounds: maps x and its thresholds to the least and the largest unclipped number, each
        broadcastable to x.
      gradient: a rule or its name.
      threshold_gradient: maps x, what became of it, its thresholds and the gradient g to that of
        the thresholds; None: they are constants.

    Returns:
      A function of x and threshold with a custom reverse-mode derivative, whose own derivatives are
      taken by the same rule.
    """
    rule = gradient_rule(gradient)

    @jax.custom_vjp
    def function(x: jax.Array, threshold: jax.Array) -> jax.Array:
        return forward(x, threshold)

    def forward_pass(x: jax.Array, threshold: jax.Array) -> tuple[jax.Array, tuple]:
        # The function itself: a second derivative would meet the staircase in what is inside.
        return function(x, threshold), (x, threshold)

    def backward_pass(residuals: tuple, g: jax.Array) -> tuple[jax.Array, jax.Array]:
        x, threshold = residuals
        found = rule(x, *bounds(x, threshold), g)  # the bounds promote half precision
        if threshold_gradient is None:
            of_threshold = jnp.zeros_like(threshold)
        else:
            of_threshold = threshold_gradient(x, forward(x, threshold), threshold, g)
        return jnp.asarray(found, g.dtype), of_threshold

    def forward_pass_of_pwl(x: jax.Array, threshold: jax.Array) -> tuple[jax.Array, tuple]:
        clipped = _is_clipped(x, *bounds(x, threshold))
        return function(x, threshold), (_packed(clipped), threshold)

    def backward_pass_of_pwl(residuals: tuple, g: jax.Array) -> tuple[jax.Array, jax.Array]:
        bits, threshold = residuals
        return _unless(_unpacked(bits, g.shape), g), jnp.zeros_like(threshold)

    if rule is pwl and threshold_gradient is None:
        function.defvjp(forward_pass_of_pwl, backward_pass_of_pwl)
    else:
        function.defvjp(forward_pass, backward_pass)
    return function


def _is_clipped(x: jax.Array, lower: jax.Array, upper: jax.Array) -> jax.Array:
    return (x < lower) | (x > upper)


def _unless(clipped: jax.Array, g: jax.Array) -> jax.Array:
    return jnp.where(clipped, jnp.zeros_like(g), g)


def _packed(flags: jax.Array) -> jax.Array:
    """Flags as bits of uint8 [leading axis, …]: eight stretches of all other axes, one on another.

    The leading axis stays, since devices share arrays along it.
    """
    rows = flags.reshape(_rows(flags.shape))
    rows = jnp.pad(rows, ((0, 0), (0, -rows.shape[1] % 8)))
    bits = rows.reshape(rows.shape[0], 8, rows.shape[1] // 8).astype(jnp.uint8) << _WHICH
    # A reduction: eight operations on slices, compilers would rather do anew from x. A sum, since
    # not every backend has another one across devices; no two have a bit in common.
    return jax.lax.reduce(bits, np.uint8(0), jax.lax.add, (1,))


def _unpacked(bits: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The flags, of that shape, that `_packed` made bits of."""
    flags = (bits[:, None] >> _WHICH) & 1
    count, length = _rows(shape)
    return flags.reshape(count, 8 * bits.shape[1])[:, :length].reshape(shape) != 0


def _rows(shape: tuple[int, ...]) -> tuple[int, int]:
    """The length of the leading axis, or 1 where it is the only one, and that of all others."""
    count = shape[0] if len(shape) > 1 else 1
    return count, math.prod(shape[1:] if len(shape) > 1 else shape)
