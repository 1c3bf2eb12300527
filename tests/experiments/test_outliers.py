"""Outliers of activations: their table and their figure."""

import csv
import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qat_jax as qj
from experiments import cli, outliers
from qat_jax.models import CifarResNet, load_weights, save_weights
from tests.experiments import resnet8


@pytest.fixture(scope="module")
def with_outliers(tmp_path_factory, weights):
    """A network of which one activation has few large elements."""
    model = nnx.eval_shape(lambda: CifarResNet(8, in_channels=1, width=4, rngs=nnx.Rngs(0)))
    load_weights(model, weights)
    norm = model.layer1[0].bn1
    norm.scale[...] = norm.scale[...].at[0].set(60.0)
    norm.bias[...] = norm.bias[...].at[0].set(-100.0)  # what is left above 0 is rare
    path = tmp_path_factory.mktemp("weights") / "resnet8.safetensors"
    save_weights(model, path)
    return path


def main(workdir, weights, notation):
    arguments = [
        "outliers",
        f"--config=configs/cifar10_resnet20_ptq.py:{notation}",
        f"--workdir={workdir}",
        f"--config.model.pretrained={weights}",
        *resnet8.FLAGS,
        "--config.batch_size=40",
    ]
    return cli.main(outliers.run, outliers.__doc__, arguments)


def test_the_activation_with_outliers_is_found_measured_and_drawn(tmp_path, with_outliers):
    assert main(tmp_path / "run", with_outliers, "4/4") == 0
    metrics = json.loads((tmp_path / "run" / "result.json").read_text())["metrics"]
    heaviest = metrics["heaviest"]
    assert heaviest["operand"] == "layer1/0/conv2/activations"
    assert heaviest["exact_error"] <= heaviest["octav_error"] * (1 + 1e-6)
    assert [curve["bits"] for curve in metrics["curves"]] == [4, 6, 8]
    (four, *_) = metrics["curves"]
    assert four["octav"]["error"] == pytest.approx(heaviest["octav_error"], rel=1e-4)
    assert four["least"]["error"] == pytest.approx(heaviest["exact_error"], rel=0.02)
    rows = list(csv.DictReader((tmp_path / "run" / outliers.CSV).open()))
    assert len(rows) == 8  # seven convolutions and the classifier
    beyond = [float(row["maximum"]) / float(row["octav"]) for row in rows]
    assert beyond == sorted(beyond, reverse=True)
    assert rows[0]["operand"] == heaviest["operand"]
    assert (tmp_path / "run" / outliers.FIGURE).stat().st_size > 10_000


def test_a_row_has_the_errors_that_rules_really_make():
    x = np.random.default_rng(0).standard_t(3, (50, 40)).astype(np.float32)
    row = outliers.measured("x", jnp.asarray(x), qj.Int(4, signed=None, narrow=True))
    x = x.astype(np.float64)
    square = np.mean(x**2)
    assert row.maximum == np.abs(x).max()
    assert row.kurtosis == pytest.approx(np.mean(x**4) / square**2, rel=1e-4)
    for threshold, error in [
        (row.maximum, row.max_error),
        (row.octav, row.octav_error),
        (row.exact, row.exact_error),
    ]:
        step = threshold / 7
        quantised = np.clip(np.round(x / step), -7, 7) * step
        assert error == pytest.approx(np.mean((quantised - x) ** 2) / square, rel=1e-3)
    assert row.exact_error < row.octav_error < row.max_error


def test_what_has_no_notation_is_refused(tmp_path, weights, capsys):
    assert main(tmp_path / "run", weights, "float") == cli.WRONG_USAGE
    assert "float" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
