"""The JSON that a benchmark leaves: what was measured, and what it was measured with."""

import json
import shlex
import sys
from pathlib import Path
from typing import Any

from qat_jax.training.workdir import device, git_commit, versions

SEED = 0  # of every benchmark


def write(out: Path, experiment: str, **measured: Any) -> None:
    """Writes `out`.json.

    Args:
        out: the path without a suffix.
        experiment: what was measured.
        **measured: JSON values; a `device` among them replaces the machine's.
    """
    result = {
        "experiment": experiment,
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "git_commit": git_commit(),
        "versions": versions(),
        "device": device(),
        "seed": SEED,
        **measured,
    }
    out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
