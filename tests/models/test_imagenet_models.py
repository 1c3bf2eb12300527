"""ResNet, MobileNet v2 and v3: sizes, paths, and weights under other libraries' names."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import qat_jax as qj
from qat_jax.models import (
    MobileNetV1,
    MobileNetV2,
    MobileNetV3,
    ResNet,
    load_weights,
    save_weights,
)

FAMILIES = {
    "resnet18": lambda **k: ResNet(18, **k),
    "resnet50": lambda **k: ResNet(50, **k),
    "mobilenet_v1": MobileNetV1,
    "mobilenet_v2": MobileNetV2,
    "mobilenet_v3_small": lambda **k: MobileNetV3("small", **k),
    "mobilenet_v3_large": lambda **k: MobileNetV3("large", **k),
}


@functools.cache
def traced(make, **options):
    return nnx.split(nnx.eval_shape(lambda: make(**options, rngs=nnx.Rngs(0))))


def abstract(make, **options):
    """A model of shapes alone, which is the caller's own."""
    return nnx.merge(*traced(make, **options))


def filled(make, seed=0, **options):
    """A model whose every variable, batch statistics included, is random; nothing is compiled."""
    model = abstract(make, **options)
    rng = np.random.default_rng(seed)
    state = nnx.state(model, (nnx.Param, nnx.BatchStat))
    nnx.update(model, jax.tree.map(lambda x: jnp.asarray(rng.random(x.shape), x.dtype), state))
    return model


# As published: torchvision counts these, and so do the papers' tables, rounded.
@pytest.mark.parametrize(
    ("make", "parameters"),
    [
        (FAMILIES["resnet18"], 11_689_512),
        (lambda **k: ResNet(34, **k), 21_797_672),
        (FAMILIES["resnet50"], 25_557_032),
        (lambda **k: ResNet(101, **k), 44_549_160),
        (lambda **k: ResNet(152, **k), 60_192_808),
        (MobileNetV2, 3_504_872),
        (FAMILIES["mobilenet_v3_small"], 2_542_856),
        (FAMILIES["mobilenet_v3_large"], 5_483_032),
    ],
)
def test_parameter_counts_are_the_published_ones(make, parameters):
    counted = jax.tree.leaves(nnx.state(abstract(make), nnx.Param))
    assert sum(leaf.size for leaf in counted) == parameters


@pytest.mark.parametrize("family", FAMILIES)
def test_images_become_logits_in_float32(family):
    """Of an even size in training, of an odd one in evaluation."""

    def classify(even, odd):
        model = FAMILIES[family](num_classes=7, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        in_training = model(even)
        model.eval()
        return in_training, model(odd)

    batches = [jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32) for size in (64, 75)]
    for logits in nnx.eval_shape(classify, *batches):
        assert (logits.shape, logits.dtype) == ((2, 7), jnp.float32)


def test_one_channel_images():
    for make in FAMILIES.values():
        model = abstract(make, in_channels=1)
        assert model.conv1.kernel.shape[2] == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ResNet(20, rngs=nnx.Rngs(0)), "depth is 20: choose one of 18, 34, 50, 101, 152"),
        (lambda: ResNet(18, num_classes=0, rngs=nnx.Rngs(0)), "num_classes is 0: choose at"),
        (lambda: MobileNetV2(0, rngs=nnx.Rngs(0)), "choose larger"),
        (lambda: MobileNetV3("medium", rngs=nnx.Rngs(0)), "'medium': choose one of small, large"),
        (lambda: MobileNetV3("small", num_classes=0, rngs=nnx.Rngs(0)), "choose larger"),
    ],
)
def test_impossible_models_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("width", "channels"),
    [(1.0, [16, 24, 32, 64, 96, 160, 320]), (0.35, [8, 8, 16, 24, 32, 56, 112])],
)
def test_channels_are_multiples_of_8(width, channels):
    model = abstract(MobileNetV2, width=width)
    found = dict.fromkeys(block.project.out_features for block in model.blocks)
    assert list(found) == list(dict.fromkeys(channels))
    assert model.classifier.in_features == 1280


def test_a_bottleneck_strides_in_its_3x3_convolution():
    block = abstract(FAMILIES["resnet50"]).layer2[0]
    assert block.conv1.strides in (1, (1, 1))
    assert block.conv2.strides in (2, (2, 2))
    assert [kernel.kernel.shape[:2] for kernel in (block.conv1, block.conv2)] == [(1, 1), (3, 3)]


