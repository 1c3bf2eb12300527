"""Train a small ResNet on handwritten digits in float32 and quantised, and compare.

Usage:
    python -m experiments.quickstart --workdir=DIR [--config.KEY=VALUE …]

Examples:
    The comparison as published, three to four minutes on two cores (`make quickstart` is the same):

        python -m experiments.quickstart --workdir=runs/quickstart

    A quick look, with one seed and fewer epochs:

        python -m experiments.quickstart --workdir=runs/glance \
            --config.num_seeds=1 --config.recipe.total_epochs=5

The cells of the comparison differ in how they quantise and in nothing else: seed by seed they have
the same initial weights, data order and number of steps. They and their recipe are in
configs/quickstart.py, which is the default of --config.

Run the same command again to resume after an interruption, or to see the table again. DIR gets
config.json, a folder for each run as experiments.train makes it, quickstart.png and, once all is
done, result.json.
"""

import contextlib
import logging
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

import qat_jax as qj
from experiments import build, cli, figures, runs, tasks, train
from qat_jax.training.workdir import Workdir

logger = logging.getLogger("experiments.quickstart")  # __name__ is "__main__" on the command line

DEFAULT_CONFIG = "configs/quickstart.py"
FIGURE = "quickstart.png"
_CACHE_DIR = "jax_compilation_cache_dir"
CLIPPING_LABELS = {"octav": "OCTAV", "max": "max"}


