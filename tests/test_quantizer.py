import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qat_jax import (
    AbsMax,
    Fixed,
    Int,
    Octav,
    PerChannel,
    PerShard,
    PerTensor,
    PerVector,
    Quantizer,
    dequantize,
    fake_quant,
    quantize,
)

FORMATS = [
    Int(2),
    Int(4, narrow=True),
    Int(4, signed=False),
    Int(8, signed=None),
    Int(3, signed=None, narrow=True),
    Int(16),
]


def reference(x, s, format):
    """Round-to-nearest on the grid in float64, element by element as the definition reads."""
    signed = bool((x < 0).any()) if format.signed is None else format.signed
    highest = 2 ** (format.bits - signed) - 1
    steps = highest if format.narrow else highest + 1
    lowest = -steps if signed else 0
    step = np.broadcast_to(np.asarray(s, np.float64) / steps, x.shape)
    codes = np.rint(x / np.where(step > 0, step, 1)) * (step > 0)
    return np.clip(codes, lowest, highest) * step, np.clip(codes, lowest, highest)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel()])
@pytest.mark.parametrize("clipping", [Octav(), AbsMax(), Fixed(0.8)])
def test_equals_the_definition(format, granularity, clipping):
    x = np.random.default_rng(0).standard_normal((40, 6)).astype(np.float32)
    x[:, 2] = 0
    if format.signed is None:
        x = np.abs(x)
    quantizer = Quantizer(format, granularity, clipping)
    with jax.enable_x64(True):  # so that ties fall alike
        x = x.astype(np.float64)
        s, y, q = jax.jit(
            lambda x: (
                quantizer.threshold(x, 1),
                fake_quant(x, quantizer, channel_axis=1),
                quantize(x, quantizer, channel_axis=1),
            )
        )(x)
        expected, codes = reference(x, s, format)
    np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(q.codes, codes)
    if granularity == PerChannel():
        assert (np.asarray(y)[:, 2] == 0).all()
        assert q.scale.shape == (1, 6)


numbers = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-45, -1e-39, 1e-38, 3e38, -1e30]),
    st.floats(-8, 8, width=32),
)


@settings(max_examples=80)
@given(
    data=st.data(),
    shape=st.sampled_from([(), (1,), (7,), (3, 5), (2, 3, 3)]),
    format=st.sampled_from(FORMATS),
    clipping=st.sampled_from([Octav(), AbsMax(), Fixed(0.7), Fixed(0.0)]),
    granularity=st.sampled_from([PerTensor(), PerChannel()]),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
)
def test_dequantised_codes_are_the_fake_quantised_array(
    data, shape, format, clipping, granularity, dtype
):
    """Bit for bit, whatever the input: zeros of either sign, denormals, huge outliers."""
    size = int(np.prod(shape))
    x = np.array(data.draw(st.lists(numbers, min_size=size, max_size=size)), np.float32)
    x = jnp.asarray(np.clip(x, -6e4, 6e4) if dtype == "float16" else x, dtype).reshape(shape)
    axis = data.draw(st.sampled_from([(), *((a,) for a in range(len(shape)))]))
    quantizer = Quantizer(format, granularity, clipping)
    y = fake_quant(x, quantizer, channel_axis=axis)
    q = quantize(x, quantizer, channel_axis=axis)
    restored = jax.jit(dequantize)(q)
    assert restored.dtype == y.dtype == x.dtype
    assert restored.shape == y.shape == q.shape == x.shape
    bits = {4: np.uint32, 2: np.uint16}[y.dtype.itemsize]
    np.testing.assert_array_equal(np.asarray(restored).view(bits), np.asarray(y).view(bits))
    grid = format.grid(x)
    codes = np.asarray(q.codes)
    assert (codes >= np.asarray(grid.low)).all()
    assert (codes <= np.asarray(grid.high)).all()


def test_equality_holds_inside_jit():
    x = jax.random.normal(jax.random.key(0), (1000, 7)).astype(jnp.bfloat16)
    for format in FORMATS:
        quantizer = Quantizer(format, PerChannel())

        @jax.jit
        def both(x, quantizer=quantizer):
            restored = dequantize(quantize(x, quantizer, channel_axis=1))
            return restored, fake_quant(x, quantizer, channel_axis=1)

        np.testing.assert_array_equal(*(np.asarray(y, np.float32) for y in both(x)))


@pytest.mark.parametrize("clipping", [Octav(), AbsMax()])
def test_not_a_number_and_infinity_poison_their_group(clipping):
    x = jnp.array([[1.0, 2, 3], [jnp.nan, 2, 3], [1, -jnp.inf, 3], [0, 0, 0]])
    quantizer = Quantizer(Int(4), PerChannel(), clipping)
    y = fake_quant(x, quantizer, channel_axis=0)
    assert np.isnan(y[1:3]).all()
    assert np.isfinite(y[jnp.array([0, 3])]).all()
    np.testing.assert_array_equal(dequantize(quantize(x, quantizer, channel_axis=0)), y)


