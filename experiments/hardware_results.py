"""The files of a finished run of `experiments.hardware`, to keep.

Usage:
    python -m experiments.hardware_results --runs=DIR --out=results/NAME

Writes results/NAME_FILE for every CSV and figure of the one finished run in DIR/*/, and
results/NAME.json, which has its command, commit, versions, device, seed and metrics.
"""

import json
import shutil
import sys
from pathlib import Path

from experiments import cli
from experiments.collect import without_folders
from qat_jax.training.workdir import Workdir


def write(runs: Path, out: Path) -> str:
    """Copies the files and names them.

    Raises:
        FileNotFoundError: there is no finished run of `experiments.hardware`, or several.
        WorkdirError: it cannot be read.
    """
    found = [path.parent for path in runs.glob("*/result.json")]
    found = [folder for folder in found if (folder / "designs.csv").is_file()]
    if len(found) != 1:
        raise FileNotFoundError(
            f"{len(found)} finished runs of experiments.hardware in {runs}: give the folder above "
            "the folder of one"
        )
    result = Workdir(found[0]).result()
    del result["config"]  # the command says what is not a default
    result["command"] = without_folders(result["command"])
    written = [cli.with_ending(out, ".json")]
    written[0].write_text(json.dumps(result, indent=1) + "\n")
    for path in sorted([*found[0].glob("*.csv"), *found[0].glob("*.png")]):
        written.append(out.with_name(f"{out.name}_{path.name}"))
        shutil.copyfile(path, written[-1])
    return "\n".join(map(str, written))


if __name__ == "__main__":
    sys.exit(cli.gathering_main(__doc__, write))
