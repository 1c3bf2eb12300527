import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qat_jax import Float, Int


@pytest.mark.parametrize(
    ("format", "codes", "steps"),
    [
        (Int(2), (-2, 1), 2),
        (Int(4), (-8, 7), 8),
        (Int(4, narrow=True), (-7, 7), 7),
        (Int(4, signed=False), (0, 15), 16),
        (Int(4, signed=False, narrow=True), (0, 15), 15),
        (Int(8), (-128, 127), 128),
        (Int(16), (-32768, 32767), 32768),
    ],
)
def test_codes_and_steps(format, codes, steps):
    grid = format.grid(jnp.zeros(1))
    assert (grid.low, grid.high) == codes
    assert grid.steps == steps
    info = np.iinfo(format.code_dtype)
    assert info.min <= codes[0]
    assert codes[1] <= info.max


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8, 16])
@pytest.mark.parametrize("narrow", [False, True])
def test_sign_picked_from_the_data(bits, narrow):
    auto = Int(bits, signed=None, narrow=narrow)
    for x, signed in [([0.0, 1.0], False), ([-1e-30, 1.0], True), ([-0.0, 0.0], False)]:
        want = Int(bits, signed, narrow).grid(jnp.array(x))
        assert [float(v) for v in auto.grid(jnp.array(x))] == list(want)
    info = np.iinfo(auto.code_dtype)
    assert info.min <= -(2 ** (bits - 1))
    assert info.max >= 2**bits - 1


def test_rounding_is_to_even_and_saturates():
    grid = Int(3).grid(jnp.zeros(1))
    codes = grid.round(jnp.array([-9.0, -1.5, -0.5, 0.5, 1.5, 2.5, 9.0, jnp.nan]))
    np.testing.assert_array_equal(codes, [-4, -2, 0, 0, 2, 2, 3, np.nan])


@pytest.mark.parametrize(
    ("format", "ties", "even"),
    [
        (Int(4), [-1.5, 0.5, 1.5, 2.5], [-2, 0, 2, 2]),
        (Int(16), [-32765.5, 32765.5, 32766.5], [-32766, 32766, 32766]),
        (Float(2, 1), [0.25, 1.25, 2.5, 5.0], [0, 1, 2, 4]),
    ],
)
def test_the_last_bits_of_float64_break_no_tie(format, ties, even):
    with jax.enable_x64(True):
        ties = jnp.asarray(ties, jnp.float64)
        grid = format.grid(ties)
        for beside in (-1e-12, 0, 1e-12):
            found = grid.round(ties * (1 + beside))
            assert found.dtype == jnp.float64
            np.testing.assert_array_equal(found, even)
        # What float32 can tell from a tie is none.
        assert (grid.round(ties * (1 - 1e-6)) != grid.round(ties * (1 + 1e-6))).all()


def test_formats_that_are_equal_are_alike():
    for signed in (0, False, np.False_):
        assert repr(Int(np.int64(4), signed)) == repr(Int(4, signed=False))
    assert repr(Int(4, 1, np.True_)) == repr(Int(4, signed=True, narrow=True))


@pytest.mark.parametrize("bits", [0, 1, 17, 32, 4.5, 4.0])
def test_impossible_widths_are_refused(bits):
    with pytest.raises(ValueError, match="2 to 16"):
        Int(bits)


def test_impossible_sign_is_refused():
    with pytest.raises(ValueError, match="signed is True, False or None"):
        Int(4, signed="yes")
