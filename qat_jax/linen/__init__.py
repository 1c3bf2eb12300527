"""Quantisers in an unmodified Flax Linen model, by interception of its layers' methods.

operand      what quantises one operand of one layer, or only looks at it
operations   what layers compute with while they run under a policy
model        a policy into a model; which layer got what
calibration  thresholds from sample batches, among the model's variables
"""

from qat_jax.linen.calibration import calibrate
from qat_jax.linen.gptq import gptq
from qat_jax.linen.model import QuantizedModel, quantize_model

__all__ = ["QuantizedModel", "calibrate", "gptq", "quantize_model"]
