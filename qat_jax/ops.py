"""Quantised operations: the signatures of ``jax.lax`` and a quantiser for each operand.

The arrays are positional; the keywords ``lhs`` and ``rhs`` take a `Quantizer`, any other function
of (x, channel_axis, vector_axis), or None to leave the operand as it is. Each operation tells the
quantiser which axes of its operand survive the contraction: these are the axes whose scales can be
taken out of the sum, and so the channels of ``PerChannel``. It also says along which contracted
axis the vectors of ``PerVector`` lie, the same dimension in both operands: a part of the sum that
is shorter than a vector has one scale a side (arXiv:2102.04503, equation 5).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from qat_jax import depthwise

QuantizeFn = Callable[..., Any]


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
      lhs: quantiser of x. Channels: the batch axes and the free axes of x; vectors: along the
        last contracted axis.
      rhs: quantiser of w, likewise.

    Returns:
      The product, of the same shape and dtype as without quantisers.

    Example:
      >>> from qat_jax import Int, PerChannel, Quantizer
      >>> w4 = Quantizer(Int(4), granularity=PerChannel())
      >>> x, w = jnp.ones((2, 3)), jnp.ones((3, 5))
      >>> dot_general(x, w, (((1,), (0,)), ((), ())), rhs=w4).shape
      (2, 5)
    """
    x, w = dot_general_operands(x, w, dimension_numbers, lhs, rhs)
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
      lhs: quantiser of x. Channels: the batch axis; vectors: along the input features, within
        their feature group.
      rhs: quantiser of w. Channels: the output features; vectors: along the input features, or
        through the window of a depthwise kernel, which has one input feature.

    Returns:
      The convolution, of the same shape and dtype as without quantisers.
    """
    spec = lax.conv_dimension_numbers(jnp.shape(x), jnp.shape(w), dimension_numbers)
    x, w = convolution_operands(x, w, spec, feature_group_count, lhs, rhs)
    return depthwise.conv_general_dilated(
        x,
        w,
        window_strides,
        padding,
        lhs_dilation=lhs_dilation,
        rhs_dilation=rhs_dilation,
        dimension_numbers=spec,
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
      lhs: quantiser of x. Channels: its axes that are in the output; vectors: along the last of
        the axes of x that both operands have and the output has not.
      rhs: quantiser of w, likewise; the vectors run along the same dimension.

    Returns:
      The product, of the same shape and dtype as without quantisers.
    """
    x, w = einsum_operands(subscripts, x, w, lhs, rhs)
    return jnp.einsum(
        subscripts,
        x,
        w,
        precision=precision,
        preferred_element_type=preferred_element_type,
        out_sharding=out_sharding,
    )


def dot_general_operands(
    x: jax.Array,
    w: jax.Array,
    dimension_numbers: lax.DotDimensionNumbers,
    lhs: QuantizeFn | None,
    rhs: QuantizeFn | None,
) -> tuple[Any, Any]:
    """What `dot_general` multiplies: whatever ``lhs`` and ``rhs`` make of x and w."""
    (x_contracted, w_contracted), _ = dimension_numbers
    x = _quantized(x, lhs, other_axes(x_contracted, jnp.ndim(x)), x_contracted[-1:])
    w = _quantized(w, rhs, other_axes(w_contracted, jnp.ndim(w)), w_contracted[-1:])
    return x, w


def convolution_operands(
    x: jax.Array,
    w: jax.Array,
    spec: lax.ConvDimensionNumbers,
    feature_group_count: int,
    lhs: QuantizeFn | None,
    rhs: QuantizeFn | None,
) -> tuple[Any, Any]:
    """What `conv_general_dilated` multiplies: whatever ``lhs`` and ``rhs`` make of x and w."""
    inputs = jnp.shape(w)[spec.rhs_spec[1]]
    x = _in_feature_groups(x, lhs, spec.lhs_spec, inputs)
    has_one_input = feature_group_count > 1 and inputs == 1
    w = _quantized(
        w, rhs, spec.rhs_spec[:1], spec.rhs_spec[2:] if has_one_input else spec.rhs_spec[1:2]
    )
    return x, w


