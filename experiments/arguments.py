"""The papers' arguments, measured on the tensors of a real network.

Usage:
    python -m experiments.arguments --config=configs/NAME_ptq.py[:NOTATION] --workdir=DIR \
        [--config.KEY=VALUE …]

Three arguments, in one batch of training examples at the bits of the notation:

- The error against the clipping threshold, of the kernel and of the activation with the median
  crest factor, largest magnitude over root mean square, at 2, 3, 4, 6 and 8 bits: OCTAV's Newton
  iterates, the exact optimum, the maximum (OCTAV, arXiv:2206.06501, section 3).
- The variance of the loss's gradient on its way back through the network, all operands clipped by
  OCTAV, with the straight-through, the piece-wise linear and the magnitude-aware estimator, beside
  what proposition 4.1 of that paper makes of the clipped shares; and the weights that get no
  gradient at all (proposition 4.2).
- The ranges of vectors inside their channel, the steps and errors that follow, and what integer
  scales of vectors add to them (VS-Quant, arXiv:2102.04503, sections 3 and 4).

Example:
    python -m experiments.arguments --config=configs/cifar10_resnet20_ptq.py:3/3U/4/6 \
        --workdir=runs/arguments --config.dataset.name=cifar10_local \
        --config.model.pretrained=PATH/akamaster_resnet20.safetensors

DIR gets config.json, result.json, and for each argument a table and a figure: errors, gradients and
ranges, .csv and .png.
"""

import dataclasses
import logging
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

import qat_jax as qj
from experiments import arguments_figures, build, cli, figures, tasks
from experiments.gradient_flow import RULES, flows
from experiments.outliers import measured
from experiments.ptq import Bench
from experiments.tables import write_csv
from experiments.vector_ranges import Ranges, ranges
from qat_jax.nnx import is_weight
from qat_jax.training.workdir import Workdir

logger = logging.getLogger("experiments.arguments")

DRAWN_BITS = (2, 3, 4, 6, 8)


@cli.once("dataset", "model", "quant", "clipping")
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
        build.activation_bits(config)  # or it says that there are none
        notation = qj.Notation.parse(config.quant.notation)
        bench = Bench.from_config(config)
        policy = build.ptq_policy(config)
        assert policy is not None  # "float" is no notation
        model = qj.quantize_model(bench.model, policy)
        clipped_model = qj.quantize_model(bench.model, _octav_policy(config, notation))
        batch = tasks.calibration_batch(
            bench.task,
            bench.task.calibration_source(),
            batch_size=config.batch_size,
            seed=config.seed,
        )

    folder.begin(settings)
    objective = bench.task.objective
    seen = ranges(model, config.quant.vector_size, *objective.inputs(batch))
    seen = {path: found for path, found in seen.items() if float(abs(found.x).max()) > 0}
    logger.info("ranges of %d operands", len(seen))
    metrics = {
        "notation": str(notation),
        "batch_size": config.batch_size,
        "errors": errors(seen, workdir),
        "ranges": inside_channels(model, seen, workdir),
        "gradients": gradients(clipped_model, bench.task, batch, workdir),
    }
    result = folder.finish(settings, metrics, wall_seconds=time.monotonic() - started)
    logger.info("%s", folder.result_path)
    return result


def errors(seen: Mapping[str, Ranges], workdir: Path) -> dict[str, dict[str, Any]]:
    """The first argument: OCTAV finds the threshold of least error, for a kernel and an activation.

    Returns:
        For "weights" and "activations" the operand and its marked points at all bits.
    """
    found, rows, drawn = {}, [], {}
    for side in ("weights", "activations"):
        arrays = {p: seen[p].x for p in seen if is_weight(p) == (side == "weights")}
        operand = _middle(arrays)
        x = arrays[operand]
        of_bits, curves = [], []
        for drawn_bits in DRAWN_BITS:
            format = qj.Int(drawn_bits, signed=None, narrow=True)
            row = measured(operand, x, format)
            of_bits.append({"bits": drawn_bits, **dataclasses.asdict(row)})
            curves.append((figures.error_curve(x, format), row))
        rows += of_bits
        drawn[operand] = curves
        found[side] = {"operand": operand, "curves": [curve.summary() for curve, _ in curves]}
    write_csv(workdir / "errors.csv", rows, digits=5)
    arguments_figures.errors(workdir / "errors.png", drawn)
    return found


