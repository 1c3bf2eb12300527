"""A tiny model, its data and a laboratory that trains it, for the tests of this room."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

from qat_jax.training.checkpoint import Checkpoints
from qat_jax.training.evaluation import Metrics, evaluate
from qat_jax.training.loop import Plan, fit
from qat_jax.training.objective import Classification
from qat_jax.training.sharding import Placement
from qat_jax.training.state import GraphDefs, TrainState, create_state
from qat_jax.training.workdir import MetricWriter, Workdir

CLASSES = 3


class TinyNet(nnx.Module):
    def __init__(self, width: int, rngs: nnx.Rngs):
        self.conv = nnx.Conv(1, width, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        self.linear = nnx.Linear(width, CLASSES, rngs=rngs)

    def __call__(self, image: jax.Array) -> jax.Array:
        x = nnx.relu(self.norm(self.conv(image)))
        self.sow(nnx.Intermediate, "largest", x.max())
        return self.linear(x.mean((1, 2)))


def examples(seed: int, count: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (count, 4, 4, 1), dtype=np.uint8)
    return {"image": image, "label": rng.integers(0, CLASSES, count, dtype=np.int32)}


def train_data(start_step: int) -> Iterator[dict[str, np.ndarray]]:
    step = start_step
    while True:
        yield examples(step, 8)
        step += 1


def eval_data() -> Iterator[dict[str, np.ndarray]]:
    for seed, valid in [(1001, 8), (1002, 3)]:
        yield {**examples(seed, 8), "mask": np.arange(8) < valid}


@dataclasses.dataclass
class Lab:
    """A tiny model with its steps, compiled once for all tests."""

    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    objective: Classification
    graphdefs: GraphDefs
    devices: Placement
    train_step: Callable[..., Any]
    eval_step: Callable[..., Any]

    def model(self, width: int = 4) -> TinyNet:
        return TinyNet(width, nnx.Rngs(0))

    def state(self, width: int = 4) -> TrainState:
        return self.devices.shard_state(create_state(self.model(width), self.optimizer)[1])

    def evaluate(self, state: TrainState) -> Metrics:
        return evaluate(self.eval_step, state, eval_data(), self.devices)

    def fit(self, path: Path, plan: Plan, **changes: Any) -> tuple[TrainState, dict[str, Any]]:
        folder = Workdir(path)
        with Checkpoints(folder.checkpoints_path) as checkpoints:
            fresh = changes.pop("state", None) or self.state()
            restored = checkpoints.restore(fresh)
            state, _ = restored or (fresh, 0.0)
            folder.begin({})
            with MetricWriter(folder, int(state.step) if restored else None) as writer:
                parts: dict[str, Any] = {
                    "train_step": self.train_step,
                    "train_data": train_data,
                    "evaluate": self.evaluate,
                }
                return fit(
                    state,
                    devices=self.devices,
                    plan=plan,
                    writer=writer,
                    checkpoints=checkpoints,
                    **(parts | changes),
                )
