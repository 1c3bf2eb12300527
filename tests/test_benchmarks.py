import argparse
import json
import os
import re
import sys

import numpy as np
import pytest
from flax import nnx

from benchmarks import bert_memory, freed_memory, inference, record, sizes, thresholds, train_step
from benchmarks.collectives import Traffic, traffic
from benchmarks.workloads import WORKLOADS, unquantised
from qat_jax import PerTensor
from qat_jax.models import BertSize


class Small(nnx.Module):
    """Three layers, the ends of which are called as a ResNet's."""

    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.conv1 = nnx.Conv(3, 16, (3, 3), strides=2, rngs=rngs)
        self.conv2 = nnx.Conv(16, 64, (3, 3), strides=2, rngs=rngs)
        self.linear = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.conv2(nnx.relu(self.conv1(x))))
        return self.linear(x.mean((1, 2)))


def test_steps_that_keep_memory_are_compared_with_those_that_do_not(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith(("MALLOC_", "GLIBC_TUNABLES"))]:
        monkeypatch.delenv(name)
    out = tmp_path / "kept"
    arguments = ["--workload=minilm-block", "--batch=1", "--rounds=2", f"--out={out}"]
    monkeypatch.setattr(sys, "argv", ["freed_memory", *arguments])
    assert freed_memory.main() == 0
    rows = json.loads(out.with_suffix(".json").read_text())["rows"]
    assert len(rows) == 4
    assert rows["octav, as JAX leaves it"]["ratio"] == 1
    assert rows["unquantised, kept"]["ratio"] > 0


@pytest.mark.parametrize(
    ("name", "compared"),
    [("resnet20", r".*"), ("minilm-block", r"unquantised|.*carried|vectors.*")],
)
def test_the_benchmark_runs_and_reports_ratios(name, compared, tmp_path, monkeypatch, capsys):
    """Not a timing: only that the command works and its figures hang together."""
    monkeypatch.setattr(train_step, "COMPILATIONS", 1 if name == "minilm-block" else 2)
    everything = train_step.contestants
    monkeypatch.setattr(
        train_step,
        "contestants",
        lambda workload: {
            name: quantise
            for name, quantise in everything(workload).items()
            if re.fullmatch(compared, name)
        },
    )
    out = tmp_path / "step"
    arguments = [f"--workload={name}", "--batch=2", "--rounds=2", f"--out={out}"]
    smaller = WORKLOADS["resnet20"]._replace(model=Small)
    monkeypatch.setitem(WORKLOADS, "resnet20", smaller)
    monkeypatch.setattr(sys, "argv", ["train_step", *arguments])
    assert train_step.main() == 0
    result = json.loads(out.with_suffix(".json").read_text())
    rows = result["rows"]
    assert rows["unquantised"]["step_ratio"] == rows["unquantised"]["memory_ratio"] == 1
    for row in rows.values():
        assert row["step_ratio_min"] <= row["step_ratio"] <= row["step_ratio_max"]
        assert row["step_seconds"] > 0
    assert "octav, carried" in capsys.readouterr().out


def test_contestants_compiled_at_once_are_not_timed(tmp_path, monkeypatch, capsys):
    def broken(model, inputs):
        del inputs
        model.linear = nnx.Linear(1, 10, rngs=nnx.Rngs(0))  # of other inputs than it gets
        return model

    contestants = {"unquantised": unquantised, "other": unquantised, "broken": broken}
    monkeypatch.setattr(train_step, "contestants", lambda workload: contestants)
    monkeypatch.setitem(WORKLOADS, "resnet20", WORKLOADS["resnet20"]._replace(model=Small))
    out = tmp_path / "step"
    arguments = ["--batch=2", "--rounds=1", "--compilations=0", f"--out={out}"]
    monkeypatch.setattr(sys, "argv", ["train_step", *arguments])
    assert train_step.main() == 0
    rows = json.loads(out.with_suffix(".json").read_text())["rows"]
    assert rows.keys() == {"unquantised", "other"}
    assert all("compile_seconds" not in row for row in rows.values())
    assert "broken does not compile" in capsys.readouterr().err

    monkeypatch.setattr(sys, "argv", ["train_step", "--compilations=-1"])
    with pytest.raises(SystemExit):
        train_step.main()
    assert "--compilations is a count" in capsys.readouterr().err


def test_forward_passes_are_compared(tmp_path, monkeypatch):
    out = tmp_path / "inference"
    smaller = WORKLOADS["resnet20"]._replace(model=Small)
    monkeypatch.setitem(WORKLOADS, "resnet20", smaller)
    monkeypatch.setattr(sys, "argv", ["inference", "--batch=2", "--rounds=2", f"--out={out}"])
    assert inference.main() == 0
    rows = json.loads(out.with_suffix(".json").read_text())["rows"]
    assert rows["float"]["ratio"] == 1
    for kind in ("OCTAV, calibrated", "vectors, 4/4U/4/6"):
        simulated, packed, integers = (
            rows[f"{how}, {kind}"] for how in ("simulated", "packed", "integers")
        )
        # 4 of 32 bits, and scales, biases and batch norms.
        assert simulated["kept_bytes"] / 8 < packed["kept_bytes"] < simulated["kept_bytes"] / 5
        assert packed["kept_bytes"] == integers["kept_bytes"]


