import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qat_jax.clipping import AbsMax, Entropy, Exact, MseSweep, Octav, Percentile, Refit
from qat_jax.formats import Float, Int

RULES = [Percentile(99), MseSweep(20), Entropy(64, 16), Exact(), Refit(4)]
FORMATS = [
    Int(2),
    Int(3),
    Int(4, narrow=True),
    Int(8),
    Int(3, signed=False),
    Int(3, signed=None),
    Int(2, signed=None),
    Int(2, signed=False, narrow=True),
    Float(2, 1),
    Float(2, 3),
]


def codes_of(format, x):
    """All codes of a format, found by rounding a fine ramp of numbers."""
    grid = format.grid(jnp.asarray(x, jnp.float32))
    limit = float(grid.steps) + 1
    ramp = jnp.linspace(-limit, limit, 16 * int(limit) * 2 + 1)
    return np.unique(np.asarray(grid.round(ramp), np.float64) + 0.0), float(grid.steps)


def squared_error(x, threshold, format):
    """In float64, by looking for the nearest code."""
    codes, steps = codes_of(format, x)
    step = np.atleast_1d(np.asarray(threshold, np.float64))[:, None] / steps
    scaled = np.asarray(x, np.float64).ravel()[None] / step
    above = np.clip(np.searchsorted(codes, scaled), 1, len(codes) - 1)
    nearest = np.minimum(np.abs(scaled - codes[above - 1]), np.abs(scaled - codes[above]))
    return np.sum(np.square(nearest * step), axis=1)


