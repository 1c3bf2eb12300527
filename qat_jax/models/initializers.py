"""Initial kernels of convolutions, from a few programs for all their shapes.

XLA's CPU backend takes up to seconds to compile random numbers for an array of four axes, for each
shape anew. Numbers that are drawn one after the other and then cut to size are the same, and their
programs serve every shape.
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp
from flax.typing import Dtype, Initializer, Shape

# Fewer numbers are never drawn, and more as a power of two.
_FEWEST = 1 << 16
# The standard deviation of a Gaussian cut off at 2.
_DEVIATION_OF_TRUNCATED = 0.87962566103423978


def scaled_normal(scale: float, fan: Literal["in", "out"], *, truncated: bool) -> Initializer:
    """An initialiser of Gaussian numbers of variance scale / fan, Flax's but for rounding.

    Args:
        scale: 1 as LeCun et al. have it, 2 as He et al. do before a rectifier.
        fan: the inputs that each output sees, or the outputs that see each input.
        truncated: whether nothing lies beyond two standard deviations.

    Returns:
        An initialiser of kernels [..., inputs, outputs].
    """

    def init(key: jax.Array, shape: Shape, dtype: Dtype = jnp.float32) -> jax.Array:
        size = math.prod(shape)
        inputs, outputs = shape[-2:]
        variance = scale / (size // (outputs if fan == "in" else inputs))
        deviation = jnp.sqrt(jnp.array(variance, dtype))
        count = max(_FEWEST, 1 << (size - 1).bit_length())
        if truncated:
            drawn = jax.random.truncated_normal(key, -2, 2, (count,), dtype)
            deviation = deviation / jnp.array(_DEVIATION_OF_TRUNCATED, dtype)
        else:
            drawn = jax.random.normal(key, (count,), dtype)
        return drawn[:size].reshape(shape) * deviation

    return init


lecun_normal = scaled_normal(1, "in", truncated=True)
he_normal = scaled_normal(2, "in", truncated=True)
he_normal_fan_out = scaled_normal(2, "out", truncated=False)
