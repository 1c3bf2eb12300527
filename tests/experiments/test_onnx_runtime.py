"""A quantised network in ONNX Runtime beside JAX."""

import json
import types

import numpy as np
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


def test_no_more_than_a_batch_of_examples_is_held():
    class Examples(list):
        read = 0

        def __getitem__(self, index):
            self.read += 1
            return super().__getitem__(index)

    test = Examples({"image": np.full((1,), i, np.float32), "label": i} for i in range(10))
    objective = types.SimpleNamespace(inputs=lambda batch: (batch["image"],))
    task = types.SimpleNamespace(fields=("image", "label"), objective=objective, num_threads=0)
    bench = types.SimpleNamespace(test=test, task=task, batch_size=4)
    seen = []

    def network(inputs):
        seen.append((len(inputs[0]), test.read))
        return 2 * inputs[0]

    outputs = onnx_runtime._outputs(bench, {"a": network, "b": network})
    for found in outputs.values():
        np.testing.assert_array_equal(found[:, 0], 2 * np.arange(10))
    assert [count for count, _ in seen] == 6 * [4]
    assert [read for _, read in seen[::2]] == [4, 8, 12]
