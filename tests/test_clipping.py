import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from qat_jax import AbsMax, Fixed, Int, Octav, octav
from tests import octav_reference as reference

BITS = [2, 3, 4, 5, 6, 7, 8]
NORMAL, LAPLACE = stats.norm(), stats.laplace(scale=1 / np.sqrt(2))


def noise_constant(format):
    return 1 / (12 * float(format.grid(jnp.zeros(1)).steps) ** 2)


@pytest.fixture(scope="module", params=["gaussian", "laplace"])
def law(request):
    """A law of unit variance, its name, and numbers whose magnitudes are its quantiles."""
    law = {"gaussian": NORMAL, "laplace": LAPLACE}[request.param]
    index = np.arange(2**20)
    return request.param, law, law.ppf(0.5 + (index + 0.5) / 2**21) * (-1.0) ** index


def test_fixed_points_of_known_laws(law):
    """Numerical integration of the recursion's fixed point is the independent answer."""
    _, density, quantiles = law
    with jax.enable_x64(True):
        for bits in BITS:
            s = octav(quantiles, Int(bits), iterations=20)
            expected = reference.fixed_point(density, noise_constant(Int(bits)))
            np.testing.assert_allclose(s, [expected], rtol=1e-3)


def test_called_on_arrays_it_compiles_once(caplog):
    one, other, longer = jnp.arange(12.0), jnp.ones(12), jnp.ones(13)
    octav(one, Int(4))
    with jax.log_compiles(True):
        octav(other, Int(4))
        assert "ompil" not in caplog.text
        octav(longer, Int(4))
    assert "Finished XLA compilation of jit(_threshold)" in caplog.text


def test_tabulated_fixed_points(law, shared_data):
    file = Path(shared_data).parent / "reference" / "octav_results.json"
    if not file.is_file():
        pytest.skip(f"no table of fixed points at {file}")
    table = json.loads(file.read_text())["fixed_points_unit_sigma_computed"]
    name, _, quantiles = law
    for bits, expected in zip(table["bits"], table[f"{name}_octav_fixed_point"], strict=True):
        s = octav(quantiles.astype(np.float32), Int(bits), iterations=20)
        np.testing.assert_allclose(s, [expected], rtol=2e-3)


@pytest.mark.parametrize(
    "format", [Int(2), Int(4), Int(8), Int(3, narrow=True), Int(4, signed=False), Int(16)]
)
@pytest.mark.parametrize("axes", [(0, 1, 2), (0, 1), (1, 2), (0, 2), (1,)])
def test_equals_the_float64_reference(format, axes):
    x = np.random.default_rng(0).standard_t(3, (7, 30, 11)).astype(np.float32)
    x[x < -1.5] = 0
    want = reference.per_group(x, axes, noise_constant(format), positive=format.signed is False)
    np.testing.assert_allclose(octav(x, format, axes), want, rtol=2e-6)
    with jax.enable_x64(True):
        s = octav(x.astype(np.float64), format, axes)
        assert s.dtype == jnp.float64
        np.testing.assert_allclose(s, want, rtol=1e-12)


def test_sum_is_accurate_over_ten_million_elements():
    x = np.random.default_rng(0).standard_normal(10_000_019).astype(np.float32)
    s = octav(x, Int(4), iterations=0)
    np.testing.assert_allclose(s, [np.abs(x, dtype=np.float64).mean()], rtol=1e-6)


@pytest.mark.parametrize(("bits", "tolerance"), [(2, 1.03), (3, 1.01), (4, 1.01), (6, 1.01)])
@pytest.mark.parametrize("density", [NORMAL, LAPLACE])
def test_true_error_is_near_that_of_a_brute_force_sweep(bits, tolerance, density):
    x = density.ppf((np.arange(100_000) + 0.5) / 100_000)
    levels = 2 ** (bits - 1) - 1

    def error(s):
        return np.mean((x - np.clip(np.round(x * levels / s), -levels, levels) * s / levels) ** 2)

    s = float(octav(x.astype(np.float32), Int(bits, narrow=True))[0])
    best = min(error(t) for t in np.linspace(0.01, 1, 400) * np.abs(x).max())
    assert error(s) <= tolerance * best


