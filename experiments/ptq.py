"""Quantise a trained network without training it further, and measure what that costs.

Usage:
    python -m experiments.ptq --config=configs/NAME.py[:NOTATION] --workdir=DIR \
        [--config.KEY=VALUE …]

NOTATION is W/A/ws/as: bits of weights and activations (U: unsigned where the data is), then bits
of the scales of their vectors of 16, or "-" for one floating-point scale a channel or layer. A "-"
for A leaves activations in float: 4/-/4/-. A block format has its name: nvfp4, mxfp4-weights.

Examples:
    A pretrained ResNet-20 on CIFAR-10, 4-bit vectors under 4- and 6-bit integer scales (VS-Quant):

        python -m experiments.ptq --config=configs/cifar10_resnet20_ptq.py:4/4U/4/6 \
            --workdir=runs/ptq-4 --config.dataset.name=cifar10_local \
            --config.model.pretrained=PATH/akamaster_resnet20.safetensors

    One scale a channel, OCTAV clipping, activation thresholds frozen on 5 batches of training
    images:

        python -m experiments.ptq --config=configs/cifar10_resnet20_ptq.py:4/4U \
            --config.clipping.weights=octav --config.clipping.activations=octav \
            --config.calibration.batches=5 …

Other flags: --config.quant.vector_size, --config.clipping.weights and .activations (max, octav,
refit, exact, mse, entropy, p99.99), --config.scale.codes, .order, .zero and .clipping,
--config.quant.overrides="('.*depthwise=8/8U',)", --config.fold_batch_norm,
--config.calibration.smoothing_batches (outliers of activations moved into kernels as so many
batches suggest: SmoothQuant), .rotate (features turned by Hadamard matrices), .gptq_batches
(kernels rounded so that layers answer so many batches as they did: GPTQ) and .batch_norm_batches
(batch norms re-estimated on so many).

DIR gets config.json, metrics.jsonl, TensorBoard events, packed.safetensors, which is the quantised
network for experiments.export, and result.json, which has the accuracy in
float and quantised, the effective bits of the weights, and for every layer and operand the
signal-to-noise ratio, the clipped share and the threshold over the maximum.
"""

import dataclasses
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import optax
from flax import nnx
from ml_collections import ConfigDict

import qat_jax as qj
from experiments import build, cli, tasks
from experiments.runs import PACKED
from qat_jax.batch_norm import fold_batch_norm, reestimate_batch_norm
from qat_jax.export import save_packed
from qat_jax.integer import pack_model
from qat_jax.nnx import Operand, captured_by_operand
from qat_jax.training.evaluation import Metrics
from qat_jax.training.sharding import Placement
from qat_jax.training.state import create_state
from qat_jax.training.workdir import MetricWriter, Workdir

logger = logging.getLogger("experiments.ptq")  # __name__ is "__main__" on the command line

THRESHOLDS = "thresholds.safetensors"


@dataclasses.dataclass(frozen=True)
class Bench:
    """A float network and the examples it is measured on.

    Attributes:
        model: the network, batch norms folded if the config says so.
        task: the kind of data.
        test: the test examples.
        train: the training examples, None where nothing needs them.
        batch_size: examples a forward pass.
    """

    model: nnx.Module
    task: tasks.Task
    test: Any
    train: Any
    batch_size: int

    @classmethod
    def from_config(cls, config: ConfigDict) -> "Bench":
        """Opens what the config names.

        Raises:
            ValueError: the config asks for something that cannot be.
            DataError: there are no such examples.
            FileNotFoundError: there are no such weights.
        """
        if config.model.pretrained is None:
            raise ValueError(
                "there is no model to quantise: pass --config.model.pretrained=FILE.safetensors"
            )
        task = build.task(config)
        test = task.test_source()
        train = task.calibration_source() if needs_training_examples(config) else None
        model = build.float_model(config)
        if config.fold_batch_norm:
            model = fold_batch_norm(model, *tasks.first_inputs(task, test, 1))
        return cls(model, task, test, train, config.batch_size)

    def quantised(self, config: ConfigDict) -> nnx.Module:
        """The network as the config quantises it, calibrated if it says so.

        Raises:
            ValueError: the config asks for something that cannot be.
        """
        policy = build.ptq_policy(config)
        if policy is None:
            return self.model
        model = qj.quantize_model(self.model, policy)
        calibration = config.calibration
        if calibration.smoothing_batches:
            qj.smooth(model, self._train_inputs(calibration.smoothing_batches, config.seed))
        if calibration.rotate:
            qj.rotate(model)
        if calibration.batches:
            inputs = self._train_inputs(calibration.batches, config.seed)
            qj.calibrate(model, inputs, pool=calibration.pool)
        else:  # weights stay as they are: one search does for all batches
            example = self.first_inputs(build.fewest_examples(model))
            qj.calibrate(model, [example], operands=".*weights")
        if calibration.gptq_batches:
            qj.gptq(model, self._train_inputs(calibration.gptq_batches, config.seed))
        if calibration.batch_norm_batches:
            inputs = self._train_inputs(calibration.batch_norm_batches, config.seed)
            reestimate_batch_norm(model, (images for (images,) in inputs))
        return model

    def measure(self, model: nnx.Module) -> Metrics:
        """What the task's judge finds on all test examples."""
        devices = Placement.over_all_devices()
        graphdefs, state = create_state(model, optax.identity())
        return self.task.judge(graphdefs, devices)(devices.shard_state(state), self.test)

    def first_inputs(self, count: int) -> tuple[jax.Array, ...]:
        """What the model is called with on the first test examples."""
        return tasks.first_inputs(self.task, self.test, count)

    def _train_inputs(self, count: int, seed: int) -> Iterator[tuple[jax.Array, ...]]:
        return tasks.calibration_inputs(
            self.task, self.train, batch_size=self.batch_size, seed=seed, count=count
        )


