import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qat_jax as qj
from qat_jax import integer

DOT = [
    ((5, 7, 35), (35, 9), (((2,), (0,)), ((), ()))),
    ((3, 4, 20), (4, 20, 3, 6), (((1, 2), (0, 1)), ((0,), (2,)))),
    ((4, 3), (4, 5), (((0,), (0,)), ((), ()))),
]
EINSUM = [
    ("...qhd,...khd->...hqk", (2, 5, 3, 20), (2, 6, 3, 20)),
    ("...hqk,...khd->...qhd", (2, 3, 5, 6), (2, 6, 3, 4)),
    ("ab,...bc", (5, 17), (2, 17, 3)),
    ("bi,ij->jb", (2, 33), (33, 4)),
]
IMAGE = ("NHWC", "HWIO", "NHWC")
CONVOLUTIONS = {
    "strided": ((2, 9, 8, 20), (3, 2, 20, 6), {"window_strides": (2, 1), "padding": "SAME"}),
    "dilated": (
        (2, 9, 8, 20),
        (3, 2, 20, 6),
        {
            "window_strides": (1, 2),
            "padding": ((1, 0), (0, -1)),
            "lhs_dilation": (1, 2),
            "rhs_dilation": (2, 1),
        },
    ),
    "grouped": (
        (2, 6, 5, 40),
        (3, 3, 20, 6),
        {"window_strides": (1, 1), "padding": "SAME", "feature_group_count": 2},
    ),
    "depthwise": (
        (2, 6, 5, 20),
        (3, 3, 1, 20),
        {"window_strides": (2, 2), "padding": "SAME", "feature_group_count": 20},
    ),
}
NOTATIONS = ["3/3", "4/4U/-/-", "4/4/4/4", "4/3U/-/4", "3/4/4/-"]


def quantizers(notation):
    rule = qj.Policy.from_notation(notation).rules[-1]
    return {"lhs": rule.activations, "rhs": rule.weights}


def in_integers(quantizer, x, channel_axis, vector_axis, unscaled=False):
    q = qj.quantize(x, quantizer, channel_axis=channel_axis, vector_axis=vector_axis)
    operand = integer.Operand.of(q, quantizer.scale.bits)
    if unscaled:
        operand = dataclasses.replace(operand, outer=jnp.ones_like(operand.outer))
    return operand


def code_times_scale(quantizer, x, channel_axis, vector_axis):
    operand = in_integers(quantizer, x, channel_axis, vector_axis)
    value = operand.codes * (1 if operand.scale is None else operand.scale.astype(jnp.int32))
    return value.astype(jnp.float32)


def compare(operation, integer_operation, x_shape, w_shape, notation):
    """Exactly without the last multiplication, to rounding with it."""
    x, w = (
        jax.random.normal(key, shape)
        for key, shape in zip(jax.random.split(jax.random.key(0)), (x_shape, w_shape), strict=True)
    )
    if "U" in notation:
        x = jax.nn.relu(x)
    by_operand = quantizers(notation)

    @jax.jit  # all four in one program, which quantises each operand once
    def compute(x, w):
        def operands(role, **options):
            return {k: functools.partial(role, q, **options) for k, q in by_operand.items()}

        return (
            # Their sums stay below 2**24, so that float32 has them all.
            operation(x, w, **operands(code_times_scale)),
            integer_operation(x, w, **operands(in_integers, unscaled=True)),
            operation(x, w, **by_operand, precision="highest"),
            integer_operation(x, w, **operands(in_integers)),
        )

    expected, unscaled, simulated, found = (np.asarray(y) for y in compute(x, w))
    assert np.abs(expected).max() > 10
    assert unscaled.dtype == found.dtype == np.float32
    np.testing.assert_array_equal(unscaled, expected)
    tolerance = 1e-6 * float(np.abs(simulated).max())
    np.testing.assert_allclose(found, simulated, rtol=1e-6, atol=tolerance)


@pytest.mark.parametrize(("x", "w", "dimension_numbers"), DOT)
@pytest.mark.parametrize("notation", NOTATIONS)
def test_dot_general_is_the_simulated_one(x, w, dimension_numbers, notation):
    operations = (
        functools.partial(f, dimension_numbers=dimension_numbers)
        for f in (qj.dot_general, integer.dot_general)
    )
    compare(*operations, x, w, notation)


@pytest.mark.parametrize(("subscripts", "x", "w"), EINSUM)
@pytest.mark.parametrize("notation", ["3/3", "4/4/4/4"])
def test_einsum_is_the_simulated_one(subscripts, x, w, notation):
    operations = (functools.partial(f, subscripts) for f in (qj.einsum, integer.einsum))
    compare(*operations, x, w, notation)


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("notation", NOTATIONS)
def test_a_convolution_is_the_simulated_one(name, notation):
    x, w, options = CONVOLUTIONS[name]
    operations = (
        functools.partial(f, dimension_numbers=IMAGE, **options)
        for f in (qj.conv_general_dilated, integer.conv_general_dilated)
    )
    compare(*operations, x, w, notation)


def test_a_convolution_of_another_layout_is_the_simulated_one():
    operations = (
        functools.partial(
            f,
            window_strides=(1, 2),
            padding="VALID",
            dimension_numbers=("CNWH", "OIWH", "NWCH"),
        )
        for f in (qj.conv_general_dilated, integer.conv_general_dilated)
    )
    compare(*operations, (20, 2, 6, 7), (4, 20, 3, 2), "4/4/4/4")


def test_an_axis_of_one_operand_alone_is_not_summed_up():
    lhs = rhs = functools.partial(in_integers, qj.Quantizer(qj.Int(4)))
    x, w = jnp.ones((2, 3)), jnp.ones((2, 4))
    with pytest.raises(ValueError, match="an axis of one operand alone"):
        integer.einsum("ab,ac->c", x, w, lhs=lhs, rhs=rhs)


@pytest.mark.parametrize(
    ("quantizer", "message"),
    [
        (qj.preset("nvfp4").rules[-1].weights, "codes are floating-point"),
        (qj.Quantizer(qj.Int(4), qj.PerVector(2)), "scale=IntScale"),
        (qj.preset("mxint8").rules[-1].weights, "scale=IntScale"),
    ],
)
def test_what_has_no_integer_datapath_is_refused(quantizer, message):
    with pytest.raises(ValueError, match=message):
        in_integers(quantizer, jnp.ones((4, 64)), 0, 1)
