import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import qat_jax as qj

W4 = qj.Quantizer(qj.Int(4), qj.PerChannel(), qj.Octav(), "mad")
A4 = qj.Quantizer(qj.Int(4, signed=None), qj.PerTensor(), qj.Octav(), "pwl")
KEYS = jax.random.split(jax.random.key(0), 4)


def quantized_by_hand(w, axes):
    return qj.fake_quant(w, W4, channel_axis=axes)


@pytest.mark.parametrize(
    ("dimensions", "x_shape", "w_shape", "w_channels"),
    [
        ((((1,), (0,)), ((), ())), (5, 6), (6, 7), (1,)),
        ((((1, 2), (0, 1)), ((), ())), (5, 6, 2), (6, 2, 7), (2,)),
        ((((2,), (1,)), ((0,), (0,))), (3, 5, 6), (3, 6, 7), (0, 2)),
    ],
)
def test_dot_general_knows_the_channels(dimensions, x_shape, w_shape, w_channels):
    x = jax.random.normal(KEYS[0], x_shape)
    w = jax.random.normal(KEYS[1], w_shape) * jnp.arange(1, w_shape[-1] + 1)
    y = qj.dot_general(x, w, dimensions, lhs=A4, rhs=W4)
    expected = lax.dot_general(A4(x), quantized_by_hand(w, w_channels), dimensions)
    np.testing.assert_allclose(y, expected, rtol=1e-6)
    per_row = qj.dot_general(x, w, dimensions, lhs=W4)
    free = tuple(a for a in range(x.ndim) if a not in dimensions[0][0])
    np.testing.assert_allclose(
        per_row, lax.dot_general(quantized_by_hand(x, free), w, dimensions), rtol=1e-6
    )


@pytest.mark.parametrize(
    ("layout", "x_shape", "w_shape", "w_axis"),
    [
        (("NHWC", "HWIO", "NHWC"), (2, 8, 8, 3), (3, 3, 3, 5), 3),
        (("NCHW", "OIHW", "NCHW"), (2, 3, 8, 8), (5, 3, 3, 3), 0),
        (None, (2, 3, 8, 8), (5, 3, 3, 3), 0),
    ],
)
def test_convolution_knows_the_output_channels(layout, x_shape, w_shape, w_axis):
    x, w = jax.random.normal(KEYS[0], x_shape), jax.random.normal(KEYS[1], w_shape)
    arguments = dict(window_strides=(2, 1), padding="SAME", dimension_numbers=layout)
    y = qj.conv_general_dilated(x, w, lhs=A4, rhs=W4, **arguments)
    expected = lax.conv_general_dilated(A4(x), quantized_by_hand(w, w_axis), **arguments)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


DEPTHWISE = dict(dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=6)


