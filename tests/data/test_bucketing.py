"""Batches of sequences of different lengths."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qat_jax.data import Bucketing, eval_batches, train_batches

FIELDS = ("tokens", "number")


@dataclasses.dataclass(frozen=True)
class Numbers:
    """Sequence n has its number at each of its positions, which is what there is to read."""

    lengths: np.ndarray
    longest: int = 40

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, index):
        tokens = np.where(np.arange(self.longest) < self.lengths[index], index + 1, 0)
        return {"tokens": tokens.astype(np.int32), "number": np.int32(index)}

    def cut(self, length):
        return dataclasses.replace(self, longest=min(length, self.longest))


@pytest.fixture(scope="module")
def numbers():
    return Numbers(np.random.default_rng(0).integers(1, 41, 53))


def take(batches, count):
    taken = [next(batches) for _ in range(count)]
    batches.close()
    return taken


def drawn(source, count, **options):
    batches = train_batches(source, batch_size=4, seed=3, fields=FIELDS, **options)
    return take(batches, count)


def longest(batch):
    return batch["tokens"].astype(bool).sum(1).max()


def test_a_batch_is_as_long_as_its_longest_in_multiples(numbers):
    plain = drawn(numbers, 30)
    cut = drawn(numbers, 30, bucketing=Bucketing(multiple=16))
    for ours, theirs in zip(cut, plain, strict=True):
        length = min(-(-longest(theirs) // 16) * 16, 40)
        assert ours["tokens"].shape == (4, length)
        np.testing.assert_array_equal(ours["tokens"], theirs["tokens"][:, :length])
        np.testing.assert_array_equal(ours["number"], theirs["number"])


def test_the_sequences_of_some_batches_are_sorted_into_them(numbers):
    plain = drawn(numbers, 30)
    grouped = drawn(numbers, 30, bucketing=Bucketing(multiple=8, batches=5))
    orders = []
    for first in range(0, 30, 5):
        mine, theirs = grouped[first : first + 5], plain[first : first + 5]
        expected = sorted(np.concatenate([numbers.lengths[b["number"]] for b in theirs]))
        batches = sorted((sorted(numbers.lengths[b["number"]]) for b in mine), key=tuple)
        assert np.concatenate(batches).tolist() == expected
        everyone = [
            sorted(n for b in part for n in b["number"].tolist()) for part in (mine, theirs)
        ]
        assert everyone[0] == everyone[1]
        orders.append(tuple(np.argsort([longest(batch) for batch in mine])))
    assert len(set(orders)) > 1  # not always from the shortest to the longest


def test_it_leaves_little_padding(numbers):
    grouped = drawn(numbers, 30, bucketing=Bucketing(multiple=1, batches=10))
    sizes = sum(batch["tokens"].size for batch in grouped)
    full = sum(int((batch["tokens"] > 0).sum()) for batch in grouped)
    assert full / sizes > 0.85
    plain = drawn(numbers, 30, bucketing=Bucketing(multiple=1))
    assert full / sum(batch["tokens"].size for batch in plain) < 0.75


@pytest.mark.parametrize("options", [{"num_threads": 0}, {"num_threads": 3}])
def test_a_stream_goes_on_where_it_stopped(numbers, options):
    bucketing = Bucketing(multiple=8, batches=4)
    whole = drawn(numbers, 12, bucketing=bucketing)
    rest = drawn(numbers, 5, bucketing=bucketing, start_step=7, **options)
    for ours, theirs in zip(rest, whole[7:], strict=True):
        for name in FIELDS:
            np.testing.assert_array_equal(ours[name], theirs[name])


def test_shards_are_parts_of_one_batch_and_equally_long(numbers):
    bucketing = Bucketing(multiple=8, batches=4)
    whole = drawn(numbers, 8, bucketing=bucketing)
    parts = [
        drawn(numbers, 8, bucketing=bucketing, shard_index=index, shard_count=2) for index in (0, 1)
    ]
    for batch, *shards in zip(whole, *parts, strict=True):
        for name in FIELDS:
            np.testing.assert_array_equal(np.concatenate([s[name] for s in shards]), batch[name])


@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=30),
    batch_size=st.sampled_from([2, 4, 6]),
    multiple=st.integers(1, 50),
    shards=st.sampled_from([1, 2]),
)
def test_evaluation_keeps_the_order_and_every_position(lengths, batch_size, multiple, shards):
    source = Numbers(np.array(lengths))
    parts = [
        list(
            eval_batches(
                source,
                batch_size=batch_size,
                fields=FIELDS,
                bucketing=Bucketing(multiple),
                num_threads=0,
                shard_index=index,
                shard_count=shards,
            )
        )
        for index in range(shards)
    ]
    seen = []
    for batches in zip(*parts, strict=True):
        assert len({batch["tokens"].shape for batch in batches}) == 1
        width = batches[0]["tokens"].shape[1]
        assert width == 40 or width % multiple == 0
        for batch in batches:
            for tokens, number in zip(batch["tokens"], batch["number"], strict=True):
                assert (tokens > 0).sum() == lengths[number]
            seen += batch["number"][batch["mask"]].tolist()
    assert seen == list(range(len(lengths)))


@pytest.mark.parametrize("settings", [(0, 1), (-8, 1), (8, 0)])
def test_nothing_that_is_not_positive(settings):
    with pytest.raises(ValueError, match=r"bucketing\.(multiple|batches) is .*give at least 1"):
        Bucketing(*settings)


def test_images_are_not_bucketed():
    images = [{"image": np.zeros((2, 2, 3), np.uint8), "label": 0}]
    for batches in (train_batches, eval_batches):
        options = {"seed": 0} if batches is train_batches else {}
        with pytest.raises(ValueError, match="bucketing is for sequences: list has no lengths"):
            batches(images, batch_size=1, bucketing=Bucketing(8), **options)
