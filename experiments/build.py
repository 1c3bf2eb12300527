"""From a config to the things it names: images, a model, its quantisers."""

from typing import Any

from flax import nnx
from ml_collections import ConfigDict

import qat_jax as qj
from qat_jax import data
from qat_jax.models import CifarResNet, load_weights

FLOAT_BITS = 32
CLIPPINGS: dict[str, qj.Octav | qj.AbsMax] = {"octav": qj.Octav(), "max": qj.AbsMax()}


def source(config: ConfigDict, split: str) -> Any:
    """The examples of a split, at random access.

    Raises:
        DataError: there are none.
        ValueError: the model or the normalisation expects another number of channels.
    """
    examples = data.load_source(config.dataset.name, split, config.dataset.data_dir)
    channels = examples[0]["image"].shape[-1]
    if config.model.in_channels != channels:
        raise ValueError(
            f"the images of {config.dataset.name} have {channels} channels: "
            f"pass --config.model.in_channels={channels}"
        )
    for name in ("mean", "std"):
        if len(config.dataset[name]) not in (1, channels):
            raise ValueError(f"dataset.{name} needs one number for each of {channels} channels")
    return examples


def float_model(config: ConfigDict) -> CifarResNet:
    """The model, with pretrained weights if the config names some.

    Raises:
        ValueError: there is no such model, or the weights are of another.
        FileNotFoundError: the file of weights does not exist.
    """
    model = CifarResNet(
        depth=config.model.depth,
        num_classes=config.model.num_classes,
        in_channels=config.model.in_channels,
        width=config.model.width,
        rngs=nnx.Rngs(config.seed),
    )
    if config.model.pretrained is not None:
        load_weights(model, config.model.pretrained)
    return model


def quantise(model: CifarResNet, quant: ConfigDict) -> nnx.Module:
    """Puts the paper's policy into the model, or nothing where the config says 32 bits.

    Args:
        model: a float model.
        quant: see `configs/_quant.py`.

    Raises:
        ValueError: there is no such clipping, gradient or number of bits.
    """
    if quant.weight_bits == quant.activation_bits == FLOAT_BITS:
        return model
    for name in ("clipping", "edge_clipping"):
        if quant[name] not in CLIPPINGS:
            raise ValueError(f"quant.{name} is {quant[name]!r}: give one of {', '.join(CLIPPINGS)}")
    policy = qj.uniform_policy(
        quant.weight_bits,
        quant.activation_bits,
        clipping=CLIPPINGS[quant.clipping],
        gradient=quant.gradient,
        narrow=quant.narrow,
        first="conv1",
        last="linear",
        edge_clipping=CLIPPINGS[quant.edge_clipping],
    )
    return qj.quantize_model(model, policy)
