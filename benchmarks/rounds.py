"""Contestants that run in turn, round by round, and what they took over the first of them."""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from rich.console import Console
from rich.table import Table


class Timed(Protocol):
    """Something that runs and keeps the seconds of each run."""

    seconds: list[float]

    def run(self, inputs: Any) -> None:
        """One timed run."""
        ...


def run(contestants: Mapping[str, Timed], inputs: Any, rounds: int) -> None:
    """Each of them once a round."""
    for round_ in range(rounds):
        print(f"round {round_ + 1} of {rounds}", file=sys.stderr)
        for contestant in contestants.values():
            contestant.run(inputs)


def ratios(seconds: Sequence[float], base: Sequence[float], prefix: str = "") -> dict[str, float]:
    """Median seconds, and median, least and largest ratio to the baseline of the same round."""
    found = np.array(seconds) / np.array(base)
    return {
        f"{prefix}seconds": float(np.median(seconds)),
        f"{prefix}ratio": float(np.median(found)),
        f"{prefix}ratio_min": float(found.min()),
        f"{prefix}ratio_max": float(found.max()),
    }


def show(
    rows: Mapping[str, Mapping[str, float]],
    title: str,
    what: str,
    baseline: str,
    others: Mapping[str, Callable[[Mapping[str, float]], str]],
    prefix: str = "",
) -> None:
    """Print a table.

    Args:
        rows: `ratios` and more, by contestant.
        title: over the table.
        what: ran.
        baseline: the name of what others are compared with.
        others: further columns.
        prefix: as of `ratios`.
    """
    table = Table(title=title)
    table.add_column(what)
    for heading in ("seconds", f"over {baseline}", "min … max", *others):
        table.add_column(heading, justify="right")
    for name, row in rows.items():
        table.add_row(
            name,
            f"{row[f'{prefix}seconds']:.3f}",
            f"{row[f'{prefix}ratio']:.2f}",
            f"{row[f'{prefix}ratio_min']:.2f} … {row[f'{prefix}ratio_max']:.2f}",
            *(cell(row) for cell in others.values()),
        )
    Console().print(table)