def needs_training_examples(config: ConfigDict) -> bool:
    """Whether the config calibrates on anything."""
    calibration = config.calibration
    return any(
        (
            calibration.smoothing_batches,
            calibration.batches,
            calibration.gptq_batches,
            calibration.batch_norm_batches,
        )
    )


@cli.once("dataset", "model", "quant", "clipping", "scale", "calibration")
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
    settings, folder = config.to_dict(), Workdir(workdir)
    with cli.setup_errors():
        Placement.over_all_devices().check_batch_size(config.batch_size)
        build.ptq_policy(config)  # its errors come before the minutes of loading
        if config.calibration.pool and not config.calibration.batches:
            raise ValueError(
                "calibration.pool joins batches, of which there are none: give "
                "--config.calibration.batches=5"
            )
        bench = Bench.from_config(config)
        quantised_model = bench.quantised(config)

    folder.begin(settings)
    with MetricWriter(folder, None) as writer:
        logger.info("%s", qj.report(quantised_model))
        metrics: dict[str, Any] = {}
        in_float = quantised = bench.measure(bench.model)
        if quantised_model is not bench.model:
            quantised = bench.measure(quantised_model)
        for name, measured in [("float", in_float), ("test", quantised)]:
            writer.write(0, name, measured)
            metrics |= {f"{name}_{key}": value for key, value in measured.items()}

    inputs = bench.first_inputs(config.batch_size)
    storage = qj.model_storage(quantised_model, *inputs)
    metrics["model_bytes"] = storage.bytes
    metrics["bits_per_parameter"] = storage.bits_per_element
    metrics["effective_bits"] = {
        operand: round(part.bits_per_element, 4)
        for operand, part in qj.operand_storage(quantised_model, *inputs).items()
    }
    metrics["diagnostics"] = diagnose(quantised_model, *inputs)
    if quantised_model is not bench.model:
        if config.calibration.batches:
            qj.save_thresholds(quantised_model, workdir / THRESHOLDS)
        example = bench.first_inputs(build.fewest_examples(quantised_model))
        save_packed(pack_model(quantised_model, *example), workdir / PACKED)
    result = folder.finish(settings, metrics, wall_seconds=time.monotonic() - started)
    headline = bench.task.headline
    logger.info(
        "test %s %.2f %%, in float %.2f %%; %.2f bits a parameter: %s",
        headline,
        100 * metrics[f"test_{headline}"],
        100 * metrics[f"float_{headline}"],
        metrics["bits_per_parameter"],
        folder.result_path,
    )
    return result


def diagnose(model: nnx.Module, *inputs: jax.Array) -> dict[str, dict[str, float]]:
    """The figures of every layer and operand on one batch of inputs."""
    figures = qj.diagnostics_by_layer(sown(model, qj.Diagnostic, *inputs))
    return {
        operand: {name: round(float(value), 4) for name, value in found._asdict().items()}
        for operand, found in figures.items()
    }


def operands(model: nnx.Module, *inputs: jax.Array) -> dict[str, jax.Array]:
    """What reaches each quantiser in a forward pass of the evaluation mode."""
    return captured_by_operand(sown(model, Operand, *inputs))


def sown(model: nnx.Module, kind: type[nnx.Variable], *inputs: jax.Array) -> nnx.State:
    """What quantisers sow of a kind in a forward pass of the evaluation mode."""
    model.eval()
    graphdef, state = nnx.split(model)

    @jax.jit
    def forward(state: nnx.State, *inputs: jax.Array) -> nnx.State:
        return nnx.capture(nnx.merge(graphdef, state), kind)(*inputs)[1]

    return forward(state, *inputs)


if __name__ == "__main__":
    sys.exit(cli.main(run, __doc__, sys.argv))
