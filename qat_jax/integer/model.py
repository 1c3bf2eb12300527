"""Quantised models with packed weights, computing in floats or in integers."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.attention import dot_product_attention_weights

from qat_jax import ops
from qat_jax.batches import compiled
from qat_jax.display import DescribedOperands, DescribedQuantizer
from qat_jax.granularity import ChannelAxis, VectorAxis
from qat_jax.integer import ops as integer_ops
from qat_jax.integer.operand import Operand
from qat_jax.integer.packed import PackedTensor, pack, unpack
from qat_jax.integer.widths import Datapath
from qat_jax.nnx import (
    LayerSite,
    OperandQuantizer,
    QuantizedAttention,
    QuantizedOp,
    QuantizedTable,
    copy_model,
    in_basis,
    is_weight,
    layer_sites,
    operand_codes,
    operand_quantizers,
    with_causal_mask,
)
from qat_jax.quantizer import QTensor, Quantizer, dequantize

_INTEGER_OPS: dict[Callable[..., Any], Callable[..., jax.Array]] = {
    ops.dot_general: integer_ops.dot_general,
    ops.conv_general_dilated: integer_ops.conv_general_dilated,
    ops.einsum: integer_ops.einsum,
}
# What Flax passes that integers have no use for.
_FLOAT_OPTIONS = ("precision", "preferred_element_type", "out_sharding")


class Packed(nnx.Variable):
    """The bits of a kernel's codes or scales, or its coarse scales: state, and no parameter."""


class PackedKernel(DescribedQuantizer, nnx.Module):
    """A kernel that is stored packed.

    Attributes:
      codes: the three arrays of a `PackedTensor`.
      scale: likewise.
      coarse: likewise, or None.
      layout: the rest of it (static).
      quantizer: what made it (static).
    """

    def __init__(self, packed: PackedTensor, quantizer: Quantizer) -> None:
        self.quantizer = quantizer
        arrays, self.layout = jax.tree.flatten(packed)
        self.codes, self.scale = (Packed(array) for array in arrays[:2])
        self.coarse = nnx.data(Packed(arrays[2]) if len(arrays) > 2 else None)

    @property
    def packed(self) -> PackedTensor:
        """The array itself."""
        stored = [self.codes, self.scale, *([] if self.coarse is None else [self.coarse])]
        return jax.tree.unflatten(self.layout, [variable.get_value() for variable in stored])


class PackedOp(DescribedOperands, nnx.Module):
    """Takes the place of a `QuantizedOp`: the same operation of the same numbers.

    Attributes:
      op: an operation of `qat_jax.ops` (static).
      factors: of the left operand's features, before its quantiser; None: all 1.
      rotation: the length of blocks of these that are turned then, or None (static).
      activations: quantiser of the left operand, or None.
      weights: the kernel; that of the layer is empty.
    """

    def __init__(self, op: QuantizedOp, kernel: PackedKernel) -> None:
        self.op = op.op
        self.factors = nnx.data(op.factors)
        self.rotation = op.rotation
        self.activations = op.activations
        self.weights = kernel

    def __call__(self, *args: Any, **kwargs: Any) -> jax.Array:
        """The operation, of the quantised input and the stored kernel."""
        kernel = dequantize(unpack(self.weights.packed))
        lhs = in_basis(self, self.activations)
        return self.op(*with_kernel(self.op, args, kernel), lhs=lhs, **kwargs)


class PackedTable(DescribedOperands, nnx.Module):
    """Takes the place of a `QuantizedTable`: the same rows of the same numbers.

    Attributes:
      promote: the layer's own promotion (static).
      weights: the table; that of the layer is empty.
    """

    def __init__(self, table: QuantizedTable, kernel: PackedKernel) -> None:
        self.promote = table.promote
        self.weights = kernel

    def __call__(self, arrays: tuple, **kwargs: Any) -> tuple:
        """Promote (table,) or (query, table) to a common dtype, the table out of its codes."""
        *query, _ = arrays
        return self.promote((*query, dequantize(unpack(self.weights.packed))), **kwargs)


