"""Train an image classifier, in float32 or with its weights and activations quantised.

Usage:
    python -m experiments.train --config=configs/NAME.py[:ARG] --workdir=DIR [--config.KEY=VALUE …]

Examples:
    Digits in float32, about a minute on two cores:

        python -m experiments.train --config=configs/digits.py --workdir=runs/digits

    The same with 4-bit weights and activations, OCTAV clipping, and another learning rate:

        python -m experiments.train --config=configs/digits.py:bits=4 --workdir=runs/digits-4 \
            --config.optimizer.learning_rate=0.05

The settings and what they mean are in the config file. Run the same command again to resume after
an interruption. DIR gets config.json, metrics.jsonl, TensorBoard events, checkpoints and, once the
run is finished, result.json.
"""

import logging
import sys
import time
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

import qat_jax as qj
from experiments import build, cli
from qat_jax import data
from qat_jax.training.checkpoint import Checkpoints
from qat_jax.training.loop import Plan, fit
from qat_jax.training.optimizer import duration_in_steps, make_optimizer, make_schedule
from qat_jax.training.sharding import Placement
from qat_jax.training.state import count_parameters, create_state
from qat_jax.training.step import Normalisation, make_eval_step, make_train_step
from qat_jax.training.workdir import MetricWriter, Workdir

logger = logging.getLogger("experiments.train")  # __name__ is "__main__" on the command line


def run(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Trains what `config` describes, or goes on with it, or returns what is already there.

    Args:
        config: see `configs/`.
        workdir: the run folder.

    Returns:
        The content of result.json.

    Raises:
        cli.UsageError: the config asks for something that cannot be; nothing is written.
        WorkdirError: the folder holds something else; nothing is written.
        CheckpointError: the folder's checkpoint is of another model; nothing is written.
        NonFiniteLossError: training diverged.
        Interrupted: a signal came; the state is saved.
    """
    started = time.monotonic()
    cli.require(config, "dataset", "model", "quant", "optimizer", "schedule")
    settings = config.to_dict()
    folder = Workdir(workdir)
    if (result := cli.finished(folder, settings)) is not None:
        return result

    with cli.setup_errors():
        # Devices
        devices = Placement.over_all_devices(config.fsdp)
        if config.batch_size % config.accumulate:
            raise ValueError(
                f"accumulate {config.accumulate} does not divide batch_size {config.batch_size}"
            )
        devices.check_batch_size(config.batch_size // config.accumulate)

        # Data
        train_source, augment = build.train_source(config)
        test_source = build.test_source(config)
        normalise = Normalisation(mean=config.dataset.mean, std=config.dataset.std)

        # Model
        if config.get("retrains") and config.model.pretrained is None:
            raise ValueError("this recipe retrains a network: pass --config.model.pretrained=FILE")
        model = build.quantised_model(config)
        if config.quant.static_batches:
            images = build.calibration_images(
                build.calibration_source(config),
                normalise,
                batch_size=config.batch_size,
                seed=config.seed,
                count=config.quant.static_batches,
            )
            qj.calibrate(model, images)

        # Durations
        steps_per_epoch = max(len(train_source) // config.batch_size, 1)
        plan = make_plan(config, steps_per_epoch)

        # Optimiser
        schedule = make_schedule(
            config.schedule,
            config.optimizer.learning_rate,
            total_steps=plan.total,
            steps_per_epoch=steps_per_epoch,
        )
        optimizer = make_optimizer(config.optimizer, schedule)

        # State and steps
        graphdefs, state = create_state(model, optimizer, averages=config.average_decay > 0)
        state = devices.shard_state(state)
        train_step = make_train_step(
            graphdefs,
            optimizer,
            normalise=normalise,
            schedule=schedule,
            label_smoothing=config.label_smoothing,
            accumulate=config.accumulate,
            average_decay=config.average_decay,
            collect=qj.Diagnostic if config.quant.diagnostics else None,
            summarise=qj.diagnostics_by_layer,
            placement=devices,
        )
        eval_step = make_eval_step(graphdefs, normalise=normalise, placement=devices)

    # Fit
    with Checkpoints(folder.checkpoints_path) as checkpoints:
        restored = checkpoints.restore(state)
        resumed_at, seconds_before = None, 0.0
        if restored is not None:
            state, seconds_before = restored
            resumed_at = int(state.step)
            logger.info("%s: going on from step %d", workdir, resumed_at)
        started -= seconds_before
        parameters = count_parameters(state.params)

        folder.begin(settings)
        with MetricWriter(folder, resumed_at) as writer:
            state, test_metrics = fit(
                state,
                train_step=train_step,
                eval_step=eval_step,
                train_data=lambda start_step: data.train_batches(
                    train_source,
                    batch_size=config.batch_size,
                    seed=config.seed,
                    augment=augment,
                    start_step=start_step,
                    num_threads=config.dataset.num_threads,
                    num_workers=config.dataset.num_workers,
                    shard_index=jax.process_index(),
                    shard_count=jax.process_count(),
                ),
                eval_data=lambda: data.eval_batches(
                    test_source,
                    batch_size=config.batch_size,
                    shard_index=jax.process_index(),
                    shard_count=jax.process_count(),
                ),
                devices=devices,
                plan=plan,
                writer=writer,
                checkpoints=checkpoints,
                seconds_before=time.monotonic() - started,
                name=config.experiment,
            )

    # Result
    metrics = {f"test_{name}": value for name, value in test_metrics.items()}
    metrics |= {"steps": plan.total, "parameters": parameters}
    result = folder.finish(settings, metrics, wall_seconds=time.monotonic() - started)
    logger.info("test accuracy %.2f %%: %s", 100 * metrics["test_accuracy"], folder.result_path)
    return result


def make_plan(config: ConfigDict, steps_per_epoch: int) -> Plan:
    """The run's durations in steps."""
    total = duration_in_steps(config, "total", steps_per_epoch=steps_per_epoch)
    if total < 1:
        raise ValueError("the run has no step: lengthen total_epochs or total_steps")

    def every(name: str) -> int:
        return duration_in_steps(config, name, steps_per_epoch=steps_per_epoch, total_steps=total)

    return Plan(
        total=total,
        eval_every=every("eval_every"),
        checkpoint_every=every("checkpoint_every"),
        log_every=config.log_every_steps,
    )


if __name__ == "__main__":
    sys.exit(cli.main(run, __doc__, sys.argv))
