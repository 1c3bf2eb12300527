import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from qat_jax.data import CentreCrop, ImageFolder, PreparedSource, eval_batches
from qat_jax.models import MobileNetV1, load_weights
from qat_jax.training.objective import Normalisation


def abstract(width=1.0, **options):
    return nnx.eval_shape(lambda: MobileNetV1(width, **options, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize(
    ("width", "parameters"), [(1.0, 4_231_976), (0.75, 2_585_560), (0.25, 470_072)]
)
def test_parameter_counts_are_the_published_ones(width, parameters):
    counted = jax.tree.leaves(nnx.state(abstract(width), nnx.Param))
    assert sum(leaf.size for leaf in counted) == parameters


def test_five_strides_of_two():
    last = {64: 2, 65: 3}

    def shapes():
        model = MobileNetV1(0.25, 7, rngs=nnx.Rngs(0))
        found = []
        for size in last:
            images = jnp.zeros((2, size, size, 3))
            x = model.conv1(images)
            for block in model.blocks:
                x = block(x)
            found.append((x, model(images)))
        return found, model.blocks[-1].depthwise.kernel.get_value()

    found, kernel = nnx.eval_shape(shapes)
    for size, (features, logits) in zip(last.values(), found, strict=True):
        assert features.shape == (2, size, size, 256)
        assert logits.shape == (2, 7)
    assert kernel.shape == (3, 3, 1, 256)


@pytest.fixture
def pretrained(shared_data):
    path = shared_data / "imagenet" / "mobilenet_v1_0.75_224.safetensors"
    if not path.is_file():
        pytest.skip(f"no pretrained MobileNet at {path}")
    return path


def test_pretrained_weights_classify(pretrained):
    path = pretrained.with_name("ilsvrc2012_val_subset1000_227.zip")
    if not path.is_file():
        pytest.skip(f"no ImageNet images at {path}")
    model = abstract(0.75)
    load_weights(model, pretrained)
    model.eval()
    images = PreparedSource(ImageFolder(path), CentreCrop(224, tensorflow=True))
    graphdef, state = nnx.split(model)
    normalise = Normalisation((0.5,) * 3, (0.5,) * 3)
    predict = jax.jit(lambda state, x: nnx.merge(graphdef, state)(normalise(x)).argmax(-1))
    correct = 0
    for batch in eval_batches([images[i] for i in range(0, 1000, 10)], batch_size=25):
        correct += np.sum(np.asarray(predict(state, batch["image"])) == batch["label"])
    assert correct == pytest.approx(85, abs=1)  # of 100; 78.2 % of all 1,000


def test_layer_paths():
    block = ("depthwise", "depthwise_bn", "pointwise", "pointwise_bn")
    assert {
        "/".join(map(str, path))
        for path, layer in nnx.iter_modules(abstract())
        if isinstance(layer, nnx.Conv | nnx.BatchNorm | nnx.Linear)
    } == {
        "conv1",
        "bn1",
        *(f"blocks/{i}/{name}" for i in range(13) for name in block),
        "classifier",
    }


def test_low_precision_keeps_parameters_and_logits_in_float32():
    def arrays():
        model = MobileNetV1(0.25, 7, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
        images = jnp.zeros((1, 32, 32, 3))
        return model.conv1(images), model(images), model.conv1.kernel.get_value()

    assert [a.dtype for a in nnx.eval_shape(arrays)] == [jnp.bfloat16, jnp.float32, jnp.float32]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("conv1_bn/beta", lambda a: a.astype(np.int32), "is int32: convert it to floating point"),
        ("conv_dw_1/depthwise_kernel", lambda a: a[..., 0], r"needs \(3, 3, 24, 1\): build the"),
        ("conv_preds/kernel", lambda a: a.repeat(2, 0), r"needs \(1, 1, 768, 1000\): build the"),
    ],
)
def test_an_array_that_does_not_fit_is_named_and_nothing_replaced(
    name, change, message, tmp_path, pretrained
):
    arrays = load_file(pretrained)
    save_file(arrays | {name: np.ascontiguousarray(change(arrays[name]))}, tmp_path / "w")
    model = abstract(0.75)
    with pytest.raises(ValueError, match=f"{name} in .*{message}"):
        load_weights(model, tmp_path / "w")
    leaves = jax.tree.leaves(nnx.state(model))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)


def test_other_weights_are_refused(tmp_path, pretrained):
    with pytest.raises(ValueError, match=r"build the model with the file's width"):
        load_weights(abstract(0.5), pretrained)
    arrays = load_file(pretrained)
    del arrays["conv_pw_3_bn/gamma"]
    save_file(arrays, tmp_path / "less.safetensors")
    with pytest.raises(ValueError, match=r"missing names: 1 \(such as conv_pw_3_bn/gamma\)"):
        load_weights(abstract(0.75), tmp_path / "less.safetensors")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_weights(abstract(0.75), tmp_path / "none.safetensors")


def test_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match="choose larger ones"):
        MobileNetV1(0.01, rngs=nnx.Rngs(0))