def test_every_size_is_timed(tmp_path, monkeypatch):
    out = tmp_path / "sizes"
    monkeypatch.setattr(sys, "argv", ["sizes", "--largest=123456", "--rounds=1", f"--out={out}"])
    assert sizes.main() == 0
    rows = json.loads(out.with_suffix(".json").read_text())["rows"]
    assert [row["elements"] for row in rows] == [10_000, 100_000]
    assert all(value > 0 for row in rows for value in row.values())
    assert out.with_suffix(".png").stat().st_size > 5000


PROGRAM = """
%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}
%body (p: (s32[], f32[2])) -> (s32[], f32[2]) {
  %r = f32[2]{0} all-reduce(%x), replica_groups={}, to_apply=%add
}
%branch (p: f32[4]) -> f32[4] {
  %g = (bf16[4,8]{1,0}, s32[]) all-gather(%p), dimensions={0}
}
ENTRY %main (p: f32[2]) -> f32[2] {
  %w = (s32[], f32[2]) while(%t), body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %s = f32[3]{0} all-reduce-start(%p), to_apply=%add
  %c = f32[4] conditional(%i, %p), branch_computations={%branch, %branch}
}
"""


def test_collectives_are_counted_as_often_as_they_run():
    assert traffic(PROGRAM) == Traffic(5 + 1 + 2, 5 * 8 + 12 + 2 * (64 + 4))
    unknown = PROGRAM.replace("known_trip_count", "unknown")
    assert traffic(unknown, unknown_trips=1) == Traffic(1 + 1 + 2, 8 + 12 + 2 * (64 + 4))
    with pytest.raises(ValueError, match="nobody knows how often body runs"):
        traffic(unknown)


def test_recomputed_layers_of_bert_keep_their_inputs_alone():
    def memory(layers, remat, parts=1):
        size = BertSize(layers, hidden=32, heads=2, intermediate=128, vocabulary=50, positions=64)
        return bert_memory.step_memory(
            size, bert_memory.Variant(4, remat, parts, "float32"), batch_size=8, length=64
        )

    one, two, parts = memory(1, True), memory(2, True), memory(2, True, 4)
    assert two["residuals"] - one["residuals"] == 8 * 64 * 32 * 4
    assert 4 * parts["residuals"] == pytest.approx(two["residuals"], rel=0.01)
    assert memory(1, False)["residuals"] > 5 * one["residuals"]
    assert one["state"] == pytest.approx(3 * one["gradients"], rel=1e-3)


def test_thresholds_are_timed_and_judged(tmp_path, monkeypatch, capsys):
    """The exact optimum, here within 1 % of it, is the yardstick."""
    out = tmp_path / "thresholds"
    few = {name: thresholds.CALIBRATORS[name] for name in ("max", "octav, 10 iterations", "exact")}
    monkeypatch.setattr(thresholds, "CALIBRATORS", few)
    monkeypatch.setattr(thresholds, "GRANULARITIES", {"tensor": PerTensor()})
    monkeypatch.setattr(thresholds, "numbers", lambda n: {"kind": thresholds_of_tests(n)})
    arguments = ["--elements=4096", "--rounds=2", f"--out={out}"]
    monkeypatch.setattr(sys, "argv", ["thresholds", *arguments])
    assert thresholds.main() == 0
    rows = json.loads(out.with_suffix(".json").read_text())["rows"]["kind"]
    errors = {row["calibrator"]: row["error_over_exact"] for row in rows}
    assert errors["exact"] == 1
    assert 0.99 < errors["octav, 10 iterations"] < 1.1 < errors["max"]
    assert all(0 < row["passes_min"] <= row["passes"] <= row["passes_max"] for row in rows)
    assert "4096 numbers" in capsys.readouterr().out

    monkeypatch.setattr(sys, "argv", ["thresholds", "--elements=100"])
    with pytest.raises(SystemExit):
        thresholds.main()
    assert "give a multiple of 256" in capsys.readouterr().err


def thresholds_of_tests(elements):
    return np.random.default_rng(0).standard_t(3, (elements // 256, 256)).astype(np.float32)


@pytest.mark.parametrize(
    ("read", "wrong"), [(record.count, "0"), (record.count, "x"), (record.bits, "17")]
)
def test_wrong_counts_are_wrong_usage(read, wrong, capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--flag", type=read)
    with pytest.raises(SystemExit, match=r"^2$"):
        parser.parse_args([f"--flag={wrong}"])
    assert f"argument --flag: {wrong} is not" in capsys.readouterr().err
