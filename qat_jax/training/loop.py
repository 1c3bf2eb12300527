"""The training loop: steps, evaluations, checkpoints, and an orderly end.

It composes the other files of this room and adds only the order of things.
"""

import contextlib
import dataclasses
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np

from qat_jax.training.checkpoint import Checkpoints
from qat_jax.training.progress import ProgressBar
from qat_jax.training.sharding import Placement
from qat_jax.training.state import TrainState
from qat_jax.training.step import EvalStep, TrainStep
from qat_jax.training.workdir import MetricWriter

HostBatch = dict[str, np.ndarray]


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite."""


class Interrupted(Exception):  # noqa: N818 - an interruption is not an error
    """A signal ended the run early; its state is saved.

    Attributes:
        signal_number: which signal.
    """

    def __init__(self, signal_number: int, step: int):
        name = signal.Signals(signal_number).name
        what = "which is saved" if step else "before the first was done"
        super().__init__(
            f"stopped by {name} at step {step}, {what}: run the same command again to go on"
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


def evaluate(
    eval_step: EvalStep, state: TrainState, batches: Iterable[HostBatch], devices: Placement
) -> dict[str, float | int]:
    """Loss and accuracy over a whole set, every example counted exactly once.

    Args:
        eval_step: from `make_eval_step`.
        state: the model to evaluate.
        batches: finite; each {"image", "label", "mask"}.
        devices: where to compute.

    Returns:
        `loss` (mean, in nats), `accuracy` (share in [0, 1]), `correct` and `count`.

    Raises:
        ValueError: there is no example.
    """
    sums = [eval_step(state, devices.shard_batch(batch)) for batch in batches]
    sums = jax.device_get(sums)
    count = sum(int(part["count"]) for part in sums)
    if count == 0:
        raise ValueError("the evaluation set is empty")
    correct = sum(int(part["correct"]) for part in sums)
    loss = math.fsum(float(part["loss"]) for part in sums) / count
    return {"loss": loss, "accuracy": correct / count, "correct": correct, "count": count}


def fit(
    state: TrainState,
    *,
    train_step: TrainStep,
    eval_step: EvalStep,
    train_data: Callable[[int], Iterator[HostBatch]],
    eval_data: Callable[[], Iterable[HostBatch]],
    devices: Placement,
    plan: Plan,
    writer: MetricWriter,
    checkpoints: Checkpoints,
    seconds_before: float = 0.0,
    name: str = "train",
) -> tuple[TrainState, dict[str, float | int]]:
    """Trains from `state.step` to `plan.total`.

    A new run is evaluated once before the first step, so that the first line of the metrics says
    where it started.

    Args:
        state: where to start; its memory is given to the states that follow.
        train_step: from `make_train_step`.
        eval_step: from `make_eval_step`.
        train_data: the endless training batches from a given step on; closed at the end
            where it has `close`.
        eval_data: one pass over the test set.
        devices: where state and batches live.
        plan: how long and how often.
        writer: where metrics go.
        checkpoints: where states go.
        seconds_before: time earlier parts of this run took.
        name: shown beside the progress bar.

    Returns:
        The last state and the last evaluation's metrics.

    Raises:
        NonFiniteLossError: the loss of a step is NaN or infinite.
        Interrupted: SIGINT or SIGTERM came; the state is saved first.
    """
    started = time.monotonic() - seconds_before
    step = int(state.step)
    saved_step = step if step else None
    previous: tuple[int, Any] | None = None
    tested: dict[str, float | int] | None = None

    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(ProgressBar(name, plan.total, step))
        stop = stack.enter_context(stop_signals())

        def test() -> dict[str, float | int]:
            metrics = evaluate(eval_step, state, eval_data(), devices)
            writer.write(step, "test", metrics)
            progress.message(
                f"{name}: step {step}/{plan.total}  test accuracy {metrics['accuracy']:.2%}  "
                f"loss {metrics['loss']:.4f}  ({metrics['count']} examples)"
            )
            return metrics

        def save() -> int:
            checkpoints.save(state, seconds=time.monotonic() - started)
            return step

        if step == 0:
            tested = test()
        batches = train_data(step)
        if hasattr(batches, "close"):  # Grain's iterators stop their reading threads.
            stack.callback(batches.close)
        while step < plan.total and stop.signal_number is None:
            state, metrics = train_step(state, devices.shard_batch(next(batches)))
            step += 1
            # Looking one step back keeps a step queued on the device while the host waits.
            if previous is not None:
                _check_finite(*previous, checkpointed=saved_step)
            previous = (step, metrics["loss"])
            progress.advance()

            is_last = step == plan.total
            logs, tests, saves = (
                step % every == 0 or is_last
                for every in (plan.log_every, plan.eval_every, plan.checkpoint_every)
            )
            if logs or tests or saves:
                _check_finite(*previous, checkpointed=saved_step)
            if logs:
                metrics = jax.device_get(metrics)
                writer.write(step, "train", metrics)
                progress.note(f"loss {metrics['loss']:.4f}")
            if tests:
                tested = test()
            if saves:
                saved_step = save()

        if stop.signal_number is not None and step < plan.total:
            if previous is not None:
                _check_finite(*previous, checkpointed=saved_step)
                if saved_step != step:
                    save()
            raise Interrupted(stop.signal_number, step)

        if tested is None:  # Resumed after the last step, whose line is already written.
            tested = evaluate(eval_step, state, eval_data(), devices)
    return state, tested


def _check_finite(step: int, loss: jax.Array, *, checkpointed: int | None) -> None:
    value = float(loss)
    if not math.isfinite(value):
        kept = f"; the state of step {checkpointed} is saved" if checkpointed else ""
        raise NonFiniteLossError(
            f"the loss is {value} at step {step}: lower optimizer.learning_rate or lengthen the "
            f"warm-up, and start in another --workdir{kept}"
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
