import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qat_jax as qj
from qat_jax.integer import integer_model, pack_model
from qat_jax.nnx import QuantizedAttention

W8 = qj.Quantizer(qj.Int(8))
W4 = qj.Quantizer(qj.Int(4), qj.PerChannel(), qj.Octav(), "mad")
A4 = qj.Quantizer(qj.Int(4, signed=None), qj.PerTensor(), qj.Octav(), "pwl")
EVERYWHERE = qj.Policy([qj.Rule(".*", weights=W4, activations=A4)])
KEY = jax.random.key(0)


def normal(*shape):
    return jax.random.normal(KEY, shape)


def with_weights(layer, axis, **kernels):
    """The layer as it would be by hand: kernel and input quantised before it runs."""
    layer = nnx.clone(layer)
    layer.kernel[...] = qj.fake_quant(layer.kernel[...], W4, channel_axis=axis)
    return layer


@pytest.mark.parametrize(
    ("make", "shape", "axis"),
    [
        (lambda r: nnx.Linear(6, 5, rngs=r), (3, 6), -1),
        (lambda r: nnx.LinearGeneral((6, 2), (5, 3), axis=(-2, -1), rngs=r), (3, 6, 2), (2, 3)),
        (
            lambda r: nnx.LinearGeneral(6, 5, batch_axis={0: 4}, rngs=r),
            (4, 6),
            (0, 2),
        ),
        (lambda r: nnx.Conv(4, 6, (3, 3), rngs=r), (2, 8, 8, 4), -1),
        (lambda r: nnx.Conv(4, 6, 3, strides=2, rngs=r), (2, 9, 4), -1),
        (lambda r: nnx.Conv(4, 8, (3, 3), feature_group_count=4, rngs=r), (2, 8, 8, 4), -1),
        (lambda r: nnx.ConvTranspose(4, 6, (3, 3), strides=(2, 2), rngs=r), (2, 5, 5, 4), -1),
        (
            lambda r: nnx.ConvTranspose(4, 6, (3, 3), transpose_kernel=True, rngs=r),
            (2, 5, 5, 4),
            -2,
        ),
        (lambda r: nnx.Einsum("nta,hab->nthb", (3, 6, 5), (3, 5), rngs=r), (2, 4, 6), (0, 2)),
    ],
)
def test_layers_compute_with_quantised_operands(make, shape, axis):
    layer = make(nnx.Rngs(0))
    x = normal(*shape)
    quantized = qj.quantize_model(layer, EVERYWHERE)
    expected = with_weights(layer, axis)(A4(x))
    np.testing.assert_allclose(quantized(x), expected, rtol=1e-5, atol=1e-5)
    assert not np.allclose(quantized(x), layer(x), atol=1e-3)


def attention_by_hand(module, q_in, kv_in, mask=None):
    """Multi-head attention written out, with quantised operands in both products."""

    def project(name, x):
        layer = getattr(module, name)
        kernel = qj.fake_quant(layer.kernel[...], W4, channel_axis=(1, 2))
        return jnp.einsum("btf,fhd->bthd", A4(x), kernel) + layer.bias[...]

    q, k, v = project("query", q_in), project("key", kv_in), project("value", kv_in)
    scores = jnp.einsum("bqhd,bkhd->bhqk", A4(q), A4(k)) / np.sqrt(q.shape[-1])
    if mask is not None:
        scores = jnp.where(mask, scores, -1e30)
    mixed = jnp.einsum("bhqk,bkhd->bqhd", A4(jax.nn.softmax(scores)), A4(v))
    kernel = qj.fake_quant(module.out.kernel[...], W4, channel_axis=2)
    return jnp.einsum("bqhd,hdf->bqf", A4(mixed), kernel) + module.out.bias[...]


def test_multi_head_attention_with_both_products():
    module = nnx.MultiHeadAttention(4, 8, 16, decode=False, rngs=nnx.Rngs(0))
    module.query.bias[...] = normal(4, 4)
    quantized = qj.quantize_model(module, EVERYWHERE)
    q, kv = normal(2, 5, 8), normal(2, 7, 8) + 0.1
    mask = jnp.arange(7) < jnp.array([7, 4])[:, None, None, None]
    for m in (None, mask):
        y = quantized(q, kv, mask=m)
        expected = nnx.jit(attention_by_hand)(module, q, kv, m)
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


