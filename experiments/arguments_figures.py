"""Figures of `experiments.arguments`."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, ScalarFormatter
from numpy.typing import ArrayLike

from experiments import figures
from experiments.gradient_flow import RULES, Flow
from experiments.outliers import Outliers
from experiments.vector_ranges import Ranges, RangesRow
from qat_jax.nnx import is_weight

_RULE_COLOURS = {"ste": figures.VERMILION, "pwl": figures.GREY, "mad": figures.BLUE}
_SIZE, _DPI = (11.0, 4.4), 120  # inches, dots an inch

Curve = tuple[figures.ErrorCurve, Outliers]


def errors(path: Path, curves: Mapping[str, Sequence[Curve]]) -> None:
    """Draws the error against the threshold, a panel for each operand.

    Args:
        path: the PNG to write.
        curves: by operand, for each number of bits the curve and the exact optimum.
    """
    figure, panels = _panels(len(curves))
    for axes, (operand, drawn) in zip(panels, curves.items(), strict=True):
        for curve, row in drawn:
            _draw_curve(axes, curve, row, labelled=curve is drawn[0][0])
        axes.set(
            xscale="log",
            yscale="log",
            xlabel="clipping threshold",
            ylabel="mean squared error / mean square",
            title=operand,
        )
        axes.margins(y=0.12)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
    panels[0].legend(frameon=False, loc="lower left", fontsize="small")
    figure.savefig(path)


def _draw_curve(axes: Axes, curve: figures.ErrorCurve, row: Outliers, *, labelled: bool) -> None:
    axes.plot(curve.thresholds, curve.errors, color=figures.GREEN)
    marks: list[tuple[str, str, str, int, ArrayLike, ArrayLike]] = [
        ("maximum", "s", figures.ORANGE, 7, [curve.maximum], [curve.maximum_error]),
        ("Newton iterates", "o", figures.SKY, 4, curve.iterates, curve.iterate_errors),
        ("OCTAV", "*", figures.BLUE, 13, curve.iterates[-1:], curve.iterate_errors[-1:]),
        ("exact optimum", "v", figures.BLACK, 5, [row.exact], [row.exact_error]),
    ]
    for name, marker, face, size, thresholds, at in marks:
        label = name if labelled else None
        axes.plot(thresholds, at, marker, color=face, markersize=size, label=label)
    axes.annotate(
        f"{curve.format.bits} bits",
        (curve.maximum, curve.maximum_error),
        xytext=(8, -3),
        textcoords="offset points",
        color=figures.GREEN,
        weight="bold",
        annotation_clip=False,
    )


def gradients(path: Path, rows: Sequence[Flow]) -> None:
    """Draws variances along the network on the left, weights without gradient on the right.

    Args:
        path: the PNG to write.
        rows: of all operands, in the order of the network.
    """
    figure, (left, right) = _panels(2)
    activations = [row for row in rows if not is_weight(row.operand)]
    places = np.arange(1, len(activations) + 1)
    left.plot(
        places,
        [row.predicted for row in activations],
        color=figures.BLACK,
        linestyle=":",
        label="STE, predicted for a chain",
    )
    for rule in RULES:
        ratios = [getattr(row, rule) / row.pwl for row in activations]
        left.plot(places, ratios, "o-", markersize=4, color=_RULE_COLOURS[rule], label=rule.upper())
    left.set(
        yscale="log",
        xlabel="layer, from the input to the loss",
        ylabel="variance over that with PWL",
        title="Gradient of each layer's input",
    )
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    for formatted in (left.yaxis.set_major_formatter, left.yaxis.set_minor_formatter):
        formatted(ScalarFormatter())
    left.margins(y=0.25)  # for the legend
    left.legend(frameon=False, ncols=2, loc="upper center", fontsize="small")
    weights = [row for row in rows if is_weight(row.operand)]
    places = np.arange(1, len(weights) + 1)
    for rule in RULES:
        shares = [100 * getattr(row, f"{rule}_zeros") for row in weights]
        style = {"pwl": "o-", "mad": "o-", "ste": "x:"}[rule]
        right.plot(
            places, shares, style, markersize=4, color=_RULE_COLOURS[rule], label=rule.upper()
        )
    right.set(
        xlabel="layer, from the input to the loss",
        ylabel="weights without gradient, %",
        title="Weights that cannot learn",
    )
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    right.legend(frameon=False)
    figure.savefig(path)


def ranges(path: Path, seen: Mapping[str, Ranges], rows: Sequence[RangesRow]) -> None:
    """Draws one channel, the ranges of all vectors, and the errors along the network.

    Args:
        path: the PNG to write.
        seen: the ranges by operand.
        rows: of the same.
    """
    figure, (left, middle, right) = _panels(3, size=(14.0, 4.4))
    kernels = {operand: found for operand, found in seen.items() if is_weight(operand)}
    # The kernel whose channels are cut into most vectors.
    _draw_channel(left, max(kernels.items(), key=lambda item: item[1].per_group))
    _draw_shares(middle, seen)
    _draw_errors(right, [row for row in rows if is_weight(row.operand)])
    figure.savefig(path)


def _draw_channel(axes: Axes, kernel: tuple[str, Ranges]) -> None:
    operand, found = kernel
    channels = np.asarray(found.vector)
    channels = channels.reshape(-1, channels.shape[-1]).T
    largest = channels.max(1)
    # The channel in the middle by how much of its range its vectors use.
    middle = np.argsort(channels.mean(1) / largest)[len(channels) // 2]
    vectors = channels[middle]
    axes.bar(np.arange(len(vectors)), vectors, color=figures.SKY, label="each vector")
    axes.axhline(largest[middle], color=figures.BLUE, label="the channel")
    axes.axhline(largest.max(), color=figures.ORANGE, linestyle="--", label="the tensor")
    axes.set(
        xlabel=f"vector of channel {middle}",
        ylabel="largest magnitude",
        title=operand,
        ylim=(0, 1.25 * largest.max()),
    )
    axes.legend(frameon=False, ncols=3, loc="upper center", fontsize="small")


def _draw_shares(axes: Axes, seen: Mapping[str, Ranges]) -> None:
    for side, colour in (("weights", figures.BLUE), ("activations", figures.VERMILION)):
        ratios = [
            found.shares
            for operand, found in seen.items()
            if is_weight(operand) == (side == "weights") and found.per_group > 1
        ]
        # Each layer counts alike, however many vectors it has.
        weights = [np.full(len(layer), 100 / len(layer) / len(ratios)) for layer in ratios]
        axes.hist(
            np.concatenate(ratios),
            bins=40,
            range=(0, 1),
            weights=np.concatenate(weights),
            histtype="step",
            linewidth=2,
            color=colour,
            label={
                "weights": "weights, of the channel",
                "activations": "activations, of the layer",
            }[side],
        )
    axes.set(
        xlabel="range of a vector / that of its group",
        ylabel="vectors, %",
        title="Ranges of all vectors",
    )
    axes.legend(frameon=False, fontsize="small", loc="upper center")


def _draw_errors(axes: Axes, rows: Sequence[RangesRow]) -> None:
    # Without the ends, which have other bits and so errors of another size.
    bits = statistics.mode(row.bits for row in rows)
    rows = [row for row in rows if row.bits == bits]
    places = np.arange(1, len(rows) + 1)
    for name, label, colour, style in (
        ("tensor_error", "tensor", figures.ORANGE, "o-"),
        ("coarse_error", "channel", figures.BLUE, "o-"),
        ("vector_error", "vector", figures.GREEN, "o-"),
        ("stored_error", "vector, integer scales", figures.BLACK, "x:"),
    ):
        decibels = [-10 * np.log10(getattr(row, name)) for row in rows]
        axes.plot(places, decibels, style, color=colour, markersize=4, label=label)
    axes.set(
        xlabel="layer, from the input to the loss",
        ylabel="signal over quantisation error, dB",
        title=f"Kernels of {bits} bits, one scale a …",
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(y=0.2)  # for the legend
    axes.legend(frameon=False, ncols=2, loc="upper center", fontsize="small")


def _panels(count: int, size: tuple[float, float] = _SIZE) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=size, dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(np.atleast_1d(figure.subplots(1, count)))
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels
