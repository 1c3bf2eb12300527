"""CSVs, a JSON and figures from finished runs of `experiments.ptq_tables`.

Usage:
    python -m experiments.ptq_figures --runs=DIR --out=results/NAME

Reads every DIR/*/result.json and writes, for each table TABLE, results/NAME_TABLE.csv and .png; and
results/NAME.json, which has each run's command, commit, versions, device and seed. What the papers
published for ResNet-50 or BERT-base stands beside, labelled as published.
"""

import csv
import json
import math
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from experiments import cli
from experiments.collect import without_folders
from experiments.published import BEST_PER_CHANNEL, PUBLISHED
from qat_jax.training.workdir import Workdir

TITLES = {
    "calibrators": "static thresholds by calibrator, one scale an output channel or layer",
    "vectors": "vectors of 16 with floating-point scales against the best calibrator per channel",
    "sizes": "elements of a vector, floating-point scales",
    "scales": "bits of the scales of weights / activations, vectors of 16",
    "clipping": "how each vector of the weights is clipped, floating-point scales",
    "order": "which scale is found first, and what codes come from",
    "batch_norm": "clipping of the weights, batch norms as they were or re-estimated",
    "rounding": "kernels rounded to the nearest or by GPTQ",
    "smoothing": "outliers of activations moved into kernels or not, rounded by GPTQ or not",
    "depthwise": "what depthwise layers need",
    "bert_calibrators": "static thresholds by calibrator, one scale an output feature or layer",
    "bert_weight_calibrators": "static thresholds by calibrator, activations at 8 bits",
    "bert_dynamic": "thresholds found in every batch, one scale an output feature or layer",
    "bert_vectors": "vectors of 16 with floating-point scales against the best calibrator",
    "bert_rounding": "kernels rounded to the nearest or by GPTQ",
    "bert_outliers": "outliers of activations as they are, smoothed, rotated, or both",
    "bert_where": "4 bits, but 8 for one kind of operands",
    "bert_attention": "4 bits: signs of codes, and scales of attention's rows",
    "bert_scales": "bits of the scales of weights / activations, vectors of 16",
}
# Lines go over their rows.
_FEW_COLUMNS = (
    *("vectors", "rounding", "smoothing"),
    *("bert_vectors", "bert_rounding", "bert_outliers", "bert_where"),
)
# Figures whose columns, or rows in their place, are in an order: lines, where others have bars.
_IN_ORDER = ("sizes", "scales", "vectors", "bert_scales", "bert_vectors")
_TICKS = (-2, -1, -0.5, 0, 0.5, 1, 2, 5, 10, 20, 50, 80)


def write(runs: Path, out: Path) -> list[Path]:
    """Writes the files of every table found.

    Args:
        runs: the folder above the run folders.
        out: where to write, without a suffix.

    Returns:
        The files written.

    Raises:
        FileNotFoundError: there is no finished run of `ptq_tables`.
        WorkdirError: a finished run cannot be read.
    """
    results = [Workdir(path.parent).result() for path in sorted(runs.glob("*/result.json"))]
    results = [result for result in results if "cells" in result["metrics"]]
    if not results:
        raise FileNotFoundError(
            f"no finished run of ptq_tables in {runs}: give the folder above the run folders"
        )
    written = [cli.with_ending(out, ".json")]
    written[0].write_text(json.dumps([_summary(result) for result in results], indent=1) + "\n")
    per_channel = [
        cell
        for result in results
        for cell in result["metrics"]["cells"]
        if cell["table"].endswith("calibrators")
    ]
    for result in results:
        metrics = result["metrics"]
        for table in dict.fromkeys(cell["table"] for cell in metrics["cells"]):
            cells = [cell for cell in metrics["cells"] if cell["table"] == table]
            if table.endswith("vectors"):
                cells += _best_per_channel(per_channel, {cell["row"] for cell in cells})
            stem = f"{out.name}_{table}"
            _write_csv(cells, metrics["float_accuracy"], table, out.with_name(f"{stem}.csv"))
            _draw(cells, metrics, result["experiment"], table, out.with_name(f"{stem}.png"))
            written += [out.with_name(f"{stem}.csv"), out.with_name(f"{stem}.png")]
    return written


def _best_per_channel(cells: list[dict[str, Any]], rows: set[str]) -> list[dict[str, Any]]:
    """Of each row of the calibrators' table the best cell, as a column of the vectors' table."""
    best: dict[str, dict[str, Any]] = {}
    for cell in cells:
        row = cell["row"]
        if row in rows and cell["accuracy"] > best.get(row, {"accuracy": -1})["accuracy"]:
            best[row] = cell
    return [cell | {"column": BEST_PER_CHANNEL} for cell in best.values()]


def _summary(result: dict[str, Any]) -> dict[str, Any]:
    """Where the cells of a run come from."""
    kept = ("experiment", "git_commit", "versions", "device", "seed", "wall_seconds")
    summary = {key: result[key] for key in kept}
    metrics = result["metrics"]
    return summary | {
        "command": without_folders(result["command"]),
        "float_accuracy": metrics["float_accuracy"],
        "images": metrics["count"],
        "tables": sorted({cell["table"] for cell in metrics["cells"]}),
    }


