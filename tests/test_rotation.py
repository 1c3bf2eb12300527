import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from flax import nnx

import qat_jax as qj
from qat_jax import hadamard, integer
from qat_jax.export import load_packed, save_packed
from qat_jax.features import with_usual_kernels
from qat_jax.nnx import Candidate, layer_sites


def numbers(shape, seed=0, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def rudin_shapiro(length):
    """By its recursion, a_2n = a_n and a_2n+1 = (-1)^n a_n."""
    a = [1]
    for n in range(1, length):
        a.append(a[n // 2] * (-1 if n % 2 and (n // 2) % 2 else 1))
    return np.array(a)


@pytest.mark.parametrize(
    ("shape", "axis", "block"),
    [
        ((3, 8), 1, 8),
        ((48, 5), 0, 16),
        ((2, 64, 3), -2, 64),
        ((5, 96), 1, 32),
        ((128,), 0, 128),
        ((2, 512), 1, 256),
        ((1024,), 0, 512),
    ],
)
def test_the_transform_is_sylvesters(shape, axis, block):
    with jax.enable_x64(True):
        x = numbers(shape, dtype=jnp.float64)
        matrix = np.diag(rudin_shapiro(block)) @ scipy.linalg.hadamard(block) / np.sqrt(block)
        whole = np.kron(np.eye(shape[axis] // block), matrix)
        expected = np.moveaxis(np.moveaxis(np.asarray(x), axis, -1) @ whole, -1, axis)
        found = hadamard.rotated(x, axis, block)
        np.testing.assert_allclose(found, expected, atol=1e-12)
        np.testing.assert_allclose(hadamard.rotated_back(found, axis, block), x, atol=1e-12)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_dtypes_are_kept(dtype):
    x = numbers((4, 32)).astype(dtype)
    found = hadamard.rotated(x, 1, 32)
    assert found.dtype == dtype
    exact = hadamard.rotated(x.astype(jnp.float32), 1, 32)
    np.testing.assert_array_equal(found, exact.astype(dtype))


@pytest.mark.parametrize("block", [16, 64, 256])
def test_what_features_have_in_common_is_spread_too(block):
    for x in (jnp.ones(block), jnp.zeros(block).at[5].set(block**0.5)):
        np.testing.assert_allclose(jnp.abs(hadamard.rotated(x, 0, block)), 1, rtol=1e-5)


class Net(nnx.Module):
    """Every kind of layer that can be rotated, and some that cannot."""

    def __init__(self, rngs):
        self.first = nnx.Conv(3, 16, (3, 3), rngs=rngs)
        self.depthwise = nnx.Conv(16, 16, (3, 3), feature_group_count=16, rngs=rngs)
        self.grouped = nnx.Conv(16, 24, (3, 3), feature_group_count=2, rngs=rngs)
        self.conv = nnx.Conv(24, 16, (3, 3), strides=2, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 16, 16, rngs=rngs, decode=False)
        self.head = nnx.Linear(16, 5, rngs=rngs)

    def __call__(self, x):
        for layer in (self.first, self.depthwise, self.grouped, self.conv):
            x = nnx.relu(layer(x))
        x = x.reshape(x.shape[0], -1, 16)
        return self.head(self.attention(x).mean(1))


ROTATED = tuple(
    f"{layer}/activations"
    for layer in ("grouped", "conv", "attention/query", "attention/key", "attention/value",
                  "attention/out", "head")
)  # fmt: skip


def images(seed=1):
    return numbers((2, 8, 8, 3), seed) * jnp.array([1, 20, 0.1])


def unquantised(model, *inputs):
    """The model's answer with its quantisers passed over, rotations left in place."""
    return nnx.capture(model, Candidate)(*inputs)[0]


def rotated(policy="octav-w4a4", **settings):
    model = qj.quantize_model(Net(nnx.Rngs(0)), policy)
    model.eval()
    qj.rotate(model, **settings)
    return model


def test_in_float_nothing_changes_but_by_rounding():
    float_model = Net(nnx.Rngs(0))
    model = qj.quantize_model(float_model, "max-w8a8")
    assert qj.rotate(model) == ROTATED
    lengths = {s.activations: getattr(s.installed, "rotation", None) for s in layer_sites(model)}
    assert {path: length for path, length in lengths.items() if length} == dict.fromkeys(
        ROTATED, 8
    ) | dict.fromkeys(("attention/query/activations", "attention/key/activations",
                       "attention/value/activations", "head/activations"), 16)  # fmt: skip
    np.testing.assert_allclose(unquantised(model, images()), float_model(images()), atol=1e-5)
    kernel = float_model.conv.kernel[...]
    assert np.abs(model.conv.kernel[...] - kernel).max() > 0.01
    assert model.first.kernel[...] is float_model.first.kernel[...]


def test_the_kernels_of_the_float_model_come_back():
    float_model = Net(nnx.Rngs(0))
    model = qj.quantize_model(float_model, "max-w8a8")
    qj.smooth(model, [images()])
    smoothed = with_usual_kernels(model)
    for (path, found), (_, kernel) in zip(
        nnx.to_flat_state(nnx.state(smoothed, nnx.Param)),
        nnx.to_flat_state(nnx.state(float_model, nnx.Param)),
        strict=True,
    ):
        np.testing.assert_array_equal(found.get_value(), kernel.get_value(), str(path))
    qj.rotate(model)
    both = with_usual_kernels(model)
    for (path, found), (_, kernel) in zip(
        nnx.to_flat_state(nnx.state(both, nnx.Param)),
        nnx.to_flat_state(nnx.state(float_model, nnx.Param)),
        strict=True,
    ):
        np.testing.assert_allclose(found.get_value(), kernel.get_value(), atol=1e-6, err_msg=path)
    np.testing.assert_allclose(unquantised(both, images()), float_model(images()), atol=1e-5)
    assert model.head.dot_general.rotation == 16  # the model itself is as it was


def test_outliers_cost_less():
    layer = nnx.Linear(64, 32, rngs=nnx.Rngs(0))
    x = numbers((256, 64)).at[:, 7].multiply(50)
    errors = {}
    for block in (None, 8, 64):
        model = qj.quantize_model(nnx.Sequential(layer), qj.uniform_policy(4, 4))
        if block:
            qj.rotate(model, block=block)
        errors[block] = jnp.square(model(x) - layer(x)).mean()
    assert errors[8] < errors[None] / 2
    assert errors[64] < errors[8] / 1.5


@pytest.mark.parametrize("policy", ["octav-w4a4", "vsquant-4/8/4/6"])
def test_packed_models_and_integers_compute_the_same(policy, tmp_path):
    model = rotated(policy)
    answer = jax.jit(lambda model, x: model(x))(model, images())
    packed = integer.pack_model(model, images())
    assert "rotation" in repr(packed.head.dot_general)
    packed_answer = jax.jit(lambda model, x: model(x))(packed, images())
    np.testing.assert_array_equal(packed_answer, answer)
    save_packed(packed, tmp_path / "packed.safetensors")
    read = load_packed(Net(nnx.Rngs(1)), tmp_path / "packed.safetensors")
    read.eval()
    np.testing.assert_array_equal(jax.jit(lambda model, x: model(x))(read, images()), answer)


LAYERS = {
    "linear": lambda rngs: nnx.Linear(16, 5, rngs=rngs),
    "general": lambda rngs: nnx.LinearGeneral((3, 8), 5, axis=(-2, -1), rngs=rngs),
    "convolution": lambda rngs: nnx.Conv(24, 5, (3, 3), rngs=rngs),
    "grouped": lambda rngs: nnx.Conv(32, 6, (3, 3), feature_group_count=2, rngs=rngs),
}
SHAPES = {"linear": (4, 16), "general": (4, 3, 8), "convolution": (2, 5, 5, 24),
          "grouped": (2, 5, 5, 32)}  # fmt: skip


@pytest.mark.parametrize("policy", ["octav-w8a8", "vsquant-4/8/4/6"])
@pytest.mark.parametrize("kind", LAYERS)
def test_integers_agree_layer_by_layer(kind, policy):
    """One at a time: a code that falls to the other side of a tie changes all that follow."""
    x = numbers(SHAPES[kind]).at[..., 2].multiply(20)
    layer = LAYERS[kind](nnx.Rngs(0))
    model = qj.quantize_model(nnx.Sequential(layer), policy)
    model.eval()
    assert qj.rotate(model) == ("layers/0/activations",)
    answer = model(x)
    np.testing.assert_allclose(answer, layer(x), atol=0.1 * np.abs(layer(x)).max())
    packed = integer.pack_model(model, x)
    np.testing.assert_array_equal(packed(x), answer)
    found = integer.integer_model(packed)(x)
    np.testing.assert_allclose(found, answer, atol=1e-5 * np.abs(answer).max())


def test_gptq_rounds_what_is_turned():
    def error(round_by):
        layer = nnx.Linear(64, 32, rngs=nnx.Rngs(0))
        mixing = numbers((64, 64), 3) / 8
        x = numbers((512, 64)) @ mixing
        model = qj.quantize_model(nnx.Sequential(layer), qj.uniform_policy(3, 8))
        qj.rotate(model)
        if round_by:
            qj.gptq(model, [x])
        return jnp.square(model(x) - layer(x)).mean()

    assert error(True) < 0.7 * error(False)


def test_gradients_are_those_of_the_model_before():
    """Straight through 16 bits, which round little, and turned back."""
    float_model = Net(nnx.Rngs(0))
    model = rotated(qj.uniform_policy(16, 16, clipping=qj.AbsMax()))

    def loss(model):
        return jnp.square(model(images())).sum()

    gradients = nnx.jit(nnx.grad(loss))
    expected = dict(nnx.to_flat_state(gradients(float_model)))
    sites = {site.path: site for site in layer_sites(model)}
    for path, g in nnx.to_flat_state(gradients(model)):
        layer, value = "/".join(map(str, path[:-1])), g.get_value()
        if path[-1] == "kernel" and (block := getattr(sites[layer].installed, "rotation", None)):
            attention_axis = 1 if layer == "attention/out" else 0
            axis = attention_axis if value.ndim == 3 else value.ndim - 2
            value = hadamard.rotated_back(value, axis, block)
        want = expected[path].get_value()
        np.testing.assert_allclose(value, want, atol=2e-2 * np.abs(want).max() + 1e-4)


def test_what_cannot_be_is_said():
    model = qj.quantize_model(Net(nnx.Rngs(0)), "octav-w4a4")
    with pytest.raises(ValueError, match="'first/activations': there are grouped/activations, "):
        qj.rotate(model, operands="first/activations")
    with pytest.raises(ValueError, match="a power of two from 8 on, unlike 12"):
        qj.rotate(model, block=12)
    with pytest.raises(ValueError, match="grouped/activations has blocks of at most 8 features"):
        qj.rotate(model, block=16)
    assert qj.rotate(model, operands="head/.*") == ("head/activations",)
    with pytest.raises(ValueError, match="head/activations is rotated already"):
        qj.rotate(model)
    with pytest.raises(ValueError, match="head/activations is rotated already: smooth"):
        qj.smooth(model, [images()])
    qj.calibrate(model, [images()])
    with pytest.raises(ValueError, match="conv/activations has thresholds already: rotate"):
        qj.rotate(model, operands="conv/.*")
    with pytest.raises(ValueError, match="none, quantise inputs and kernels of layers first"):
        qj.rotate(Net(nnx.Rngs(0)))
