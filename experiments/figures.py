"""Figures of the mains, and the numbers they show."""

import dataclasses
import itertools
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

import qat_jax as qj
from qat_jax.clipping import Clipping

# Okabe and Ito's colours, which colour-blind people can tell apart.
ORANGE, SKY, GREEN = "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILION = "#0072B2", "#D55E00"
BLACK, GREY = "#000000", "#7F7F7F"
FAMILY_COLOURS = {"float32": GREY, "max": ORANGE, "octav": BLUE}
CURVE_STYLES = ((GREEN, (-9, -11)), (VERMILION, (11, 4)))  # with the offset of its notes
NEWTON_STEPS = 10
_SWEPT = 400
_NAMED_ITERATES = 3  # the later ones lie too close together
_SIZE, _DPI = (13.0, 5.5), 120  # inches, dots an inch


@dataclasses.dataclass(frozen=True)
class ErrorCurve:
    """The true quantisation error of one array against the clipping threshold.

    Attributes:
        format: what the array is quantised to.
        thresholds: where the error was measured.
        errors: the mean squared error there, relative to the mean square of the array.
        maximum: the threshold of max scaling.
        maximum_error: the error there.
        iterates: OCTAV's start and Newton iterates, s_0 … s_10.
        iterate_errors: the errors there.
    """

    format: qj.Int
    thresholds: np.ndarray
    errors: np.ndarray
    maximum: float
    maximum_error: float
    iterates: np.ndarray
    iterate_errors: np.ndarray

    def summary(self) -> dict[str, Any]:
        """The marked points as JSON values; errors are relative to the mean square."""
        best = int(np.argmin(self.errors))
        return {
            "bits": self.format.bits,
            "max": {"threshold": self.maximum, "error": self.maximum_error},
            "octav": {
                "iterates": self.iterates.tolist(),
                "error": float(self.iterate_errors[-1]),
            },
            "least": {
                "threshold": float(self.thresholds[best]),
                "error": float(self.errors[best]),
            },
        }


@dataclasses.dataclass(frozen=True)
class Bar:
    """One bar of accuracies.

    Attributes:
        label: below the bar.
        family: a key of `FAMILY_COLOURS`.
        percents: the accuracies of the seeds, in percent.
    """

    label: str
    family: str
    percents: Sequence[float]

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return statistics.fmean(self.percents)

    @property
    def spread(self) -> float:
        """The sample standard deviation over the seeds; 0 for one seed."""
        return statistics.stdev(self.percents) if len(self.percents) > 1 else 0.0


def error_curve(x: jax.Array, format: qj.Int, lowest: float = 0.03) -> ErrorCurve:
    """Sweeps the threshold, quantises with each and measures the error that is really made.

    Args:
        x: any array that is not all zeros; one threshold for the whole of it.
        format: what to quantise to.
        lowest: where the sweep begins, relative to the maximum.
    """
    quantizer = qj.Quantizer(format)

    @jax.jit
    def swept(x: jax.Array, lowest: float) -> tuple[jax.Array, jax.Array]:
        def error(threshold: jax.Array) -> jax.Array:
            return jnp.mean(jnp.square(qj.fake_quant(x, quantizer, threshold=threshold) - x))

        newton = (qj.Octav(iterations=n) for n in range(NEWTON_STEPS + 1))
        rules: list[Clipping] = [qj.AbsMax(), *newton]
        marked = jnp.stack([rule.threshold(x, format, tuple(range(x.ndim))) for rule in rules])
        marked = marked.reshape(-1)
        thresholds = jnp.append(marked, marked[0] * jnp.geomspace(lowest, 1.1, _SWEPT))
        return thresholds, jax.lax.map(error, thresholds) / jnp.mean(jnp.square(x))

    thresholds, errors = (np.asarray(found, np.float64) for found in swept(x, lowest))
    newton, sweep = slice(1, 2 + NEWTON_STEPS), slice(2 + NEWTON_STEPS, None)
    return ErrorCurve(
        format=format,
        thresholds=thresholds[sweep],
        errors=errors[sweep],
        maximum=float(thresholds[0]),
        maximum_error=float(errors[0]),
        iterates=thresholds[newton],
        iterate_errors=errors[newton],
    )