def test_rows_of_attention_have_scales_of_their_own():
    """Of a head: a query's, a key's, what a query's softmax gives, a feature of the values."""
    q, k, v = normal(2, 3, 2, 8), normal(2, 5, 2, 8), normal(2, 5, 2, 8)

    def rows(x, signed=True):
        fake = dataclasses.replace(A4, format=qj.Int(4, signed=signed))
        return np.stack([fake(row) for row in x.reshape(-1, x.shape[-1])]).reshape(x.shape)

    scores = np.einsum("bqhd,bkhd->bhqk", rows(q), rows(k)) / np.sqrt(8)
    features = np.moveaxis(rows(np.moveaxis(v, 1, -1)), -1, 1)
    softmax = rows(np.array(jax.nn.softmax(scores)), signed=False)
    expected = np.einsum("bhqk,bkhd->bqhd", softmax, features)
    quantized = QuantizedAttention(dataclasses.replace(A4, granularity=qj.PerChannel()))
    np.testing.assert_allclose(quantized(q, k, v), expected, rtol=1e-4, atol=1e-5)


def test_attention_products_alone_and_left_out():
    module = nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0))
    x = normal(2, 5, 8)
    only_linear = qj.quantize_model(module, qj.Policy([qj.Rule(".+", W4, A4)]))
    assert [layer.activations for layer in qj.report(only_linear).layers] == [None, *[A4] * 4]
    with_products = qj.quantize_model(module, qj.Policy([qj.Rule("", activations=A4)]))
    assert not np.allclose(with_products(x), module(x), atol=1e-4)


def test_grouped_query_attention():
    many = nnx.MultiHeadAttention(4, 8, num_kv_heads=2, decode=False, rngs=nnx.Rngs(0))
    fine = qj.Quantizer(qj.Int(16, signed=None), clipping=qj.AbsMax())
    quantized = qj.quantize_model(many, qj.Policy([qj.Rule("", activations=fine)]))
    x = normal(2, 5, 8)
    np.testing.assert_allclose(quantized(x), many(x), atol=1e-3)


def test_dropout_in_quantised_attention():
    module = nnx.MultiHeadAttention(2, 8, dropout_rate=0.5, decode=False, rngs=nnx.Rngs(0))
    fine = qj.Quantizer(qj.Int(16, signed=None), clipping=qj.AbsMax())
    quantized = qj.quantize_model(module, qj.Policy([qj.Rule("", activations=fine)]))
    x = normal(2, 5, 8)
    ones = [m(x, rngs=nnx.Rngs(dropout=1), deterministic=False) for m in (module, quantized)]
    np.testing.assert_allclose(*ones, atol=1e-3)


class Net(nnx.Module):
    """Attributes in an order that the alphabet would turn round."""

    def __init__(self, rngs):
        self.stem = nnx.Conv(1, 4, (3, 3), rngs=rngs)
        self.blocks = nnx.List([nnx.Conv(4, 4, (3, 3), rngs=rngs) for _ in range(11)])
        self.classifier = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.stem(x))
        for block in self.blocks:
            x = nnx.relu(block(x))
        return self.classifier(x.mean((1, 2)))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Net(nnx.Rngs(0)),
        lambda: nnx.merge(*nnx.split(Net(nnx.Rngs(0)))),
        lambda: nnx.eval_shape(lambda: Net(nnx.Rngs(0))),
    ],
)
def test_presets_find_the_first_convolution_and_the_classifier(make):
    model = qj.quantize_model(make(), "octav-w4a4")
    layers = qj.report(model).layers
    blocks = [f"blocks/{i}" for i in range(11)]
    assert [layer.path for layer in layers] == ["stem", *blocks, "classifier"]
    assert [layer.weights.format.bits for layer in layers] == [8, *[4] * 11, 8]
    stem = " ".join(str(qj.report(model)).splitlines()[1].split())
    assert stem == ("stem Conv int8 narrow PerChannel Octav mad auto8 narrow PerTensor Octav pwl")


