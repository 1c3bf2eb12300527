"""Frozen thresholds of Linen models: static scaling."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util

import qat_jax as qj
from qat_jax import linen as qlinen
from tests.test_linen import A4, EVERYWHERE, KEY, W4, LinenNet, NnxNet

BATCHES = [
    scale * jax.random.normal(jax.random.key(seed), (3, 6, 6, 1))
    for seed, scale in ((2, 1), (3, 2))
]


class Dense(nn.Module):
    """Two layers, the second of which is run twice."""

    @nn.compact
    def __call__(self, x, train=True):
        if train:
            x = 10 * x
        x = nn.Dense(6, name="one")(x)
        again = nn.Dense(6, name="two")
        return again(nn.tanh(again(x)))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.tanh(nn.Dense(6, name="dense")(x)), None


class Stack(nn.Module):
    """Three blocks of one definition."""

    collections: tuple[str, ...]

    @nn.compact
    def __call__(self, x):
        blocks = nn.scan(
            nn.remat(Block),
            variable_axes=dict.fromkeys(self.collections, 0),
            split_rngs={"params": True},
            length=3,
        )
        return blocks(name="blocks")(x, None)[0]


@pytest.fixture(scope="module")
def pair():
    """A Linen model under a policy with its variables, and the same in NNX."""
    variables = LinenNet().init(jax.random.key(1), BATCHES[0])
    model = NnxNet(nnx.Rngs(0))
    nnx.update(model, nnx.State(variables["params"]))
    return qlinen.quantize_model(LinenNet(), EVERYWHERE, BATCHES[0]), variables, model


@pytest.fixture
def dense():
    """Two dense layers under a policy, their variables and two batches."""
    x, other = jax.random.normal(KEY, (4, 5)), 3 * jax.random.normal(jax.random.key(1), (4, 5))
    return qlinen.quantize_model(Dense(), EVERYWHERE, x), Dense().init(KEY, x), [x, other]


def flat(thresholds):
    return traverse_util.flatten_dict(thresholds, sep="/")


@pytest.mark.parametrize("pool", [False, True])
def test_linen_and_nnx_freeze_the_same(pair, pool):
    quantized, variables, model = pair
    frozen = qlinen.calibrate(quantized, variables, BATCHES, pool=pool)
    theirs = qj.quantize_model(model, EVERYWHERE)
    paths = qj.calibrate(theirs, BATCHES, pool=pool)
    thresholds = {
        path.removesuffix("_operand"): found for path, found in flat(frozen["thresholds"]).items()
    }
    assert thresholds.keys() == set(paths)
    thresholds["attention/query"] *= 4**0.5  # Linen divides queries by √depth before, NNX after
    for path, quantizer in qj.operand_quantizers(theirs).items():
        np.testing.assert_allclose(thresholds[path], quantizer.threshold[...], rtol=1e-5)

    x = 5 * BATCHES[0]
    expected = theirs(x)
    np.testing.assert_allclose(quantized.apply(frozen, x), expected, rtol=1e-4, atol=1e-5)
    assert not np.allclose(quantized.apply(variables, x), expected, atol=1e-2)


def test_gradients_of_static_scaling_agree_and_thresholds_have_none(pair):
    quantized, variables, model = pair
    frozen, x = qlinen.calibrate(quantized, variables, BATCHES), BATCHES[1]
    ours = jax.jit(jax.grad(lambda v: jnp.sum(quantized.apply(v, x) ** 2)))(frozen)
    theirs = qj.quantize_model(model, EVERYWHERE)
    qj.calibrate(theirs, BATCHES)
    graphdef, params, rest = nnx.split(theirs, nnx.Param, ...)
    expected = jax.jit(jax.grad(lambda p: jnp.sum(nnx.merge(graphdef, p, rest)(x) ** 2)))(params)
    for name in ("stem", "depthwise", "up", "split", "head"):
        np.testing.assert_allclose(
            ours["params"][name]["kernel"],
            nnx.to_pure_dict(expected)[name]["kernel"],
            rtol=1e-3,
            atol=1e-4,
        )
    assert all((gradient == 0).all() for gradient in flat(ours["thresholds"]).values())


def test_thresholds_are_means_of_batches_and_of_a_layers_runs(dense):
    model, variables, batches = dense
    frozen = flat(qlinen.calibrate(model, variables, batches, train=False)["thresholds"])
    kernels = {name: layer["kernel"] for name, layer in variables["params"].items()}

    def inputs(x):
        x = x @ kernels["one"] + variables["params"]["one"]["bias"]
        return x, nn.tanh(x @ kernels["two"] + variables["params"]["two"]["bias"])

    expected = {
        "one/weights": W4.threshold(kernels["one"], 1),
        "two/weights": W4.threshold(kernels["two"], 1),
        "one/activations": np.mean([A4.threshold(x) for x in batches], 0),
        "two/activations": np.mean([A4.threshold(run) for x in batches for run in inputs(x)], 0),
    }
    assert frozen.keys() == expected.keys()
    for path, threshold in expected.items():
        np.testing.assert_allclose(frozen[path], threshold, rtol=1e-5)


def test_keyword_arguments_are_those_of_every_call(dense):
    model, variables, batches = dense
    evaluated = qlinen.calibrate(model, variables, batches, train=False)["thresholds"]
    trained = qlinen.calibrate(model, variables, batches, train=True)["thresholds"]
    ratio = trained["one"]["activations"] / evaluated["one"]["activations"]
    np.testing.assert_allclose(ratio, 10, rtol=1e-4)


def test_some_operands_are_frozen_again_and_the_others_stay(dense):
    model, variables, batches = dense
    some = qlinen.calibrate(model, variables, batches, operands="one/.*")
    assert flat(some["thresholds"]).keys() == {"one/weights", "one/activations"}
    more = qlinen.calibrate(model, some, [7 * batches[0]], operands=".*/activations")
    before, after = flat(some["thresholds"]), flat(more["thresholds"])
    assert after.keys() == before.keys() | {"two/activations"}
    np.testing.assert_array_equal(after["one/weights"], before["one/weights"])
    assert after["one/activations"] > 2 * before["one/activations"]
    assert "thresholds" not in variables
    assert flat(some["thresholds"]).keys() == {"one/weights", "one/activations"}


@pytest.mark.parametrize("granularity", [qj.PerChannel(), qj.PerVector(2)])
def test_activations_with_scales_of_their_own_stay_dynamic(granularity):
    x = jax.random.normal(KEY, (4, 6))
    activations = qj.Quantizer(qj.Int(4), granularity, qj.AbsMax())
    policy = qj.Policy([qj.Rule(".*", W4, activations)])
    model = qlinen.quantize_model(nn.Dense(3), policy, x)
    frozen = qlinen.calibrate(model, model.init(KEY, x), [x])
    assert frozen["thresholds"].keys() == {"weights"}
    kernel = qj.fake_quant(frozen["params"]["kernel"], W4, channel_axis=1)
    expected = qj.fake_quant(x, activations, channel_axis=0, vector_axis=1) @ kernel
    np.testing.assert_allclose(model.apply(frozen, x), expected, rtol=1e-5, atol=1e-5)


def test_a_stack_of_layers_has_a_threshold_for_each():
    x = jax.random.normal(KEY, (4, 6))
    net = Stack(("params", "thresholds"))
    model = qlinen.quantize_model(net, EVERYWHERE, x)
    frozen = qlinen.calibrate(model, net.init(KEY, x), [x])
    found = frozen["thresholds"]["blocks"]["dense"]
    assert {name: s.shape for name, s in found.items()} == {
        "weights": (3, 1, 6),
        "activations": (3, 1, 1),
    }
    dense = frozen["params"]["blocks"]["dense"]
    expected, static = x, 2 * x
    for layer in range(3):
        kernel, bias = dense["kernel"][layer], dense["bias"][layer]
        threshold = A4.threshold(expected)
        np.testing.assert_allclose(found["activations"][layer], threshold, rtol=1e-5)
        expected = nn.tanh(expected @ kernel + bias)
        static = qj.fake_quant(static, A4, threshold=threshold)
        static = nn.tanh(static @ qj.fake_quant(kernel, W4, channel_axis=1) + bias)
    np.testing.assert_allclose(model.apply(frozen, 2 * x), static, rtol=1e-4, atol=1e-5)


def test_a_stack_that_leaves_the_collection_out_is_refused():
    x = jax.random.normal(KEY, (4, 6))
    net = Stack(("params",))
    model = qlinen.quantize_model(net, EVERYWHERE, x)
    with pytest.raises(ValueError, match=r"^blocks/dense runs inside .*'thresholds': 0"):
        qlinen.calibrate(model, net.init(KEY, x), [x])


def test_wrong_batches_are_refused(dense):
    model, variables, (x, _) = dense
    with pytest.raises(ValueError, match="batches is one array: give a list"):
        qlinen.calibrate(model, variables, x)
    with pytest.raises(ValueError, match="no batch to calibrate with"):
        qlinen.calibrate(model, variables, [])
    with pytest.raises(ValueError, match="one/activations is not finite in batch 2"):
        qlinen.calibrate(model, variables, [x, x.at[0, 0].set(jnp.nan)])
    with pytest.raises(ValueError, match=r"'three/.\*': there are one/activations, one/weights"):
        qlinen.calibrate(model, variables, [x], operands="three/.*")


def test_thresholds_of_another_model_are_refused(dense):
    model, variables, (x, _) = dense
    foreign = variables | {"thresholds": {"three": {"weights": jnp.ones((1, 6))}}}
    with pytest.raises(ValueError, match="thresholds for 'three/weights', which the model"):
        model.apply(foreign, x)
    misshapen = variables | {"thresholds": {"one": {"weights": jnp.ones((1, 4))}}}
    with pytest.raises(ValueError, match="threshold"):
        model.apply(misshapen, x)


def test_frozen_thresholds_have_diagnostics(dense):
    model, variables, (x, _) = dense
    frozen = qlinen.calibrate(model, variables, [x], train=False)
    _, sown = model.apply(frozen, 100 * x, train=False, mutable=["diagnostics"])
    (found,) = sown["diagnostics"]["one"]["activations"]
    assert found.clipped_fraction > 0.9
