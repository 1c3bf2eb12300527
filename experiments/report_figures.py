"""Figures of finished runs beside one another, on light and on dark paper."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from io import BytesIO
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments import figures
from experiments.records import FLOAT_BITS, Group, Run

_LINE_COLOURS = (
    figures.BLUE, figures.VERMILION, figures.GREEN, figures.ORANGE, figures.SKY, "#CC79A7",
)  # fmt: skip
_PAPER = ("figure.facecolor", "axes.facecolor", "savefig.facecolor")
_INKED = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
_INK = {False: "#222222", True: "#e6e6e6"}
_DPI = 110
_WIDTH = 7.2  # inches
_PANELS = 6  # runs whose operands are drawn over time
_FIGURES = {"sqnr_db": "SQNR, dB", "clipped_fraction": "clipped, %"}


@dataclasses.dataclass(frozen=True)
class Drawing:
    """A figure in both colour schemes.

    Attributes:
        name: of its files.
        title: above it.
        says: below it: how to read it.
        light: PNG, dark ink on nothing.
        dark: PNG, light ink on nothing.
    """

    name: str
    title: str
    says: str
    light: bytes
    dark: bytes


def drawings(groups: Sequence[Group]) -> Iterator[Drawing]:
    """All figures that the runs give cause for."""
    measured = [g for g in groups if g.headline is not None and g.bits is not None]
    if len({g.bits for g in measured}) > 1:
        yield _drawing(
            "accuracy",
            "Accuracy against bits",
            "Mean over the seeds; bars are their sample standard deviation. Dashed: float.",
            lambda: _accuracy(measured),
        )
    trained = [g for g in groups if any(_losses(run)[0].size for run in g.runs)]
    if trained:
        yield _drawing(
            "loss",
            "Loss in training",
            "Mean over the seeds, smoothed over a fortieth of the run.",
            lambda: _loss(trained),
        )
    watched = [g for g in groups if any("threshold_over_max" in key for key in _over_time(g))]
    if watched:
        yield _drawing(
            "thresholds",
            "Thresholds in training",
            "Of each operand, over its largest magnitude: at 1 nothing is clipped. First seed.",
            lambda: _thresholds(watched[:_PANELS]),
        )
    diagnosed = [g for g in groups if g.runs[0].diagnostics]
    for figure, label in _FIGURES.items():
        if any(figure in d for g in diagnosed for d in g.runs[0].diagnostics.values()):
            yield _drawing(
                figure,
                f"Each operand: {label}",
                "In the last step, or after quantisation. First seed.",
                functools.partial(heat_map, diagnosed, figure, label),
            )


def _drawing(name: str, title: str, says: str, draw: Callable[[], Figure]) -> Drawing:
    pages = []
    for dark in (False, True):
        style: Any = {**dict.fromkeys(_PAPER, "none"), **dict.fromkeys(_INKED, _INK[dark])}
        with mpl.rc_context({**style, "legend.framealpha": 0.0}):
            page = BytesIO()
            draw().savefig(page, dpi=_DPI, format="png")
            pages.append(page.getvalue())
    return Drawing(name, title, says, *pages)


def _accuracy(groups: Sequence[Group]) -> Figure:
    figure = Figure(figsize=(_WIDTH, 4.2), layout="constrained")
    axes = figure.subplots()
    series: dict[str, list[Group]] = {}
    in_float = {group.runs[0].in_float for group in groups}
    for group in groups:
        if group.bits == FLOAT_BITS:
            in_float.add((group.headline or ("", np.nan))[1])
        else:
            series.setdefault(group.series, []).append(group)
    for accuracy in in_float:
        if accuracy is not None:
            axes.axhline(100 * accuracy, linestyle="--", color=figures.GREY)
    for number, (label, found) in enumerate(series.items()):
        points = sorted((g.bits or 0, *(g.headline or ("", np.nan, 0.0))[1:]) for g in found)
        bits, means, spreads = (np.asarray(column, float) for column in zip(*points, strict=True))
        # Side by side, so that bars of equal bits can be told apart.
        offset = 0.04 * (number - (len(series) - 1) / 2)
        colour = _LINE_COLOURS[number % len(_LINE_COLOURS)]
        axes.errorbar(
            bits + offset,
            100 * means,
            100 * spreads,
            fmt="o-",
            capsize=3,
            label=label,
            color=colour,
        )
    axes.set_xticks(sorted({g.bits for g in groups if g.bits not in (None, FLOAT_BITS)}))
    name = next(g.headline[0] for g in groups if g.headline)
    axes.set(xlabel="bits of the weights", ylabel=f"{name.replace('_', ' ')}, %")
    axes.grid(alpha=0.25)
    if len(series) > 1:
        axes.legend()
    return figure


def _loss(groups: Sequence[Group]) -> Figure:
    figure = Figure(figsize=(_WIDTH, 4.2), layout="constrained")
    axes = figure.subplots()
    for number, group in enumerate(groups):
        curves = [_losses(run) for run in group.runs]
        steps = curves[0][0]
        alike = [losses for at, losses in curves if np.array_equal(at, steps)]
        smooth = _smoothed(np.mean(alike, axis=0))
        colour = _LINE_COLOURS[number % len(_LINE_COLOURS)]
        style = ("-", "--", ":")[number // len(_LINE_COLOURS) % 3]
        axes.plot(steps, smooth, style, label=group.label, color=colour)
    axes.set(xlabel="step", ylabel="training loss", yscale="log")
    axes.grid(alpha=0.25)
    _legend_below(figure, axes, len(groups))
    return figure


def _thresholds(groups: Sequence[Group]) -> Figure:
    figure = Figure(figsize=(_WIDTH, 2.6 * len(groups)), layout="constrained")
    panels = figure.subplots(len(groups), sharex=True, squeeze=False)[:, 0]
    for axes, group in zip(panels, groups, strict=True):
        found = {k: v for k, v in _over_time(group).items() if k.endswith("threshold_over_max")}
        colours = mpl.colormaps["viridis"](np.linspace(0.1, 0.9, len(found)))
        for (_, points), colour in zip(found.items(), colours, strict=True):
            axes.plot(*zip(*points, strict=True), color=colour, linewidth=1)
        axes.set(ylabel="threshold / maximum", ylim=(0, 1.05))
        axes.set_title(group.label, fontsize=9)
        axes.grid(alpha=0.25)
    panels[-1].set_xlabel("step; first layers dark, last ones light")
    return figure


def heat_map(groups: Sequence[Group], name: str, label: str) -> Figure:
    """A figure of each operand, one column a group; cells of no finite number are blank."""
    operands = list(dict.fromkeys(path for g in groups for path in g.runs[0].diagnostics))
    factor = 100 if name.endswith("fraction") else 1
    values = np.ma.masked_invalid(
        [
            [factor * g.runs[0].diagnostics.get(path, {}).get(name, np.nan) for g in groups]
            for path in operands
        ]
    )
    height = 1.4 + 0.2 * len(operands)
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values, aspect="auto", cmap="viridis")
    axes.set_yticks(range(len(operands)), operands, fontsize=7)
    labels = [g.label.replace(", ", "\n") for g in groups]
    axes.set_xticks(range(len(groups)), labels, fontsize=7)
    if len(groups) <= 8:
        middle = (values.min() + values.max()) / 2
        for (row, column), value in np.ma.ndenumerate(values):
            ink = "black" if value > middle else "white"
            axes.text(column, row, f"{value:.1f}", ha="center", va="center", color=ink, size=6)
    figure.colorbar(image, label=label, shrink=min(1.0, 4 / height))
    return figure


def _legend_below(figure: Figure, axes: Axes, count: int) -> None:
    if count > 1:
        handles, labels = axes.get_legend_handles_labels()
        columns = 2 if max(map(len, labels)) < 50 else 1
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8)


def _losses(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Steps and training losses."""
    lines = [line for line in run.lines if line["split"] == "train" and "loss" in line]
    steps, losses = ([line[key] for line in lines] for key in ("step", "loss"))
    return np.asarray(steps), np.asarray(losses, float)


def _over_time(group: Group) -> dict[str, list[tuple[int, float]]]:
    """Of the first seed: of each figure of each operand its steps and values."""
    found: dict[str, list[tuple[int, float]]] = {}
    for line in group.runs[0].lines:
        for key, value in line.items():
            if key.startswith("diagnostics/"):
                found.setdefault(key, []).append((line["step"], value))
    return found


def _smoothed(losses: np.ndarray) -> np.ndarray:
    window = max(len(losses) // 40, 1)
    padded = np.pad(losses, (window // 2, window - 1 - window // 2), mode="edge")
    return np.convolve(padded, np.full(window, 1 / window), mode="valid")
