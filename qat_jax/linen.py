"""Put a policy into an unmodified Flax Linen model.

While the model runs, Flax's method interception gives each layer that a rule matches a quantised
operation in the very field that Linen offers for one. The model's definition, its variables and
their names stay what they are.
"""

import dataclasses
import functools
import html
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import linen as nn

from qat_jax import ops
from qat_jax.diagnostics import fake_quant_with_diagnostics
from qat_jax.granularity import ChannelAxis, VectorAxis
from qat_jax.padding import QUERIES, TOKENS, without_padding
from qat_jax.policy import Policy, Rule, preset_for_layers
from qat_jax.quantizer import Quantizer
from qat_jax.report import LayerReport, Report

COLLECTION = "diagnostics"


@dataclasses.dataclass(frozen=True, repr=False)
class QuantizedModel:
    """A Linen model that runs under a policy. Made by `quantize_model`.

    ``init`` and ``apply`` take what the model's own take. ``apply`` with
    ``mutable=["diagnostics"]`` also returns `Diagnostics` of every layer and operand.

    Attributes:
      module: the model as it was given.
      placed: the rule of each layer that has one, by the layer's path.
      report: what each layer got; prints as a table.
    """

    module: nn.Module
    placed: Mapping[str, Rule]
    report: Report

    def __repr__(self) -> str:
        return f"{self._name}\n{self.report}"

    def _repr_html_(self) -> str:
        return f"{html.escape(self._name)}{self.report._repr_html_()}"

    @property
    def _name(self) -> str:
        return f"{type(self).__name__} of {type(self.module).__name__}"

    def init(self, *args: Any, **kwargs: Any) -> Any:
        """``nn.Module.init``: quantisation adds no variables."""
        return self.module.init(*args, **kwargs)

    def apply(self, *args: Any, **kwargs: Any) -> Any:
        """``nn.Module.apply`` under the policy."""
        with nn.intercept_methods(self._intercept):
            return self.module.apply(*args, **kwargs)

    def _intercept(self, call: Callable, args: tuple, kwargs: dict[str, Any], context: Any) -> Any:
        module = context.module
        rule = self.placed.get("/".join(module.path))
        kind = _kind(module)
        if context.method_name != "__call__" or rule is None or kind is None:
            return call(*args, **kwargs)
        fields = _REPLACEMENTS[kind](module, rule, args, kwargs)
        before = {field: getattr(module, field) for field in fields}
        # The bound copy that Linen made for this run, never the user's own object.
        try:
            for field, value in fields.items():
                object.__setattr__(module, field, value)
            return call(*args, **kwargs)
        finally:
            for field, value in before.items():
                object.__setattr__(module, field, value)


def quantize_model(
    module: nn.Module, policy: Policy | str, *args: Any, **kwargs: Any
) -> QuantizedModel:
    """Put a policy into a Linen model.

    Args:
      module: any Linen model; it is left as it is.
      policy: the rules, or the name of a `preset`, whose first convolution and classifier are
        then the first convolution and the last dense layer that run.
      *args: inputs of the model, as for ``nn.Module.init``: Linen models know their layers only
        when they run. Nothing is computed.
      **kwargs: further inputs.

    Returns:
      The model under the policy.

    Raises:
      ValueError: if a rule matches no layer; it lists the paths there are.

    Example:
      >>> import jax.numpy as jnp
      >>> model = quantize_model(nn.Dense(8), "octav-w4a4", jnp.ones((2, 4)))
      >>> variables = model.init(jax.random.key(0), jnp.ones((2, 4)))
      >>> model.apply(variables, jnp.ones((2, 4))).shape
      (2, 8)
    """
    sites = _sites(module, args, kwargs)
    if isinstance(policy, str):
        convolutions = [path for path, kind in sites.items() if kind is nn.Conv]
        dense = [path for path, kind in sites.items() if kind in (nn.Dense, nn.DenseGeneral)]
        policy = preset_for_layers(policy, convolutions, dense)
    placed = policy.place(list(sites))
    layers = tuple(
        LayerReport(
            path=path,
            kind=kind.__name__,
            weights=placed[path].weights if path in placed and kind is not _ATTENTION else None,
            activations=placed[path].activations if path in placed else None,
        )
        for path, kind in sites.items()
    )
    return QuantizedModel(module, placed, Report(layers))


_ATTENTION = nn.MultiHeadDotProductAttention


def _dot_general(module: Any, rule: Rule, args: tuple, kwargs: dict) -> dict[str, Any]:
    lhs, rhs = _operands(module, rule)
    return {"dot_general": functools.partial(ops.dot_general, lhs=lhs, rhs=rhs)}


def _conv(module: Any, rule: Rule, args: tuple, kwargs: dict) -> dict[str, Any]:
    lhs, rhs = _operands(module, rule)
    return {"conv_general_dilated": functools.partial(ops.conv_general_dilated, lhs=lhs, rhs=rhs)}


