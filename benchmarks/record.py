"""The JSON that a benchmark leaves: what was measured, and what it was measured with."""

import argparse
import json
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
    return path


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
