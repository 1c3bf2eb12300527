"""Number formats: which codes exist and how a real number is rounded to one.

A format knows no scale. It describes codes on an axis on which the clipping threshold s lies at
``steps``; the quantiser multiplies by s / steps to come back.
"""

import dataclasses
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike, DTypeLike

_BITS = range(2, 17)


class Format(Protocol):
    """What the library asks of a number format."""

    @property
    def bits(self) -> int:
        """Bits a code."""
        ...

    @property
    def code_dtype(self) -> DTypeLike:
        """The narrowest dtype that holds every code."""
        ...

    @property
    def midpoints(self) -> np.ndarray:
        """The positive numbers that lie half-way between two codes of either sign, ascending."""
        ...

    def grid(self, x: jax.Array) -> "Grid | FloatGrid":
        """The codes for x: how to round to them, and L, the code that the threshold stands at."""
        ...

    def magnitude(self, x: jax.Array) -> jax.Array:
        """The part of x that the threshold limits."""
        ...

    def lower(self, threshold: jax.Array) -> jax.Array:
        """The least number that is not clipped at a threshold."""
        ...

    def to_bits(self, codes: jax.Array) -> jax.Array:
        """Codes as unsigned integers of so many bits, as they are stored."""
        ...

    def from_bits(self, patterns: jax.Array) -> jax.Array:
        """The codes that `to_bits` made patterns of, in ``code_dtype``."""
        ...


class Grid(NamedTuple):
    """The codes of a format: every integer from ``low`` to ``high``.

    Attributes:
      low: the lowest code; a float, or a scalar array where the sign is picked at run time.
      high: the highest code, likewise.
      steps: L, the number of steps between 0 and the threshold, likewise. In two's complement
        L = 2**(bits-1) has no code of its own on the positive side: s saturates at L - 1.
    """

    low: ArrayLike
    high: ArrayLike
    steps: ArrayLike

    def round(self, codes: jax.Array) -> jax.Array:
        """Round to the nearest code, ties to even, saturating; NaN stays NaN."""
        return jnp.clip(jnp.round(_with_ties(codes)), self.low, self.high)


def has_negative(x: jax.Array) -> jax.Array:
    """Whether any element of x lies below 0: bool []. Beside NaN it may say so of numbers above.

    By the minimum: XLA's CPU backend writes flags to memory before it asks for any of them, which
    takes three times as long.
    """
    return ~(jnp.min(x, initial=0) >= 0)


