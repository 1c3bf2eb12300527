"""Networks whose training steps are timed, with a batch of noise for each."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

import qat_jax as qj
from benchmarks import record
from qat_jax.clipping import Clipping
from qat_jax.granularity import Granularity, PerTensor
from qat_jax.models import BERT_BASE, MINILM, BertForQuestionAnswering, CifarResNet, ResNet
from qat_jax.training.objective import Classification, Normalisation, Objective, SpanExtraction

# Makes a quantised model of a model and of what it is called with.
Quantise = Callable[[nnx.Module, tuple[Any, ...]], nnx.Module]
Ends = tuple[str | None, str]

NORMALISATION = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class Workload(NamedTuple):
    """A network and what it is trained on.

    Attributes:
        title: what it is, for people.
        model: makes it.
        objective: its loss.
        batch: makes so many examples.
        batch_size: how many by default.
        ends: names of the first convolution, if any, and of the classifier, which stay at 8 bits.
        vectors: the notation of vectors with integer scales; activations are unsigned after ReLUs.
    """

    title: str
    model: Callable[[], nnx.Module]
    objective: Objective
    batch: Callable[[int], dict[str, np.ndarray]]
    batch_size: int
    ends: Ends
    vectors: str


def unquantised(model: nnx.Module, inputs: tuple[Any, ...]) -> nnx.Module:
    """The model itself."""
    del inputs
    return model


def w4a4(ends: Ends, clipping: Clipping, activations: Granularity = PerTensor()) -> Quantise:
    """OCTAV's recipe at 4 bits, with another clipping, or activations of more thresholds."""
    first, last = ends
    policy = qj.uniform_policy(
        4, 4, clipping=clipping, first=first, last=last, activation_granularity=activations
    )
    return lambda model, inputs: qj.quantize_model(model, policy)


def carried(quantise: Quantise) -> Quantise:
    """The same, with thresholds that are carried from step to step."""
    return _then(quantise, lambda model, inputs: qj.carry_thresholds(model, *inputs))


def learned(quantise: Quantise) -> Quantise:
    """The same, with thresholds of the batch that are then parameters."""

    def learn(model: nnx.Module, inputs: tuple[Any, ...]) -> None:
        qj.calibrate(model, [inputs])
        qj.learn_thresholds(model)

    return _then(quantise, learn)


def rotated(quantise: Quantise) -> Quantise:
    """The same, with features turned before they are quantised."""
    return _then(quantise, lambda model, inputs: qj.rotate(model))


def _then(quantise: Quantise, change: Callable[[nnx.Module, tuple[Any, ...]], Any]) -> Quantise:
    """The same, and what is done to the model in place afterwards."""

    def quantise_and_change(model: nnx.Module, inputs: tuple[Any, ...]) -> nnx.Module:
        model = quantise(model, inputs)
        change(model, inputs)
        return model

    return quantise_and_change


def _images(size: int, classes: int) -> Callable[[int], dict[str, np.ndarray]]:
    def batch(count: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(record.SEED)
        return {
            "image": rng.integers(0, 256, (count, size, size, 3), np.uint8),
            "label": rng.integers(0, classes, count, np.int32),
        }

    return batch


def _questions(length: int, vocabulary: int) -> Callable[[int], dict[str, np.ndarray]]:
    def batch(count: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(record.SEED)
        ends = np.sort(rng.integers(0, length, (2, count), np.int32), axis=0)
        return {
            "tokens": rng.integers(0, vocabulary, (count, length), np.int32),
            "token_types": np.zeros((count, length), np.int32),
            "token_mask": np.ones((count, length), bool),
            "start": ends[0],
            "end": ends[1],
        }

    return batch


def _rngs() -> nnx.Rngs:
    return nnx.Rngs(record.SEED)


# Embeddings of few words: a block is about what follows them.
_BLOCK = dataclasses.replace(MINILM, layers=1, vocabulary=1000)

WORKLOADS = {
    "resnet20": Workload(
        title="ResNet-20, 32×32 images",
        model=lambda: CifarResNet(20, rngs=_rngs()),
        objective=Classification(NORMALISATION),
        batch=_images(32, 10),
        batch_size=128,
        ends=("conv1", "linear"),
        vectors="4/4U/4/6",
    ),
    "minilm-block": Workload(
        title="one layer of MiniLM, 256 tokens",
        model=lambda: BertForQuestionAnswering(_BLOCK, rngs=_rngs()),
        objective=SpanExtraction(),
        batch=_questions(256, _BLOCK.vocabulary),
        batch_size=16,
        ends=(None, "answer"),
        vectors="4/4/4/6",
    ),
    "resnet50": Workload(
        title="ResNet-50 in bfloat16, 224×224 images",
        model=lambda: ResNet(50, dtype=jnp.bfloat16, rngs=_rngs()),
        objective=Classification(NORMALISATION),
        batch=_images(224, 1000),
        batch_size=256,
        ends=("conv1", "fc"),
        vectors="4/4U/4/6",
    ),
    "bert-base": Workload(
        title="BERT-base in bfloat16, 384 tokens",
        model=lambda: BertForQuestionAnswering(BERT_BASE, dtype=jnp.bfloat16, rngs=_rngs()),
        objective=SpanExtraction(),
        batch=_questions(384, BERT_BASE.vocabulary),
        batch_size=32,
        ends=(None, "answer"),
        vectors="4/4/4/6",
    ),
}
