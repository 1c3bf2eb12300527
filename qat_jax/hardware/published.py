"""What VS-Quant published of its accelerator (arXiv:2102.04503): nobody measured it here.

Read off the pixels of figures 3 to 6, energies to about 0.005; all relative to 8/8/-/-, below
16 nm, synthesised and placed. The paper gives no buffer sizes, clock, absolute areas or formula.
"""

from collections.abc import Mapping
from typing import NamedTuple


class Cost(NamedTuple):
    """Of a design, relative to `REFERENCE`.

    Attributes:
      energy: of an operation.
      area: of the processing element.
    """

    energy: float
    area: float


REFERENCE = "8/8/-/-"
# Figures 4 to 6, by W/A/ws/as; the scale product has its full width.
DESIGNS: Mapping[str, Cost] = {
    "8/8/-/-": Cost(1.00, 1.00),
    "6/6/-/-": Cost(0.765, 0.778),
    "6/8/-/-": Cost(0.82, 0.814),
    "6/8/8/-": Cost(0.985, 0.88),
    "4/6/4/-": Cost(0.57, 0.637),
    "4/4/4/6": Cost(0.762, 0.629),
    "6/3/-/4": Cost(0.554, 0.741),
    "6/4/-/6": Cost(1.080, 0.765),
    "4/8/6/10": Cost(1.345, 0.743),
    "4/8/4/10": Cost(1.226, 0.714),
    "4/8/-/10": Cost(0.992, 0.666),
    "4/8/-/8": Cost(0.986, 0.660),
    "6/8/-/10": Cost(1.221, 0.847),
    "3/8/6/10": Cost(1.191, 0.643),
    "3/8/4/10": Cost(1.042, 0.623),
    "3/6/6/10": Cost(0.999, 0.606),
    "3/6/4/10": Cost(1.049, 0.588),
}
# Figure 3: energies alone.
PER_CHANNEL_ENERGY: Mapping[str, float] = {
    "4/4/-/-": 0.487,
    "6/6/-/-": 0.764,
    "6/8/-/-": 0.820,
    "8/8/-/-": 1.000,
}
# By the bits that the scale product is rounded to; None: its full width.
ROUNDED_ENERGY: Mapping[str, Mapping[int | None, float]] = {
    "4/4/4/4": {4: 0.365, 6: 0.425, None: 0.641},
    "6/6/4/4": {4: 0.627, 6: 0.740, None: 1.042},
    "6/8/8/-": {4: 0.799, 6: 0.826, None: 0.979},
    "8/8/6/-": {4: 0.859, 6: 1.040, None: 1.042},
}


def areas() -> dict[str, float]:
    """Every published area by notation."""
    return {notation: cost.area for notation, cost in DESIGNS.items()}


def energies() -> dict[str, float]:
    """Every published energy at the full width of the scale product, by notation.

    Where figure 3 shows a design that figures 4 to 6 show, too, the latter count.
    """
    full = {notation: energy[None] for notation, energy in ROUNDED_ENERGY.items()}
    return {**PER_CHANNEL_ENERGY, **full, **{n: cost.energy for n, cost in DESIGNS.items()}}