def test_noise_of_the_paper_fits_the_plain_grids_only():
    x = jax.random.normal(jax.random.key(0), (10_000,))
    for format in (Int(2), Int(4, signed=False)):
        np.testing.assert_array_equal(octav(x, format), octav(x, format, noise="paper"))
    narrow = Int(2, narrow=True)
    assert octav(x, narrow, noise="paper")[0] > 1.1 * octav(x, narrow)[0]
    np.testing.assert_array_equal(octav(x, narrow, noise="paper"), octav(x, Int(2)))


def test_matching_noise_constant_lowers_the_error_on_the_narrow_grid():
    """The reference measurement: 1.38 times the best with the paper's constant, 1.01 without."""
    x = NORMAL.ppf((np.arange(100_000) + 0.5) / 100_000)

    def error(s):
        return np.mean((x - np.clip(np.round(x / s), -1, 1) * s) ** 2)

    best = min(error(s) for s in np.linspace(0.5, 3, 500))
    x32, narrow = x.astype(np.float32), Int(2, narrow=True)
    assert error(float(octav(x32, narrow)[0])) < 1.02 * best
    assert error(float(octav(x32, narrow, noise="paper")[0])) > 1.3 * best


def test_zeros_do_not_count():
    x = jax.random.normal(jax.random.key(0), (4096,))
    padded = jnp.concatenate([x, jnp.zeros(12_345)])
    np.testing.assert_allclose(octav(padded, Int(4)), octav(x, Int(4)), rtol=1e-6)


def test_sign_picked_at_run_time():
    x = jax.random.normal(jax.random.key(0), (4096,))
    auto = Int(4, signed=None)
    np.testing.assert_array_equal(octav(x, auto), octav(x, Int(4)))
    positive = jnp.abs(x)
    np.testing.assert_array_equal(octav(positive, auto), octav(positive, Int(4, signed=False)))


def test_starts_from_the_mean_and_converges_in_the_iterations_the_paper_gives():
    x = NORMAL.ppf((np.arange(2**18) + 0.5) / 2**18).astype(np.float32)
    np.testing.assert_allclose(octav(x, Int(4), iterations=0), [np.abs(x).mean()], rtol=1e-6)
    for bits, iterations in [(2, 4), (4, 7), (8, 11)]:
        limit = octav(x, Int(bits), iterations=50)
        np.testing.assert_allclose(octav(x, Int(bits), iterations=iterations), limit, rtol=1e-3)
    assert octav(x, Int(8), iterations=3)[0] < 0.9 * octav(x, Int(8))[0]


RULES = [Octav(), AbsMax()]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_half_precision_accumulates_in_float32(rule, dtype):
    # The sum of magnitudes is about 800,000: beyond float16 and beyond bfloat16's resolution.
    x = jax.random.normal(jax.random.key(0), (1000, 1000)).astype(dtype)
    s = rule.threshold(x, Int(4), (0, 1))
    assert s.dtype == jnp.float32
    np.testing.assert_allclose(s, rule.threshold(x.astype(jnp.float32), Int(4), (0, 1)), rtol=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_degenerate_groups(rule):
    x = jnp.array([[0.0, 0, 0], [2, 2, 2], [-3, 0, 0], [jnp.nan, 1, 2], [jnp.inf, 1, 2]])
    s = rule.threshold(x, Int(4), (1,))[:, 0]
    assert s[0] == 0
    np.testing.assert_allclose(s[1:3], [2, 3], rtol=0.02)
    assert not np.isfinite(s[3:]).any()
    assert rule.threshold(jnp.zeros((0, 3)), Int(4), (0,)).tolist() == [[0, 0, 0]]


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((), ()),
        ((5,), ()),
        ((5000,), (0,)),
        ((40, 300), (0,)),
        ((300, 40), (1,)),
        ((5, 16), (1,)),
        ((3, 17, 70), (1, 2)),
        ((33, 9, 70), (0, 2)),
        ((33, 9, 70), (1,)),
        ((12, 20, 30), (2, 0, 1)),
    ],
)
def test_the_maximum_whatever_is_reduced_and_wherever_there_is_nan(shape, axes):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    places = np.random.default_rng(1).integers(0, x.size, 12)
    for place in {0, x.size - 1, *places.tolist()}:
        broken = x.copy()
        broken.reshape(-1)[place] = np.nan
        for x_ in (x, broken):
            expected = np.max(np.abs(x_), axis=axes, keepdims=True) if axes else np.abs(x_)
            found = np.asarray(AbsMax().threshold(jnp.asarray(x_), Int(4), axes))
            np.testing.assert_array_equal(found, np.where(np.isnan(expected), np.inf, expected))


