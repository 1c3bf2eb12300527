"""Batches from random-access sources, by Grain: reproducible, resumable at any step, read ahead.

Fields of examples are stacked under the same names. Images stay uint8 until they are on the
device; the jitted step normalises them.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import grain
import numpy as np
from absl import flags

from qat_jax.data.bucketing import Bucketing
from qat_jax.data.prepare import DataError

Example = dict[str, Any]
Batch = dict[str, np.ndarray]
Augment = Callable[[np.ndarray, np.random.Generator], np.ndarray]

IMAGE_FIELDS: tuple[str, ...] = ("image", "label")

# Batches that wait ready for each reading thread: enough to ride out an uneven step.
_BUFFERED_PER_THREAD = 4


class RandomAccessSource(Protocol):
    """What a pipeline reads: a `tfds.data_source`, or a list of examples.

    A source that also has `__getitems__(indices)` is asked for whole batches.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Example: ...


@dataclasses.dataclass(frozen=True)
class PreparedSource:
    """A source whose images are changed as they are read.

    Attributes:
      source: what is read.
      prepare: image -> image, such as a `CentreCrop`.
    """

    source: RandomAccessSource | Sequence[Example]
    prepare: Callable[[np.ndarray], np.ndarray]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int, /) -> Example:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int], /) -> list[Example]:
        examples = _read_examples(self.source, indices)
        return [example | {"image": self.prepare(example["image"])} for example in examples]


@dataclasses.dataclass(frozen=True)
class InMemory:
    """A source whose examples are read once: reading small images costs more than a step on a GPU.

    Attributes:
      source: what is read; all of it has to fit into memory, decoded.
    """

    source: RandomAccessSource | Sequence[Example]
    _read: dict[int, Example] = dataclasses.field(default_factory=dict, init=False, repr=False)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int, /) -> Example:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int], /) -> list[Example]:
        new = [index for index in dict.fromkeys(indices) if index not in self._read]
        if new:
            self._read.update(zip(new, _read_examples(self.source, new), strict=True))
        return [self._read[index] for index in indices]


def train_batches(
    source: RandomAccessSource | Sequence[Example],
    *,
    batch_size: int,
    seed: int,
    fields: Sequence[str] = IMAGE_FIELDS,
    augment: Augment | None = None,
    bucketing: Bucketing | None = None,
    start_step: int = 0,
    num_threads: int = 1,
    num_workers: int = 0,
    shard_index: int = 0,
    shard_count: int = 1,
) -> Iterator[Batch]:
    """Endless shuffled batches: a new permutation each epoch, determined by seed and step alone.

    The set is repeated, then batched: every batch is full, a batch may straddle two epochs, and
    `batch_size` may exceed the size of the set. Permutation and augmentation depend on the
    position in the endless stream, so a stream that begins at `start_step=k` equals the stream
    from 0 after k batches without reading those; threads and workers change nothing but speed.

    Args:
      source: examples that have the fields: arrays of one shape each, or numbers.
      batch_size: examples in a global batch, over all shards.
      seed: 0 … 2³²-1.
      fields: what a batch is made of; a source may have more.
      augment: (image, generator) -> image, applied to each example's `image`; all results have one
        shape.
      bucketing: how sequences of different lengths share batches; the source is `Sequences`. None:
        as they are drawn, each as long as the source has it.
      start_step: index of the first batch.
      num_threads: threads that read ahead, in each process that reads; 0 reads on demand. More
        than one helps where reading waits (a slow disk, JPEG), not with small stored arrays.
      num_workers: worker processes that read; 0 reads in this process. With workers, `source`
        and `augment` must pickle and the main module must be importable without side effects.
      shard_index: which part of every global batch is wanted: `jax.process_index()`.
      shard_count: into how many disjoint parts it is divided: `jax.process_count()`.

    Returns:
      Iterator of {field: [b, …]}, b = batch_size / shard_count; integers of more than 32 bits
      become int32. `close()` ends its threads and workers at once.

    Raises:
      ValueError: an empty source, a batch that does not divide into the shards, or bucketing of
        other things than sequences.
      DataError: from the iterator: an example cannot be read.

    Example:
      >>> examples = [{"image": np.full((1, 1, 1), i, np.uint8), "label": i} for i in range(4)]
      >>> batches = train_batches(examples, batch_size=4, seed=0)
      >>> sorted(next(batches)["label"].tolist())
      [0, 1, 2, 3]
    """
    if len(source) == 0:
        raise ValueError("the source has no examples: choose a larger split")
    if bucketing is not None:
        bucketing.check(source)
    order = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()
    part = _Part(batch_size, shard_index, shard_count)
    steps = grain.MapDataset.range(start_step, sys.maxsize)
    read = _ReadTraining(source, order, part, tuple(fields), augment, bucketing, seed)
    batches = steps.map(read)
    batches = batches.to_iter_dataset(_read_options(num_threads))
    return _in_workers(batches, num_workers) if num_workers else iter(batches)


