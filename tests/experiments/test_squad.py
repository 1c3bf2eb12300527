"""Question answering from a file of questions to quantised answers, with a tiny BERT."""

import json
import re
import shutil

import numpy as np
import pytest
from rich.console import Console

from experiments import answer, build, cli, ptq, ptq_tables, train
from qat_jax import data

WORDS = ["red", "blue", "green", "cat", "dog", "bird", "paris", "rome", "who", "was", "where", "?"]
SMALL = [
    "--config.dataset.name=squad_json",
    "--config.model.size.layers=1",
    "--config.model.size.hidden=16",
    "--config.model.size.heads=2",
    "--config.model.size.intermediate=16",
    "--config.model.size.vocabulary=20",
    "--config.model.size.positions=24",
    "--config.dataset.length=24",
    "--config.dataset.stride=8",
    "--config.dataset.max_question_length=8",
    "--config.dataset.train_split=train.json",
    "--config.dataset.test_split=test.json",
    "--config.batch_size=8",
]


def questions(seed, count):
    """A colour and a thing stand beside each other; asked is for the colour's thing."""
    rng = np.random.default_rng(seed)
    asked = []
    for number in range(count):
        pairs = [f"{c} {t}" for c, t in zip(WORDS[:3], rng.permutation(WORDS[3:6]), strict=True)]
        context = " . ".join(rng.permutation(pairs))
        colour, thing = pairs[rng.integers(3)].split()
        start = context.index(f"{colour} {thing}") + len(colour) + 1
        answers = [{"text": thing, "answer_start": start}]
        qas = [{"id": str(number), "question": f"where was {colour}?", "answers": answers}]
        asked.append({"context": context, "qas": qas})
    return {"version": "1.1", "data": [{"title": "pairs", "paragraphs": asked}]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("squad")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "."]
    (path / "vocab.txt").write_text("\n".join(special + WORDS))
    for name, seed, count in [("train", 0, 64), ("test", 1, 11)]:
        (path / f"{name}.json").write_text(json.dumps(questions(seed, count)))
    return path


def command(main, folder, workdir, *changes):
    config = {"train": "squad_bert_base.py:bits=8", "ptq": "squad_bert_base_ptq.py:4/8/6/10"}[main]
    paths = [
        f"--config.dataset.data_dir={folder}",
        f"--config.dataset.vocabulary={folder}/vocab.txt",
    ]
    return [main, f"--config=configs/{config}", f"--workdir={workdir}", *SMALL, *paths, *changes]


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "trained"
    changes = [
        "--config.total_epochs=20",
        "--config.optimizer.learning_rate=0.01",
        "--config.model.dropout=0.0",
        "--config.eval_every_epochs=10",
        f"--config.dataset.cache_dir={folder / 'cache'}",
    ]
    assert cli.main(train.run, train.__doc__, command("train", folder, workdir, *changes)) == 0
    return workdir


def result(workdir):
    return json.loads((workdir / "result.json").read_text())["metrics"]


def test_a_network_learns_to_answer(trained, folder):
    metrics = result(trained)
    assert metrics["test_count"] == 11  # questions; the last batch is filled with others
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    before = next(line for line in lines if line["split"] == "test")
    assert metrics["test_f1"] >= metrics["test_exact_match"]
    assert metrics["test_loss"] < 0.7 * before["loss"]
    assert len(list((folder / "cache").glob("squad-*.npz"))) == 2