@pytest.mark.parametrize("padding", ["SAME", "VALID", ((0, 2), (1, 0)), ((-1, 2), (1, -1))])
@pytest.mark.parametrize(
    ("x_shape", "window", "strides"),
    [((2, 8, 8), (3, 3), (1, 1)), ((2, 9, 7), (3, 2), (2, 3)), ((1, 5, 5), (5, 1), (4, 1))],
)
def test_depthwise_convolution(x_shape, window, strides, padding):
    x = jax.random.normal(KEYS[0], (*x_shape, 6))
    w = jax.random.normal(KEYS[1], (*window, 1, 6))
    given = jax.random.normal(KEYS[2], (6,))
    arguments = dict(window_strides=strides, padding=padding, **DEPTHWISE)

    def outcome(convolution, x, w):
        y, transpose = jax.vjp(lambda x, w: convolution(x, w, **arguments), x, w)
        return y, *transpose(given * jnp.sin(y))

    found = jax.jit(lambda x, w: outcome(qj.conv_general_dilated, x, w))(x, w)
    expected = jax.jit(lambda x, w: outcome(lax.conv_general_dilated, x, w))(x, w)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_depthwise_kernels_have_a_scale_for_each_channel():
    x, w = jax.random.normal(KEYS[0], (2, 8, 8, 6)), jax.random.normal(KEYS[1], (3, 3, 1, 6))
    arguments = dict(window_strides=(1, 1), padding="SAME", **DEPTHWISE)
    y = qj.conv_general_dilated(x, w, rhs=W4, **arguments)
    expected = lax.conv_general_dilated(x, quantized_by_hand(w, 3), **arguments)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        dict(rhs_dilation=(2, 1)),
        dict(lhs_dilation=(2, 2), padding=((0, 1), (1, 0))),
        dict(dimension_numbers=("NCHW", "HWIO", "NCHW")),
        dict(feature_group_count=3),
    ],
)
def test_what_is_not_plainly_depthwise_is_left_to_jax(changes):
    arguments = dict(window_strides=(1, 1), padding="SAME") | DEPTHWISE | changes
    x = jax.random.normal(KEYS[0], (2, 6, 6, 6))
    w = jax.random.normal(KEYS[1], (3, 3, 6 // arguments["feature_group_count"], 6))
    y = qj.conv_general_dilated(x, w, **arguments)
    expected = lax.conv_general_dilated(x, w, **arguments)
    assert y.dtype == expected.dtype
    np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize(
    ("subscripts", "x_shape", "w_shape", "x_axes", "w_axes"),
    [
        ("ij,jk->ik", (3, 4), (4, 5), (0,), (1,)),
        ("ij,jk", (3, 4), (4, 5), (0,), (1,)),
        ("...qhd,...khd->...hqk", (2, 3, 4, 5), (2, 6, 4, 5), (0, 1, 2), (0, 1, 2)),
        ("...hqk, ...khd -> ...qhd", (2, 4, 3, 6), (2, 6, 4, 5), (0, 1, 2), (0, 2, 3)),
        ("bi,oi->bo", (2, 3), (4, 3), (0,), (0,)),
    ],
)
def test_einsum_knows_what_survives(subscripts, x_shape, w_shape, x_axes, w_axes):
    x, w = jax.random.normal(KEYS[0], x_shape), jax.random.normal(KEYS[1], w_shape)
    y = qj.einsum(subscripts, x, w, lhs=W4, rhs=W4)
    expected = jnp.einsum(subscripts, quantized_by_hand(x, x_axes), quantized_by_hand(w, w_axes))
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)


def test_einsum_of_more_operands_is_refused():
    with pytest.raises(ValueError, match="two operands here, 'i,j,k->ijk' names 3"):
        qj.einsum("i,j,k->ijk", jnp.ones(2), jnp.ones(2), lhs=A4)


def operations(x, w, **kwargs):
    conv = dict(window_strides=(1, 1), padding="VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    yield qj.dot_general(x, w, (((1,), (0,)), ((), ())), lhs=A4, rhs=W4, **kwargs)
    yield qj.einsum("ij,jk->ik", x, w, lhs=A4, rhs=W4, **kwargs)
    yield qj.conv_general_dilated(x[:, None, None], w[None, None], lhs=A4, rhs=W4, **conv, **kwargs)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_types_are_honoured(dtype):
    x, w = jnp.ones((3, 4), dtype), jnp.ones((4, 5), dtype)
    for y in operations(x, w):
        assert y.dtype == dtype
    for y in operations(x, w, preferred_element_type=jnp.float32):
        assert y.dtype == jnp.float32


def test_precision_and_accumulator_reach_the_operation():
    def text(**kwargs):
        program = jax.make_jaxpr(lambda x, w: list(operations(x, w, **kwargs)))
        return str(program(jnp.ones((3, 4), jnp.bfloat16), jnp.ones((4, 5), jnp.bfloat16)))

    assert text(precision="highest").count("HIGHEST") >= 3
    assert "HIGHEST" not in text()
    assert text(preferred_element_type=jnp.float32).count("preferred_element_type=float32") == 3


def test_out_sharding_reaches_the_operation():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        x, w = jnp.ones((3, 4)), jnp.ones((4, 5))
        spec = jax.P("data", None)
        out = jax.jit(
            lambda x, w: qj.dot_general(
                x, w, (((1,), (0,)), ((), ())), lhs=A4, rhs=W4, out_sharding=spec
            )
        )(x, w)
        assert jax.typeof(out).sharding.spec == spec
        out = jax.jit(lambda x, w: qj.einsum("ij,jk->ik", x, w, rhs=W4, out_sharding=spec))(x, w)
        assert jax.typeof(out).sharding.spec == spec


def test_without_quantisers_they_are_the_plain_operations():
    x, w = jax.random.normal(KEYS[0], (3, 4)), jax.random.normal(KEYS[1], (4, 5))
    dimensions = (((1,), (0,)), ((), ()))
    np.testing.assert_array_equal(qj.dot_general(x, w, dimensions), x @ w)


def test_gradients_reach_both_operands():
    x, w = jax.random.normal(KEYS[0], (3, 4)), jax.random.normal(KEYS[1], (4, 5))
    dimensions = (((1,), (0,)), ((), ()))

    def loss(x, w):
        return jnp.sum(qj.dot_general(x, w, dimensions, lhs=A4, rhs=W4) ** 2)

    gx, gw = jax.grad(loss, (0, 1))(x, w)
    s = A4.threshold(x)
    y = A4(x) @ quantized_by_hand(w, 1)
    expected = (2 * y @ quantized_by_hand(w, 1).T) * (jnp.abs(x) <= s)
    np.testing.assert_allclose(gx, expected, rtol=1e-5, atol=1e-5)
    sw = W4.threshold(w, 1)
    expected = (A4(x).T @ (2 * y)) * jnp.minimum(1, sw / jnp.abs(w))
    np.testing.assert_allclose(gw, expected, rtol=1e-5, atol=1e-5)
