"""What outliers do to a network's activations: the error of quantising them against the threshold.

Usage:
    python -m experiments.outliers --config=configs/NAME_ptq.py[:NOTATION] --workdir=DIR \
        [--config.KEY=VALUE …]

Runs one batch through the quantised network and looks at each activation as a whole, at the bits of
the notation: how far its largest magnitude lies from the rest, and what maxima, OCTAV (OCTAV,
arXiv:2206.06501, eq. 3) and the exact optimum make of it. Then it draws the activation with the
heaviest outliers: how its magnitudes are spread, and its error against the threshold at 4, 6 and
8 bits (the counterpart of that paper's appendix G).

Example:
    python -m experiments.outliers --config=configs/squad_minilm_ptq.py:4/4 \
        --workdir=runs/outliers --config.model.pretrained=runs/squad/weights.safetensors \
        --config.dataset.data_dir=DIR --config.dataset.test_split=EVAL.json

DIR gets config.json, result.json, outliers.csv with a row for each activation, and outliers.png.
"""

import dataclasses
import functools
import logging
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from ml_collections import ConfigDict

import qat_jax as qj
from experiments import build, cli, figures
from experiments.ptq import Bench, operands
from experiments.tables import write_csv
from qat_jax.nnx import is_weight
from qat_jax.training.workdir import Workdir

logger = logging.getLogger("experiments.outliers")

CSV, FIGURE = "outliers.csv", "outliers.png"
DRAWN_BITS = (4, 6, 8)
_COLOURS = (figures.GREEN, figures.VERMILION, figures.SKY)
_BELOW_OCTAV = 0.25  # the sweep begins at so much of OCTAV's threshold


@dataclasses.dataclass(frozen=True)
class Outliers:
    """One activation and what rules of clipping make of it, with one threshold for all of it.

    Attributes:
        operand: its path.
        kurtosis: the fourth moment over the square of the second, both about 0; 3 for a Gaussian.
        maximum: the largest magnitude.
        octav: OCTAV's threshold; so the next.
        exact: the threshold of least error.
        max_error: the mean squared error of clipping at the maximum over the mean square; so the
            next two.
        octav_error: with OCTAV's threshold.
        exact_error: with the best.
    """

    operand: str
    kurtosis: float
    maximum: float
    octav: float
    exact: float
    max_error: float
    octav_error: float
    exact_error: float

    @property
    def weight(self) -> float:
        """How far the largest magnitude lies beyond the threshold that balances the errors."""
        return self.maximum / self.octav


