"""What a main has to know of a kind of data: where examples come from, how models are judged."""

import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

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
    def num_threads(self) -> int:
        """Threads that read examples ahead."""
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


def check_reading(dataset: ConfigDict) -> None:
    """Raises ValueError unless a config's `dataset` can be read by as many as it says."""
    for name in ("num_threads", "num_workers"):
        if dataset.get(name, 0) < 0:
            raise ValueError(f"dataset.{name} is {dataset[name]}: give 0 or more")


def not_held_out(train_split: str, validation_split: str) -> str:
    """What is wrong where training would see examples that are to be held out of it.

    Example:
        >>> not_held_out("train", "train[1000:]")
        'dataset.train_split train has examples of dataset.validation_split train[1000:], which \
would not be held out: pass --config.dataset.train_split=train[:1000]'
    """
    sliced = re.fullmatch(r"(.+)\[(-?\d+%?)?:(-?\d+%?)?\]", validation_split)
    mend = "choose splits without common examples"
    if sliced is not None and None in sliced.groups():  # open on one side: training gets that
        name, start, stop = (part or "" for part in sliced.groups())
        mend = f"pass --config.dataset.train_split={name}[{stop}:{start}]"
    return (
        f"dataset.train_split {train_split} has examples of dataset.validation_split "
        f"{validation_split}, which would not be held out: {mend}"
    )


def training_inputs(task: Task, config: ConfigDict, count: int) -> Iterator[tuple[jax.Array, ...]]:
    """`calibration_inputs` of the examples that a config trains on, in its batches."""
    return calibration_inputs(
        task,
        task.calibration_source(),
        batch_size=config.batch_size,
        seed=config.seed,
        count=count,
    )


def calibration_inputs(
    task: Task, source: Any, *, batch_size: int, seed: int, count: int
) -> Iterator[tuple[jax.Array, ...]]:
    """What the model is called with on the first batches of shuffled examples.

    Raises:
        ValueError: the count is negative.
    """
    if count < 0:
        raise ValueError(f"there are no {count} batches to calibrate on: give 0 or more")
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


def eval_inputs(
    task: Task, source: Any, batch_size: int
) -> Iterator[tuple[tuple[jax.Array, ...], np.ndarray]]:
    """What the model is called with on each batch of a source, and which of it are no fillers.

    All batches have one shape: sequences are as long as the source has them.
    """
    batches = data.eval_batches(
        source, batch_size=batch_size, fields=task.fields, num_threads=task.num_threads
    )
    for batch in batches:
        yield _inputs(task, batch), batch["mask"]


def _inputs(task: Task, batch: HostBatch) -> tuple[jax.Array, ...]:
    return task.objective.inputs({name: jnp.asarray(array) for name, array in batch.items()})


def eval_batches(task: Task, source: Any, batch_size: int) -> Iterator[HostBatch]:
    """This process's part of every batch of a source."""
    return data.eval_batches(
        source,
        batch_size=batch_size,
        fields=task.fields,
        bucketing=task.bucketing,
        num_threads=task.num_threads,
        shard_index=jax.process_index(),
        shard_count=jax.process_count(),
    )
