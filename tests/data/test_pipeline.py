import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from qat_jax.data import (
    DataError,
    InMemory,
    eval_batches,
    load_source,
    random_crop_flip,
    train_batches,
)


def take(batches, count):
    taken = list(itertools.islice(batches, count))
    batches.close()
    return taken


def labels(batches):
    return np.concatenate([batch["label"] for batch in batches])


def assert_same(left, right):
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def test_batches_are_arrays_of_the_promised_kinds(numbered):
    (batch,) = take(train_batches(numbered, batch_size=6, seed=0), 1)
    assert type(batch["image"]) is np.ndarray
    assert (batch["image"].shape, batch["image"].dtype) == ((6, 8, 8, 3), np.uint8)
    assert (batch["label"].shape, batch["label"].dtype) == ((6,), np.int32)
    for image, label in zip(batch["image"], batch["label"], strict=True):
        np.testing.assert_array_equal(image, numbered[label]["image"])


def test_every_epoch_is_another_permutation(numbered):
    seen = labels(take(train_batches(numbered, batch_size=5, seed=0), 3 * 37)).reshape(-1, 37)
    for epoch in seen:
        assert sorted(epoch) == list(range(37))
    assert len({epoch.tobytes() for epoch in seen}) == len(seen)


def test_a_batch_may_exceed_the_set(numbered):
    (batch,) = take(train_batches(numbered[:3], batch_size=9, seed=0), 1)
    assert sorted(batch["label"]) == [0, 0, 0, 1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("augment", [None, random_crop_flip])
def test_seed_determines_the_stream(numbered, augment):
    def stream(seed):
        return take(train_batches(numbered, batch_size=8, seed=seed, augment=augment), 10)

    assert_same(stream(3), stream(3))
    assert not np.array_equal(labels(stream(3)), labels(stream(4)))


def test_augmentation_differs_between_examples_epochs_and_seeds():
    one = [{"image": np.arange(64, dtype=np.uint8).reshape(8, 8, 1), "label": 0}]

    def images(seed):
        stream = train_batches(one, batch_size=2, seed=seed, augment=random_crop_flip)
        return {image.tobytes() for batch in take(stream, 10) for image in batch["image"]}

    assert len(images(0)) > 10  # of 162 outcomes, twenty draws
    assert images(0) != images(1)


@pytest.mark.parametrize("augment", [None, random_crop_flip])
@pytest.mark.parametrize("start_step", [1, 7])
def test_starting_late_equals_dropping_batches(numbered, augment, start_step):
    def stream(**kwargs):
        return train_batches(numbered, batch_size=8, seed=3, augment=augment, **kwargs)

    assert_same(take(stream(start_step=start_step), 6), take(stream(), start_step + 6)[start_step:])


def test_starting_late_reads_nothing_before(numbered):
    class Counted(list):
        reads = 0

        def __getitem__(self, index):
            self.reads += 1
            return super().__getitem__(index)

    source = Counted(numbered)
    take(train_batches(source, batch_size=4, seed=0, start_step=10**9, num_threads=0), 2)
    assert source.reads == 8


@pytest.mark.parametrize("num_threads", [1, 4])
def test_threads_change_nothing(numbered, num_threads):
    def stream(num_threads):
        return take(
            train_batches(
                numbered, batch_size=8, seed=3, augment=random_crop_flip, num_threads=num_threads
            ),
            20,
        )

    assert_same(stream(num_threads), stream(0))


def test_workers_change_nothing(digits_dir):
    source = load_source("digits", "train", digits_dir)

    def stream(num_workers):
        batches = train_batches(
            source,
            batch_size=32,
            seed=3,
            augment=random_crop_flip,
            start_step=5,
            num_workers=num_workers,
        )
        return take(batches, 7)

    in_workers = stream(2)
    assert_same(in_workers, stream(0))
    assert all(type(batch["image"]) is np.ndarray for batch in in_workers)


def test_signals_are_left_to_the_process_that_trains(digits_dir):
    source = load_source("digits", "train", digits_dir)
    batches = train_batches(source, batch_size=32, seed=3, num_workers=1)
    next(batches)
    (worker,) = multiprocessing.active_children()
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(worker.pid, number)
    assert len(take(batches, 20)) == 20
    assert not worker.is_alive()


def test_a_worker_that_was_killed_is_an_error_of_the_data(digits_dir):
    source = load_source("digits", "train", digits_dir)
    batches = train_batches(source, batch_size=32, seed=3, num_workers=1)
    next(batches)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(DataError, match=r"ended from outside: lower dataset\.num_workers"):
        take(batches, 20)


def test_workers_end_with_the_process_that_trains(digits_dir):
    program = """
        import os, signal, sys
        from qat_jax.data import load_source, train_batches
        source = load_source("digits", "train", sys.argv[1])
        batches = train_batches(source, batch_size=32, seed=3, num_workers=1)
        next(batches)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(digits_dir)]
    # The worker holds the other end of the pipe: reading it ends when the worker does.
    ended = subprocess.run(command, stdout=subprocess.PIPE, timeout=60)
    assert ended.returncode == -signal.SIGKILL


class Torn:
    def __init__(self, error):
        self.error = error

    def __len__(self):
        return 8

    def __getitem__(self, index):
        raise self.error


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("error", [OSError("no file a"), RuntimeError("no file a")])
def test_what_cannot_be_read_is_an_error_of_the_data(error, num_workers):
    batches = train_batches(Torn(error), batch_size=2, seed=0, num_workers=num_workers)
    with pytest.raises(DataError, match=r"cannot read the data \(no file a\): get a fresh copy"):
        next(batches)
    batches.close()
    with pytest.raises(DataError, match="cannot read the data"):
        next(eval_batches(InMemory(Torn(error)), batch_size=2))


def test_shards_make_up_the_global_batches(numbered):
    def stream(**kwargs):
        return take(
            train_batches(numbered, batch_size=6, seed=3, augment=random_crop_flip, **kwargs), 9
        )

    shards = [stream(shard_index=i, shard_count=3) for i in range(3)]
    for whole, *parts in zip(stream(), *shards, strict=True):
        assert [len(part["label"]) for part in parts] == [2, 2, 2]
        for name in whole:
            np.testing.assert_array_equal(np.concatenate([p[name] for p in parts]), whole[name])


@pytest.mark.parametrize("batch_size", [1, 5, 37, 40])
@pytest.mark.parametrize("shard_count", [1, 2])
def test_evaluation_counts_every_example_once(numbered, batch_size, shard_count):
    global_size = batch_size * shard_count
    shards = [
        list(
            eval_batches(
                numbered, batch_size=global_size, shard_index=index, shard_count=shard_count
            )
        )
        for index in range(shard_count)
    ]
    assert {len(shard) for shard in shards} == {-(-37 // global_size)}
    batches = [batch for shard in shards for batch in shard]
    assert {batch["image"].shape for batch in batches} == {(batch_size, 8, 8, 3)}
    counted = [batch["label"][batch["mask"]] for batch in batches]
    assert sorted(np.concatenate(counted)) == list(range(37))
    for batch in batches:
        assert batch["mask"].dtype == bool
        assert batch["label"].dtype == np.int32
        # The fillers, too, are examples.
        for image, label in zip(batch["image"], batch["label"], strict=True):
            np.testing.assert_array_equal(image, numbered[label]["image"])


def test_evaluation_of_a_dataset(digits_dir):
    source = load_source("digits", "test", digits_dir)
    batches = list(eval_batches(source, batch_size=100, num_threads=2))
    assert [batch["mask"].sum() for batch in batches] == [100, 100, 100, 60]
    expected = np.bincount([example["label"] for example in source])
    np.testing.assert_array_equal(
        np.bincount(np.concatenate([b["label"][b["mask"]] for b in batches])), expected
    )


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"batch_size": 0}, "batch_size 0"),
        ({"batch_size": 7, "shard_count": 2}, "multiple of shard_count 2"),
        ({"batch_size": 4, "shard_index": 2, "shard_count": 2}, "shard_index 2"),
    ],
)
def test_impossible_batches_are_refused(numbered, kwargs, message):
    with pytest.raises(ValueError, match=message):
        train_batches(numbered, seed=0, **kwargs)
    with pytest.raises(ValueError, match=message):
        eval_batches(numbered, **kwargs)


def test_an_empty_source_is_refused():
    with pytest.raises(ValueError, match="no examples"):
        train_batches([], batch_size=1, seed=0)


def test_in_memory_reads_each_example_once(numbered):
    asked = []

    class Counted:
        def __len__(self):
            return len(numbered)

        def __getitem__(self, index):
            asked.append(index)
            return numbered[index]

    kept = InMemory(Counted())
    wanted = take(train_batches(numbered, batch_size=8, seed=1, augment=random_crop_flip), 20)
    assert_same(
        take(train_batches(kept, batch_size=8, seed=1, augment=random_crop_flip), 20), wanted
    )
    assert sorted(asked) == list(range(37))
    assert_same(list(eval_batches(kept, batch_size=8)), list(eval_batches(numbered, batch_size=8)))
    assert len(asked) == 37
    np.testing.assert_array_equal(kept[3]["image"], numbered[3]["image"])