@pytest.fixture(scope="module")
def quantised(trained, folder, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "quantised"
    changes = f"--config.model.pretrained={trained / train.WEIGHTS}"
    assert cli.main(ptq.run, ptq.__doc__, command("ptq", folder, workdir, changes)) == 0
    return result(workdir)


@pytest.mark.parametrize("multiple", [4, 1])
def test_answers_do_not_depend_on_how_long_batches_are(
    trained, quantised, folder, tmp_path, multiple
):
    changes = [
        f"--config.dataset.bucketing.multiple={multiple}",
        f"--config.model.pretrained={trained / train.WEIGHTS}",
    ]
    arguments = command("ptq", folder, tmp_path / "run", *changes)
    assert cli.main(ptq.run, ptq.__doc__, arguments) == 0
    metrics = result(tmp_path / "run")
    assert metrics["float_f1"] == quantised["float_f1"]
    assert metrics["float_loss"] == pytest.approx(quantised["float_loss"], rel=1e-5)


def test_training_in_buckets_is_resumed_bit_for_bit(folder, tmp_path):
    changes = [
        "--config.dataset.bucketing.multiple=2",
        "--config.dataset.bucketing.batches=4",
        "--config.checkpoint_every_percent=50",
        "--config.total_epochs=1",
    ]
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    assert cli.main(train.run, train.__doc__, command("train", folder, whole, *changes)) == 0
    shutil.copytree(whole, halved)
    for name in ("result.json", train.WEIGHTS):
        (halved / name).unlink()
    shutil.rmtree(halved / "checkpoints" / "8")
    assert cli.main(train.run, train.__doc__, command("train", folder, halved, *changes)) == 0
    assert (halved / train.WEIGHTS).read_bytes() == (whole / train.WEIGHTS).read_bytes()


@pytest.mark.parametrize("setting", ["multiple=-1", "batches=2"])
def test_buckets_that_cannot_be_are_refused(folder, tmp_path, capsys, setting):
    arguments = command("train", folder, tmp_path / "run", f"--config.dataset.bucketing.{setting}")
    assert cli.main(train.run, train.__doc__, arguments) == cli.WRONG_USAGE
    assert "give at least 1" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("dataset.length=25", "24 positions: pass --config.dataset.length=24 or less"),
        ("model.size.vocabulary=16", "pass --config.model.size.vocabulary=17, or another"),
        ("model.size.token_types=1", "pass --config.model.size.token_types=2"),
        (
            "dataset.validation_split=train.json[50:]",
            "pass --config.dataset.train_split=train.json[:50]",
        ),
        ("optimizer.name=sgd", "'sgd' needs optimizer.momentum, which this config does not have"),
        ("model.dtype=bf16", "model.dtype is 'bf16': give one of float32, bfloat16, float16"),
        ("model.dtype=int8", "model.dtype is 'int8': give one of"),
        ("dataset.num_threads=-1", "dataset.num_threads is -1: give 0 or more"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    folder, tmp_path, capsys, change, message
):
    arguments = command("train", folder, tmp_path / "run", f"--config.{change}")
    assert cli.main(train.run, train.__doc__, arguments) == cli.WRONG_USAGE
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_questions_may_be_held_out(folder):
    changes = [
        "--config.dataset.train_split=train.json[::2]",
        "--config.dataset.validation_split=train.json[1::2]",
    ]
    task = build.task(cli.parse(command("train", folder, "x", *changes)).config)
    assert len(task.validation_source().questions) == 32


def test_trained_weights_are_quantised_after_training(quantised):
    assert quantised["float_count"] == 11
    assert 0 <= quantised["test_f1"] <= 1
    operands = quantised["diagnostics"]
    assert "bert/layers/0/attention/attention_weights" in operands
    assert quantised["effective_bits"]["bert/layers/0/intermediate/weights"] == pytest.approx(
        4 + 6 / 16 + 32 / 16, abs=0.01
    )


def test_tables_judge_answers(trained, folder, tmp_path, monkeypatch):
    cell = ("8/8", "octav", {"quant.notation": "8/8"})
    monkeypatch.setitem(ptq_tables.TABLES, "bert_dynamic", lambda: [cell])
    monkeypatch.setattr(ptq_tables, "measure", lambda bench, config: {"accuracy": 0.5})
    changes = [
        f"--config.model.pretrained={trained / train.WEIGHTS}",
        "--config.tables=bert_dynamic",
    ]
    arguments = command("ptq", folder, tmp_path / "tables", *changes)
    assert cli.main(ptq_tables.run, ptq_tables.__doc__, arguments) == 0
    assert 0 <= result(tmp_path / "tables")["float_accuracy"] <= 1


def test_a_question_typed_at_a_terminal_is_answered(trained, tmp_path, capsys):
    (tmp_path / "text").write_text("blue bird . red cat . green dog " * 3)
    arguments = [f"--checkpoint={trained}", f"--context-file={tmp_path / 'text'}"]
    assert answer.main([*arguments, "--n-best=2", "where was red?"]) == 0
    printed = capsys.readouterr().out
    assert re.match(r"1\. \w+.*  \d+%\n2\. \w", printed)
    assert "green dog" in printed


def test_a_run_from_before_bucketing_still_answers(trained, tmp_path, capsys):
    old = tmp_path / "old"
    shutil.copytree(trained, old)
    for name in ("config.json", "result.json"):
        content = json.loads((old / name).read_text())
        del content.get("config", content)["dataset"]["bucketing"]
        (old / name).write_text(json.dumps(content))
    said = []
    for run in (trained, old):
        text = "--context=red cat . blue dog"
        assert answer.main([f"--checkpoint={run}", text, "where was red?"]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != ""


@pytest.mark.parametrize(("threshold", "answered"), [(-1000.0, False), (1000.0, True)])
def test_a_run_that_knows_questions_without_answer_may_give_none(
    trained, tmp_path, capsys, threshold, answered
):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    content = json.loads((run / "config.json").read_text())
    content["answers"]["null_threshold"] = threshold
    (run / "config.json").write_text(json.dumps(content))
    assert answer.main([f"--checkpoint={run}", "--context=red cat", "where was red?"]) == 0
    said = capsys.readouterr().out
    assert ("no answer: the context does not say" in said) is not answered
    assert ("1. " in said) is answered


def test_an_unfinished_run_does_not_answer(trained, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    (run / "result.json").unlink()
    arguments = [f"--checkpoint={run}", "--context=red cat", "where was red?"]
    assert answer.main(arguments) == cli.WRONG_USAGE
    assert "is not finished: repeat the command" in capsys.readouterr().err


def test_an_answer_is_shown_where_it_stands_brackets_and_all(capsys):
    context = "the [b]cat[/b] was red, the other cat blue"
    at = context.rindex("cat")
    answers = [data.RankedAnswer(text, at, 1.0, 0.5) for text in ("cat", "[b]cat[/b]")]
    console = Console(force_terminal=True, width=200)
    answer.show(console, context, answers)
    printed = capsys.readouterr().out
    assert "2. [b]cat[/b]" in printed
    assert "the [b]cat[/b] was red, the other \x1b[1;7mcat\x1b[0m blue" in printed


@pytest.mark.parametrize(
    ("run", "text", "message"),
    [
        ("none", "text", "holds no run"),
        ("trained", "none", "No such file"),
        ("none", ".", "Is a directory"),
    ],
)
def test_what_cannot_be_answered_is_told(trained, tmp_path, capsys, run, text, message):
    (tmp_path / "text").write_text("red cat")
    folder = trained if run == "trained" else tmp_path / run
    arguments = [f"--checkpoint={folder}", f"--context-file={tmp_path / text}", "where?"]
    assert answer.main(arguments) == cli.WRONG_USAGE
    assert message in capsys.readouterr().err


def test_a_vocabulary_has_to_be_named(folder, tmp_path, capsys):
    arguments = command("train", folder, tmp_path / "x")
    arguments = [word for word in arguments if "vocabulary=/" not in word]
    assert cli.main(train.run, train.__doc__, arguments) == cli.WRONG_USAGE
    assert "name the tokens" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_an_unknown_task_is_refused():
    config = cli.parse(["x", "--config=configs/digits.py", "--workdir=x"]).config
    config.task = "translation"
    with pytest.raises(ValueError, match="give one of image_classification, question_answering"):
        build.task(config)
