"""A design of the datapath for a pair of quantisers: what each operand brings, and all widths."""

import dataclasses
import math

from qat_jax.formats import Float, Int
from qat_jax.granularity import PerVector
from qat_jax.policy import Rule
from qat_jax.quantizer import Quantizer
from qat_jax.scales import E4M3, E8M0, IntScale

VECTOR_SIZE = 16  # lanes of a vector multiply-accumulate unit where no operand has vectors
LONGEST_SUM = 4608  # elements of ResNet-50's longest dot product, 3 × 3 × 512
FLOAT_ACCUMULATOR = 32  # bits, where scales are floating-point numbers


@dataclasses.dataclass(frozen=True)
class Operand:
    """What the datapath has to know of the weights, or of the activations.

    A floating-point element is a significand and a shift: the multiplier takes the significands,
    with sign and hidden bit, and the product is shifted into a common fixed-point format.

    Attributes:
      bits: of an element, as it is stored.
      significand: of an element, as it is multiplied.
      places: by how many an element may be shifted; 0 for integers.
      scale_bits: of a vector's scale, as it is stored; 0 where vectors have none.
      scale_significand: of a vector's scale, as it is multiplied; 0 for powers of two.
      scale_exponent: bits of the scale's exponent; 0 for integers.
      vector_size: elements that share a scale; None where vectors have none.
    """

    bits: int
    significand: int
    places: int = 0
    scale_bits: int = 0
    scale_significand: int = 0
    scale_exponent: int = 0
    vector_size: int | None = None

    @classmethod
    def of(cls, quantizer: Quantizer) -> "Operand":
        """The operand that a quantiser makes.

        Raises:
          ValueError: the element is no integer or float of `formats`, or a vector's scale is a
            float of 16 or 32 bits, which this datapath does not multiply.
        """
        match quantizer.format:
            case Int(bits=bits):
                element = cls(bits, bits)
            case Float(exponent=exponent, mantissa=mantissa):
                # Subnormal numbers stand where those of the least exponent do.
                element = cls(1 + exponent + mantissa, 2 + mantissa, 2**exponent - 2)
            case unknown:
                raise ValueError(f"no datapath for {unknown}: give Int or Float elements")
        if not isinstance(quantizer.granularity, PerVector):
            return element
        match quantizer.scale:
            case IntScale(bits=bits):
                scale = (bits, bits, 0)
            case E4M3():
                scale = (8, 4, 4)  # the hidden bit, no sign
            case E8M0():
                scale = (8, 0, 8)
            case other:
                raise ValueError(
                    f"no datapath multiplies the vector scales of {other}: give integer bits, as "
                    "in 4/4/4/6, or - for one scale a channel or layer"
                )
        stored, significand, exponent = scale
        return dataclasses.replace(
            element,
            scale_bits=stored,
            scale_significand=significand,
            scale_exponent=exponent,
            vector_size=quantizer.granularity.size,
        )


@dataclasses.dataclass(frozen=True)
class Widths:
    """The widths of a datapath in bits (arXiv:2102.04503, section 6), integers signed.

    Attributes:
      product: of two elements.
      dot: of the sum of a vector's products.
      scale_product: of two vectors' scales, after rounding; 0 where no vector has a scale.
      partial_sum: of a dot product times its scale product.
      accumulator: of the sum of all partial sums.
    """

    product: int
    dot: int
    scale_product: int
    partial_sum: int
    accumulator: int


@dataclasses.dataclass(frozen=True)
class Design:
    """Weights, activations and how their vectors are multiplied.

    Attributes:
      weights: the one operand.
      activations: the other.
      product_bits: to how many bits the product of two scales is rounded before it multiplies;
        None: not at all.
    """

    weights: Operand
    activations: Operand
    product_bits: int | None = None

    def __post_init__(self) -> None:
        sizes = {self.weights.vector_size, self.activations.vector_size} - {None}
        if len(sizes) > 1:
            raise ValueError(f"vectors of {sorted(filter(None, sizes))} elements cannot be paired")
        if self.product_bits is not None and self.product_bits < 1:
            raise ValueError(f"a product of scales keeps 1 bit or more, not {self.product_bits}")

    @classmethod
    def of(cls, rule: Rule, product_bits: int | None = None) -> "Design":
        """The design for a rule's quantisers.

        Raises:
          ValueError: the rule leaves an operand in floating point, or see `Operand.of`.
        """
        if rule.weights is None or rule.activations is None:
            raise ValueError(
                f"rule {rule.pattern!r} must quantise weights and activations: the datapath "
                "multiplies codes by codes, no floats"
            )
        return cls(Operand.of(rule.weights), Operand.of(rule.activations), product_bits)

    @classmethod
    def from_notation(cls, notation: str, product_bits: int | None = None) -> "Design":
        """The design for W/A/ws/as, vectors of 16.

        Raises:
          ValueError: the notation cannot be read or has floating-point vector scales.

        Example:
          >>> Design.from_notation("4/4/4/6").widths  # doctest: +NORMALIZE_WHITESPACE
          Widths(product=8, dot=12, scale_product=10, partial_sum=22, accumulator=31)
        """
        return cls.of(Rule.from_notation(".*", notation, vector_size=VECTOR_SIZE), product_bits)

    @property
    def vector_size(self) -> int:
        """Lanes of a vector multiply-accumulate unit."""
        return self.weights.vector_size or self.activations.vector_size or VECTOR_SIZE

    @property
    def has_float_scales(self) -> bool:
        """Whether partial sums have exponents, so that the accumulator is a float."""
        return bool(self.weights.scale_exponent or self.activations.scale_exponent)

    @property
    def full_scale_product(self) -> int:
        """Bits of the product of two scales that is not rounded."""
        return self.weights.scale_significand + self.activations.scale_significand

    @property
    def widths(self) -> Widths:
        """All widths."""
        operands = self.weights, self.activations
        product = sum(operand.significand + operand.places for operand in operands)
        dot = product + math.ceil(math.log2(self.vector_size))
        full = self.full_scale_product
        scale_product = full if self.product_bits is None else min(full, self.product_bits)
        partial_sum = dot + scale_product
        terms = math.ceil(LONGEST_SUM / self.vector_size)
        accumulator = partial_sum + math.ceil(math.log2(terms))
        if self.has_float_scales:
            accumulator = FLOAT_ACCUMULATOR
        return Widths(product, dot, scale_product, partial_sum, accumulator)
