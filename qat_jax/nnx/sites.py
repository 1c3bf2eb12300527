"""Where Flax's layers let their operation be replaced, and which layers of a model do.

``Linear``, ``LinearGeneral``, ``Conv`` and ``Einsum`` let their operation be replaced;
``MultiHeadAttention`` its attention function, here one with both matrix products quantised;
``ConvTranspose`` and ``Embed`` the promotion of their operands, where these are quantised on the
way.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.attention import dot_product_attention
from flax.nnx.nn.dtypes import promote_dtype
from jax import lax

from qat_jax import ops
from qat_jax.nnx.operand import OperandQuantizer
from qat_jax.nnx.operations import (
    QuantizedAttention,
    QuantizedOp,
    QuantizedPromotion,
    QuantizedTable,
)
from qat_jax.policy import Rule


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
    _Hook(
        nnx.Embed,
        "promote_dtype",
        (promote_dtype,),
        lambda layer, rule: QuantizedTable(layer.promote_dtype, rule) if rule.embeddings else None,
    ),
)


class LayerSite(NamedTuple):
    """A layer that can be quantised, and where.

    Attributes:
      path: the layer's.
      layer: the layer itself.
      hook: its injection point.
      has_own_kernel: whether what it multiplies with is a kernel that no other layer has, as it is
        stored: no mask on it, and no ``nnx.WeightNorm`` around the layer that makes it anew.
    """

    path: str
    layer: Any
    hook: _Hook
    has_own_kernel: bool

    @property
    def weights(self) -> str:
        """The path of its kernel as an operand."""
        return f"{self.path}/weights" if self.path else "weights"

    @property
    def activations(self) -> str:
        """The path of its input as an operand."""
        return f"{self.path}/activations" if self.path else "activations"

    @property
    def is_embedding(self) -> bool:
        """Whether its kernel is a table that is looked up."""
        return isinstance(self.layer, nnx.Embed)

    @property
    def kernel(self) -> Any:
        """The layer's parameter that is quantised as weights; None of attention, which has none."""
        return getattr(self.layer, _kernel_name(self.layer), None)

    def put_kernel(self, kernel: Any) -> None:
        """Gives the layer another one."""
        setattr(self.layer, _kernel_name(self.layer), kernel)

    @property
    def kernel_rank(self) -> int:
        """How many axes its kernel has, those of a stack of layers (``nnx.scan``) left out."""
        match self.layer:
            case nnx.Linear() | nnx.Embed():
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


def _kernel_name(layer: nnx.Module) -> str:
    return "embedding" if isinstance(layer, nnx.Embed) else "kernel"


def layer_sites(model: nnx.Module) -> list[LayerSite]:
    """The layers that can be quantised, each once, in order of definition."""
    nodes = dict(nnx.iter_graph(model))
    owners = Counter(
        id(value) for node in nodes.values() for value in getattr(node, "__dict__", {}).values()
    )
    wrapped = normalised_layers(model)

    def site(path: str, layer: Any, hook: _Hook) -> LayerSite:
        as_stored = getattr(layer, "mask", None) is None and id(layer) not in wrapped
        own = as_stored and owners[id(getattr(layer, _kernel_name(layer), None))] == 1
        return LayerSite(path, layer, hook, has_own_kernel=own)

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
        (definition_order(path), site("/".join(map(str, path)), node, hook))
        for path, node in nodes.items()
        for hook in _HOOKS
        if isinstance(node, hook.layer)
    ]
    return [site for _, site in sorted(found, key=lambda item: item[0])]


def normalised_layers(model: nnx.Module) -> set[int]:
    """The identities of the modules whose parameters something around them computes anew."""
    return {
        id(inside)
        for _, node in nnx.iter_graph(model)
        if isinstance(node, nnx.WeightNorm | nnx.SpectralNorm)
        for _, inside in nnx.iter_graph(node)
        if isinstance(inside, nnx.Module)
    }


def operand_quantizers(model: nnx.Module) -> dict[str, OperandQuantizer]:
    """The quantisers of a model by ``"path of the layer/operand"``, in order of definition.

    Args:
      model: a quantised model.

    Returns:
      The modules themselves, not copies.
    """
    sites = [site.path for site in layer_sites(model)]
    found = [
        (operand_path(map(str, path)), node)
        for path, node in nnx.iter_graph(model)
        if isinstance(node, OperandQuantizer)
    ]
    return dict(sorted(found, key=lambda item: sites.index(item[0].rpartition("/")[0])))


def is_weight(operand: str) -> bool:
    """Whether an operand's path is that of a kernel; of a bare layer it is just "weights"."""
    return operand.rpartition("/")[2] == "weights"


def operand_path(path: Iterable[str]) -> str:
    """The path of a quantiser, or of what is in it, without the injection point."""
    names = list(path)
    hooks = {hook.attribute for hook in _HOOKS}
    places = [place for place, name in enumerate(names) if name in hooks]
    if places:  # the last; those before it are names of the model's own
        del names[places[-1]]
    return "/".join(names)
