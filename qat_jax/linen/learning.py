"""Thresholds of Linen models that training learns, by the gradient of LSQ."""

import dataclasses
import functools
import re
from collections.abc import Mapping
from typing import Any

from qat_jax.linen.model import QuantizedModel
from qat_jax.linen.operand import Operand, frozen_thresholds
from qat_jax.linen.operations import LayerCall
from qat_jax.padding import TOKENS
from qat_jax.quantizer import Quantizer


def learn_thresholds(
    model: QuantizedModel, variables: Mapping[str, Any], *, operands: str = ".*"
) -> QuantizedModel:
    """The model with a gradient for frozen thresholds.

    It is that of LSQ with its scale (Esser et al., "Learned Step Size Quantization",
    arXiv:1902.08153): see `fake_quant` and its ``learned``. Thresholds stay the variables that
    `calibrate` made, ``"thresholds"``, so that a loss is to be differentiated by these, too, and an
    optimiser to have them. Weight decay should leave them alone. What a step takes across 0 goes on
    from the other side: of thresholds the magnitudes count.

    Args:
      model: a Linen model under a policy.
      variables: its variables, from `calibrate`.
      operands: a regular expression; thresholds whose whole path (``"stem/weights"``) it does not
        match stay constants.

    Raises:
      ValueError: there is no such threshold.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import linen as nn
      >>> from qat_jax.linen import calibrate, quantize_model
      >>> x = jnp.linspace(-1, 1, 8).reshape(2, 4)
      >>> model = quantize_model(nn.Dense(8), "max-w2a2", x)
      >>> variables = calibrate(model, model.init(jax.random.key(0), x), [x])
      >>> model = learn_thresholds(model, variables, operands="activations")
      >>> gradient = jax.grad(lambda variables: model.apply(variables, x).sum())(variables)
      >>> {name: bool((g != 0).any()) for name, g in gradient["thresholds"].items()}
      {'activations': True, 'weights': False}
    """
    frozen = frozen_thresholds(variables)
    if not any(re.fullmatch(operands, path) for path in frozen):
        raise ValueError(
            f"no frozen threshold to learn matches {operands!r}: there are "
            f"{', '.join(frozen) or 'none, freeze some with calibrate first'}"
        )
    return dataclasses.replace(model, layer_call=functools.partial(_LearningCall, learned=operands))


@dataclasses.dataclass(frozen=True)
class _LearningCall(LayerCall):
    """A layer of whose operands some have thresholds that are learned.

    Attributes:
      learned: matches their paths.
    """

    learned: str

    def operand(
        self, quantizer: Quantizer, name: str, token_axes: tuple[int, int] | None = TOKENS
    ) -> Operand:
        learned = re.fullmatch(self.learned, self.path_of(name)) is not None
        return Operand(self.module, quantizer, name, token_axes, learned)
