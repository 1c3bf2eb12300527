"""OCTAV's thresholds of large groups, which are searched in a sample first."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qat_jax as qj
from qat_jax.clipping.octav import _LARGE
from tests import octav_reference

BITS = (2, 4, 8)


@pytest.fixture(params=["cpu", "accelerator"])
def platform(request):
    """What holds for the search that accelerators run, too."""
    if request.param == "accelerator":
        request.getfixturevalue("searches_of_accelerators")


def heavy(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_t(3, shape).astype(np.float32)


def spread(x: np.ndarray, axis: int) -> np.ndarray:
    """Numbers that grow along an axis from 1e-2 to 1e2 times theirs."""
    return x * np.geomspace(1e-2, 1e2, x.shape[axis]).reshape(
        [-1 if index == axis else 1 for index in range(x.ndim)]
    ).astype(np.float32)


ARRAYS = {
    "heavy-tailed": heavy(16, 256, 384),
    "half zeros": np.maximum(heavy(64, 32, 32, 16), 0),
    "matrix": heavy(1024, 1000),
    "long": heavy(300_007),  # prime
    "images that differ": spread(heavy(128, 16, 16, 16), 0),
    "channels that differ": spread(heavy(32, 64, 512), 2),
    "tokens that differ": spread(heavy(32, 64, 512), 1),
    "nothing in the sample": np.where(np.arange(1 << 20) // 64 % 17 == 0, 0, heavy(1 << 20)),
    "little in the sample": np.where(np.arange(1 << 20) // 64 % 17, 1, 1e-4) * heavy(1 << 20),
    "most in the sample": np.where(np.arange(1 << 20) // 64 % 17, 1, 1e4) * heavy(1 << 20),
}


@functools.cache
def noise_and_converged_error(kind: str, bits: int) -> tuple[float, float]:
    """The noise constant of a narrow signed grid, and the modelled error of 80 iterations."""
    c = 1 / (12 * (2 ** (bits - 1) - 1) ** 2)
    s = octav_reference.newton(ARRAYS[kind], c, iterations=80)
    return c, octav_reference.modelled_error(ARRAYS[kind], s, c)


@pytest.mark.usefixtures("platform")
@pytest.mark.parametrize("kind", ARRAYS)
@pytest.mark.parametrize("bits", BITS)
def test_thresholds_are_as_good_as_converged_ones(kind, bits):
    x, format = jnp.asarray(ARRAYS[kind], jnp.float32), qj.Int(bits, signed=True, narrow=True)
    c, converged = noise_and_converged_error(kind, bits)
    found = float(qj.octav(x, format).squeeze())
    assert octav_reference.modelled_error(x, found, c) <= 1.001 * converged


def test_a_count_of_iterations_is_kept():
    x = jnp.asarray(ARRAYS["heavy-tailed"])
    s = np.mean(np.abs(x), dtype=np.float64)
    np.testing.assert_allclose(qj.octav(x, qj.Int(4), iterations=0).ravel(), [s], rtol=1e-6)
    a = np.abs(np.asarray(x, np.float64))
    for _ in range(3):
        s = a[a > s].sum() / (4.0**-4 / 3 * (a <= s).sum() + (a > s).sum())
    np.testing.assert_allclose(qj.octav(x, qj.Int(4), iterations=3).ravel(), [s], rtol=1e-6)


def test_small_groups_take_ten_iterations():
    x = jnp.asarray(heavy(_LARGE - 1024))
    np.testing.assert_array_equal(qj.octav(x, qj.Int(8)), qj.octav(x, qj.Int(8), iterations=10))
    longer = jnp.asarray(heavy(2 * _LARGE))
    assert qj.octav(longer, qj.Int(8)) != qj.octav(longer, qj.Int(8), iterations=10)


@pytest.mark.usefixtures("platform")
@pytest.mark.parametrize(
    ("shape", "axes"),
    [((3, 2, 200_000), (1, 2)), ((2, 400, 1000), (1, 2)), ((400, 1000, 3), (0, 1))],
)
def test_each_group_has_a_sample(shape, axes):
    kept = next(axis for axis in range(3) if axis not in axes)
    x = spread(heavy(*shape), kept)
    found = qj.octav(jnp.asarray(x), qj.Int(4), axes).ravel()
    for index, s in enumerate(found):
        group = jnp.asarray(np.take(x, index, kept))
        np.testing.assert_allclose(s, qj.octav(group, qj.Int(4), iterations=40).ravel()[0], 5e-3)


@pytest.mark.usefixtures("platform")
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 64])  # in the sample, and beside it
def test_what_is_not_finite_shows(value, place):
    x = heavy(2 * _LARGE)
    x[place] = value
    assert not np.isfinite(qj.octav(jnp.asarray(x), qj.Int(4))[0])


@pytest.mark.usefixtures("platform")
def test_zeros():
    assert qj.octav(jnp.zeros(2 * _LARGE), qj.Int(4))[0] == 0
    one = jnp.zeros(2 * _LARGE).at[64].set(-3)
    np.testing.assert_allclose(qj.octav(one, qj.Int(4)), [3], rtol=1e-6)


@settings(max_examples=25)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=0, max_size=2),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16, jnp.float16]),
    exponent=st.integers(-8, 8),
)
def test_any_shape(lengths, dtype, exponent):
    """A threshold lies within the data, and powers of two pass through."""
    shape = (*lengths, -(-_LARGE // int(np.prod(lengths, dtype=int))))
    x = jnp.asarray(heavy(*shape), dtype)
    s = qj.octav(x, qj.Int(4))
    assert s.shape == (1,) * x.ndim
    assert s.dtype == jnp.float32
    assert 0 < s.ravel()[0] <= jnp.max(jnp.abs(x))
    if dtype == jnp.float32:
        np.testing.assert_allclose(qj.octav(x * 2.0**exponent, qj.Int(4)), s * 2.0**exponent, 1e-6)


def test_vmapped_and_differentiated():
    x = jnp.asarray(heavy(2, 400, 500))
    together = jax.vmap(lambda x: qj.octav(x, qj.Int(4)))(x)
    for row, s in zip(x, together, strict=True):
        np.testing.assert_allclose(s, qj.octav(row, qj.Int(4)), rtol=1e-6)
    gradient = jax.grad(lambda x: jnp.sum(qj.fake_quant(x, qj.Quantizer(qj.Int(4)))))(x)
    assert np.isfinite(gradient).all()
