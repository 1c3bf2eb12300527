import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qat_jax
from qat_jax import Int, Quantizer, fake_quant
from qat_jax.gradients import pwl

X = jnp.array([-8.0, -2.0, -0.7, -1e-30, 0.0, 0.3, 1.0, 1.0001, 5.0, 1e30])
S = 1.0
INT4 = Int(4)


def gradient(rule, format=INT4, x=X, s=S, g=None):
    g = jnp.ones_like(x) if g is None else g
    quantizer = Quantizer(format, gradient=rule)
    _, pullback = jax.vjp(lambda x: fake_quant(x, quantizer, threshold=s), x)
    return pullback(g)[0]


def test_ste_is_one_everywhere():
    np.testing.assert_array_equal(gradient("ste"), np.ones(len(X)))


def test_pwl_is_one_inside_and_zero_outside():
    np.testing.assert_array_equal(gradient("pwl"), np.abs(X) <= S)


def test_mad_is_the_threshold_over_the_magnitude_outside():
    a = np.abs(np.asarray(X))
    np.testing.assert_allclose(gradient("mad"), S / np.maximum(a, S), rtol=1e-6)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_mad_attenuates_by_the_threshold_not_by_the_step(bits):
    """At x = 2s the slope is 1/2 at every bit width; the step would make it 2**(1-B) / 2."""
    slope = gradient("mad", Int(bits), x=jnp.array([2 * S]))
    np.testing.assert_allclose(slope, [0.5], rtol=1e-6)


def test_mad_is_the_derivative_of_scaling_by_a_constant():
    """clip(x) = α x with α held constant, as the paper derives it, left to JAX to differentiate."""

    def scaled(x):
        return jax.lax.stop_gradient(jnp.clip(x, -S, S) / x) * x

    x = X[X != 0]
    np.testing.assert_allclose(gradient("mad", x=x), jax.grad(lambda x: scaled(x).sum())(x))


@pytest.mark.parametrize(
    ("rule", "expected"),
    [("ste", [1, 1, 1, 1]), ("pwl", [0, 1, 1, 0]), ("mad", [0, 1, 1, 0.5])],
)
def test_on_unsigned_grids_negative_numbers_are_clipped_to_zero(rule, expected):
    x = jnp.array([-3.0, 0.0, 0.4, 2.0])
    np.testing.assert_allclose(gradient(rule, Int(4, signed=False), x), expected)


@pytest.mark.parametrize("rule", ["ste", "pwl", "mad"])
def test_the_incoming_gradient_is_multiplied(rule):
    g = jnp.arange(len(X), dtype=jnp.float32) - 3
    np.testing.assert_allclose(gradient(rule, g=g), gradient(rule) * g, rtol=1e-6)


@pytest.mark.parametrize("rule", ["ste", "pwl", "mad"])
def test_groups_of_zeros_have_finite_gradients(rule):
    np.testing.assert_array_equal(gradient(rule, x=jnp.zeros(5), s=0.0), np.ones(5))
    found = jax.grad(lambda x: Quantizer(Int(4), gradient=rule)(x).sum())(jnp.zeros((3, 3)))
    assert np.isfinite(found).all()


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("rule", ["ste", "pwl", "mad"])
def test_dtypes_are_kept(dtype, rule):
    x = jnp.array([0.5, 3.0], dtype)
    found = jax.grad(lambda x: fake_quant(x, Quantizer(Int(4), gradient=rule), threshold=1.0).sum())
    assert found(x).dtype == dtype


@pytest.fixture(scope="module")
def documented_rule():
    """The rule of one's own in docs/mad.md."""
    text = (Path(__file__).parents[1] / "docs" / "mad.md").read_text()
    names = {"qj": qat_jax}
    exec(re.search(r"```python\n(import jax.*?)```", text, re.DOTALL)[1], names)
    return names["soft_clip"]


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_rules_of_ones_own_keep_dtypes(dtype, documented_rule):
    """Else no loop can carry x, and no sum of two gradients of it works."""
    x = jnp.array([0.5, 3.0], dtype)
    quantizer = Quantizer(Int(4), gradient=documented_rule)
    found = jax.grad(lambda x: fake_quant(x, quantizer, threshold=1.0).sum())(x)
    assert found.dtype == dtype
    np.testing.assert_allclose(found.astype(jnp.float32), [1, 0.5], rtol=1e-2)
    jax.grad(lambda x: (fake_quant(jnp.tanh(x), quantizer) + x).sum())(x)


