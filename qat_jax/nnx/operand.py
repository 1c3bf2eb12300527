"""The module that quantises one operand of one layer, and what it holds or sows."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qat_jax.diagnostics import fake_quant_with_diagnostics
from qat_jax.display import DescribedQuantizer
from qat_jax.granularity import ChannelAxis, VectorAxis, normalize_axes
from qat_jax.lsq import balanced_threshold
from qat_jax.ops import other_axes
from qat_jax.padding import TOKENS, without_padding
from qat_jax.quantizer import QTensor, Quantizer, fake_quant, quantize


class Diagnostic(nnx.Variable):
    """The type under which quantisers sow their `Diagnostics`: see `diagnostics_by_layer`."""


class Candidate(nnx.Variable):
    """The type under which quantisers sow the threshold that they find in their operand.

    A forward pass that is captured with it quantises nothing: see `calibration`.
    """


class NonFinite(nnx.Variable):
    """The type under which quantisers sow how many groups of their operand are not finite.

    Found from thresholds, it costs no look at the operand itself.
    """


class Codes(nnx.Variable):
    """The type under which quantisers sow their operand as a `QTensor`."""


class Operand(nnx.Variable):
    """The type under which quantisers sow their operand as it reaches them, without padding."""


class Magnitude(nnx.Variable):
    """The type under which quantisers sow the largest magnitude of each feature of their operand.

    A forward pass that is captured with it quantises nothing: see `smoothing`.
    """


class Threshold(nnx.Variable):
    """Thresholds that were frozen into the model: part of its state, and no parameter."""


class Carried(nnx.Variable):
    """Thresholds of the step before, with which a search begins: state, and no parameter."""


class Learned(nnx.Param):
    """Thresholds that training changes by their gradient: parameters (see `learning`)."""


def is_own_parameter(node: Any) -> bool:
    """Whether something is a parameter of the model itself, and no learned threshold."""
    return isinstance(node, nnx.Param) and not isinstance(node, Learned)


class OperandQuantizer(DescribedQuantizer, nnx.Module):
    """Quantises one operand of one layer.

    Attributes:
      quantizer: the description (static).
      token_axes: the operand's axes of examples and of positions, if it can have padding (static).
      threshold: thresholds found before (see `calibration`), or learned; None: found in each call.
      carried: where training begins to search for them; None: from nothing.
      deterministic: whether thresholds found depend on the operand alone, as in evaluation, where
        Flax sets this attribute.
    """

    def __init__(self, quantizer: Quantizer, token_axes: tuple[int, int] | None = TOKENS) -> None:
        self.quantizer = quantizer
        self.token_axes = token_axes
        self.threshold: Threshold | Learned | None = nnx.data(None)
        self.carried: Carried | None = nnx.data(None)
        self.deterministic = False

    def set_view(self, deterministic: bool | None = None) -> None:
        """For ``nnx.view``: whether thresholds found depend on the operand alone."""
        if deterministic is not None:
            self.deterministic = deterministic

    @property
    def kept(self) -> jax.Array | None:
        """Thresholds that the model has, frozen or learned; None: they are found in each call."""
        if self.threshold is None:
            return None
        value = self.threshold.get_value()
        # Where a step of training takes one across 0, it goes on from the other side.
        return jnp.abs(value) if isinstance(self.threshold, Learned) else value

    def _words(self) -> str:
        match self.threshold:
            case None:
                return super()._words()
            case Learned():
                return f"{super()._words()} learned"
        return f"{super()._words()} frozen"

    def __call__(
        self, x: jax.Array, channel_axis: ChannelAxis = None, vector_axis: VectorAxis = None
    ) -> jax.Array:
        """Fake quantisation of x."""
        x = without_padding(x, self.token_axes)
        axes: dict[str, Any] = {"channel_axis": channel_axis, "vector_axis": vector_axis}
        if _captures(self, Operand):
            self.sow(Operand, "operand", x)
        if _captures(self, Magnitude):
            self.sow(Magnitude, "magnitudes", _magnitudes(x, vector_axis))
            return x
        if _captures(self, Candidate):
            self.sow(Candidate, "candidates", self.quantizer.threshold(x, **axes))
            return x
        threshold = self.kept
        if threshold is None:
            threshold = seen = self._found(x, channel_axis, vector_axis)
        else:
            seen = x  # thresholds that are kept say nothing about it
        if _captures(self, NonFinite):
            self.sow(NonFinite, "non_finite", jnp.sum(~jnp.isfinite(seen), dtype=jnp.float32))
        axes["threshold"] = threshold
        if _captures(self, Codes):
            self.sow(Codes, "codes", quantize(x, self.quantizer, **axes))
        if isinstance(self.threshold, Learned):
            axes["threshold"] = balanced_threshold(threshold, x, self.quantizer, self.token_axes)
            axes["learned"] = True
        if not _captures(self, Diagnostic):
            return fake_quant(x, self.quantizer, **axes)
        x, diagnostics = fake_quant_with_diagnostics(x, self.quantizer, **axes)
        self.sow(Diagnostic, "diagnostics", diagnostics)
        return x

    def _found(self, x: jax.Array, channel_axis: ChannelAxis, vector_axis: VectorAxis) -> jax.Array:
        """Thresholds of x; those of training are carried to the next step."""
        if self.carried is None or self.deterministic:
            return self.quantizer.threshold(x, channel_axis, vector_axis)
        before = self.carried.get_value()
        threshold = self.quantizer.refined_threshold(x, before, channel_axis)
        found = threshold.reshape(before.shape)  # an example alone has fewer axes than a batch
        self.carried.set_value(jnp.where(jnp.isfinite(found), found, before))
        return threshold

    def quantized(
        self, x: jax.Array, channel_axis: ChannelAxis = None, vector_axis: VectorAxis = None
    ) -> QTensor:
        """Codes and scales of what a call makes of x; not differentiable."""
        return quantize(
            without_padding(x, self.token_axes),
            self.quantizer,
            channel_axis=channel_axis,
            vector_axis=vector_axis,
            threshold=self.kept,
        )


def _magnitudes(x: jax.Array, vector_axis: VectorAxis) -> jax.Array:
    return jnp.max(jnp.abs(x), axis=all_but_features(x, vector_axis), initial=0)


def all_but_features(x: jax.Array, vector_axis: VectorAxis) -> tuple[int, ...]:
    """The axes of an operand but the one along which vectors lie."""
    features = () if vector_axis is None else normalize_axes(vector_axis, x.ndim)
    return other_axes(features, x.ndim)


def _captures(module: nnx.Module, kind: type[nnx.Variable]) -> bool:
    """Whether an ``nnx.capture`` listens to a type: else sowing it would be wasted."""
    return any(type(variable) is kind for variable in getattr(module, "__captures__", ()))
