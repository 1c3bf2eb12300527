"""Thresholds that training carries from step to step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qat_jax as qj
from qat_jax.nnx import operand_quantizers

BITS = (2, 4, 8)


def data(kind: str) -> jax.Array:
    rng = np.random.default_rng(0)
    x = rng.standard_t(3, (64, 500)) if kind == "heavy" else rng.standard_normal((64, 500))
    return jnp.asarray(np.maximum(x, 0) if kind == "relu" else x, jnp.float32)


def modelled_error(x: jax.Array, s: jax.Array, bits: int) -> float:
    """J(s) of arXiv:2206.06501, section 3, for narrow signed grids, in float64."""
    a = np.abs(np.asarray(x, np.float64))
    s = float(np.squeeze(s))
    c = 1 / (12 * (2 ** (bits - 1) - 1) ** 2)
    return c * s**2 * np.sum((a > 0) & (a <= s)) + np.sum((a[a > s] - s) ** 2)


@pytest.mark.parametrize("start", [0.0, 0.7, 0.98, 1.02, 1.5, 1e6, np.nan, np.inf])
@pytest.mark.parametrize("kind", ["gaussian", "heavy", "relu"])
@pytest.mark.parametrize("bits", BITS)
def test_refined_thresholds_are_as_good_as_converged_ones(bits, kind, start):
    x, format = data(kind), qj.Int(bits, signed=True, narrow=True)
    best = qj.Octav(60).threshold(x, format, (0, 1))
    found = qj.Octav().refined(x, format, (0, 1), best * start)
    assert modelled_error(x, found, bits) <= 1.001 * modelled_error(x, best, bits)


@pytest.mark.parametrize("share", [0.99, 1.0, 1.01])
def test_a_good_start_takes_one_iteration(share):
    x, format = data("relu"), qj.Int(4, signed=True, narrow=True)
    start = share * qj.Octav(60).threshold(x, format, (0, 1))
    a = np.asarray(x, np.float64)
    above, inside = a > float(start[0, 0]), (a > 0) & (a <= float(start[0, 0]))
    once = a[above].sum() / (inside.sum() / (12 * 7**2) + above.sum())
    np.testing.assert_allclose(qj.Octav().refined(x, format, (0, 1), start), [[once]], rtol=1e-6)


def test_each_channel_is_refined():
    x = data("gaussian") * jnp.geomspace(1e-3, 1e3, 500)
    format = qj.Int(4, narrow=True)
    best = qj.Octav(60).threshold(x, format, (0,))
    found = qj.Octav().refined(x, format, (0,), best * jnp.linspace(0.1, 3, 500))
    np.testing.assert_allclose(found, best, rtol=0.03)


def test_zeros_and_what_is_not_finite():
    x, format = (
        data("gaussian").at[0, 0].set(jnp.nan).at[:, 1].set(0).at[1, 2].set(jnp.inf),
        qj.Int(4),
    )
    found = qj.Octav().refined(x, format, (0,), jnp.ones((1, 500)))
    cold = qj.Octav().threshold(x, format, (0,))
    np.testing.assert_array_equal(found[0, :3], cold[0, :3])
    assert np.isnan(found[0, 0])
    assert found[0, 1] == 0
    assert found[0, 2] == np.inf


def carrying_model() -> nnx.Module:
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(
        nnx.Linear(8, 16, rngs=rngs),
        nnx.relu,
        nnx.Linear(16, 16, rngs=rngs),
        nnx.relu,
        nnx.Linear(16, 4, rngs=rngs),
    )
    model = qj.quantize_model(model, qj.uniform_policy(4, 4))
    qj.carry_thresholds(model, batch(0))
    return model


def batch(seed: int, scale: float = 1.0) -> jax.Array:
    return scale * jax.random.normal(jax.random.key(seed), (256, 8))


def carried(model: nnx.Module) -> dict[str, np.ndarray]:
    return {
        path: np.asarray(quantizer.carried.get_value())
        for path, quantizer in operand_quantizers(model).items()
    }


def test_training_follows_its_operands_and_evaluation_forgets():
    model = carrying_model()
    before = carried(model)
    assert before["layers/0/activations"].shape == (1, 1)
    assert before["layers/0/weights"].shape == (1, 16)

    model.eval()
    answer = model(batch(1, scale=5.0))
    for path, threshold in carried(model).items():
        np.testing.assert_array_equal(threshold, before[path])

    model.train()
    model(batch(1, scale=5.0))
    after = carried(model)["layers/0/activations"]
    assert 4.5 < float(np.squeeze(after / before["layers/0/activations"])) < 5.5

    model.eval()
    np.testing.assert_array_equal(model(batch(1, scale=5.0)), answer)


def test_evaluation_is_that_of_a_model_that_carries_nothing():
    model, plain = carrying_model(), carrying_model()
    for quantizer in operand_quantizers(plain).values():
        quantizer.carried = None
    for each in (model, plain):
        each.eval()
    np.testing.assert_array_equal(model(batch(3)), plain(batch(3)))


def test_a_batch_that_is_not_finite_is_forgotten():
    model = carrying_model()
    before = carried(model)
    assert not np.isfinite(model(batch(0).at[0, 0].set(jnp.nan))).any()
    after = carried(model)
    for path in before:
        assert np.isfinite(after[path]).all()
    assert np.isfinite(model(batch(0))).all()


def test_gradients_do_not_know_of_the_start():
    model = carrying_model()
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def gradients(params, rest):
        def loss(params, rest):
            model = nnx.merge(graphdef, params, rest)
            loss = jnp.mean(model(batch(0)) ** 2)
            return loss, nnx.state(model, nnx.Not(nnx.Param))

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(params, rest)

    (of_params, of_rest), new = gradients(params, rest)
    assert any(np.any(leaf != 0) for leaf in jax.tree.leaves(of_params))
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(of_rest))
    assert jax.tree.structure(new) == jax.tree.structure(rest)


def test_what_cannot_carry():
    linear = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="clipping Octav"):
        qj.carry_thresholds(qj.quantize_model(linear, "max-w4a4"), batch(0))
    frozen = qj.quantize_model(linear, qj.uniform_policy(4, 4))
    qj.calibrate(frozen, [batch(0)])
    with pytest.raises(ValueError, match="do not freeze"):
        qj.carry_thresholds(frozen, batch(0))


def test_an_evaluating_model_quantises_in_evaluation():
    """Else an answer would depend on the one before, and nothing could be traced."""
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.Linear(8, 8, rngs=rngs), nnx.Dropout(0.5, rngs=rngs))
    model.eval()
    model = qj.quantize_model(model, "octav-w4a4")
    x = jax.random.normal(jax.random.key(0), (16, 8))
    carrying = qj.carry_thresholds(model, x)
    carried = [operand_quantizers(model)[path].carried[...] for path in carrying]
    first = jax.jit(lambda x: model(x))(x)
    model(50 * x)
    np.testing.assert_array_equal(jax.jit(lambda x: model(x))(x), first)
    for path, before in zip(carrying, carried, strict=True):
        np.testing.assert_array_equal(operand_quantizers(model)[path].carried[...], before)
    model.train()
    assert not any(quantizer.deterministic for quantizer in operand_quantizers(model).values())


@pytest.mark.parametrize("modes", [(), (False,), (True, False)])
def test_other_models_quantise_in_training(modes):
    rngs = nnx.Rngs(0)
    dropouts = [nnx.Dropout(0.5, deterministic=mode, rngs=rngs) for mode in modes]
    model = nnx.Sequential(nnx.Linear(8, 8, rngs=rngs), *dropouts)
    quantizers = operand_quantizers(qj.quantize_model(model, "octav-w4a4"))
    assert not any(quantizer.deterministic for quantizer in quantizers.values())