def test_axes_may_be_numpys():
    x = jnp.arange(6.0).reshape(2, 3)
    quantizer = Quantizer(Int(4), PerChannel())
    for axis in (np.int64(0), np.array([0])):
        np.testing.assert_array_equal(quantizer(x, axis), quantizer(x, 0))


def test_codes_need_a_threshold_for_each_group():
    x = jnp.ones((2, 3))
    quantizer = Quantizer(Int(4), PerChannel())
    assert fake_quant(x, quantizer, channel_axis=0, threshold=2 * x).shape == (2, 3)
    with pytest.raises(ValueError, match=r"share scales of shape \(2, 1\)"):
        quantize(x, quantizer, channel_axis=0, threshold=2 * x)


def test_thresholds_of_elements_stay_those_of_elements():
    x = jnp.linspace(-1, 1, 32)
    quantizer = Quantizer(Int(8, narrow=True), PerVector(16), AbsMax())
    y = fake_quant(x, quantizer, vector_axis=0, threshold=jnp.ones(32).at[0].set(0.01))
    np.testing.assert_allclose(y[0], -0.01, rtol=1e-6)
    np.testing.assert_allclose(y[1:], x[1:], atol=1 / 254)
    window = x.reshape(4, 2, 4)  # vectors of 3 through two axes
    rows = jnp.full((4, 2, 1), 1.0).at[0].set(0.01)
    thirds = Quantizer(Int(8, narrow=True), PerVector(3), AbsMax())
    y = fake_quant(window, thirds, vector_axis=(0, 1), threshold=rows)
    np.testing.assert_allclose(y[0], -0.01, rtol=1e-6)
    np.testing.assert_allclose(y[1:], window[1:], atol=1 / 254)


@pytest.mark.parametrize(
    ("granularity", "axes", "shape"),
    [
        (PerVector(16), {"vector_axis": 1}, (4, 4)),  # of vectors of 8
        (PerVector(16), {"vector_axis": 1}, (2, 2)),
        (PerVector(16), {"vector_axis": 1}, (32,)),
        (PerChannel(), {"channel_axis": 0}, (4,)),
        (PerChannel(), {"channel_axis": 0}, (5, 1)),
        (PerShard(2), {}, (3, 1)),
        (PerTensor(), {}, (31,)),
    ],
)
def test_thresholds_that_go_with_nothing_are_refused(granularity, axes, shape):
    x = jnp.ones((4, 32))
    quantizer = Quantizer(Int(8), granularity, AbsMax())
    for function in (fake_quant, quantize):
        with pytest.raises(ValueError, match="give one threshold for each of those"):
            function(x, quantizer, threshold=jnp.ones(shape), **axes)


def test_thresholds_never_change_the_shape():
    with pytest.raises(ValueError, match="give one threshold for each of those"):
        fake_quant(jnp.ones((1, 4)), Quantizer(Int(4)), channel_axis=0, threshold=jnp.ones((3, 1)))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (4, 1), (1, 2), (4, 2), (2,), (1, 4, 2)])
def test_thresholds_may_be_one_along_any_axis(shape):
    x = jax.random.normal(jax.random.key(0), (4, 32))
    quantizer = Quantizer(Int(8), PerVector(16), AbsMax())
    given = jnp.arange(1.0, 1 + np.prod(shape, dtype=int)).reshape(shape)
    y = fake_quant(x, quantizer, vector_axis=1, threshold=given)
    expected = jnp.repeat(jnp.broadcast_to(given, (1, 4, 2))[0], 16, axis=1)
    np.testing.assert_array_equal(y, fake_quant(x, quantizer, threshold=expected))
    q = quantize(x, quantizer, vector_axis=1, threshold=given)
    np.testing.assert_array_equal(dequantize(q), y)


def test_fixed_thresholds_let_no_infinity_become_a_number():
    x = jnp.array([[0.5, jnp.inf], [jnp.nan, -jnp.inf], [0.5, 9.0]])
    quantizer = Quantizer(Int(4, narrow=True), PerChannel(), Fixed(1.0))
    y = fake_quant(x, quantizer, channel_axis=0)
    np.testing.assert_array_equal(np.isnan(y), ~np.isfinite(x))
    restored = dequantize(quantize(x, quantizer, channel_axis=0))
    assert np.isnan(restored[:2]).all()  # integers cannot tell which element it was
    np.testing.assert_array_equal(restored[2], y[2])


def test_quantising_twice_changes_nothing():
    x = jax.random.normal(jax.random.key(0), (1000,))
    for format in FORMATS:
        quantizer = Quantizer(format, clipping=Fixed(1.3))
        once = fake_quant(x, quantizer)
        np.testing.assert_array_equal(fake_quant(once, quantizer), once)


