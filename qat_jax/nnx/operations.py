"""The modules that take the place of a layer's own operation and quantise its operands."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.attention import dot_product_attention_weights

from qat_jax import hadamard, ops
from qat_jax.display import DescribedOperands
from qat_jax.granularity import ChannelAxis, VectorAxis
from qat_jax.nnx.operand import OperandQuantizer, all_but_features
from qat_jax.padding import QUERIES, TOKENS
from qat_jax.policy import Rule
from qat_jax.quantizer import Quantizer


class Factors(nnx.Variable):
    """What the features of a layer's input are multiplied with: state, and no parameter."""


class QuantizedOp(DescribedOperands, nnx.Module):
    """Takes the place of a ``jax.lax`` operation inside a layer; the kernel is on the right.

    Attributes:
      op: an operation of ``ops`` (static).
      factors: of the input's features, before its quantiser (see `smoothing`); None: all 1.
      rotation: the length of blocks of features that are turned then (static; see `rotation`), or
        None.
      activations: quantiser of the left operand, or None.
      weights: quantiser of the right operand, or None.
    """

    def __init__(self, op: Callable[..., jax.Array], rule: Rule) -> None:
        self.op = op
        self.factors: Factors | None = nnx.data(None)
        self.rotation: int | None = None
        self.activations = _operand(rule.activations)
        self.weights = _operand(rule.weights, None)

    def __call__(self, *args: Any, **kwargs: Any) -> jax.Array:
        """The operation, of quantised operands."""
        lhs = in_basis(self, self.activations)
        return self.op(*args, lhs=lhs, rhs=self.weights, **kwargs)


def in_basis(op: Any, quantize: ops.QuantizeFn | None) -> ops.QuantizeFn | None:
    """A quantiser of an operation's input, as the operation's factors and rotation change it."""
    if quantize is None or (op.factors is None and op.rotation is None):
        return quantize

    def of_changed(x: jax.Array, channel_axis: ChannelAxis, vector_axis: VectorAxis) -> Any:
        if op.factors is not None:
            per_feature = op.factors.get_value().astype(x.dtype)
            x = x * jnp.expand_dims(per_feature, all_but_features(x, vector_axis))
        if op.rotation is not None:
            (features,) = ops.other_axes(all_but_features(x, vector_axis), x.ndim)
            x = hadamard.rotated(x, features, op.rotation)
        return quantize(x, channel_axis, vector_axis)

    return of_changed


class QuantizedPromotion(DescribedOperands, nnx.Module):
    """Takes the place of a layer's ``promote_dtype`` and quantises input and kernel there.

    Attributes:
      promote: the layer's own promotion (static).
      kernel_axes: the axes of the output and of the input features in the kernel (static).
      activations: quantiser of the input, or None.
      weights: quantiser of the kernel, or None.
    """

    def __init__(
        self, promote: Callable[..., tuple], kernel_axes: tuple[int, int], rule: Rule
    ) -> None:
        self.promote = promote
        self.kernel_axes = kernel_axes
        self.activations = _operand(rule.activations)
        self.weights = _operand(rule.weights, None)

    def __call__(self, arrays: tuple, **kwargs: Any) -> tuple:
        """Promote (input, kernel, bias) to a common dtype, then quantise the first two."""
        x, kernel, bias = self.promote(arrays, **kwargs)
        if self.activations is not None:
            x = self.activations(x, channel_axis=0, vector_axis=-1)
        if self.weights is not None:
            kernel = self.weights(kernel, *self.kernel_axes)
        return x, kernel, bias


class QuantizedTable(DescribedOperands, nnx.Module):
    """Takes the place of an embedding's ``promote_dtype`` and quantises its table there.

    Attributes:
      promote: the layer's own promotion (static).
      weights: quantiser of the table.
    """

    def __init__(self, promote: Callable[..., tuple], rule: Rule) -> None:
        self.promote = promote
        self.weights = _operand(rule.embeddings, None)

    def __call__(self, arrays: tuple, **kwargs: Any) -> tuple:
        """Promote (table,) or (query, table) to a common dtype, then quantise the table."""
        *query, table = self.promote(arrays, **kwargs)
        if self.weights is not None:
            table = self.weights(table, channel_axis=0, vector_axis=-1)
        return (*query, table)


class QuantizedAttention(nnx.Module):
    """Dot-product attention whose two matrix products have quantised operands.

    Takes the place of ``nnx.dot_product_attention`` and takes its arguments.

    Attributes:
      query: quantiser of the queries; so the next three.
      key: of the keys.
      attention_weights: of the softmax's output, dropout included.
      value: of the values.
    """

    def __init__(self, quantizer: Quantizer) -> None:
        self.query = OperandQuantizer(quantizer)
        self.key = OperandQuantizer(quantizer)
        self.attention_weights = OperandQuantizer(quantizer, QUERIES)
        self.value = OperandQuantizer(quantizer)

    def __call__(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        *,
        precision: Any = None,
        **kwargs: Any,
    ) -> jax.Array:
        """Attention over [batch…, length, heads, depth], as ``nnx.dot_product_attention``."""
        kwargs = with_causal_mask(query, key, kwargs)
        all_but_depth = tuple(range(query.ndim - 1))
        query = self.query(query, channel_axis=all_but_depth, vector_axis=-1)
        key = self.key(key, channel_axis=all_but_depth, vector_axis=-1)
        weights = dot_product_attention_weights(query, key, precision=precision, **kwargs)
        # Grouped queries: as many heads of values as of queries.
        value = jnp.repeat(value, weights.shape[-3] // value.shape[-2], axis=-2)
        return ops.einsum(
            "...hqk,...khd->...qhd",
            weights,
            value.astype(weights.dtype),
            precision=precision,
            lhs=self.attention_weights,
            rhs=self.value,
        )


def with_causal_mask(query: jax.Array, key: jax.Array, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of attention with ``is_causal`` said by the mask.

    Flax's function of attention's weights does not take both where the mask is one of padding,
    [batch, 1, 1, length].

    Args:
      query: [batch…, length, heads, depth].
      key: likewise.
      kwargs: what else attention was called with.
    """
    if not kwargs.get("is_causal"):
        return kwargs
    causal = jnp.tril(jnp.ones((query.shape[-3], key.shape[-3]), bool))
    mask = kwargs.get("mask")
    mask = causal if mask is None else jnp.logical_and(mask, causal)
    return kwargs | {"mask": mask, "is_causal": False}


def _operand(
    quantizer: Quantizer | None, token_axes: tuple[int, int] | None = TOKENS
) -> OperandQuantizer | None:
    return None if quantizer is None else OperandQuantizer(quantizer, token_axes)
