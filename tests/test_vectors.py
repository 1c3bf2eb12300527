"""Vectors inside operations: which elements of which operand share a scale."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qat_jax as qj
from qat_jax import ops

V4 = qj.Quantizer(qj.Int(3, narrow=True), qj.PerVector(4), qj.AbsMax())


def test_dot_general_cuts_the_contracted_dimension():
    x, w = jax.random.normal(jax.random.key(0), (5, 10)), jnp.ones((10, 3))
    w = w * jax.random.normal(jax.random.key(1), w.shape)
    dims = (((1,), (0,)), ((), ()))
    y = qj.dot_general(x, w, dims, lhs=V4, rhs=V4)
    np.testing.assert_allclose(y, V4(x, vector_axis=1) @ V4(w, vector_axis=0), rtol=1e-6)


def test_einsum_cuts_the_same_dimension_of_both():
    seen = []

    def spy(x, channel_axis, vector_axis):
        seen.append((channel_axis, vector_axis))
        return x

    a, b = jnp.ones((2, 3, 4, 5)), jnp.ones((2, 6, 5, 4))
    qj.einsum("bqhd,bkdh->bqk", a, b, lhs=spy, rhs=spy)
    assert seen == [((0, 1), (3,)), ((0, 1), (2,))]
    seen.clear()
    qj.einsum("i,j->ij", a[0, 0, 0], b[0, 0, 0], lhs=spy, rhs=spy)
    assert seen == [((0,), None), ((0,), None)]


def test_convolutions_cut_the_input_features():
    x, w = (
        jax.random.normal(jax.random.key(i), shape)
        for i, shape in enumerate([(2, 6, 6, 10), (3, 3, 10, 4)])
    )
    arguments = {"window_strides": (1, 1), "padding": "SAME"}
    layout = ("NHWC", "HWIO", "NHWC")
    y = qj.conv_general_dilated(x, w, dimension_numbers=layout, **arguments, lhs=V4, rhs=V4)
    expected = jax.lax.conv_general_dilated(
        V4(x, vector_axis=3), V4(w, vector_axis=2), dimension_numbers=layout, **arguments
    )
    np.testing.assert_array_equal(y, expected)


def test_vectors_stay_within_a_feature_group():
    x, w = jnp.ones((1, 4, 4, 12)), jnp.ones((1, 1, 6, 8))
    x = x * jnp.arange(1.0, 13) ** 2
    y = qj.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=2, lhs=V4,
    )  # fmt: skip
    halves = [V4(half, vector_axis=3).sum(-1) for half in (x[..., :6], x[..., 6:])]
    np.testing.assert_allclose(y[..., 0], halves[0])
    np.testing.assert_allclose(y[..., 4], halves[1])


def test_depthwise_kernels_have_vectors_through_their_window():
    w = jax.random.normal(jax.random.key(0), (3, 3, 1, 8)) * jnp.arange(1.0, 9)
    layer = nnx.Conv(8, 8, (3, 3), feature_group_count=8, use_bias=False, rngs=nnx.Rngs(0))
    layer.kernel[...] = w
    x = jax.random.normal(jax.random.key(1), (2, 5, 5, 8))
    wide = qj.Quantizer(qj.Int(3, narrow=True), qj.PerVector(16), qj.AbsMax())
    channel = qj.Quantizer(qj.Int(3, narrow=True), qj.PerChannel(), qj.AbsMax())
    model = qj.quantize_model(layer, qj.Policy([qj.Rule(".*", weights=wide)]))
    layer.kernel[...] = channel(w, channel_axis=3)
    # Depthwise products are summed in another order where they are quantised.
    np.testing.assert_allclose(model(x), layer(x), rtol=1e-4, atol=1e-5)
    # A scale for each element would have changed nothing.
    assert not np.allclose(layer.kernel[...], w)


@pytest.mark.parametrize("transposed", [False, True])
def test_every_layer_type_takes_vectors(transposed):
    rngs = nnx.Rngs(0)
    model = nnx.Dict(
        conv=nnx.ConvTranspose(6, 4, (3,), transpose_kernel=transposed, rngs=rngs),
        attention=nnx.MultiHeadAttention(2, 6, decode=False, rngs=rngs),
        general=nnx.LinearGeneral((2, 3), (5,), axis=(-2, -1), rngs=rngs),
        einsum=nnx.Einsum("abc,cd->abd", (6, 4), rngs=rngs),
    )
    policy = qj.Policy.from_notation("4/4/4/6", vector_size=4)
    model = qj.quantize_model(model, policy)
    x = jax.random.normal(jax.random.key(0), (2, 5, 6))
    for name, y in [
        ("conv", model.conv(x)),
        ("attention", model.attention(x)),
        ("general", model.general(x.reshape(2, 5, 2, 3))),
        ("einsum", model.einsum(x)),
    ]:
        assert jnp.isfinite(y).all(), name


def test_a_transposed_kernel_is_cut_along_its_input_features():
    layer = nnx.ConvTranspose(8, 3, (2,), transpose_kernel=True, use_bias=False, rngs=nnx.Rngs(0))
    model = qj.quantize_model(layer, qj.Policy([qj.Rule(".*", weights=V4)]))
    x = jnp.ones((1, 4, 8))
    assert layer.kernel.shape == (2, 3, 8)
    y = model(x)
    layer.kernel[...] = V4(layer.kernel[...], vector_axis=2)
    np.testing.assert_array_equal(y, layer(x))


def test_operand_axes_of_implicit_output():
    left, right = ops.operand_axes("ij,jk", 2, 2)
    assert left == ((0,), (1,))
    assert right == ((1,), (0,))
