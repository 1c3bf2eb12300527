import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qat_jax as qj
from qat_jax import integer
from qat_jax.export import load_packed, save_packed
from qat_jax.nnx import Candidate, layer_sites


class Net(nnx.Module):
    """Every kind of layer that can be smoothed."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.depthwise = nnx.Conv(8, 16, (3, 3), feature_group_count=8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, 16, 16, rngs=rngs, decode=False)
        self.head = nnx.Linear(16, 5, rngs=rngs)
        for layer in (self.conv, self.depthwise, self.attention.value, self.attention.out):
            layer.kernel[...] = layer.kernel[...].at[..., 1].multiply(64)

    def __call__(self, x):
        x = nnx.relu(self.conv(x))
        x = nnx.relu(self.depthwise(x)).reshape(x.shape[0], -1, 16)
        return self.head(self.attention(x).mean(1))


def images(seed=1):
    x = jax.random.normal(jax.random.key(seed), (2, 6, 6, 3))
    return x * jnp.array([1, 100, 0.01])


def unquantised(model, *inputs):
    """The model's answer with its quantisers passed over, smoothing left in place."""
    return nnx.capture(model, Candidate)(*inputs)[0]


def all_factors(model):
    sites = {site.activations: site.installed for site in layer_sites(model)}
    return {path: op.factors[...] for path, op in sites.items() if hasattr(op, "factors")}


def linear(policy="max-w8a8", **shape):
    layer = nnx.Linear(**({"in_features": 4, "out_features": 6} | shape), rngs=nnx.Rngs(0))
    return qj.quantize_model(nnx.Sequential(layer), policy)


def outliers(seed=0, features=4):
    return jax.random.normal(jax.random.key(seed), (16, features)).at[:, 1].multiply(64)


def test_in_float_nothing_changes():
    model = qj.quantize_model(Net(nnx.Rngs(0)), "max-w8a8")
    before = unquantised(model, images())
    smoothed = qj.smooth(model, [images()])
    assert smoothed == tuple(
        f"{layer}/activations"
        for layer in (
            "conv",
            "depthwise",
            *(f"attention/{name}" for name in ("query", "key", "value", "out")),
            "head",
        )
    )
    assert all(len(set(np.asarray(factors))) > 1 for factors in all_factors(model).values())
    np.testing.assert_array_equal(unquantised(model, images()), before)


@pytest.mark.parametrize("strength", [0.0, 0.5, 0.75, 1.0])
def test_factors_are_those_of_the_paper_to_a_power_of_two(strength):
    model, batches = linear(), [outliers(0), 2 * outliers(1)]
    kernel = np.asarray(model.layers[0].kernel[...], np.float64)
    qj.smooth(model, batches, strength=strength)
    largest = np.abs(np.concatenate([np.asarray(x, np.float64) for x in batches])).max(0)
    exact = largest**strength / np.abs(kernel).max(1) ** (1 - strength)
    exact /= np.exp(np.log(exact).mean())
    factors = 1 / np.asarray(model.layers[0].dot_general.factors[...], np.float64)
    assert (np.abs(np.log2(factors / exact)) <= 0.5 + 1e-6).all()
    assert (np.log2(factors) % 1 == 0).all()
    np.testing.assert_array_equal(model.layers[0].kernel[...], kernel * factors[:, None])


@pytest.mark.parametrize("policy", ["max-w8a8", "max-w4a4", "octav-w4a4", "vsquant-4/4/4/6"])
def test_outliers_cost_less(policy):
    rule = qj.preset(policy).rules[-1]
    model = linear(qj.Policy([qj.Rule(".*", rule.weights, rule.activations)]), in_features=64)
    x, kernel = outliers(features=64), model.layers[0].kernel
    kernel[...] = kernel[...].at[1].divide(16)  # outliers are of features that weigh little
    exact = unquantised(model, x)
    before = jnp.square(model(x) - exact).mean()
    qj.smooth(model, [x])
    assert jnp.square(model(x) - exact).mean() < 0.5 * before


def test_smoothing_again_corrects_what_was_found():
    model, once = linear(), linear()
    qj.smooth(model, [outliers(0)])
    qj.smooth(model, [outliers(0)])  # nothing is left to correct
    qj.smooth(once, [outliers(0)])
    np.testing.assert_array_equal(model.layers[0].kernel[...], once.layers[0].kernel[...])
    qj.smooth(model, [outliers(0).at[:, 1].divide(64)])
    found = model.layers[0].dot_general.factors[...]
    assert len(set(np.asarray(found))) < len(
        set(np.asarray(once.layers[0].dot_general.factors[...]))
    )


def test_several_contracted_axes_share_the_factors_of_the_last():
    layer = nnx.LinearGeneral((3, 4), 5, axis=(-2, -1), rngs=nnx.Rngs(0))
    model = qj.quantize_model(nnx.Sequential(layer), "max-w8a8")
    x = jax.random.normal(jax.random.key(0), (2, 3, 4)).at[..., 2].multiply(50)
    before = unquantised(model, x)
    qj.smooth(model, [x])
    assert model.layers[0].dot_general.factors[...].shape == (4,)
    np.testing.assert_array_equal(unquantised(model, x), before)


