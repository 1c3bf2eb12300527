"""Train a network, in float32 or with its weights and activations quantised.

Usage:
    python -m experiments.train --config=configs/NAME.py[:ARG] --workdir=DIR [--config.KEY=VALUE …]

Examples:
    Digits in float32, about a minute on two cores:

        python -m experiments.train --config=configs/digits.py --workdir=runs/digits

    The same with 4-bit weights and activations, OCTAV clipping, and another learning rate:

        python -m experiments.train --config=configs/digits.py:bits=4 --workdir=runs/digits-4 \
            --config.optimizer.learning_rate=0.05

    Choosing by training images that are held out, the test images looked at once at the end:

        … --config.dataset.train_split="train[:43000]" \
            --config.dataset.validation_split="train[43000:]"

The settings and what they mean are in the config file; several hosts are joined as docs/launch.md
says. Run the same command again to resume after an interruption. DIR gets config.json,
metrics.jsonl, TensorBoard events, checkpoints and, once the run is finished, weights.safetensors
and result.json; with --config.profile also a trace of a few steps.
"""

import logging
import sys
import time
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from ml_collections import ConfigDict

import qat_jax as qj
from experiments import build, cli, tasks
from qat_jax import data
from qat_jax.models import save_weights
from qat_jax.nnx import is_weight
from qat_jax.training import hosts
from qat_jax.training.checkpoint import Checkpoints
from qat_jax.training.distillation import taught
from qat_jax.training.loop import NON_FINITE, Plan, fit
from qat_jax.training.optimizer import duration_in_steps, make_optimizer, make_schedule
from qat_jax.training.sharding import Placement
from qat_jax.training.state import GraphDefs, TrainState, count_parameters, create_state
from qat_jax.training.step import Collected, make_train_step, warmed_up
from qat_jax.training.workdir import MetricWriter, Workdir

logger = logging.getLogger("experiments.train")  # __name__ is "__main__" on the command line

WEIGHTS = "weights.safetensors"