@dataclasses.dataclass(frozen=True)
class Int:
    """Integer codes of a given width.

    With B bits, the codes and L, the steps between 0 and the threshold, are

    | grid | codes | L |
    | --- | --- | --- |
    | signed | `-2**(B-1) … 2**(B-1) - 1` | `2**(B-1)` |
    | signed, narrow | `±(2**(B-1) - 1)` | `2**(B-1) - 1` |
    | unsigned | `0 … 2**B - 1` | `2**B` |
    | unsigned, narrow | `0 … 2**B - 1` | `2**B - 1` |

    The plain grids are those of OCTAV (arXiv:2206.06501, section 2): the threshold itself is one
    step beyond the highest code. On the narrow ones, those of VS-Quant (arXiv:2102.04503,
    section 4), the threshold is the highest code, and the signed grid is symmetric.

    Attributes:
      bits: 2 to 16.
      signed: whether negative numbers have codes. ``None`` picks at run time: unsigned where the
        whole array is non-negative (as after a ReLU), signed elsewhere.
      narrow: whether the threshold is itself a code.

    Example:
      >>> Int(4).grid(jnp.zeros(3))
      Grid(low=-8.0, high=7.0, steps=8.0)
      >>> Int(4, signed=False, narrow=True).grid(jnp.zeros(3))
      Grid(low=0.0, high=15.0, steps=15.0)
    """

    bits: int
    signed: bool | None = True
    narrow: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int | np.integer) or self.bits not in _BITS:
            raise ValueError(f"Int has 2 to 16 bits, not {self.bits!r}")
        if self.signed not in (True, False, None):
            raise ValueError(
                f"signed is True, False or None (pick from the data), not {self.signed!r}"
            )
        # NumPy's numbers and 0 and 1 become Python's: equal formats are to be alike in all they do.
        object.__setattr__(self, "bits", int(self.bits))
        object.__setattr__(self, "signed", None if self.signed is None else bool(self.signed))
        object.__setattr__(self, "narrow", bool(self.narrow))

    def grid(self, x: jax.Array) -> Grid:
        """The grid for x: of Python floats, or of scalar arrays where the sign depends on x."""
        if self.signed is not None:
            return self._grid(self.signed)
        negative = has_negative(x)
        return Grid(
            *(
                jnp.where(negative, s, u)
                for s, u in zip(self._grid(True), self._grid(False), strict=True)
            )
        )

    def magnitude(self, x: jax.Array) -> jax.Array:
        """The part of x that the threshold limits: |x|, or max(x, 0) where only x ≥ 0 has codes."""
        return jnp.maximum(x, 0) if self.signed is False else jnp.abs(x)

    def lower(self, threshold: jax.Array) -> jax.Array:
        """The least number that is not clipped at a threshold: -s, or 0 on an unsigned grid."""
        return jnp.zeros_like(threshold) if self.signed is False else -threshold

    @property
    def code_dtype(self) -> DTypeLike:
        """The narrowest NumPy integer that holds every code."""
        if self.signed is None:  # both ranges: one bit more than either
            return jnp.int8 if self.bits < 8 else jnp.int16 if self.bits < 16 else jnp.int32
        small = self.bits <= 8
        if self.signed:
            return jnp.int8 if small else jnp.int16
        return jnp.uint8 if small else jnp.uint16

    @property
    def midpoints(self) -> np.ndarray:
        """0.5, 1.5, … up to the middle between the two outermost codes of the longer side."""
        longest = 2 ** (self.bits - 1) if self.signed else 2**self.bits - 1
        return np.arange(longest - (self.signed is True and self.narrow)) + 0.5

    def to_bits(self, codes: jax.Array) -> jax.Array:
        """Two's complement in the format's width, in uint16.

        Raises:
          ValueError: the sign is picked at run time, so that no bit has it.
        """
        self._check_sign()
        return (codes.astype(jnp.int32) & (2**self.bits - 1)).astype(jnp.uint16)

    def from_bits(self, patterns: jax.Array) -> jax.Array:
        """The codes of such numbers; ValueError as of `to_bits`."""
        self._check_sign()
        codes = patterns.astype(jnp.int32)
        if self.signed:
            codes = jnp.where(codes >> (self.bits - 1) == 0, codes, codes - 2**self.bits)
        return codes.astype(self.code_dtype)

    def _check_sign(self) -> None:
        if self.signed is None:
            raise ValueError(
                "codes whose sign is picked at run time have no fixed width: "
                "replace the format by one with signed=True or signed=False"
            )

    def _grid(self, signed: bool) -> Grid:
        highest = 2.0 ** (self.bits - signed) - 1
        steps = highest if self.narrow else highest + 1
        return Grid(-steps if signed else 0.0, highest, steps)


class FloatGrid(NamedTuple):
    """The codes of a floating-point format: its own numbers, subnormal ones included.

    Attributes:
      high: the largest number; the lowest is its negative.
      min_exponent: the exponent of the smallest normal number.
      mantissa: explicit bits of the mantissa.
    """

    high: float
    min_exponent: int
    mantissa: int

    @property
    def low(self) -> float:
        """The lowest number."""
        return -self.high

    @property
    def steps(self) -> float:
        """L: the threshold is the largest number."""
        return self.high

    def round(self, codes: jax.Array) -> jax.Array:
        """Round to the nearest number, ties to an even mantissa, saturating; NaN stays NaN."""
        codes = jnp.clip(_with_ties(codes), -self.high, self.high)
        _, exponent = jnp.frexp(codes)  # |codes| = m 2**exponent with m in [0.5, 1)
        spacing = jnp.maximum(exponent - 1, self.min_exponent) - self.mantissa
        # Powers of two: neither product rounds.
        return _times_power_of_two(jnp.round(_times_power_of_two(codes, -spacing)), spacing)