def test_features_that_are_always_zero_keep_their_place():
    model = linear()
    model.layers[0].kernel[...] = model.layers[0].kernel[...].at[3].set(0)
    qj.smooth(model, [outliers().at[:, 0].set(0)])
    factors = np.asarray(model.layers[0].dot_general.factors[...])
    assert factors[0] == factors[3] == 1
    assert np.isfinite(model.layers[0].kernel[...]).all()


def test_what_shares_a_kernel_or_is_in_float_is_left():
    class Tied(nnx.Module):
        def __init__(self, rngs):
            self.first, self.second, self.third, self.fourth = (
                nnx.Linear(4, 4, rngs=rngs) for _ in range(4)
            )
            self.second.kernel = self.first.kernel
            self.fifth = nnx.Linear(4, 4, rngs=rngs)
            self.mirror = nnx.Dict(kernel=self.fifth.kernel)  # somebody else's, no layer's

        def __call__(self, x):
            return self.fifth(self.fourth(self.third(self.second(self.first(x)))))

    w8 = qj.Quantizer(qj.Int(8))
    policy = qj.Policy([qj.Rule("third", weights=w8), qj.Rule(".*", weights=w8, activations=w8)])
    model = qj.quantize_model(Tied(nnx.Rngs(0)), policy)
    assert qj.smooth(model, [outliers()]) == ("fourth/activations",)


def test_padding_is_not_looked_at():
    model, same = linear(), linear()
    x = jnp.stack([outliers()])
    mask = jnp.arange(16)[None] < 8
    with qj.ignore_padding(mask):
        qj.smooth(model, [x.at[:, 8:].set(1e6)])
    qj.smooth(same, [x[:, :8]])
    np.testing.assert_array_equal(model.layers[0].kernel[...], same.layers[0].kernel[...])


@pytest.mark.parametrize(
    ("batches", "options", "message"),
    [
        ([], {}, "no batch to smooth by"),
        ([jnp.full((2, 4), jnp.nan)], {}, "layers/0/activations is not finite"),
        ([jnp.ones((2, 4))], {"strength": 1.5}, "between 0 and 1, unlike 1.5"),
        ([jnp.ones((2, 4))], {"strength": float("nan")}, "between 0 and 1"),
        ([jnp.ones((2, 4))], {"operands": "x"}, "no input to smooth matches 'x': there are layers"),
        (jnp.ones((2, 4)), {}, "give a list of batches"),
    ],
)
def test_wrong_input_changes_nothing(batches, options, message):
    model = linear()
    kernel = model.layers[0].kernel[...]
    with pytest.raises(ValueError, match=message):
        qj.smooth(model, batches, **options)
    np.testing.assert_array_equal(model.layers[0].kernel[...], kernel)
    assert model.layers[0].dot_general.factors is None


def test_a_model_without_quantisers_or_with_thresholds_is_refused():
    with pytest.raises(ValueError, match="quantise inputs and kernels of layers first"):
        qj.smooth(nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0))), [outliers()])
    model = linear()
    qj.calibrate(model, [outliers()])
    with pytest.raises(ValueError, match="layers/0/activations has thresholds already"):
        qj.smooth(model, [outliers()])


def test_what_comes_after_sees_the_smoothed_operands(tmp_path):
    model = qj.quantize_model(Net(nnx.Rngs(0)), "max-w8a8")
    qj.smooth(model, [images()])
    frozen = nnx.clone(model)
    qj.calibrate(frozen, [images()])
    assert "factors=of 16 features" in repr(frozen.head)

    x = 10 * jax.random.normal(jax.random.key(2), (8, 4)).at[:, 1].multiply(64)
    dense = linear("max-w4a8")
    qj.smooth(dense, [x])
    kernel = dense.layers[0].kernel[...]
    qj.gptq(dense, [x])
    assert not np.array_equal(dense.layers[0].kernel[...], kernel)

    # Packed, in integers, written and read.
    packed = integer.pack_model(model, images())
    expected = model(images())
    np.testing.assert_array_equal(packed(images()), expected)
    np.testing.assert_allclose(integer.integer_model(packed)(images()), expected, rtol=1e-4)
    save_packed(packed, tmp_path / "net.safetensors")
    read = load_packed(Net(nnx.Rngs(1)), tmp_path / "net.safetensors")
    np.testing.assert_array_equal(read(images()), expected)
    for path, factors in all_factors(model).items():
        np.testing.assert_array_equal(all_factors(read)[path], factors)


def test_an_exponent_is_stored_for_each_feature():
    model = linear()
    before = qj.model_storage(model, outliers())
    qj.smooth(model, [outliers()])
    after = qj.model_storage(model, outliers())
    assert after.code_bits - before.code_bits == 4 * 8
    assert after.elements == before.elements


def test_training_goes_on_in_smoothed_features():
    model = linear()
    qj.smooth(model, [outliers()])

    @nnx.jit
    def gradient(model, x):
        return nnx.grad(lambda model: jnp.square(model(x)).sum())(model)

    found = jax.tree.leaves(gradient(model, outliers()))
    assert len(found) == 2  # of kernel and bias: factors are no parameters
    assert all(np.abs(leaf).max() > 0 for leaf in found)
