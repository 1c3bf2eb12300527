"""The JSON that a benchmark leaves: what was measured, and what it was measured with."""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from experiments.collect import without_folders
from qat_jax.training.workdir import device, git_commit, versions

SEED = 0  # of every benchmark


def out_path(text: str) -> Path:
    """The value of --out, refused before anything is measured if nothing can be written there."""
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {path.parent}: make it first")
    if not os.access(path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(
            f"{path.parent} may not be written to: name another folder"
        )
    return path


def count(text: str) -> int:
    """The value of a flag that says how many: 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of 1 or more")
    return int(text)


def bits(text: str) -> int:
    """The value of --bits, of a grid of integers."""
    if not text.isdecimal() or not 2 <= int(text) <= 16:
        raise argparse.ArgumentTypeError(f"{text} is not 2 to 16 bits")
    return int(text)


def run(main: Callable[[], int]) -> NoReturn:
    """Ends the program with what `main` returns, or, stopped by Ctrl-C, with a word about it."""
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("stopped: nothing was written", file=sys.stderr)
        sys.exit(130)


def write(out: Path, experiment: str, **measured: Any) -> None:
    """Writes `out`.json.

    Args:
        out: the path without a suffix.
        experiment: what was measured.
        **measured: JSON values; a `device` among them replaces the machine's.
    """
    result = {
        "experiment": experiment,
        "command": without_folders(shlex.join(["python", *sys.orig_argv[1:]])),
        "git_commit": git_commit(),
        "versions": versions(),
        "device": device(),
        "seed": SEED,
        **measured,
    }
    out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
