import re
import sys

import pytest

from experiments import answer, cli, collect, export, hardware_results, ptq_figures, report
from qat_jax.data import DataError
from qat_jax.training.checkpoint import CheckpointError
from qat_jax.training.loop import Interrupted, NonFiniteLossError
from qat_jax.training.workdir import Workdir, WorkdirError

CONFIG = "--config=configs/digits.py"


def argv(*arguments):
    return ["train", *arguments]


def test_flags_override_the_config():
    arguments = cli.parse(
        argv(
            f"{CONFIG}:bits=4,clipping=max",
            "--workdir=runs/x",
            "--config.optimizer.learning_rate=0.25",
            "--config.optimizer.nesterov",
            "--config.model.pretrained=a.safetensors",
            "--config.batch_size",
            "16",
        )
    )
    config = arguments.config
    assert str(arguments.workdir) == "runs/x"
    assert config.quant.weight_bits == config.quant.activation_bits == 4
    assert config.quant.clipping == "max"
    assert config.optimizer.learning_rate == 0.25
    assert config.optimizer.nesterov is True
    assert config.model.pretrained == "a.safetensors"
    assert config.batch_size == 16
    assert config.is_locked


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --config=configs/NAME.py; there are configs/cifar10_resnet20.py, configs/cifar"),
        ([CONFIG], "give --workdir=DIR"),
        ([CONFIG, "--workdri=x"], "'workdri'. Did you mean: workdir"),
        ([CONFIG, "--workdir=x", "seed=1"], "'seed=1' is not a flag"),
        (["--config=configs/digit.py", "--workdir=x"], "configs/digit.py does not exist; there"),
        (["--config=nowhere/a.py", "--workdir=x"], "there is no config in nowhere/"),
        ([f"{CONFIG}:bit=4", "--workdir=x"], "cannot read 'bit=4': give 'float' or some of bits=4"),
        ([f"{CONFIG}:bits=4,notation=4/4U", "--workdir=x"], "are both given: leave bits out"),
        ([f"{CONFIG}:bits=x", "--workdir=x"], "bits=x is not a whole number"),
        (
            [CONFIG, "--workdir=x", "--config.optimizer.learning_rat=1"],
            "did you mean --config.optimizer.learning_rate?",
        ),
        ([CONFIG, "--workdir=x", "--config.optimiser.momentum=1"], "--config.optimizer.momentum?"),
        ([CONFIG, "--workdir=x", "--config.batch_size=ten"], "--config.batch_size=ten: "),
        ([CONFIG, "--workdir=x", "--config.batch_size=ten"], "give int"),
        (["--config.seed=1", CONFIG, "--workdir=x"], "before a value for --config"),
    ],
)
def test_wrong_usage_ends_in_one_line_before_anything_runs(arguments, message, capsys):
    def run(config, workdir):
        raise AssertionError("started")

    assert cli.main(run, "usage", argv(*arguments)) == cli.WRONG_USAGE
    written = capsys.readouterr()
    assert written.out == ""
    assert written.err.startswith("error: ")
    assert written.err.count("\n") == 1
    assert message in written.err


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (cli.UsageError("no\nsuch"), 2),
        (WorkdirError("other"), 2),
        (CheckpointError("foreign"), 2),
        (NonFiniteLossError("nan"), 1),
        (DataError("torn"), 1),
        (Interrupted(15, 3), 143),
        (KeyboardInterrupt(), 130),
    ],
)
def test_expected_failures_are_one_line_and_a_status(error, status, capsys):
    def run(config, workdir):
        raise error

    assert cli.main(run, "usage", argv(CONFIG, "--workdir=x")) == status
    assert capsys.readouterr().err.count("\n") == 1


def test_a_folder_is_locked_while_a_main_runs(tmp_path, capsys):
    command = argv(CONFIG, f"--workdir={tmp_path}")
    locked = []

    @cli.once("dataset")
    def run(config, workdir):
        locked.append(Workdir(workdir).lock_path.exists())
        return {}

    with Workdir(tmp_path).locked():
        assert cli.main(run, "usage", command) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"{tmp_path} is in use by process" in said
    assert locked == []
    assert cli.main(run, "usage", command) == 0
    assert locked == [True]


def test_a_bug_keeps_its_traceback():
    def run(config, workdir):
        raise TypeError("a bug")

    with pytest.raises(TypeError, match="a bug"):
        cli.main(run, "usage", argv(CONFIG, "--workdir=x"))


def test_a_file_that_cannot_be_read_is_wrong_usage(tmp_path):
    with pytest.raises(cli.UsageError, match="Is a directory"), cli.setup_errors():
        tmp_path.read_text()


def test_help_teaches_and_does_nothing(capsys):
    assert cli.main(lambda config, workdir: 1 / 0, "\nhow to use it\n", argv("--help")) == 0
    assert capsys.readouterr().out == "how to use it\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def (", "is no Python: invalid syntax"),
        ("x = 1", "is no config: it has no function get_config"),
    ],
)
def test_a_config_file_that_is_none_is_wrong_usage(tmp_path, monkeypatch, text, message):
    monkeypatch.delitem(sys.modules, "config_config", raising=False)  # what was read before
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(cli.UsageError, match=message):
        cli.parse(argv(f"--config={path}", "--workdir=x"))


@pytest.mark.parametrize("main", [collect, hardware_results, ptq_figures, report])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "0 finished runs|no finished run"),
        ("{}", "result.json is of no run of this project, it has no experiment"),
        ("[1]", r"\.json cannot be read \(no object\)"),
        ("", r"\.json cannot be read \(Expecting value"),
    ],
)
def test_files_of_no_run_are_wrong_usage(tmp_path, monkeypatch, capsys, main, content, message):
    run = tmp_path / "runs" / "a"
    run.mkdir(parents=True)
    if content is not None:
        (run / "result.json").write_text(content)
        (run / "config.json").write_text(content)
        (run / "designs.csv").touch()
    monkeypatch.setattr("sys.argv", ["main", f"--runs={run.parent}", f"--out={tmp_path / 'out'}"])
    assert cli.gathering_main("", lambda *given: str(main.write(*given))) == cli.WRONG_USAGE
    said = capsys.readouterr().err
    assert re.search(message, said)
    assert said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


@pytest.mark.parametrize("main", [answer, export])
def test_a_run_of_another_main_is_wrong_usage(tmp_path, capsys, main):
    (tmp_path / "config.json").write_text('{"experiment": "sweep"}')
    (tmp_path / "result.json").write_text("{}")
    rest = {
        answer: ["--context=It is blue.", "What?"],
        export: ["--format=safetensors", f"--out={tmp_path / 'out'}"],
    }
    assert main.main([f"--checkpoint={tmp_path}", *rest[main]]) == cli.WRONG_USAGE
    assert "is no run of experiments.train or experiments.ptq" in capsys.readouterr().err
