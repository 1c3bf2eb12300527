"""Logits of CifarResNet against a plain PyTorch evaluation of the same weight file."""

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from qat_jax.models import CifarResNet, load_weights, save_weights

torch = pytest.importorskip("torch")
F = torch.nn.functional


def torch_logits(path, images: np.ndarray) -> np.ndarray:
    """Evaluate a weight file on images [N, H, W, C]; its depth is read off its names."""
    weights = {
        name.removeprefix("module."): torch.from_numpy(array)
        for name, array in load_file(path).items()
    }

    def normalise(x, bn):
        return F.batch_norm(
            x,
            weights[f"{bn}.running_mean"],
            weights[f"{bn}.running_var"],
            weights[f"{bn}.weight"],
            weights[f"{bn}.bias"],
            training=False,
            eps=1e-5,
        )

    def block(x, prefix, stride):
        y = F.conv2d(x, weights[f"{prefix}.conv1.weight"], stride=stride, padding=1)
        y = F.relu(normalise(y, f"{prefix}.bn1"))
        y = F.conv2d(y, weights[f"{prefix}.conv2.weight"], padding=1)
        y = normalise(y, f"{prefix}.bn2")
        if stride == 2:
            quarter = y.shape[1] // 4
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, quarter, quarter))
        return F.relu(x + y)

    x = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    x = F.relu(normalise(F.conv2d(x, weights["conv1.weight"], padding=1), "bn1"))
    blocks = sum(name.startswith("layer1.") and name.endswith("conv1.weight") for name in weights)
    for stage in (1, 2, 3):
        for index in range(blocks):
            stride = 2 if stage > 1 and index == 0 else 1
            x = block(x, f"layer{stage}.{index}", stride)
    x = F.adaptive_avg_pool2d(x, 1).flatten(1)
    return F.linear(x, weights["linear.weight"], weights["linear.bias"]).numpy()


def jax_logits(model: nnx.Module, images: np.ndarray) -> np.ndarray:
    model.eval()
    with jax.default_matmul_precision("highest"):
        return np.asarray(model(images))


def assert_close(actual: np.ndarray, expected: np.ndarray) -> None:
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(4, 32, 32, 3), (4, 8, 8, 1), (4, 9, 7, 3)])
def test_random_weights(shape, tmp_path):
    model = CifarResNet(8, in_channels=shape[-1], rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    for _, layer in nnx.iter_modules(model):
        if isinstance(layer, nnx.BatchNorm):
            for variable in (layer.scale, layer.bias, layer.mean, layer.var):
                variable[...] = rng.uniform(0.5, 1.5, variable.shape).astype(np.float32)
    path = tmp_path / "random.safetensors"
    save_weights(model, path)
    images = rng.standard_normal(shape, dtype=np.float32)
    assert_close(jax_logits(model, images), torch_logits(path, images))


@pytest.mark.parametrize("depth", [20, 56])
def test_pretrained_weights_on_real_images(depth, shared_data, cifar10_test):
    path = shared_data / "cifar10" / f"akamaster_resnet{depth}.safetensors"
    model = nnx.eval_shape(lambda: CifarResNet(depth, rngs=nnx.Rngs(0)))
    load_weights(model, path)
    pixels = cifar10_test[0][:16].astype(np.float32) / 255
    images = (pixels - np.float32([0.485, 0.456, 0.406])) / np.float32([0.229, 0.224, 0.225])
    assert_close(jax_logits(model, images), torch_logits(path, images))
