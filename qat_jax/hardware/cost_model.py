"""Area and energy of a datapath, fitted to what was published."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.optimize import nnls

from qat_jax.hardware import published
from qat_jax.hardware.design import Design
from qat_jax.hardware.element import block_sizes
from qat_jax.hardware.unit_costs import AREA_40NM, ENERGY_40NM, UnitCosts

# The blocks whose parameters the published points can tell apart. Buffers beside them fit energies
# no better and predict worse; see docs/hardware.md.
AREA_BLOCKS = ("datapath", "scale_product", "weight_buffer", "input_buffer", "fixed")
ENERGY_BLOCKS = ("datapath", "scale_product", "post_processing", "fixed")
GATED_BLOCKS = ("datapath",)  # the product of scales is multiplied to find out that it is zero
_REFERENCE = Design.from_notation(published.REFERENCE)
_EXACTLY = 1e4  # weight of the reference in a fit, against 1 of every other point


@dataclasses.dataclass(frozen=True)
class CostModel:
    """The cost of a design relative to 8/8/-/-, a sum of blocks.

    Attributes:
      costs: what logic costs.
      parameters: by block (see `BLOCKS`), not negative: the cost of as much of it as counts 1 in
        `block_sizes`, relative to all of 8/8/-/-.
    """

    costs: UnitCosts
    parameters: Mapping[str, float]

    def __call__(self, design: Design, gated: float = 0.0) -> float:
        """The cost of a design; exactly 1 for 8/8/-/-.

        Args:
          design: the design.
          gated: the share of vector products that are skipped because their scale product is
            zero, in [0, 1]; for energies.

        Raises:
          ValueError: ``gated`` is no share.
        """
        if not 0 <= gated <= 1:
            raise ValueError(f"gated is a share of 0 to 1, not {gated}")
        return self._sum(design, gated) / self._sum(_REFERENCE)

    def blocks(self, design: Design, gated: float = 0.0) -> dict[str, float]:
        """The cost of each block of a design, relative to all of 8/8/-/-."""
        sizes = block_sizes(design, self.costs)
        used = {block: 1 - gated if block in GATED_BLOCKS else 1.0 for block in sizes}
        return {b: used[b] * sizes[b] * value for b, value in self.parameters.items()}

    def _sum(self, design: Design, gated: float = 0.0) -> float:
        return sum(self.blocks(design, gated).values())


def fit(points: Mapping[str, float], costs: UnitCosts, blocks: Sequence[str]) -> CostModel:
    """The non-negative parameters of least relative error, 8/8/-/- being 1.

    Args:
      points: costs relative to 8/8/-/-, by notation.
      costs: what logic costs.
      blocks: which blocks have a parameter.

    Returns:
      The model.
    """
    designs = [Design.from_notation(notation) for notation in points]
    rows = [_row(design, costs, blocks) for design in (_REFERENCE, *designs)]
    matrix = np.array(rows) / np.array([1.0, *points.values()])[:, None]
    weights = np.array([_EXACTLY, *np.ones(len(points))])
    matrix = matrix * weights[:, None]
    sizes = np.linalg.norm(matrix, axis=0)  # of columns as large as each other
    solution, _ = nnls(matrix / sizes, weights)
    parameters = solution / sizes
    total = float(np.dot(rows[0], parameters))
    return CostModel(costs, dict(zip(blocks, (parameters / total).tolist(), strict=True)))


def leave_one_out(
    points: Mapping[str, float], costs: UnitCosts, blocks: Sequence[str]
) -> dict[str, float]:
    """What the model says of each point when it is fitted to the others.

    Args:
      points: as for `fit`.
      costs: as for `fit`.
      blocks: as for `fit`.

    Returns:
      Costs by notation; 8/8/-/- is 1 by definition and left out.
    """
    return {
        notation: fit({n: v for n, v in points.items() if n != notation}, costs, blocks)(
            Design.from_notation(notation)
        )
        for notation in points
        if notation != published.REFERENCE
    }


def area_model() -> CostModel:
    """The area of the processing element, fitted to all published designs."""
    return fit(published.areas(), AREA_40NM, AREA_BLOCKS)


def energy_model() -> CostModel:
    """The energy of an operation, fitted to all published designs of full scale products."""
    return fit(published.energies(), ENERGY_40NM, ENERGY_BLOCKS)


def _row(design: Design, costs: UnitCosts, blocks: Sequence[str]) -> list[float]:
    sizes = block_sizes(design, costs)
    return [sizes[block] for block in blocks]
