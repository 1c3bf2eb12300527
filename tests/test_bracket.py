"""OCTAV's fixed points found between many candidates at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qat_jax as qj
from qat_jax.clipping import bracket
from qat_jax.clipping.octav import _LARGE
from tests import octav_reference

bracketed = jax.jit(bracket.bracketed, static_argnums=1)

RNG = np.random.default_rng(0)
GROUP = 1500
ROWS = {
    "normal": RNG.normal(size=GROUP),
    "laplace": RNG.laplace(size=GROUP),
    "uniform": RNG.uniform(size=GROUP),
    "heavy-tailed": RNG.standard_t(3, GROUP),
    "half zeros": np.maximum(RNG.normal(size=GROUP), 0),
    "one outlier": np.where(np.arange(GROUP) == 7, 1e3, RNG.normal(size=GROUP)),
    "one number": np.where(np.arange(GROUP) == 7, 3.0, 0),
    "all the same": np.full(GROUP, 2.0),
    "two sizes": np.where(np.arange(GROUP) % 2, 1.0, 1e-3) * RNG.normal(size=GROUP),
}
CONSTANTS = {bits: 1 / (12 * (2 ** (bits - 1) - 1) ** 2) for bits in (2, 3, 4, 6, 8)}


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("bits", CONSTANTS)
def test_fixed_point(kind, bits):
    """Of one group, against the recursion carried on for long in float64."""
    x, c = np.abs(ROWS[kind]), CONSTANTS[bits]
    s = float(bracketed(jnp.asarray(x, jnp.float32), (0,), jnp.float32(c))[0])
    wanted = octav_reference.newton(x, c, iterations=500)
    np.testing.assert_allclose(s, wanted, rtol=0.005)
    error = octav_reference.modelled_error
    assert error(x, s, c) <= 1.001 * error(x, wanted, c) + 1e-9


MANY = 60_000
SPARSE = {
    "15 of a normal": np.where(np.arange(MANY) % 4000 == 0, np.abs(RNG.normal(size=MANY)), 0),
    "9 beside small ones": np.r_[np.geomspace(50, 1e3, 9), 1e-4 * RNG.uniform(size=MANY)],
}


@pytest.mark.parametrize("kind", SPARSE)
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_fixed_points_of_thousands_of_means(kind, bits):
    """Of all elements, or even of those that are not zero."""
    x, c = SPARSE[kind], CONSTANTS[bits]
    s = bracketed(jnp.asarray(x, jnp.float32), (0,), jnp.float32(c))[0]
    np.testing.assert_allclose(s, octav_reference.newton(x, c, iterations=500), rtol=0.005)


@pytest.mark.parametrize("axes", [(0,), (1,), (0, 2), (1, 2), (0, 1, 2)])
def test_groups(axes):
    """Each is found as if alone, whichever axes it lies along."""
    x = RNG.laplace(size=(40, 30, 20)) * np.geomspace(1e-3, 1e3, 30)[:, None]
    c = CONSTANTS[4]
    found = bracketed(jnp.abs(jnp.asarray(x, jnp.float32)), axes, jnp.float32(c))
    wanted = octav_reference.per_group(x, axes, c, iterations=500)
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, rtol=0.005)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_shows(value):
    x = jnp.ones((100, 3)).at[5, 1].set(value)
    found = bracketed(x, (0,), jnp.float32(CONSTANTS[4]))[0]
    np.testing.assert_array_equal(np.isfinite(found), [True, False, True])


def test_zeros():
    x = jnp.zeros((100, 2)).at[3, 1].set(2)
    np.testing.assert_allclose(bracketed(x, (0,), jnp.float32(CONSTANTS[4])), [[0, 2]], rtol=1e-6)


@settings(max_examples=30)
@given(
    length=st.integers(1, 300),
    exponent=st.integers(-30, 30),
    bits=st.sampled_from(sorted(CONSTANTS)),
    seed=st.integers(0, 99),
)
def test_any_length_and_size(length, exponent, bits, seed):
    """A threshold lies within the data, and powers of two pass through."""
    x = jnp.asarray(np.abs(np.random.default_rng(seed).standard_t(3, length)), jnp.float32)
    c = jnp.float32(CONSTANTS[bits])
    s = bracketed(x, (0,), c)
    assert 0 < s[0] <= jnp.max(x) * (1 + 1e-6)
    np.testing.assert_allclose(bracketed(x * 2.0**exponent, (0,), c), s * 2.0**exponent, 1e-6)


@settings(max_examples=8)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=0, max_size=2),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16, jnp.float16]),
)
def test_large_groups_of_any_shape(lengths, dtype):
    """A search in a sample ends where one on CPUs does."""
    shape = (*lengths, -(-_LARGE // int(np.prod(lengths, dtype=int))))
    x = jnp.asarray(np.random.default_rng(0).standard_t(3, shape), dtype)
    axes = tuple(range(x.ndim))
    s = jax.jit(lambda x: qj.Octav().at_once(x, qj.Int(4), axes))(x)
    assert (s.shape, s.dtype) == ((1,) * x.ndim, jnp.float32)
    np.testing.assert_allclose(s, qj.octav(x, qj.Int(4)), rtol=5e-3)


@pytest.mark.usefixtures("searches_of_accelerators")
def test_accelerators_search_channels_so():
    """They find what its iterations lead to; of fewer than 64 elements, by those."""
    x = jnp.asarray(RNG.laplace(size=(3, 3, 64, 16)), jnp.float32)
    axes = (0, 1, 2)
    found = qj.octav(x, qj.Int(4, narrow=True), axes)
    wanted = qj.octav(x, qj.Int(4, narrow=True), axes, iterations=40)
    np.testing.assert_allclose(found, wanted, rtol=2e-3)
    unsigned = qj.octav(x, qj.Int(4, signed=False), axes)
    wanted = qj.octav(x, qj.Int(4, signed=False), axes, iterations=40)
    np.testing.assert_allclose(unsigned, wanted, rtol=5e-3)
    few = x.reshape(-1, 16)
    np.testing.assert_array_equal(
        qj.octav(few, qj.Int(4), 1), qj.octav(few, qj.Int(4), 1, iterations=10)
    )
    start = jnp.full((1, 1, 1, 16), 3.0)
    np.testing.assert_allclose(
        qj.Octav().refined(x, qj.Int(4, narrow=True), axes, start), found, rtol=2e-3
    )
    text = str(jax.make_jaxpr(lambda x: qj.octav(x, qj.Int(4), axes))(x))
    assert "while" not in text  # a decision in a loop makes an accelerator wait for its host
