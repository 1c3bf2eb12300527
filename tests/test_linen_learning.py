"""Thresholds of Linen models that training learns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util

import qat_jax as qj
from qat_jax import linen as qlinen
from tests.test_linen import EVERYWHERE, LinenNet, NnxNet

X = jax.random.normal(jax.random.key(2), (3, 6, 6, 1))


@pytest.fixture(scope="module")
def calibrated():
    """A Linen model under a policy, its variables with thresholds, and the same in NNX."""
    variables = LinenNet().init(jax.random.key(1), X)
    model = NnxNet(nnx.Rngs(0))
    nnx.update(model, nnx.State(variables["params"]))
    model = qj.quantize_model(model, EVERYWHERE)
    qj.calibrate(model, [X])
    quantized = qlinen.quantize_model(LinenNet(), EVERYWHERE, X)
    return quantized, qlinen.calibrate(quantized, variables, [X]), model


def gradients(model, variables):
    found = jax.jit(jax.grad(lambda v: jnp.sum(model.apply(v, X) ** 2)))(variables)
    return traverse_util.flatten_dict(found["thresholds"], sep="/")


def test_gradients_are_those_of_nnx(calibrated):
    quantized, variables, model = calibrated
    ours = gradients(qlinen.learn_thresholds(quantized, variables), variables)
    qj.learn_thresholds(model)
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    theirs = jax.jit(jax.grad(lambda p: jnp.sum(nnx.merge(graphdef, p, rest)(X) ** 2)))(params)
    nnx.update(model, theirs)  # gradients where thresholds were, to find them by path
    for path, quantizer in qj.operand_quantizers(model).items():
        # Linen divides queries by √depth before they are quantised, NNX after.
        factor = 4**0.5 if path == "attention/query" else 1
        name = path + "_operand" * (path.rpartition("/")[0] == "attention")
        expected = factor * quantizer.threshold[...]
        np.testing.assert_allclose(ours[name], expected, rtol=2e-3, atol=2e-3, err_msg=path)
    assert all((gradient != 0).any() for gradient in ours.values())


def test_thresholds_that_are_not_named_are_constants(calibrated):
    quantized, variables, _ = calibrated
    some = qlinen.learn_thresholds(quantized, variables, operands="stem/.*|.*/key_operand")
    learned = {path for path, g in gradients(some, variables).items() if (g != 0).any()}
    assert learned == {"stem/weights", "stem/activations", "attention/key_operand"}
    np.testing.assert_array_equal(some.apply(variables, X), quantized.apply(variables, X))


def test_beyond_0_magnitudes_count(calibrated):
    quantized, variables, _ = calibrated
    negative = variables | {"thresholds": jax.tree.map(jnp.negative, variables["thresholds"])}
    learning = qlinen.learn_thresholds(quantized, variables)
    np.testing.assert_array_equal(learning.apply(negative, X), quantized.apply(variables, X))
    opposite = gradients(learning, negative)
    for path, gradient in gradients(learning, variables).items():
        np.testing.assert_allclose(opposite[path], -gradient, rtol=1e-5)


def test_there_must_be_such_thresholds(calibrated):
    quantized, variables, _ = calibrated
    with pytest.raises(ValueError, match="matches 'two': there are attention/"):
        qlinen.learn_thresholds(quantized, variables, operands="two")
    with pytest.raises(ValueError, match="none, freeze some with calibrate first"):
        qlinen.learn_thresholds(quantized, {"params": variables["params"]})
