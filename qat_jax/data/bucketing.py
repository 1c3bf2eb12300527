"""Sequences of different lengths: batches as long as their longest, of sequences of like length."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np


class Sequences(Protocol):
    """Examples of which each is padded to one length, L.

    Attributes:
        lengths: int [N], the positions of each example that are no padding.
    """

    lengths: np.ndarray

    def cut(self, length: int) -> Any:
        """A source of the same examples, of `length` positions; the others are not looked at."""
        ...


@dataclasses.dataclass(frozen=True)
class Bucketing:
    """How batches of sequences are made so that little of them is padding.

    A model that ignores padding says the same to a sequence in any of them.

    Attributes:
        multiple: a batch is as long as its longest sequence, in multiples of this: a step is
            compiled once for each length there is.
        batches: the sequences of so many batches in turn are sorted by length before they are cut
            into batches, which then come in random order. 1 leaves every batch as it is drawn.

    Raises:
        ValueError: one of them is not positive.
    """

    multiple: int
    batches: int = 1

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if (value := getattr(self, field.name)) < 1:
                raise ValueError(f"bucketing.{field.name} is {value}: give at least 1")

    def check(self, source: Any) -> None:
        """Raises ValueError unless these are `Sequences`."""
        if not (hasattr(source, "lengths") and hasattr(source, "cut")):
            raise ValueError(
                f"bucketing is for sequences: {type(source).__name__} has no lengths to sort and "
                "no cut to shorten by (see Sequences)"
            )

    def batch(
        self, order: Sequence[int], step: int, *, lengths: np.ndarray, batch_size: int, seed: int
    ) -> np.ndarray:
        """The sequences of a step.

        Args:
            order: the endless order in which sequences are drawn.
            step: which.
            lengths: int [N], of all sequences.
            batch_size: how many there are in a batch.
            seed: of the order of batches.

        Returns:
            int [batch_size].
        """
        group, place = divmod(step, self.batches)
        size = self.batches * batch_size
        drawn = np.array([order[position] for position in range(group * size, (group + 1) * size)])
        if self.batches == 1:
            return drawn
        by_length = drawn[np.argsort(lengths[drawn], kind="stable")]
        generator = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, group]))
        return by_length.reshape(self.batches, batch_size)[
            generator.permutation(self.batches)[place]
        ]

    def cut(self, source: Any, indices: np.ndarray) -> Any:
        """The source, cut to what a batch needs: `Sequences` to a source of the same examples."""
        longest = int(source.lengths[indices].max())
        return source.cut(-(-longest // self.multiple) * self.multiple)
