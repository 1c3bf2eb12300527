"""What arithmetic costs in silicon, from public tables."""

import dataclasses
import math

_WIDTH = 32  # of the tables' multiplier, adder, shifter and comparator


@dataclasses.dataclass(frozen=True)
class UnitCosts:
    """The area of the blocks of a datapath, or the energy of using them once.

    The fields are the tables' entries: of 32 bits, a register's of one. The methods scale them: a
    multiplier with the product of its operands' widths, all else in proportion to the width, a
    shifter also to its stages.

    Attributes:
      unit: of all entries.
      multiplier: of 32 by 32 bits.
      adder: of 32 bits.
      register: of 1 bit.
      shifter: of 32 bits by up to 31 places.
      comparator: of 32 bits.
    """

    unit: str
    multiplier: float
    adder: float
    register: float
    shifter: float
    comparator: float

    def multiply(self, bits: int, by: int) -> float:
        """A multiplier of two widths."""
        return self.multiplier * bits * by / _WIDTH**2

    def add(self, bits: int) -> float:
        """An adder."""
        return self.adder * bits / _WIDTH

    def keep(self, bits: int) -> float:
        """A register."""
        return self.register * bits

    def shift(self, bits: int, places: int) -> float:
        """A shifter of so many bits by 0 to so many places: a multiplexer a bit for each stage."""
        stages = math.ceil(math.log2(places + 1))
        return self.shifter * bits * stages / (_WIDTH * math.log2(_WIDTH))

    def compare(self, bits: int) -> float:
        """A comparator."""
        return self.comparator * bits / _WIDTH


# Aladdin's and Accelergy's tables: 40 nm, a period of 1 ns. Only ratios matter here, since every
# cost is taken relative to that of one design.
AREA_40NM = UnitCosts("µm²", 6350, 278, 5.98, 250, 71)
ENERGY_40NM = UnitCosts("pJ", 12.68, 0.21, 0.009, 0.417, 0.02947)
