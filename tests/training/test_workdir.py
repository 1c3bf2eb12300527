import errno
import fcntl
import json
import math
import os
import signal
import subprocess
import sys

import jax.numpy as jnp
import pytest

from qat_jax.training import workdir
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


def test_a_result_names_the_code_that_the_run_began_with(tmp_path, monkeypatch):
    folder = Workdir(tmp_path)
    monkeypatch.setattr(workdir, "git_commit", lambda: "before")
    folder.begin(CONFIG)
    monkeypatch.setattr(workdir, "git_commit", lambda: "after")
    monkeypatch.setattr(workdir, "versions", lambda: {})
    result = folder.finish(CONFIG, {}, wall_seconds=0)
    assert result["git_commit"] == "before"
    assert result["versions"]["jax"]


def test_a_folder_is_one_process_s_at_a_time(tmp_path):
    path = tmp_path / "run"
    with Workdir(path).locked():
        with (
            pytest.raises(WorkdirError, match=rf"run is in use by process {os.getpid()} on \w+"),
            Workdir(path).locked(),
        ):
            raise AssertionError("two at once")
        with Workdir(path, writes=False).locked():  # the other processes of one run
            pass
        with pytest.raises(WorkdirError, match="in use"), Workdir(path).locked():
            raise AssertionError("a lock that ends with somebody else's")
        Workdir(path).begin(CONFIG)
    assert [file.name for file in path.iterdir()] == ["config.json"]
    with Workdir(path).locked():
        pass


def test_a_lock_leaves_no_folder_behind(tmp_path):
    with Workdir(tmp_path / "new").locked():
        assert Workdir(tmp_path / "new").status(CONFIG) is Status.NEW
    assert not list(tmp_path.iterdir())
    with Workdir(tmp_path).locked():
        pass
    assert tmp_path.exists()


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path):
    program = f"""
import os, signal
from qat_jax.training.workdir import Workdir
with Workdir({str(tmp_path)!r}).locked():
    os.kill(os.getpid(), signal.SIGKILL)
"""
    ended = subprocess.run([sys.executable, "-c", program])
    assert ended.returncode == -signal.SIGKILL
    folder = Workdir(tmp_path)
    assert "process" in folder.lock_path.read_text()
    assert folder.status(CONFIG) is Status.NEW
    with folder.locked():
        assert folder.lock_path.read_text().startswith(f"process {os.getpid()} on ")


def test_file_systems_without_locks_do_without(tmp_path, monkeypatch):
    def no_locks(*arguments):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with Workdir(tmp_path).locked(), Workdir(tmp_path).locked():
        Workdir(tmp_path).begin(CONFIG)
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


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


def test_without_locks_of_the_system_nothing_is_held(tmp_path):
    """As on Windows, where there is no module fcntl."""
    program = (
        "import sys; sys.modules['fcntl'] = None\n"
        "from pathlib import Path\n"
        "from qat_jax.training.workdir import Workdir\n"
        "with Workdir(Path(sys.argv[1])).locked(), Workdir(Path(sys.argv[1])).locked(): pass\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_or_written_to_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    below = Workdir(tmp_path / "file" / "run")
    for attempt in (below.locked().__enter__, lambda: below.begin({})):
        with pytest.raises(WorkdirError, match=r"run cannot be made .*: choose another --workdir"):
            attempt()
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    with pytest.raises(WorkdirError, match="may not be written to"), Workdir(tmp_path).locked():
        pass


@pytest.mark.parametrize("content", [b"", b"[1]", b"\xff"])
def test_files_that_are_damaged_are_named(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    for look in (Workdir(tmp_path).settings, lambda: Workdir(tmp_path).status({})):
        with pytest.raises(WorkdirError, match=r"config\.json cannot be read \(.*\): remove"):
            look()
