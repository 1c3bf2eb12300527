"""Gather the results of finished runs into one JSON file and a Markdown table.

Usage:
    python -m experiments.collect --runs=DIR --out=results/NAME

Reads every DIR/*/result.json and writes results/NAME.json, which has each run's command, commit,
versions, device, seed and metrics, and results/NAME.md, a table of those that trained a network or
quantised one. Folders of the machine are left out of the commands: what stands before a file's own
name becomes PATH.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

from experiments import cli

COLUMNS = ("notation", "weight_bits", "activation_bits", "clipping", "gradient", "narrow")


def gather(runs: Path) -> list[dict[str, Any]]:
    """The finished runs of a folder by name, without their configs' bulk.

    Raises:
        FileNotFoundError: there is none.
    """
    found = []
    for path in sorted(runs.glob("*/result.json")):
        result = json.loads(path.read_text())
        result["command"] = without_folders(result["command"])
        config = result.pop("config")
        result["quant"] = config.get("quant")
        if (result["quant"] or {}).get("policy"):  # what else is said of quantisers does not count
            result["quant"] = {"notation": "policy", "policy": result["quant"]["policy"]}
        elif "clipping" in config:  # of a network quantised after training: a rule for each side
            result["quant"]["clipping"] = "/".join(
                config["clipping"][side] for side in ("weights", "activations")
            )
        for bulky in ("diagnostics", "effective_bits"):  # figures for each layer: too much here
            result["metrics"].pop(bulky, None)
        result["metrics"]["accuracy_before"] = accuracy_before(path.with_name("metrics.jsonl"))
        found.append({"name": path.parent.name, **result})
    if not found:
        raise FileNotFoundError(f"no finished run in {runs}: give the folder above the run folders")
    return found


def accuracy_before(path: Path) -> float | None:
    """The accuracy before the first step of training, in [0, 1]; None if not measured.

    On held-out images where there are some, since test images are then looked at only at the end.
    """
    lines = map(json.loads, path.read_text().splitlines() if path.exists() else ())
    measured = ("validation", "test", "float")
    tested = (line for line in lines if line["step"] == 0 and line["split"] in measured)
    return next((line["accuracy"] for line in tested), None)


def without_folders(command: str) -> str:
    """A command in which absolute paths keep only their last part.

    Example:
        >>> without_folders("python -m a --data_dir=/home/me/data --workdir=runs/x")
        'python -m a --data_dir=PATH/data --workdir=runs/x'
    """
    return re.sub(r"(?<=[=\s])/(?:[^/\s]+/)*(?=[^/\s]+)", "PATH/", command)


def table(results: list[dict[str, Any]]) -> str:
    """A Markdown table: what was quantised how, and the test accuracy in per cent.

    "before" is the accuracy before training; of a run without training, that in float. Where images
    were held out it is theirs, and so is "held out", the accuracy after training.
    """
    header = ["run", *COLUMNS, "seed", "before", "held out"]
    header += ["test accuracy", "test images", "steps", "minutes"]
    lines = [" | ".join(header), " | ".join("---" for _ in header)]
    for result in results:
        metrics = result["metrics"]
        cells = [
            result["name"],
            *(result["quant"].get(column) or "-" for column in COLUMNS),
            result["seed"],
            _percent(metrics["accuracy_before"]),
            _percent(metrics.get("validation_accuracy")),
            _percent(metrics["test_accuracy"]),
            metrics["test_count"],
            metrics.get("steps", "-"),
            f"{result['wall_seconds'] / 60:.1f}",
        ]
        lines.append(" | ".join(map(str, cells)))
    return "".join(f"| {line} |\n" for line in lines)


def _percent(accuracy: float | None) -> str:
    return "-" if accuracy is None else f"{100 * accuracy:.1f}"


def write(runs: Path, out: Path) -> str:
    """Writes the two files; the table.

    Raises:
        FileNotFoundError: there is no finished run.
    """
    results = gather(runs)
    out.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    tested = [result for result in results if "test_accuracy" in result["metrics"]]
    if not tested:
        return f"{out.with_suffix('.json')}: {len(results)} runs"
    lines = table(tested)
    out.with_suffix(".md").write_text(lines)
    return lines.rstrip()


if __name__ == "__main__":
    sys.exit(cli.gathering_main(__doc__, write))
