"""The papers' arguments on a small network, and their numbers beside independent ones."""

import csv
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qat_jax as qj
from experiments import arguments, cli
from experiments.gradient_flow import flows, predicted_ratios
from experiments.vector_ranges import ranges
from tests.experiments import resnet8


class Line:
    """An objective whose loss is linear in the outputs: all gradients start the same."""

    def inputs(self, batch):
        return (batch["x"],)

    def losses(self, outputs, batch):
        return jnp.sum(outputs * batch["g"], axis=-1)


@pytest.fixture(scope="module")
def chain():
    """Six linear layers, all operands quantised to 2 bits by OCTAV, and what their gradients do."""
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(*(nnx.Linear(64, 64, rngs=rngs) for _ in range(6)))
    quantizer = qj.Quantizer(qj.Int(2, narrow=True))
    model = qj.quantize_model(model, qj.Policy([qj.Rule(".*", quantizer, quantizer)]))
    x, g = jax.random.normal(jax.random.key(1), (2, 512, 64))
    return model, {row.operand: row for row in flows(model, Line(), {"x": x, "g": g})}


def main(workdir, weights, notation):
    command = [
        "arguments",
        f"--config=configs/cifar10_resnet20_ptq.py:{notation}",
        f"--workdir={workdir}",
        f"--config.model.pretrained={weights}",
        *resnet8.FLAGS,
        "--config.batch_size=24",
        "--config.quant.vector_size=4",
    ]
    return cli.main(arguments.run, arguments.__doc__, command)


def test_the_main_leaves_tables_figures_and_a_summary(tmp_path, weights, monkeypatch):
    monkeypatch.setattr(arguments, "DRAWN_BITS", (3,))
    assert main(tmp_path / "run", weights, "3/3U/4/6") == 0
    metrics = json.loads((tmp_path / "run" / "result.json").read_text())["metrics"]
    for argument in ("errors", "gradients", "ranges"):
        assert (tmp_path / "run" / f"{argument}.png").stat().st_size > 10_000
    rows = list(csv.DictReader((tmp_path / "run" / "errors.csv").open()))
    assert [row["bits"] for row in rows] == ["3"] * 2
    assert all(float(row["exact_error"]) <= float(row["octav_error"]) * 1.001 for row in rows)
    assert metrics["ranges"]["weights"]["vector_over_coarse_error"] < 1
    without = metrics["gradients"]["weights_without_gradient"]
    assert without["ste"] == without["mad"] < without["pwl"]


def test_what_has_no_notation_is_refused(tmp_path, weights, capsys):
    assert main(tmp_path / "run", weights, "float") == cli.WRONG_USAGE
    assert "float" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_gradients_through_a_chain_grow_as_proposition_4_1_says(chain):
    _, rows = chain
    inputs = [rows[f"layers/{n}/activations"] for n in range(6)]
    assert all(0.01 < row.clipped < 0.4 for row in inputs)
    measured = [row.ste / row.pwl for row in inputs]
    assert measured == sorted(measured, reverse=True)
    assert measured[0] == pytest.approx(inputs[0].predicted, rel=0.1)
    assert measured[0] > 1.5
    assert all(row.pwl < row.mad < row.ste for row in inputs)


def test_clipped_weights_get_no_gradient_from_pwl_alone(chain):
    model, rows = chain
    kernel = np.abs(np.asarray(model.layers[2].kernel.get_value()))
    threshold = float(qj.octav(kernel, qj.Int(2, narrow=True)).squeeze())
    row = rows["layers/2/weights"]
    assert row.pwl_zeros == pytest.approx((kernel > threshold).mean(), abs=1e-6)
    assert row.ste_zeros == row.mad_zeros == 0
    assert row.predicted == 1


def test_predictions_are_products_from_the_loss_back():
    x = jnp.array([0.0, 1.0, 2.0, 3.0])
    half_clipped = (x > 1.5, x)  # two of four elements, two of three that are not 0
    ratios = predicted_ratios({"a": half_clipped, "b": half_clipped, "c": half_clipped})
    assert ratios == pytest.approx({"a": 2 * 3 * 3, "b": 2 * 3, "c": 2})


def test_ranges_and_errors_are_those_of_plain_numpy():
    model = nnx.Sequential(nnx.Linear(32, 5, rngs=nnx.Rngs(0)))
    stored = qj.Quantizer(
        qj.Int(3, narrow=True), qj.PerVector(8), qj.AbsMax(), scale=qj.IntScale(4, qj.PerChannel())
    )
    model = qj.quantize_model(model, qj.Policy([qj.Rule(".*", weights=stored)]))
    found = ranges(model, 8, jnp.ones((2, 32)))["layers/0/weights"]
    kernel = np.asarray(model.layers[0].kernel.get_value(), np.float64)
    vectors = kernel.reshape(4, 8, 5)
    largest = np.abs(vectors).max(1)
    channel = largest.max(0)
    np.testing.assert_allclose(found.shares.reshape(4, 5), largest / channel, rtol=1e-6)

    def error(limit):
        step = limit / 3
        return np.mean((np.clip(np.round(vectors / step), -3, 3) * step - vectors) ** 2)

    square = np.mean(kernel**2)
    row = found.row("kernel", 3)
    assert row.vectors == 20
    assert row.tensor_error == pytest.approx(error(channel.max()) / square, rel=1e-4)
    assert row.coarse_error == pytest.approx(error(channel) / square, rel=1e-4)
    assert row.vector_error == pytest.approx(error(largest[:, None]) / square, rel=1e-4)
    assert row.predicted_error == pytest.approx(
        np.mean((largest / channel) ** 2 * channel**2) / np.mean(channel**2), rel=1e-4
    )
    assert row.vector_error < row.stored_error < row.coarse_error
