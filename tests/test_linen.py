import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qat_jax as qj
from qat_jax import linen as qlinen

W4 = qj.Quantizer(qj.Int(4), qj.PerChannel(), qj.Octav(), "mad")
A4 = qj.Quantizer(qj.Int(4, signed=None), qj.PerTensor(), qj.Octav(), "pwl")
EVERYWHERE = qj.Policy([qj.Rule(".*", weights=W4, activations=A4)])
KEY = jax.random.key(0)


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), name="stem")(x))
        x = nn.relu(nn.Conv(8, (3, 3), feature_group_count=8, name="depthwise")(x))
        x = nn.relu(nn.ConvTranspose(8, (2, 2), strides=(2, 2), name="up")(x))
        x = x.reshape(x.shape[0], -1, 8)
        x = nn.MultiHeadDotProductAttention(2, name="attention")(x)
        x = nn.DenseGeneral((2, 3), name="split")(x.mean(1))
        return nn.Dense(5, name="head")(x.reshape(x.shape[0], -1))


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.stem = nnx.Conv(1, 8, (3, 3), rngs=rngs)
        self.depthwise = nnx.Conv(8, 8, (3, 3), feature_group_count=8, rngs=rngs)
        self.up = nnx.ConvTranspose(8, 8, (2, 2), strides=(2, 2), rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.split = nnx.LinearGeneral(8, (2, 3), rngs=rngs)
        self.head = nnx.Linear(6, 5, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.stem(x))
        x = nnx.relu(self.depthwise(x))
        x = nnx.relu(self.up(x))
        x = self.attention(x.reshape(x.shape[0], -1, 8))
        return self.head(self.split(x.mean(1)).reshape(x.shape[0], -1))


@pytest.fixture(scope="module")
def pair():
    """A Linen model and an NNX model of equal weights, and a batch."""
    x = jax.random.normal(KEY, (3, 6, 6, 1))
    variables = LinenNet().init(jax.random.key(1), x)
    model = NnxNet(nnx.Rngs(0))
    nnx.update(model, nnx.State(variables["params"]))
    return variables, model, x


@nnx.jit
def run(model, x):
    return model(x)


def apply(model, variables, x, **options):
    return jax.jit(functools.partial(model.apply, **options))(variables, x)


@pytest.mark.parametrize("policy", [EVERYWHERE, "octav-w4a4", "max-w3a8", "vsquant-4/4U/-/token"])
def test_linen_and_nnx_agree(pair, policy):
    variables, model, x = pair
    in_float = run(model, x)
    np.testing.assert_allclose(apply(LinenNet(), variables, x), in_float, rtol=1e-5, atol=1e-5)
    quantized = qlinen.quantize_model(LinenNet(), policy, x)
    y = apply(quantized, variables, x)
    np.testing.assert_allclose(y, run(qj.quantize_model(model, policy), x), rtol=1e-4, atol=1e-5)
    assert not np.allclose(y, in_float, atol=1e-3)
    assert str(quantized.report).splitlines()[0].split() == [
        "layer",
        "type",
        "weights",
        "activations",
    ]
    ours = {layer.path: (layer.weights, layer.activations) for layer in quantized.report.layers}
    theirs = qj.report(qj.quantize_model(model, policy)).layers
    assert ours == {layer.path: (layer.weights, layer.activations) for layer in theirs}


def test_gradients_agree_inside_jit(pair):
    variables, model, x = pair
    quantized = qlinen.quantize_model(LinenNet(), EVERYWHERE, x)
    ours = jax.jit(jax.grad(lambda v: jnp.sum(quantized.apply(v, x) ** 2)))(variables)
    graphdef, params = nnx.split(qj.quantize_model(model, EVERYWHERE), nnx.Param)
    theirs = jax.jit(jax.grad(lambda p: jnp.sum(nnx.merge(graphdef, p)(x) ** 2)))(params)
    theirs = nnx.to_pure_dict(theirs)
    for name in ("stem", "depthwise", "up", "split", "head"):
        np.testing.assert_allclose(
            ours["params"][name]["kernel"], theirs[name]["kernel"], rtol=1e-3, atol=1e-4
        )


def test_diagnostics_on_request(pair):
    variables, _, x = pair
    quantized = qlinen.quantize_model(LinenNet(), EVERYWHERE, x)
    y, collected = apply(quantized, variables, x, mutable=["diagnostics"])
    np.testing.assert_allclose(y, apply(quantized, variables, x), rtol=1e-5, atol=1e-6)
    found = collected["diagnostics"]
    assert set(found["attention"]) >= {"query_operand", "attention_weights_operand", "query"}
    assert found["stem"]["weights"][0].sqnr_db > 10


def test_the_model_given_is_untouched(pair):
    variables, model, x = pair
    net = LinenNet()
    quantized = qlinen.quantize_model(net, EVERYWHERE, x)
    apply(quantized, variables, x)
    np.testing.assert_allclose(apply(net, variables, x), run(model, x), rtol=1e-5, atol=1e-5)
    anew = jax.eval_shape(quantized.init, jax.random.key(1), x)
    assert jax.tree.map(lambda leaf: leaf.shape, anew) == jax.tree.map(jnp.shape, variables)


def test_einsum_layers():
    net = nn.Einsum((3, 6, 5), "nta,hab->nthb", use_bias=False)
    x = jax.random.normal(KEY, (2, 4, 6))
    variables = net.init(KEY, x)
    y = qlinen.quantize_model(net, EVERYWHERE, x).apply(variables, x)
    kernel = qj.fake_quant(variables["params"]["kernel"], W4, channel_axis=(0, 2))
    np.testing.assert_allclose(y, jnp.einsum("nta,hab->nthb", A4(x), kernel), rtol=1e-5, atol=1e-5)


def test_a_rule_that_matches_nothing_lists_the_paths(pair):
    with pytest.raises(ValueError, match=r"'conv1' matches no layer.*stem, depthwise, up"):
        qlinen.quantize_model(LinenNet(), qj.Policy([qj.Rule("conv1", W4)]), pair[2])


def test_scanned_layers_with_remat():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.tanh(nn.Dense(6, name="dense")(x)), None

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            blocks = nn.scan(
                nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
            )
            return blocks(name="blocks")(x, None)[0]

    x = jax.random.normal(KEY, (2, 6))
    variables = Stack().init(KEY, x)
    quantized = qlinen.quantize_model(Stack(), EVERYWHERE, x)
    assert [layer.path for layer in quantized.report.layers] == ["blocks/dense"]
    expected = x
    dense = variables["params"]["blocks"]["dense"]
    for kernel, bias in zip(dense["kernel"], dense["bias"], strict=True):
        expected = nn.tanh(A4(expected) @ qj.fake_quant(kernel, W4, channel_axis=1) + bias)
    np.testing.assert_allclose(quantized.apply(variables, x), expected, rtol=1e-4, atol=1e-5)
    gradient = jax.jit(jax.grad(lambda v: jnp.sum(quantized.apply(v, x))))(variables)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))


