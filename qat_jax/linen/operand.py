"""What quantises one operand of one Linen layer, or only looks at it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util

from qat_jax.diagnostics import fake_quant_with_diagnostics
from qat_jax.granularity import ChannelAxis, PerTensor, VectorAxis
from qat_jax.lsq import balanced_threshold
from qat_jax.padding import TOKENS, without_padding
from qat_jax.quantizer import Quantizer, fake_quant

# Collections of variables.
DIAGNOSTICS = "diagnostics"
THRESHOLDS = "thresholds"

WEIGHTS = "weights"


def frozen_thresholds(variables: Mapping[str, Any]) -> dict[str, jax.Array]:
    """The thresholds among a model's variables, by the operand's path."""
    return traverse_util.flatten_dict(variables.get(THRESHOLDS, {}), sep="/")


@dataclasses.dataclass(frozen=True)
class Operand:
    """Quantises an operand, and sows diagnostics if somebody wants them.

    Attributes:
      module: the layer, bound; it may have a frozen threshold for the operand.
      quantizer: the description.
      name: the operand's.
      token_axes: its axes of examples and of positions, if it can have padding.
      learned: whether a frozen threshold has a gradient, that of LSQ.
    """

    module: nn.Module
    quantizer: Quantizer
    name: str
    token_axes: tuple[int, int] | None = TOKENS
    learned: bool = False

    @property
    def frozen(self) -> jax.Array | None:
        """The thresholds that the layer has; None: they are found in each call."""
        threshold: jax.Array | None = self.module.get_variable(THRESHOLDS, self.name)
        # Where a step of training takes one across 0, it goes on from the other side.
        return None if threshold is None else jnp.abs(threshold)

    def __call__(
        self, x: jax.Array, channel_axis: ChannelAxis = None, vector_axis: VectorAxis = None
    ) -> jax.Array:
        """Fake quantisation of x."""
        x = without_padding(x, self.token_axes)
        settings: dict[str, Any] = {"channel_axis": channel_axis, "vector_axis": vector_axis}
        if (frozen := self.frozen) is not None:
            if self.learned:
                frozen = balanced_threshold(frozen, x, self.quantizer, self.token_axes)
            settings |= {"threshold": frozen, "learned": self.learned}
        if not self.module.is_mutable_collection(DIAGNOSTICS):
            return fake_quant(x, self.quantizer, **settings)
        x, diagnostics = fake_quant_with_diagnostics(x, self.quantizer, **settings)
        self.module.sow(DIAGNOSTICS, self.name, diagnostics)
        return x


class Candidate(Operand):
    """Quantises nothing, and sows the threshold that the clipping rule finds, if it can be frozen.

    One of an activation's examples, tokens or vectors says nothing of other batches.
    """

    def __call__(
        self, x: jax.Array, channel_axis: ChannelAxis = None, vector_axis: VectorAxis = None
    ) -> jax.Array:
        """X as it is, padding aside."""
        x = without_padding(x, self.token_axes)
        if self.name == WEIGHTS or isinstance(self.quantizer.granularity, PerTensor):
            if not self.module.is_mutable_collection(THRESHOLDS):
                raise ValueError(
                    f"{'/'.join(self.module.path)} runs inside a transformation of Linen's that "
                    f"leaves the collection {THRESHOLDS!r} out: name it beside 'params', as in "
                    f"nn.scan(…, variable_axes={{'params': 0, {THRESHOLDS!r}: 0}})"
                )
            found = self.quantizer.threshold(x, channel_axis, vector_axis)
            self.module.sow(THRESHOLDS, self.name, found)
        return x
