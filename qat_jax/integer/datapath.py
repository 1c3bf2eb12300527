"""The datapath of VS-Quant's accelerator in integer arithmetic (arXiv:2102.04503, figure 2).

The products of a vector's codes are summed up, the sum is multiplied by the product of the two
scales, which may be rounded first, and accumulated. Nothing is a float before the accumulator is
full.
"""

from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qat_jax.integer.operand import Operand
from qat_jax.integer.widths import SINGLE_LIMIT, Datapath, Widths, widths

_LOW = 20  # bits of the lower of two words
_HALF = 8  # bits of the lower half of a scale product


class Accumulator(NamedTuple):
    """Sums of integers: ``high * 2**20 + low``, or ``high`` alone.

    Attributes:
      high: int32.
      low: int32 in [0, 2**20); None where one word holds the sums.
    """

    high: jax.Array
    low: jax.Array | None

    def to_float(self, dtype: np.dtype) -> jax.Array:
        """The nearest number of float32, or the one beside it; of float64 the nearest."""
        high = self.high.astype(dtype)
        return high if self.low is None else high * 2.0**_LOW + self.low.astype(dtype)


class Sum(NamedTuple):
    """What comes out of the datapath.

    Attributes:
      accumulator: [B, M, N].
      widths: of the numbers on the way; the sums are ``2**widths.dropped`` too small.
    """

    accumulator: Accumulator
    widths: Widths

    def to_float(self, dtype: np.dtype) -> jax.Array:
        """The sums as float32 or float64, in the units of codes and scales."""
        return self.accumulator.to_float(dtype) * 2.0**self.widths.dropped


def contract(x: Operand, w: Operand, datapath: Datapath) -> Sum:
    """A batch of matrix products, summed up vector by vector.

    Args:
      x: the left operand, [B, M, P, K]: vectors lie along K, P is summed up as well.
      w: the right operand, [B, P, K, N].
      datapath: its widths.

    Returns:
      The sums, exact but for the rounding of scale products.

    Raises:
      ValueError: vectors of two sizes meet, or an accumulator can overflow.
    """
    batch, rows, positions, depth = x.shape
    if x.vector_size and w.vector_size and x.vector_size != w.vector_size:
        raise ValueError(
            f"vectors of {x.vector_size} elements meet vectors of {w.vector_size}: "
            "give both operands the same size"
        )
    if x.scale is None and w.scale is None:
        found = widths(x, w, length=positions * depth, vectors=1, datapath=datapath)
        x = x.rearranged(lambda a: a.reshape(batch, rows, positions * depth))
        w = w.rearranged(lambda a: a.reshape(batch, positions * depth, a.shape[-1]))
        return Sum(Accumulator(_dot(x, w), None), found)
    size = min(x.vector_size or w.vector_size, depth)
    x = x.rearranged(lambda a: _vectors_first(a, 2, size))
    w = w.rearranged(lambda a: _vectors_first(a, 1, size))
    found = widths(x, w, length=size, vectors=x.shape[0], datapath=datapath)
    return Sum(_accumulate(x, w, found), found)


def contract_each(x: Operand, w: Operand, datapath: Datapath) -> Sum:
    """A product of elements, summed up over the leading axis, every one a vector of its own.

    It is `contract` of groups of one feature, where a matrix product would have a single column.

    Args:
      x: the left operand, [S, …].
      w: the right operand, [S, …], which broadcasts with x.
      datapath: its widths.

    Returns:
      The sums, of the shape of a product of elements without its leading axis.

    Raises:
      ValueError: an accumulator can overflow.
    """
    count = x.shape[0]
    scaled = x.scale is not None or w.scale is not None
    length, vectors = (1, count) if scaled else (count, 1)
    found = widths(x, w, length=length, vectors=vectors, datapath=datapath)
    total = _empty(jnp.broadcast_shapes(x.shape[1:], w.shape[1:]), found)
    for s in range(count):  # not a loop: compilers make one pass over the input of it
        product = x.codes[s].astype(jnp.int32) * w.codes[s].astype(jnp.int32)
        if scaled:
            scales = (None if a is None else a[s].astype(jnp.int32) for a in (x.scale, w.scale))
            total = _add(total, product, scales, found)
        else:
            total = Accumulator(total.high + product, None)
    return Sum(total, found)


