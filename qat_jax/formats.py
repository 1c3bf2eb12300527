"""Number formats: which codes exist and how a real number is rounded to one.

A format knows no scale. It describes codes on an axis on which the clipping threshold s lies at
``steps``; the quantiser multiplies by s / steps to come back.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

_BITS = (2, 3, 4, 5, 6, 7, 8, 16)


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
        return jnp.clip(jnp.round(codes), self.low, self.high)


@dataclasses.dataclass(frozen=True)
class Int:
    """Integer codes of a given width.

    With B bits, the codes and L, the steps between 0 and the threshold, are

    ======================  ========================  ============
    grid                    codes                     L
    ======================  ========================  ============
    signed                  -2**(B-1) … 2**(B-1) - 1  2**(B-1)
    signed, narrow          ±(2**(B-1) - 1)           2**(B-1) - 1
    unsigned                0 … 2**B - 1              2**B
    unsigned, narrow        0 … 2**B - 1              2**B - 1
    ======================  ========================  ============

    The plain grids are those of OCTAV (arXiv:2206.06501, section 2): the threshold itself is one
    step beyond the highest code. On the narrow ones, those of VS-Quant (arXiv:2102.04503,
    section 4), the threshold is the highest code, and the signed grid is symmetric.

    Attributes:
      bits: 2 to 8, or 16.
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
        if self.bits not in _BITS:
            raise ValueError(f"Int has 2 to 8 or 16 bits, not {self.bits!r}")
        if self.signed not in (True, False, None):
            raise ValueError(
                f"signed is True, False or None (pick from the data), not {self.signed!r}"
            )

    def grid(self, x: jax.Array) -> Grid:
        """The grid for x: of Python floats, or of scalar arrays where the sign depends on x."""
        if self.signed is not None:
            return self._grid(self.signed)
        negative = jnp.any(x < 0)
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
            return jnp.int8 if self.bits < 8 else jnp.int16 if self.bits == 8 else jnp.int32
        small = self.bits <= 8
        if self.signed:
            return jnp.int8 if small else jnp.int16
        return jnp.uint8 if small else jnp.uint16

    def _grid(self, signed: bool) -> Grid:
        highest = 2.0 ** (self.bits - signed) - 1
        steps = highest if self.narrow else highest + 1
        return Grid(-steps if signed else 0.0, highest, steps)
