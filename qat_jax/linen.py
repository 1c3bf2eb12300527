"""Put a policy into an unmodified Flax Linen model.

While the model runs, Flax's method interception gives each layer that a rule matches a quantised
operation in the very field that Linen offers for one. The model's definition, its variables and
their names stay what they are.
"""

import dataclasses
import functools
import html
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from flax import linen as nn
from flax import nnx, traverse_util
from jax import lax

from qat_jax import ops
from qat_jax.diagnostics import fake_quant_with_diagnostics
from qat_jax.granularity import ChannelAxis, VectorAxis
from qat_jax.padding import QUERIES, TOKENS, without_padding
from qat_jax.policy import Policy, Rule, preset_for_layers
from qat_jax.quantizer import Quantizer
from qat_jax.report import LayerReport, Report, Rest

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
        rule = self.placed.get("/".join(module.path), _ALONE)
        kind = _kind(module)
        alone = rule.weights is None and rule.activations is None
        if context.method_name != "__call__" or kind is None or alone:
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
      TypeError: the model is of NNX or quantised already, or the policy neither a policy nor a
        name.
      ValueError: if a rule matches no layer (it lists the paths there are), a matched layer already
        has an operation of its own in the place where the quantised one would go, or a layer runs
        inside ``nn.jit``.

    Example:
      >>> import jax.numpy as jnp
      >>> model = quantize_model(nn.Dense(8), "octav-w4a4", jnp.ones((2, 4)))
      >>> variables = model.init(jax.random.key(0), jnp.ones((2, 4)))
      >>> model.apply(variables, jnp.ones((2, 4))).shape
      (2, 8)
    """
    if isinstance(module, nnx.Module):
        raise TypeError("the model is an NNX module: use qat_jax.quantize_model")
    if isinstance(module, QuantizedModel):
        raise TypeError("the model is quantised already: give its float model, .module")
    sites, variables = _sites(module, args, kwargs)
    convolutions = [path for path, site in sites.items() if site.kind is nn.Conv]
    dense = [path for path, site in sites.items() if site.kind in (nn.Dense, nn.DenseGeneral)]
    policy = preset_for_layers(policy, convolutions, dense)
    placed = policy.place(list(sites))
    layers = tuple(_layer(path, site, placed.get(path, _ALONE)) for path, site in sites.items())
    return QuantizedModel(module, placed, Report(layers, _rest(variables, sites)))


_ALONE = Rule(".*")
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


def _promotion(module: Any, rule: Rule, axes: Callable[..., tuple]) -> dict[str, Any]:
    promote = module.promote_dtype
    if isinstance(promote, _Promotion):  # of the call around this one, such as a subclass's
        promote = promote.promote
    return {"promote_dtype": _Promotion(promote, *_operands(module, rule), axes)}


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
    lhs: _Operand | None
    rhs: _Operand | None
    axes: Callable[[jax.Array, jax.Array], tuple[ops.OperandAxes, ops.OperandAxes]]

    def __call__(self, *arrays: Any, **kwargs: Any) -> tuple:
        x, kernel, bias = self.promote(*arrays, **kwargs)
        x_axes, kernel_axes = self.axes(x, kernel)
        x = x if self.lhs is None else self.lhs(x, *x_axes)
        kernel = kernel if self.rhs is None else self.rhs(kernel, *kernel_axes)
        return x, kernel, bias


def _operands(module: nn.Module, rule: Rule) -> tuple[_Operand | None, _Operand | None]:
    """The quantisers of a layer's input and kernel."""
    return (
        None if rule.activations is None else _Operand(module, rule.activations, "activations"),
        None if rule.weights is None else _Operand(module, rule.weights, "weights", None),
    )


def _kind(module: nn.Module) -> type[nn.Module] | None:
    """The layer type among those that can be quantised."""
    return next((kind for kind in _REPLACEMENTS if isinstance(module, kind)), None)


class _Site(NamedTuple):
    """A layer that can be quantised.

    Attributes:
      kind: its type among those that can.
      own: the field in which it has an operation of its own, or None.
    """

    kind: type[nn.Module]
    own: str | None


def _layer(path: str, site: _Site, rule: Rule) -> LayerReport:
    """What a layer gets."""
    weights = None if site.kind is _ATTENTION else rule.weights
    if site.own is not None and (weights is not None or rule.activations is not None):
        raise ValueError(
            f"{path} already has a {site.own} of its own: quantise the model "
            f"before that is set, or leave the layer alone with Rule({path!r}) in front"
        )
    return LayerReport(path, site.kind.__name__, weights, rule.activations)


# Part of the key of JAX's caches: what Linen's jit traced elsewhere must not hide layers here.
_recording = jax.make_user_context(False)


def _rest(variables: Mapping[str, Any], sites: Mapping[str, _Site]) -> Rest:
    """The parameters that are no kernel of these layers."""
    parameters = traverse_util.flatten_dict(nn.meta.unbox(variables.get("params", {})), sep="/")
    kernels = {f"{path}/kernel" if path else "kernel" for path in sites}
    others = [x for name, x in parameters.items() if name not in kernels]
    inside = sum(x.size for name, x in parameters.items() if name in kernels)
    return Rest.of_arrays(others, in_kernels=inside)


def _sites(
    module: nn.Module, args: tuple, kwargs: dict
) -> tuple[dict[str, _Site], Mapping[str, Any]]:
    """The layers that can be quantised, by path, in the order in which they run; the variables."""
    sites: dict[str, _Site] = {}

    def record(call: Callable, args: tuple, kwargs: dict[str, Any], context: Any) -> Any:
        kind = _kind(context.module)
        if context.method_name == "__call__" and kind is not None:
            path = "/".join(context.module.path)
            _refuse_jit(path, context.module)
            sites.setdefault(path, _Site(kind, _own_operation(context.module)))
        return call(*args, **kwargs)

    def init(key: jax.Array) -> Any:
        rngs = dict.fromkeys(("params", "dropout"), key)
        return module.init(rngs, *args, **kwargs)

    with _recording(True), nn.intercept_methods(record):
        variables = jax.eval_shape(init, jax.random.key(0))
    return sites, variables


def _refuse_jit(path: str, module: Any) -> None:
    """Linen's jit shares traces among models and paths, whatever their rules are."""
    if any("jit(" in name for name in module.scope.debug_path):
        raise ValueError(
            f"layer {path!r} runs inside nn.jit, whose cache knows nothing of rules: take nn.jit "
            "off the model, and compile the whole call instead, as in jax.jit(model.apply)"
        )


# The fields in which a layer can have an operation of its own: what they hold if it has none.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "dot_general": (None, lax.dot_general),
    "dot_general_cls": (None,),
    "conv_general_dilated": (None, lax.conv_general_dilated),
    "conv_general_dilated_cls": (None,),
    "attention_fn": (nn.dot_product_attention,),
    "qk_attn_weights_einsum_cls": (None,),
    "attn_weights_value_einsum_cls": (None,),
}


def _own_operation(module: nn.Module) -> str | None:
    """The field in which a layer has an operation of its own."""
    for field, plain in _PLAIN.items():
        if getattr(module, field, plain[0]) not in plain:
            return field
    return None
