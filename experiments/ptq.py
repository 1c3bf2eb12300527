"""Quantise a pretrained image classifier without training it, and measure what that costs.

Usage:
    python -m experiments.ptq --config=configs/NAME.py[:ARG] --workdir=DIR [--config.KEY=VALUE …]

Examples:
    A pretrained ResNet-20 on CIFAR-10 with 4-bit weights and activations, OCTAV clipping:

        python -m experiments.ptq --config=configs/cifar10_resnet20_ptq.py:bits=4 \
            --workdir=runs/ptq-4 --config.dataset.name=cifar10_local \
            --config.model.pretrained=PATH/akamaster_resnet20.safetensors

    The same clipped at the largest magnitude:

        python -m experiments.ptq --config=configs/cifar10_resnet20_ptq.py:bits=4,clipping=max …

Thresholds are dynamic: every batch finds its own. DIR gets config.json, metrics.jsonl, TensorBoard
events and result.json, which has the accuracy in float and quantised, and for every layer and
operand the signal-to-noise ratio, the clipped share and the threshold over the maximum.
"""

import logging
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from ml_collections import ConfigDict

import qat_jax as qj
from experiments import build, cli
from qat_jax import data
from qat_jax.training.loop import evaluate
from qat_jax.training.sharding import DataParallel
from qat_jax.training.state import create_state
from qat_jax.training.step import Normalisation, make_eval_step
from qat_jax.training.workdir import MetricWriter, Status, Workdir

logger = logging.getLogger("experiments.ptq")  # __name__ is "__main__" on the command line


def run(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Evaluates what `config` describes, in float and quantised.

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
    cli.require(config, "dataset", "model", "quant", "batch_size")
    settings = config.to_dict()
    folder = Workdir(workdir)
    if folder.status(settings) is Status.FINISHED:
        logger.info("%s is finished, nothing to do: see %s", workdir, folder.result_path)
        return folder.result()

    with cli.setup_errors():
        devices = DataParallel.over_all_devices()
        devices.check_batch_size(config.batch_size)
        source = build.source(config, config.dataset.test_split)
        normalise = Normalisation(mean=config.dataset.mean, std=config.dataset.std)
        if config.model.pretrained is None:
            raise cli.UsageError(
                "there is no model to quantise: pass --config.model.pretrained=FILE.safetensors"
            )
        float_model = build.float_model(config)
        quantised_model = build.quantise(float_model, config.quant)

    def accuracy(model: nnx.Module) -> dict[str, float | int]:
        graphdefs, state = create_state(model, optax.identity())
        eval_step = make_eval_step(graphdefs, normalise=normalise, replicated=devices.replicated)
        batches = data.eval_batches(source, batch_size=config.batch_size)
        return evaluate(eval_step, devices.replicate(state), batches, devices)

    folder.begin(settings)
    with MetricWriter(folder, None) as writer:
        logger.info("%s", qj.report(quantised_model))
        metrics: dict[str, Any] = {}
        for name, model in [("float", float_model), ("test", quantised_model)]:
            measured = accuracy(model)
            writer.write(0, name, measured)
            metrics |= {f"{name}_{key}": value for key, value in measured.items()}

    first_batch = next(iter(data.eval_batches(source, batch_size=config.batch_size)))
    images = normalise(jnp.asarray(first_batch["image"]))
    metrics["diagnostics"] = diagnose(quantised_model, images)
    result = folder.finish(settings, metrics, wall_seconds=time.monotonic() - started)
    logger.info(
        "test accuracy %.2f %%, in float %.2f %%: %s",
        100 * metrics["test_accuracy"],
        100 * metrics["float_accuracy"],
        folder.result_path,
    )
    return result


def diagnose(model: nnx.Module, images: jax.Array) -> dict[str, dict[str, float]]:
    """The figures of every layer and operand on one batch of normalised images."""
    model.eval()
    _, captured = nnx.capture(model, qj.Diagnostic)(images)
    return {
        operand: {name: round(float(value), 4) for name, value in figures._asdict().items()}
        for operand, figures in qj.diagnostics_by_layer(captured).items()
    }


if __name__ == "__main__":
    sys.exit(cli.main(run, __doc__, sys.argv))
