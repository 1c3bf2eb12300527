"""Quantisers in an unmodified Flax Linen model, by interception of its layers' methods.

What a model holds, thresholds too, is among its variables:

    operand      what quantises one operand of one layer, or only looks at it
    operations   what layers compute with while they run under a policy
    model        a policy into a model; which layer got what
    calibration  thresholds that sample batches suggest
    gptq         kernels rounded by sample batches
    learning     thresholds that training learns
"""

from qat_jax.linen.calibration import calibrate
from qat_jax.linen.gptq import gptq
from qat_jax.linen.learning import learn_thresholds
from qat_jax.linen.model import QuantizedModel, quantize_model

__all__ = ["QuantizedModel", "calibrate", "gptq", "learn_thresholds", "quantize_model"]
