"""A network in integers beside the simulated one."""

import csv
import json

import pytest

from experiments import cli, integers
from tests.experiments import resnet8


def main(workdir, weights, notation, *changes):
    arguments = [
        "integers",
        f"--config=configs/cifar10_resnet20_ptq.py:{notation}",
        f"--workdir={workdir}",
        f"--config.model.pretrained={weights}",
        *resnet8.FLAGS,
        "--config.scale_product_bits=(1, 10)",
        *changes,
    ]
    return cli.main(integers.run, integers.__doc__, arguments)


def test_integers_answer_as_the_simulation_does_and_rounded_products_otherwise(tmp_path, weights):
    assert main(tmp_path / "run", weights, "4/4U/4/6") == 0
    metrics = json.loads((tmp_path / "run" / "result.json").read_text())["metrics"]
    assert metrics["count"] == metrics["answers"] == 360
    # A sum beside the middle of two codes may be rounded to the other one.
    assert 0 < metrics["largest_difference"] < 0.1 * metrics["largest_output"]
    assert metrics["other_answers"] <= 1
    assert abs(metrics["integer_accuracy"] - metrics["simulated_accuracy"]) < 1.1 / 360
    # But not among numbers of 53 bits. The outputs are float32.
    assert metrics["in_float64"]["other_answers"] == 0
    assert metrics["in_float64"]["largest_difference"] < 1e-6 * metrics["largest_output"]
    # Products of 4- and 6-bit scales have 10 bits: rounding them to as many is no rounding.
    assert list(metrics["by_scale_product_bits"]) == ["1"]
    assert metrics["by_scale_product_bits"]["1"] != metrics["integer_accuracy"]
    rows = list(csv.reader((tmp_path / "run" / integers.CSV).open()))
    assert [row[0] for row in rows] == ["scale_product_bits", "1", "full"]
    assert (tmp_path / "run" / integers.FIGURE).stat().st_size > 5000


@pytest.mark.parametrize(
    ("notation", "message"),
    [("float", "give a notation"), ("4/4/fp16/fp16", "scales that differ inside a sum")],
)
def test_what_has_no_integers_is_refused(tmp_path, weights, capsys, notation, message):
    assert main(tmp_path / "run", weights, notation) == cli.WRONG_USAGE
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
