"""Put a policy into an unmodified Flax NNX model, through Flax's own injection points.

``Linear``, ``LinearGeneral``, ``Conv`` and ``Einsum`` let their operation be replaced;
``MultiHeadAttention`` its attention function, here one with both matrix products quantised;
``ConvTranspose`` the promotion of its operands, where they are quantised on the way. What is
injected are NNX modules themselves, so that quantisers can sow diagnostics and hold state.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import linen, nnx
from flax.nnx.nn.attention import dot_product_attention, dot_product_attention_weights
from flax.nnx.nn.dtypes import promote_dtype
from jax import lax

from qat_jax import ops
from qat_jax.diagnostics import Diagnostics, fake_quant_with_diagnostics
from qat_jax.display import DescribedOperands, DescribedQuantizer
from qat_jax.granularity import ChannelAxis, VectorAxis
from qat_jax.padding import QUERIES, TOKENS, keep_padding, without_padding
from qat_jax.policy import Policy, Rule, preset_for_layers
from qat_jax.quantizer import QTensor, Quantizer, fake_quant, quantize
from qat_jax.report import LayerReport, Report, Rest

Sown = TypeVar("Sown")
_NAMED = 3  # layers that a message lists


class Diagnostic(nnx.Variable):
    """The type under which quantisers sow their `Diagnostics`: see `diagnostics_by_layer`."""


class Candidate(nnx.Variable):
    """The type under which quantisers sow the threshold that they find in their operand.

    A forward pass that is captured with it quantises nothing: see `calibration`.
    """


class NonFinite(nnx.Variable):
    """The type under which quantisers sow how many groups of their operand are not finite.

    Found from thresholds, it costs no look at the operand itself.
    """


class Codes(nnx.Variable):
    """The type under which quantisers sow their operand as a `QTensor`."""


class Operand(nnx.Variable):
    """The type under which quantisers sow their operand as it reaches them, without padding."""


class Threshold(nnx.Variable):
    """Thresholds that were frozen into the model: part of its state, and no parameter."""


class Carried(nnx.Variable):
    """Thresholds of the step before, with which a search begins: state, and no parameter."""


class OperandQuantizer(DescribedQuantizer, nnx.Module):
    """Quantises one operand of one layer.

    Attributes:
      quantizer: the description (static).
      token_axes: the operand's axes of examples and of positions, if it can have padding (static).
      threshold: thresholds found before (see `calibration`); None: found in each call.
      carried: where training begins to search for them; None: from nothing.
      deterministic: whether thresholds found depend on the operand alone, as in evaluation, where
        Flax sets this attribute.
    """

    def __init__(self, quantizer: Quantizer, token_axes: tuple[int, int] | None = TOKENS) -> None:
        self.quantizer = quantizer
        self.token_axes = token_axes
        self.threshold: Threshold | None = nnx.data(None)
        self.carried: Carried | None = nnx.data(None)
        self.deterministic = False

    def _words(self) -> str:
        return super()._words() + (" frozen" if self.threshold is not None else "")

    def __call__(
        self, x: jax.Array, channel_axis: ChannelAxis = None, vector_axis: VectorAxis = None
    ) -> jax.Array:
        """Fake quantisation of x."""
        x = without_padding(x, self.token_axes)
        axes: dict[str, Any] = {"channel_axis": channel_axis, "vector_axis": vector_axis}
        if _captures(self, Operand):
            self.sow(Operand, "operand", x)
        if _captures(self, Candidate):
            self.sow(Candidate, "candidates", self.quantizer.threshold(x, **axes))
            return x
        if self.threshold is None:
            threshold = seen = self._found(x, channel_axis, vector_axis)
        else:
            threshold, seen = self.threshold.get_value(), x  # frozen, they say nothing about x
        if _captures(self, NonFinite):
            self.sow(NonFinite, "non_finite", jnp.sum(~jnp.isfinite(seen), dtype=jnp.float32))
        axes["threshold"] = threshold
        if _captures(self, Codes):
            self.sow(Codes, "codes", quantize(x, self.quantizer, **axes))
        if not _captures(self, Diagnostic):
            return fake_quant(x, self.quantizer, **axes)
        x, diagnostics = fake_quant_with_diagnostics(x, self.quantizer, **axes)
        self.sow(Diagnostic, "diagnostics", diagnostics)
        return x

    def _found(self, x: jax.Array, channel_axis: ChannelAxis, vector_axis: VectorAxis) -> jax.Array:
        """Thresholds of x; those of training are carried to the next step."""
        if self.carried is None or self.deterministic:
            return self.quantizer.threshold(x, channel_axis, vector_axis)
        before = self.carried.get_value()
        threshold = self.quantizer.refined_threshold(x, before, channel_axis)
        found = threshold.reshape(before.shape)  # an example alone has fewer axes than a batch
        self.carried.set_value(jnp.where(jnp.isfinite(found), found, before))
        return threshold

    def quantized(
        self, x: jax.Array, channel_axis: ChannelAxis = None, vector_axis: VectorAxis = None
    ) -> QTensor:
        """Codes and scales of what a call makes of x; not differentiable."""
        return quantize(
            without_padding(x, self.token_axes),
            self.quantizer,
            channel_axis=channel_axis,
            vector_axis=vector_axis,
            threshold=None if self.threshold is None else self.threshold.get_value(),
        )


class QuantizedOp(DescribedOperands, nnx.Module):
    """Takes the place of a ``jax.lax`` operation inside a layer; the kernel is on the right.

    Attributes:
      op: an operation of ``ops`` (static).
      activations: quantiser of the left operand, or None.
      weights: quantiser of the right operand, or None.
    """

    def __init__(self, op: Callable[..., jax.Array], rule: Rule) -> None:
        self.op = op
        self.activations = _operand(rule.activations)
        self.weights = _operand(rule.weights, None)

    def __call__(self, *args: Any, **kwargs: Any) -> jax.Array:
        """The operation, of quantised operands."""
        return self.op(*args, lhs=self.activations, rhs=self.weights, **kwargs)


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


def quantize_model(model: nnx.Module, policy: Policy | str) -> nnx.Module:
    """Put a policy into a model.

    Args:
      model: any NNX model; it is left as it is.
      policy: the rules, or the name of a `preset`, whose first convolution and classifier are
        then the model's first convolution and last linear layer in order of definition.

    Returns:
      A copy of the model that shares its arrays and quantises as the policy says. `report` tells
      which layer got what. Its quantisers are in evaluation mode if all dropouts and batch norms
      of the model are, and there is one; otherwise in that of training, as modules begin.

    Raises:
      TypeError: the model is of Linen, or the policy neither a policy nor a name.
      ValueError: if a rule matches no layer, or a matched layer is quantised already or has an
        operation of its own in the place where the quantised one would go. Layers that an earlier
        policy left alone can be quantised by another one.

    Example:
      >>> model = nnx.Sequential(nnx.Linear(4, 8, rngs=nnx.Rngs(0)), nnx.relu)
      >>> model = quantize_model(model, "octav-w4a4")
      >>> print(report(model))
      layer     type    weights                          activations
      layers/0  Linear  int8 narrow PerTensor Octav mad  auto8 narrow PerTensor Octav pwl
      beside these kernels: 8 of 40 parameters (20 %), 32 bytes, which stay as they are
    """
    if isinstance(model, linen.Module):
        raise TypeError("the model is a Linen module: use qat_jax.linen.quantize_model")
    sites = layer_sites(model)
    convolutions = [s.path for s in sites if isinstance(s.layer, nnx.Conv)]
    linears = [s.path for s in sites if isinstance(s.layer, nnx.Linear | nnx.LinearGeneral)]
    policy = preset_for_layers(policy, convolutions, linears)
    placed = {
        path: rule
        for path, rule in policy.place([site.path for site in sites]).items()
        if rule.weights is not None or rule.activations is not None
    }
    _refuse_quantised([site for site in sites if site.path in placed])
    replacements = {
        site.path: _replacement(site, placed[site.path]) for site in sites if site.path in placed
    }
    evaluates = _evaluates(model)
    model = copy_model(model)
    for site in layer_sites(model):
        if (replacement := replacements.get(site.path)) is not None:
            if evaluates:
                replacement.eval()
            site.install(replacement)
    return model


def report(model: nnx.Module) -> Report:
    """What each layer of a model got.

    Args:
      model: an NNX model, quantised or not.

    Returns:
      A report that prints as a table.
    """
    sites = layer_sites(model)
    layers = tuple(
        LayerReport(
            path=site.path,
            kind=type(site.layer).__name__,
            weights=_installed(site, "weights"),
            activations=_installed(site, "activations"),
        )
        for site in sites
    )
    return Report(layers, _rest(model, sites))


def diagnostics_by_layer(captured: nnx.State) -> dict[str, Diagnostics]:
    """Sort out what quantisers sowed during a forward pass.

    Collect it with Flax's own ``nnx.capture``, inside or outside ``jax.jit``; a forward pass that
    nobody listens to computes no diagnostics.

    Args:
      captured: the second result of a function wrapped in ``nnx.capture(…, Diagnostic)``.

    Returns:
      Diagnostics by ``"path of the layer/operand"``. A layer that ran more than once has its
      later runs under ``"…/operand/1"`` and so on.

    Example:
      >>> model = nnx.Sequential(nnx.Linear(4, 8, rngs=nnx.Rngs(0)))
      >>> forward = nnx.capture(quantize_model(model, "octav-w4a4"), Diagnostic)
      >>> y, captured = forward(jnp.ones((2, 4)))
      >>> sorted(diagnostics_by_layer(captured))
      ['layers/0/activations', 'layers/0/weights']
    """
    return captured_by_operand(captured, Diagnostics)


def captured_by_operand(captured: nnx.State, kind: type | None = None) -> dict[str, Any]:
    """What quantisers sowed, by ``"path of the layer/operand"``.

    Args:
      captured: the second result of a function wrapped in ``nnx.capture``.
      kind: the type of what was sown, if that is a tree; arrays if None.

    Returns:
      See `diagnostics_by_layer`.
    """
    found = {}
    is_leaf = None if kind is None else lambda x: isinstance(x, kind)
    leaves = jax.tree.leaves_with_path(nnx.to_pure_dict(captured), is_leaf=is_leaf)
    for keys, sown in leaves:
        *path, _, run = (str(getattr(key, "key", getattr(key, "idx", key))) for key in keys)
        found[_operand_path(path) + ("" if run == "0" else f"/{run}")] = sown
    return found


def operand_codes(graphdef: nnx.GraphDef, state: nnx.State, *inputs: Any) -> dict[str, QTensor]:
    """Every operand as it is quantised in a forward pass of the evaluation mode.

    Args:
      graphdef: of a quantised model.
      state: of it.
      *inputs: a batch for it.

    Returns:
      By ``"path of the layer/operand"``.
    """
    model = nnx.merge(graphdef, state)
    model.eval()
    with keep_padding():
        _, captured = nnx.capture(model, Codes)(*inputs)
    return captured_by_operand(captured, QTensor)


def in_all_runs(sown: Mapping[str, Sown], operand: str) -> list[Sown]:
    """What an operand sowed in each run of its layer.

    Args:
      sown: from `captured_by_operand`, where later runs have a number after the path.
      operand: its path.

    Returns:
      In the order of the runs; empty if there was none.
    """
    own = re.compile(re.escape(operand) + r"(/\d+)?")
    return [value for path, value in sown.items() if own.fullmatch(path)]


def operand_quantizers(model: nnx.Module) -> dict[str, OperandQuantizer]:
    """The quantisers of a model by ``"path of the layer/operand"``, in order of definition.

    Args:
      model: a quantised model.

    Returns:
      The modules themselves, not copies.
    """
    sites = [site.path for site in layer_sites(model)]
    found = [
        (_operand_path(map(str, path)), node)
        for path, node in nnx.iter_graph(model)
        if isinstance(node, OperandQuantizer)
    ]
    return dict(sorted(found, key=lambda item: sites.index(item[0].rpartition("/")[0])))


def is_weight(operand: str) -> bool:
    """Whether an operand's path is that of a kernel; of a bare layer it is just "weights"."""
    return operand.rpartition("/")[2] == "weights"


