"""From finished runs to files for elsewhere."""

import os
import shutil

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qat_jax as qj
from experiments import build, cli, export, ptq, runs, train
from qat_jax.export import load_packed
from qat_jax.models import load_weights
from qat_jax.nnx import Candidate, layer_sites
from tests.experiments import resnet8


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory, weights):
    folder = tmp_path_factory.mktemp("ptq")
    copied = shutil.copy(weights, folder)
    arguments = [
        "ptq",
        "--config=configs/cifar10_resnet20_ptq.py:4/4U",
        f"--workdir={folder / 'run'}",
        f"--config.model.pretrained={copied}",
        "--config.calibration.batches=1",
        *resnet8.FLAGS,
    ]
    assert cli.main(ptq.run, ptq.__doc__, arguments) == 0
    os.unlink(copied)  # what is exported is in the run
    return folder / "run"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train") / "run"
    arguments = ["train", "--config=configs/digits.py:bits=4", f"--workdir={folder}"]
    arguments += ["--config.model.width=4", "--config.total_epochs=0.1", "--config.batch_size=64"]
    assert cli.main(train.run, train.__doc__, arguments) == 0
    return folder


def main(run, form, out, *flags):
    arguments = [f"--checkpoint={run}", f"--format={form}", f"--out={out}", *flags]
    return export.main(arguments)


def images(count):
    return jax.random.normal(jax.random.key(0), (count, 8, 8, 1))


@pytest.mark.parametrize("integers", [[], ["--integers"]])
def test_a_calibrated_network_becomes_a_program_for_any_batch(calibrated, tmp_path, integers):
    pytest.importorskip("flatbuffers")
    assert main(calibrated, "stablehlo", tmp_path / "m", *integers) == 0
    program = jax.export.deserialize((tmp_path / "m").read_bytes())
    model, _ = export.packed_model(calibrated)
    assert "conv1" in str(qj.report(model))
    for count in (1, 3):
        found = program.call(images(count))
        np.testing.assert_allclose(found, jax.jit(model)(images(count)), atol=1e-4)


