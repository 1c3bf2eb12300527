"""Figures of `experiments.hardware`: counterparts of VS-Quant's figures 3 to 7."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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
        nearest = _points(rows, network, name)
        best = _points(rows, network, f"{name}_gptq") if network.gptq else nearest
        blocks = [point.name for point in nearest if _kind(point.design) == "block format"]
        first = [*blocks, *_LANDMARKS]
        for part, cost in [(axes[0], "area"), (axes[1], "energy")]:
            _accuracy_panel(part, nearest, best, cost)
            part.set_title(f"{network.label}, {network.in_float:.1f} % in float", fontsize=11)
            places = {point.name: (point.costs[cost], point.lost) for point in [*nearest, *best]}
            ends = [point.name for point in [*best, *nearest] if point.on_front[cost]]
            panels.append((part, places, [*first, *ends]))
        _cost_panel(axes[2], rows, best)
        axes[2].set_title(f"{network.label}: area and energy", fontsize=11)
        places = {point.name: (point.costs["area"], point.costs["energy"]) for point in best}
        panels.append((axes[2], places, first))
    labelled = [axes.get_legend_handles_labels() for axes in grid[:, :2].flat]
    handles = {label: handle for pair in labelled for handle, label in zip(*pair, strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=4)
    figure.draw_without_rendering()  # settles where points are on the page
    for part, places, names in panels:
        _Names(part, places).write([name for name in dict.fromkeys(names) if name in places])
    figure.savefig(path, dpi=_DPI)


class _Point(NamedTuple):
    """A design's costs and what a network loses there."""

    design: str
    rounded: bool  # by GPTQ
    lost: float  # points below float
    costs: dict[str, float]
    on_front: dict[str, bool]

    @property
    def name(self) -> str:
        return f"{self.design} GPTQ" if self.rounded else self.design


def _points(rows: Sequence[Row], network: Accuracies, column: str) -> list[_Point]:
    """What is near enough to float to be drawn, of `column`_percent and its fronts."""
    points = []
    for row in rows:
        if row[f"{column}_percent"] == "":
            continue
        design, percent = row["design"], row[f"{column}_percent"]
        point = _Point(
            design,
            rounded=percent != network.nearest.get(design),
            lost=network.in_float - percent,
            costs={cost: row[cost] for cost in ("area", "energy")},
            on_front={cost: bool(row[f"{column}_{cost}_front"]) for cost in ("area", "energy")},
        )
        if point.lost <= _MOST_LOST:
            points.append(point)
    return points


def _accuracy_panel(
    axes: Axes, nearest: Sequence[_Point], best: Sequence[_Point], cost: str
) -> None:
    rounded = [point for point in best if point.rounded]
    for kind, (colour, marker) in _KINDS.items():
        size = 15 if marker == "*" else 8
        mine = [point for point in nearest if _kind(point.design) == kind]
        if mine:
            axes.plot([point.costs[cost] for point in mine], [point.lost for point in mine], marker,
                      color=colour, label=kind, alpha=0.75, mec="white",
                      markersize=size)  # fmt: skip
        mine = [point for point in rounded if _kind(point.design) == kind]
        if mine:
            axes.plot([point.costs[cost] for point in mine], [point.lost for point in mine], marker,
                      mfc="white", mec=colour, mew=2, markersize=size,
                      label=f"{kind}, rounded by GPTQ")  # fmt: skip
    fronts = {"Pareto front": (nearest, "-")}
    if rounded:
        fronts["Pareto front, GPTQ included"] = (best, "--")
    for label, (points, style) in fronts.items():
        places = sorted((p.costs[cost], p.lost) for p in points if p.on_front[cost])
        axes.step(*zip(*places, strict=True), style, where="post", color=BLACK, linewidth=1,
                  label=label, zorder=0)  # fmt: skip
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


def _cost_panel(axes: Axes, rows: Sequence[Row], points: Sequence[_Point]) -> None:
    """Every design in grey, the measured ones coloured by what they lose."""
    axes.plot([row["area"] for row in rows], [row["energy"] for row in rows], ".", color="0.85",
              label="all designs", zorder=0)  # fmt: skip
    least = -np.inf
    for most, colour in _LOSS_BANDS:
        mine = [point for point in points if least < point.lost <= most]
        for block in (False, True):
            part = [point for point in mine if (_kind(point.design) == "block format") == block]
            axes.plot([point.costs["area"] for point in part],
                      [point.costs["energy"] for point in part],
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
    without = qj.Notation.parse(design).vector_scales.count(None)
    return ("vector scales of both", "vector scales of one", "one scale a channel, layer")[without]


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
