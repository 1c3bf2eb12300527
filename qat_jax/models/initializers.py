"""Initial kernels of convolutions, from programs that are quick to compile.

XLA's CPU backend takes seconds to compile random numbers for an array of four axes, for each shape
anew, and a fraction of one for as many in a matrix. The numbers are the same.
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer, Shape


def as_matrix(initializer: Initializer, fan: Literal["in", "out"]) -> Initializer:
    """An initialiser that draws a kernel as a matrix.

    Args:
        initializer: what draws it, scaled by one of the fans or by none.
        fan: which one: the inputs that each output sees, or the outputs that see each input. The
            matrix has the same.

    Returns:
        An initialiser of kernels [..., inputs, outputs], equal to the given one bit for bit.
    """

    def init(key: jax.Array, shape: Shape, dtype: Dtype = jnp.float32) -> jax.Array:
        size = math.prod(shape)
        inputs, outputs = shape[-2:]
        matrix = (size // outputs, outputs) if fan == "in" else (inputs, size // inputs)
        return initializer(key, matrix, dtype).reshape(shape)

    return init


lecun_normal = as_matrix(nnx.initializers.lecun_normal(), "in")
he_normal = as_matrix(nnx.initializers.he_normal(), "in")
he_normal_fan_out = as_matrix(nnx.initializers.variance_scaling(2.0, "fan_out", "normal"), "out")
