"""What a model is trained for: how it reads a batch, and how far off its outputs are."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Protocol

import jax
import jax.numpy as jnp
import optax

Batch = Mapping[str, jax.Array]


class Objective(Protocol):
    """A kind of problem. An objective is a value: it holds settings, no arrays."""

    def inputs(self, batch: Batch) -> tuple[jax.Array, ...]:
        """What the model is called with."""
        ...

    def losses(self, outputs: jax.Array, batch: Batch) -> jax.Array:
        """The loss of each example, in nats: float32 [B]."""
        ...

    def correct(self, outputs: jax.Array, batch: Batch) -> jax.Array:
        """Whether the likeliest answer to each example is the right one: bool [B]."""
        ...

    def divergences(
        self, outputs: jax.Array, teacher: jax.Array, batch: Batch, temperature: float
    ) -> jax.Array:
        """How far each example's outputs are from those of a teacher (`divergence`): [B]."""
        ...


@dataclasses.dataclass(frozen=True)
class Normalisation:
    """Per-channel statistics of images in [0, 1].

    Attributes:
        mean: one float a channel.
        std: one float a channel.

    Raises:
        ValueError: one of them is not a tuple of numbers, or a deviation is not positive.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            values = getattr(self, field.name)
            if not all(isinstance(value, int | float) for value in values):
                raise ValueError(f"{field.name} is {values}: give one number a channel")
        if not all(0 < value < math.inf for value in self.std):
            raise ValueError(f"std is {self.std}: give positive numbers")

    def __call__(self, image: jax.Array) -> jax.Array:
        """(image / 255 - mean) / std: uint8 [B, H, W, C] to float32 of the same shape."""
        scaled = image.astype(jnp.float32) / 255
        return (scaled - jnp.asarray(self.mean)) / jnp.asarray(self.std)


@dataclasses.dataclass(frozen=True)
class Classification:
    """Which class an image is of: the model maps [B, H, W, C] to logits [B, classes].

    Batches have `image`, uint8 [B, H, W, C], and `label`, int32 [B]. Images are normalised on the
    device.

    Attributes:
        normalise: uint8 images to what the model expects.
        label_smoothing: the share of probability spread over all classes; for training.

    Raises:
        ValueError: the smoothing leaves nothing of the label, or is negative.
    """

    normalise: Normalisation
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(
                f"label_smoothing is {self.label_smoothing}: give at least 0 and less than 1"
            )

    def inputs(self, batch: Batch) -> tuple[jax.Array, ...]:
        """The normalised images."""
        return (self.normalise(batch["image"]),)

    def losses(self, outputs: jax.Array, batch: Batch) -> jax.Array:
        """Softmax cross-entropy, computed in float32."""
        return cross_entropy(outputs, batch["label"], self.label_smoothing)

    def correct(self, outputs: jax.Array, batch: Batch) -> jax.Array:
        """Whether the largest logit is that of the label."""
        return outputs.argmax(-1) == batch["label"]

    def divergences(
        self, outputs: jax.Array, teacher: jax.Array, batch: Batch, temperature: float
    ) -> jax.Array:
        """The divergence of the classes' probabilities."""
        return divergence(outputs, teacher, temperature)


@dataclasses.dataclass(frozen=True)
class SpanExtraction:
    """Where an answer starts and where it ends: the model maps tokens to logits [B, L, 2].

    Batches have `tokens` and `token_types`, int32 [B, L], `token_mask`, bool [B, L], which is
    False for padding, and `start` and `end`, int32 [B], the first and the last token of the answer.
    """

    def inputs(self, batch: Batch) -> tuple[jax.Array, ...]:
        """Tokens, token types and mask."""
        return batch["tokens"], batch["token_types"], batch["token_mask"]

    def losses(self, outputs: jax.Array, batch: Batch) -> jax.Array:
        """The mean of the cross-entropies of start and end, over the tokens there are."""
        start, end = (cross_entropy(*ends) for ends in self._ends(outputs, batch))
        return (start + end) / 2

    def correct(self, outputs: jax.Array, batch: Batch) -> jax.Array:
        """Whether both ends are right."""
        start, end = (logits.argmax(-1) == target for logits, target in self._ends(outputs, batch))
        return start & end

    def divergences(
        self, outputs: jax.Array, teacher: jax.Array, batch: Batch, temperature: float
    ) -> jax.Array:
        """The mean of the divergences of start and end, over the tokens there are."""
        ours, theirs = self._ends(outputs, batch), self._ends(teacher, batch)
        start, end = (
            divergence(logits, of_teacher, temperature)
            for (logits, _), (of_teacher, _) in zip(ours, theirs, strict=True)
        )
        return (start + end) / 2

    def _ends(self, outputs: jax.Array, batch: Batch) -> list[tuple[jax.Array, jax.Array]]:
        """Logits [B, L] and target [B] of start and end; padding is out of the question."""
        lowest = jnp.finfo(outputs.dtype).min
        logits = jnp.where(batch["token_mask"][..., None], outputs, lowest)
        return [(logits[..., i], batch[name]) for i, name in enumerate(("start", "end"))]


def cross_entropy(logits: jax.Array, label: jax.Array, label_smoothing: float = 0.0) -> jax.Array:
    """Softmax cross-entropy of each example, in nats.

    Args:
        logits: float [B, classes]; computed in float32.
        label: int [B].
        label_smoothing: the share of probability spread over all classes.

    Returns:
        float32 [B].
    """
    logits = logits.astype(jnp.float32)
    if not label_smoothing:
        return optax.softmax_cross_entropy_with_integer_labels(logits, label)
    target = jax.nn.one_hot(label, logits.shape[-1], dtype=jnp.float32)
    return optax.softmax_cross_entropy(logits, optax.smooth_labels(target, label_smoothing))


def divergence(logits: jax.Array, teacher: jax.Array, temperature: float = 1.0) -> jax.Array:
    """T² Σ p log(p / q) of each example, p being a teacher's probabilities at temperature T.

    The factor T² keeps the size of gradients (Hinton et al., arXiv:1503.02531, section 2).

    Args:
        logits: of the student, float [B, classes]; computed in float32.
        teacher: the teacher's logits, of the same shape.
        temperature: T, which the logits of both are divided by.

    Returns:
        float32 [B], in nats.
    """
    log_q, log_p = (
        jax.nn.log_softmax(array.astype(jnp.float32) / temperature) for array in (logits, teacher)
    )
    p = jnp.exp(log_p)
    # What neither can answer is infinitely unlikely to both.
    terms = jnp.where(p > 0, p * (log_p - log_q), 0)
    return temperature**2 * terms.sum(-1)
