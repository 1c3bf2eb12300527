"""Gather the results of finished runs into one JSON file and a Markdown table.

Usage:
    python -m experiments.collect --runs=DIR --out=results/NAME

Reads every DIR/*/result.json and writes results/NAME.json, which has each run's command, commit,
versions, device, seed and metrics, and results/NAME.md, a table of those that trained a network or
quantised one, images and questions apart. Folders of the machine are left out of the commands: what
stands before a file's own name becomes PATH.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

from experiments import cli
from qat_jax.training.workdir import Workdir

COLUMNS = ("notation", "weight_bits", "activation_bits", "clipping", "gradient", "narrow")


class Measure(NamedTuple):
    """What says how good a network is.

    Attributes:
        name: its metric's, in [0, 1].
        title: over its column.
        examples: what it is measured on.
    """

    name: str
    title: str
    examples: str


ACCURACY = Measure("accuracy", "accuracy", "images")
F1 = Measure("f1", "F1", "questions")


def gather(runs: Path) -> list[dict[str, Any]]:
    """The finished runs of a folder by name, without their configs' bulk.

    Raises:
        FileNotFoundError: there is none.
        WorkdirError: one of them cannot be read.
    """
    found = []
    for path in sorted(runs.glob("*/result.json")):
        result = Workdir(path.parent).result()
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
        for measure in (ACCURACY, F1):
            if f"test_{measure.name}" in result["metrics"]:
                before = metric_before(path.with_name("metrics.jsonl"), measure.name)
                result["metrics"][f"{measure.name}_before"] = before
        found.append({"name": path.parent.name, **result})
    if not found:
        raise FileNotFoundError(f"no finished run in {runs}: give the folder above the run folders")
    return found


def metric_before(path: Path, name: str) -> float | None:
    """A metric before the first step of training, in [0, 1]; None if not measured.

    On held-out examples where there are some, since test examples are then looked at only at the
    end.
    """
    lines = map(json.loads, path.read_text().splitlines() if path.exists() else ())
    measured = ("validation", "test", "float")
    tested = (line for line in lines if line["step"] == 0 and line["split"] in measured)
    return next((line[name] for line in tested), None)


def without_folders(command: str) -> str:
    """A command in which absolute paths keep only their last part.

    Example:
        >>> without_folders("python -m a --data_dir=/home/me/data --workdir=runs/x")
        'python -m a --data_dir=PATH/data --workdir=runs/x'
    """
    return re.sub(r"(?<=[=\s])/(?:[^/\s]+/)*(?=[^/\s]+)", "PATH/", command)


def table(results: list[dict[str, Any]], measure: Measure) -> str:
    """A Markdown table: what was quantised how, and a measure of its test in per cent.

    "before" is the measure before training; of a run without training, that in float. Where
    examples were held out it is theirs, and so is "held out", the measure after training.
    """
    header = ["run", *COLUMNS, "seed", "before", "held out"]
    header += [f"test {measure.title}", f"test {measure.examples}", "steps", "minutes"]
    lines = [" | ".join(header), " | ".join("---" for _ in header)]
    for result in results:
        metrics = result["metrics"]
        cells = [
            result["name"],
            *(_cell(result["quant"].get(column)) for column in COLUMNS),
            result["seed"],
            _percent(metrics[f"{measure.name}_before"]),
            _percent(metrics.get(f"validation_{measure.name}")),
            _percent(metrics[f"test_{measure.name}"]),
            metrics["test_count"],
            metrics.get("steps", "-"),
            f"{result['wall_seconds'] / 60:.1f}",
        ]
        lines.append(" | ".join(map(str, cells)))
    return "".join(f"| {line} |\n" for line in lines)


def _cell(setting: Any) -> Any:
    """False is a setting too."""
    return "-" if setting in (None, "") else setting


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def write(runs: Path, out: Path) -> str:
    """Writes the two files; the table, or one for each measure that runs have.

    Raises:
        FileNotFoundError: there is no finished run.
    """
    results = gather(runs)
    cli.with_ending(out, ".json").write_text(json.dumps(results, indent=1) + "\n")
    tables = []
    for measure in (ACCURACY, F1):
        tested = [result for result in results if f"test_{measure.name}" in result["metrics"]]
        if tested:
            tables.append(table(tested, measure))
    if not tables:
        return f"{cli.with_ending(out, '.json')}: {len(results)} runs"
    text = "\n".join(tables)
    cli.with_ending(out, ".md").write_text(text)
    return text.rstrip()


if __name__ == "__main__":
    sys.exit(cli.gathering_main(__doc__, write))
