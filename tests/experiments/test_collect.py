"""Results of many runs in one table."""

import json
import sys

import pytest

from experiments import cli, collect


def finished(runs, name, before, **metrics):
    """A run folder as the mains leave it."""
    folder = runs / name
    folder.mkdir(parents=True)
    quant = {"notation": "", "weight_bits": 4, "activation_bits": 4, "clipping": "octav"}
    result = {
        "experiment": name,
        "config": {"quant": quant, "seed": 3},
        "command": f"python -m experiments.train --workdir=/home/me/{name}",
        "seed": 3,
        "wall_seconds": 90.0,
        "metrics": {"steps": 7, "diagnostics": {}, **metrics},
    }
    (folder / "result.json").write_text(json.dumps(result))
    lines = [{"step": 0, "split": "validation", **before}, {"step": 7, "split": "test"}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_images_and_questions_have_a_table_each(tmp_path):
    runs, out = tmp_path / "runs", tmp_path / "all"
    finished(runs, "a", {"accuracy": 0.1}, test_accuracy=0.9, test_count=10)
    finished(
        runs,
        "b",
        {"f1": 0.07, "exact_match": 0.01},
        test_f1=0.68,
        test_exact_match=0.57,
        test_count=20,
        validation_f1=0.7,
    )
    printed = collect.write(runs, out)
    assert out.with_suffix(".md").read_text() == printed + "\n"
    images, questions = (part.splitlines() for part in printed.split("\n\n"))
    assert "test accuracy | test images" in images[0]
    assert images[2] == "| a | - | 4 | 4 | octav | - | - | 3 | 10.0 | - | 90.0 | 10 | 7 | 1.5 |"
    assert "test F1 | test questions" in questions[0]
    assert (
        questions[2] == "| b | - | 4 | 4 | octav | - | - | 3 | 7.0 | 70.0 | 68.0 | 20 | 7 | 1.5 |"
    )
    first, second = json.loads(out.with_suffix(".json").read_text())
    assert first["metrics"]["accuracy_before"] == 0.1
    assert second["metrics"]["f1_before"] == 0.07
    assert first["command"].endswith("--workdir=PATH/a")
    assert "diagnostics" not in first["metrics"]


def test_what_is_switched_off_is_not_what_is_not_known(tmp_path):
    finished(tmp_path / "runs", "a", {"accuracy": 0.1}, test_accuracy=0.9, test_count=10)
    path = tmp_path / "runs" / "a" / "result.json"
    result = json.loads(path.read_text())
    result["config"]["quant"]["narrow"] = False
    path.write_text(json.dumps(result))
    printed = collect.write(tmp_path / "runs", tmp_path / "all")
    assert "| a | - | 4 | 4 | octav | - | False | 3 |" in printed


def test_what_tested_nothing_is_in_the_json_alone(tmp_path):
    finished(tmp_path / "runs", "a", {}, fit=0.5)
    assert collect.write(tmp_path / "runs", tmp_path / "all").endswith("all.json: 1 runs")
    assert not (tmp_path / "all.md").exists()


def test_collecting_nothing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no finished run"):
        collect.gather(tmp_path)


def test_a_folder_that_is_missing_is_said_to_be(tmp_path, monkeypatch, capsys):
    finished(tmp_path / "runs", "a", {"accuracy": 0.1}, test_accuracy=0.9, test_count=10)
    out = tmp_path / "missing" / "all"
    monkeypatch.setattr(sys, "argv", ["collect", f"--runs={tmp_path / 'runs'}", f"--out={out}"])
    with pytest.raises(SystemExit, match="2"):
        cli.gathering_main("", collect.write)
    assert "make it first" in capsys.readouterr().err
    out.parent.mkdir()
    assert cli.gathering_main("", collect.write) == 0
    assert out.with_suffix(".json").exists()


def test_names_may_have_dots(tmp_path):
    for rate in ("0.1", "0.2"):
        finished(tmp_path / rate, rate, {"accuracy": 0.1}, test_accuracy=0.9, test_count=10)
        collect.write(tmp_path / rate, tmp_path / f"lr{rate}")
    found = sorted(path.name for path in tmp_path.glob("lr*"))
    assert found == ["lr0.1.json", "lr0.1.md", "lr0.2.json", "lr0.2.md"]