def test_a_calibrated_network_becomes_a_graph(calibrated, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    assert main(calibrated, "onnx", tmp_path / "m.onnx") == 0
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    model, _ = export.packed_model(calibrated)
    (found,) = session.run(None, {"input": np.asarray(images(3))})
    np.testing.assert_allclose(found, jax.jit(model)(images(3)), atol=1e-4)


def test_a_trained_network_becomes_a_packed_file(trained, tmp_path, capsys):
    out = tmp_path / "m.safetensors"
    assert main(trained, "safetensors", out) == 0
    assert f"{out.stat().st_size:,} bytes" in capsys.readouterr().out
    config = cli.parse(["x", "--config=configs/digits.py:bits=4", "--workdir=x"]).config
    config.model.width = 4
    loaded = load_packed(build.float_model(config), out)
    loaded.eval()
    model, _ = export.packed_model(trained)
    found = jax.jit(loaded)(images(2))
    np.testing.assert_array_equal(found, jax.jit(model)(images(2)))
    assert jnp.isfinite(found).all()


def test_thresholds_that_training_found_in_every_step_are_frozen(trained, tmp_path, capsys):
    onnxruntime = pytest.importorskip("onnxruntime")
    assert main(trained, "onnx", tmp_path / "m.onnx", "--calibrate=2") == 0
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    model, _ = export.packed_model(trained, calibrate=2)
    (found,) = session.run(None, {"input": np.asarray(images(3))})
    np.testing.assert_allclose(found, jax.jit(model)(images(3)), atol=1e-4)
    operands = qj.operand_quantizers(model)
    assert all(operand.threshold is not None for operand in operands.values())


def test_frozen_thresholds_are_not_frozen_again(calibrated, tmp_path, capsys):
    assert main(calibrated, "onnx", tmp_path / "m", "--calibrate=2") == cli.WRONG_USAGE
    assert "repeat experiments.ptq with --config.calibration.batches=2" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(calibrated, "onnx", tmp_path / "m", "--calibrate=-1")


def test_a_network_trained_by_a_policy_file_needs_it_no_more(tmp_path):
    path = tmp_path / "policy.yaml"
    qj.save_policy(qj.preset("vsquant-4/4/4/6"), path)
    arguments = ["train", "--config=configs/digits.py", f"--workdir={tmp_path / 'run'}"]
    arguments += ["--config.model.width=4", "--config.total_epochs=0.1", "--config.batch_size=64"]
    arguments += [f"--config.quant.policy={path}"]
    assert cli.main(train.run, train.__doc__, arguments) == 0
    path.unlink()
    model, _ = export.packed_model(tmp_path / "run")
    quantizer = qj.operand_quantizers(model)["layer1/0/conv1/activations"].quantizer
    assert quantizer == qj.preset("vsquant-4/4/4/6").rules[0].activations


def test_a_network_trained_smoothed_and_rotated_leaves_kernels_for_floats(tmp_path):
    arguments = ["train", "--config=configs/digits.py:bits=4", f"--workdir={tmp_path / 'run'}"]
    arguments += ["--config.model.width=8", "--config.total_epochs=0.1", "--config.batch_size=64"]
    arguments += ["--config.quant.smoothing_batches=1", "--config.quant.rotate"]
    assert cli.main(train.run, train.__doc__, arguments) == 0
    model, example = export.packed_model(tmp_path / "run")
    installed = {site.path: site.installed for site in layer_sites(model)}
    assert any((found.factors[...] != 1).any() for found in installed.values())
    assert installed["conv1"].rotation is None  # of one feature
    assert installed["linear"].rotation == 32

    parsed = cli.parse(arguments).config
    trained = runs.trained_model(parsed, tmp_path / "run", *example)
    in_float = build.float_model(parsed)
    load_weights(in_float, tmp_path / "run" / "weights.safetensors")
    in_float.eval()
    answer, expected = in_float(*example), nnx.capture(trained, Candidate)(*example)[0]
    np.testing.assert_allclose(answer, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("static", [0, 1])
def test_a_network_trained_in_shards_is_packed_from_as_many_examples(tmp_path, static):
    arguments = ["train", "--config=configs/digits.py:bits=4", f"--workdir={tmp_path / 'run'}"]
    arguments += ["--config.model.width=4", "--config.total_epochs=0.1", "--config.batch_size=64"]
    arguments += ["--config.quant.shards=4", f"--config.quant.static_batches={static}"]
    assert cli.main(train.run, train.__doc__, arguments) == 0
    assert main(tmp_path / "run", "safetensors", tmp_path / "m") == 0
    model, example = export.packed_model(tmp_path / "run")
    assert len(example[0]) == 4
    assert jnp.isfinite(jax.jit(model)(*example)).all()


def test_what_cannot_be_exported_is_said_and_nothing_written(trained, tmp_path, capsys):
    assert main(tmp_path, "safetensors", tmp_path / "m") == cli.WRONG_USAGE
    assert "holds no run" in capsys.readouterr().err
    assert main(trained, "stablehlo", tmp_path / "m") == cli.WRONG_USAGE
    assert "give batch_size" in capsys.readouterr().err
    assert main(trained, "safetensors", tmp_path / "none" / "m") == cli.WRONG_USAGE
    assert "make it first" in capsys.readouterr().err
    assert main(trained, "onnx", tmp_path / "m") == cli.WRONG_USAGE
    assert "freeze them with calibrate" in capsys.readouterr().err
    for format, flag in [
        ("safetensors", "--integers"),
        ("safetensors", "--batch-size=2"),
        ("stablehlo", "--batch-size=0"),
        ("onnx", "--batch-size=-3"),
    ]:
        with pytest.raises(SystemExit):
            main(trained, format, tmp_path / "m", flag)
    assert not list(tmp_path.iterdir())
