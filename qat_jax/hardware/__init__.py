"""Area and energy of the accelerator that executes vectors with integer scales."""

from qat_jax.hardware.cost_model import (
    AREA_BLOCKS,
    ENERGY_BLOCKS,
    CostModel,
    area_model,
    energy_model,
    fit,
    leave_one_out,
)
from qat_jax.hardware.design import Design, Operand, Widths
from qat_jax.hardware.element import BLOCKS, block_sizes
from qat_jax.hardware.gating import ScalePairs, scale_pairs
from qat_jax.hardware.pareto import pareto_front
from qat_jax.hardware.unit_costs import AREA_40NM, ENERGY_40NM, UnitCosts

__all__ = [
    "AREA_40NM",
    "AREA_BLOCKS",
    "BLOCKS",
    "ENERGY_40NM",
    "ENERGY_BLOCKS",
    "CostModel",
    "Design",
    "Operand",
    "ScalePairs",
    "UnitCosts",
    "Widths",
    "area_model",
    "block_sizes",
    "energy_model",
    "fit",
    "leave_one_out",
    "pareto_front",
    "scale_pairs",
]
