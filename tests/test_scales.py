import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qat_jax as qj
from tests.vsquant_reference import two_level


def vector_quantizer(scale, *, bits=4, size=4, signed=True, format=None, **options):
    format = qj.Int(bits, signed=signed, narrow=True) if format is None else format
    return qj.Quantizer(format, qj.PerVector(size), qj.AbsMax(), scale=scale, **options)


@settings(max_examples=25)
@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 40),
    size=st.sampled_from([1, 2, 3, 7, 16, 64]),
    bits=st.sampled_from([2, 3, 4, 8]),
    scale_bits=st.sampled_from([2, 4, 6, 10]),
    signed=st.booleans(),
    per_row=st.booleans(),
    codes=st.sampled_from(["float", "stored"]),
    seed=st.integers(0, 1000),
)
def test_two_levels_equal_the_equations(
    rows, columns, size, bits, scale_bits, signed, per_row, codes, seed
):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, columns)) * np.exp(rng.normal(0, 2, (rows, columns)))
    x[rng.random(x.shape) < 0.2] = 0
    coarse = qj.PerChannel() if per_row else qj.PerTensor()
    scale = qj.IntScale(scale_bits, coarse, codes=codes)
    quantizer = vector_quantizer(scale, bits=bits, size=size, signed=signed)
    expected, x_codes, stored, gamma = two_level(
        x,
        bits,
        scale_bits,
        size,
        signed=signed,
        coarse_axis=0 if per_row else None,
        codes=codes,
    )
    with jax.enable_x64(True):
        axes = {"channel_axis": 0, "vector_axis": 1}
        y = qj.fake_quant(jnp.asarray(x), quantizer, **axes)
        q = qj.quantize(jnp.asarray(x), quantizer, **axes)
        np.testing.assert_array_equal(jax.jit(qj.dequantize)(q), y)
    np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(q.codes, x_codes)
    np.testing.assert_array_equal(q.scale, stored)
    np.testing.assert_allclose(q.coarse, gamma, rtol=1e-12)


X = jnp.array([[10.0, -3.0, 0.0, 1.0, 0.01, -0.02, 0.0, 0.015, 0.0, 0.0, 0.0, 0.0]])


def test_a_scale_that_rounds_to_zero():
    paper = qj.fake_quant(X, vector_quantizer(qj.IntScale(4)), vector_axis=1)
    assert (paper[0, 4:] == 0).all()
    one = vector_quantizer(qj.IntScale(4, zero="one", codes="float"))
    q = qj.quantize(X, one, vector_axis=1)
    np.testing.assert_array_equal(q.scale, [[15, 1, 0]])  # a vector of zeros stays at 0
    assert (q.codes[0, 4:6] == jnp.array([4, -7])).all()


def test_coarse_first_clips_nothing():
    x = jax.random.normal(jax.random.key(0), (64, 32)) * jnp.arange(1, 65)[:, None]
    quantizer = vector_quantizer(qj.IntScale(3, order="coarse-first", codes="stored"), size=8)
    q = qj.quantize(x, quantizer, vector_axis=1)
    steps = q.scale * q.coarse
    largest = jnp.abs(x).reshape(64, 4, 8).max(-1)
    assert (steps * 7 >= largest * (1 - 1e-5)).all()
    assert ((steps - q.coarse) * 7 < largest * (1 + 1e-5)).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_short_scales_are_rounded_first(dtype):
    x = jax.random.normal(jax.random.key(0), (8, 16))
    q = qj.quantize(x, vector_quantizer(qj.FloatScale(dtype)), vector_axis=1)
    exact = np.abs(x).reshape(8, 4, 4).max(-1) / 7
    np.testing.assert_allclose(q.scale.astype(jnp.float32), exact, rtol=2**-8)
    assert q.scale.dtype == dtype
    step = np.repeat(np.asarray(q.scale, np.float64), 4, 1)
    expected = np.clip(np.round(np.asarray(x, np.float64) / step), -7, 7)
    assert (np.asarray(q.codes) != expected).mean() < 0.01  # ties of a float32 quotient
    np.testing.assert_array_equal(
        qj.dequantize(q), qj.fake_quant(x, vector_quantizer(qj.FloatScale(dtype)), vector_axis=1)
    )


