"""Accuracies that this project has measured, by what the hardware has to do for them."""

import csv
import dataclasses
from pathlib import Path

from ml_collections import ConfigDict

import qat_jax as qj

Percents = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Accuracies:
    """Of one network.

    Attributes:
        label: the network and its data.
        in_float: per cent.
        nearest: by W/A/ws/as without U, or by the name of a block format, kernels rounded to the
            nearest. Of several measurements of the same, the best.
        gptq: the same with kernels rounded by `qj.gptq`; may be empty.
    """

    label: str
    in_float: float
    nearest: Percents
    gptq: Percents

    def best(self) -> Percents:
        """Of either rounding."""
        return _best(self.nearest, self.gptq)


def read(network: ConfigDict) -> Accuracies:
    """Reads the tables of `experiments.ptq_figures`.

    Args:
        network: `vectors` is a CSV whose columns are bits of scales, `per_channel` one of whose
            columns only `per_channel_column` counts, `gptq` one of the table "rounding", or None.
            Rows are bits, and may say more after a comma.

    Raises:
        FileNotFoundError: there is no such CSV.
        ValueError: the CSV has no such columns.
    """
    vectors, per_channel = _rows(network.vectors), _rows(network.per_channel)
    rounded = [] if network.gptq is None else _rows(network.gptq)
    return Accuracies(
        network.label,
        in_float=_number(vectors[0], "float_percent"),
        nearest=_best(_percents(vectors), _percents(per_channel, network.per_channel_column)),
        gptq=_percents(rounded, "GPTQ"),
    )


def _percents(rows: list[dict[str, str]], column: str | None = None) -> Percents:
    """By notation: of one column, or, if columns are bits of scales, of all.

    Floating-point vector scales are passed over: no integer datapath multiplies them.
    """
    percents: Percents = {}
    for row in rows:
        if column not in (None, row["column"]):
            continue
        scales = row["column"] if column is None else "-/-"
        bits = row["row"].partition(",")[0]
        notation = qj.Notation.parse(bits if bits.count("/") == 3 else f"{bits}/{scales}")
        if any(isinstance(scale, str) for scale in notation.vector_scales):
            continue
        name = str(dataclasses.replace(notation, unsigned=False))
        percents[name] = max(percents.get(name, 0.0), _number(row, "accuracy_percent"))
    return percents


def _best(some: Percents, others: Percents) -> Percents:
    return some | {name: max(percent, some.get(name, percent)) for name, percent in others.items()}


def _number(row: dict[str, str], name: str) -> float:
    try:
        return float(row[name])
    except (TypeError, ValueError):
        where = f"row {row['row']}, column {row['column']}"
        raise ValueError(f"the {name} of {where} is no number: {row[name]!r}") from None


def _rows(path: str) -> list[dict[str, str]]:
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"no table {path}: make it with experiments.ptq_figures, or drop its network"
        )
    with Path(path).open(newline="") as file:
        rows = list(csv.DictReader(file))
    needed = {"row", "column", "accuracy_percent", "float_percent"}
    if not rows or not needed <= rows[0].keys():
        raise ValueError(f"{path} is no table of experiments.ptq_figures: name one in networks")
    return rows