@dataclasses.dataclass(frozen=True)
class Float:
    """Small floating-point numbers of the OCP formats: a sign, an exponent, a mantissa.

    | format | name | largest, smallest normal, least | specials |
    | --- | --- | --- | --- |
    | Float(2, 1) | E2M1 | 6, 1, 0.5 | none |
    | Float(2, 3) | E2M3 | 7.5, 1, 0.125 | none |
    | Float(3, 2) | E3M2 | 28, 0.25, 0.0625 | none |
    | Float(4, 3) | E4M3 | `448, 2**-6, 2**-9` | NaN, no infinity |
    | Float(5, 2) | E5M2 | `57344, 2**-14, 2**-16` | NaN, infinity |

    Numbers beyond the largest saturate. Source: OCP Microscaling Formats (MX) Specification 1.0,
    section 5.3, and OCP 8-bit Floating Point Specification 1.0.

    Attributes:
      exponent: bits of the exponent.
      mantissa: explicit bits of the mantissa.

    Example:
      >>> Float(2, 1).grid(jnp.zeros(1)).round(jnp.array([0.3, 2.5, 5.1, 100.0]))
      Array([0.5, 2. , 6. , 6. ], dtype=float32)
    """

    exponent: int
    mantissa: int

    def __post_init__(self) -> None:
        if (self.exponent, self.mantissa) not in _LARGEST:
            known = ", ".join(f"Float({e}, {m})" for e, m in _LARGEST)
            raise ValueError(
                f"there is no Float({self.exponent}, {self.mantissa}): choose one of {known}"
            )

    @property
    def bits(self) -> int:
        """Bits a code, with the sign's."""
        return 1 + self.exponent + self.mantissa

    def grid(self, x: jax.Array) -> FloatGrid:
        """The numbers of the format, whatever x."""
        del x
        return self._grid

    def magnitude(self, x: jax.Array) -> jax.Array:
        """|x|."""
        return jnp.abs(x)

    def lower(self, threshold: jax.Array) -> jax.Array:
        """-s."""
        return -threshold

    @property
    def code_dtype(self) -> DTypeLike:
        """E5M2 or E4M3: the latter holds all shorter formats, which JAX cannot compute with."""
        return jnp.float8_e5m2 if self.exponent == 5 else jnp.float8_e4m3fn

    @property
    def midpoints(self) -> np.ndarray:
        """The middles between neighbouring numbers from 0 to the largest."""
        return (self._numbers[1:] + self._numbers[:-1]) / 2

    def to_bits(self, codes: jax.Array) -> jax.Array:
        """Sign, exponent and mantissa of numbers of the format, in uint16."""
        numbers = jnp.asarray(self._numbers, jnp.float32)
        codes = codes.astype(jnp.float32)
        # The patterns of a sign ascend as its numbers do.
        pattern = jnp.searchsorted(numbers, jnp.abs(codes)).astype(jnp.uint16)
        sign = jnp.signbit(codes).astype(jnp.uint16)
        return pattern | (sign << (self.bits - 1))

    def from_bits(self, patterns: jax.Array) -> jax.Array:
        """The numbers of such patterns."""
        numbers = jnp.asarray(self._numbers, jnp.float32)
        negative = patterns >> (self.bits - 1) == 1
        magnitudes = numbers[patterns & (2 ** (self.bits - 1) - 1)]
        return jnp.where(negative, -magnitudes, magnitudes).astype(self.code_dtype)

    @property
    def _numbers(self) -> np.ndarray:
        """Those that are not negative, ascending."""
        exponents = np.arange(self._grid.min_exponent, np.frexp(self._grid.high)[1])
        mantissas = np.arange(2**self.mantissa) / 2**self.mantissa
        normal = (2.0 ** exponents[:, None] * (1 + mantissas)).ravel()
        numbers = np.concatenate([2.0**self._grid.min_exponent * mantissas, normal])
        return numbers[numbers <= self._grid.high]

    @property
    def _grid(self) -> FloatGrid:
        bias = 2 ** (self.exponent - 1) - 1
        return FloatGrid(_LARGEST[self.exponent, self.mantissa], 1 - bias, self.mantissa)


_LARGEST = {(2, 1): 6.0, (2, 3): 7.5, (3, 2): 28.0, (4, 3): 448.0, (5, 2): 57344.0}


def _with_ties(codes: jax.Array) -> jax.Array:
    """Lets what lies within float32's resolution of a tie be one, in float64 too.

    Products of codes are rational, so that results often lie exactly between two codes, and the
    last bit of a float64, by which two ways of computing one differ, would decide what they round
    to. float32 holds every tie of every format.
    """
    return codes.astype(jnp.float32).astype(codes.dtype) if codes.dtype == jnp.float64 else codes


def _times_power_of_two(x: jax.Array, exponent: jax.Array) -> jax.Array:
    """X 2**exponent, exactly; exponents of -100 to 100."""
    if x.dtype == jnp.float64:
        bits = (exponent.astype(jnp.int64) + 1023) << 52
    else:
        bits = (exponent.astype(jnp.int32) + 127) << 23
    return x * lax.bitcast_convert_type(bits, x.dtype)