def _operand_path(path: Iterable[str]) -> str:
    """The path of a quantiser, or of what is in it, without the injection point."""
    names = list(path)
    hooks = {hook.attribute for hook in _HOOKS}
    places = [place for place, name in enumerate(names) if name in hooks]
    if places:  # the last; those before it are names of the model's own
        del names[places[-1]]
    return "/".join(names)


class _Hook(NamedTuple):
    """An injection point of a Flax layer.

    Attributes:
      layer: the type that has it.
      attribute: where the quantised operation goes.
      plain: what a layer left alone holds there.
      replacement: makes the quantised operation for a layer and its rule.
    """

    layer: type[nnx.Module]
    attribute: str
    plain: tuple[Any, ...]
    replacement: Callable[[Any, Rule], nnx.Module | None]


_HOOKS = (
    _Hook(
        nnx.Linear,
        "dot_general",
        (lax.dot_general,),
        lambda layer, rule: QuantizedOp(ops.dot_general, rule),
    ),
    _Hook(
        nnx.LinearGeneral,
        "dot_general",
        (None, lax.dot_general),
        lambda layer, rule: QuantizedOp(ops.dot_general, rule),
    ),
    _Hook(
        nnx.Conv,
        "conv_general_dilated",
        (lax.conv_general_dilated,),
        lambda layer, rule: QuantizedOp(ops.conv_general_dilated, rule),
    ),
    _Hook(
        nnx.ConvTranspose,
        "promote_dtype",
        (promote_dtype,),
        # Transposed, a kernel's last two axes are (out, in) instead of (in, out).
        lambda layer, rule: QuantizedPromotion(
            layer.promote_dtype, (-2, -1) if layer.transpose_kernel else (-1, -2), rule
        ),
    ),
    _Hook(
        nnx.Einsum,
        "einsum_op",
        (jnp.einsum,),
        lambda layer, rule: QuantizedOp(ops.einsum, rule),
    ),
    _Hook(
        nnx.MultiHeadAttention,
        "attention_fn",
        (dot_product_attention,),
        lambda layer, rule: QuantizedAttention(rule.activations) if rule.activations else None,
    ),
)