@cli.once("dataset", "model", "quant")
def run(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Measures and draws what `config` describes.

    Args:
        config: see `configs/`.
        workdir: the run folder.

    Returns:
        The content of result.json.

    Raises:
        cli.UsageError: the config asks for something that cannot be; nothing is written.
        WorkdirError: the folder holds something else; nothing is written.
    """
    started = time.monotonic()
    settings, folder = config.to_dict(), Workdir(workdir)
    with cli.setup_errors():
        # One threshold for the whole of an activation, whatever the notation has for its vectors.
        format = qj.Int(build.activation_bits(config), signed=None, narrow=True)
        policy = build.ptq_policy(config)
        assert policy is not None  # "float" is no notation
        bench = Bench.from_config(config)
        model = qj.quantize_model(bench.model, policy)
        inputs = bench.first_inputs(config.batch_size)

    folder.begin(settings)
    found = {path: x for path, x in operands(model, *inputs).items() if not is_weight(path)}
    rows = sorted(
        (measured(operand, x, format) for operand, x in found.items() if bool(jnp.any(x != 0))),
        key=lambda row: row.weight,
        reverse=True,
    )
    heaviest = rows[0]
    x = found[heaviest.operand]
    lowest = _BELOW_OCTAV * heaviest.octav / heaviest.maximum
    formats = [qj.Int(bits, signed=None, narrow=True) for bits in DRAWN_BITS]
    curves = [figures.error_curve(x, format, lowest) for format in formats]
    write_csv(workdir / CSV, [dataclasses.asdict(row) for row in rows], digits=5)
    _draw(heaviest.operand, np.abs(np.asarray(x, np.float64)).ravel(), curves, workdir / FIGURE)
    metrics = {
        "bits": format.bits,
        "batch_size": config.batch_size,
        "heaviest": dataclasses.asdict(heaviest),
        "curves": [curve.summary() for curve in curves],
        "octav_over_exact_error": max(row.octav_error / row.exact_error for row in rows),
    }
    logger.info(
        "%s has the heaviest outliers: maximum %.3g, OCTAV %.3g, optimum %.3g at %d bits",
        *(heaviest.operand, heaviest.maximum, heaviest.octav, heaviest.exact, format.bits),
    )
    return folder.finish(settings, metrics, wall_seconds=time.monotonic() - started)


def measured(operand: str, x: jax.Array, format: qj.Int) -> Outliers:
    """The row of one activation."""
    return Outliers(operand, *map(float, _numbers(x, format)))


@functools.partial(jax.jit, static_argnames="format")
def _numbers(x: jax.Array, format: qj.Int) -> list[jax.Array]:
    """What stands in a row, in its order."""
    quantizer = qj.Quantizer(format)
    square = jnp.mean(jnp.square(x))
    rules = (qj.AbsMax(), qj.Octav(), qj.Exact())
    thresholds = [rule.threshold(x, format, tuple(range(x.ndim))).reshape(()) for rule in rules]
    errors = [
        jnp.mean(jnp.square(qj.fake_quant(x, quantizer, threshold=threshold) - x)) / square
        for threshold in thresholds
    ]
    return [jnp.mean(jnp.square(jnp.square(x) / square)), *thresholds, *errors]


def _draw(
    operand: str, magnitudes: np.ndarray, curves: list[figures.ErrorCurve], path: Path
) -> None:
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_magnitudes(left, magnitudes)
    _draw_curves(right, curves)
    figure.suptitle(f"Activation with the heaviest outliers: {operand}")
    figure.savefig(path, dpi=110)


def _draw_magnitudes(axes: Axes, magnitudes: np.ndarray) -> None:
    largest = magnitudes.max()
    axes.hist(magnitudes, bins=120, range=(0, largest), color=figures.GREY)
    axes.set_yscale("log")
    axes.axvline(largest, color=figures.ORANGE, linestyle="--", label=f"largest: {largest:.3g}")
    for quantile, colour in ((0.999, figures.BLUE), (0.5, figures.GREEN)):
        value = np.quantile(magnitudes, quantile)
        label = f"{100 * quantile:g} % lie below {value:.3g}"
        axes.axvline(value, color=colour, linestyle=":", label=label)
    axes.set(xlabel="magnitude", ylabel="elements", title="Magnitudes of one batch")
    axes.legend(frameon=False)


def _draw_curves(axes: Axes, curves: list[figures.ErrorCurve]) -> None:
    for curve, colour in zip(curves, _COLOURS, strict=True):
        best = int(np.argmin(curve.errors))
        axes.loglog(curve.thresholds, curve.errors, color=colour)
        marks = [
            ("maximum", "s", figures.ORANGE, curve.maximum, curve.maximum_error),
            ("OCTAV", "*", figures.BLUE, curve.iterates[-1], curve.iterate_errors[-1]),
            ("least error", "v", figures.BLACK, curve.thresholds[best], curve.errors[best]),
        ]
        for name, marker, face, threshold, error in marks:
            label = name if curve is curves[0] else None
            size = 14 if marker == "*" else 7
            axes.plot(threshold, error, marker, color=face, markersize=size, label=label)
        lowest = curve.thresholds[best], curve.errors[best]
        axes.annotate(f"{curve.format.bits} bits", lowest, color=colour, weight="bold", ha="center",
                      xytext=(0, -18), textcoords="offset points")  # fmt: skip
    axes.set(
        xlabel="clipping threshold", ylabel="mean squared error / mean square", title="Its error"
    )
    axes.grid(alpha=0.3)
    axes.margins(y=0.12)
    axes.legend(frameon=False)


if __name__ == "__main__":
    sys.exit(cli.main(run, __doc__, sys.argv))
