"""Run a network quantised after training in integers, and round its scale products.

Usage:
    python -m experiments.integers --config=configs/NAME_ptq.py[:NOTATION] --workdir=DIR \
        [--config.KEY=VALUE …]

Measures the simulated network, which computes with floats, and the one in integers beside it: the
accuracy of each, how many images or windows of text get another answer, and the largest difference
of their outputs. In float32 the simulation rounds its sums, which may give an activation the code
beside its own; all of it is compared once more in float64, where both answer alike.
Then it rounds the product of the two scales of a vector to --config.scale_product_bits bits each
(VS-Quant, arXiv:2102.04503, section 6, names the choice and not what it costs).

Example:
    python -m experiments.integers --config=configs/cifar10_resnet20_ptq.py:4/4U/4/6 \
        --workdir=runs/integers --config.dataset.name=cifar10_local \
        --config.model.pretrained=PATH/akamaster_resnet20.safetensors

DIR gets config.json, result.json, and what was measured as CSV and PNG.
"""

import csv
import logging
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib.figure import Figure
from ml_collections import ConfigDict

import qat_jax as qj
from experiments import build, cli, tasks
from experiments.ptq import Bench
from qat_jax.integer import Datapath, Packed, integer_model, pack_model
from qat_jax.nnx import copy_model
from qat_jax.training.evaluation import predict
from qat_jax.training.sharding import Placement
from qat_jax.training.state import create_state
from qat_jax.training.step import make_predict_step
from qat_jax.training.workdir import Workdir

logger = logging.getLogger("experiments.integers")

CSV, FIGURE = "scale_product_bits.csv", "scale_product_bits.png"


@cli.once("dataset", "model", "quant", "scale_product_bits")
def run(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Measures what `config` describes, simulated and in integers.

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
        if build.ptq_policy(config) is None:
            raise ValueError("a float network has no integers: give a notation, such as 4/4U/4/6")
        bench = Bench.from_config(config)
        simulated = bench.quantised(config)
        example = bench.first_inputs(build.fewest_examples(simulated))
        packed = pack_model(simulated, *example)
        name, full = _name_and_full_width(config)
        integers = {
            bits: integer_model(packed, Datapath(scale_product_bits=bits))
            for bits in (None, *config.scale_product_bits)
            if bits is None or bits < full
        }
        # What has no integer datapath says so when it is traced.
        inputs = bench.first_inputs(bench.batch_size)
        integers[None].eval()
        jax.eval_shape(lambda *inputs: integers[None](*inputs), *inputs)

    folder.begin(settings)
    headline = bench.task.headline
    compared = agreement(bench, simulated, integers[None])
    with jax.enable_x64(True):
        exact = in_double(simulated)
        exact_integers = integer_model(pack_model(exact, *example))
        compared_in_double = agreement(bench, exact, exact_integers)
    accuracy = {bits: bench.measure(model)[headline] for bits, model in integers.items()}
    in_float = bench.measure(bench.model)
    metrics: dict[str, Any] = {
        "count": in_float["count"],
        "float_accuracy": in_float[headline],
        "simulated_accuracy": bench.measure(simulated)[headline],
        "integer_accuracy": accuracy[None],
        **compared,
        "in_float64": compared_in_double,
        "kernel_bytes": sum(x.nbytes for x in jax.tree.leaves(nnx.state(packed, Packed))),
        "by_scale_product_bits": {str(b): a for b, a in accuracy.items() if b is not None},
    }
    logger.info(
        "%d examples: simulated %.2f %%, in integers %.2f %%; of %d answers %d are others, "
        "in float64 %d",
        *(metrics["count"], 100 * metrics["simulated_accuracy"]),
        *(100 * metrics["integer_accuracy"], metrics["answers"], metrics["other_answers"]),
        compared_in_double["other_answers"],
    )
    rounded = {b: 100 * a for b, a in accuracy.items() if b is not None}
    _write_csv(rounded, 100 * accuracy[None], workdir / CSV)
    if rounded:
        title = f"{config.experiment}, {name}: {metrics['count']} examples"
        _draw(rounded, 100 * accuracy[None], title, headline, workdir / FIGURE)
    return folder.finish(settings, metrics, wall_seconds=time.monotonic() - started)


def _name_and_full_width(config: ConfigDict) -> tuple[str, int]:
    """What the figure calls the quantisers, and the most bits that a scale product has."""
    if config.quant.policy:
        return "a policy of its own", max(config.scale_product_bits, default=0) + 1
    notation = qj.Notation.parse(config.quant.notation)
    return str(notation), sum(bits for bits in notation.vector_scales if isinstance(bits, int))


def agreement(bench: Bench, simulated: nnx.Module, integers: nnx.Module) -> dict[str, Any]:
    """How alike two networks answer to all test examples; a long text is asked in windows."""
    expected, found = outputs(bench, simulated), outputs(bench, integers)
    # Classes of an image, positions of an answer.
    other = expected.argmax(1) != found.argmax(1)
    return {
        "answers": len(other),
        "other_answers": int(np.sum(other.reshape(len(other), -1).any(1))),
        "largest_output": float(np.abs(expected).max()),
        "largest_difference": float(np.abs(expected - found).max()),
    }


def in_double(model: nnx.Module) -> nnx.Module:
    """A copy with parameters, statistics and thresholds in float64, which computes in it."""
    model = copy_model(model)
    # Else layers that were made for float32 take their parameters down again.
    model.set_attributes(dtype=np.dtype(np.float64), raise_if_not_found=False)
    widened = jax.tree.map(
        lambda x: x.astype(np.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x,
        nnx.state(model),
    )
    nnx.update(model, widened)
    return model


def outputs(bench: Bench, model: nnx.Module) -> np.ndarray:
    """What a network says to every image or window: [N, classes], or [N, positions, 2]."""
    devices = Placement.over_all_devices()
    graphdefs, state = create_state(model, optax.identity())
    step = make_predict_step(graphdefs, objective=bench.task.objective, placement=devices)
    batches = tasks.eval_batches(bench.task, bench.test, bench.batch_size)
    return predict(step, devices.shard_state(state), batches, devices)[0]


def _write_csv(rounded: dict[int, float], full: float, path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["scale_product_bits", "accuracy_percent"])
        writer.writerows((bits, f"{value:.2f}") for bits, value in rounded.items())
        writer.writerow(["full", f"{full:.2f}"])


def _draw(rounded: dict[int, float], full: float, title: str, headline: str, path: Path) -> None:
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(list(rounded), list(rounded.values()), "o-", label="rounded")
    axes.axhline(full, color="grey", linestyle="--", label=f"full width: {full:.1f}")
    axes.set_xticks(list(rounded))
    axes.set(xlabel="bits of the scale product", ylabel=f"{headline}, %", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(cli.main(run, __doc__, sys.argv))