def gradients(
    model: nnx.Module, task: tasks.Task, batch: Mapping[str, jax.Array], workdir: Path
) -> dict[str, Any]:
    """The second argument: STE's gradients grow through clipping, PWL's leave weights behind.

    Returns:
        Of the activation that is farthest from the loss the variances over that of PWL, measured
        and predicted, and the mean over kernels of the share of weights without gradient.
    """
    rows = flows(model, task.objective, batch)
    write_csv(workdir / "gradients.csv", [dataclasses.asdict(row) for row in rows], digits=5)
    arguments_figures.gradients(workdir / "gradients.png", rows)
    activations = [row for row in rows if not is_weight(row.operand)]
    weights = [row for row in rows if is_weight(row.operand)]
    farthest = activations[0]
    return {
        "farthest": farthest.operand,
        "ste_over_pwl": farthest.ste / farthest.pwl,
        "mad_over_pwl": farthest.mad / farthest.pwl,
        "predicted_ste_over_pwl": farthest.predicted,
        "mean_clipped_activations": statistics.fmean(row.clipped for row in activations),
        "weights_without_gradient": {
            rule: statistics.fmean(getattr(row, f"{rule}_zeros") for row in weights)
            for rule in RULES
        },
    }


def inside_channels(
    model: nnx.Module, seen: Mapping[str, Ranges], workdir: Path
) -> dict[str, dict[str, float]]:
    """The third argument: vectors have smaller ranges than their channel, and so smaller errors.

    Returns:
        For "weights" and "activations" means over operands that have vectors; of errors, over that
        of coarse groups, geometric means.
    """
    quantizers = qj.operand_quantizers(model)
    rows = [found.row(p, quantizers[p].quantizer.format.bits) for p, found in seen.items()]
    write_csv(workdir / "ranges.csv", [dataclasses.asdict(row) for row in rows], digits=5)
    arguments_figures.ranges(workdir / "ranges.png", seen, rows)
    cut = [row for row in rows if seen[row.operand].per_group > 1]
    sides = {
        "weights": [row for row in cut if is_weight(row.operand)],
        "activations": [row for row in cut if not is_weight(row.operand)],
    }
    return {
        side: {
            "operands": len(chosen),
            "mean_range": statistics.fmean(row.mean_range for row in chosen),
            "predicted_error": statistics.geometric_mean(row.predicted_error for row in chosen),
            **{
                f"{kind}_over_coarse_error": statistics.geometric_mean(
                    getattr(row, f"{kind}_error") / row.coarse_error for row in chosen
                )
                for kind in ("tensor", "vector", "stored")
            },
        }
        for side, chosen in sides.items()
    }


def _octav_policy(config: ConfigDict, notation: qj.Notation) -> qj.Policy:
    """The bits of the notation, one scale a channel or layer, found by OCTAV."""
    changed = config.copy_and_resolve_references()
    with changed.unlocked():
        scalars = dataclasses.replace(notation, weight_scale=None, activation_scale=None)
        changed.quant.notation = str(scalars)
        changed.clipping = {"weights": "octav", "activations": "octav"}
    policy = build.ptq_policy(changed)
    assert policy is not None
    return policy


def _middle(arrays: Mapping[str, jax.Array]) -> str:
    """The operand with the median crest factor: largest magnitude over root mean square."""

    def crest(x: jax.Array) -> float:
        return float(jnp.max(jnp.abs(x)) / jnp.sqrt(jnp.mean(jnp.square(x))))

    return sorted(arrays, key=lambda path: crest(arrays[path]))[len(arrays) // 2]


if __name__ == "__main__":
    sys.exit(cli.main(run, __doc__, sys.argv))
