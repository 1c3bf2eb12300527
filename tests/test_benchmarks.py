import json
import sys

from benchmarks import train_step


def test_the_benchmark_runs_and_reports_ratios(tmp_path, monkeypatch, capsys):
    """Not a timing: only that the command works and its figures hang together."""
    out = tmp_path / "step"
    arguments = ["--depth=8", "--batch=8", "--rounds=2", f"--out={out}"]
    monkeypatch.setattr(sys, "argv", ["train_step", *arguments])
    assert train_step.main() == 0
    result = json.loads(out.with_suffix(".json").read_text())
    rows = result["rows"]
    assert rows["float32"]["step_ratio"] == rows["float32"]["memory_ratio"] == 1
    for row in rows.values():
        assert row["step_ratio_min"] <= row["step_ratio"] <= row["step_ratio_max"]
        assert row["step_seconds"] > 0
    assert "octav" in capsys.readouterr().out