def eval_batches(
    source: RandomAccessSource | Sequence[Example],
    *,
    batch_size: int,
    fields: Sequence[str] = IMAGE_FIELDS,
    bucketing: Bucketing | None = None,
    num_threads: int = 1,
    shard_index: int = 0,
    shard_count: int = 1,
) -> Iterator[Batch]:
    """Every example exactly once, in order, in batches of one shape.

    The tail is filled with examples from the start again, which `mask` marks, so that sums over
    `mask` are exact: fillers of another kind would move the thresholds of a network that finds
    them from the batch. Every shard gives the same number of batches.

    Args:
      source: examples that have the fields.
      batch_size: examples in a global batch, over all shards.
      fields: what a batch is made of.
      bucketing: a batch is as long as its longest sequence needs; the order stays. None: as long
        as the source has it.
      num_threads: threads that read ahead; 0 reads on demand.
      shard_index: which part of every global batch is wanted: `jax.process_index()`.
      shard_count: into how many disjoint parts it is divided: `jax.process_count()`.

    Returns:
      Iterator of {field: [b, …], "mask": bool [b]} with b = batch_size / shard_count; `mask` is
      True for examples, False for padding.

    Raises:
      ValueError: a batch that does not divide into the shards, or bucketing of other things than
        sequences.

    Example:
      >>> examples = [{"image": np.full((1, 1, 1), i, np.uint8), "label": i} for i in range(3)]
      >>> [batch["mask"].tolist() for batch in eval_batches(examples, batch_size=2)]
      [[True, True], [True, False]]
    """
    if bucketing is not None:
        bucketing.check(source)
    part = _Part(batch_size, shard_index, shard_count)
    steps = grain.MapDataset.range(-(-len(source) // batch_size))
    batches = steps.map(_ReadEvaluation(source, part, tuple(fields), bucketing))
    return iter(batches.to_iter_dataset(_read_options(num_threads)))


@dataclasses.dataclass(frozen=True)
class _Part:
    """The consecutive positions of every global batch that one shard reads."""

    batch_size: int
    shard_index: int
    shard_count: int

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.batch_size % self.shard_count:
            raise ValueError(
                f"batch_size {self.batch_size} must be a positive multiple of shard_count "
                f"{self.shard_count}"
            )
        if not 0 <= self.shard_index < self.shard_count:
            raise ValueError(
                f"shard_index {self.shard_index} must lie in 0 … {self.shard_count - 1}"
            )

    @property
    def size(self) -> int:
        return self.batch_size // self.shard_count

    def positions(self, step: int) -> range:
        """Those of this shard's part of a batch."""
        start = step * self.batch_size + self.shard_index * self.size
        return range(start, start + self.size)

    def of(self, batch: np.ndarray) -> list[int]:
        """This shard's part of the indices of a global batch."""
        start = self.shard_index * self.size
        return batch[start : start + self.size].tolist()


@dataclasses.dataclass(frozen=True)
class _ReadTraining:
    """Step -> batch. Reads a batch at a time: Grain's own cost an example is several times ours."""

    source: Any
    order: Any
    part: _Part
    fields: tuple[str, ...]
    augment: Augment | None
    bucketing: Bucketing | None
    seed: int

    def __call__(self, step: int) -> Batch:
        positions = self.part.positions(step)
        examples = _read_examples(*self._drawn(step, positions))
        if self.augment is not None:
            examples = [
                example | {"image": self.augment(example["image"], _generator(self.seed, position))}
                for example, position in zip(examples, positions, strict=True)
            ]
        return _stack(examples, self.fields)

    def _drawn(self, step: int, positions: range) -> tuple[Any, list[int]]:
        """What is read of which source."""
        if self.bucketing is None:
            # The order goes on beyond the first epoch, the indices of the source do not.
            return self.source, [self.order[position] for position in positions]
        batch = self.bucketing.batch(
            self.order,
            step,
            lengths=self.source.lengths,
            batch_size=self.part.batch_size,
            seed=self.seed,
        )
        return self.bucketing.cut(self.source, batch), self.part.of(batch)


@dataclasses.dataclass(frozen=True)
class _ReadEvaluation:
    """Step -> batch in the source's order, beginning again where it ends."""

    source: Any
    part: _Part
    fields: tuple[str, ...]
    bucketing: Bucketing | None

    def __call__(self, step: int) -> Batch:
        positions = self.part.positions(step)
        source, count = self.source, len(self.source)
        if self.bucketing is not None:
            first = step * self.part.batch_size
            batch = np.arange(first, first + self.part.batch_size) % count
            source = self.bucketing.cut(source, batch)
        examples = _read_examples(source, [i % count for i in positions])
        return _stack(examples, self.fields) | {"mask": np.array(positions) < count}


def _stack(examples: Sequence[Example], fields: tuple[str, ...]) -> Batch:
    batch = {field: np.stack([example[field] for example in examples]) for field in fields}
    # JAX has no wider integers unless it is asked for them.
    return {
        field: array.astype(np.int32) if array.dtype in (np.int64, np.uint64) else array
        for field, array in batch.items()
    }


def _read_examples(
    source: RandomAccessSource | Sequence[Example], indices: list[int]
) -> Sequence[Example]:
    read_many = getattr(source, "__getitems__", None)
    try:
        return [source[index] for index in indices] if read_many is None else read_many(indices)
    except (OSError, RuntimeError) as error:  # RuntimeError is what damaged array_records raise.
        raise DataError(f"cannot read the data ({error}): get a fresh copy of it") from error


def _generator(seed: int, position: int) -> np.random.Generator:
    """A stream of its own for every position, so that who reads it, and when, cannot matter."""
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, position]))


