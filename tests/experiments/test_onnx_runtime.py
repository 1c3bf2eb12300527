"""A quantised network in ONNX Runtime beside JAX."""

import json

import pytest

from experiments import cli
from tests.experiments import resnet8

pytest.importorskip("onnxruntime", reason="it is what runs here: pip install 'qat_jax[export]'")

from experiments import onnx_runtime


def main(workdir, weights, notation):
    arguments = [
        "onnx_runtime",
        f"--config=configs/cifar10_resnet20_ptq.py:{notation}",
        f"--workdir={workdir}",
        f"--config.model.pretrained={weights}",
        *resnet8.FLAGS,
    ]
    return cli.main(onnx_runtime.run, onnx_runtime.__doc__, arguments)


def test_the_runtime_answers_as_jax_does(tmp_path, weights):
    assert main(tmp_path / "run", weights, "4/4U/4/6") == 0
    metrics = json.loads((tmp_path / "run" / "result.json").read_text())["metrics"]
    assert metrics["count"] == 360
    assert metrics["quantised_bytes"] == (tmp_path / "run" / "quantised.onnx").stat().st_size
    for name in ("float", "exact"):
        assert metrics[name]["other_answers"] == 0
        # A sum beside the middle of two codes may be rounded to the other one.
        assert metrics[name]["largest_difference"] < 0.1 * metrics[name]["largest_output"]
        assert metrics[name]["seconds_a_batch"] > 0
    assert metrics["float"]["time_over_float"] == 1


def test_a_float_network_is_refused(tmp_path, weights, capsys):
    assert main(tmp_path / "run", weights, "float") == cli.WRONG_USAGE
    assert "such as 8/8U" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
