"""What Linen's layers compute with while they run under a policy."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import linen as nn

from qat_jax import ops
from qat_jax.linen.operand import WEIGHTS, Operand
from qat_jax.padding import QUERIES, TOKENS
from qat_jax.policy import Rule
from qat_jax.quantizer import Quantizer

ALONE = Rule(".*")
ATTENTION = nn.MultiHeadDotProductAttention
EMBEDDING = nn.Embed


@dataclasses.dataclass(frozen=True)
class LayerCall:
    """A layer that is being called, and what it computes with.

    Attributes:
      module: the layer, bound.
      rule: its rule.
      args: what it is called with.
      kwargs: the same, by name.
    """

    module: Any
    rule: Rule
    args: tuple
    kwargs: dict[str, Any]

    @property
    def path(self) -> str:
        """The layer's."""
        return "/".join(self.module.path)

    def path_of(self, operand: str) -> str:
        """An operand's."""
        return "/".join((*self.module.path, operand))

    def operand(
        self, quantizer: Quantizer, name: str, token_axes: tuple[int, int] | None = TOKENS
    ) -> Operand:
        """What is made of an operand that the rule has a quantiser for."""
        return Operand(self.module, quantizer, name, token_axes)

    def operands(self) -> tuple[Operand | None, Operand | None]:
        """What is made of the layer's input and kernel."""
        activations, weights = self.rule.activations, self.rule.weights
        return (
            None if activations is None else self.operand(activations, "activations"),
            None if weights is None else self.operand(weights, WEIGHTS, None),
        )

    def operation(self, op: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        """An operation of `ops` with these."""
        lhs, rhs = self.operands()
        return functools.partial(op, lhs=lhs, rhs=rhs)


def interceptor(
    placed: Mapping[str, Rule], layer_call: Callable[..., LayerCall] = LayerCall
) -> Callable[..., Any]:
    """What gives layers their operations, for ``nn.intercept_methods``.

    Args:
      placed: the rule of each layer that has one, by the layer's path.
      layer_call: makes what a layer computes with of its module, rule and arguments.
    """

    def intercept(call: Callable, args: tuple, kwargs: dict[str, Any], context: Any) -> Any:
        module = context.module
        rule = placed.get("/".join(module.path), ALONE)
        kind = kind_of(module)
        if kind is None or context.method_name not in METHODS[kind] or says_nothing(rule, kind):
            return call(*args, **kwargs)
        fields = _REPLACEMENTS[kind](layer_call(module, rule, args, kwargs))
        before = {field: getattr(module, field) for field in fields}
        # The bound copy that Linen made for this run, never the user's own object.
        try:
            for field, value in fields.items():
                object.__setattr__(module, field, value)
            return call(*args, **kwargs)
        finally:
            for field, value in before.items():
                object.__setattr__(module, field, value)

    return intercept


def says_nothing(rule: Rule, kind: type[nn.Module]) -> bool:
    """Whether a rule leaves layers of a kind as they are."""
    if kind is EMBEDDING:
        return rule.embeddings is None
    return rule.weights is None and rule.activations is None


def kind_of(module: nn.Module) -> type[nn.Module] | None:
    """The layer type among those that can be quantised."""
    return next((kind for kind in _REPLACEMENTS if isinstance(module, kind)), None)


def _dot_general(layer: LayerCall) -> dict[str, Any]:
    return {"dot_general": layer.operation(ops.dot_general)}


def _conv(layer: LayerCall) -> dict[str, Any]:
    return {"conv_general_dilated": layer.operation(ops.conv_general_dilated)}


def _conv_transpose(layer: LayerCall) -> dict[str, Any]:
    # Transposed, a kernel's last two axes are (out, in) instead of (in, out).
    kernel_axis = -2 if layer.module.transpose_kernel else -1
    input_features = ops.OperandAxes((0,), (-1,))
    kernel = ops.OperandAxes((kernel_axis,), (-3 - kernel_axis,))
    return _promotion(layer, lambda x, w: (input_features, kernel))


def _einsum(layer: LayerCall) -> dict[str, Any]:
    given = layer.kwargs.get("einsum_str", layer.args[1] if len(layer.args) > 1 else None)
    subscripts = given or layer.module.einsum_str
    return _promotion(layer, lambda x, w: ops.operand_axes(subscripts, x.ndim, w.ndim))


def _attention(layer: LayerCall) -> dict[str, Any]:
    quantizer = layer.rule.activations
    if quantizer is None:
        return {}
    # "query" is the name of a sublayer.
    query = layer.operand(quantizer, "query_operand")
    key = layer.operand(quantizer, "key_operand")
    weights = layer.operand(quantizer, "attention_weights_operand", QUERIES)
    value = layer.operand(quantizer, "value_operand")

    @functools.wraps(nn.dot_product_attention)  # the layer passes what the signature names
    def attention(
        *args: Any,
        precision: Any = None,
        qk_attn_weights_einsum: None = None,
        attn_weights_value_einsum: None = None,
        **kwargs: Any,
    ) -> jax.Array:
        del qk_attn_weights_einsum, attn_weights_value_einsum
        einsum = functools.partial(ops.einsum, precision=precision)
        kwargs["qk_attn_weights_einsum"] = functools.partial(einsum, lhs=query, rhs=key)
        kwargs["attn_weights_value_einsum"] = functools.partial(einsum, lhs=weights, rhs=value)
        return nn.dot_product_attention(*args, **kwargs)

    return {"attention_fn": attention}


def _table(layer: LayerCall) -> dict[str, Any]:
    table = layer.operand(layer.rule.embeddings, WEIGHTS, None)  # type: ignore[arg-type]
    return {"promote_dtype": _TablePromotion(_own_promotion(layer), table)}


def _promotion(layer: LayerCall, axes: Callable[..., tuple]) -> dict[str, Any]:
    return {"promote_dtype": _Promotion(_own_promotion(layer), *layer.operands(), axes)}


def _own_promotion(layer: LayerCall) -> Callable[..., Any]:
    promote = layer.module.promote_dtype
    if isinstance(promote, _Promotion | _TablePromotion):  # of a call around this one
        return promote.promote
    return promote


# The fields that take quantised operations.
_REPLACEMENTS: dict[type[nn.Module], Callable[[LayerCall], dict[str, Any]]] = {
    nn.Dense: _dot_general,
    nn.DenseGeneral: _dot_general,
    nn.Conv: _conv,
    nn.ConvTranspose: _conv_transpose,
    nn.Einsum: _einsum,
    ATTENTION: _attention,
    EMBEDDING: _table,
}
# Of each kind the methods that compute with its kernel.
METHODS = dict.fromkeys(_REPLACEMENTS, ("__call__",)) | {EMBEDDING: ("__call__", "attend")}


@dataclasses.dataclass(frozen=True)
class _Promotion:
    """Quantises input and kernel where a layer promotes them to a common dtype.

    Attributes:
      promote: the layer's own promotion.
      lhs: quantiser of the input, or None.
      rhs: quantiser of the kernel, or None.
      axes: (input, kernel) -> the axes of each.
    """

    promote: Callable[..., tuple]
    lhs: Operand | None
    rhs: Operand | None
    axes: Callable[[jax.Array, jax.Array], tuple[ops.OperandAxes, ops.OperandAxes]]

    def __call__(self, *arrays: Any, **kwargs: Any) -> tuple:
        x, kernel, bias = self.promote(*arrays, **kwargs)
        x_axes, kernel_axes = self.axes(x, kernel)
        x = x if self.lhs is None else self.lhs(x, *x_axes)
        kernel = kernel if self.rhs is None else self.rhs(kernel, *kernel_axes)
        return x, kernel, bias


@dataclasses.dataclass(frozen=True)
class _TablePromotion:
    """Quantises an embedding's table where it is promoted, alone or beside a query.

    Attributes:
      promote: the layer's own promotion.
      table: quantiser of the table.
    """

    promote: Callable[..., Any]
    table: Operand

    def __call__(self, *arrays: Any, **kwargs: Any) -> tuple:
        *query, table = self.promote(*arrays, **kwargs)
        return (*query, self.table(table, 0, -1))
