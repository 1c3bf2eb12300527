"""Quantisation-aware training and post-training quantisation in JAX."""

from qat_jax.batch_norm import fold_batch_norm, reestimate_batch_norm
from qat_jax.calibration import (
    calibrate,
    carry_thresholds,
    load_thresholds,
    save_thresholds,
)
from qat_jax.clipping import (
    AbsMax,
    Entropy,
    Exact,
    Fixed,
    MseSweep,
    Octav,
    Percentile,
    Refit,
    octav,
)
from qat_jax.diagnostics import Diagnostics, diagnose, fake_quant_with_diagnostics
from qat_jax.formats import Float, Int
from qat_jax.gptq import gptq
from qat_jax.granularity import PerChannel, PerShard, PerTensor, PerVector
from qat_jax.learning import learn_thresholds
from qat_jax.nnx import (
    Diagnostic,
    NonFinite,
    captured_by_operand,
    diagnostics_by_layer,
    operand_quantizers,
    quantize_model,
    report,
)
from qat_jax.notation import Notation
from qat_jax.ops import conv_general_dilated, dot_general, einsum
from qat_jax.padding import ignore_padding
from qat_jax.policy import Policy, Rule, preset, uniform_policy
from qat_jax.policy_file import load_policy, policy_from_yaml, policy_to_yaml, save_policy
from qat_jax.quantizer import QTensor, Quantizer, dequantize, fake_quant, quantize
from qat_jax.rotation import rotate
from qat_jax.scales import E4M3, E8M0, FloatScale, IntScale
from qat_jax.smoothing import smooth
from qat_jax.storage import Storage, model_storage, operand_storage

__all__ = [
    "E4M3",
    "E8M0",
    "AbsMax",
    "Diagnostic",
    "Diagnostics",
    "Entropy",
    "Exact",
    "Fixed",
    "Float",
    "FloatScale",
    "Int",
    "IntScale",
    "MseSweep",
    "NonFinite",
    "Notation",
    "Octav",
    "PerChannel",
    "PerShard",
    "PerTensor",
    "PerVector",
    "Percentile",
    "Policy",
    "QTensor",
    "Quantizer",
    "Refit",
    "Rule",
    "Storage",
    "calibrate",
    "captured_by_operand",
    "carry_thresholds",
    "conv_general_dilated",
    "dequantize",
    "diagnose",
    "diagnostics_by_layer",
    "dot_general",
    "einsum",
    "fake_quant",
    "fake_quant_with_diagnostics",
    "fold_batch_norm",
    "gptq",
    "ignore_padding",
    "learn_thresholds",
    "load_policy",
    "load_thresholds",
    "model_storage",
    "octav",
    "operand_quantizers",
    "operand_storage",
    "policy_from_yaml",
    "policy_to_yaml",
    "preset",
    "quantize",
    "quantize_model",
    "reestimate_batch_norm",
    "report",
    "rotate",
    "save_policy",
    "save_thresholds",
    "smooth",
    "uniform_policy",
]