@pytest.mark.parametrize(
    ("family", "library", "names"),
    [
        (
            "resnet50",
            "torchvision",
            {
                "conv1.weight": (64, 3, 7, 7),
                "layer1.0.downsample.0.weight": (256, 64, 1, 1),
                "layer1.0.downsample.1.running_var": (256,),
                "layer4.2.conv3.weight": (2048, 512, 1, 1),
                "layer4.2.bn3.bias": (2048,),
                "fc.weight": (1000, 2048),
            },
        ),
        (
            "resnet50",
            "huggingface",
            {
                "resnet.embedder.embedder.convolution.weight": (64, 3, 7, 7),
                "resnet.encoder.stages.0.layers.0.shortcut.convolution.weight": (256, 64, 1, 1),
                "resnet.encoder.stages.3.layers.2.layer.2.normalization.bias": (2048,),
                "classifier.1.bias": (1000,),
            },
        ),
        (
            "mobilenet_v2",
            "torchvision",
            {
                "features.0.0.weight": (32, 3, 3, 3),
                "features.1.conv.0.0.weight": (32, 1, 3, 3),
                "features.1.conv.1.weight": (16, 32, 1, 1),
                "features.1.conv.2.running_mean": (16,),
                "features.2.conv.0.0.weight": (96, 16, 1, 1),
                "features.2.conv.1.1.weight": (96,),
                "features.17.conv.2.weight": (320, 960, 1, 1),
                "features.17.conv.3.bias": (320,),
                "features.18.1.bias": (1280,),
                "classifier.1.weight": (1000, 1280),
            },
        ),
        (
            "mobilenet_v2",
            "huggingface",
            {
                "mobilenet_v2.conv_stem.first_conv.convolution.weight": (32, 3, 3, 3),
                "mobilenet_v2.conv_stem.conv_3x3.convolution.weight": (32, 1, 3, 3),
                "mobilenet_v2.conv_stem.reduce_1x1.normalization.bias": (16,),
                "mobilenet_v2.layer.0.expand_1x1.convolution.weight": (96, 16, 1, 1),
                "mobilenet_v2.layer.15.reduce_1x1.normalization.running_var": (320,),
                "mobilenet_v2.conv_1x1.convolution.weight": (1280, 320, 1, 1),
                "classifier.weight": (1000, 1280),
            },
        ),
        (
            "mobilenet_v3_large",
            "torchvision",
            {
                "features.0.0.weight": (16, 3, 3, 3),
                "features.1.block.0.0.weight": (16, 1, 3, 3),
                "features.1.block.1.1.running_mean": (16,),
                "features.4.block.1.0.weight": (72, 1, 5, 5),
                "features.4.block.2.fc1.weight": (24, 72, 1, 1),
                "features.4.block.2.fc2.bias": (72,),
                "features.4.block.3.0.weight": (40, 72, 1, 1),
                "features.16.0.weight": (960, 160, 1, 1),
                "classifier.0.weight": (1280, 960),
                "classifier.3.bias": (1000,),
            },
        ),
        (
            "mobilenet_v3_small",
            "torchvision",
            {
                "features.1.block.1.fc1.weight": (8, 16, 1, 1),
                "features.12.0.weight": (576, 96, 1, 1),
                "classifier.0.weight": (1024, 576),
            },
        ),
        (
            "mobilenet_v1",
            "huggingface",
            {
                "mobilenet_v1.conv_stem.convolution.weight": (32, 3, 3, 3),
                "mobilenet_v1.layer.0.convolution.weight": (32, 1, 3, 3),
                "mobilenet_v1.layer.25.normalization.running_var": (1024,),
                "classifier.weight": (1000, 1024),
            },
        ),
        ("mobilenet_v1", "keras", {"conv_dw_1/depthwise_kernel": (3, 3, 32, 1)}),
    ],
)
def test_weights_come_back_from_other_libraries_names(family, library, names, tmp_path):
    model = filled(FAMILIES[family])
    path = tmp_path / "weights.safetensors"
    save_weights(model, path, library)
    arrays = load_file(path)
    assert {name: arrays[name].shape for name in names} == names
    other = abstract(FAMILIES[family])
    load_weights(other, path)  # finds out whose names they are
    kinds = (nnx.Param, nnx.BatchStat)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(other, kinds), nnx.state(model, kinds))


def test_unknown_libraries_are_refused(tmp_path):
    with pytest.raises(ValueError, match="'keras': give one of torchvision, huggingface"):
        save_weights(abstract(FAMILIES["resnet18"]), tmp_path / "w", "keras")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_convolution_and_the_classifier_are_quantised(family):
    model = abstract(FAMILIES[family])
    layers = [
        "/".join(map(str, path))
        for path, layer in nnx.iter_modules(model)
        if isinstance(layer, nnx.Conv | nnx.Linear)
    ]
    quantised = qj.quantize_model(model, "octav-w4a4")
    weights = {operand for operand in qj.nnx.operand_quantizers(quantised) if "weights" in operand}
    assert weights == {f"{layer}/weights" for layer in layers}
    eight = {
        operand
        for operand, quantizer in qj.nnx.operand_quantizers(quantised).items()
        if operand in weights and quantizer.quantizer.format.bits == 8
    }
    last = "fc" if "resnet" in family else "classifier"
    assert eight == {"conv1/weights", f"{last}/weights"}


@pytest.mark.parametrize("family", ["mobilenet_v2", "mobilenet_v3_small"])
def test_dropout_is_of_training_only(family):
    model = abstract(FAMILIES[family], dropout=0.3)
    assert (model.dropout.rate, model.dropout.deterministic) == (0.3, False)
    model.eval()
    assert model.dropout.deterministic