def _read_options(num_threads: int) -> grain.ReadOptions:
    return grain.ReadOptions(
        num_threads=num_threads, prefetch_buffer_size=num_threads * _BUFFERED_PER_THREAD
    )


def _in_workers(batches: Any, num_workers: int) -> Iterator[Batch]:
    # Grain looks at flags of its own here, which a program without absl's app.run never parses.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    options = grain.MultiprocessingOptions(num_workers, per_worker_buffer_size=2)
    read = iter(batches.mp_prefetch(options, _live_as_long_as_the_run).map(_own_memory))
    try:
        yield from read
    except RuntimeError as error:
        if "process was terminated" not in str(error):
            raise
        raise DataError(
            "a process that reads was ended from outside: lower dataset.num_workers if it was "
            "for want of memory"
        ) from error
    finally:
        read.close()


def _live_as_long_as_the_run(index: int, count: int) -> None:
    """Leaves signals to the process that trains, which may want batches before it stops.

    Terminals and clusters send them to all processes.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    trains = multiprocessing.parent_process()
    threading.Thread(target=_end_with, args=(trains,), daemon=True).start()


def _end_with(process: Any) -> None:
    process.join()
    os._exit(1)


def _own_memory(batch: Batch) -> Batch:
    """Copies out of the workers' shared memory, which goes away while JAX may still look at it."""
    return {name: np.array(values) for name, values in batch.items()}
