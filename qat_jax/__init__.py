"""Quantisation-aware training and post-training quantisation in JAX."""

from qat_jax.clipping import AbsMax, Fixed, Octav, octav
from qat_jax.diagnostics import Diagnostics, diagnose, fake_quant_with_diagnostics
from qat_jax.formats import Int
from qat_jax.granularity import PerChannel, PerTensor
from qat_jax.nnx import Diagnostic, diagnostics_by_layer, quantize_model, report
from qat_jax.ops import conv_general_dilated, dot_general, einsum
from qat_jax.policy import Policy, Rule, preset, uniform_policy
from qat_jax.quantizer import QTensor, Quantizer, dequantize, fake_quant, quantize

__all__ = [
    "AbsMax",
    "Diagnostic",
    "Diagnostics",
    "Fixed",
    "Int",
    "Octav",
    "PerChannel",
    "PerTensor",
    "Policy",
    "QTensor",
    "Quantizer",
    "Rule",
    "conv_general_dilated",
    "dequantize",
    "diagnose",
    "diagnostics_by_layer",
    "dot_general",
    "einsum",
    "fake_quant",
    "fake_quant_with_diagnostics",
    "octav",
    "preset",
    "quantize",
    "quantize_model",
    "report",
    "uniform_policy",
]
