"""Figures of `experiments.hardware`: counterparts of VS-Quant's figures 3 to 7."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import qat_jax as qj
from experiments.accuracies import Accuracies
from experiments.figures import BLACK, BLUE, GREEN, GREY, ORANGE, SKY, VERMILION

_DPI = 110
_MOST_LOST = 12.0  # points below float that are still drawn
_KINDS = {  # colour and marker
    "one scale a channel, layer": (GREY, "s"),
    "vector scales of both": (BLUE, "o"),
    "vector scales of one": (SKY, "^"),
    "block format": (VERMILION, "*"),
}
_LOSS_BANDS = ((0.5, GREEN), (1.0, SKY), (2.0, ORANGE), (_MOST_LOST, VERMILION))
_LANDMARKS = ("8/8/-/-", "6/6/-/-", "4/4/-/-", "4/4/4/6", "4/8/4/6")
_LETTER = 5.0  # width of a letter of a name, in points
_TICKS = (-1, -0.5, 0, 0.5, 1, 2, 5, 10)
Row = Mapping[str, Any]


def fit(path: Path, points: Mapping[str, Sequence[Row]]) -> None:
    """Every published point beside what the model says, fitted and left out.

    Args:
        path: the PNG to write.
        points: by measure, as in published.csv.
    """
    figure = Figure(figsize=(12, 6.4), layout="constrained")
    for axes, (measure, rows) in zip(figure.subplots(1, len(points)), points.items(), strict=True):
        rows = sorted(rows, key=lambda row: row["published"])
        places = np.arange(len(rows))
        axes.plot([row["published"] for row in rows], places, "o", color=BLACK, label="published")
        axes.plot([row["modelled"] for row in rows], places, "x", color=BLUE, label="modelled")
        left_out = [
            (row["left_out"], y) for row, y in zip(rows, places, strict=True) if row["left_out"]
        ]
        axes.plot(*zip(*left_out, strict=True), "|", color=ORANGE, markersize=12, mew=2,
                  label="predicted, the point left out")  # fmt: skip
        axes.set_yticks(places, [row["design"] for row in rows])
        axes.set_xlabel(f"{measure}, relative to 8/8/-/-")
        axes.set_title(f"{measure.capitalize()} of the processing element"
                       if measure == "area" else "Energy of an operation")  # fmt: skip
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right", fontsize=9)
    figure.savefig(path, dpi=_DPI)


def rounding(path: Path, rows: Sequence[Row]) -> None:
    """Energy by the bits of the scale product: published, and as modelled (figure 3).

    Args:
        path: the PNG to write.
        rows: as in rounding.csv.
    """
    designs = list(dict.fromkeys(row["design"] for row in rows))
    series = {"published": BLACK, "width_alone": SKY, "gated": ORANGE}
    names = {
        "published": "published",
        "width_alone": "modelled: narrower product",
        "gated": "modelled: zero products skipped, as measured",
    }
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    grid = figure.subplots(1, len(designs), sharey=True, squeeze=False)
    for axes, design in zip(grid[0], designs, strict=True):
        mine = [row for row in rows if row["design"] == design]
        present = [name for name in series if name in mine[0]]
        for place, name in enumerate(present):
            offset = (place - (len(present) - 1) / 2) * 0.27
            axes.bar(np.arange(len(mine)) + offset, [row[name] for row in mine], 0.25,
                     color=series[name], label=names[name])  # fmt: skip
        axes.set_xticks(np.arange(len(mine)), [row["column"] for row in mine])
        axes.set_title(design)
        axes.set_axisbelow(True)
        axes.grid(axis="y", alpha=0.3)
    figure.axes[0].set_ylabel("energy, relative to 8/8/-/-")
    figure.supxlabel("bits of the scale product")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    figure.savefig(path, dpi=_DPI)


def design_space(path: Path, rows: Sequence[Row], networks: Mapping[str, Accuracies]) -> None:
    """For each network what accuracy costs in area and in energy, and both costs together.

    Args:
        path: the PNG to write.
        rows: as in designs.csv.
        networks: the accuracies among them.
    """
    figure = Figure(figsize=(16, 5.0 * len(networks)), layout="constrained")
    grid = figure.subplots(len(networks), 3, squeeze=False)
    panels: list[tuple[Axes, dict[str, tuple[float, float]], list[str]]] = []
    for axes, (name, network) in zip(grid, networks.items(), strict=True):
        known = [row for row in rows if row[f"{name}_percent"] != ""]
        lost = {row["design"]: network.in_float - row[f"{name}_percent"] for row in known}
        drawn = [row for row in known if lost[row["design"]] <= _MOST_LOST]
        first = [r["design"] for r in drawn if _kind(r["design"]) == "block format"]
        first += [design for design in _LANDMARKS if design in lost]
        for part, cost in [(axes[0], "area"), (axes[1], "energy")]:
            front = f"{name}_{cost}_front"
            _accuracy_panel(part, drawn, lost, cost, front)
            part.set_title(f"{network.label}, {network.in_float:.1f} % in float", fontsize=11)
            places = {row["design"]: (row[cost], lost[row["design"]]) for row in drawn}
            best = [row["design"] for row in drawn if row[front]]
            panels.append((part, places, [*first, *best]))
        _cost_panel(axes[2], rows, drawn, lost)
        axes[2].set_title(f"{network.label}: area and energy", fontsize=11)
        places = {row["design"]: (row["area"], row["energy"]) for row in drawn}
        panels.append((axes[2], places, first))
    figure.draw_without_rendering()  # settles where points are on the page
    for part, places, names in panels:
        _Names(part, places).write([name for name in dict.fromkeys(names) if name in places])
    figure.savefig(path, dpi=_DPI)


def _accuracy_panel(
    axes: Axes, rows: Sequence[Row], lost: Mapping[str, float], cost: str, front: str
) -> None:
    for kind, (colour, marker) in _KINDS.items():
        mine = [row for row in rows if _kind(row["design"]) == kind]
        if mine:
            axes.plot([row[cost] for row in mine], [lost[row["design"]] for row in mine], marker,
                      color=colour, label=kind, alpha=0.75, mec="white",
                      markersize=15 if marker == "*" else 8)  # fmt: skip
    best = sorted((row for row in rows if row[front]), key=lambda row: row[cost])
    axes.step([row[cost] for row in best], [lost[row["design"]] for row in best], where="post",
              color=BLACK, linewidth=1, label="Pareto front", zorder=0)  # fmt: skip
    axes.set_yscale("symlog", linthresh=1)
    low, high = axes.get_ylim()
    low, high = min(low, -0.7), 1.25 * high
    ticks = [tick for tick in _TICKS if low <= tick <= high]
    axes.set_yticks(ticks, labels=map(str, ticks))
    axes.minorticks_off()
    axes.set_ylim(high, low)  # the better, the higher
    axes.margins(x=0.12)
    axes.set_xlabel(f"{cost}, relative to 8/8/-/-")
    axes.set_ylabel("points below float")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower right")


def _cost_panel(
    axes: Axes, rows: Sequence[Row], known: Sequence[Row], lost: Mapping[str, float]
) -> None:
    """Every design in grey, the measured ones coloured by what they lose."""
    axes.plot([row["area"] for row in rows], [row["energy"] for row in rows], ".", color="0.85",
              label="all designs", zorder=0)  # fmt: skip
    least = -np.inf
    for most, colour in _LOSS_BANDS:
        mine = [row for row in known if least < lost[row["design"]] <= most]
        for block in (False, True):
            part = [row for row in mine if (_kind(row["design"]) == "block format") == block]
            axes.plot([row["area"] for row in part], [row["energy"] for row in part],
                      "*" if block else "o", color=colour, mec="white",
                      markersize=15 if block else 8,
                      label=None if block else f"up to {most:g} points lost")  # fmt: skip
        least = most
    axes.set_xlabel("area, relative to 8/8/-/-")
    axes.set_ylabel("energy, relative to 8/8/-/-")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="upper left")


def _kind(design: str) -> str:
    if "/" not in design:
        return "block format"
    notation = qj.Notation.parse(design)
    scales = [notation.weight_scale, notation.activation_scale].count(None)
    return ("vector scales of both", "vector scales of one", "one scale a channel, layer")[scales]


class _Names:
    """Writes names beside the points of a panel; leaves out those for which there is no room.

    Args:
        axes: the panel, its limits and layout settled.
        places: of all points by name, in the panel's units; none is written over.
    """

    def __init__(self, axes: Axes, places: Mapping[str, tuple[float, float]]):
        self.axes = axes
        self.places = places
        self.point = axes.figure.dpi / 72  # pixels
        # Rectangles in use: left, bottom, right, top, in points of 1/72 inch.
        points = [self._place(*place) for place in places.values()]
        self.taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in points]

    def write(self, names: Sequence[str]) -> None:
        """Names points, the first ones first, where nothing is in the way."""
        for name in names:
            half = _LETTER * len(name) / 2
            x, y = self._place(*self.places[name])
            aside = half + 9
            near = [(0, 11), (0, -11), (aside, 0), (-aside, 0), (aside, 9), (aside, -9)]
            for dx, dy in [*near, (0, 21), (0, -21)]:
                box = (x + dx - half, y + dy - 5, x + dx + half, y + dy + 5)
                if self._inside(box) and not any(_overlap(box, other) for other in self.taken):
                    self.taken.append(box)
                    self.axes.annotate(name, self.places[name], xytext=(dx, dy),
                                       textcoords="offset points", ha="center", va="center",
                                       fontsize=8)  # fmt: skip
                    break

    def _place(self, x: float, y: float) -> tuple[float, float]:
        left, bottom = self.axes.transData.transform((x, y))
        return float(left) / self.point, float(bottom) / self.point

    def _inside(self, box: tuple[float, float, float, float]) -> bool:
        panel = [edge / self.point for edge in self.axes.bbox.bounds]
        left, bottom, width, height = panel
        return (
            left <= box[0]
            and bottom <= box[1]
            and box[2] <= left + width
            and box[3] <= bottom + height
        )


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
