"""Tables that mains leave as CSV."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]], *, digits: int | None = None) -> None:
    """A line for each row; all have the columns of the first.

    Args:
        path: the file.
        rows: at least one.
        digits: significant ones of floats; None keeps all.
    """

    def cell(value: Any) -> Any:
        return f"{value:.{digits}g}" if digits is not None and isinstance(value, float) else value

    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: cell(value) for name, value in row.items()} for row in rows)
