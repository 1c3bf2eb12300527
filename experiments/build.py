"""From a config to the things it names: images, a model, its quantisers."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

import qat_jax as qj
from qat_jax import data
from qat_jax.clipping import Clipping
from qat_jax.data.pipeline import Augment
from qat_jax.models import (
    CifarResNet,
    MobileNetV1,
    MobileNetV2,
    MobileNetV3,
    ResNet,
    load_weights,
)
from qat_jax.training.step import Normalisation

FLOAT_BITS = 32
FAKE_IMAGES = 1024
_MODELS: dict[str, Callable[..., nnx.Module]] = {
    "cifar_resnet": CifarResNet,
    "resnet": ResNet,
    "mobilenet_v1": MobileNetV1,
    "mobilenet_v2": MobileNetV2,
    "mobilenet_v3": MobileNetV3,
}
# Names of the first convolution and of the classifier, which papers keep at 8 bits.
_ENDS = {
    "cifar_resnet": ("conv1", "linear"),
    "resnet": ("conv1", "fc"),
    "mobilenet_v1": ("conv1", "classifier"),
    "mobilenet_v2": ("conv1", "classifier"),
    "mobilenet_v3": ("conv1", "classifier"),
}
CLIPPINGS: dict[str, Clipping] = {
    "max": qj.AbsMax(),
    "octav": qj.Octav(),
    "exact": qj.Exact(),
    "mse": qj.MseSweep(),
    "entropy": qj.Entropy(),
}


def train_source(config: ConfigDict) -> tuple[Any, Augment | None]:
    """The training examples, at random access, and how their images are augmented.

    Raises:
        DataError: there are none.
        ValueError: there is no such augmentation, or the model expects other images.
    """
    dataset = config.dataset
    match dataset.augment:
        case "none":
            return _prepared(_source(config, dataset.train_split), config), None
        case "crop_flip":
            source = _prepared(_source(config, dataset.train_split), config)
            return source, data.random_crop_flip
        case "resized_crop_flip":
            if dataset.get("size") is None:
                raise ValueError("dataset.augment 'resized_crop_flip' needs dataset.size")
            return _source(config, dataset.train_split), data.RandomResizedCrop(dataset.size)
    raise ValueError(
        f"unknown dataset.augment {dataset.augment!r}: "
        "choose one of none, crop_flip, resized_crop_flip"
    )


def test_source(config: ConfigDict) -> Any:
    """The test examples, at random access, as the model expects them.

    Raises:
        DataError: there are none.
        ValueError: the model expects other images.
    """
    return _prepared(_source(config, config.dataset.test_split), config)


def validation_source(config: ConfigDict) -> Any:
    """The held-out training examples, or None where the config holds none out.

    Raises:
        DataError: there are none.
        ValueError: the model expects other images.
    """
    split = config.dataset.validation_split
    return None if split is None else _prepared(_source(config, split), config)


def calibration_source(config: ConfigDict) -> Any:
    """The training examples, but not augmented; raises as `test_source` does."""
    return _prepared(_source(config, config.dataset.train_split), config)


def calibration_images(
    source: Any, normalise: Normalisation, *, batch_size: int, seed: int, count: int
) -> Iterator[jax.Array]:
    """The first batches of shuffled examples, normalised."""
    batches = data.train_batches(source, batch_size=batch_size, seed=seed)
    for batch in itertools.islice(batches, count):
        yield normalise(jnp.asarray(batch["image"]))


def _prepared(source: Any, config: ConfigDict) -> Any:
    """Cropped to `dataset.size`, if the config has one."""
    dataset = config.dataset
    if dataset.get("size") is None:
        return source
    crop = data.CentreCrop(dataset.size, dataset.resize, dataset.get("tensorflow", False))
    return data.PreparedSource(source, crop)


def _source(config: ConfigDict, split: str) -> Any:
    if config.dataset.name == "image_folder":
        if config.dataset.data_dir is None or split is None:
            raise ValueError(
                "name the images: --config.dataset.data_dir=DIR --config.dataset.test_split=NAME, "
                "and --config.dataset.train_split=NAME to calibrate; a folder or zip file each"
            )
        examples: Any = data.ImageFolder(Path(config.dataset.data_dir) / split)
    elif config.dataset.name == "fake":
        examples = data.FakeImages(
            FAKE_IMAGES,
            size=config.dataset.size,
            channels=config.model.in_channels,
            num_classes=config.model.num_classes,
        )
    else:
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


def float_model(config: ConfigDict) -> nnx.Module:
    """The model, with pretrained weights if the config names some.

    Raises:
        ValueError: there is no such model, or the weights are of another.
        FileNotFoundError: the file of weights does not exist.
    """
    settings = config.model.to_dict()
    name, pretrained = settings.pop("name"), settings.pop("pretrained")
    if name not in _MODELS:
        raise ValueError(f"model.name is {name!r}: give one of {', '.join(_MODELS)}")
    if "dtype" in settings:
        settings["dtype"] = jnp.dtype(settings["dtype"])
    model = _MODELS[name](**settings, rngs=nnx.Rngs(config.seed))
    if pretrained is not None:
        load_weights(model, pretrained)
    return model


def clipping(name: str) -> Clipping:
    """A rule by its name in configs: max, octav, exact, mse, entropy, p99.99.

    Raises:
        ValueError: there is no such rule.
    """
    if name in CLIPPINGS:
        return CLIPPINGS[name]
    percent = name.removeprefix("p")
    if name.startswith("p") and percent.replace(".", "", 1).isdigit():
        return qj.Percentile(float(percent))
    raise ValueError(f"no clipping {name!r}: give one of {', '.join(CLIPPINGS)} or p99.99")


def ptq_policy(config: ConfigDict) -> qj.Policy | None:
    """What the sections of `configs/_ptq.py` ask for; None where that is nothing.

    Raises:
        ValueError: a notation, a clipping or an option does not exist.
    """
    quant = config.quant
    if quant.notation == "float":
        return None
    scale = config.scale.to_dict()
    options: dict[str, Any] = {
        "vector_size": quant.vector_size,
        "weight_clipping": clipping(config.clipping.weights),
        "activation_clipping": clipping(config.clipping.activations),
        "scale": qj.IntScale(4, **(scale | {"clipping": clipping(scale["clipping"])})),
        "gradient": quant.get("gradient", "ste"),
    }
    overrides = []
    for override in quant.overrides:
        pattern, equals, notation = override.rpartition("=")
        if not equals:
            raise ValueError(f"quant.overrides has {override!r}: write PATTERN=NOTATION")
        overrides.append(qj.Rule.from_notation(pattern, notation, **options))
    first, last = _ENDS[config.model.name]
    rest = qj.Policy.from_notation(
        quant.notation, first=first, last=last, edges=quant.edges, **options
    )
    return qj.Policy([*overrides, *rest.rules])


def quantised_model(config: ConfigDict) -> nnx.Module:
    """The model with the quantisers of `configs/_quant.py`; without where those say 32 bits.

    Raises:
        ValueError: there is no such model, clipping, gradient or number of bits.
        FileNotFoundError: the file of weights does not exist.
    """
    model, quant = float_model(config), config.quant
    first, last = _ENDS[config.model.name]
    if quant.notation:
        policy = qj.Policy.from_notation(
            quant.notation,
            first=first,
            last=last,
            weight_clipping=clipping(quant.clipping),
            gradient=quant.gradient,
        )
        return qj.quantize_model(model, policy)
    if quant.weight_bits == quant.activation_bits == FLOAT_BITS:
        return model
    policy = qj.uniform_policy(
        quant.weight_bits,
        quant.activation_bits,
        clipping=clipping(quant.clipping),
        gradient=quant.gradient,
        narrow=quant.narrow,
        first=first,
        last=last,
        edge_clipping=clipping(quant.edge_clipping),
        activation_granularity=qj.PerTensor() if quant.shards == 1 else qj.PerShard(quant.shards),
    )
    return qj.quantize_model(model, policy)
