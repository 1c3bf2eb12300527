"""Models that use Flax's transformations, exported."""

import jax
import jax.export
import numpy as np
import pytest
from flax import nnx

import qat_jax as qj
from qat_jax.export import to_stablehlo
from qat_jax.export.tracing import shape_of
from qat_jax.integer import pack_model
from qat_jax.models import BertForQuestionAnswering
from tests.integer.test_model import FEATURES, SMALL_BERT, TOKENS, Stack

pytest.importorskip("flatbuffers", reason="exporting needs it: pip install qat_jax[export]")


@nnx.jit
def run(model, inputs):
    return model(inputs)


def rematerialised():
    model = BertForQuestionAnswering(SMALL_BERT, remat=True, rngs=nnx.Rngs(0))
    model = pack_model(qj.quantize_model(model, "vsquant-4/4U/4/6"), TOKENS)
    model.eval()
    return model


def test_programs_of_transformed_layers():
    for model, inputs in ((Stack(nnx.Rngs(0)), FEATURES), (rematerialised(), TOKENS)):
        found = to_stablehlo(model, inputs).call(inputs)
        np.testing.assert_allclose(found, run(model, inputs), atol=1e-5)


def test_graphs_of_transformed_layers():
    pytest.importorskip("onnxruntime", reason="it needs onnxruntime")
    from qat_jax.export.onnx import to_onnx
    from tests.export.test_onnx import in_runtime

    model = rematerialised()
    found = in_runtime(to_onnx(model, TOKENS), TOKENS)
    np.testing.assert_allclose(found, run(model, TOKENS), atol=1e-5)
    with pytest.raises(ValueError, match="ONNX export has no scan"):
        to_onnx(Stack(nnx.Rngs(0)), FEATURES)


def test_inputs_have_the_dtypes_that_jax_gives_them():
    assert shape_of(np.ones((3, 2)), 5) == jax.ShapeDtypeStruct((5, 2), np.float32)
    assert shape_of(np.ones((3, 2), int), 5).dtype == np.int32
