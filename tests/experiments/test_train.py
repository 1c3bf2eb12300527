import importlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import optax
import pytest

import qat_jax as qj
from experiments import build, cli, runs, tasks, train
from qat_jax.training.sharding import Placement
from qat_jax.training.state import create_state
from qat_jax.training.workdir import Workdir

FOUR_BITS = ["--config.quant.weight_bits=4", "--config.quant.activation_bits=4"]
SMALL = [
    "--config.model.width=4",
    "--config.batch_size=64",
    "--config.total_epochs=3",
    "--config.eval_every_epochs=1",
    "--config.checkpoint_every_epochs=0.5",
    "--config.log_every_steps=1",
]


def command(workdir, *changes, config="configs/digits.py"):
    return ["train", f"--config={config}", f"--workdir={workdir}", *SMALL, *changes]


def main(*arguments, **settings):
    return cli.main(train.run, train.__doc__, command(*arguments, **settings))


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def contents(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    assert main(workdir) == 0
    return workdir


def test_a_run_learns_digits_and_leaves_its_record(finished):
    result = json.loads((finished / "result.json").read_text())
    assert result["metrics"]["test_count"] == 360
    assert result["metrics"]["test_accuracy"] > 0.6
    assert result["metrics"]["steps"] == 3 * (1437 // 64)
    assert result["config"] == json.loads((finished / "config.json").read_text())
    tested = [line for line in lines(finished) if line["split"] == "test"]
    assert tested[0]["step"] == 0
    assert tested[-1]["accuracy"] == result["metrics"]["test_accuracy"]
    assert list(finished.glob("events.*"))


def test_a_run_leaves_the_weights_that_were_judged(finished):
    config = cli.parse(command(finished)).config
    config.model.pretrained = str(finished / train.WEIGHTS)
    task, devices = build.task(config), Placement.over_all_devices()
    graphdefs, state = create_state(build.float_model(config), optax.identity())
    metrics = task.judge(graphdefs, devices)(state, task.test_source())
    result = json.loads((finished / "result.json").read_text())["metrics"]
    assert metrics["accuracy"] == result["test_accuracy"]


def test_held_out_images_are_looked_at_in_training_and_test_images_once(tmp_path):
    changes = [
        "--config.dataset.train_split=train[:1200]",
        "--config.dataset.validation_split=train[1200:]",
        "--config.total_epochs=1",
    ]
    assert main(tmp_path / "run", *changes) == 0
    tested = [line for line in lines(tmp_path / "run") if line["split"] != "train"]
    assert [line["split"] for line in tested] == ["validation", "validation", "test"]
    metrics = json.loads((tmp_path / "run" / "result.json").read_text())["metrics"]
    assert (metrics["validation_count"], metrics["test_count"]) == (237, 360)
    assert metrics["validation_accuracy"] == tested[1]["accuracy"]
    assert metrics["test_accuracy"] == tested[2]["accuracy"]

    # Killed after the last checkpoint, before or after the test images were looked at.
    whole = (tmp_path / "run" / "metrics.jsonl").read_text()
    for left in (whole.splitlines(keepends=True)[:-1], whole.splitlines(keepends=True)):
        (tmp_path / "run" / "metrics.jsonl").write_text("".join(left))
        (tmp_path / "run" / "result.json").unlink()
        assert main(tmp_path / "run", *changes) == 0
        assert (tmp_path / "run" / "metrics.jsonl").read_text() == whole


def test_a_finished_run_is_not_repeated(finished, capsys):
    before = contents(finished)
    assert main(finished) == 0
    assert "is finished, nothing to do" in capsys.readouterr().err
    assert contents(finished) == before


def test_another_config_is_refused(finished, capsys):
    before = contents(finished)
    assert main(finished, "--config.seed=1") == cli.WRONG_USAGE
    assert "seed is 0 there and 1 here" in capsys.readouterr().err
    assert contents(finished) == before


# A checkpoint appears by being renamed: the process dies when all of it is written but its name.
KILLED_WHILE_SAVING = """
import os, signal, sys
from experiments import cli, train

def dying(rename):
    def renamed(source, target, *arguments, **settings):
        if os.fspath(target).endswith("checkpoints/22"):
            os.kill(os.getpid(), signal.SIGKILL)
        return rename(source, target, *arguments, **settings)
    return renamed

os.rename, os.replace = dying(os.rename), dying(os.replace)
cli.main(train.run, train.__doc__, sys.argv)
"""


def test_a_run_killed_while_it_saves_goes_on_as_if_nothing_had_happened(finished, tmp_path):
    workdir = tmp_path / "killed"
    arguments = [sys.executable, "-c", KILLED_WHILE_SAVING, *command(workdir)[1:]]
    done = subprocess.run(arguments, stderr=subprocess.DEVNULL, check=False)
    assert done.returncode == -signal.SIGKILL
    saved = [path.name for path in (workdir / "checkpoints").iterdir()]
    assert "11" in saved
    assert "22" not in saved
    assert any(name.startswith("22.") for name in saved)

    assert main(workdir) == 0
    assert lines(workdir) == lines(finished)
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["55", "66"]


def test_two_processes_train_like_one_though_killed_and_stopped(tmp_path):
    # Sums in another order differ by 1e-7. At the config's own rate training multiplies that by ten
    # every few steps, and at a tenth of it wherever the two orders differ about the sign of a
    # value before a ReLU. At a hundredth no seed of six came further apart than 2e-7.
    calm = "--config.optimizer.learning_rate=0.001"
    assert main(tmp_path / "one", calm) == 0
    workdir = tmp_path / "two"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]

    def start():
        hosts = [
            "--config.hosts.join",
            f"--config.hosts.coordinator=localhost:{port}",
            "--config.hosts.processes=2",
        ]
        arguments = [sys.executable, "-m", "experiments.train", *command(workdir, calm)[1:], *hosts]
        return [
            subprocess.Popen(
                [*arguments, f"--config.hosts.index={index}"], stderr=subprocess.PIPE, text=True
            )
            for index in range(2)
        ]

    def saved(step, processes):
        deadline = time.monotonic() + 180
        while not (workdir / "checkpoints" / str(step)).exists():
            assert all(process.poll() is None for process in processes)
            assert time.monotonic() < deadline
            time.sleep(0.005)

    processes = start()
    saved(11, processes)
    for process in processes:  # a cluster ends the rest of a job that lost a process
        process.kill()
    for process in processes:
        process.communicate()

    processes = start()
    saved(33, processes)
    processes[1].terminate()
    said = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [128 + signal.SIGTERM] * 2
    stops = [re.search(r"stopped by SIGTERM at step (\d+)", text)[1] for text in said]
    assert stops[0] == stops[1]
    assert (workdir / "checkpoints" / stops[0]).exists()

    processes = start()
    said = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert "test accuracy" in said[0]
    assert "test accuracy" not in said[1]
    ours, theirs = lines(workdir), lines(tmp_path / "one")
    assert [(line["step"], line["split"]) for line in ours] == [
        (line["step"], line["split"]) for line in theirs
    ]
    losses = ([line["loss"] for line in run] for run in (ours, theirs))
    np.testing.assert_allclose(*losses, rtol=1e-5)


@pytest.mark.parametrize("missing", ["coordinator", "processes"])
def test_half_a_cluster_is_refused(tmp_path, capsys, missing):
    given = {"coordinator": "localhost:1", "processes": "2", "index": "0"}
    changes = [f"--config.hosts.{name}={value}" for name, value in given.items() if name != missing]
    assert main(tmp_path / "run", "--config.hosts.join", *changes) == cli.WRONG_USAGE
    assert f"hosts.{missing} is missing: give all of" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_hosts_that_are_not_joined_are_refused(tmp_path, capsys):
    assert main(tmp_path / "x", "--config.hosts.processes=2") == 2
    message = capsys.readouterr().err
    assert "hosts.processes means nothing without hosts.join: pass" in message
    assert not (tmp_path / "x").exists()


def test_a_run_in_use_is_refused(finished, tmp_path, capsys):
    folder = shutil.copytree(finished, tmp_path / "copy")
    (folder / "result.json").unlink()
    with Workdir(folder).locked():
        before = contents(folder)
        assert main(folder) == 2
        assert contents(folder) == before
    assert f"{folder} is in use by process {os.getpid()} on" in capsys.readouterr().err


def test_weights_and_activations_are_quantised_on_request(tmp_path):
    status = main(
        tmp_path / "w2",
        "--config.total_epochs=0.1",
        "--config.quant.diagnostics",
        config="configs/digits.py:bits=2,clipping=max,gradient=ste",
    )
    assert status == 0
    first = next(line for line in lines(tmp_path / "w2") if line["split"] == "train")
    # Scaled by the maximum, nothing is clipped and two bits leave few decibels.
    assert first["diagnostics/layer2/0/conv1/weights/clipped_fraction"] == 0
    assert first["diagnostics/layer2/0/conv1/weights/threshold_over_max"] == 1
    assert 0 < first["diagnostics/layer2/0/conv1/weights/sqnr_db"] < 12
    assert first["diagnostics/conv1/weights/sqnr_db"] > 30


def test_carried_thresholds_are_saved_and_taken_up_again(tmp_path):
    config, changes = "configs/digits.py:bits=4,scaling=carried", "--config.total_epochs=1"
    assert main(tmp_path / "whole", changes, config=config) == 0
    arguments = command(tmp_path / "killed", changes, config=config)[1:]
    done = subprocess.run(
        [sys.executable, "-c", KILLED_WHILE_SAVING, *arguments],
        stderr=subprocess.DEVNULL,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    assert main(tmp_path / "killed", changes, config=config) == 0
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")

    parsed = cli.parse(command(tmp_path / "whole", changes, config=config)).config
    example = tasks.first_inputs(build.task(parsed), build.task(parsed).test_source(), 2)
    model = runs.trained_model(parsed, tmp_path / "whole", *example)
    carried = qj.operand_quantizers(model)["layer2/0/conv1/activations"].carried.get_value()
    untrained = build.quantised_model(parsed)
    qj.carry_thresholds(untrained, *example)
    before = qj.operand_quantizers(untrained)["layer2/0/conv1/activations"].carried.get_value()
    assert carried.shape == before.shape
    assert carried != before


def test_a_quantised_network_learns_from_its_float_one(finished, tmp_path):
    """Interrupted, gone on with, and loaded when the teacher's file is gone."""
    weights = tmp_path / "float.safetensors"
    shutil.copy(finished / train.WEIGHTS, weights)
    changes = [
        "--config.quant.weight_bits=2",
        "--config.quant.activation_bits=2",
        f"--config.model.pretrained={weights}",
        "--config.distillation.weight=1.0",
        "--config.distillation.temperature=2.0",
        "--config.optimizer.learning_rate=0.02",
        "--config.total_epochs=1",
    ]
    run = tmp_path / "run"
    assert main(run, *changes) == 0
    losses = [line["loss"] for line in lines(run) if line["split"] == "train"]
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    before, after = (line["accuracy"] for line in lines(run) if line["split"] == "test")
    assert after > before + 0.1

    whole = lines(run)
    shutil.rmtree(run / "checkpoints" / "22")
    (run / "result.json").unlink()
    assert main(run, *changes) == 0
    assert lines(run) == whole

    weights.unlink()
    config = runs.finished_config(run)
    assert runs.trained_model(config, run) is not None


def test_learned_thresholds_are_trained_and_left_in_the_run(tmp_path):
    config, changes = "configs/digits.py:bits=3,scaling=learned", "--config.total_epochs=1"
    assert main(tmp_path / "run", changes, config=config) == 0
    parsed = cli.parse(command(tmp_path / "run", changes, config=config)).config
    task = build.task(parsed)
    example = tasks.first_inputs(task, task.test_source(), 2)
    trained = qj.operand_quantizers(runs.trained_model(parsed, tmp_path / "run", *example))
    untrained = build.quantised_model(parsed)
    qj.calibrate(untrained, tasks.training_inputs(task, parsed, 5))
    for path, before in qj.operand_quantizers(untrained).items():
        assert (trained[path].kept != before.kept).any(), path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--config.quant.learned"], "pass --config.quant.static_batches=5"),
        (["--config.dataset.data_dir=/nowhere", "--config.dataset.name=cifar10_local"], "/nowhere"),
        (["--config.dataset.test_split=tset"], "no split 'tset'"),
        (["--config.dataset.augment=flip"], "choose one of none, crop_flip"),
        (["--config.model.num_classes=5"], "pass --config.model.num_classes=10"),
        (
            ["--config.dataset.validation_split=train[1000:]"],
            "not be held out: pass --config.dataset.train_split=train[:1000]",
        ),
        (["--config.dataset.num_threads=-1"], "dataset.num_threads is -1: give 0 or more"),
        (["--config.dataset.num_workers=-1"], "dataset.num_workers is -1: give 0 or more"),
        (["--config.dataset.name=fake"], "'fake' needs dataset.size"),
        (["--config.dataset.mean=(0.5, 0.5)"], "dataset.mean needs one number for each"),
        (["--config.dataset.mean=abc"], "give one number a channel"),
        (["--config.model.in_channels=3"], "pass --config.model.in_channels=1"),
        (["--config.model.depth=9"], "depth is 9"),
        (["--config.model.pretrained=no.safetensors"], "no pretrained weights at no.safetensors"),
        ([*FOUR_BITS, "--config.quant.clipping=maxx"], "give one of max, octav"),
        ([*FOUR_BITS, "--config.quant.gradient=mat"], "there are ste, pwl, mad"),
        (["--config.quant.weight_bits=1"], "2 to 16 bits"),
        (["--config.optimizer.name=adam"], "choose sgd or adamw"),
        (["--config.model.name=mobilenet_v2"], "is not for model.name 'mobilenet_v2' (got an unex"),
        (["--config.model.name=bert"], "is not for model.name 'bert'"),
        (["--config.seed=-1"], "seed is -1: give 0 to 4294967295"),
        (["--config.average_decay=1.0"], "average_decay is 1.0: give at least 0 and less than 1"),
        (["--config.average_decay=-0.1"], "average_decay is -0.1: give at least 0"),
        (["--config.distillation.weight=0.5"], "pass --config.distillation.teacher=FILE"),
        (["--config.distillation.teacher=a"], "teacher means nothing where the teacher has no sha"),
        (["--config.distillation.temperature=2.0"], "temperature means nothing where the teacher"),
        (
            ["--config.distillation.weight=0.5", "--config.distillation.teacher=no.safetensors"],
            "no pretrained weights at no.safetensors",
        ),
        (["--config.label_smoothing=-3"], "label_smoothing is -3.0: give at least 0 and less"),
        (["--config.schedule.name=cosin"], "choose constant, cosine, linear or step"),
        (["--config.total_epochs=0"], "the run has no step"),
        (["--config.log_every_steps=0"], "log_every must be at least 1"),
        (["--config.batch_size=0"], "batch_size"),
        (["--config.accumulate=0"], "accumulate 0 does not divide batch_size 64"),
        ([*FOUR_BITS, "--config.quant.shards=3"], "3 shards of conv1/activations do not divide 64"),
        ([*FOUR_BITS, "--config.quant.shards=64", "--config.accumulate=2"], "do not divide 32"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(tmp_path, capsys, changes, message):
    workdir = tmp_path / "run"
    assert main(workdir, *changes) == cli.WRONG_USAGE
    written = capsys.readouterr().err
    assert message in written
    assert written.count("\n") == 1
    assert not workdir.exists()


@pytest.mark.parametrize(
    "setting",
    ["weight_bits=3", "narrow=False", "edge_bits=4", "edge_clipping=max", "shards=2"],
)
def test_what_a_notation_has_no_use_for_is_refused(tmp_path, capsys, setting):
    arguments = command(
        tmp_path / "run",
        f"--config.quant.{setting}",
        config="configs/digits.py:notation=4/4U/4/6",
    )
    assert cli.main(train.run, train.__doc__, arguments) == cli.WRONG_USAGE
    key = setting.partition("=")[0]
    assert f"quant.{key} changes nothing beside quant.notation 4/4U" in capsys.readouterr().err


@pytest.mark.parametrize(
    "setting", ["weight_bits=3", "edge_bits=4", "clipping=exact", "gradient=ste", "narrow=False"]
)
def test_what_a_policy_says_itself_is_refused(tmp_path, capsys, setting):
    (tmp_path / "p.yaml").write_text("- {pattern: .*, notation: 4/4}\n")
    changes = f"--config.quant.policy={tmp_path / 'p.yaml'}", f"--config.quant.{setting}"
    assert main(tmp_path / "run", *changes) == cli.WRONG_USAGE
    key = setting.partition("=")[0]
    assert f"quant.{key} changes nothing beside quant.policy" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("dataset.std=(0,)", "std is (0,): give positive numbers"),
        ("total_epochs=inf", "total_epochs is inf: a duration is a number"),
    ],
)
def test_numbers_that_cannot_be_are_refused(tmp_path, capsys, change, message):
    assert main(tmp_path / "run", f"--config.{change}") == cli.WRONG_USAGE
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    arguments = cli.parse(command("~/runs/one"))
    assert arguments.workdir == tmp_path / "runs" / "one"
    assert not (tmp_path / "run").exists()


def test_a_config_of_another_main_is_refused(tmp_path, capsys):
    arguments = ["train", "--config=configs/quickstart.py", f"--workdir={tmp_path / 'run'}"]
    assert cli.main(train.run, train.__doc__, arguments) == cli.WRONG_USAGE
    assert "not for this main: it has no dataset, model" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_another_model_is_refused(finished, tmp_path, capsys):
    workdir = tmp_path / "run"
    workdir.mkdir()
    os.symlink(finished / "checkpoints", workdir / "checkpoints")
    config = json.loads((finished / "config.json").read_text())
    config["model"]["width"] = 5
    (workdir / "config.json").write_text(json.dumps(config))
    before = contents(workdir)
    assert main(workdir, "--config.model.width=5") == cli.WRONG_USAGE
    assert "is of another model" in capsys.readouterr().err
    assert contents(workdir) == before


def test_a_diverging_run_says_so(tmp_path, capsys):
    assert main(tmp_path / "run", "--config.optimizer.learning_rate=1e30") == cli.FAILED
    assert "lower optimizer.learning_rate" in capsys.readouterr().err
    assert not (tmp_path / "run" / "result.json").exists()


@pytest.mark.parametrize("name", ["digits", "cifar10_resnet20", "imagenet_mobilenet_v1"])
def test_configs_are_complete(name):
    module = importlib.import_module(f"configs.{name}")
    config = module.get_config("bits=3,gradient=mad")
    assert config.quant.to_dict() == {
        "policy": None,
        "notation": "",
        "shards": 1,
        "overrides": (),
        "embeddings": "",
        "smoothing_batches": 0,
        "rotate": False,
        "static_batches": 0,
        "learned": False,
        "carried": False,
        "weight_bits": 3,
        "activation_bits": 3,
        "clipping": "octav",
        "gradient": "mad",
        "narrow": True,
        "edge_bits": 8,
        "edge_clipping": "octav",
        "diagnostics": False,
    }
    assert module.get_config("float") == module.get_config()
    assert module.get_config().quant.weight_bits == build.FLOAT_BITS
    train.make_plan(config, steps_per_epoch=100)