OCP = {  # format, ml_dtypes' format, exponent of its largest number (MX specification, table 1)
    "mxfp4": (qj.Float(2, 1), ml_dtypes.float4_e2m1fn, 2),
    "mxfp6": (qj.Float(2, 3), ml_dtypes.float6_e2m3fn, 2),
    "mxfp6-e3m2": (qj.Float(3, 2), ml_dtypes.float6_e3m2fn, 4),
    "mxfp8": (qj.Float(4, 3), ml_dtypes.float8_e4m3fn, 8),
    "mxfp8-e5m2": (qj.Float(5, 2), ml_dtypes.float8_e5m2, 15),
}


def blocks():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((400, 32)) * 2.0 ** rng.integers(-40, 40, (400, 1))
    x[0] = 0
    x[1, 5:] = 0
    x[2] = -x[2]
    return x.astype(np.float32)


@pytest.mark.parametrize("name", OCP)
def test_microscaling_is_the_specification(name):
    format, dtype, emax = OCP[name]
    quantizer = qj.preset(name).rules[0].weights
    assert quantizer.format == format
    x = blocks()
    largest = np.abs(x).max(1, keepdims=True)
    exponent = np.floor(np.log2(np.where(largest > 0, largest, 1))) - emax
    scale = np.where(largest > 0, 2.0**exponent, 2.0**-127).astype(np.float32)
    high = np.float32(ml_dtypes.finfo(dtype).max)
    elements = np.clip(x / scale, -high, high).astype(dtype).astype(np.float32)
    y = qj.fake_quant(jnp.asarray(x), quantizer, vector_axis=1)
    np.testing.assert_array_equal(y, elements * scale)
    q = qj.quantize(jnp.asarray(x), quantizer, vector_axis=1)
    np.testing.assert_array_equal(q.scale.astype(jnp.float32)[1:], scale[1:])
    np.testing.assert_array_equal(qj.dequantize(q), y)


def test_mxint8_is_the_specification():
    x = blocks()
    largest = np.abs(x).max(1, keepdims=True)
    shared = 2.0 ** np.floor(np.log2(np.where(largest > 0, largest, 1)))
    expected = np.clip(np.round(x / shared * 64), -127, 127) / 64 * shared
    quantizer = qj.preset("mxint8").rules[0].weights
    np.testing.assert_array_equal(qj.fake_quant(jnp.asarray(x), quantizer, vector_axis=1), expected)