def einsum_operands(
    subscripts: str,
    x: jax.Array,
    w: jax.Array,
    lhs: QuantizeFn | None,
    rhs: QuantizeFn | None,
) -> tuple[Any, Any]:
    """What `einsum` multiplies: whatever ``lhs`` and ``rhs`` make of x and w."""
    x_axes, w_axes = operand_axes(subscripts, jnp.ndim(x), jnp.ndim(w))
    return _quantized(x, lhs, *x_axes), _quantized(w, rhs, *w_axes)


def _quantized(
    x: jax.Array,
    quantizer: QuantizeFn | None,
    channel_axis: Sequence[int],
    vector_axis: Sequence[int],
) -> Any:
    if quantizer is None:
        return x
    if not callable(quantizer):
        raise TypeError(f"{quantizer!r} is no quantiser: give a Quantizer or another function")
    return quantizer(x, channel_axis=tuple(channel_axis), vector_axis=tuple(vector_axis) or None)


def _in_feature_groups(
    x: jax.Array, quantizer: QuantizeFn | None, spec: Sequence[int], group_size: int
) -> Any:
    """Quantise a convolution's input so that no vector reaches from one feature group to the next.

    A depthwise convolution has groups of one feature. Its input is not cut: there each product has
    a scale product of its own anyway, and a vector saves storage.
    """
    batch, feature, *_ = spec
    if quantizer is None or group_size in (1, x.shape[feature]):
        return _quantized(x, quantizer, (batch,), (feature,))
    grouped = x.reshape(*x.shape[:feature], -1, group_size, *x.shape[feature + 1 :])
    batch += batch > feature
    return _quantized(grouped, quantizer, (batch,), (feature + 1,)).reshape(x.shape)


def other_axes(axes: Sequence[int], ndim: int) -> tuple[int, ...]:
    """The axes of an array that are none of these, ascending."""
    return tuple(axis for axis in range(ndim) if axis not in axes)


class OperandAxes(NamedTuple):
    """What an einsum does with the axes of an operand.

    Attributes:
      channel_axis: the axes that are in the output.
      vector_axis: the axis along which vectors lie, alone; nothing where none is contracted.
    """

    channel_axis: tuple[int, ...]
    vector_axis: tuple[int, ...]


def operand_axes(subscripts: str, x_ndim: int, w_ndim: int) -> tuple[OperandAxes, OperandAxes]:
    """The axes of either operand of an einsum that survive it, and those of their vectors.

    Args:
      subscripts: of two operands.
      x_ndim: number of dimensions of the left one.
      w_ndim: number of dimensions of the right one.

    Returns:
      The axes of the left operand and those of the right one.

    Example:
      >>> operand_axes("...qhd,...khd->...hqk", 4, 4)[0]
      OperandAxes(channel_axis=(0, 1, 2), vector_axis=(3,))
    """
    inputs, arrow, output = subscripts.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if len(terms) != 2:
        raise ValueError(f"einsum takes two operands here, {subscripts!r} names {len(terms)}")
    if not arrow:  # implicit output: the labels that occur once, and the ellipsis
        output = "..." + "".join(c for c in inputs if inputs.count(c) == 1 and c.isalpha())
    contracted = [c for c in terms[0] if c.isalpha() and c in terms[1] and c not in output]

    def axes(term: str, ndim: int) -> OperandAxes:
        before, ellipsis, after = term.partition("...")
        dots = ndim - len(before) - len(after) if ellipsis else 0
        labels = [*before, *["..."] * dots, *after]
        surviving = [axis for axis, label in enumerate(labels) if label in output]
        vectors = [axis for axis, label in enumerate(labels) if label in contracted[-1:]]
        return OperandAxes(tuple(surviving), tuple(vectors))

    return axes(terms[0], x_ndim), axes(terms[1], w_ndim)