def run(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Trains every cell with every seed, or goes on with that, and prints and draws the result.

    Args:
        config: see `configs/quickstart.py`.
        workdir: the folder of all runs.

    Returns:
        The content of result.json.

    Raises:
        cli.UsageError: the config asks for something that cannot be; nothing is written.
        WorkdirError: the folder holds something else; nothing is written.
        NonFiniteLossError: a training diverged.
        Interrupted: a signal came; the state is saved.
    """
    cli.require(config, "recipe", "cells", "num_seeds", "figure_layer")
    settings = config.to_dict()
    folder = Workdir(workdir)
    if (result := cli.finished(folder, settings)) is not None:
        show(result["metrics"], workdir)
        return result
    with folder.locked():
        return train_and_draw(config, folder)


def train_and_draw(config: ConfigDict, folder: Workdir) -> dict[str, Any]:
    """Does the work of `run` in a folder that is this run's alone, not finished."""
    settings, workdir = config.to_dict(), folder.path
    float_cell = _float_cell(config)

    # Train
    with _begun(folder, settings), _shared_compilations(workdir / "compilation_cache"):
        cells = train_cells(config, workdir)

    # Draw
    started = time.monotonic()
    first_run = run_config(config, float_cell, config.seed)
    activations = layer_input(first_run, workdir / run_name(float_cell, config.seed), config)
    curves = [figures.error_curve(activations, format) for format in formats(config)]
    figures.quickstart(workdir / FIGURE, curves, config.figure_layer, bars(cells))

    # Result
    wall_seconds = sum(sum(cell["wall_seconds"]) for cell in cells.values())
    metrics = {"cells": cells, "thresholds": [curve.summary() for curve in curves]}
    result = folder.finish(
        settings, metrics, wall_seconds=wall_seconds + time.monotonic() - started
    )
    show(metrics, workdir)
    return result


def train_cells(config: ConfigDict, workdir: Path) -> dict[str, dict[str, Any]]:
    """Trains what is not yet trained.

    Returns:
        By the cell's name: its `label`, `bits`, `seeds`, `runs` (folders below `workdir`),
        `accuracies` (shares in [0, 1], one a seed), their `mean` and sample standard deviation
        `std` (None for one seed), `test_count` (images in the test set) and `wall_seconds`.
    """
    seeds = list(range(config.seed, config.seed + config.num_seeds))
    total = len(config.cells) * len(seeds)
    cells: dict[str, dict[str, Any]] = {}
    for cell, quant in config.cells.items():
        results: list[dict[str, Any]] = []
        for seed in seeds:
            number = len(cells) * len(seeds) + len(results) + 1
            logger.info("run %d of %d: %s, seed %d", number, total, label(quant), seed)
            results.append(
                train.run(run_config(config, cell, seed), workdir / run_name(cell, seed))
            )
        accuracies = [result["metrics"]["test_accuracy"] for result in results]
        cells[cell] = {
            "label": label(quant),
            "bits": quant.weight_bits,
            "seeds": seeds,
            "runs": [run_name(cell, seed) for seed in seeds],
            "accuracies": accuracies,
            "mean": statistics.fmean(accuracies),
            "std": statistics.stdev(accuracies) if len(seeds) > 1 else None,
            "test_count": results[0]["metrics"]["test_count"],
            "wall_seconds": [result["wall_seconds"] for result in results],
        }
    return cells


def run_config(config: ConfigDict, cell: str, seed: int) -> ConfigDict:
    """What `experiments.train` is asked to do for one cell and seed."""
    settings = config.recipe.copy_and_resolve_references()
    settings.experiment = run_name(cell, seed)
    settings.seed = seed
    settings.quant = config.cells[cell]
    return settings


def run_name(cell: str, seed: int) -> str:
    """The name of a run and of its folder."""
    return f"{cell}-seed{seed}"


def label(quant: ConfigDict) -> str:
    """How the table and the figure call a cell."""
    if quant.weight_bits == build.FLOAT_BITS:
        return "float32"
    name = CLIPPING_LABELS.get(quant.clipping, quant.clipping)
    if quant.clipping != "max":
        name += f" + {quant.gradient.upper()}"
    return f"{name}, {quant.weight_bits} bits"


def formats(config: ConfigDict) -> list[qj.Int]:
    """What the cells quantise activations to, each format once."""
    quantised = [cell for cell in config.cells.values() if cell.activation_bits < build.FLOAT_BITS]
    return list(
        dict.fromkeys(
            qj.Int(cell.activation_bits, signed=None, narrow=cell.narrow) for cell in quantised
        )
    )


def layer_input(recipe: ConfigDict, folder: Path, config: ConfigDict) -> jax.Array:
    """What a convolution of a trained model gets to see of the whole test set.

    Args:
        recipe: the settings of the run that trained it.
        folder: that run's folder.
        config: see `configs/quickstart.py`; names the layer.

    Returns:
        float32 [images, H, W, C].
    """
    task = build.task(recipe)
    source = task.test_source()
    with cli.setup_errors():
        model = runs.trained_model(recipe, folder)
    layer = _layer(model, config.figure_layer)
    plain = layer.conv_general_dilated
    seen = []

    def listen(x: jax.Array, *arguments: Any, **settings: Any) -> jax.Array:
        seen.append(x)
        return plain(x, *arguments, **settings)

    layer.conv_general_dilated = listen
    model(*tasks.first_inputs(task, source, len(source)))
    return seen[0]


def bars(cells: Mapping[str, Mapping[str, Any]]) -> list[figures.Bar]:
    """The cells as the figure shows them."""
    return [
        figures.Bar(
            label=cell["label"].replace(", ", "\n").replace(" + ", " +\n"),
            family=name.partition("-")[0],
            percents=[100 * accuracy for accuracy in cell["accuracies"]],
        )
        for name, cell in cells.items()
    ]


def show(metrics: Mapping[str, Any], workdir: Path) -> None:
    """Prints the table, how to read it and where to go next."""
    cells = metrics["cells"]
    reference = next(cell for cell in cells.values() if cell["bits"] == build.FLOAT_BITS)
    images = reference["test_count"]
    seeds = len(reference["seeds"])
    table = Table(
        title=f"Handwritten digits: test accuracy in % ({images} images, seeds: {seeds})",
        caption=f"± standard deviation over seeds; one image is {100 / images:.2f} points",
        title_justify="left",
        caption_justify="left",
    )
    for column in ("", "mean", "vs float32", "each seed", "seconds"):
        table.add_column(column, justify="right" if column else "left")
    bits = None
    for cell in cells.values():
        if bits not in (None, cell["bits"]):
            table.add_section()
        bits = cell["bits"]
        spread = "" if cell["std"] is None else f" ± {100 * cell['std']:.1f}"
        difference = 100 * (cell["mean"] - reference["mean"])
        table.add_row(
            cell["label"],
            f"{100 * cell['mean']:.1f}{spread}",
            "" if cell is reference else f"{difference:+.1f}",
            "  ".join(f"{100 * accuracy:.1f}" for accuracy in cell["accuracies"]),
            f"{sum(cell['wall_seconds']):.0f}",
        )
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    console.print(
        "What to see: the fewer bits, the more the threshold matters. Same seeds, steps and data\n"
        "order in every row; differences within the ± may be chance.\n"
        f"Figure: {workdir / FIGURE}\n"
        "\n"
        "Where to go next:\n"
        "  one run, your settings   python -m experiments.train --help\n"
        '  your own Flax model      qat_jax.quantize_model(model, "octav-w4a4"), see README.md\n'
        "  CIFAR-10, ResNet-20      configs/cifar10_resnet20.py says how"
    )


def _float_cell(config: ConfigDict) -> str:
    """The cell that the others are compared with; checks what only this main asks for."""
    if config.num_seeds < 1:
        raise cli.UsageError(f"num_seeds is {config.num_seeds}: give at least 1")
    with cli.setup_errors():
        model = nnx.eval_shape(lambda: build.float_model(config.recipe))
        layer = _layer(model, config.figure_layer)
    if not isinstance(layer, nnx.Conv):
        raise cli.UsageError(f"figure_layer {config.figure_layer!r} is not a convolution")
    for cell, quant in config.cells.items():
        if quant.weight_bits == quant.activation_bits == build.FLOAT_BITS:
            return cell
    raise cli.UsageError("no cell is float32: the others are compared with one, add it to cells")


def _layer(model: Any, path: str) -> Any:
    for name in path.split("/"):
        try:
            model = model[int(name)] if name.isdigit() else getattr(model, name)
        except (AttributeError, IndexError, TypeError):
            raise ValueError(f"the model has no layer {path!r}: try layer2/0/conv2") from None
    return model


@contextlib.contextmanager
def _begun(folder: Workdir, settings: Mapping[str, Any]) -> Iterator[None]:
    """Makes the folder this experiment's, unless its runs turn out to be impossible."""
    folder.begin(settings)
    try:
        yield
    except cli.UsageError:
        if set(folder.path.iterdir()) == {folder.config_path, folder.lock_path}:
            folder.config_path.unlink()
        raise


@contextlib.contextmanager
def _shared_compilations(cache: Path) -> Iterator[None]:
    """Lets the seeds of a cell share their compiled steps, in this process and after a resume.

    A cache that the user has chosen for JAX stays in use.
    """
    if getattr(jax.config, _CACHE_DIR) is not None:
        yield
        return
    settings = {
        _CACHE_DIR: str(cache.absolute()),
        "jax_persistent_cache_min_compile_time_secs": 0.2,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    try:
        _configure(settings)
        yield
    finally:
        _configure(before)


def _configure(settings: Mapping[str, Any]) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # JAX reads the settings once


def main() -> int:
    """The command line."""
    train.logger.setLevel(logging.WARNING)  # the table says what its runs came to
    return cli.main(run, __doc__, sys.argv, default_config=DEFAULT_CONFIG)


if __name__ == "__main__":
    sys.exit(main())
