"""Walsh and Hadamard's transform of blocks of features: an outlier becomes a little of everything.

An orthonormal basis in which each feature has the same share, up to its sign, of each new one.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_FACTOR = 16  # a transform of 2**k is one of products: matrices of up to 16 are multiplied with


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
    return _in_blocks(x, axis, block, lambda y: _transformed(y * _signs(block), block))


def rotated_back(x: jax.Array, axis: int, block: int) -> jax.Array:
    """What `rotated` made x of, up to rounding."""
    return _in_blocks(x, axis, block, lambda y: _transformed(y, block) * _signs(block))


def _in_blocks(
    x: jax.Array, axis: int, block: int, change: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    last = jnp.moveaxis(x, axis, -1)
    blocks = last.reshape(*last.shape[:-1], -1, block)
    blocks = change(blocks.astype(jnp.promote_types(x.dtype, jnp.float32)))
    return jnp.moveaxis(blocks.reshape(last.shape), -1, axis).astype(x.dtype)


def _transformed(x: jax.Array, block: int) -> jax.Array:
    """Along the last axis; its own inverse."""
    lengths = _factors(block)
    y = x.reshape(*x.shape[:-1], *lengths)
    for axis, length in enumerate(lengths, start=x.ndim - 1):
        product = jnp.tensordot(y, _matrix(length), (axis, 0), precision=lax.Precision.HIGHEST)
        y = jnp.moveaxis(product.astype(x.dtype), -1, axis)
    return y.reshape(x.shape) / math.sqrt(block)


def _factors(block: int) -> list[int]:
    lengths = []
    while block > 1:
        lengths.append(min(block, _FACTOR))
        block //= lengths[-1]
    return lengths


@functools.cache
def _matrix(length: int) -> np.ndarray:
    """Hadamard's matrix by Sylvester, of 1 and -1."""
    if length == 1:
        return np.ones((1, 1), np.float32)
    half = _matrix(length // 2)
    return np.block([[half, half], [half, -half]])


@functools.cache
def _signs(block: int) -> np.ndarray:
    """The Rudin-Shapiro sequence: -1 where adjacent ones in the index are odd in number."""
    index = np.arange(block)
    pairs = np.array([bin(i & (i >> 1)).count("1") for i in index])
    return np.where(pairs % 2, -1, 1).astype(np.float32)