@nn.jit
class JittedBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(6, name="dense")(x)


def test_a_layer_inside_linens_jit_is_refused():
    """Whose cache gives a quantised model the float trace, and all blocks the first one's rule."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, name="head")(JittedBlock(name="block")(x))

    x = jax.random.normal(KEY, (2, 6))
    rngs = {"params": KEY, "dropout": KEY}
    variables = Net().init(rngs, x)  # what Linen has traced before makes no difference
    for _ in range(2):
        with pytest.raises(ValueError, match=r"'block/dense' runs inside nn\.jit.*jax\.jit"):
            qlinen.quantize_model(Net(), EVERYWHERE, x)
    kernel = variables["params"]["block"]["dense"]["kernel"]
    head = variables["params"]["head"]["kernel"]
    np.testing.assert_allclose(Net().apply(variables, x), x @ kernel @ head, rtol=1e-4, atol=1e-5)


def test_linens_jit_around_other_layers_is_none_of_our_business():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, name="head")(nn.jit(nn.LayerNorm)(name="norm")(x))

    x = jax.random.normal(KEY, (2, 6))
    variables = Net().init(KEY, x)
    quantized = qlinen.quantize_model(Net(), EVERYWHERE, x)
    assert not np.allclose(quantized.apply(variables, x), Net().apply(variables, x), atol=1e-3)


def my_dot_general(*args, **kwargs):
    return 2 * jax.lax.dot_general(*args, **kwargs)


def my_conv(*args, **kwargs):
    return 2 * jax.lax.conv_general_dilated(*args, **kwargs)


def my_attention(query, key, value, **kwargs):
    return 2 * value


@pytest.mark.parametrize(
    ("layer", "field"),
    [
        (nn.Dense(8, dot_general=my_dot_general), "dot_general"),
        (nn.Dense(8, dot_general_cls=lambda: my_dot_general), "dot_general_cls"),
        (nn.DenseGeneral(8, dot_general=my_dot_general), "dot_general"),
        (nn.Conv(8, (3,), conv_general_dilated=my_conv), "conv_general_dilated"),
        (nn.Conv(8, (3,), conv_general_dilated_cls=lambda: my_conv), "conv_general_dilated_cls"),
        (nn.MultiHeadDotProductAttention(2, attention_fn=my_attention), "attention_fn"),
        (nn.MultiHeadDotProductAttention(2, qkv_dot_general=my_dot_general), "dot_general"),
        (
            nn.MultiHeadDotProductAttention(
                2,
                qk_attn_weights_einsum_cls=lambda: jnp.einsum,
                attn_weights_value_einsum_cls=lambda: jnp.einsum,
            ),
            "qk_attn_weights_einsum_cls",
        ),
    ],
)
def test_a_layers_own_operation_is_not_overwritten(layer, field):
    x = jax.random.normal(KEY, (2, 5, 4))
    with pytest.raises(ValueError, match=f"already has a {field} of its own: .*Rule\\("):
        qlinen.quantize_model(layer, EVERYWHERE, x)
    variables = layer.init(KEY, x)
    alone = qlinen.quantize_model(layer, qj.Policy([qj.Rule(".*")]), x)
    np.testing.assert_array_equal(alone.apply(variables, x), layer.apply(variables, x))


def test_the_usual_operation_may_be_given_by_name():
    layer = nn.Dense(8, dot_general=jax.lax.dot_general)
    x = jax.random.normal(KEY, (2, 4))
    variables = layer.init(KEY, x)
    y = qlinen.quantize_model(layer, EVERYWHERE, x).apply(variables, x)
    kernel = qj.fake_quant(variables["params"]["kernel"], W4, channel_axis=1)
    np.testing.assert_allclose(y, A4(x) @ kernel, rtol=1e-5, atol=1e-5)


class MyEinsum(nn.Einsum):
    @nn.compact
    def __call__(self, x):
        return super().__call__(x)


class MyConvTranspose(nn.ConvTranspose):
    @nn.remat
    @nn.compact
    def __call__(self, x):
        return super().__call__(x)


@pytest.mark.parametrize(
    ("layer", "subclass"),
    [
        (nn.Einsum((4, 3), "nta,ab->ntb"), MyEinsum((4, 3), "nta,ab->ntb")),
        (nn.ConvTranspose(3, (2,)), MyConvTranspose(3, (2,))),
    ],
)
def test_a_call_of_the_superclass_quantises_once(layer, subclass):
    x = jax.random.normal(KEY, (2, 5, 4))
    variables = layer.init(KEY, x)
    y, sown = (
        qlinen.quantize_model(net, EVERYWHERE, x).apply(variables, x, mutable=["diagnostics"])
        for net in (layer, subclass)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), y, sown)


def test_a_quantised_model_is_not_quantised_again():
    x = jnp.ones((2, 4))
    model = qlinen.quantize_model(nn.Dense(3), "max-w8a8", x)
    with pytest.raises(TypeError, match=r"quantised already: give its float model, \.module"):
        qlinen.quantize_model(model, "max-w4a4", x)
    again = qlinen.quantize_model(model.module, qj.uniform_policy(2, 2), x)
    assert again.report.layers[0].weights.format.bits == 2
