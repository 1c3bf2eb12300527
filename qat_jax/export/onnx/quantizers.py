"""Quantisers in ONNX: QuantizeLinear and DequantizeLinear around activations, stored kernels.

Tracing a model meets two primitives in place of its quantisers, which `translate` the graph's
builder calls for: so what finds a dynamic scale is traced like everything else, and rounding to
codes is one pair of ONNX's operators.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from jax.extend.core import Primitive

from qat_jax.export.onnx.graph import Graph, Tensor, element_type
from qat_jax.export.onnx.kernels import StoredKernel, code_dtype
from qat_jax.formats import Int
from qat_jax.granularity import ChannelAxis, Groups, PerShard, VectorAxis
from qat_jax.integer.model import (
    IntegerAttention,
    IntegerOp,
    PackedKernel,
    PackedOp,
    PackedTable,
    with_kernel,
)
from qat_jax.integer.packed import unpack
from qat_jax.nnx import (
    OperandQuantizer,
    QuantizedAttention,
    copy_model,
    in_all_runs,
    in_basis,
    layer_sites,
    operand_codes,
    operand_quantizers,
)
from qat_jax.quantizer import Quantizer
from qat_jax.scales import E8M0

quantize_dequantize_p = Primitive("quantize_dequantize")
quantize_dequantize_p.def_abstract_eval(lambda x, code_step, step, **_: x)
stored_kernel_p = Primitive("stored_kernel")
stored_kernel_p.def_abstract_eval(
    lambda *, kernel: jax.core.ShapedArray(kernel.shape, kernel.dtype)
)


class TracedQuantizer:
    """Takes the place of an `OperandQuantizer` while a model is traced.

    Args:
      quantizer: what it does, with integers that have a sign of their own, or none.
      threshold: frozen, or None.
    """

    def __init__(self, quantizer: Quantizer, threshold: jax.Array | None) -> None:
        self.quantizer = quantizer
        self.threshold = threshold

    @classmethod
    def of(cls, operand: OperandQuantizer, path: str, *, negative: bool) -> "TracedQuantizer":
        """The counterpart of an operand's quantiser.

        Args:
          operand: what it stands for.
          path: the operand's.
          negative: whether it has negative elements, if nothing else says so.

        Raises:
          ValueError: it has none.
        """
        quantizer = operand.quantizer
        if not isinstance(quantizer.format, Int) or isinstance(quantizer.granularity, PerShard):
            raise ValueError(
                f"{path}: ONNX has pairs for integers, and none for shards of a batch: quantise "
                "with Int, granularity PerTensor or PerVector"
            )
        if isinstance(quantizer.scale, E8M0) and operand.kept is None:
            raise ValueError(
                f"{path}: ONNX computes no powers of two from an activation: freeze them with "
                "calibrate, or quantise activations with IntScale or FloatScale"
            )
        if quantizer.format.signed is None:
            format = dataclasses.replace(quantizer.format, signed=negative)
            quantizer = dataclasses.replace(quantizer, format=format)
        return cls(quantizer, operand.kept)

    def __call__(
        self, x: jax.Array, channel_axis: ChannelAxis = None, vector_axis: VectorAxis = None
    ) -> jax.Array:
        """Fake quantisation of x, as the primitive."""
        quantizer = self.quantizer
        groups = quantizer.granularity.groups(x.ndim, channel_axis, vector_axis)
        if self.threshold is None:
            threshold = quantizer.threshold(x, channel_axis, vector_axis)
        else:
            threshold = self.threshold
            threshold = jnp.expand_dims(threshold, range(x.ndim - threshold.ndim))
        steps = quantizer.format.grid(x).steps
        stored, code_step = quantizer.scale.store(threshold, steps, channel_axis)
        # Where a step is 0, so is what its codes are multiplied with.
        code_step = jnp.where(code_step > 0, code_step, 1)
        return quantize_dequantize_p.bind(
            x, code_step, stored.step(code_step.dtype), groups=groups, format=quantizer.format
        )


def quantize_dequantize(
    graph: Graph, x: Tensor, code_step: Any, step: Any, *, groups: Groups, format: Int
) -> Tensor:
    """The nodes of the primitive, in float32 as the simulation is.

    A step for the whole array, for each vector or for each token makes a pair of ONNX's operators.
    Others have none, and are computed in floating point.

    Args:
      graph: it goes here.
      x: an activation.
      code_step: what it is divided by, compact.
      step: what its codes are multiplied with, compact.
      groups: which elements share them.
      format: of the codes.
    """
    numbers, code_step, step = (graph.cast(value, np.float32) for value in (x, code_step, step))
    return graph.cast(_in_float32(graph, numbers, code_step, step, groups, format), x.dtype)


def _in_float32(
    graph: Graph, x: Tensor, code_step: Any, step: Any, groups: Groups, format: Int
) -> Tensor:
    if math.prod(step.shape) == 1:
        code_step, step = (graph.reshape(value, ()) for value in (code_step, step))
        return _with_one_step(graph, x, code_step, step, format)
    code_step, step = (graph.ordered(value, x.order) for value in (code_step, step))
    every_vector = all(
        s == c or axis in groups.axes
        for axis, (s, c) in enumerate(zip(step.shape, x.shape, strict=True))
    )
    if len(groups.axes) == 1 and every_vector:
        return _with_steps_of_vectors(graph, x, code_step, step, groups, format)
    low, high = _codes(format)
    codes = _like(graph, "Div", x, code_step)
    codes = _like(graph, "Round", codes)
    codes = _like(graph, "Clip", codes, np.float32(low), np.float32(high))
    return _like(graph, "Mul", codes, step)


def _like(graph: Graph, operator: str, x: Tensor, *operands: Any, **attributes: Any) -> Tensor:
    """A node whose output is as its first input."""
    options: dict[str, Any] = {"shape": x.shape, "dtype": x.dtype, "order": x.order} | attributes
    return graph.node(operator, x, *operands, **options)


def _with_one_step(graph: Graph, x: Tensor, code_step: Any, step: Any, format: Int) -> Tensor:
    low, high = _codes(format)
    # Unsigned and of 8 bits at least, as processors multiply them: negative codes around a zero
    # point in the middle.
    dtype = code_dtype(False, max(format.bits, 8))
    zero = (_range(dtype)[1] + 1) // 2 if low < 0 else 0
    if (low + zero, high + zero) != _range(dtype):

        def times(code: int) -> Any:
            if isinstance(code_step, np.ndarray):
                return code_step * np.float32(code)
            return graph.node("Mul", code_step, np.float32(code), shape=(), dtype=np.float32)

        # The operator saturates at its own type's codes, of which this grid lacks some.
        x = _like(graph, "Clip", x, times(low), times(high))
    zero_point = np.array(zero, dtype)
    codes = _like(graph, "QuantizeLinear", x, code_step, zero_point, dtype=dtype)
    return _like(graph, "DequantizeLinear", codes, step, zero_point, dtype=x.dtype)


def _with_steps_of_vectors(
    graph: Graph, x: Tensor, code_step: Any, step: Any, groups: Groups, format: Int
) -> Tensor:
    low, high = _codes(format)
    dtype = code_dtype(low < 0, max(format.bits, 8))  # ONNX clips no narrower codes
    (axis,) = groups.axes
    # Where the axis is not cut, it is one vector: a token.
    cut = {"axis": x.places[axis], "block_size": groups.vector_size or x.shape[axis]}
    to = {"output_dtype": element_type(dtype)}
    codes = _like(graph, "QuantizeLinear", x, code_step, dtype=dtype, **to, **cut)
    if (low, high) != _range(dtype):
        limits = (np.array(limit, dtype) for limit in (low, high))
        codes = _like(graph, "Clip", codes, *limits)
    return _like(graph, "DequantizeLinear", codes, step, dtype=x.dtype, **cut)


def _codes(format: Int) -> tuple[int, int]:
    """The lowest and the highest code."""
    grid: Any = format.grid(jnp.zeros(()))
    return int(grid.low), int(grid.high)


def _range(dtype: np.dtype) -> tuple[int, int]:
    info = ml_dtypes.iinfo(dtype)
    return int(info.min), int(info.max)


class TracedOp(nnx.Module):
    """Takes the place of a `PackedOp` while a model is traced."""

    def __init__(
        self, op: PackedOp, activations: TracedQuantizer | None, kernel: StoredKernel
    ) -> None:
        self.op = op.op
        self.lhs = nnx.static(in_basis(op, activations))
        self.kernel = kernel

    def __call__(self, *args: Any, **kwargs: Any) -> jax.Array:
        """The operation, of the primitives."""
        kernel = stored_kernel_p.bind(kernel=self.kernel)
        return self.op(*with_kernel(self.op, args, kernel), lhs=self.lhs, **kwargs)


class TracedTable(nnx.Module):
    """Takes the place of a `PackedTable` while a model is traced."""

    def __init__(self, table: PackedTable, kernel: StoredKernel) -> None:
        self.promote = table.promote
        self.kernel = kernel

    def __call__(self, arrays: tuple, **kwargs: Any) -> tuple:
        """The promotion, of the primitive in the place of the table."""
        *query, _ = arrays
        return self.promote((*query, stored_kernel_p.bind(kernel=self.kernel)), **kwargs)


class TracedAttention(QuantizedAttention):
    """Takes the place of a `QuantizedAttention` while a model is traced."""

    def __init__(self, quantizers: dict[str, TracedQuantizer | None]) -> None:
        for name, quantizer in quantizers.items():
            setattr(self, name, quantizer)


def traced_model(model: nnx.Module, *inputs: Any) -> nnx.Module:
    """A model whose quantisers are the primitives of this file.

    Args:
      model: packed, if it is quantised.
      *inputs: a batch for it; it decides on the sign of formats that leave it to the data.

    Returns:
      A copy.

    Raises:
      ValueError: a quantiser has no counterpart in ONNX.
    """
    model = copy_model(model)
    forward = jax.jit(functools.partial(operand_codes, nnx.graphdef(model)))
    codes = forward(nnx.state(model), *inputs)
    paths = {id(operand): path for path, operand in operand_quantizers(model).items()}

    def traced(operand: OperandQuantizer | None) -> TracedQuantizer | None:
        if operand is None:
            return None
        path = paths[id(operand)]
        negative = any((run.codes < 0).any() for run in in_all_runs(codes, path))
        return TracedQuantizer.of(operand, path, negative=negative)

    def stored(kernel: PackedKernel) -> StoredKernel:
        return StoredKernel.of(unpack(kernel.packed), kernel.packed.format)

    for site in layer_sites(model):
        match site.installed:
            case IntegerOp() | IntegerAttention():
                raise ValueError(
                    f"{site.path} computes in integers, which ONNX says with pairs around floats: "
                    "give the packed model, from before integer_model"
                )
            case PackedOp() as op:
                site.install(TracedOp(op, traced(op.activations), stored(op.weights)))
            case PackedTable() as table:
                site.install(TracedTable(table, stored(table.weights)))
            case QuantizedAttention() as attention:
                names = ("query", "key", "attention_weights", "value")
                operands = {name: traced(getattr(attention, name)) for name in names}
                site.install(TracedAttention(operands))
    return model