def quickstart(path: Path, curves: Sequence[ErrorCurve], layer: str, bars: Sequence[Bar]) -> None:
    """Draws error curves on the left and accuracies on the right.

    Args:
        path: the PNG to write.
        curves: of the same array, one for each format, the lower one first.
        layer: whose input that array is.
        bars: left to right.
    """
    figure = Figure(figsize=_SIZE, dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.1))
    _draw_curves(left, curves, layer)
    _draw_bars(right, bars)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def _draw_curves(axes: Axes, curves: Sequence[ErrorCurve], layer: str) -> None:
    for curve, (colour, offset) in zip(curves, itertools.cycle(CURVE_STYLES), strict=False):
        marks: list[tuple[str, str, str, int, ArrayLike, ArrayLike]] = [
            ("max scaling", "s", ORANGE, 9, [curve.maximum], [curve.maximum_error]),
            ("OCTAV: Newton iterates", "o", SKY, 6, curve.iterates, curve.iterate_errors),
            ("OCTAV: result", "*", BLUE, 17, curve.iterates[-1:], curve.iterate_errors[-1:]),
        ]
        axes.plot(curve.thresholds, curve.errors, color=colour, linewidth=2)
        for name, marker, face, size, thresholds, errors in marks:
            axes.plot(
                thresholds,
                errors,
                marker,
                label=name if curve is curves[0] else None,
                color=face,
                markersize=size,
                markeredgecolor="black",
            )
        for n, point in enumerate(zip(curve.iterates, curve.iterate_errors, strict=True)):
            if n < _NAMED_ITERATES:
                _note(axes, f"$s_{n}$", point, offset=offset)
        end = curve.thresholds[-1], curve.errors[-1]
        _note(axes, f"{curve.format.bits} bits", end, offset=(0, 10), color=colour, ha="right")
    axes.set_yscale("log")
    axes.set_xlabel("clipping threshold s, in the units of the input")
    axes.set_ylabel("mean squared error / mean square")
    axes.set_title(f"Quantisation error of the input of {layer} (float32 model)")
    axes.legend(frameon=False, loc="center right")


def _draw_bars(axes: Axes, bars: Sequence[Bar]) -> None:
    lowest = min(min(*bar.percents, bar.mean - bar.spread) for bar in bars)
    floor = max(0.0, 5 * math.floor((lowest - 1) / 5))
    for position, bar in enumerate(bars):
        mean, spread = bar.mean, bar.spread
        axes.bar(position, mean - floor, bottom=floor, color=FAMILY_COLOURS[bar.family], width=0.7)
        axes.errorbar(position, mean, spread, color=BLACK, capsize=5, linewidth=1.5)
        axes.plot(
            np.full(len(bar.percents), position + 0.2),
            bar.percents,
            "o",
            color="white",
            markeredgecolor=BLACK,
            markersize=5,
        )
        top = position, max(mean + spread, *bar.percents)
        _note(axes, f"{mean:.1f}", top, offset=(0, 5))
    axes.set_xticks(range(len(bars)), [bar.label for bar in bars])
    axes.set_ylim(floor, 100 + 0.06 * (100 - floor))
    axes.set_ylabel(f"test accuracy in % (the axis starts at {floor:g})")
    axes.set_title("Test accuracy: mean and standard deviation; a dot is one seed")


def _note(
    axes: Axes,
    text: str,
    point: tuple[float, float],
    *,
    offset: tuple[int, int],
    color: str = BLACK,
    ha: str = "center",
) -> None:
    """Writes beside a point, `offset` being in points of 1/72 inch."""
    axes.annotate(
        text, point, xytext=offset, textcoords="offset points", color=color, ha=ha, weight="bold"
    )