class IntegerOp(DescribedOperands, nnx.Module):
    """Takes the place of a `PackedOp` and computes in integers.

    Attributes:
      op: an operation of `qat_jax.ops` (static).
      datapath: its widths (static).
      factors: of the left operand's features, before its quantiser; None: all 1.
      rotation: the length of blocks of these that are turned then, or None (static).
      activations: quantiser of the left operand.
      weights: the kernel; that of the layer is empty.
    """

    def __init__(self, op: PackedOp, activations: OperandQuantizer, datapath: Datapath) -> None:
        self.op = op.op
        self.datapath = datapath
        self.factors = nnx.data(op.factors)
        self.rotation = op.rotation
        self.activations = activations
        self.weights = op.weights

    def __call__(self, *args: Any, **kwargs: Any) -> jax.Array:
        """The operation, in integers up to the last multiplication."""
        packed = self.weights.packed
        kernel = unpack(packed)
        dtype = kwargs.get("preferred_element_type") or packed.dtype

        def stored(x: jax.Array, channel_axis: ChannelAxis, vector_axis: VectorAxis) -> Operand:
            del x, channel_axis, vector_axis
            return Operand.of(kernel, packed.scale_bits or 0)

        y = _INTEGER_OPS[self.op](
            *with_kernel(self.op, args, kernel.codes),
            lhs=in_basis(self, _operand(self.activations)),
            rhs=stored,
            datapath=self.datapath,
            **{name: value for name, value in kwargs.items() if name not in _FLOAT_OPTIONS},
        )
        return y.astype(dtype)


class IntegerAttention(nnx.Module):
    """Takes the place of a `QuantizedAttention`; both its products are computed in integers.

    Attributes:
      datapath: the widths (static).
      query: quantiser of the queries; so the next three.
      key: of the keys.
      attention_weights: of the softmax's output.
      value: of the values.
    """

    def __init__(self, attention: QuantizedAttention, datapath: Datapath) -> None:
        self.datapath = datapath
        self.query = attention.query
        self.key = attention.key
        self.attention_weights = attention.attention_weights
        self.value = attention.value

    def __call__(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        *,
        bias: jax.Array | None = None,
        precision: Any = None,
        **kwargs: Any,
    ) -> jax.Array:
        """Attention over [batch…, length, heads, depth], as ``nnx.dot_product_attention``."""
        del precision
        kwargs = with_causal_mask(query, key, kwargs)
        shared_by = query.shape[-2] // key.shape[-2]  # grouped queries
        key, value = (jnp.repeat(x, shared_by, axis=-2) for x in (key, value))
        logits = self._product("...qhd,...khd->...hqk", query, self.query, key, self.key)
        logits = logits / jnp.sqrt(query.shape[-1])
        # Flax adds a bias, masks and takes the softmax: of a product of nothing.
        weights = dot_product_attention_weights(
            jnp.zeros_like(query[..., :1]),
            jnp.zeros_like(key[..., :1]),
            bias=logits.astype(query.dtype) + (0 if bias is None else bias),
            **kwargs,
        )
        return self._product(
            "...hqk,...khd->...qhd", weights, self.attention_weights, value, self.value
        ).astype(query.dtype)

    def _product(
        self,
        subscripts: str,
        x: jax.Array,
        x_quantizer: OperandQuantizer,
        w: jax.Array,
        w_quantizer: OperandQuantizer,
    ) -> jax.Array:
        lhs, rhs = _operand(x_quantizer), _operand(w_quantizer)
        return integer_ops.einsum(subscripts, x, w, lhs=lhs, rhs=rhs, datapath=self.datapath)


