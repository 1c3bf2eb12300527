"""Bits layer by layer: the least loss for a size."""

from collections.abc import Mapping

import numpy as np
from scipy import optimize


def allocate_bits(
    losses: Mapping[str, Mapping[int, float]], sizes: Mapping[str, int], average: float
) -> dict[str, int]:
    """Chooses each kernel's bits so that the losses add up to the least.

    That they add up is a model: what is quantised together may do more harm, or less, than the sum.

    Args:
      losses: of each kernel the loss at each number of bits that it may have.
      sizes: of each kernel its elements.
      average: bits an element that may be spent, over all kernels.

    Returns:
      The bits of each kernel: the optimum of this multiple-choice knapsack problem.

    Raises:
      ValueError: no choice is so small, or a loss is not finite.
      RuntimeError: the solver gave up.

    Example:
      >>> losses = {"a": {2: 9.0, 8: 0.1}, "b": {2: 1.0, 8: 0.0}}
      >>> allocate_bits(losses, {"a": 10, "b": 10}, average=5)
      {'a': 8, 'b': 2}
    """
    choices = [(kernel, bits) for kernel, by_bits in losses.items() for bits in by_bits]
    costs = np.array([losses[kernel][bits] for kernel, bits in choices], float)
    if not np.isfinite(costs).all():
        raise ValueError("a loss is not finite: leave out the bits at which that is so")
    total = sum(sizes[kernel] for kernel in losses)
    share = np.array([sizes[kernel] * bits / total for kernel, bits in choices])
    least = sum(min(by_bits) * sizes[kernel] for kernel, by_bits in losses.items()) / total
    if least > average:
        raise ValueError(
            f"{average} bits on average cannot be had: the fewest of each kernel make {least:.2f}"
        )
    each_once = np.array([[kernel == name for kernel, _ in choices] for name in losses], float)
    least_each = [min(losses[kernel].values()) for kernel, _ in choices]
    found = optimize.milp(
        _scaled(costs - least_each),
        integrality=np.ones(len(choices)),
        bounds=optimize.Bounds(0, 1),
        constraints=[
            optimize.LinearConstraint(each_once, 1, 1),
            optimize.LinearConstraint(share[None], -np.inf, average + _SLACK),
        ],
        options={"mip_rel_gap": 0},
    )
    if not found.success:
        raise RuntimeError(f"no bits were found: {found.message}")
    return {
        kernel: bits for (kernel, bits), taken in zip(choices, found.x, strict=True) if taken > 0.5
    }


def average_bits(bits: Mapping[str, int], sizes: Mapping[str, int]) -> float:
    """Bits an element over kernels of some sizes."""
    return sum(bits[kernel] * sizes[kernel] for kernel in bits) / sum(sizes[k] for k in bits)


def _scaled(rests: np.ndarray) -> np.ndarray:
    """Losses over the least ones, so large that the solver's absolute gap of 1e-6 is nothing."""
    return rests / (rests.max() or 1.0) * _LARGEST


_LARGEST = 1e3
_SLACK = 1e-9  # a budget that is met exactly is met
