"""A policy into an unmodified Flax Linen model, and what each layer got.

While the model runs, Flax's method interception gives each layer that a rule matches a quantised
operation in the very field that Linen offers for one. The model's definition, its variables and
their names stay what they are.
"""

import dataclasses
import html
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
from flax import linen as nn
from flax import nnx, traverse_util
from jax import lax

from qat_jax.linen.operand import DIAGNOSTICS, frozen_thresholds
from qat_jax.linen.operations import (
    ALONE,
    ATTENTION,
    EMBEDDING,
    METHODS,
    LayerCall,
    interceptor,
    kind_of,
)
from qat_jax.policy import Policy, Rule, preset_for_layers
from qat_jax.report import LayerReport, Report, Rest


@dataclasses.dataclass(frozen=True, repr=False)
class QuantizedModel:
    """A Linen model that runs under a policy. Made by `quantize_model`.

    ``init`` and ``apply`` take what the model's own take. ``apply`` with
    ``mutable=["diagnostics"]`` also returns `Diagnostics` of every layer and operand. Operands
    that have thresholds among the variables, as `calibrate` leaves them, search for none.

    Attributes:
      module: the model as it was given.
      placed: the rule of each layer that has one, by the layer's path.
      report: what each layer got; prints as a table.
      layer_call: makes what a layer computes with.
    """

    module: nn.Module
    placed: Mapping[str, Rule]
    report: Report
    layer_call: Callable[..., LayerCall] = LayerCall

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

    def apply(self, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """``nn.Module.apply`` under the policy.

        Raises:
          ValueError: there are thresholds of a layer that the policy leaves alone.
        """
        for path in frozen_thresholds(variables):
            if path.rpartition("/")[0] not in self.placed:
                raise ValueError(
                    f"the variables have thresholds for {path!r}, which the model does not "
                    "quantise: quantise it with the policy that was calibrated"
                )
        # Those of a step before, which a loop may hand on, are not for this one to add to.
        others = {name: value for name, value in variables.items() if name != DIAGNOSTICS}
        with nn.intercept_methods(interceptor(self.placed, self.layer_call)):
            return self.module.apply(others, *args, **kwargs)


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
    tables = [path for path, site in sites.items() if site.kind is EMBEDDING]
    placed = policy.place([path for path in sites if path not in tables], embeddings=tables)
    layers = tuple(_layer(path, site, placed.get(path, ALONE)) for path, site in sites.items())
    return QuantizedModel(module, placed, Report(layers, _rest(variables, layers)))


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
    weights = None if site.kind is ATTENTION else rule.weights
    activations = rule.activations
    if site.kind is EMBEDDING:
        weights, activations = rule.embeddings, None
    if site.own is not None and (weights is not None or activations is not None):
        raise ValueError(
            f"{path} already has a {site.own} of its own: quantise the model "
            f"before that is set, or leave the layer alone with Rule({path!r}) in front"
        )
    return LayerReport(path, site.kind.__name__, weights, activations)


# Part of the key of JAX's caches: what Linen's jit traced elsewhere must not hide layers here.
_recording = jax.make_user_context(False)


def _rest(variables: Mapping[str, Any], layers: Iterable[LayerReport]) -> Rest:
    """The parameters that are no kernel of these layers; tables in float are none either."""
    parameters = traverse_util.flatten_dict(nn.meta.unbox(variables.get("params", {})), sep="/")
    kernels = {
        "/".join(filter(None, (layer.path, name)))
        for layer in layers
        for name in (["kernel"] if layer.weights is None else ["kernel", "embedding"])
    }
    others = [x for name, x in parameters.items() if name not in kernels]
    inside = sum(x.size for name, x in parameters.items() if name in kernels)
    return Rest.of_arrays(others, in_kernels=inside)


def _sites(
    module: nn.Module, args: tuple, kwargs: dict
) -> tuple[dict[str, _Site], Mapping[str, Any]]:
    """The layers that can be quantised, by path, in the order in which they run; the variables."""
    sites: dict[str, _Site] = {}

    def record(call: Callable, args: tuple, kwargs: dict[str, Any], context: Any) -> Any:
        kind = kind_of(context.module)
        if kind is not None and context.method_name in METHODS[kind]:
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
