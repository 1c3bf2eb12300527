"""Logits of the ImageNet families against PyTorch: transformers' models, and a plain evaluation."""

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from qat_jax.models import (
    MobileNetV1,
    MobileNetV2,
    MobileNetV3,
    ResNet,
    load_weights,
    save_weights,
)

torch = pytest.importorskip("torch")
F = torch.nn.functional
SIZE = 96


def random_statistics(module) -> None:
    """Batch norms that do something."""
    generator = torch.Generator().manual_seed(0)
    for layer in module.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            for values in (layer.weight.data, layer.bias.data, layer.running_mean):
                values.copy_(0.5 + torch.rand(values.shape, generator=generator) / 2)
            layer.running_var.copy_(1 + torch.rand(layer.running_var.shape, generator=generator))


def images(size: int = SIZE) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((2, size, size, 3), dtype=np.float32)


def jax_logits(model: nnx.Module, x: np.ndarray) -> np.ndarray:
    model.eval()
    graphdef, state = nnx.split(model)
    with jax.default_matmul_precision("highest"):
        return np.asarray(jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))(state, x))


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    assert np.ptp(expected) > 1e-2
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def channels_first(x: np.ndarray):
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


def huggingface(name: str):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if name == "resnet18":
        config = transformers.ResNetConfig(
            layer_type="basic", depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512], num_labels=9
        )
        return transformers.ResNetForImageClassification(config), ResNet, dict(depth=18)
    if name == "resnet50":
        config = transformers.ResNetConfig(num_labels=9)
        return transformers.ResNetForImageClassification(config), ResNet, dict(depth=50)
    if name == "mobilenet_v1":
        config = transformers.MobileNetV1Config(depth_multiplier=0.75, num_labels=9)
        return transformers.MobileNetV1ForImageClassification(config), MobileNetV1, dict(width=0.75)
    config = transformers.MobileNetV2Config(num_labels=9)
    model = transformers.MobileNetV2ForImageClassification(config)
    return model, MobileNetV2, dict(tensorflow=True)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet_v1", "mobilenet_v2"])
def test_transformers(name, tmp_path):
    theirs, family, options = huggingface(name)
    random_statistics(theirs)
    theirs.eval()
    path = tmp_path / "model.safetensors"
    theirs.save_pretrained(tmp_path, safe_serialization=True)
    model = nnx.eval_shape(lambda: family(num_classes=9, **options, rngs=nnx.Rngs(0)))
    load_weights(model, path)
    with torch.no_grad():
        expected = theirs(channels_first(images())).logits.numpy()
    assert_close(jax_logits(model, images()), expected)


def torch_mobilenet_v3(weights: dict, x, hard_swish: list[bool], strides: list[int]):
    """Evaluate a file of torchvision's names; what it holds says which parts a block has."""

    def unit(x, prefix, stride=1, activation=None):
        w = weights[f"{prefix}.0.weight"]
        groups = x.shape[1] // w.shape[1]
        x = F.conv2d(x, w, stride=stride, padding=w.shape[-1] // 2, groups=groups)
        statistics = [
            weights[f"{prefix}.1.{n}"] for n in ("running_mean", "running_var", "weight", "bias")
        ]
        x = F.batch_norm(x, *statistics, training=False, eps=1e-3)
        return x if activation is None else activation(x)

    x = unit(x, "features.0", 2, F.hardswish)
    for index, (hard, stride) in enumerate(zip(hard_swish, strides, strict=True), start=1):
        activation = F.hardswish if hard else F.relu
        block, before = f"features.{index}.block", x
        parts = sorted({int(n.split(".")[3]) for n in weights if n.startswith(f"{block}.")})
        for part in parts:
            prefix = f"{block}.{part}"
            if f"{prefix}.fc1.weight" in weights:
                scale = F.adaptive_avg_pool2d(x, 1)
                scale = F.conv2d(
                    scale, weights[f"{prefix}.fc1.weight"], weights[f"{prefix}.fc1.bias"]
                )
                scale = F.relu(scale)
                scale = F.conv2d(
                    scale, weights[f"{prefix}.fc2.weight"], weights[f"{prefix}.fc2.bias"]
                )
                x = x * F.hardsigmoid(scale)
            elif part == parts[-1]:
                x = unit(x, prefix)
            else:
                is_depthwise = weights[f"{prefix}.0.weight"].shape[1] == 1
                x = unit(x, prefix, stride if is_depthwise else 1, activation)
        if stride == 1 and x.shape == before.shape:
            x = x + before
    x = unit(x, f"features.{len(strides) + 1}", 1, F.hardswish)
    x = F.adaptive_avg_pool2d(x, 1).flatten(1)
    x = F.hardswish(F.linear(x, weights["classifier.0.weight"], weights["classifier.0.bias"]))
    return F.linear(x, weights["classifier.3.weight"], weights["classifier.3.bias"])


# The last two columns of the paper's tables 1 and 2.
MOBILENET_V3 = {
    "small": ("RRRHHHHHHHH", (2, 2, 1, 2, 1, 1, 1, 1, 2, 1, 1)),
    "large": ("RRRRRRHHHHHHHHH", (1, 2, 1, 2, 1, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1)),
}


@pytest.mark.parametrize("size", ["small", "large"])
def test_mobilenet_v3_against_plain_pytorch(size, tmp_path):
    model = MobileNetV3(size, num_classes=9, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    for _, layer in nnx.iter_modules(model):
        if isinstance(layer, nnx.BatchNorm):
            for variable in (layer.scale, layer.bias, layer.mean, layer.var):
                variable[...] = rng.uniform(0.5, 1.5, variable.shape).astype(np.float32)
    path = tmp_path / "model.safetensors"
    save_weights(model, path)
    weights = {name: torch.from_numpy(array) for name, array in load_file(path).items()}
    activations, strides = MOBILENET_V3[size]
    expected = torch_mobilenet_v3(
        weights, channels_first(images()), [a == "H" for a in activations], list(strides)
    )
    assert_close(jax_logits(model, images()), expected.numpy())
