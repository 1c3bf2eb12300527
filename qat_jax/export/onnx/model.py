"""A model as an ONNX graph."""

from pathlib import Path
from typing import Any

import jax
import jax.export
import onnx
from flax import nnx
from onnx.checker import MAXIMUM_PROTOBUF, ValidationError
from onnx.shape_inference import InferenceError

from qat_jax.array_file import draft_of
from qat_jax.export.onnx.graph import Graph
from qat_jax.export.onnx.primitives import translate
from qat_jax.export.onnx.quantizers import traced_model
from qat_jax.export.tracing import as_function, shape_of, without_the_size
from qat_jax.integer import pack_model
from qat_jax.nnx import copy_model, is_weight, operand_quantizers

# Options of ONNX Runtime's sessions: no products that saturate, no further rounding.
EXACT_SESSION = {
    "session.x64quantprecision": "1",
    "session.qdq_matmulnbits_accuracy_level": "1",
}


def to_onnx(model: nnx.Module, *inputs: Any, batch_size: int | None = None) -> onnx.ModelProto:
    """A model as an ONNX graph, its weights inside.

    Quantised kernels are stored as integers of 4, 8 or 16 bits, the narrowest that hold them, with
    a DequantizeLinear; integer scales of vectors likewise, with one of their own. An activation
    passes a QuantizeLinear and a DequantizeLinear. Thresholds are those of the model, frozen or
    found in each batch: maxima are, other searches have no place in a graph.

    Where a format takes its sign from the data, the sign is that of these inputs, in all runs of a
    layer: one that runs both with and without negative numbers is computed with signs.

    ONNX Runtime is not exact unless told: on x86 processors without VNNI its products of 8-bit
    codes saturate, and activations that meet kernels of 4 or 8 bits are rounded to 8 bits again.
    Set the session's options of `EXACT_SESSION` with ``add_session_config_entry``.

    Quantisers compute in float32 in a model of half precision too. ONNX's opset 21 has no
    convolutions and pooling in bfloat16, and ONNX Runtime hardly anything for processors: for it
    build the model in float32 or float16.

    Args:
      model: an NNX model, quantised or not, packed or not; it is exported in evaluation mode.
      *inputs: a batch for it.
      batch_size: the length of the leading axis of every input; None for any.

    Returns:
      The model in opset 21. Inputs are called ``input``, or ``input_0`` and so on; outputs
      likewise.

    Raises:
      ValueError: the model holds something that has no counterpart, or not in its dtype.

    Example:
      >>> import jax.numpy as jnp
      >>> import qat_jax as qj
      >>> layer = nnx.Sequential(nnx.Linear(8, 4, rngs=nnx.Rngs(0)))
      >>> found = to_onnx(qj.quantize_model(layer, "max-w8a8"), jnp.ones((2, 8)))
      >>> [node.op_type for node in found.graph.node if node.op_type.endswith("Linear")]
      ['QuantizeLinear', 'DequantizeLinear', 'DequantizeLinear']
    """
    if any(is_weight(path) for path in operand_quantizers(model)):
        model = pack_model(model, *inputs)
    model = copy_model(model)
    model.eval()
    model = traced_model(model, *inputs)
    batch: Any = batch_size
    if batch_size is None:
        (batch,) = jax.export.symbolic_shape("batch")
    shapes = [shape_of(x, batch) for x in inputs]
    trace = jax.make_jaxpr(as_function(model), return_shape=True)
    with without_the_size(
        "thresholds of activations that are searched for in each batch have no place in ONNX: "
        "freeze them with calibrate"
    ):
        program, result = trace(*shapes)

    graph = Graph()
    names = ["input"] if len(shapes) == 1 else [f"input_{n}" for n in range(len(shapes))]
    values = [graph.input(n, s.shape, s.dtype) for n, s in zip(names, shapes, strict=True)]
    outputs = translate(graph, program, values)
    outputs_shapes = [x.shape for x in jax.tree.leaves(result)]
    return _checked(graph.finish(outputs, outputs_shapes, type(model).__name__))


def save_onnx(
    model: nnx.Module, path: str | Path, *inputs: Any, batch_size: int | None = None
) -> None:
    """Write `to_onnx` of a model to a file.

    See there for the options without which ONNX Runtime is not exact.

    Args:
      model: as for `to_onnx`.
      path: the file; an existing one is replaced once the new one is whole.
      *inputs: as for `to_onnx`.
      batch_size: likewise.

    Raises:
      FileNotFoundError: the folder of ``path`` does not exist.
      ValueError: as of `to_onnx`, or ``path`` is a folder.
    """
    with draft_of(path) as draft:
        draft.write_bytes(to_onnx(model, *inputs, batch_size=batch_size).SerializeToString())


def _checked(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model, which ONNX's checker accepts."""
    if sum(len(array.raw_data) for array in model.graph.initializer) > MAXIMUM_PROTOBUF:
        return model  # too large for the checker
    try:
        onnx.checker.check_model(model, full_check=True)
    except (ValidationError, InferenceError) as error:
        mend = "build the model with dtype=jnp.float32, and give it inputs of float32 or int32"
        raise ValueError(f"ONNX's checker refuses the graph, {error}: {mend}") from error
    return model