def pack_model(model: nnx.Module, *inputs: Any) -> nnx.Module:
    """Store the quantised kernels of a model packed.

    Thresholds of weights that are not frozen are searched for once more and then kept in the
    codes; those of activations stay as they are, frozen or dynamic.

    Args:
      model: a quantised NNX model; it is left as it is.
      *inputs: a batch for it, of any size that the shards of activations divide (see `PerShard`).

    Returns:
      A copy that computes the same, bit for bit, in evaluation mode. Its state holds codes and
      scales in as many bits as `qat_jax.model_storage` counts, and no float kernel beside them.

    Raises:
      ValueError: the model has no quantised kernel, or one in a layer that has no packed form or
        does not run in evaluation.

    Example:
      >>> import qat_jax as qj
      >>> model = nnx.Sequential(nnx.Linear(64, 64, use_bias=False, rngs=nnx.Rngs(0)))
      >>> model = qj.quantize_model(model, qj.Policy([qj.Rule.from_notation(".*", "4/4/4/6")]))
      >>> model = pack_model(model, jnp.ones((1, 64)))
      >>> sum(x.nbytes for x in jax.tree.leaves(nnx.state(model))) / 64**2 * 8  # bits a weight
      4.75
    """
    model = copy_model(model)
    quantizers = operand_quantizers(model)
    weights = {path for path in quantizers if is_weight(path)}
    if not weights:
        raise ValueError("no kernel of the model is quantised: quantise it first")
    graphdef, state = nnx.split(model)

    @compiled  # of the forward pass nothing is left but what the kernels' codes take
    def kernel_codes(state: nnx.State, *inputs: Any) -> dict[str, QTensor]:
        codes = operand_codes(graphdef, state, *inputs)
        return {path: codes[path] for path in codes.keys() & weights}

    codes = kernel_codes(state, *inputs)
    for site in layer_sites(model):
        if site.weights in weights:
            if site.weights not in codes:
                raise ValueError(
                    f"{site.path} does not run in evaluation, or inside a transformation that "
                    "drops what is sown there, such as nnx.scan with StateAxes of ...: None: "
                    f"{_leave_alone(site)}"
                )
            quantizer = quantizers[site.weights].quantizer
            install_kernel(site, PackedKernel(pack(codes[site.weights], quantizer), quantizer))
    return model


def install_kernel(site: LayerSite, kernel: PackedKernel) -> None:
    """Gives a quantised layer its kernel packed, and takes the float one from it.

    Args:
      site: where.
      kernel: its kernel, the layer's mask applied if it has one.

    Raises:
      ValueError: such a layer has no packed form.
    """
    if not isinstance(site.installed, QuantizedOp | QuantizedTable):
        raise ValueError(
            f"{type(site.layer).__name__} {site.path} has no packed form: {_leave_alone(site)}"
        )
    if len(kernel.packed.shape) > site.kernel_rank:
        raise ValueError(
            f"{site.path} is a stack of layers, as nnx.scan takes it, and has no packed form: "
            f"{_leave_alone(site)}, or make them one by one in an nnx.List"
        )
    packed: Any = PackedTable if isinstance(site.installed, QuantizedTable) else PackedOp
    site.install(packed(site.installed, kernel))
    in_float = site.kernel
    # Another variable: a layer in float may share this one.
    site.put_kernel(in_float.replace(jnp.zeros((0,), in_float.get_value().dtype)))
    if getattr(site.layer, "mask", None) is not None:
        site.layer.mask = None


def _leave_alone(site: LayerSite) -> str:
    return f"quantise nothing of it, with Rule({site.path!r}) in front"


def integer_model(model: nnx.Module, datapath: Datapath = Datapath()) -> nnx.Module:
    """Let a packed model compute in integers.

    Args:
      model: from `pack_model`; it is left as it is.
      datapath: the widths of every layer.

    Returns:
      A copy for evaluation. Its convolutions, linear layers and products of attention multiply and
      add integers; what lies between is computed in floats, and embeddings are looked up.

    Raises:
      ValueError: the model is not packed, or has a layer whose input is not quantised.
    """
    model = copy_model(model)
    sites = layer_sites(model)
    if not any(isinstance(site.installed, PackedOp | PackedTable) for site in sites):
        raise ValueError("the model has no packed kernel: pack_model comes first")
    for site in sites:
        op = site.installed
        if isinstance(op, QuantizedAttention):
            site.install(IntegerAttention(op, datapath))
        elif isinstance(op, PackedOp):
            if op.activations is None:
                raise ValueError(
                    f"the input of {site.path} is a float: integers need quantised activations too"
                )
            site.install(IntegerOp(op, op.activations, datapath))
    return model


def _operand(quantizer: OperandQuantizer) -> integer_ops.OperandFn:
    def operand(x: jax.Array, channel_axis: ChannelAxis, vector_axis: VectorAxis) -> Operand:
        q = quantizer.quantized(x, channel_axis, vector_axis)
        return Operand.of(q, quantizer.quantizer.scale.bits)

    return operand


def with_kernel(op: Callable[..., Any], args: tuple, kernel: jax.Array) -> tuple:
    """An operation's arguments, the layer's empty kernel replaced."""
    position = 2 if op is ops.einsum else 1
    return (*args[:position], kernel, *args[position + 1 :])
