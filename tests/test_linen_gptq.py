"""Kernels of Linen models rounded by sample batches."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util

import qat_jax as qj
from qat_jax import linen as qlinen
from tests.test_linen import EVERYWHERE, KEY, W4, LinenNet, NnxNet
from tests.test_linen_calibration import Dense

ROUNDED = ("stem", "depthwise", "attention/query", "attention/out", "split", "head")


def images(seed, count=40):
    return jax.random.normal(jax.random.key(seed), (count, 6, 6, 1))


@pytest.fixture(scope="module")
def pair():
    """A Linen model under a policy with its variables, and the same in NNX."""
    x = images(0, 3)
    variables = LinenNet().init(jax.random.key(1), x)
    model = NnxNet(nnx.Rngs(0))
    nnx.update(model, nnx.State(variables["params"]))
    return qlinen.quantize_model(LinenNet(), EVERYWHERE, x), variables, model


def flat(tree):
    return traverse_util.flatten_dict(tree, sep="/")


def test_linen_and_nnx_round_the_same(pair):
    quantized, variables, model = pair
    batches = [images(2), images(3)]
    ours = qlinen.gptq(quantized, variables, batches)
    theirs = qj.quantize_model(model, EVERYWHERE)
    paths = qj.gptq(theirs, batches)
    assert flat(ours["thresholds"]).keys() == set(paths)
    x = images(4)
    for path, quantizer in qj.operand_quantizers(theirs).items():
        if path in paths:
            found = flat(ours["thresholds"])[path]
            np.testing.assert_allclose(found, quantizer.threshold[...], rtol=1e-6)
    kernels = flat(nnx.to_pure_dict(nnx.state(theirs, nnx.Param)))
    for layer in ROUNDED:
        kernel = flat(ours["params"])[f"{layer}/kernel"]
        # Now and then a value between two numbers of the grid falls to the other side.
        close = np.isclose(kernel, kernels[f"{layer}/kernel"], rtol=1e-4, atol=1e-6)
        assert close.mean() > 0.97, layer
    np.testing.assert_allclose(quantized.apply(ours, x), theirs(x), rtol=0.2, atol=0.05)


def test_rounded_kernels_are_of_their_grid_and_answer_better(pair):
    quantized, variables, _ = pair
    rounded = qlinen.gptq(quantized, variables, [images(2, 200)])
    kernel = rounded["params"]["stem"]["kernel"]
    threshold = rounded["thresholds"]["stem"]["weights"]
    again = qj.fake_quant(kernel, W4, channel_axis=3, threshold=threshold)
    np.testing.assert_allclose(kernel, again, rtol=1e-6, atol=1e-7)

    x = images(9, 200)
    in_float = LinenNet().apply(variables, x)
    weights_alone = qlinen.quantize_model(LinenNet(), qj.Policy([qj.Rule(".*", W4)]), x[:1])
    nearest = jnp.mean((weights_alone.apply(variables, x) - in_float) ** 2)
    rounded = qlinen.gptq(weights_alone, variables, [images(2, 200)])
    assert jnp.mean((weights_alone.apply(rounded, x) - in_float) ** 2) < 0.8 * nearest


def test_some_kernels_are_rounded_with_the_thresholds_that_they_have():
    x = jax.random.normal(KEY, (40, 5))
    model = qlinen.quantize_model(Dense(), EVERYWHERE, x)
    variables = Dense().init(KEY, x)
    frozen = qlinen.calibrate(model, variables, [x], train=False)
    thresholds = frozen["thresholds"]
    thresholds["two"]["weights"] = 0.7 * thresholds["two"]["weights"]
    before = jax.tree.map(np.asarray, frozen)
    rounded = qlinen.gptq(model, frozen, [x], operands="two/weights", train=False)
    jax.tree.map(np.testing.assert_array_equal, frozen, before)
    jax.tree.map(np.testing.assert_array_equal, rounded["thresholds"], before["thresholds"])
    one, two = rounded["params"]["one"]["kernel"], rounded["params"]["two"]["kernel"]
    np.testing.assert_array_equal(one, before["params"]["one"]["kernel"])
    assert not np.array_equal(two, before["params"]["two"]["kernel"])
    largest = jnp.max(jnp.abs(two), 0) / thresholds["two"]["weights"][0]
    np.testing.assert_array_less(largest, 1 + 1e-5)


def test_a_kernel_keeps_its_dtype_and_its_metadata():
    init = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
    net = nn.Dense(3, kernel_init=init, param_dtype=jnp.bfloat16)
    x = jax.random.normal(KEY, (40, 5), jnp.bfloat16)
    model = qlinen.quantize_model(net, EVERYWHERE, x)
    variables = net.init(KEY, x)
    kernel = qlinen.gptq(model, variables, [x])["params"]["kernel"]
    assert isinstance(kernel, nn.Partitioned)
    assert kernel.names == ("in", "out")
    assert kernel.value.dtype == jnp.bfloat16
    assert not np.array_equal(kernel.value, variables["params"]["kernel"].value)


def test_wrong_calls_are_refused():
    x = jax.random.normal(KEY, (40, 5))
    model, variables = qlinen.quantize_model(Dense(), EVERYWHERE, x), Dense().init(KEY, x)
    with pytest.raises(ValueError, match="no batch to round kernels by"):
        qlinen.gptq(model, variables, [])
    with pytest.raises(ValueError, match=r"matches 'three': there are one/weights, two/weights$"):
        qlinen.gptq(model, variables, [x], operands="three")
    with pytest.raises(ValueError, match=r"^one sees something that is not finite"):
        qlinen.gptq(model, variables, [x.at[0].set(jnp.inf)])
    remat = qlinen.quantize_model(nn.remat(Dense)(), EVERYWHERE, x)
    with pytest.raises(ValueError, match=r"^one runs under jax\.jit, scan, remat or the like"):
        qlinen.gptq(remat, nn.remat(Dense)().init(KEY, x), [x])