def test_layers_in_containers_of_every_kind():
    class Containers(nnx.Module):
        def __init__(self, rngs):
            def layer():
                return nnx.Linear(4, 4, rngs=rngs)

            self.pair = nnx.data((layer(), layer()))
            self.named = nnx.Dict(second=layer(), first=layer())
            self.plain = nnx.data({"b": layer(), "a": [layer(), layer()]})

    model = Containers(nnx.Rngs(0))
    assert [layer.path for layer in qj.report(qj.quantize_model(model, EVERYWHERE)).layers] == [
        *("pair/0", "pair/1", "named/second", "named/first"),
        *("plain/b", "plain/a/0", "plain/a/1"),
    ]


def test_the_model_given_stays_as_it_is_and_shares_its_arrays():
    model = Net(nnx.Rngs(0))
    x = normal(2, 8, 8, 1)
    before = model(x)
    quantized = qj.quantize_model(model, "octav-w4a4")
    np.testing.assert_array_equal(model(x), before)
    assert all(layer.weights is None for layer in qj.report(model).layers)
    assert quantized.stem.kernel.get_value() is model.stem.kernel.get_value()
    quantized.stem.kernel[...] = jnp.zeros((3, 3, 1, 4))
    np.testing.assert_array_equal(model(x), before)


def test_quantising_adds_no_variables():
    model = Net(nnx.Rngs(0))
    quantized = qj.quantize_model(model, "octav-w4a4")
    shapes = [jax.tree.map(jnp.shape, nnx.to_pure_dict(nnx.state(m))) for m in (model, quantized)]
    assert shapes[0] == shapes[1]


def test_rules_without_quantisers_keep_layers_in_float():
    policy = qj.Policy([qj.Rule("stem"), qj.Rule(".*", W4)])
    layers = qj.report(qj.quantize_model(Net(nnx.Rngs(0)), policy)).layers
    assert layers[0].weights is None
    assert all(layer.weights == W4 and layer.activations is None for layer in layers[1:])


def test_errors_come_before_anything_is_changed():
    model = Net(nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"'conv\.\*' matches no layer.*stem, blocks/0"):
        qj.quantize_model(model, qj.Policy([qj.Rule("conv.*", W4)]))
    once = qj.quantize_model(model, "octav-w4a4")
    with pytest.raises(ValueError, match="quantised already: stem, "):
        qj.quantize_model(once, "octav-w2a2")
    model.classifier.dot_general = functools.partial(jax.lax.dot_general)
    with pytest.raises(ValueError, match="classifier already has a dot_general"):
        qj.quantize_model(model, "octav-w4a4")
    assert qj.report(model).layers[0].weights is None


def test_shared_layers_are_quantised_once():
    class Tied(nnx.Module):
        def __init__(self, rngs):
            self.a = nnx.Linear(4, 4, rngs=rngs)
            self.b = self.a

        def __call__(self, x):
            return self.b(self.a(x))

    model = qj.quantize_model(Tied(nnx.Rngs(0)), EVERYWHERE)
    assert len(qj.report(model).layers) == 1
    forward = nnx.capture(model, qj.Diagnostic)
    found = qj.diagnostics_by_layer(forward(normal(2, 4))[1])
    assert sorted(found) == ["a/activations", "a/activations/1", "a/weights", "a/weights/1"]


def test_attributes_named_as_flax_names_operations():
    """They belong to the paths of layers and operands like any other."""

    class Block(nnx.Module):
        def __init__(self, rngs):
            self.attention_fn = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
            self.dot_general = nnx.Linear(8, 4, rngs=rngs)

        def __call__(self, x):
            return self.dot_general(self.attention_fn(x))

    model = qj.quantize_model(Block(nnx.Rngs(0)), "octav-w4a4")
    x = normal(2, 5, 8)
    expected = [
        *(f"attention_fn/{name}" for name in ("query", "key", "attention_weights", "value")),
        *(
            f"attention_fn/{layer}/{operand}"
            for layer in ("query", "key", "value", "out")
            for operand in ("activations", "weights")
        ),
        *(f"dot_general/{operand}" for operand in ("activations", "weights")),
    ]
    assert sorted(qj.operand_quantizers(model)) == sorted(expected)
    _, captured = nnx.jit(lambda model: nnx.capture(model, qj.Diagnostic)(x))(model)
    assert sorted(qj.diagnostics_by_layer(captured)) == sorted(expected)
    assert set(qj.calibrate(model, [x])) == set(expected)