class LayerSite(NamedTuple):
    """A layer that can be quantised, and where.

    Attributes:
      path: the layer's.
      layer: the layer itself.
      hook: its injection point.
    """

    path: str
    layer: Any
    hook: _Hook

    @property
    def weights(self) -> str:
        """The path of its kernel as an operand."""
        return f"{self.path}/weights" if self.path else "weights"

    @property
    def activations(self) -> str:
        """The path of its input as an operand."""
        return f"{self.path}/activations" if self.path else "activations"

    @property
    def kernel_rank(self) -> int:
        """How many axes its kernel has, those of a stack of layers (``nnx.scan``) left out."""
        match self.layer:
            case nnx.Linear():
                return 2
            case nnx.LinearGeneral(batch_axis=batch, in_features=inputs, out_features=outputs):
                return len(batch) + len(inputs) + len(outputs)
        return len(self.layer.kernel_shape)

    @property
    def installed(self) -> Any:
        """What the injection point holds."""
        return getattr(self.layer, self.hook.attribute)

    def install(self, replacement: nnx.Module) -> None:
        """Puts something else there."""
        setattr(self.layer, self.hook.attribute, nnx.data(replacement))


def layer_sites(model: nnx.Module) -> list[LayerSite]:
    """The layers that can be quantised, each once, in order of definition."""
    nodes = dict(nnx.iter_graph(model))

    def position(parent: Any, name: Any) -> int:
        # NNX traverses attributes by the alphabet, and merging lays them out so; what each module
        # remembers of its attributes stays in the order of their definition.
        attributes = getattr(parent, "__dict__", {})
        defined = [str(attribute) for attribute in attributes.get("_pytree__nodes", attributes)]
        if str(name) in defined:
            return defined.index(str(name))
        return name if isinstance(name, int) else 0  # in a list, or a dictionary as it comes

    def definition_order(path: tuple[Any, ...]) -> list[int]:
        return [position(nodes.get(path[:depth]), name) for depth, name in enumerate(path)]

    found = [
        (definition_order(path), LayerSite("/".join(map(str, path)), node, hook))
        for path, node in nodes.items()
        for hook in _HOOKS
        if isinstance(node, hook.layer)
    ]
    return [site for _, site in sorted(found, key=lambda item: item[0])]


