"""Thresholds that training learns, by the gradient of LSQ."""

import re

from flax import nnx

from qat_jax.nnx import Learned, Threshold, operand_quantizers


def learn_thresholds(model: nnx.Module, *, operands: str = ".*") -> tuple[str, ...]:
    """Make parameters, in place, of frozen thresholds.

    From then on they are ``nnx.Param``, which any optimiser of parameters changes, with the
    gradient of LSQ and its scale (Esser et al., "Learned Step Size Quantization",
    arXiv:1902.08153): see `fake_quant` and its ``learned``. They begin where `calibrate` left them,
    or `load_thresholds`. Weight decay should leave them alone. Packed models, exports and
    `save_thresholds` take them as if they were frozen; calibrating again freezes them.

    Args:
      model: a quantised NNX model with frozen thresholds.
      operands: a regular expression; operands whose whole path (``"layer1/0/conv1/weights"``) it
        does not match stay as they are.

    Returns:
      The paths of the operands that learn.

    Raises:
      ValueError: there is none; the model is then unchanged.

    Example:
      >>> import jax.numpy as jnp
      >>> from qat_jax import calibrate, quantize_model
      >>> model = nnx.Sequential(nnx.Linear(4, 8, rngs=nnx.Rngs(0)))
      >>> model = quantize_model(model, "octav-w4a4")
      >>> _ = calibrate(model, [jnp.ones((2, 4))])
      >>> learn_thresholds(model)
      ('layers/0/activations', 'layers/0/weights')
    """
    quantizers = operand_quantizers(model)
    frozen = {
        path: operand for path, operand in quantizers.items() if operand.threshold is not None
    }
    learning = [path for path in frozen if re.fullmatch(operands, path)]
    if not learning:
        raise ValueError(
            f"no frozen threshold to learn matches {operands!r}: there are "
            f"{', '.join(frozen) or 'none, freeze some with calibrate first'}"
        )
    for path in learning:
        operand = frozen[path]
        if isinstance(operand.threshold, Threshold):
            operand.threshold = Learned(operand.threshold.get_value())
    return tuple(learning)
