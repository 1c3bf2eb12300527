"""How many products of vectors an accelerator may skip, measured on a network.

Where the product of two integer scales rounds to zero, so does all that it multiplies.
"""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from flax import nnx

from qat_jax.hardware.design import Design
from qat_jax.nnx import in_all_runs, layer_sites, operand_codes, operand_quantizers
from qat_jax.policy import Rule
from qat_jax.quantizer import QTensor, Quantizer
from qat_jax.scales import IntScale


@dataclasses.dataclass(frozen=True)
class ScalePairs:
    """How often each pair of integer scales meets in a product of two vectors.

    Attributes:
      counts: float64 [largest weight scale + 1, largest activation scale + 1]. An operand without
        integer scales has the scale 1 everywhere.
      bits: of the full product of two scales.
    """

    counts: np.ndarray
    bits: int

    def zero_share(self, product_bits: int | None = None) -> float:
        """The share of the products that are zero, in [0, 1].

        Args:
          product_bits: to how many bits they are rounded, half up; None: not at all.

        Raises:
          ValueError: these are not 1 to all of the bits.

        Example:
          >>> pairs = ScalePairs(np.ones((4, 4)), bits=4)  # 0 to 3 times 0 to 3
          >>> pairs.zero_share(), pairs.zero_share(2)  # 7 are 0; 2 or more round to 1 of 2 bits
          (0.4375, 0.5)
        """
        kept = self.bits if product_bits is None else product_bits
        if not 1 <= kept <= self.bits:
            raise ValueError(
                f"a product of {self.bits} bits rounds to 1 to {self.bits}, not {kept}"
            )
        weights, activations = (np.arange(size) for size in self.counts.shape)
        least = 2.0 ** (self.bits - kept) / 2  # that does not round to zero
        zero = np.outer(weights, activations) < max(least, 1)
        return float(self.counts[zero].sum()) / float(self.counts.sum())


def scale_pairs(model: nnx.Module, *inputs: Any) -> ScalePairs:
    """Which integer scales meet in the layers of a model, on one batch.

    Counted are ``nnx.Linear`` and ``nnx.Conv``, without those of feature groups, whose operands are
    cut into different vectors. A vector of activations is taken to meet the weights of its features
    in every output feature and at every position of the window: what the margins of an image cut
    off is not told apart.

    Args:
      model: a quantised NNX model.
      *inputs: a batch for it.

    Returns:
      The counts of all its layers together.

    Raises:
      ValueError: no layer has integer scales and quantised activations, layers have scales of
        different bits, or one of them has vectors of different sizes.
    """
    forward = jax.jit(functools.partial(operand_codes, nnx.graphdef(model)))
    codes = forward(nnx.state(model), *inputs)
    quantizers = {path: operand.quantizer for path, operand in operand_quantizers(model).items()}
    found: dict[tuple[int, int], list[np.ndarray]] = {}
    for site in layer_sites(model):
        sides = site.weights, site.activations
        runs = zip(*(in_all_runs(codes, side) for side in sides), strict=False)
        for weights, activations in runs if _windows(site.layer) else ():
            bits = _scale_bits(quantizers[sides[0]]), _scale_bits(quantizers[sides[1]])
            if any(bits):
                Design.of(Rule(site.path, *(quantizers[side] for side in sides)))  # or says why not
                meetings = _meetings(weights, activations, bits) * _windows(site.layer)
                found.setdefault(bits, []).append(meetings)
    if not found:
        raise ValueError(
            "no layer has integer scales and quantised activations beside them: quantise with a "
            "notation such as 4/4/4/4, and give the model from before pack_model"
        )
    if len(found) > 1:
        raise ValueError(f"layers have integer scales of different bits: {sorted(found)}")
    ((bits, layers),) = found.items()
    return ScalePairs(np.sum(layers, axis=0), sum(bits))


def _windows(layer: Any) -> float:
    """How many windows a layer has for a position of its input; 0 if it is not counted."""
    if isinstance(layer, nnx.Linear):
        return 1.0
    if not isinstance(layer, nnx.Conv) or layer.feature_group_count > 1:
        return 0.0
    strides = np.broadcast_to(1 if layer.strides is None else layer.strides, len(layer.kernel_size))
    return 1 / float(np.prod(strides))


def _scale_bits(quantizer: Quantizer) -> int:
    return quantizer.scale.bits if isinstance(quantizer.scale, IntScale) else 0


def _meetings(weights: QTensor, activations: QTensor, bits: tuple[int, int]) -> np.ndarray:
    """How often each pair of scales meets in one layer of stride 1."""
    features = activations.shape[-1]
    sides = _shares(weights, -2, bits[0]), _shares(activations, -1, bits[1])
    vectors = max(map(len, sides))
    pairs = zip(*(np.broadcast_to(side, (vectors, side.shape[1])) for side in sides), strict=True)
    shares = np.mean([np.outer(*pair) for pair in pairs], axis=0)
    return shares * (weights.codes.size * activations.codes.size / features)


def _shares(operand: QTensor, axis: int, bits: int) -> np.ndarray:
    """How the scales are spread, for each vector of features: [vectors, largest scale + 1]."""
    if not bits:  # no scale is as good as 1 everywhere
        return np.array([[0.0, 1.0]])
    scales = np.moveaxis(np.asarray(operand.scale), axis, 0).reshape(operand.scale.shape[axis], -1)
    counts = [np.bincount(row, minlength=2**bits) for row in scales]
    return np.stack(counts) / scales.shape[1]
