"""Walsh and Hadamard's transform of blocks of features: an outlier becomes a little of everything.

An orthonormal basis in which each feature has the same share, up to its sign, of each new one.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def longest_block(features: int) -> int:
    """The largest power of two that divides a number of features."""
    return features & -features


def rotated(x: jax.Array, axis: int, block: int) -> jax.Array:
    """Blocks along an axis in the basis of Walsh and Hadamard, their signs changed before.

    The signs are those of the Rudin-Shapiro sequence, whose own transform is flat: what all
    features have in common, such as the mean of activations that are not negative, does not end in
    one of them.

    Args:
      x: floating-point array.
      axis: along which the blocks lie.
      block: their length, a power of two that divides the axis.

    Returns:
      An array of x's shape and dtype, of as much energy in each block.

    Example:
      >>> rotated(jnp.array([8.0, 0.0, 0.0, 0.0]), 0, 4)
      Array([4., 4., 4., 4.], dtype=float32)
    """
    return _times(x, axis, _rotation(block))


def rotated_back(x: jax.Array, axis: int, block: int) -> jax.Array:
    """What `rotated` made x of, up to rounding."""
    return _times(x, axis, _rotation(block).T)


def _times(x: jax.Array, axis: int, matrix: np.ndarray) -> jax.Array:
    """Blocks along an axis times a matrix.

    One product, where additions and subtractions alone would do: fewer passes over memory.
    """
    last = jnp.moveaxis(x, axis, -1)
    blocks = last.reshape(-1, len(matrix)).astype(jnp.promote_types(x.dtype, jnp.float32))
    product = jnp.dot(blocks, matrix.astype(blocks.dtype), precision=lax.Precision.HIGHEST)
    return jnp.moveaxis(product.reshape(last.shape), -1, axis).astype(x.dtype)


@functools.cache
def _rotation(block: int) -> np.ndarray:
    """Signs, then Hadamard's matrix by Sylvester, orthonormal: float64 [block, block]."""
    matrix = np.ones((1, 1))
    while len(matrix) < block:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return _rudin_shapiro(block)[:, None] * matrix / math.sqrt(block)


def _rudin_shapiro(length: int) -> np.ndarray:
    """1, or -1 where pairs of adjacent ones in the index are odd in number."""
    pairs = np.array([bin(i & (i >> 1)).count("1") for i in range(length)])
    return 1 - 2 * (pairs % 2)