def _write_csv(cells: list[dict[str, Any]], float_accuracy: float, table: str, path: Path) -> None:
    published = PUBLISHED.get(table)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        names = ["row", "column", "accuracy_percent", "float_percent", "bits_per_parameter"]
        writer.writerow([*names, *([published.column] if published else [])])
        for cell in cells:
            theirs = published.values.get(cell["row"], {}) if published else {}
            writer.writerow(
                [
                    cell["row"],
                    cell["column"],
                    f"{100 * cell['accuracy']:.1f}",
                    f"{100 * float_accuracy:.1f}",
                    f"{cell['bits_per_parameter']:.3f}",
                    *([theirs.get(cell["column"], "")] if published else []),
                ]
            )


def _draw(
    cells: list[dict[str, Any]],
    metrics: dict[str, Any],
    experiment: str,
    table: str,
    path: Path,
) -> None:
    """A line, or bars, for each row over the columns: points lost against float."""
    published = PUBLISHED.get(table)
    theirs = published.values if published else {}
    found: dict[str, dict[str, float]] = {}
    for cell in cells:
        found.setdefault(cell["row"], {})[cell["column"]] = 100 * cell["accuracy"]
    if table in _FEW_COLUMNS:
        found, theirs = _transposed(found), _transposed(theirs)
    figure = Figure(figsize=(13 if published else 9, 4.8), layout="constrained")
    axes = figure.subplots(1, 2 if published else 1, sharey=True, squeeze=False)
    colours = {row: f"C{number}" for number, row in enumerate(found)}
    float_percent = 100 * metrics["float_accuracy"]
    title = f"{experiment}: {metrics['count']} examples, float {float_percent:.1f} %"
    plot = _lines if table in _IN_ORDER else _bars
    plot(axes[0, 0], found, float_percent, colours)
    axes[0, 0].set_title(title, fontsize=10)
    error = math.sqrt(float_percent * (100 - float_percent) / metrics["count"])
    axes[0, 0].axhspan(
        -error, error, color="grey", alpha=0.15, zorder=0, label="± 1 standard error"
    )
    if published:
        title = f"as published: {published.network}, float {published.in_float} %"
        plot(axes[0, 1], theirs, published.in_float, colours)
        axes[0, 1].set_title(title, fontsize=10)
    even = math.ceil(max(error, 1))  # what is in the noise need not be told apart
    axes[0, 0].set_yscale("symlog", linthresh=even, linscale=0.6)  # of both
    axes[0, 0].set_ylabel(f"points below float, logarithmic beyond {even}")
    low, high = sorted(axes[0, 0].get_ylim())  # shared by both
    ticks = [tick for tick in _TICKS if low <= tick <= high]
    axes[0, 0].set_yticks(ticks, labels=map(str, ticks))
    axes[0, 0].set_ylim(high, low)  # the better, the higher
    figure.suptitle(TITLES[table])
    labelled: dict[str, Any] = {}
    for panel in axes.flat:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            labelled.setdefault(label, handle)
    lines = list(labelled.values())
    figure.legend(lines, list(labelled), loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=110)


def _transposed(rows: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    columns: dict[str, dict[str, float]] = {}
    for row, values in rows.items():
        for column, value in values.items():
            columns.setdefault(column, {})[row] = value
    return columns


def _lines(
    axes: Any, rows: dict[str, dict[str, float]], reference: float, colours: dict[str, str]
) -> None:
    columns = _named_columns(axes, rows)
    for row, values in rows.items():
        places = [columns.index(column) for column in values]
        lost = [reference - value for value in values.values()]
        axes.plot(places, lost, "o-", label=row, color=colours.get(row, "black"))


def _bars(
    axes: Any, rows: dict[str, dict[str, float]], reference: float, colours: dict[str, str]
) -> None:
    columns = _named_columns(axes, rows)
    width = 0.8 / max(len(rows), 1)
    for number, (row, values) in enumerate(rows.items()):
        shift = (number - (len(rows) - 1) / 2) * width
        places = [columns.index(column) + shift for column in values]
        lost = [reference - value for value in values.values()]
        axes.bar(places, lost, width, label=row, color=colours.get(row, "black"))


def _named_columns(axes: Any, rows: dict[str, dict[str, float]]) -> list[str]:
    """The columns that rows have, and ticks for them."""
    columns = list(dict.fromkeys(column for values in rows.values() for column in values))
    labels = [column.replace(", ", ",\n") for column in columns]
    axes.set_xticks(range(len(columns)), labels, rotation=30, ha="right", rotation_mode="anchor")
    axes.grid(alpha=0.3, axis="y")
    axes.set_axisbelow(True)
    return columns


def main() -> int:
    """Reads the flags, writes the files and names them."""
    return cli.gathering_main(__doc__, lambda runs, out: "\n".join(map(str, write(runs, out))))


if __name__ == "__main__":
    sys.exit(main())
