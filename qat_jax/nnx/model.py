"""Put a policy into a model, and say what each of its layers got."""

import math
from collections.abc import Iterable

import jax
from flax import linen, nnx

from qat_jax.display import DescribedQuantizer
from qat_jax.nnx.operand import is_own_parameter
from qat_jax.nnx.operations import QuantizedAttention
from qat_jax.nnx.sites import LayerSite, layer_sites
from qat_jax.policy import Policy, Rule, preset_for_layers
from qat_jax.quantizer import Quantizer
from qat_jax.report import LayerReport, Report, Rest

_NAMED = 3  # layers that a message lists


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
        for path, rule in rules_of(sites, policy).items()
        if any((rule.weights, rule.activations, rule.embeddings))
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


def rules_of(sites: Iterable[LayerSite], policy: Policy) -> dict[str, Rule]:
    """The rule of each layer that has one, by its path: see `Policy.place`."""
    paths: dict[bool, list[str]] = {True: [], False: []}
    for site in sites:
        paths[site.is_embedding].append(site.path)
    return policy.place(paths[False], embeddings=paths[True])


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


def copy_model(model: nnx.Module) -> nnx.Module:
    """New modules and variables, the same arrays."""
    return nnx.merge(*nnx.split(model), copy=True)


def _evaluates(model: nnx.Module) -> bool:
    """Whether there are modules that know of a mode, and all are in that of evaluation."""
    modes = [
        getattr(node, name, None)
        for _, node in nnx.iter_graph(model)
        for name in ("deterministic", "use_running_average")  # what Module.eval sets
    ]
    known = [mode for mode in modes if isinstance(mode, bool)]
    return bool(known) and all(known)


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
        if site.is_embedding and _installed(site, "weights") is None:
            continue  # most models leave their tables alone, and that is worth telling
        if (kernel := site.kernel) is not None:
            stored = getattr(getattr(site.installed, "weights", None), "packed", None)
            kernels[id(kernel)] = math.prod((kernel if stored is None else stored).shape)
    parameters = [x for _, x in nnx.iter_graph(model) if is_own_parameter(x)]
    others = jax.tree.leaves([x.get_value() for x in parameters if id(x) not in kernels])
    return Rest.of_arrays(others, in_kernels=sum(kernels.values()))
