"""Quantised operations: the signatures of ``jax.lax`` and a quantiser for each operand.

The arrays are positional; the keywords ``lhs`` and ``rhs`` take a `Quantizer`, any other function
of (x, channel_axis), or None to leave the operand as it is. Each operation tells the quantiser
which axes of its operand survive the contraction: these are the axes whose scales can be taken
out of the sum, and so the channels of ``PerChannel``.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

QuantizeFn = Callable[..., jax.Array]


def dot_general(
    x: jax.Array,
    w: jax.Array,
    /,
    dimension_numbers: lax.DotDimensionNumbers,
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
    *,
    out_sharding: jax.sharding.NamedSharding | jax.P | None = None,
    lhs: QuantizeFn | None = None,
    rhs: QuantizeFn | None = None,
) -> jax.Array:
    """``jax.lax.dot_general`` of quantised operands.

    Args:
      x: the left operand.
      w: the right operand.
      dimension_numbers: as in ``jax.lax``; so are the next three.
      precision: of the product.
      preferred_element_type: of the accumulator and the result.
      out_sharding: of the result.
      lhs: quantiser of x. Channels: the batch axes and the free axes of x.
      rhs: quantiser of w. Channels: the batch axes and the free axes of w.

    Returns:
      The product, of the same shape and dtype as without quantisers.

    Example:
      >>> from qat_jax import Int, PerChannel, Quantizer
      >>> w4 = Quantizer(Int(4), granularity=PerChannel())
      >>> x, w = jnp.ones((2, 3)), jnp.ones((3, 5))
      >>> dot_general(x, w, (((1,), (0,)), ((), ())), rhs=w4).shape
      (2, 5)
    """
    (x_contracted, w_contracted), _ = dimension_numbers
    x = _quantized(x, lhs, _others(x_contracted, jnp.ndim(x)))
    w = _quantized(w, rhs, _others(w_contracted, jnp.ndim(w)))
    return lax.dot_general(
        x, w, dimension_numbers, precision, preferred_element_type, out_sharding=out_sharding
    )


def conv_general_dilated(
    x: jax.Array,
    w: jax.Array,
    /,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: lax.ConvGeneralDilatedDimensionNumbers = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
    out_sharding: jax.sharding.NamedSharding | jax.P | None = None,
    *,
    lhs: QuantizeFn | None = None,
    rhs: QuantizeFn | None = None,
) -> jax.Array:
    """``jax.lax.conv_general_dilated`` of a quantised input and kernel.

    Args:
      x: the input.
      w: the kernel.
      window_strides: as in ``jax.lax``; so are all up to ``out_sharding``.
      padding: of the input.
      lhs_dilation: of the input.
      rhs_dilation: of the kernel.
      dimension_numbers: which axis is which.
      feature_group_count: groups of input features.
      batch_group_count: groups of examples.
      precision: of the products.
      preferred_element_type: of the accumulator and the result.
      out_sharding: of the result.
      lhs: quantiser of x. Channels: the batch axis.
      rhs: quantiser of w. Channels: the output features.

    Returns:
      The convolution, of the same shape and dtype as without quantisers.
    """
    spec = lax.conv_dimension_numbers(jnp.shape(x), jnp.shape(w), dimension_numbers)
    x = _quantized(x, lhs, spec.lhs_spec[:1])
    w = _quantized(w, rhs, spec.rhs_spec[:1])
    return lax.conv_general_dilated(
        x,
        w,
        window_strides,
        padding,
        lhs_dilation=lhs_dilation,
        rhs_dilation=rhs_dilation,
        dimension_numbers=dimension_numbers,
        feature_group_count=feature_group_count,
        batch_group_count=batch_group_count,
        precision=precision,
        preferred_element_type=preferred_element_type,
        out_sharding=out_sharding,
    )


def einsum(
    subscripts: str,
    x: jax.Array,
    w: jax.Array,
    /,
    *,
    precision: lax.PrecisionLike = None,
    preferred_element_type: DTypeLike | None = None,
    out_sharding: jax.sharding.NamedSharding | jax.P | None = None,
    lhs: QuantizeFn | None = None,
    rhs: QuantizeFn | None = None,
) -> jax.Array:
    """``jax.numpy.einsum`` of two quantised operands.

    Args:
      subscripts: as in ``jax.numpy``, of two operands; implicit output and ellipses included.
      x: the left operand.
      w: the right operand.
      precision: of the product.
      preferred_element_type: of the accumulator and the result.
      out_sharding: of the result.
      lhs: quantiser of x. Channels: its axes that are in the output.
      rhs: quantiser of w. Channels: its axes that are in the output.

    Returns:
      The product, of the same shape and dtype as without quantisers.
    """
    x_axes, w_axes = surviving_axes(subscripts, jnp.ndim(x), jnp.ndim(w))
    return jnp.einsum(
        subscripts,
        _quantized(x, lhs, x_axes),
        _quantized(w, rhs, w_axes),
        precision=precision,
        preferred_element_type=preferred_element_type,
        out_sharding=out_sharding,
    )


def _quantized(
    x: jax.Array, quantizer: QuantizeFn | None, channel_axis: Sequence[int]
) -> jax.Array:
    return x if quantizer is None else quantizer(x, channel_axis=tuple(channel_axis))


def _others(axes: Sequence[int], ndim: int) -> tuple[int, ...]:
    return tuple(axis for axis in range(ndim) if axis not in axes)


def surviving_axes(
    subscripts: str, x_ndim: int, w_ndim: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The axes of either operand of an einsum that are in its output.

    Args:
      subscripts: of two operands.
      x_ndim: number of dimensions of the left one.
      w_ndim: number of dimensions of the right one.

    Returns:
      The axes of the left operand and those of the right one.

    Example:
      >>> surviving_axes("...qhd,...khd->...hqk", 4, 4)
      ((0, 1, 2), (0, 1, 2))
    """
    inputs, arrow, output = subscripts.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if len(terms) != 2:
        raise ValueError(f"einsum takes two operands here, {subscripts!r} names {len(terms)}")
    if not arrow:  # implicit output: the labels that occur once, and the ellipsis
        output = "..." + "".join(c for c in inputs if inputs.count(c) == 1 and c.isalpha())

    def surviving(term: str, ndim: int) -> tuple[int, ...]:
        before, ellipsis, after = term.partition("...")
        dots = ndim - len(before) - len(after) if ellipsis else 0
        kept = [c in output for c in before] + [True] * dots + [c in output for c in after]
        return tuple(axis for axis, keep in enumerate(kept) if keep)

    return surviving(terms[0], x_ndim), surviving(terms[1], w_ndim)
