"""Accuracies that this project has measured, by what the hardware has to do for them."""

import csv
import dataclasses
from pathlib import Path

from ml_collections import ConfigDict

import qat_jax as qj


@dataclasses.dataclass(frozen=True)
class Accuracies:
    """Of one network.

    Attributes:
        label: the network and its data.
        in_float: per cent.
        percents: by W/A/ws/as without U, or by the name of a block format. Of several measurements
            of the same, the best.
    """

    label: str
    in_float: float
    percents: dict[str, float]


def read(network: ConfigDict) -> Accuracies:
    """Reads the tables of `experiments.ptq_figures`.

    Args:
        network: `vectors` is a CSV whose columns are bits of scales, `per_channel` one of whose
            columns only `per_channel_column` counts. Rows are bits, and may say more after a comma.
            Floating-point vector scales are passed over: no integer datapath multiplies them.

    Raises:
        FileNotFoundError: there is no such CSV.
        ValueError: the CSV has no such columns.
    """
    percents: dict[str, float] = {}
    in_float = float("nan")
    for path, column in [
        (network.vectors, None),
        (network.per_channel, network.per_channel_column),
    ]:
        for row in _rows(Path(path)):
            in_float = float(row["float_percent"])
            if column not in (None, row["column"]):
                continue
            scales = row["column"] if column is None else "-/-"
            bits = row["row"].partition(",")[0]
            notation = qj.Notation.parse(bits if bits.count("/") == 3 else f"{bits}/{scales}")
            if isinstance(notation.weight_scale, str) or isinstance(notation.activation_scale, str):
                continue
            name = str(dataclasses.replace(notation, unsigned=False))
            percents[name] = max(percents.get(name, 0.0), float(row["accuracy_percent"]))
    return Accuracies(network.label, in_float, percents)


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        raise FileNotFoundError(
            f"no table {path}: make it with experiments.ptq_figures, or drop its network"
        )
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    needed = {"row", "column", "accuracy_percent", "float_percent"}
    if not rows or not needed <= rows[0].keys():
        raise ValueError(f"{path} is no table of experiments.ptq_figures: name one in networks")
    return rows
