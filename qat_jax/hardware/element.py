"""The processing element of VS-Quant, block by block (arXiv:2102.04503, section 6).

Vector multiply-accumulate units, scale multipliers, accumulators, buffers of weights and inputs,
and the unit that finds the scales of the next layer's vectors.
"""

from collections.abc import Iterator

from qat_jax.hardware.design import FLOAT_ACCUMULATOR, Design
from qat_jax.hardware.unit_costs import UnitCosts

# What each block's parameter stands for.
BLOCKS = {
    "datapath": "multipliers, adder tree, multiplication by the scale product, accumulator: the "
    "cost in the element's own technology of what the unit costs count",
    "scale_product": "the multiplication of two scales, likewise",
    "weight_buffer": "a stored bit of an element of the weights, its share of the scale included",
    "input_buffer": "a stored bit of an element of the activations, likewise",
    "post_processing": "an activation's bit in finding its vector's maximum and scale and dividing "
    "by it, where activations have vectors",
    "fixed": "what no width changes: control, addresses, the collector, output registers",
}


def block_sizes(design: Design, costs: UnitCosts) -> dict[str, float]:
    """How much of each block there is, for one multiplication of two elements.

    Args:
      design: the widths.
      costs: of area or of energy.

    Returns:
      By the names of `BLOCKS`: logic in the unit of ``costs``, buffers in bits, fixed 1. What is
      there once for a vector counts 1 / V.
    """
    weights, activations, lanes = design.weights, design.activations, design.vector_size
    once_a_vector = sum(_adder_tree(design, costs)) + _rescaling(design, costs)
    has_vectors = activations.vector_size is not None
    return {
        "datapath": _product(design, costs) + once_a_vector / lanes,
        "scale_product": _scale_product(design, costs) / lanes,
        "weight_buffer": weights.bits + weights.scale_bits / lanes,
        "input_buffer": activations.bits + activations.scale_bits / lanes,
        "post_processing": costs.compare(activations.bits) if has_vectors else 0.0,
        "fixed": 1.0,
    }


def _product(design: Design, costs: UnitCosts) -> float:
    """Of two elements: significands multiplied, shifted to where their exponents say."""
    weights, activations = design.weights, design.activations
    places = weights.places + activations.places
    return (
        costs.multiply(weights.significand, activations.significand)
        + costs.add(places.bit_length())  # of the exponents
        + costs.shift(design.widths.product, places)
    )


def _adder_tree(design: Design, costs: UnitCosts) -> Iterator[float]:
    """Level by level an adder for each pair of terms, a bit wider; an odd one waits."""
    terms, bits = design.vector_size, design.widths.product
    while terms > 1:
        bits += 1
        yield terms // 2 * costs.add(bits)
        terms = (terms + 1) // 2


def _rescaling(design: Design, costs: UnitCosts) -> float:
    """Of a dot product: multiplied by its scale product, added to the accumulator."""
    widths = design.widths
    cost = costs.multiply(widths.dot, widths.scale_product)
    if design.has_float_scales:
        cost += costs.shift(FLOAT_ACCUMULATOR, FLOAT_ACCUMULATOR - 1)
    return cost + costs.add(widths.accumulator) + costs.keep(widths.accumulator)


def _scale_product(design: Design, costs: UnitCosts) -> float:
    """Of two scales: significands multiplied, exponents added."""
    weights, activations = design.weights, design.activations
    return costs.multiply(weights.scale_significand, activations.scale_significand) + costs.add(
        max(weights.scale_exponent, activations.scale_exponent)
    )
