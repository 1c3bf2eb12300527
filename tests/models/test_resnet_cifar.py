import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qat_jax.models import CifarResNet, load_weights
from qat_jax.models.resnet_cifar import shortcut

MEAN = np.array([0.485, 0.456, 0.406], np.float32)
STD = np.array([0.229, 0.224, 0.225], np.float32)


def tiny(**options) -> CifarResNet:
    return CifarResNet(**{"depth": 8, "width": 4, "rngs": nnx.Rngs(0)} | options)


def images(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(1), shape)


def layers_of(model: nnx.Module, kind: type) -> dict[str, nnx.Module]:
    modules = nnx.iter_modules(model)
    return {"/".join(map(str, path)): node for path, node in modules if type(node) is kind}


@pytest.mark.parametrize(
    ("depth", "parameters"),
    # Figures of the published option-A networks: 0.27, 0.46, 0.66, 0.85 and 1.7 million.
    [(8, 75290), (20, 269722), (32, 464154), (44, 658586), (56, 853018), (110, 1727962)],
)
def test_number_of_layers_and_parameters(depth, parameters):
    model = nnx.eval_shape(lambda: CifarResNet(depth, rngs=nnx.Rngs(0)))
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert sum(leaf.size for leaf in leaves) == parameters
    assert len(layers_of(model, nnx.Conv)) + len(layers_of(model, nnx.Linear)) == depth


def test_layer_paths():
    model = nnx.eval_shape(tiny)
    stages = [f"layer{stage}/0" for stage in (1, 2, 3)]
    assert set(layers_of(model, nnx.Conv)) == {
        "conv1",
        *(f"{stage}/conv{i}" for stage in stages for i in (1, 2)),
    }
    assert set(layers_of(model, nnx.BatchNorm)) == {
        "bn1",
        *(f"{stage}/bn{i}" for stage in stages for i in (1, 2)),
    }
    assert set(layers_of(model, nnx.Linear)) == {"linear"}
    assert "layer1/2/conv1" in layers_of(nnx.eval_shape(lambda: tiny(depth=20)), nnx.Conv)


@pytest.mark.parametrize("depth", [0, 9, 14, 50])
def test_unknown_depth_is_an_error_that_lists_the_known(depth):
    with pytest.raises(ValueError, match=f"depth is {depth}: choose one of 8, 20, .*110"):
        tiny(depth=depth)


@pytest.mark.parametrize("size", ["num_classes", "in_channels", "width"])
def test_sizes_are_positive(size):
    with pytest.raises(ValueError, match=f"{size} is 0"):
        tiny(**{size: 0})


def test_shortcut_keeps_every_other_pixel_and_pads_both_sides():
    x = images(2, 5, 4, 6)
    y = shortcut(x, strides=2, channels=12)
    assert y.shape == (2, 3, 2, 12)
    np.testing.assert_array_equal(y[..., 3:9], x[:, [0, 2, 4]][:, :, [0, 2]])
    assert not y[..., :3].any()
    assert not y[..., 9:].any()


def test_shortcut_within_a_stage_is_the_identity():
    x = images(2, 5, 4, 6)
    np.testing.assert_array_equal(shortcut(x, strides=1, channels=6), x)


@pytest.mark.parametrize("shape", [(2, 8, 8, 1), (3, 32, 32, 3), (1, 9, 7, 2)])
def test_logits_of_any_image_size(shape):
    model = tiny(in_channels=shape[-1], num_classes=7)
    logits = nnx.jit(CifarResNet.__call__)(model, images(*shape))
    assert logits.shape == (shape[0], 7)
    assert logits.dtype == jnp.float32
    assert jnp.isfinite(logits).all()


def test_low_precision_computes_low_and_keeps_parameters_and_logits_in_float32():
    x = images(4, 8, 8, 1)
    low = tiny(in_channels=1, dtype=jnp.bfloat16)
    seen = record_convolution_inputs(low)
    logits = low(x)
    assert logits.dtype == jnp.float32
    assert {inputs.dtype for inputs in seen.values()} == {jnp.dtype(jnp.bfloat16)}
    leaves = jax.tree.leaves(nnx.state(low, (nnx.Param, nnx.BatchStat)))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.float32)}
    np.testing.assert_allclose(logits, tiny(in_channels=1)(x), atol=0.2)


def record_convolution_inputs(model: nnx.Module) -> dict[str, jax.Array]:
    """Put a recorder into every convolution, as quantisers are put into it."""
    seen: dict[str, jax.Array] = {}

    def recorder(path):
        def convolve(inputs, kernel, *args, **kwargs):
            seen[path] = inputs
            return jax.lax.conv_general_dilated(inputs, kernel, *args, **kwargs)

        return convolve

    for path, layer in layers_of(model, nnx.Conv).items():
        layer.conv_general_dilated = recorder(path)
    return seen


def test_inputs_of_inner_convolutions_are_not_negative():
    model = tiny(depth=20)
    seen = record_convolution_inputs(model)
    model(images(2, 8, 8, 3))
    assert seen.keys() == layers_of(model, nnx.Conv).keys()
    assert seen.pop("conv1").min() < 0
    for path, inputs in seen.items():
        assert inputs.min() == 0, path
        assert inputs.max() > 0, path


def test_initial_weights_have_the_standard_deviation_of_he():
    model = CifarResNet(8, num_classes=100, width=32, rngs=nnx.Rngs(0))
    kernels = {
        path: layer.kernel.get_value()
        for kind in (nnx.Conv, nnx.Linear)
        for path, layer in layers_of(model, kind).items()
    }
    assert len(kernels) == 8
    for path, kernel in kernels.items():
        fan_in = kernel.size // kernel.shape[-1]
        assert float(jnp.std(kernel)) == pytest.approx((2 / fan_in) ** 0.5, rel=0.08), path


def test_running_statistics_move_in_training_and_rest_in_evaluation():
    model = tiny()
    x = 5 + images(64, 8, 8, 3)
    convolved = model.conv1(x)
    model(x)
    expected = 0.1 * jnp.mean(convolved, axis=(0, 1, 2))
    np.testing.assert_allclose(model.bn1.mean.get_value(), expected, rtol=1e-4)

    model.eval()
    before = nnx.state(model, nnx.BatchStat)
    before = jax.tree.map(jnp.copy, before)
    model(x)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model, nnx.BatchStat), before)


def test_gradients_reach_every_parameter():
    @nnx.jit
    @nnx.grad
    def gradient_of(model, x):
        return jnp.sum(model(x) ** 2)

    gradients = gradient_of(tiny(), images(4, 8, 8, 3))
    assert len(nnx.to_flat_state(gradients)) == 7 + 2 * 7 + 2
    for path, gradient in nnx.to_flat_state(gradients):
        assert jnp.isfinite(gradient.get_value()).all(), path
        assert gradient.get_value().any(), path


@pytest.mark.parametrize(("depth", "published"), [(20, 91.5), (56, 92.6)])
def test_pretrained_accuracy_on_real_images(depth, published, shared_data, cifar10_test):
    model = nnx.eval_shape(lambda: CifarResNet(depth, rngs=nnx.Rngs(0)))
    load_weights(model, shared_data / "cifar10" / f"akamaster_resnet{depth}.safetensors")
    model.eval()
    predict = nnx.jit(lambda model, pixels: model((pixels / 255 - MEAN) / STD).argmax(-1))
    pixels, labels = cifar10_test
    predictions = np.concatenate([predict(model, batch) for batch in np.split(pixels, 4)])
    assert labels.shape == (1000,)
    assert 100 * np.mean(predictions == labels) == pytest.approx(published, abs=0.1)
