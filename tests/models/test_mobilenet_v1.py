import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from qat_jax.data import ImageFolder
from qat_jax.models import MobileNetV1, load_keras_mobilenet_v1


def abstract(width=1.0, **options):
    return nnx.eval_shape(lambda: MobileNetV1(width, **options, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize(
    ("width", "parameters"), [(1.0, 4_231_976), (0.75, 2_585_560), (0.25, 470_072)]
)
def test_parameter_counts_are_the_published_ones(width, parameters):
    counted = jax.tree.leaves(nnx.state(abstract(width), nnx.Param))
    assert sum(leaf.size for leaf in counted) == parameters


def test_five_strides_of_two():
    model = MobileNetV1(0.25, 7, rngs=nnx.Rngs(0))
    seen = []
    last = model.blocks[-1]
    for size in (64, 65):
        x = nnx.relu6(model.conv1(jnp.zeros((1, size, size, 3))))
        for block in model.blocks:
            x = block(x)
        seen.append(x.shape)
    assert seen == [(1, 2, 2, 256), (1, 3, 3, 256)]
    assert last.depthwise.kernel.shape == (3, 3, 1, 256)
    assert model(jnp.zeros((2, 32, 32, 3))).shape == (2, 7)


def test_pretrained_weights_classify(shared_data):
    folder = shared_data / "imagenet"
    model = abstract(0.75)
    load_keras_mobilenet_v1(model, folder / "mobilenet_v1_0.75_224.safetensors")
    model.eval()
    images = ImageFolder(folder / "ilsvrc2012_val_subset1000_227.zip", size=224)
    examples = [images[i] for i in range(0, 1000, 25)]
    graphdef, state = nnx.split(model)
    x = np.stack([example["image"] for example in examples]).astype(np.float32) / 127.5 - 1
    predicted = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x).argmax(-1))(state, x)
    correct = np.sum(np.asarray(predicted) == [example["label"] for example in examples])
    assert correct >= 28  # 78.2 % of all 1,000: fewer than 28 of 40 in one of 100 draws


def test_other_weights_are_refused(tmp_path, shared_data):
    path = shared_data / "imagenet" / "mobilenet_v1_0.75_224.safetensors"
    with pytest.raises(ValueError, match=r"build it with the file's width"):
        load_keras_mobilenet_v1(abstract(0.5), path)
    arrays = load_file(path)
    del arrays["conv_pw_3_bn/gamma"]
    save_file(arrays, tmp_path / "less.safetensors")
    with pytest.raises(ValueError, match="1 names differ, such as 'conv_pw_3_bn/gamma'"):
        load_keras_mobilenet_v1(abstract(0.75), tmp_path / "less.safetensors")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_keras_mobilenet_v1(abstract(0.75), tmp_path / "none.safetensors")


def test_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match="choose larger ones"):
        MobileNetV1(0.01, rngs=nnx.Rngs(0))
