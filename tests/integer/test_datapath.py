import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qat_jax.integer import Datapath, Operand, contract


def operand(codes, scale, *, code_bits, scale_bits, vector_size, unsigned=False):
    return Operand(
        codes=jnp.asarray(codes),
        scale=None if scale is None else jnp.asarray(scale),
        outer=jnp.ones((1,) * codes.ndim),
        vector_size=0 if scale is None else vector_size,
        code_bits=code_bits,
        unsigned=unsigned,
        scale_bits=0 if scale is None else scale_bits,
    )


def codes_of(rng, bits, unsigned, shape):
    low, high = (0, 2**bits) if unsigned else (-(2 ** (bits - 1)), 2 ** (bits - 1))
    return rng.choice(np.array([low, high - 1, *range(low, high)]), shape).astype(np.int32)


def vector_scales(rng, bits, shape, axis, size):
    """One number a vector, spread over its elements."""
    count = -(-shape[axis] // size)
    few = tuple(count if a == axis else n for a, n in enumerate(shape))
    scales = rng.integers(0, 2**bits, few) | rng.integers(0, 2, few) * (2**bits - 1)
    return np.take(np.repeat(scales, size, axis), range(shape[axis]), axis).astype(np.int32)


def exact(accumulator):
    high, low = (None if x is None else np.asarray(x, np.int64) for x in accumulator)
    return high if low is None else high * 2**20 + low


@settings(max_examples=25)
@given(
    bits=st.tuples(st.integers(2, 8), st.integers(2, 8)),
    unsigned=st.tuples(st.booleans(), st.booleans()),
    scale_bits=st.tuples(st.sampled_from([0, 3, 6, 8]), st.sampled_from([0, 4, 8])),
    sizes=st.tuples(*[st.integers(1, 3)] * 4),
    depth=st.integers(1, 21),
    vector_size=st.sampled_from([1, 4, 16]),
    seed=st.integers(0, 2**31 - 1),
)
def test_sums_are_those_of_python(bits, unsigned, scale_bits, sizes, depth, vector_size, seed):
    rng = np.random.default_rng(seed)
    batch, rows, positions, columns = sizes
    shapes = (batch, rows, positions, depth), (batch, positions, depth, columns)
    codes = [codes_of(rng, b, u, s) for b, u, s in zip(bits, unsigned, shapes, strict=True)]
    scales = [
        vector_scales(rng, b, s, axis, vector_size) if b else None
        for b, s, axis in zip(scale_bits, shapes, (3, 2), strict=True)
    ]
    x, w = (
        operand(c, s, code_bits=b, scale_bits=m, vector_size=vector_size, unsigned=u)
        for c, s, b, m, u in zip(codes, scales, bits, scale_bits, unsigned, strict=True)
    )
    summed = contract(x, w, Datapath())
    values = [
        c.astype(np.int64) * (1 if s is None else s) for c, s in zip(codes, scales, strict=True)
    ]
    expected = np.einsum("bmpk,bpkn->bmn", *values)
    np.testing.assert_array_equal(exact(summed.accumulator), expected)
    assert summed.widths.dropped == 0
    assert np.abs(expected).max() < 2 ** (summed.widths.accumulator - 1)


@pytest.mark.parametrize("negative", [True, False])
def test_a_sign_that_the_codes_themselves_tell_is_found(negative):
    rng = np.random.default_rng(0)
    x = codes_of(rng, 8, not negative, (1, 4, 2, 30))
    w = codes_of(rng, 8, False, (1, 2, 30, 5))
    left = operand(x, None, code_bits=8, scale_bits=0, vector_size=0, unsigned=None)
    right = operand(w, None, code_bits=8, scale_bits=0, vector_size=0)
    found = jax.jit(lambda codes: contract(left.rearranged(lambda _: codes), right, Datapath())[0])
    np.testing.assert_array_equal(exact(found(x)), np.einsum("bmpk,bpkn->bmn", x, w))


def test_two_words_hold_the_largest_sums_there_can_be():
    shape = (1, 1, 8, 64)
    for sign in (1, -1):
        x = operand(
            np.full(shape, -128), np.full(shape, 255), code_bits=8, scale_bits=8, vector_size=64
        )
        w = operand(
            np.full((1, 8, 64, 1), -128 if sign > 0 else 127),
            np.full((1, 8, 64, 1), 255),
            code_bits=8,
            scale_bits=8,
            vector_size=64,
        )
        summed = contract(x, w, Datapath())
        assert summed.widths.accumulator > 32
        expected = 8 * 64 * 128 * (128 if sign > 0 else -127) * 255**2
        assert exact(summed.accumulator).item() == expected
        assert summed.to_float(np.float32).item() == np.float32(expected)


def test_scale_products_are_rounded_half_up_to_their_highest_bits():
    scales = np.arange(16)
    x = operand(
        np.ones((1, 16, 1, 1), int),
        scales.reshape(1, 16, 1, 1),
        code_bits=2,
        scale_bits=4,
        vector_size=1,
    )
    w = operand(
        np.ones((1, 1, 1, 16), int),
        scales.reshape(1, 1, 1, 16),
        code_bits=2,
        scale_bits=4,
        vector_size=1,
    )
    for bits in range(1, 9):
        summed = contract(x, w, Datapath(scale_product_bits=bits))
        dropped = 8 - bits
        products = np.outer(scales, scales)
        expected = np.minimum(np.floor(products / 2**dropped + 0.5), 2**bits - 1)
        np.testing.assert_array_equal(exact(summed.accumulator)[0], expected)
        np.testing.assert_array_equal(summed.to_float(np.float32)[0], expected * 2**dropped)
        assert summed.widths.scale_product == bits


def test_widths_are_the_papers_or_less():
    shape, kernel = (1, 1, 1, 64), (1, 1, 64, 1)
    for bits, scale_bits in [(4, 4), (8, 6), (6, 3)]:
        x = operand(
            np.zeros(shape, int),
            np.zeros(shape, int),
            code_bits=bits,
            scale_bits=scale_bits,
            vector_size=16,
        )
        w = operand(
            np.zeros(kernel, int),
            np.zeros(kernel, int),
            code_bits=bits,
            scale_bits=scale_bits,
            vector_size=16,
        )
        widths = contract(x, w, Datapath()).widths
        assert widths.product == 2 * bits
        assert widths.dot == 2 * bits + 4
        assert widths.full_scale_product == 2 * scale_bits
        assert widths.accumulator <= 2 * bits + 4 + 2 * scale_bits + 2


def test_an_accumulator_that_can_overflow_is_refused_before_it_does():
    x = operand(np.ones((1, 1, 1, 64), int), None, code_bits=4, scale_bits=0, vector_size=0)
    w = operand(np.ones((1, 1, 64, 1), int), None, code_bits=4, scale_bits=0, vector_size=0)
    needed = contract(x, w, Datapath()).widths.accumulator
    assert needed == 14  # 64 times 64, and a sign
    contract(x, w, Datapath(accumulator_bits=needed))
    with pytest.raises(ValueError, match="an accumulator of 13 bits can overflow, 14 cannot"):
        contract(x, w, Datapath(accumulator_bits=needed - 1))
    wide = [dataclasses.replace(o, code_bits=16) for o in (x, w)]
    with pytest.raises(ValueError, match="the sum needs 38 bits"):
        contract(*wide, Datapath())


def test_sums_that_two_words_cannot_hold_are_refused():
    shapes = (1, 1, 1, 16), (1, 1, 16, 1)
    ones = [np.ones(shape, int) for shape in shapes]
    x, w = (operand(o, o, code_bits=8, scale_bits=16, vector_size=16) for o in ones)
    with pytest.raises(ValueError, match="store scales in fewer bits"):
        contract(x, w, Datapath())
    x, w = (operand(o, o, code_bits=8, scale_bits=12, vector_size=16) for o in ones)
    with pytest.raises(ValueError, match="use fewer bits"):
        contract(x, w, Datapath())
    assert contract(x, w, Datapath(scale_product_bits=8)).widths.dropped == 16


def test_vectors_of_two_sizes_do_not_meet():
    shapes = (1, 1, 1, 16), (1, 1, 16, 1)
    x, w = (
        operand(np.ones(s, int), np.ones(s, int), code_bits=4, scale_bits=4, vector_size=v)
        for s, v in zip(shapes, (8, 16), strict=True)
    )
    with pytest.raises(ValueError, match="same size"):
        contract(x, w, Datapath())


def test_a_width_is_at_least_a_bit():
    with pytest.raises(ValueError, match="scale_product_bits is at least 1 bit"):
        Datapath(scale_product_bits=0)


def test_narrow_codes_are_counted_as_narrow():
    """127² · 512 < 2**23 where 128² · 512 is not."""
    codes = np.full((1, 1, 1, 512), 127), np.full((1, 1, 512, 1), 127)
    wide = [operand(c, None, code_bits=8, scale_bits=0, vector_size=0) for c in codes]
    narrow = [dataclasses.replace(x, narrow=True) for x in wide]
    datapath = Datapath(accumulator_bits=24)
    assert exact(contract(*narrow, datapath)[0]).item() == 127**2 * 512
    with pytest.raises(ValueError, match="24 bits"):
        contract(*wide, datapath)


def test_nothing_times_something_is_nothing():
    x = operand(np.zeros((1, 0, 1, 7)), None, code_bits=8, scale_bits=0, vector_size=0)
    w = operand(np.ones((1, 1, 7, 3)), None, code_bits=8, scale_bits=0, vector_size=0)
    assert contract(x, w, Datapath())[0].high.shape == (1, 0, 3)