def test_the_documented_rule_divides_no_zero_by_zero(documented_rule):
    quantizer = Quantizer(Int(4), gradient=documented_rule)
    found = jax.grad(lambda x: quantizer(x).sum())(jnp.zeros(3))
    np.testing.assert_array_equal(found, np.ones(3))


def test_residuals_are_the_array_and_its_threshold():
    """No mask is saved: only x and s, here of one element."""
    x = jnp.ones((64, 64))
    quantizer = Quantizer(Int(4), gradient="mad")
    _, pullback = jax.vjp(quantizer, x)
    sizes = sorted(leaf.size for leaf in jax.tree.leaves(pullback) if hasattr(leaf, "size"))
    assert sizes == [1, 64 * 64]


def test_pwl_keeps_one_bit_an_element():
    x = jnp.ones((4, 64, 64))
    _, pullback = jax.vjp(Quantizer(Int(4), gradient="pwl"), x)
    sizes = sorted(leaf.nbytes for leaf in jax.tree.leaves(pullback) if hasattr(leaf, "size"))
    assert sizes == [4, x.size // 8]


@pytest.mark.parametrize(
    "shape", [(), (0,), (1,), (9,), (3, 5), (2, 16), (2, 0, 3), (3, 13, 2), (2, 5, 11, 3, 4)]
)
@pytest.mark.parametrize("signed", [True, False, None])
def test_the_bits_of_pwl_are_those_of_its_rule(shape, signed):
    """Whatever the shape, and with a threshold for each channel: `pwl` itself, by way of a rule."""
    rng = np.random.default_rng(1)
    x, g = rng.standard_normal((2, *shape), np.float32)
    channels = shape[-1:] if len(shape) > 1 else ()
    each = (*[1] * (len(shape) - len(channels)), *channels)
    s = rng.uniform(0.5, 1.5, each).astype(np.float32)

    def mask_anew(x, lower, upper, g):
        return pwl(x, lower, upper, g)

    format = Int(4, signed=signed)
    found, expected = jax.jit(
        lambda *arrays: [gradient(rule, format, *arrays) for rule in ("pwl", mask_anew)]
    )(x, s, g)
    np.testing.assert_array_equal(found, expected)
    if x.size > 8:
        assert 0 < (found == 0).sum() < x.size


def test_no_gradient_reaches_the_threshold():
    quantizer = Quantizer(Int(4), gradient="mad")
    found = jax.grad(lambda s: fake_quant(X, quantizer, threshold=s).sum())(jnp.float32(S))
    assert found == 0


def test_rules_of_ones_own():
    def half(x, lower, upper, g):
        return g * 0.5

    np.testing.assert_array_equal(gradient(half), np.full(len(X), 0.5))
    with pytest.raises(ValueError, match="there are ste, pwl, mad"):
        Quantizer(Int(4), gradient="pvl")


@pytest.mark.parametrize(
    ("rule", "expected"), [("ste", [2, 2, 2]), ("pwl", [2, 2, 0]), ("mad", [2, 2, 2 * 0.25])]
)
def test_second_derivatives_are_those_of_the_estimator(rule, expected):
    """Of q(x)², whose gradient is 2 q(x) q'(x): with q' held constant it is 2 q'(x)²."""
    quantizer = Quantizer(Int(4, narrow=True), gradient=rule)
    x = jnp.array([0.1, 0.2, 2.0])

    def loss(x):
        return (fake_quant(x, quantizer, threshold=1.0) ** 2).sum()

    found = jax.grad(lambda x: jax.grad(loss)(x).sum())(x)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    with pytest.raises(TypeError, match="forward-mode"):  # and no zeros
        jax.jvp(jax.grad(loss), (x,), (jnp.ones(3),))
