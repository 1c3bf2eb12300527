"""What a main has to know of a kind of data: where examples come from, how models are judged."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from qat_jax import data
from qat_jax.data.pipeline import Augment
from qat_jax.training.evaluation import HostBatch, Metrics
from qat_jax.training.objective import Objective
from qat_jax.training.sharding import Placement
from qat_jax.training.state import GraphDefs, TrainState

# Of a state and a source of examples.
Judge = Callable[[TrainState, Any], Metrics]


class Task(Protocol):
    """A kind of data, as a config describes it.

    Attributes:
        fields: what batches are made of.
        headline: the metric that says how good a model is, a share in [0, 1].
    """

    fields: tuple[str, ...]
    headline: str

    @property
    def objective(self) -> Objective:
        """What models are trained for."""
        ...

    @property
    def bucketing(self) -> data.Bucketing | None:
        """How examples of different lengths share batches; None where all are of one."""
        ...

    def train_source(self) -> tuple[Any, Augment | None]:
        """The training examples, at random access, and how their images are augmented."""
        ...

    def calibration_source(self) -> Any:
        """The training examples, not augmented."""
        ...

    def test_source(self) -> Any:
        """The test examples."""
        ...

    def validation_source(self) -> Any:
        """The held-out training examples, or None where the config holds none out."""
        ...

    def held(self, source: Any) -> Any:
        """A source of test examples, to be read many times."""
        ...

    def judge(self, graphdefs: GraphDefs, devices: Placement) -> Judge:
        """What measures a state on a source: metrics with `loss`, `count` and the headline."""
        ...


def calibration_inputs(
    task: Task, source: Any, *, batch_size: int, seed: int, count: int
) -> Iterator[tuple[jax.Array, ...]]:
    """What the model is called with on the first batches of shuffled examples."""
    batches = data.train_batches(source, batch_size=batch_size, seed=seed, fields=task.fields)
    for batch in itertools.islice(batches, count):
        yield _inputs(task, batch)


def calibration_batch(
    task: Task, source: Any, *, batch_size: int, seed: int
) -> dict[str, jax.Array]:
    """The first batch of shuffled examples, with their labels or answers."""
    batches = data.train_batches(source, batch_size=batch_size, seed=seed, fields=task.fields)
    return {name: jnp.asarray(array) for name, array in next(iter(batches)).items()}


def first_inputs(task: Task, source: Any, count: int) -> tuple[jax.Array, ...]:
    """What the model is called with on the first examples of a source."""
    batch = next(data.eval_batches(source, batch_size=count, fields=task.fields))
    return _inputs(task, batch)


def _inputs(task: Task, batch: HostBatch) -> tuple[jax.Array, ...]:
    return task.objective.inputs({name: jnp.asarray(array) for name, array in batch.items()})


def eval_batches(task: Task, source: Any, batch_size: int) -> Iterator[HostBatch]:
    """This process's part of every batch of a source."""
    return data.eval_batches(
        source,
        batch_size=batch_size,
        fields=task.fields,
        bucketing=task.bucketing,
        shard_index=jax.process_index(),
        shard_count=jax.process_count(),
    )
