"""Commands in the README and the documentation parse: modules, flags, configs and their settings.

Nothing is run: each main is stopped as soon as it has read its command line.
"""

import argparse
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from ml_collections import ConfigDict
from tensorflow_datasets.core import registered

from experiments import cli, sweep

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")],
    key=lambda path: path.relative_to(ROOT).as_posix(),
)
FENCE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
COMMAND = re.compile(r"python -m ((?:experiments|qat_jax|benchmarks)[\w.]*)(.*)")
STANDS_FOR_OTHERS = re.compile(r"\[|NAME\.py|FILE\.py")  # usage, not a command


class HasParsedError(Exception):
    """Raised in the place of the work."""


def lines(page: str) -> Iterator[str]:
    """Those of blocks, continued ones joined, and pieces of code in the text."""
    for block in FENCE.findall(page):
        yield from block.replace("\\\n", " ").splitlines()
    for code in re.findall(r"`([^`]+)`", FENCE.sub("", page)):
        yield " ".join(code.split())


def commands() -> list[tuple[str, str]]:
    """Modules and what follows them."""
    found = {}
    for path in PAGES:
        for line in lines(path.read_text(encoding="utf-8")):
            match = COMMAND.search(line)
            if match and not STANDS_FOR_OTHERS.search(match[2]) and "NAME" not in match[1]:
                found[match[1], match[2].strip()] = None
    return list(found)


def arguments(text: str) -> list[str]:
    """The words of a command, without an ellipsis."""
    try:
        words = shlex.split(text, comments=True)
    except ValueError:  # in quotes that began before the command
        words = shlex.split(text.rstrip('"'), comments=True)
    return [word for word in words if word not in ("…", "&&")]


pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")


@pytest.fixture(autouse=True)
def in_project_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def stop_after_parsing(monkeypatch):
    """Of mains with a config and of mains with flags of their own."""

    def main(run, usage, argv, **settings):
        if "--help" not in argv:
            cli.parse(argv, **settings)
        raise HasParsedError

    parse_args = argparse.ArgumentParser.parse_args

    def parse(parser, *given):
        parse_args(parser, *given)
        raise HasParsedError

    monkeypatch.setattr(cli, "main", main)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)


def parses(monkeypatch, module, words):
    if module == "experiments.sweep":
        parsed, _ = sweep.parse([module, *words])
        for cell in parsed.cells:
            cli.parse(parsed.arguments(cell))
        return
    stop_after_parsing(monkeypatch)
    monkeypatch.setattr(sys, "argv", [module, *words])
    # A data set's module is run a second time if some test has imported it.
    with registered.skip_registration(), pytest.raises(HasParsedError):
        runpy.run_module(module, run_name="__main__")


@pytest.mark.parametrize(("module", "text"), commands())
def test_a_documented_command_parses(module, text, monkeypatch):
    words = arguments(text)
    if "…" in text and "--workdir" not in text:
        words.append("--workdir=DIR")
    if not any(word.startswith("--") for word in words[:-1]) and "policy" not in module:
        assert find_spec(module) is not None  # named in a sentence
        return
    if "…" in text and "--config=" not in text:
        words.insert(0, "--config=configs/digits.py")
    parses(monkeypatch, module, words)


def test_there_are_commands():
    assert len(commands()) > 25


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("experiments.train", "--config=configs/digits.py:bitz=4 --workdir=DIR"),
        ("experiments.train", "--config=configs/digits.py --config.total_epoch=4 --workdir=DIR"),
        ("experiments.export", "--checkpoint=RUN --format=pickle --out=FILE"),
        ("experiments.sweep", "--config=configs/digits.py --workdir=DIR --sweep.sead=0,1"),
        ("experiments.trane", "--config=configs/digits.py --workdir=DIR"),
    ],
)
def test_wrong_commands_do_not(module, text, monkeypatch):
    with pytest.raises((cli.UsageError, SystemExit, ImportError)):
        parses(monkeypatch, module, arguments(text))


def settings(config: ConfigDict, prefix: str = "") -> Iterator[str]:
    for key, value in config.items():
        yield prefix + key
        if isinstance(value, ConfigDict):
            yield from settings(value, f"{prefix}{key}.")


def test_every_setting_that_is_named_exists_in_some_config():
    known = set()
    for path in (ROOT / "configs").glob("[!_]*.py"):
        known |= set(settings(runpy.run_path(str(path))["get_config"]()))
    named = {
        (path.name, setting)
        for path in PAGES
        for setting in re.findall(r"--config\.([a-z][a-z_.]*[a-z])", path.read_text("utf-8"))
    }
    assert len(named) > 20
    assert {(page, setting) for page, setting in named if setting not in known} == set()


def test_every_make_target_that_is_named_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set()
    for path in PAGES:
        for line in lines(path.read_text(encoding="utf-8")):
            if match := re.match(r"(?:\w+=\S* )?make ([a-z][a-z ]*)", line):
                named |= set(match[1].split())
    assert {"quickstart", "test", "lint", "docs"} <= named
    assert named <= targets
