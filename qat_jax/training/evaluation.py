"""Judging a state by examples: sums over batches, or all that the model says to them."""

import math
from collections.abc import Iterable, Sequence

import jax
import numpy as np

from qat_jax.training.sharding import Placement
from qat_jax.training.state import TrainState
from qat_jax.training.step import EvalStep

HostBatch = dict[str, np.ndarray]
Metrics = dict[str, float | int]

# Metrics that are no shares of the examples.
_LOSS = "loss"
_COUNTS = ("correct", "count")


def evaluate(
    eval_step: EvalStep, state: TrainState, batches: Iterable[HostBatch], devices: Placement
) -> Metrics:
    """Loss and accuracy over a whole set, every example counted exactly once.

    Args:
        eval_step: from `make_eval_step`.
        state: the model to evaluate.
        batches: finite; see `make_eval_step`.
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


def predict(
    predict_step: EvalStep, state: TrainState, batches: Iterable[HostBatch], devices: Placement
) -> tuple[np.ndarray, float]:
    """What a model says to a whole set.

    Args:
        predict_step: from `make_predict_step`.
        state: the model.
        batches: finite.
        devices: where to compute.

    Returns:
        The outputs to every example once, in order, [N, …], and the mean loss. Where batches are of
        different lengths, those of the shorter ones end in zeros.

    Raises:
        ValueError: there is no example.
    """
    said = [jax.device_get(predict_step(state, devices.shard_batch(batch))) for batch in batches]
    if not said:
        raise ValueError("the evaluation set is empty")
    mask = np.concatenate([part["mask"] for part in said])
    outputs = _stacked([part["outputs"] for part in said])[mask]
    losses = np.concatenate([part["loss"] for part in said])[mask]
    return outputs, math.fsum(losses) / len(losses)


def _stacked(outputs: Sequence[np.ndarray]) -> np.ndarray:
    """[B, L, …] each to [N, the longest L, …]."""
    shape = np.array([part.shape[1:] for part in outputs]).max(axis=0)
    missing = [[(0, 0), *((0, n) for n in shape - part.shape[1:])] for part in outputs]
    return np.concatenate([np.pad(*padded) for padded in zip(outputs, missing, strict=True)])


def summary(metrics: Metrics) -> str:
    """One line for people.

    Example:
        >>> summary({"loss": 0.25, "accuracy": 0.5, "correct": 2, "count": 4})
        'accuracy 50.00%  loss 0.2500  (4 examples)'
    """
    shares = [
        f"{name.replace('_', ' ')} {value:.2%}"
        for name, value in metrics.items()
        if name != _LOSS and name not in _COUNTS
    ]
    return "  ".join([*shares, f"loss {metrics[_LOSS]:.4f}", f"({metrics['count']} examples)"])
