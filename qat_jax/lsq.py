"""The scale of LSQ's gradient (Esser et al., "Learned Step Size Quantization", arXiv:1902.08153).

The gradient itself is `fake_quant`'s, of a threshold that is ``learned``.
"""

import math

import jax

from qat_jax.quantizer import Quantizer


def balanced_threshold(
    threshold: jax.Array, x: jax.Array, quantizer: Quantizer, token_axes: tuple[int, int] | None
) -> jax.Array:
    """Thresholds whose gradient lets gradient descent change steps s/L as LSQ does.

    LSQ divides the gradient of a step by sqrt(N L), for N numbers that share it, so that steps and
    weights move by like shares of themselves (section 2.2). Of a threshold that is the gradient
    times L² / sqrt(N L). N is of one example.

    Args:
      threshold: of the operand's groups.
      x: the operand.
      quantizer: its quantiser.
      token_axes: its axes of examples and of positions, if it has any; weights have None.

    Returns:
      The thresholds, in value.
    """
    steps = quantizer.format.grid(x).steps
    numbers = x.size if token_axes is None else math.prod(x.shape[1:])
    factor = steps**1.5 / math.sqrt(numbers / threshold.size)
    constant = jax.lax.stop_gradient(threshold)
    return constant + factor * (threshold - constant)
