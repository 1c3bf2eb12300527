import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qat_jax import Float, Int
from qat_jax.integer import pack_bits, unpack_bits


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_every_short_sequence_comes_back_from_the_bytes_it_takes(bits):
    for length in range(4):
        every = np.array(list(itertools.product(range(2**bits), repeat=length)), np.uint8)
        packed = jax.vmap(lambda numbers: pack_bits(numbers, bits))(every)
        assert packed.shape == (len(every), -(-length * bits // 8))
        assert len(np.unique(packed, axis=0)) == len(every)
        back = jax.vmap(lambda stored, n=length: unpack_bits(stored, bits, (n,)))(packed)
        np.testing.assert_array_equal(back, every)


@settings(max_examples=25)
@given(st.integers(1, 16), st.integers(0, 40), st.integers(0, 2**32 - 1))
def test_the_stream_is_that_of_python_integers(bits, size, seed):
    numbers = np.random.default_rng(seed).integers(0, 2**bits, size)
    stream = sum(int(n) << (bits * i) for i, n in enumerate(numbers))
    packed = pack_bits(jnp.asarray(numbers, jnp.uint16), bits)
    assert bytes(np.asarray(packed)) == stream.to_bytes(-(-size * bits // 8), "little")
    assert unpack_bits(packed, bits, (size,)).tolist() == numbers.tolist()


def test_shapes_are_kept_and_wrong_ones_refused():
    packed = pack_bits(jnp.arange(6).reshape(2, 3), 3)
    assert unpack_bits(packed, 3, (2, 3)).tolist() == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(ValueError, match="7 numbers of 4 bits take 4 bytes"):
        unpack_bits(packed, 4, (7,))
    with pytest.raises(ValueError, match="1 to 16 bits"):
        pack_bits(jnp.arange(6), 17)


@pytest.mark.parametrize("bits", range(2, 17))
@pytest.mark.parametrize("signed", [True, False])
def test_every_integer_code_has_a_pattern_of_its_own(bits, signed):
    format = Int(bits, signed=signed)
    grid = format.grid(jnp.zeros(1))
    codes = np.arange(int(grid.low), int(grid.high) + 1).astype(format.code_dtype)
    patterns = np.asarray(jax.jit(format.to_bits)(codes))
    assert sorted(patterns.tolist()) == list(range(2**bits))
    assert patterns[codes.tolist().index(0)] == 0
    back = jax.jit(format.from_bits)(patterns)
    assert back.dtype == format.code_dtype
    np.testing.assert_array_equal(back, codes)


def test_a_sign_picked_at_run_time_has_no_pattern():
    with pytest.raises(ValueError, match="signed=True or signed=False"):
        Int(4, signed=None).to_bits(jnp.zeros(1))


@pytest.mark.parametrize(
    "format", [Float(2, 1), Float(2, 3), Float(3, 2), Float(4, 3), Float(5, 2)]
)
def test_floats_have_the_patterns_of_the_standard(format):
    bits = format.bits
    patterns = jnp.arange(2**bits, dtype=jnp.uint16)
    exponents = (patterns >> format.mantissa) & (2**format.exponent - 1)
    mantissas = patterns & (2**format.mantissa - 1)
    bias = 2 ** (format.exponent - 1) - 1
    value = np.where(
        exponents == 0,
        2.0 ** (1 - bias) * mantissas / 2**format.mantissa,
        2.0 ** (exponents.astype(int) - bias) * (1 + mantissas / 2**format.mantissa),
    )
    value = np.where(patterns >> (bits - 1) == 1, -value, value)
    finite = np.abs(value) <= format.grid(jnp.zeros(1)).high
    assert finite.sum() >= 2**bits - 8
    decoded = format.from_bits(patterns[finite]).astype(jnp.float32)
    np.testing.assert_array_equal(decoded, value[finite])
    np.testing.assert_array_equal(format.to_bits(decoded), patterns[finite])