def test_training_step_with_diagnostics_inside_jit_and_grad():
    model = qj.quantize_model(Net(nnx.Rngs(0)), "octav-w4a4")
    graphdef, params = nnx.split(model, nnx.Param)
    x = normal(4, 8, 8, 1)

    @jax.jit
    def step(params):
        def loss(params):
            y, captured = nnx.capture(nnx.merge(graphdef, params), qj.Diagnostic)(x)
            return jnp.sum(y**2), qj.diagnostics_by_layer(captured)

        return jax.value_and_grad(loss, has_aux=True)(params)

    (value, found), gradients = step(params)
    assert len(found) == 26
    stem = found["stem/weights"]
    kernel = model.stem.kernel[...]
    w8 = qj.report(model).layers[0].weights
    noise = kernel - qj.fake_quant(kernel, w8, channel_axis=-1)
    expected = 10 * np.log10(np.sum(np.square(kernel)) / np.sum(np.square(noise)))
    np.testing.assert_allclose(stem.sqnr_db, expected, rtol=1e-4)
    plain = jax.jit(lambda params: jnp.sum(nnx.merge(graphdef, params)(x) ** 2))(params)
    np.testing.assert_allclose(value, plain, rtol=1e-5)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))


def test_nobody_pays_for_diagnostics_that_nobody_collects():
    model = qj.quantize_model(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), EVERYWHERE)
    graphdef, state = nnx.split(model)
    program = jax.make_jaxpr(lambda state, x: nnx.merge(graphdef, state)(x))(state, normal(2, 4))
    assert "log" not in str(program)


def test_half_precision_model():
    model = nnx.Linear(8, 8, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    y = qj.quantize_model(model, EVERYWHERE)(normal(2, 8))
    assert y.dtype == jnp.bfloat16


def test_scanned_layers_with_remat():
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(key):
        return nnx.Linear(6, 6, rngs=nnx.Rngs(key))

    keys = jax.random.split(KEY, 3)
    stacked = qj.quantize_model(make(keys), EVERYWHERE)

    @nnx.remat
    def block(layer, x):
        return nnx.tanh(layer(x))

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def run(layer, x):
        return block(layer, x)

    expected = x = normal(2, 6)
    for key in keys:
        single = nnx.Linear(6, 6, rngs=nnx.Rngs(key))
        expected = nnx.tanh(with_weights(single, -1)(A4(expected)))
    np.testing.assert_allclose(run(stacked, x), expected, rtol=1e-4, atol=1e-5)
    gradient = nnx.grad(lambda layer: jnp.sum(run(layer, x)))(stacked)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))


def test_a_quantised_model_is_not_quantised_again():
    first = nnx.Sequential(*(nnx.Linear(4, 4, rngs=nnx.Rngs(seed)) for seed in range(5)))
    model = qj.quantize_model(first, "octav-w4a4")
    packed = pack_model(model, jnp.ones((1, 4)))
    for again in (model, packed, integer_model(packed)):
        with pytest.raises(
            ValueError,
            match=r"quantised already: layers/0, layers/1, layers/2 and 2 more; give the float "
            r"model, or .*Rule\('layers/0'\) in front",
        ):
            qj.quantize_model(again, "max-w8a8")
    attention = nnx.MultiHeadAttention(2, 4, decode=False, rngs=nnx.Rngs(0))
    both = qj.Policy([qj.Rule("", W4, W4), qj.Rule(".*")])
    with pytest.raises(ValueError, match="quantised already: the layer itself"):
        qj.quantize_model(qj.quantize_model(attention, both), both)


def test_what_a_policy_left_alone_another_one_may_quantise():
    first = nnx.Sequential(*(nnx.Linear(4, 4, rngs=nnx.Rngs(seed)) for seed in range(2)))
    model = qj.quantize_model(first, qj.Policy([qj.Rule("layers/0", W4)]))
    rest = qj.Policy([qj.Rule("layers/0"), qj.Rule(".*", W8)])
    layers = qj.report(qj.quantize_model(model, rest)).layers
    assert [layer.weights.format.bits for layer in layers] == [4, 8]
