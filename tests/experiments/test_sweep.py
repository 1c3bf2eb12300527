"""Sweeps: normal runs in folders of their own, and a table of them."""

import csv
import json
import os
import signal
import statistics
import subprocess
import sys
import time

import pytest

from experiments import cli, sweep
from experiments.launchers import LocalProcesses

SHORT = ["--config.total_epochs=0.05", "--config.model.width=4", "--config.batch_size=32"]


def command(workdir, *changes):
    return ["sweep", "--config=configs/digits.py", f"--workdir={workdir}", *SHORT, *changes]


def rows(workdir):
    return list(csv.DictReader((workdir / sweep.CSV).open()))


def results(workdir, quant):
    paths = sorted(workdir.glob(f"quant={quant},seed=*/result.json"))
    return [json.loads(path.read_text()) for path in paths]


def test_cells_are_runs_and_a_failing_one_stops_none(tmp_path, capsys):
    workdir = tmp_path / "sweep"
    changes = ["--sweep.quant=bits=4;bits=2,gradient=mat", "--sweep.seed=0,1", "--jobs=2"]
    assert sweep.main(command(workdir, *changes)) == cli.FAILED
    said = capsys.readouterr()
    assert said.err.count("there are ste, pwl, mad") == 4  # when it failed, and at the end
    assert not (workdir / "result.json").exists()
    four, two = rows(workdir)
    assert (four["quant"], four["runs"]) == ("bits=4", "2")
    assert (two["quant"], two["runs"], two["test_loss_mean"]) == ("bits=2,gradient=mat", "0", "")
    found = results(workdir, "bits=4")
    assert [result["seed"] for result in found] == [0, 1]
    losses = [result["metrics"]["test_loss"] for result in found]
    assert float(four["test_loss_mean"]) == pytest.approx(statistics.fmean(losses))
    assert float(four["test_loss_std"]) == pytest.approx(statistics.stdev(losses))
    assert losses[0] != losses[1]
    assert all(result["config"]["quant"]["weight_bits"] == 4 for result in found)

    # Without the cell that failed, and with a seed more: only that one is run.
    before = {path: path.stat().st_mtime_ns for path in workdir.glob("quant=bits=4,*/result.json")}
    assert sweep.main(command(workdir, "--sweep.quant=bits=4", "--sweep.seed=0,1,2")) == 0
    after = {path: path.stat().st_mtime_ns for path in workdir.glob("quant=bits=4,*/result.json")}
    assert before.items() < after.items()
    assert len(after) == 3
    assert "2 of 3 runs are finished already" in capsys.readouterr().err
    assert [row["runs"] for row in rows(workdir)] == ["3"]
    result = json.loads((workdir / "result.json").read_text())
    assert result["metrics"]["rows"][0]["runs"] == 3

    # Killed between the last cell and the end.
    (workdir / "result.json").unlink()
    assert sweep.main(command(workdir, "--sweep.quant=bits=4", "--sweep.seed=0,1,2")) == 0
    assert json.loads((workdir / "result.json").read_text())["metrics"] == result["metrics"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_sweep_that_is_stopped_saves_its_runs_and_goes_on(tmp_path, number):
    workdir = tmp_path / "sweep"
    # Long enough to be stopped, and saved rarely.
    changes = ["--sweep.seed=5", "--config.total_epochs=400", "--config.log_every_steps=1"]
    whole = [sys.executable, "-m", "experiments.sweep", *command(workdir, *changes)[1:]]
    process = subprocess.Popen(whole, stderr=subprocess.PIPE, text=True)
    metrics = workdir / "seed=5" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and '"step": 3,' in metrics.read_text()):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    said = process.communicate()[1]
    assert process.returncode == cli.SIGNAL_BASE + number
    assert "stopping 1 runs, which save what they have" in said
    assert "run the same command again to go on" in said
    assert any((workdir / "seed=5" / "checkpoints").iterdir())


def test_a_cluster_runs_the_cells(tmp_path):
    pytest.importorskip("submitit", reason="it submits them: pip install 'qat_jax[cluster]'")
    workdir = tmp_path / "sweep"
    changes = ["--sweep.seed=0", "--cluster=local", "--cluster.timeout_min=5"]
    assert sweep.main(command(workdir, *changes)) == 0
    assert rows(workdir)[0]["runs"] == "1"
    assert list((workdir / sweep.LOGS).glob("*_result.pkl"))  # submitit's own record


def test_gpus_are_dealt_out_among_processes(tmp_path, monkeypatch):
    (tmp_path / "which_gpu.py").write_text("import os; print(os.environ['CUDA_VISIBLE_DEVICES'])")
    monkeypatch.setenv("PYTHONPATH", os.fspath(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    launcher = LocalProcesses(2, tmp_path / "logs")
    jobs = [launcher.start(name, ["which_gpu"]) for name in ("a", "b")]
    while any(job.status() is None for job in jobs):
        time.sleep(0.01)
    assert [sweep.last_line(job.log) for job in jobs] == ["4,6", "5,7"]
    with pytest.raises(ValueError, match="pass --jobs=4"):
        LocalProcesses(5, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([], "nothing is swept"),
        (["--sweep.sede=0"], "sede=0: unknown config key 'sede': did you mean --config.seed?"),
        (["--sweep.seed=a"], "seed=a: "),
        (["--sweep.seed=0", "--sweep.seed=1"], "--sweep.seed is given twice"),
        (
            ["--sweep.seed=0,1", "--config.seed=5"],
            "seed is swept and also given, by --config",
        ),
        (["--sweep.quant.narrow=True", "--noconfig.quant.narrow"], "leave one of them out"),
        (["--sweep=no.yaml"], "no.yaml does not exist"),
        (["--sweep.seed=0", "--jobs=0"], "jobs is 0: give at least 1"),
        (["--sweep.seed=0", "--jobs=x"], "see --help"),
        (["--sweep.seed=0", "--main=hardwear"], "see --help"),
        (["--sweep.seed=0", "--sed=1"], "'--sed=1' is none of --sweep.KEY"),
        (["--sweep.seed=0", "--cluster.gpus_per_node=1"], "needs --cluster=slurm"),
        (["--sweep.seed=0", "--cluster=moon"], "--cluster=moon: "),
        (["--sweep.seed=0", "--cluster=local", "--cluster.gpu=1"], "--cluster=local: "),
    ],
)
def test_a_wrong_command_is_refused_before_anything_is_written(tmp_path, capsys, changes, message):
    assert sweep.main(command(tmp_path / "sweep", *changes)) == cli.WRONG_USAGE
    assert message in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()


def test_what_an_earlier_command_swept_is_named(tmp_path, capsys, caplog):
    small = "--config.total_epochs=1", "--config.model.width=2"
    for seed in (0, 1):
        assert sweep.main(command(tmp_path / "sweep", f"--sweep.seed={seed}", *small)) == 0
    said = caplog.text + capsys.readouterr().err
    assert "sweep.csv will not name seed=0, which an earlier command swept" in said


def test_a_folder_of_something_else_is_left_alone(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert sweep.main(command(tmp_path, "--sweep.seed=0")) == cli.WRONG_USAGE
    assert "holds something else than a sweep" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_help_teaches(capsys):
    assert sweep.main(["sweep", "--help"]) == 0
    assert "--sweep.quant=bits=4,bits=2 --sweep.seed=0,1,2" in capsys.readouterr().out
