"""Quantisers in an unmodified Flax NNX model, through Flax's own injection points.

What is injected are NNX modules themselves, so that quantisers can sow diagnostics and hold state:

    operand      the module that quantises one operand of one layer
    operations   modules in the place of a layer's operation
    sites        where layers have such places
    captured     what quantisers sowed during a forward pass
    model        a policy into a model; which layer got what
"""

from qat_jax.nnx.captured import (
    captured_by_operand,
    captured_in_evaluation,
    diagnostics_by_layer,
    in_all_runs,
    operand_codes,
)
from qat_jax.nnx.model import copy_model, quantize_model, report, rules_of
from qat_jax.nnx.operand import (
    Candidate,
    Carried,
    Codes,
    Diagnostic,
    Learned,
    Magnitude,
    NonFinite,
    Operand,
    OperandQuantizer,
    Threshold,
    is_own_parameter,
)
from qat_jax.nnx.operations import (
    Factors,
    QuantizedAttention,
    QuantizedOp,
    QuantizedTable,
    in_basis,
    with_causal_mask,
)
from qat_jax.nnx.sites import (
    LayerSite,
    is_weight,
    layer_sites,
    normalised_layers,
    operand_quantizers,
)

__all__ = [
    "Candidate",
    "Carried",
    "Codes",
    "Diagnostic",
    "Factors",
    "LayerSite",
    "Learned",
    "Magnitude",
    "NonFinite",
    "Operand",
    "OperandQuantizer",
    "QuantizedAttention",
    "QuantizedOp",
    "QuantizedTable",
    "Threshold",
    "captured_by_operand",
    "captured_in_evaluation",
    "copy_model",
    "diagnostics_by_layer",
    "in_all_runs",
    "in_basis",
    "is_own_parameter",
    "is_weight",
    "layer_sites",
    "normalised_layers",
    "operand_codes",
    "operand_quantizers",
    "quantize_model",
    "report",
    "rules_of",
    "with_causal_mask",
]