def _evaluates(model: nnx.Module) -> bool:
    """Whether there are modules that know of a mode, and all are in that of evaluation."""
    modes = [
        getattr(node, name, None)
        for _, node in nnx.iter_graph(model)
        for name in ("deterministic", "use_running_average")  # what Module.eval sets
    ]
    known = [mode for mode in modes if isinstance(mode, bool)]
    return bool(known) and all(known)


def copy_model(model: nnx.Module) -> nnx.Module:
    """New modules and variables, the same arrays."""
    return nnx.merge(*nnx.split(model), copy=True)


def _refuse_quantised(sites: Iterable[LayerSite]) -> None:
    """Raises ValueError if layers that are to be quantised are so already, packed or not."""
    found = [
        site.path
        for site in sites
        if isinstance(site.installed, nnx.Module)
        and any(isinstance(x, DescribedQuantizer) for _, x in nnx.iter_graph(site.installed))
    ]
    if found:
        names = ", ".join(path or "the layer itself" for path in found[:_NAMED])
        more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
        raise ValueError(
            f"quantised already: {names}{more}; give the float model, or leave "
            f"such layers as they are with rules like Rule({found[0]!r}) in front"
        )


def _replacement(site: LayerSite, rule: Rule) -> nnx.Module | None:
    """The quantised operation for a layer, or None where the rule quantises nothing of it."""
    replacement = site.hook.replacement(site.layer, rule)
    if replacement is not None and (
        site.installed not in site.hook.plain
        or getattr(site.layer, "dot_general_cls", None) is not None
    ):
        raise ValueError(
            f"{site.path} already has a {site.hook.attribute} of its own: quantise the model "
            f"before that is set, or leave the layer alone with Rule({site.path!r}) in front"
        )
    return replacement