@pytest.mark.parametrize("iterations", range(4))
def test_infinity_is_visible_whatever_the_parity_of_the_iterations(iterations):
    s = octav(jnp.array([1.0, -jnp.inf, 2]), Int(4), iterations=iterations)
    assert not np.isfinite(s).any()


@pytest.mark.parametrize("rule", RULES)
def test_unsigned_formats_look_at_positive_numbers_only(rule):
    x = jnp.array([-100.0, 1, 2, 3, 4])
    unsigned = Int(4, signed=False)
    np.testing.assert_array_equal(
        rule.threshold(x, unsigned, (0,)), rule.threshold(x[1:], unsigned, (0,))
    )


@settings(max_examples=60)
@given(
    data=st.data(),
    shape=st.sampled_from([(5,), (3, 4), (2, 3, 5), (1, 1)]),
    format=st.sampled_from([Int(2), Int(8), Int(4, signed=False), Int(4, None, narrow=True)]),
)
def test_octav_threshold_lies_within_the_data(data, shape, format):
    """Constants, denormals, huge outliers: 0 < s ≤ max|x| unless the group is empty of both."""
    number = st.one_of(
        st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-40, 1e30, -1e30]),
        st.floats(-100, 100, width=32),
    )
    size = int(np.prod(shape))
    x = np.array(data.draw(st.lists(number, min_size=size, max_size=size)), np.float32)
    x = x.reshape(shape)
    axes = tuple(data.draw(st.sets(st.integers(0, len(shape) - 1), min_size=1)))
    s = np.asarray(octav(x, format, axes))
    x = np.where(np.abs(x) < np.finfo(np.float32).tiny, 0, x)  # CPUs flush denormals
    magnitude = np.maximum(x, 0) if format.signed is False else np.abs(x)
    largest = magnitude.max(axis=axes, keepdims=True)
    assert s.shape == largest.shape
    assert np.isfinite(s).all()
    assert (s <= largest * (1 + 1e-5)).all()
    assert ((s > 0) | (largest < 1e-36)).all()


def test_threshold_scales_with_the_data():
    x = jax.random.normal(jax.random.key(0), (1000,))
    np.testing.assert_allclose(octav(x * 1024, Int(4)), octav(x, Int(4)) * 1024, rtol=1e-6)


def test_fixed_thresholds():
    x = jnp.ones((2, 3))
    assert Fixed(1.5).threshold(x, Int(4), (0, 1)).tolist() == [[1.5]]
    assert Fixed(1.5).threshold(x, Int(4), (1,)).tolist() == [[1.5], [1.5]]
    assert Fixed((1.0, 2.0)).threshold(x, Int(4), (1,)).tolist() == [[1.0], [2.0]]
    with pytest.raises(ValueError, match="2 thresholds for 3 groups"):
        Fixed((1.0, 2.0)).threshold(x, Int(4), (0,))
    for value in ([1.0, 2.0], np.array([1, 2], np.float32)):
        assert hash(Fixed(value)) == hash(Fixed((1.0, 2.0)))
    assert hash(Fixed(((1.0, 2.0), (3.0, 4.0)))) == hash(Fixed((1.0, 2.0, 3.0, 4.0)))
    assert repr(Fixed(np.float64(0.5))) == "Fixed(value=0.5)"
    for bad in (-1.0, float("nan"), (1.0, float("inf"))):
        with pytest.raises(ValueError, match="finite and not negative"):
            Fixed(bad)


def test_wrong_input_is_refused():
    with pytest.raises(TypeError, match="floating-point"):
        octav(jnp.arange(3), Int(4))
    with pytest.raises(ValueError, match="axis 2 does not exist"):
        octav(jnp.ones(3), Int(4), axis=2)
    with pytest.raises(ValueError, match="iterations"):
        Octav(iterations=-1)
    with pytest.raises(ValueError, match="noise"):
        Octav(noise="papers")


def test_no_gradient_through_the_search():
    for rule in RULES:
        gradient = jax.grad(lambda x, rule=rule: rule.threshold(x, Int(4), (0,)).sum())
        assert gradient(jnp.array([1.0, -2, 0.5])).tolist() == [0, 0, 0]
