import csv
import json

import pytest
from ml_collections import ConfigDict

from experiments import accuracies, cli, hardware, hardware_results
from qat_jax.hardware import published
from tests.experiments import resnet8


def command(workdir, *changes):
    return [
        "hardware",
        "--config=configs/hardware_resnet20.py",
        f"--workdir={workdir}",
        "--config.designs.weights=(4,8)",
        "--config.designs.activations=(4,8)",
        "--config.designs.scales=('-','4')",
        *changes,
    ]


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_main_leaves_what_it_promises(tmp_path, capsys):
    workdir = tmp_path / "runs" / "hardware"
    assert cli.main(hardware.run, hardware.__doc__, command(workdir)) == 0
    assert "4/4/4/6 saves 37.0 % area (published 37.1)" in capsys.readouterr().out
    designs = {row["design"]: row for row in rows(workdir / "designs.csv")}
    assert len(designs) == 2 * 2 * 2 * 2 + 3
    assert float(designs["8/8/-/-"]["area"]) == 1
    assert designs["4/4/4/4"]["resnet20_percent"] == "89.5"  # results/ptq_resnet20_scales.csv
    assert designs["4/8/-/-"]["mobilenet_v1_percent"] == "73.7"  # the better of two
    assert designs["4/4/-/-"]["resnet20_percent"] == "89.3"
    assert designs["4/4/-/-"]["resnet20_gptq_percent"] == "90.9"  # ptq_resnet20_gptq_rounding.csv
    assert designs["4/8/-/-"]["resnet20_percent"] == ""
    assert designs["4/8/-/-"]["resnet20_gptq_percent"] == "91.6"
    assert designs["8/8/-/-"]["resnet20_gptq_percent"] == "91.9"  # rounded to the nearest alone
    assert designs["8/8/-/-"]["resnet20_area_front"] == "1"
    assert "minilm_gptq_percent" not in designs["8/8/-/-"]
    assert designs["nvfp4"]["resnet20_percent"] == ""
    assert len(rows(workdir / "published.csv")) == 17 + 21
    assert len(rows(workdir / "rounding.csv")) == 12
    metrics = json.loads((workdir / "result.json").read_text())["metrics"]
    assert metrics["fit"]["area"]["left_out_mean_percent"] < 1
    assert metrics["fit"]["energy"]["left_out_mean_percent"] < 8
    for name in ("fit", "rounding", "design_space"):
        assert (workdir / f"{name}.png").stat().st_size > 5000

    assert cli.main(hardware.run, hardware.__doc__, command(workdir)) == 0
    assert "nothing to do" in capsys.readouterr().err

    (tmp_path / "results").mkdir()
    written = hardware_results.write(workdir.parent, tmp_path / "results" / "hw")
    assert len(written.splitlines()) == 1 + 3 + 3
    kept = json.loads((tmp_path / "results" / "hw.json").read_text())
    assert "config" not in kept
    assert str(tmp_path) not in kept["command"]


def test_what_results_lack_is_measured(tmp_path, weights, monkeypatch):
    one = {"4/4/4/4": published.ROUNDED_ENERGY["4/4/4/4"]}  # each takes seconds to compile
    monkeypatch.setattr(published, "ROUNDED_ENERGY", one)
    changes = [
        f"--config.bench.model.pretrained={weights}",
        *(flag.replace("config.", "config.bench.") for flag in resnet8.FLAGS),
        "--config.formats=('nvfp4',)",
        "--config.gating_images=4",
    ]
    assert cli.main(hardware.run, hardware.__doc__, command(tmp_path / "x", *changes)) == 0
    nvfp4 = rows(tmp_path / "x" / "designs.csv")[-1]
    assert 0 <= float(nvfp4["resnet20_percent"]) <= 100
    for row in rows(tmp_path / "x" / "rounding.csv"):
        assert 0 <= float(row["measured_share"]) < 1
        assert float(row["gated"]) <= float(row["width_alone"])


def test_the_better_of_two_roundings_counts():
    measured = accuracies.Accuracies("net", 90.0, {"a": 80.0, "b": 85.0}, {"b": 84.0, "c": 70.0})
    assert measured.best() == {"a": 80.0, "b": 85.0, "c": 70.0}


def test_a_number_that_cannot_be_read_is_located(tmp_path):
    table = tmp_path / "table.csv"
    table.write_text("row,column,accuracy_percent,float_percent\n4/4U,4/6,9O.6,91.5\n")
    network = ConfigDict(
        {
            "label": "net",
            "vectors": str(table),
            "per_channel": str(table),
            "per_channel_column": "octav",
            "gptq": None,
        }
    )
    with pytest.raises(ValueError, match="accuracy_percent of row 4/4U, column 4/6 is no number"):
        accuracies.read(network)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--config.formats=('nvfp5',)", "no preset 'nvfp5'"),
        ("--config.designs.scales=('fp32',)", "give integer bits"),
        ("--config.networks.resnet20.vectors=results/none.csv", "no table results/none.csv"),
        ("--config.networks.resnet20.vectors=README.md", "README.md is no table"),
        ("--config.networks.minilm.gptq=results/none.csv", "no table results/none.csv"),
        ("--config.bench_network=lenet", "not among the networks"),
        ("--config.bench.model.pretrained=none.safetensors", "is not prepared"),
    ],
)
def test_wrong_settings_end_before_anything_is_written(tmp_path, capsys, change, message):
    status = cli.main(hardware.run, hardware.__doc__, command(tmp_path / "x", change))
    assert status == cli.WRONG_USAGE
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