def _installed(site: LayerSite, operand: str) -> Quantizer | None:
    """The quantiser of a layer's weights or activations."""
    replacement = site.installed
    if isinstance(replacement, QuantizedAttention):
        replacement = {"activations": replacement.query}.get(operand)
    else:
        replacement = getattr(replacement, operand, None)
    return getattr(replacement, "quantizer", None)


def _rest(model: nnx.Module, sites: Iterable[LayerSite]) -> Rest:
    """The parameters that are no kernel of these layers."""
    kernels: dict[int, int] = {}  # several layers may share one
    for site in sites:
        if (kernel := getattr(site.layer, "kernel", None)) is not None:
            stored = getattr(getattr(site.installed, "weights", None), "packed", None)
            kernels[id(kernel)] = math.prod((kernel if stored is None else stored).shape)
    parameters = [x for _, x in nnx.iter_graph(model) if isinstance(x, nnx.Param)]
    others = jax.tree.leaves([x.get_value() for x in parameters if id(x) not in kernels])
    return Rest.of_arrays(others, in_kernels=sum(kernels.values()))


def _operand(
    quantizer: Quantizer | None, token_axes: tuple[int, int] | None = TOKENS
) -> OperandQuantizer | None:
    return None if quantizer is None else OperandQuantizer(quantizer, token_axes)


def _captures(module: nnx.Module, kind: type[nnx.Variable]) -> bool:
    """Whether an ``nnx.capture`` listens to a type: else sowing it would be wasted."""
    return any(type(variable) is kind for variable in getattr(module, "__captures__", ()))