def _accumulate(x: Operand, w: Operand, found: Widths) -> Accumulator:
    """Sums over the leading axis of x [S, B, M, V] times w [S, B, V, N]."""
    shape = (*x.shape[1:3], w.shape[3])
    # Of all elements of a vector the first one's scale.
    scales = (
        None if x.scale is None else x.scale[..., :1].astype(jnp.int32),
        None if w.scale is None else w.scale[..., :1, :].astype(jnp.int32),
    )

    def add(total: Accumulator, vector: tuple) -> tuple[Accumulator, None]:
        x_codes, w_codes, *scales = vector
        dot = _dot(x.rearranged(lambda _: x_codes), w.rearranged(lambda _: w_codes))
        return _add(total, dot, scales, found), None

    total, _ = lax.scan(add, _empty(shape, found), (x.codes, w.codes, *scales))
    return total


def _empty(shape: tuple[int, ...], found: Widths) -> Accumulator:
    """Of one word where that holds the sums."""
    zeros = jnp.zeros(shape, jnp.int32)
    return Accumulator(zeros, None if found.accumulator <= SINGLE_LIMIT else zeros)


def _add(
    total: Accumulator, dot: jax.Array, scales: Iterable[jax.Array | None], found: Widths
) -> Accumulator:
    """Adds a vector's sum of products times its two scales."""
    product = _round(_product(*scales), found)
    if total.low is None:
        return Accumulator(total.high + dot * product, None)
    return _add_wide(total, dot, product)


def _add_wide(total: Accumulator, dot: jax.Array, product: jax.Array) -> Accumulator:
    """Adds dot * product, which one word cannot hold, to two words."""
    assert total.low is not None
    # |dot| < 2**23 and each half of the product < 2**8.
    lower = dot * (product & (2**_HALF - 1))
    upper = dot * (product >> _HALF)
    low = total.low + (lower & (2**_LOW - 1)) + ((upper & (2 ** (_LOW - _HALF) - 1)) << _HALF)
    high = total.high + (lower >> _LOW) + (upper >> (_LOW - _HALF)) + (low >> _LOW)
    return Accumulator(high, low & (2**_LOW - 1))


def _product(x: jax.Array | None, w: jax.Array | None) -> jax.Array:
    """The product of the scales there are."""
    if x is None or w is None:
        return w if x is None else x  # type: ignore[return-value]
    return x * w


def _round(product: jax.Array, found: Widths) -> jax.Array:
    """The highest bits of scale products, rounded half up, saturating."""
    if not found.dropped:
        return product
    rounded = (product + (1 << (found.dropped - 1))) >> found.dropped
    return jnp.minimum(rounded, 2**found.scale_product - 1)


def _dot(x: Operand, w: Operand) -> jax.Array:
    """The int32 product of x [B, M, K] and w [B, K, N], with 8-bit multiplications where it can.

    Codes of 8 bits without a sign are moved down by 128, which the column sums of w make up for.
    """
    dimensions = (((2,), (1,)), ((0,), (0,)))
    if max(x.code_bits, w.code_bits) > 8:
        return lax.dot_general(x.codes.astype(jnp.int32), w.codes.astype(jnp.int32), dimensions)
    x_codes, x_zero = _centred(x)
    w_codes, w_zero = _centred(w)
    if x_zero is not None:
        # The column sums are one more row of the product: as a sum they would take longer than it.
        x_codes = jnp.pad(x_codes, ((0, 0), (0, 1), (0, 0)), constant_values=1)
    dot = lax.dot_general(x_codes, w_codes, dimensions, preferred_element_type=jnp.int32)
    if x_zero is not None:
        dot = dot[:, :-1] + x_zero * dot[:, -1:]
    if w_zero is not None:
        dot = dot + w_zero * jnp.sum(x.codes, axis=2, keepdims=True, dtype=jnp.int32)
    return dot


def _centred(operand: Operand) -> tuple[jax.Array, jax.Array | int | None]:
    """Codes as int8, and what was taken from them, if anything can have been."""
    codes = operand.codes
    if operand.unsigned is False or operand.code_bits < 8:
        return codes.astype(jnp.int8), None
    zero: jax.Array | int = 128
    if operand.unsigned is None:
        zero = jnp.where(jnp.any(codes < 0), 0, 128)
    return (codes.astype(jnp.int32) - zero).astype(jnp.int8), zero


def _vectors_first(x: jax.Array, axis: int, size: int) -> jax.Array:
    """Cuts the axes (P, K) from ``axis`` on into vectors, whose number becomes the leading axis.

    The last vector of each K is filled up with zeros.
    """
    count = -(-x.shape[axis + 1] // size)
    padding = [(0, 0)] * x.ndim
    padding[axis + 1] = (0, count * size - x.shape[axis + 1])
    x = jnp.pad(x, padding)
    x = x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 2 :])
    return jnp.moveaxis(x, axis, 0)
