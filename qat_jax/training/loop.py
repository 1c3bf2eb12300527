"""The training loop: steps, evaluations, checkpoints, and an orderly end.

It composes the other files of this room and adds only the order of things.
"""

import contextlib
import dataclasses
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from qat_jax.data import DataError
from qat_jax.training import hosts
from qat_jax.training.checkpoint import Checkpoints
from qat_jax.training.compilation import PerShape
from qat_jax.training.evaluation import HostBatch, Metrics, summary
from qat_jax.training.hosts import Largest
from qat_jax.training.progress import ProgressBar
from qat_jax.training.sharding import Placement
from qat_jax.training.state import TrainState
from qat_jax.training.step import TrainStep
from qat_jax.training.trace import StepTrace
from qat_jax.training.workdir import MetricWriter

# The metric with the non-finite groups of every operand (see `qat_jax.NonFinite`), which is there
# to explain a failure and is not written.
NON_FINITE = "non_finite"


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite."""


class Interrupted(Exception):  # noqa: N818 - an interruption is not an error
    """A signal ended the run early; its state is saved.

    Attributes:
        signal_number: which signal.
    """

    def __init__(self, signal_number: int, step: int):
        name = signal.Signals(signal_number).name
        super().__init__(
            f"stopped by {name} at {_saved(step)}: run the same command again to go on"
        )
        self.signal_number = signal_number


@dataclasses.dataclass(frozen=True)
class Plan:
    """How long to train and how often to do what, in steps.

    Attributes:
        total: updates in all.
        eval_every: evaluate after every so many, and after the last.
        checkpoint_every: save after every so many, and after the last.
        log_every: write training metrics after every so many.
    """

    total: int
    eval_every: int
    checkpoint_every: int
    log_every: int

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise ValueError(f"{field.name} must be at least 1 step")


def fit(
    state: TrainState,
    *,
    train_step: TrainStep,
    train_data: Callable[[int], Iterator[HostBatch]],
    evaluate: Callable[[TrainState], Metrics],
    devices: Placement,
    plan: Plan,
    writer: MetricWriter,
    checkpoints: Checkpoints,
    seconds_before: float = 0.0,
    name: str = "train",
    held_out: str = "test",
    operands: Sequence[str] = (),
    trace: Path | None = None,
) -> tuple[TrainState, Metrics]:
    """Trains from `state.step` to `plan.total`.

    A new run is evaluated once before the first step, so that the first line of the metrics says
    where it started. The step is compiled ahead for each shape of batches, and what memory it
    takes is said before it runs.

    Of several processes each calls this with its own part of the data; they stop together when one
    of them is asked to.

    Args:
        state: where to start; its memory is given to the states that follow.
        train_step: from `make_train_step`; what it collects as `NON_FINITE` explains failures.
        train_data: the endless training batches from a given step on; closed at the end
            where it has `close`.
        evaluate: judges a state by examples it is not trained on.
        devices: where state and batches live.
        plan: how long and how often.
        writer: where metrics go.
        checkpoints: where states go.
        seconds_before: time earlier parts of this run took.
        name: shown beside the progress bar.
        held_out: what those examples are called.
        operands: the names of `NON_FINITE` in the order in which they are computed.
        trace: the folder to record a few steps in.

    Returns:
        The last state and the last evaluation's metrics.

    Raises:
        NonFiniteLossError: the loss of a step is NaN or infinite.
        Interrupted: SIGINT or SIGTERM came to any process; the state is saved first.
        DataError: training data cannot be read; the state is saved first, unless there are other
            processes.
    """
    started = time.monotonic() - seconds_before
    step = int(state.step)
    saved_step = step if step else None
    previous: tuple[int, dict[str, Any]] | None = None
    tested: Metrics | None = None
    stopped_by = 0

    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(ProgressBar(name, plan.total, step))
        tracer = stack.enter_context(StepTrace(trace))
        stop = stack.enter_context(stop_signals())
        asked_to_stop = Largest(devices)
        compiled = PerShape(train_step, lambda memory: progress.message(f"{name}: {memory}"))

        def test() -> Metrics:
            metrics = evaluate(state)
            writer.write(step, held_out, metrics)
            progress.message(f"{name}: step {step}/{plan.total}  {held_out} {summary(metrics)}")
            return metrics

        def save() -> int:
            checkpoints.save(state, seconds=time.monotonic() - started)
            return step

        def save_what_is_new() -> None:
            if previous is not None:
                check(*previous)
                if saved_step != step:
                    save()

        def check(step: int, metrics: dict[str, Any]) -> None:
            _check_finite(step, metrics, operands, checkpointed=saved_step)

        if step == 0:
            tested = test()
        batches = train_data(step)
        if hasattr(batches, "close"):  # Grain's iterators stop their reading threads.
            stack.callback(batches.close)
        while step < plan.total and not (stopped_by := asked_to_stop(stop.signal_number or 0)):
            try:
                host_batch = next(batches)
            except Exception as error:
                if not hosts.is_alone():  # Saving needs the others, who wait for this batch.
                    raise
                # A signal to all processes of a group may have ended those that read.
                if stopped_by := stop.signal_number or 0:
                    break
                if not isinstance(error, DataError):
                    raise
                save_what_is_new()
                raise DataError(
                    f"{error}; stopped at {_saved(step)}: run the same command again to go on"
                ) from error
            batch = devices.shard_batch(host_batch)
            tracer.before_step()
            state, metrics = compiled(state, batch)
            step += 1
            # Looking one step back keeps a step queued on the device while the host waits.
            if previous is not None:
                check(*previous)
            previous = (step, metrics)
            progress.advance()
            if (traced := tracer.after_step(metrics)) is not None:
                progress.message(f"{name}: a trace is in {traced}")

            is_last = step == plan.total
            logs, tests, saves = (
                step % every == 0 or is_last
                for every in (plan.log_every, plan.eval_every, plan.checkpoint_every)
            )
            if logs or tests or saves:
                check(*previous)
            if logs:
                written = jax.device_get({k: v for k, v in metrics.items() if k != NON_FINITE})
                writer.write(step, "train", written)
                progress.note(f"loss {written['loss']:.4f}")
            if tests:
                tested = test()
            if saves:
                saved_step = save()

        if stopped_by and step < plan.total:
            save_what_is_new()
            raise Interrupted(stopped_by, step)

        if tested is None:  # Resumed after the last step, whose line is already written.
            tested = evaluate(state)
    return state, tested


def _saved(step: int) -> str:
    return f"step {step}, which is saved" if step else "step 0, before the first was done"


def _check_finite(
    step: int, metrics: dict[str, Any], operands: Sequence[str], *, checkpointed: int | None
) -> None:
    # Both: a mean after a ReLU can hide NaN from the loss, XLA's CPU backend makes a number of it.
    wrong = {
        what: value
        for what, name in (("loss", "loss"), ("norm of the gradient", "grad_norm"))
        if name in metrics and not math.isfinite(value := float(metrics[name]))
    }
    if not wrong:
        return
    what, value = next(iter(wrong.items()))
    counts = jax.device_get(metrics.get(NON_FINITE, {}))
    first = next((name for name in operands if counts.get(name, 0) > 0), None)
    where = f", and first in the operand {first}" if first else ""
    kept = f"; the state of step {checkpointed} is saved" if checkpointed else ""
    raise NonFiniteLossError(
        f"the {what} is {value} at step {step}{where}: lower optimizer.learning_rate or lengthen "
        f"the warm-up, and start in another --workdir{kept}"
    )


@dataclasses.dataclass
class StopRequest:
    """Set by a signal handler.

    Attributes:
        signal_number: the signal that asked for the end; None while there is none.
    """

    signal_number: int | None = None


@contextlib.contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Turns the first SIGINT or SIGTERM into a request; a second one acts as it did before.

    Outside the main thread, where Python allows no handlers, signals act as before.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def ask(number: int, frame: Any) -> None:
        request.signal_number = number
        restore()

    for number in before:
        signal.signal(number, ask)
    try:
        yield request
    finally:
        restore()