def test_max_scaling_on_a_narrow_grid_keeps_the_largest_element():
    x = jax.random.normal(jax.random.key(0), (1000,))
    y = fake_quant(x, Quantizer(Int(4, narrow=True), clipping=AbsMax()))
    np.testing.assert_allclose(jnp.max(jnp.abs(y)), jnp.max(jnp.abs(x)), rtol=1e-6)
    assert len(np.unique(y)) <= 15


def test_given_thresholds_replace_the_search():
    x = jax.random.normal(jax.random.key(0), (10, 3))
    quantizer = Quantizer(Int(4), PerChannel())
    s = quantizer.threshold(x, 1)
    assert s.shape == (1, 3)
    np.testing.assert_array_equal(
        fake_quant(x, quantizer, channel_axis=1), fake_quant(x, quantizer, threshold=s)
    )
    q = quantize(x, quantizer, threshold=s[0])
    assert q.scale.shape == (1, 3)


def test_float64_stays_float64():
    with jax.enable_x64(True):
        x = jnp.linspace(-1, 1, 11)
        q = quantize(x, Quantizer(Int(8)))
        assert q.scale.dtype == dequantize(q).dtype == jnp.float64
        fine = fake_quant(x, Quantizer(Int(16, narrow=True), clipping=AbsMax()))
        np.testing.assert_allclose(fine, x, atol=2**-16)


def test_a_quantised_tensor_is_a_pytree():
    q = quantize(jnp.ones((4, 2)), Quantizer(Int(4), PerChannel()), channel_axis=1)
    leaves, structure = jax.tree.flatten(q)
    assert [leaf.shape for leaf in leaves] == [(4, 2), (1, 2)]
    again = jax.jit(lambda q: q)(q)
    assert jax.tree.structure(again) == structure
    np.testing.assert_array_equal(dequantize(again), dequantize(q))


def test_quantisers_are_values():
    a, b = (Quantizer(Int(4), PerChannel(), Octav(5), "pwl") for _ in range(2))
    assert a == b
    assert len({a, b}) == 1
    assert jax.jit(fake_quant, static_argnums=1)(jnp.ones(3), Quantizer(Int(4))).shape == (3,)


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match="PerChannel needs channel_axis"):
        fake_quant(jnp.ones((2, 2)), Quantizer(Int(4), PerChannel()))
    with pytest.raises(TypeError, match="floating-point arrays, not int32"):
        fake_quant(jnp.arange(3), Quantizer(Int(4)))
    with pytest.raises(TypeError, match="floating-point arrays, not int32"):
        fake_quant(jnp.arange(3), Quantizer(Int(4)), threshold=1.0)


@dataclasses.dataclass(frozen=True)
class Shrinking:
    """A clipping rule with a loop that JAX cannot differentiate backwards."""

    def threshold(self, x, format, axes):
        s = jnp.max(jnp.abs(x), axes, keepdims=True)
        return jax.lax.while_loop(lambda s: jnp.mean(jnp.abs(x) > s) < 0.1, lambda s: 0.9 * s, s)


def test_no_gradient_enters_the_search():
    x = jax.random.normal(jax.random.key(0), (100,))
    quantizer = Quantizer(Int(4), clipping=Shrinking(), gradient="pwl")
    found = jax.grad(lambda x: quantizer(x).sum())(x)
    np.testing.assert_array_equal(found, jnp.abs(x) <= quantizer.threshold(x))


@pytest.mark.parametrize("shape", [(0, 8, 8, 3), (4, 0), (0,), (300, 0, 5)])
@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel()])
@pytest.mark.parametrize("clipping", [Octav(), AbsMax()])
def test_of_nothing_becomes_nothing(shape, granularity, clipping):
    quantizer = Quantizer(Int(4, signed=None), granularity, clipping)
    assert quantizer(jnp.zeros(shape), 0).shape == shape


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(), PerVector(4), PerShard(2)])
def test_stacks_of_quantised_arrays_are_not_taken_for_one(granularity):
    x = jax.random.normal(jax.random.key(0), (8, 8, 8))
    quantizer = Quantizer(Int(8, narrow=True), granularity, AbsMax())

    def quantized(x):
        return quantize(x, quantizer, channel_axis=0, vector_axis=1)

    mapped = jax.vmap(quantized)(x)
    _, scanned = jax.lax.scan(lambda carry, x: (carry, quantized(x)), 0, x)
    expected = jnp.stack([dequantize(quantized(each)) for each in x])
    for stacked in (mapped, scanned):
        with pytest.raises(ValueError, match=r"use jax\.vmap\(dequantize\)"):
            dequantize(stacked)
        np.testing.assert_array_equal(jax.vmap(dequantize)(stacked), expected)