def _conv_transpose(module: Any, rule: Rule, args: tuple, kwargs: dict) -> dict[str, Any]:
    # Transposed, a kernel's last two axes are (out, in) instead of (in, out).
    kernel_axis = -2 if module.transpose_kernel else -1
    input_features = ops.OperandAxes((0,), (-1,))
    kernel = ops.OperandAxes((kernel_axis,), (-3 - kernel_axis,))
    return _promotion(module, rule, lambda x, w: (input_features, kernel))


def _einsum(module: Any, rule: Rule, args: tuple, kwargs: dict) -> dict[str, Any]:
    subscripts = kwargs.get("einsum_str", args[1] if len(args) > 1 else None) or module.einsum_str
    return _promotion(module, rule, lambda x, w: ops.operand_axes(subscripts, x.ndim, w.ndim))


def _attention(module: Any, rule: Rule, args: tuple, kwargs: dict) -> dict[str, Any]:
    if rule.activations is None:
        return {}
    quantizer = rule.activations
    query, key, weights, value = (
        # "query" is the name of a sublayer.
        _Operand(module, quantizer, f"{name}_operand", axes)
        for name, axes in [
            ("query", TOKENS),
            ("key", TOKENS),
            ("attention_weights", QUERIES),
            ("value", TOKENS),
        ]
    )

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


def _promotion(
    module: Any,
    rule: Rule,
    axes: Callable[[jax.Array, jax.Array], tuple[ops.OperandAxes, ops.OperandAxes]],
) -> dict[str, Any]:
    """Quantise input and kernel where a layer promotes them to a common dtype."""
    lhs, rhs = _operands(module, rule)
    promote_dtype = module.promote_dtype

    def promote(*arrays: Any, **kwargs: Any) -> tuple:
        x, kernel, bias = promote_dtype(*arrays, **kwargs)
        x_axes, kernel_axes = axes(x, kernel)
        x = x if lhs is None else lhs(x, *x_axes)
        kernel = kernel if rhs is None else rhs(kernel, *kernel_axes)
        return x, kernel, bias

    return {"promote_dtype": promote}


# The fields that take quantised operations: (module, rule, call's arguments) -> {field: value}.
_REPLACEMENTS: dict[type[nn.Module], Callable[..., dict[str, Any]]] = {
    nn.Dense: _dot_general,
    nn.DenseGeneral: _dot_general,
    nn.Conv: _conv,
    nn.ConvTranspose: _conv_transpose,
    nn.Einsum: _einsum,
    _ATTENTION: _attention,
}


@dataclasses.dataclass(frozen=True)
class _Operand:
    """Quantises one operand of a layer, and sows diagnostics if somebody wants them."""

    module: nn.Module
    quantizer: Quantizer
    name: str
    token_axes: tuple[int, int] | None = TOKENS

    def __call__(
        self, x: jax.Array, channel_axis: ChannelAxis = None, vector_axis: VectorAxis = None
    ) -> jax.Array:
        x = without_padding(x, self.token_axes)
        if not self.module.is_mutable_collection(COLLECTION):
            return self.quantizer(x, channel_axis, vector_axis)
        x, diagnostics = fake_quant_with_diagnostics(
            x, self.quantizer, channel_axis=channel_axis, vector_axis=vector_axis
        )
        self.module.sow(COLLECTION, self.name, diagnostics)
        return x


def _operands(module: nn.Module, rule: Rule) -> tuple[_Operand | None, _Operand | None]:
    """The quantisers of a layer's input and kernel."""
    return (
        None if rule.activations is None else _Operand(module, rule.activations, "activations"),
        None if rule.weights is None else _Operand(module, rule.weights, "weights", None),
    )


def _kind(module: nn.Module) -> type[nn.Module] | None:
    """The layer type among those that can be quantised."""
    return next((kind for kind in _REPLACEMENTS if isinstance(module, kind)), None)


def _sites(module: nn.Module, args: tuple, kwargs: dict) -> dict[str, type[nn.Module]]:
    """Path and type of each layer that can be quantised, in the order in which they run."""
    sites: dict[str, type[nn.Module]] = {}

    def record(call: Callable, args: tuple, kwargs: dict[str, Any], context: Any) -> Any:
        kind = _kind(context.module)
        if context.method_name == "__call__" and kind is not None:
            sites.setdefault("/".join(context.module.path), kind)
        return call(*args, **kwargs)

    def init(key: jax.Array) -> Any:
        rngs = dict.fromkeys(("params", "dropout"), key)
        return module.init(rngs, *args, **kwargs)

    with nn.intercept_methods(record):
        jax.eval_shape(init, jax.random.key(0))
    return sites