def test_nvfp4_equals_ml_dtypes():
    x = np.random.default_rng(0).standard_normal((16, 64)).astype(np.float32)
    x[3] *= 1e-4
    x[4] = 0
    quantizer = qj.preset("nvfp4").rules[0].weights
    q = qj.quantize(jnp.asarray(x), quantizer, vector_axis=1)
    largest = np.abs(x).reshape(16, 4, 16).max(-1)
    step = largest.astype(np.float64) / 6
    coarse = step.max() / 448
    np.testing.assert_allclose(np.ravel(q.coarse), [coarse], rtol=1e-6)
    expected = (step / coarse).astype(np.float32).astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(q.scale.astype(jnp.float32), expected.astype(np.float32))
    stored = np.repeat(expected.astype(np.float64) * coarse, 16, 1)
    quotient = np.divide(x, stored, out=np.zeros(x.shape), where=stored > 0)
    codes = np.clip(quotient, -6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    assert (np.asarray(q.codes, np.float32) != codes).mean() < 2e-3  # float32 against float64
    np.testing.assert_array_equal(
        qj.dequantize(q), qj.fake_quant(jnp.asarray(x), quantizer, vector_axis=1)
    )


@pytest.mark.parametrize("name", ["vsquant-4/4U/4/6", "nvfp4", "mxfp4", "mxfp8", "mxint8"])
def test_what_is_not_finite_is_not_hidden(name):
    quantizer = qj.preset(name).rules[0].weights
    for bad in (jnp.nan, jnp.inf, -jnp.inf):
        x = jnp.ones((2, 64)).at[0, 3].set(bad)
        axes = {"channel_axis": 0, "vector_axis": 1}
        y = qj.fake_quant(x, quantizer, **axes)
        assert jnp.isnan(y[0, :16]).all()
        restored = qj.dequantize(qj.quantize(x, quantizer, **axes))
        np.testing.assert_array_equal(jnp.isnan(restored), jnp.isnan(y))


@pytest.mark.parametrize("name", [*OCP, "mxint8"])
@pytest.mark.parametrize("exponent", range(-40, -31))
def test_finite_numbers_stay_finite(name, exponent):
    """However small: the scale of the least ones is subnormal, which a processor may flush to 0."""
    x = jnp.ones((2, 32)).at[0].set(10.0**exponent)
    quantizer = qj.preset(name).rules[0].weights
    y = qj.fake_quant(x, quantizer, vector_axis=1)
    assert jnp.isfinite(y).all()
    assert jnp.abs(y[0] - x[0]).max() <= max(x[0, 0], jnp.finfo(jnp.float32).tiny)
    np.testing.assert_array_equal(y[1], x[1])
    np.testing.assert_array_equal(qj.dequantize(qj.quantize(x, quantizer, vector_axis=1)), y)


def test_short_scales_have_a_largest_number():
    quantizer = qj.Quantizer(
        qj.Int(2, narrow=True), clipping=qj.AbsMax(), scale=qj.FloatScale("float16")
    )
    x = jnp.array([1e6, -2e5, 1e3])
    np.testing.assert_array_equal(qj.fake_quant(x, quantizer), [65504, -65504, 0])
    assert jnp.isnan(qj.fake_quant(x.at[0].set(jnp.inf), quantizer)).all()


@pytest.mark.parametrize("scale", [qj.IntScale(4), qj.E4M3(), qj.E8M0()])
def test_gradients_pass_through_stored_scales(scale):
    x = jax.random.normal(jax.random.key(0), (6, 20))
    for gradient in ("ste", "pwl", "mad"):
        quantizer = qj.Quantizer(
            qj.Int(4, narrow=True), qj.PerVector(8), qj.Octav(), gradient, scale
        )
        g = jax.grad(lambda x, q=quantizer: q(x, vector_axis=1).sum())(x)
        s = jnp.repeat(quantizer.threshold(x, vector_axis=1), 8, 1)[:, :20]
        clipped = jnp.abs(x) > s
        assert clipped.any()
        beyond = {"ste": jnp.ones_like(x), "pwl": jnp.zeros_like(x), "mad": s / jnp.abs(x)}
        np.testing.assert_allclose(g, jnp.where(clipped, beyond[gradient], 1), rtol=1e-6)


def test_transforms():
    quantizer = vector_quantizer(qj.IntScale(4, qj.PerChannel()), size=16)
    x = jax.random.normal(jax.random.key(0), (4, 8, 40))

    def one(x):
        return quantizer(x, channel_axis=0, vector_axis=1)

    expected = jnp.stack([one(part) for part in x])
    np.testing.assert_array_equal(jax.vmap(one)(x), expected)
    np.testing.assert_array_equal(jax.jit(jax.vmap(one))(x), expected)
    mesh = jax.make_mesh((1,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    mapped = jax.shard_map(jax.vmap(one), mesh=mesh, in_specs=jax.P("i"), out_specs=jax.P("i"))
    np.testing.assert_array_equal(jax.jit(mapped)(x), expected)
    q = jax.jit(lambda x: qj.quantize(x, quantizer, channel_axis=0, vector_axis=1))(x[0])
    np.testing.assert_array_equal(qj.dequantize(q), expected[0])


def test_the_sign_of_all_of_x_holds_for_shorter_last_vectors():
    x = jnp.abs(jax.random.normal(jax.random.key(0), (3, 20))).at[0, 0].set(-1)
    format = qj.Int(4, signed=None, narrow=True)
    auto = qj.Quantizer(format, qj.PerVector(16), qj.Octav())
    for y, signed in ((x, True), (jnp.abs(x), False)):
        plain = qj.Quantizer(qj.Int(4, signed=signed, narrow=True), qj.PerVector(16), qj.Octav())
        np.testing.assert_array_equal(auto(y, vector_axis=1), plain(y, vector_axis=1))


def test_wrong_options_name_the_right_ones():
    with pytest.raises(ValueError, match=r"IntScale\.codes is one of"):
        qj.IntScale(4, codes="exact")
    with pytest.raises(ValueError, match='needs codes="stored"'):
        qj.IntScale(4, order="coarse-first")
    shards = vector_quantizer(qj.IntScale(4, coarse=qj.PerShard(2)))
    with pytest.raises(ValueError, match=r"coarse is PerTensor\(\) or PerChannel\(\), not PerSh"):
        qj.fake_quant(jnp.ones((8, 8)), shards, vector_axis=1)
    with pytest.raises(ValueError, match="2 to 16 bits"):
        qj.IntScale(1)
    with pytest.raises(ValueError, match="float32, float16 or bfloat16"):
        qj.FloatScale("float8")