def least_error(x, format, points):
    """Brute force: evenly and logarithmically spaced thresholds."""
    largest = np.max(format.magnitude(jnp.asarray(x, jnp.float32)))
    evenly = np.linspace(1e-3, 4, points // 2) * largest
    logarithmic = np.geomspace(1e-4, 4, points // 2) * largest
    return squared_error(x, np.concatenate([evenly, logarithmic]), format).min()


@functools.partial(jax.jit, static_argnums=(0, 1, 3))
def threshold(rule, format, x, axes):
    return rule.threshold(x, format, axes)


@settings(max_examples=40)
@given(
    format=st.sampled_from(FORMATS),
    size=st.sampled_from([1, 2, 5, 16]),
    law=st.sampled_from(["normal", "laplace", "standard_cauchy", "integers"]),
    seed=st.integers(0, 10**6),
)
def test_exact_is_never_worse_than_brute_force(format, size, law, seed):
    rng = np.random.default_rng(seed)
    x = rng.integers(-5, 6, size) if law == "integers" else getattr(rng, law)(size=size)
    x = x.astype(np.float32)
    if not (format.magnitude(jnp.asarray(x)) > 0).any():
        x[0] = 1
    s = float(threshold(Exact(), format, x, (0,))[0])
    least = least_error(x, format, 20_000)
    assert squared_error(x, s, format)[0] <= least * (1 + 1e-5) + 1e-12 * np.sum(np.square(x))


@pytest.mark.parametrize("format", [Int(2), Int(4, narrow=True), Int(3, signed=False), Float(2, 1)])
@pytest.mark.parametrize("size", [300, 3000, 40_000])
def test_exact_in_larger_groups(format, size):
    x = np.random.default_rng(size).standard_t(3, size).astype(np.float32)
    s = float(threshold(Exact(), format, x, (0,))[0])
    assert squared_error(x, s, format)[0] <= 1.01 * least_error(x, format, 200)


@pytest.mark.parametrize("format", [Int(8), Float(4, 3)])
def test_exact_at_eight_bits(format):
    x = np.random.default_rng(0).standard_normal(30_000).astype(np.float32)
    s = float(threshold(Exact(), format, x, (0,))[0])
    grid = format.grid(x)

    def error(s):
        step = s / grid.steps
        return float(jnp.sum(jnp.square(x - grid.round(x / step) * step)))

    best = min(error(t) for t in np.geomspace(0.02, 2, 800) * np.abs(x).max())
    assert error(s) <= 1.01 * best


def test_exact_finds_the_second_of_two_minima():
    """One outlier far beyond hundreds of thousands of numbers, as in OCTAV's appendix G."""
    x = np.random.default_rng(0).standard_normal(300_000).astype(np.float32)
    x[0] = 500
    format = Int(4, narrow=True)
    found = {
        rule: squared_error(x, float(threshold(rule, format, x, (0,))[0]), format)[0]
        for rule in (Exact(), MseSweep(), AbsMax())
    }
    candidates = np.concatenate([np.linspace(1, 5, 40), np.linspace(300, 600, 20)])
    assert found[Exact()] <= 1.0001 * squared_error(x, candidates, format).min()
    assert found[MseSweep()] > 1.01 * found[Exact()]
    assert found[AbsMax()] > 1.01 * found[Exact()]


def test_exact_where_the_recursion_of_octav_stops_in_the_wrong_minimum():
    """Most numbers are small and alike: the model of rounding noise does not see it."""
    x = np.concatenate([np.full(4000, 1.0), np.full(4000, -1.0), [40.0]]).astype(np.float32)
    format = Int(3, narrow=True)
    errors = [
        squared_error(x, float(threshold(rule, format, x, (0,))[0]), format)[0]
        for rule in (Exact(), Octav(), MseSweep())
    ]
    assert errors[0] <= 1.001 * least_error(x, format, 2000)
    assert errors[1] > 1.01 * errors[0]
    assert errors[2] > 1.01 * errors[0]


@pytest.mark.parametrize("size", [8, 5000, 50_000])
def test_exact_recovers_a_grid_that_the_data_lies_on(size):
    codes = np.random.default_rng(0).integers(-7, 8, size)
    codes[:2] = 7, -6  # the grid is determined by its largest number and a neighbour
    x = (0.37 * codes).astype(np.float32)
    s = threshold(Exact(), Int(4, narrow=True), x, (0,))
    np.testing.assert_allclose(s, [7 * 0.37], rtol=1e-5)


def errors_of_vectors(rule, format, x):
    """The squared error of each row, in float64."""
    s = np.asarray(threshold(rule, format, x, (1,)), np.float64)[:, 0]
    return np.array([squared_error(row, t, format)[0] for row, t in zip(x, s, strict=True)])


@pytest.mark.parametrize("law", ["normal", "laplace"])
@pytest.mark.parametrize(
    ("format", "size"),
    [(Int(3, narrow=True), 64), (Int(4, narrow=True), 16), (Int(4), 32), (Float(2, 1), 16)],
    ids=str,
)
def test_few_refitted_steps_are_nearly_the_best_of_all(format, size, law):
    x = getattr(np.random.default_rng(0), law)(size=(200, size)).astype(np.float32)
    found, least, evenly = (
        errors_of_vectors(rule, format, x).sum() for rule in (Refit(), Exact(), MseSweep(100))
    )
    assert found <= 1.03 * least
    assert found <= 1.01 * evenly


@settings(max_examples=20)
@given(
    format=st.sampled_from(FORMATS),
    size=st.sampled_from([1, 2, 5, 16, 40]),
    points=st.sampled_from([2, 8]),
    seed=st.integers(0, 10**6),
)
def test_refitting_is_the_least_squares_of_the_codes(format, size, points, seed):
    """Each candidate's codes, the slope that suits them, and the best of those, in float64."""
    x = np.random.default_rng(seed).standard_normal(size).astype(np.float32)
    x[0] = 3  # the largest, of either sign's formats
    codes, steps = codes_of(format, x)
    middles = np.asarray(format.midpoints)
    spacing = np.diff(middles)[-1] if len(middles) > 1 else 1
    below = min(1.25 * spacing, codes.max() / 3)
    held = np.maximum(x, 0) if getattr(format, "signed", True) is False else x
    errors, thresholds = [], []
    for beyond in np.linspace(-below, spacing * np.sqrt(size / 12), points):
        scaled = held.astype(np.float64) / 3 * (codes.max() + beyond)
        q = codes[np.argmin(np.abs(scaled[:, None] - codes), axis=1)]
        slope = q @ held / (q @ q) if q.any() else 3 / (codes.max() + beyond)
        errors.append(np.sum((held - slope * q) ** 2))
        thresholds.append(slope * steps)
    s = float(threshold(Refit(points), format, x, (0,))[0])
    close = np.isclose(thresholds, s, rtol=1e-4)
    assert np.min(np.where(close, errors, np.inf)) <= min(errors) * (1 + 1e-3) + 1e-9


@pytest.mark.parametrize("percent", [1.5, 50, 99, 99.99, 100])
@pytest.mark.parametrize("axes", [(0, 1, 2), (0, 2), (1,)])
def test_percentile_is_that_of_numpy(percent, axes):
    x = np.random.default_rng(0).standard_normal((6, 50, 70)).astype(np.float32)
    want = np.percentile(np.abs(x), percent, axis=axes, keepdims=True)
    np.testing.assert_allclose(threshold(Percentile(percent), Int(4), x, axes), want, rtol=1e-6)
    want = np.percentile(np.maximum(x, 0), percent, axis=axes, keepdims=True)
    found = threshold(Percentile(percent), Int(4, signed=False), x, axes)
    np.testing.assert_allclose(found, want, rtol=1e-6)


@pytest.mark.parametrize("percent", [0.1, 50, 66.7, 99.9, 100])
@pytest.mark.parametrize("size", [1, 2, 7, 20_001])
def test_percentile_of_many_equal_numbers(percent, size):
    x = np.random.default_rng(1).integers(-3, 3, size).astype(np.float32) / 3
    for format, magnitude in ((Int(4), np.abs(x)), (Int(4, signed=False), np.maximum(x, 0))):
        want = np.percentile(magnitude, percent)
        np.testing.assert_allclose(threshold(Percentile(percent), format, x, (0,)), want, rtol=1e-6)


@pytest.mark.parametrize("count", [1, 3, 50])
@pytest.mark.parametrize("format", [Int(4), Int(4, signed=False, narrow=True), Float(2, 1)])
def test_sweep_takes_the_best_of_its_points(format, count):
    x = np.random.default_rng(1).standard_t(3, 5000).astype(np.float32)
    points = np.arange(1, count + 1) / count * np.max(format.magnitude(x))
    errors = squared_error(x, points, format)
    s = float(threshold(MseSweep(count), format, x, (0,))[0])
    assert np.isclose(points, s).any()
    np.testing.assert_allclose(squared_error(x, s, format), errors.min(), rtol=1e-4)


def divergences(x, levels, bins):
    """TensorRT's search, bin by bin, for a threshold at every bin's upper edge."""
    magnitude = np.abs(x[x != 0])
    counts, _ = np.histogram(magnitude, bins, (0, magnitude.max()))
    found = np.full(bins + 1, np.inf)
    for end in range(levels, bins + 1):
        p = counts[:end].astype(float)
        p[-1] += counts[end:].sum()
        q = np.zeros(end)
        level = np.arange(end) * levels // end
        for i in range(levels):
            run = (level == i) & (counts[:end] > 0)
            if run.any():
                q[run] = counts[:end][run].mean()
        p, q = p / p.sum(), q / q.sum()
        if (q[p > 0] > 0).all():
            found[end] = np.sum(p[p > 0] * np.log(p[p > 0] / q[p > 0]))
    return found


@pytest.mark.parametrize("law", ["normal", "laplace", "standard_t"])
def test_entropy_is_the_least_divergence(law):
    rng = np.random.default_rng(2)
    x = rng.standard_t(3, 40_000) if law == "standard_t" else getattr(rng, law)(size=40_000)
    x[:5000] = 0
    x = x.astype(np.float32)
    bins, levels = 256, 8
    want = divergences(x, levels, bins)
    rule = Entropy(bins, candidates=bins - levels + 1)
    s = float(threshold(rule, Int(4, narrow=True), x, (0,))[0])
    end = round(s / np.abs(x).max() * bins)
    assert want[end] <= want.min() * (1 + 1e-3) + 1e-6
    coarse = float(threshold(Entropy(bins, 32), Int(4, narrow=True), x, (0,))[0])
    assert want.min() <= want[round(coarse / np.abs(x).max() * bins)] <= want[-1]
    assert s < 0.9 * np.abs(x).max()


def test_entropy_of_short_groups_is_their_largest_magnitude():
    x = jax.random.normal(jax.random.key(0), (100, 8))
    s = threshold(Entropy(), Int(4), x, (1,))
    np.testing.assert_allclose(s, AbsMax().threshold(x, Int(4), (1,)))


@pytest.mark.parametrize("rule", [Octav(), Entropy()])
def test_rules_for_even_spacing_refuse_floats(rule):
    with pytest.raises(ValueError, match="use Exact, MseSweep or AbsMax"):
        rule.threshold(jnp.ones(3), Float(2, 1), (0,))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("format", [Int(4), Int(3, signed=False), Int(4, None), Int(8)])
def test_groups_are_independent(rule, format):
    x = np.random.default_rng(0).standard_t(3, (4, 90, 3)).astype(np.float32)
    if format.signed is None:
        x = np.abs(x)
    s = threshold(rule, format, x, (0, 1))
    assert s.shape == (1, 1, 3)
    for i in range(3):
        one = threshold(rule, format, x[..., i], (0, 1))
        np.testing.assert_allclose(s[..., i], one, rtol=1e-5)
    mapped = jax.vmap(lambda x: rule.threshold(x, format, (0, 1)), in_axes=2, out_axes=2)
    np.testing.assert_allclose(jax.jit(mapped)(x), s, rtol=1e-5)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_accumulates_in_float32(rule, dtype):
    x = (30 * jax.random.normal(jax.random.key(0), (200, 300))).astype(dtype)
    s = threshold(rule, Int(4), x, (0, 1))
    assert s.dtype == jnp.float32
    np.testing.assert_allclose(s, threshold(rule, Int(4), x.astype(jnp.float32), (0, 1)), rtol=1e-6)


@pytest.mark.parametrize("rule", [*RULES, AbsMax(), Octav()])
@pytest.mark.parametrize("n", [3, 50_000])
def test_degenerate_groups(rule, n):
    first = [[0.0] * 3, [2, 2, 2], [-3, 0, 0], [np.nan, 1, 2], [np.inf, 1, 2], [1e30, -2e30, 1e30]]
    x = jnp.concatenate([jnp.array(first), jnp.zeros((6, n - 3))], axis=1)
    s = np.asarray(threshold(rule, Int(4), x, (1,)))[:, 0]
    assert s[0] == 0
    assert not np.isfinite(s[3:5]).any()
    assert np.isfinite(s[5])
    if rule != Percentile(99) or n == 3:
        assert (s[[1, 2, 5]] > 0).all()
    assert rule.threshold(jnp.zeros((0, 3)), Int(4), (0,)).tolist() == [[0, 0, 0]]


@pytest.mark.parametrize("rule", RULES)
def test_scale_of_the_data_does_not_matter(rule):
    x = jax.random.normal(jax.random.key(0), (1000,))
    s = threshold(rule, Int(4), x, (0,))
    for scale in (2.0**100, 2.0**-100):
        scaled = threshold(rule, Int(4), x * scale, (0,))
        np.testing.assert_allclose(scaled / scale, s, rtol=1e-6)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("n", [4, 40_000])
def test_unsigned_formats_look_at_positive_numbers_only(rule, n):
    x = jax.random.normal(jax.random.key(0), (n,))
    unsigned = Int(4, signed=False)
    s = threshold(rule, unsigned, x, (0,))
    np.testing.assert_array_equal(s, threshold(rule, unsigned, jnp.maximum(x, 0), (0,)))
    assert threshold(rule, unsigned, -jnp.abs(x), (0,)).tolist() == [0]


@pytest.mark.parametrize("rule", RULES)
def test_float64_stays(rule):
    with jax.enable_x64(True):
        x = jax.random.normal(jax.random.key(0), (4, 20_000), jnp.float64)
        s = threshold(rule, Int(4), x, (1,))
        assert s.dtype == jnp.float64
        single = threshold(rule, Int(4), x.astype(jnp.float32), (1,))
        np.testing.assert_allclose(s, single, rtol=1e-2)


@pytest.mark.parametrize("rule", RULES)
def test_no_gradient_through_the_search(rule):
    gradient = jax.grad(lambda x: rule.threshold(x, Int(4), (0,)).sum())
    assert gradient(jnp.array([1.0, -2, 0.5])).tolist() == [0, 0, 0]


@pytest.mark.parametrize("rule", RULES)
def test_inside_shard_map(rule):
    mesh = jax.make_mesh((1,), ("groups",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("groups")
    for shape in [(6, 8), (2, 20_000)]:
        x = jax.random.normal(jax.random.key(0), shape)
        local = jax.shard_map(
            lambda x: rule.threshold(x, Int(4), (1,)), mesh=mesh, in_specs=spec, out_specs=spec
        )
        expected = threshold(rule, Int(4), x, (1,))
        np.testing.assert_allclose(jax.jit(local)(x), expected, rtol=1e-6)


@pytest.mark.parametrize("percent", [0, -1, 100.1, float("nan")])
def test_impossible_percentages_are_refused(percent):
    with pytest.raises(ValueError, match="percent"):
        Percentile(percent)


@pytest.mark.parametrize(
    "make",
    [
        lambda: MseSweep(0),
        lambda: MseSweep(2.5),
        lambda: Entropy(bins=0),
        lambda: Entropy(candidates=0),
    ],
)
def test_impossible_counts_are_refused(make):
    with pytest.raises(ValueError, match="count of at least 1"):
        make()
