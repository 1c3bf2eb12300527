"""Clipping: how the threshold of each group is found.

A clipping rule is a frozen value with one method, ``threshold(x, format, axes)``: a pure reduction
of x over ``axes``, which stay with length 1. Thresholds are float32 (float64 for float64 input),
0 for a group of zeros and not finite for a group that holds NaN or infinity, or, of `Octav`, whose
magnitudes add up to more than the dtype holds. Nothing here is differentiated: gradients are the
business of ``gradients``.
"""

from qat_jax.clipping.absmax import AbsMax
from qat_jax.clipping.entropy import Entropy
from qat_jax.clipping.exact import Exact
from qat_jax.clipping.fixed import Fixed
from qat_jax.clipping.octav import Octav, octav
from qat_jax.clipping.percentile import Percentile
from qat_jax.clipping.protocol import Clipping, Refining, accumulation_dtype
from qat_jax.clipping.refit import Refit
from qat_jax.clipping.sweep import MseSweep

__all__ = [
    "AbsMax",
    "Clipping",
    "Entropy",
    "Exact",
    "Fixed",
    "MseSweep",
    "Octav",
    "Percentile",
    "Refining",
    "Refit",
    "accumulation_dtype",
    "octav",
]
