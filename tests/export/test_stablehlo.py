import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qat_jax as qj
from qat_jax.export import save_stablehlo, to_stablehlo
from qat_jax.integer import integer_model, pack_model
from tests.export.test_packed_file import INPUTS, net, packed_net, run

pytest.importorskip(
    "flatbuffers", reason="serialising needs flatbuffers: pip install qat_jax[export]"
)


def test_a_program_takes_batches_of_any_size_and_computes_the_same(tmp_path):
    model = packed_net("octav-w3a3")
    save_stablehlo(model, tmp_path / "m.stablehlo", INPUTS)
    program = jax.export.deserialize((tmp_path / "m.stablehlo").read_bytes())
    assert set(program.platforms) == {"cpu", "cuda", "tpu"}
    twice = np.concatenate([INPUTS, INPUTS])
    # Machine code for another batch adds in another order.
    for found in (program.call(INPUTS), program.call(twice)[:2], program.call(twice)[2:]):
        np.testing.assert_allclose(found, run(model, INPUTS), atol=1e-6)


def test_integers_are_exported_as_integers():
    model = integer_model(packed_net("octav-w3a3"))
    program = to_stablehlo(model, INPUTS)
    assert "xi8>" in program.mlir_module()
    np.testing.assert_allclose(program.call(INPUTS), run(model, INPUTS), atol=1e-6)


def test_thresholds_of_a_batch_need_its_size():
    model = pack_model(qj.quantize_model(net(), "octav-w3a3"), INPUTS)
    model.eval()
    with pytest.raises(ValueError, match="freeze them with calibrate, or give batch_size"):
        to_stablehlo(model, INPUTS)
    program = to_stablehlo(model, INPUTS, batch_size=2)
    np.testing.assert_allclose(program.call(INPUTS), run(model, INPUTS), atol=1e-5)


def test_a_file_in_a_folder_that_is_there_is_asked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match="make it first"):
        save_stablehlo(net(), tmp_path / "none" / "m", INPUTS)
    with pytest.raises(ValueError, match="is a folder: give the path of a file"):
        save_stablehlo(net(), tmp_path, INPUTS)
    assert not list(tmp_path.parent.glob(".*.unfinished"))


def test_a_model_that_counts_its_batch_needs_a_size():
    model = nnx.Sequential(lambda x: x.reshape(len(x), -1), nnx.Linear(4, 2, rngs=nnx.Rngs(0)))
    x = jnp.ones((3, 2, 2))
    with pytest.raises(ValueError, match=r"write x\.shape\[0\], or give batch_size"):
        to_stablehlo(model, x)
    assert to_stablehlo(model, x, batch_size=3) is not None