def run(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Trains what `config` describes, or goes on with it, or returns what is already there.

    Args:
        config: see `configs/`.
        workdir: the run folder.

    Returns:
        The content of result.json.

    Raises:
        cli.UsageError: the config asks for something that cannot be; nothing is written.
        WorkdirError: the folder holds something else, or another process trains in it; nothing is
            written.
        CheckpointError: the folder's checkpoint is of another model; nothing is written.
        NonFiniteLossError: training diverged.
        DataError: data cannot be read; the state is saved.
        Interrupted: a signal came; the state is saved.
    """
    started = time.monotonic()
    cli.require(config, "dataset", "model", "quant", "optimizer", "schedule")
    with cli.setup_errors():
        join_hosts(config.hosts)
    settings = config.to_dict()
    folder = Workdir(workdir, writes=hosts.is_first())
    if (result := cli.finished(folder, settings)) is not None:
        return result
    with folder.locked():
        hosts.wait_for_all("everyone has seen what the folder holds")
        return train(config, folder, started)


def train(config: ConfigDict, folder: Workdir, started: float) -> dict[str, Any]:
    """Trains in a folder that is this run's alone; see `run`.

    Args:
        config: see `configs/`.
        folder: not finished.
        started: when the command began, by the monotonic clock.

    Returns:
        The content of result.json.
    """
    settings, workdir = config.to_dict(), folder.path
    with cli.setup_errors():
        # Devices
        devices = Placement.over_all_devices(config.fsdp)
        if config.accumulate < 1 or config.batch_size % config.accumulate:
            raise ValueError(
                f"accumulate {config.accumulate} does not divide batch_size {config.batch_size}"
            )
        examples = config.batch_size // config.accumulate
        devices.check_batch_size(config.batch_size, config.accumulate)

        # Data
        task = build.task(config)
        train_source, augment = task.train_source()
        test_source = task.test_source()
        validation_source = task.validation_source()

        # Model
        if config.get("retrains") and config.model.pretrained is None:
            raise ValueError("this recipe retrains a network: pass --config.model.pretrained=FILE")
        model, teacher = build.quantised_model(config), build.teacher(config)
        check_shards(model, examples)
        build.prepare_quantisers(
            model, config.quant, lambda count: tasks.training_inputs(task, config, count)
        )

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
        distillation = None
        if teacher is not None:
            distillation, state = taught(
                state,
                teacher,
                weight=config.distillation.weight,
                temperature=config.distillation.temperature,
            )
        state = devices.shard_state(state)
        train_step = make_train_step(
            graphdefs,
            optimizer,
            objective=task.objective,
            schedule=schedule,
            accumulate=config.accumulate,
            average_decay=warmed_up(config.average_decay),
            collect=collected(config),
            distillation=distillation,
            placement=devices,
        )
        judge = task.judge(graphdefs, devices)

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
        hosts.wait_for_all("the folder is begun")
        with MetricWriter(folder, resumed_at) as writer:
            state, metrics = fit(
                state,
                train_step=train_step,
                train_data=lambda start_step: data.train_batches(
                    train_source,
                    batch_size=config.batch_size,
                    seed=config.seed,
                    fields=task.fields,
                    augment=augment,
                    bucketing=task.bucketing,
                    start_step=start_step,
                    num_threads=config.dataset.num_threads,
                    num_workers=config.dataset.num_workers,
                    shard_index=jax.process_index(),
                    shard_count=jax.process_count(),
                ),
                evaluate=lambda state: judge(state, validation_source or test_source),
                devices=devices,
                plan=plan,
                writer=writer,
                checkpoints=checkpoints,
                seconds_before=time.monotonic() - started,
                name=config.experiment,
                held_out="validation" if validation_source else "test",
                operands=tuple(qj.operand_quantizers(model)),
                trace=workdir / "trace" if config.profile and hosts.is_first() else None,
            )
            measured = {}
            if validation_source:
                measured = {f"validation_{name}": value for name, value in metrics.items()}
                metrics = judge(state, test_source)
                if not writer.has(plan.total, "test"):  # else by a run that was ended after it
                    writer.write(plan.total, "test", metrics)

    # Result
    save_trained(graphdefs, state, devices, workdir / WEIGHTS)
    measured |= {f"test_{name}": value for name, value in metrics.items()}
    measured |= {"steps": plan.total, "parameters": parameters}
    result = folder.finish(settings, measured, wall_seconds=time.monotonic() - started)
    headline = f"test_{task.headline}"
    logger.info(
        "%s %.2f %%: %s",
        headline.replace("_", " "),
        100 * measured[headline],
        folder.result_path,
    )
    return result


def save_trained(graphdefs: GraphDefs, state: TrainState, devices: Placement, path: Path) -> None:
    """Leaves the parameters that were judged, under another library's names (`save_weights`)."""
    whole = jax.jit(devices.gather)((state.evaluated_params, state.evaluated_model_state))
    if hosts.is_first():
        save_weights(nnx.merge(graphdefs.evaluation, *whole), path)


def join_hosts(config: ConfigDict) -> None:
    """Meets the other processes of the run, if the config says that there are some.

    Raises:
        ValueError: they cannot be found, or are described without being asked for.
    """
    if not config.join:
        given = [key for key in ("coordinator", "processes", "index") if config[key] is not None]
        if given:
            raise ValueError(
                f"hosts.{given[0]} means nothing without hosts.join: pass --config.hosts.join"
            )
    else:
        hosts.join(config.coordinator, config.processes, config.index)
        if not hosts.is_first():
            cli.speak_only_of_errors()


def check_shards(model: nnx.Module, examples: int) -> None:
    """Raises ValueError unless so many examples can be cut into each activation's shards."""
    for path, operand in qj.operand_quantizers(model).items():
        granularity = operand.quantizer.granularity
        if is_weight(path) or not isinstance(granularity, qj.PerShard):
            continue
        if examples % granularity.count:
            raise ValueError(
                f"the {granularity.count} shards of {path} do not divide {examples} examples, "
                "which is batch_size over accumulate: choose a quant.shards or batch_size that can"
            )


def collected(config: ConfigDict) -> dict[str, Collected]:
    """What every step returns about its quantisers."""
    collect = {NON_FINITE: Collected(qj.NonFinite, qj.captured_by_operand)}
    if config.quant.diagnostics:
        collect["diagnostics"] = Collected(qj.Diagnostic, qj.diagnostics_by_layer)
    return collect


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
