"""How wide each number of the datapath is.

A vector unit multiplies codes, sums the products of a vector, multiplies the sum by the product of
the two scales and accumulates (arXiv:2102.04503, figure 2). Every width here is that of a signed
integer which holds whatever can come out, so nothing overflows unless somebody narrows it.
"""

import dataclasses

from qat_jax.integer.operand import Operand

# What arithmetic in words of 32 bits has a place for, signs included; the first three of an
# accumulator of two words.
ACCUMULATOR_LIMIT = 51
DOT_LIMIT = 24
SCALE_PRODUCT_LIMIT = 16
FULL_SCALE_PRODUCT_LIMIT = 30
SINGLE_LIMIT = 32


@dataclasses.dataclass(frozen=True)
class Datapath:
    """The choices that a designer has.

    Attributes:
      scale_product_bits: the bits to which the product of two integer scales is rounded before it
        multiplies; None: none of them is lost.
      accumulator_bits: of the accumulator, sign included; None: as many as can be needed.

    Raises:
      ValueError: a width is not positive.
    """

    scale_product_bits: int | None = None
    accumulator_bits: int | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            width = getattr(self, field.name)
            if width is not None and width < 1:
                raise ValueError(f"{field.name} is at least 1 bit, not {width}")


@dataclasses.dataclass(frozen=True)
class Widths:
    """Bits of the numbers on their way, each with its sign.

    Attributes:
      product: of two codes.
      dot: of the sum over a vector.
      full_scale_product: of two scales, unsigned; 0 where there is none.
      scale_product: of the same after rounding.
      accumulator: of the sum over all vectors.
    """

    product: int
    dot: int
    full_scale_product: int
    scale_product: int
    accumulator: int

    @property
    def dropped(self) -> int:
        """Bits that rounding takes from the scale product; the result is 2**dropped too small."""
        return self.full_scale_product - self.scale_product


def widths(x: Operand, w: Operand, *, length: int, vectors: int, datapath: Datapath) -> Widths:
    """The widths that two operands need.

    With N bits a code, M bits a scale and vectors of V the paper's are 2N, 2N + log2 V and, with
    the scale product, 2N + log2 V + 2M. These here are those of the largest numbers that can come
    out, so at most as many, except that unsigned codes on both sides need one for the sign.

    Args:
      x: the left operand.
      w: the right operand.
      length: V, elements that are summed up before a scale product multiplies.
      vectors: such sums in the accumulator.
      datapath: what is narrowed.

    Returns:
      The widths.

    Raises:
      ValueError: the accumulator is narrower than what can come out, or wider than there is.
    """
    product = x.largest_code * w.largest_code
    scales = x.largest_scale * w.largest_scale
    full = _bits(scales) if x.scale is not None or w.scale is not None else 0
    rounded = full
    if full and datapath.scale_product_bits is not None:
        rounded = min(full, datapath.scale_product_bits)
    largest = 2**rounded - 1 if rounded < full else scales
    found = Widths(
        product=1 + _bits(product),
        dot=1 + _bits(product * length),
        full_scale_product=full,
        scale_product=rounded,
        accumulator=1 + _bits(product * length * largest * vectors),
    )
    _check(found, datapath)
    return found


def _check(found: Widths, datapath: Datapath) -> None:
    needed = found.accumulator
    if datapath.accumulator_bits is not None and needed > datapath.accumulator_bits:
        raise ValueError(
            f"an accumulator of {datapath.accumulator_bits} bits can overflow, {needed} cannot: "
            "widen accumulator_bits, or round the scales' product with scale_product_bits"
        )
    if found.full_scale_product > FULL_SCALE_PRODUCT_LIMIT:
        raise ValueError(
            f"scale products have {found.full_scale_product} bits and at most "
            f"{FULL_SCALE_PRODUCT_LIMIT} of them a place: store scales in fewer bits"
        )
    scaled = found.scale_product > 0
    if not scaled and needed > SINGLE_LIMIT:
        raise ValueError(
            f"the sum needs {needed} bits, an accumulator has {SINGLE_LIMIT}: use fewer bits"
        )
    if needed > SINGLE_LIMIT and (
        needed > ACCUMULATOR_LIMIT
        or found.dot > DOT_LIMIT
        or found.scale_product > SCALE_PRODUCT_LIMIT
    ):
        raise ValueError(
            f"sums of {found.dot} bits times scale products of {found.scale_product} need an "
            f"accumulator of {needed}; there are {DOT_LIMIT}, {SCALE_PRODUCT_LIMIT} and "
            f"{ACCUMULATOR_LIMIT}: use fewer bits"
        )


def _bits(largest: int) -> int:
    return largest.bit_length()
