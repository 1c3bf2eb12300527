"""The processing element of VS-Quant, block by block (arXiv:2102.04503, section 6).

Vector multiply-accumulate units, scale multipliers, accumulators, buffers of weights and inputs,
and the unit that finds the scales of the next layer's vectors.
"""

from collections.abc import Iterator

from qat_jax.hardware.datapath import FLOAT_ACCUMULATOR, Datapath
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


def block_sizes(datapath: Datapath, costs: UnitCosts) -> dict[str, float]:
    """How much of each block there is, for one multiplication of two elements.

    Args:
      datapath: the widths.
      costs: of area or of energy.

    Returns:
      By the names of `BLOCKS`: logic in the unit of ``costs``, buffers in bits, fixed 1. What is
      there once for a vector counts 1 / V.
    """
    weights, activations, lanes = datapath.weights, datapath.activations, datapath.vector_size
    once_a_vector = sum(_adder_tree(datapath, costs)) + _rescaling(datapath, costs)
    has_vectors = activations.vector_size is not None
    return {
        "datapath": _product(datapath, costs) + once_a_vector / lanes,
        "scale_product": _scale_product(datapath, costs) / lanes,
        "weight_buffer": weights.bits + weights.scale_bits / lanes,
        "input_buffer": activations.bits + activations.scale_bits / lanes,
        "post_processing": costs.compare(activations.bits) if has_vectors else 0.0,
        "fixed": 1.0,
    }


def _product(datapath: Datapath, costs: UnitCosts) -> float:
    """Of two elements: significands multiplied, shifted to where their exponents say."""
    weights, activations = datapath.weights, datapath.activations
    places = weights.places + activations.places
    return (
        costs.multiply(weights.significand, activations.significand)
        + costs.add(places.bit_length())  # of the exponents
        + costs.shift(datapath.widths.product, places)
    )


def _adder_tree(datapath: Datapath, costs: UnitCosts) -> Iterator[float]:
    """Level by level half as many adders, a bit wider."""
    adders, bits = datapath.vector_size // 2, datapath.widths.product
    while adders:
        bits += 1
        yield adders * costs.add(bits)
        adders //= 2


def _rescaling(datapath: Datapath, costs: UnitCosts) -> float:
    """Of a dot product: multiplied by its scale product, added to the accumulator."""
    widths = datapath.widths
    cost = costs.multiply(widths.dot, widths.scale_product)
    if datapath.has_float_scales:
        cost += costs.shift(FLOAT_ACCUMULATOR, FLOAT_ACCUMULATOR - 1)
    return cost + costs.add(widths.accumulator) + costs.keep(widths.accumulator)


def _scale_product(datapath: Datapath, costs: UnitCosts) -> float:
    """Of two scales: significands multiplied, exponents added."""
    weights, activations = datapath.weights, datapath.activations
    return costs.multiply(weights.scale_significand, activations.scale_significand) + costs.add(
        max(weights.scale_exponent, activations.scale_exponent)
    )
