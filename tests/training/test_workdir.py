import json
import math

import jax.numpy as jnp
import pytest

from qat_jax.training.workdir import (
    MetricWriter,
    Status,
    Workdir,
    WorkdirError,
    drop_lines_after,
    with_floats,
)

CONFIG = {"experiment": "e", "seed": 3, "optimizer": {"learning_rate": 0.1}, "mean": (0.5, 0.5)}


def steps(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_a_folder_is_new_then_unfinished_then_finished(tmp_path):
    folder = Workdir(tmp_path / "a" / "run")
    assert folder.status(CONFIG) is Status.NEW
    assert not folder.path.exists()
    folder.begin(CONFIG)
    assert folder.status(CONFIG) is Status.UNFINISHED
    result = folder.finish(CONFIG, {"test_accuracy": 0.5}, wall_seconds=1.5)
    assert folder.status(CONFIG) is Status.FINISHED
    assert folder.result() == result
    assert sorted(path.name for path in folder.path.iterdir()) == ["config.json", "result.json"]


def test_a_result_says_how_it_was_made(tmp_path):
    folder = Workdir(tmp_path)
    folder.begin(CONFIG)
    result = folder.finish(CONFIG, {"test_accuracy": 0.5}, wall_seconds=1.5)
    assert set(result) == {
        *("experiment", "config", "command", "git_commit", "versions", "device", "seed"),
        *("wall_seconds", "metrics"),
    }
    assert result["seed"] == 3
    assert result["config"]["mean"] == [0.5, 0.5]
    assert result["versions"]["jax"]
    assert result["device"]["count"] >= 1


def test_a_result_is_json_whatever_was_measured(tmp_path):
    folder = Workdir(tmp_path)
    folder.begin(CONFIG)
    measured = {"loss": float("nan"), "layers": [{"sqnr_db": float("-inf"), "shape": (2, 3)}]}
    result = folder.finish(CONFIG, measured, wall_seconds=1.5)

    def no_json(constant):
        raise AssertionError(f"{constant} is no JSON")

    written = json.loads(folder.result_path.read_text(), parse_constant=no_json)
    assert written == folder.result() == result
    read = with_floats(written["metrics"])
    assert math.isnan(read["loss"])
    assert read["layers"] == [{"sqnr_db": -math.inf, "shape": [2, 3]}]


def test_what_cannot_change_a_result_may_change(tmp_path):
    folder = Workdir(tmp_path)
    folder.begin(CONFIG | {"dataset": {"name": "digits", "num_threads": 1}})
    more = {"fsdp": 8, "dataset": {"name": "digits", "num_threads": 4, "in_memory": True}}
    assert folder.status(CONFIG | more) is Status.UNFINISHED
    with pytest.raises(WorkdirError, match=r"dataset.name is 'digits' there and 'fake' here"):
        folder.status(CONFIG | {"dataset": {"name": "fake", "num_threads": 1}})


def test_other_settings_are_refused_by_name(tmp_path):
    folder = Workdir(tmp_path)
    folder.begin(CONFIG)
    other = CONFIG | {"optimizer": {"learning_rate": 0.2}}
    with pytest.raises(WorkdirError, match=r"optimizer.learning_rate is 0.1 there and 0.2 here"):
        folder.status(other)
    folder.finish(CONFIG, {}, wall_seconds=0)
    with pytest.raises(WorkdirError, match="other settings"):
        folder.status(other)


def test_a_folder_of_something_else_is_refused(tmp_path):
    file = tmp_path / "thesis.tex"
    file.write_text("")
    with pytest.raises(WorkdirError, match="holds files but no run"):
        Workdir(tmp_path).status(CONFIG)
    with pytest.raises(WorkdirError, match="is a file"):
        Workdir(file).status(CONFIG)


def test_lines_after_a_step_and_broken_lines_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    drop_lines_after(path, 3)
    assert not path.exists()
    path.write_text('{"step": 1}\n{"step": 3}\n{"step": 3, "x": 1}\n{"step": 4}\n{"st')
    drop_lines_after(path, 3)
    assert path.read_text() == '{"step": 1}\n{"step": 3}\n{"step": 3, "x": 1}\n'


def test_a_resumed_writer_repeats_no_step(tmp_path):
    folder = Workdir(tmp_path)
    folder.begin(CONFIG)
    with MetricWriter(folder, None) as writer:
        for step in (0, 1, 2, 3):
            writer.write(
                step, "train", {"loss": jnp.float32(step), "layer": {"sqnr": float("inf")}}
            )
    with MetricWriter(folder, 1) as writer:
        writer.write(2, "train", {"loss": jnp.float32(2)})
    assert steps(folder.metrics_path) == [0, 1, 2]
    first = json.loads(folder.metrics_path.read_text().splitlines()[0])
    assert first == {"step": 0, "split": "train", "layer/sqnr": "inf", "loss": 0.0}
    with MetricWriter(folder, None):
        assert steps(folder.metrics_path) == []
    assert list(tmp_path.glob("events.*"))


def test_a_writer_knows_the_lines_there_are(tmp_path):
    folder = Workdir(tmp_path)
    folder.begin(CONFIG)
    with MetricWriter(folder, None) as writer:
        assert not writer.has(3, "test")
        writer.write(3, "train", {"loss": 1.0})
        assert not writer.has(3, "test")
        writer.write(3, "test", {"loss": 1.0})
        assert writer.has(3, "test")
    with MetricWriter(Workdir(tmp_path, writes=False), None) as reader:
        assert not reader.has(3, "test")
