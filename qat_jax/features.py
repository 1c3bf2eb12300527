"""In which basis layers quantise the features of their inputs, and kernels in the usual one.

`smooth` divides features and multiplies what they meet of the kernel; `rotate` turns both. The
kernel is changed for good, the input in every call, by the layer's operation.
"""

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from qat_jax import hadamard, ops
from qat_jax.nnx import LayerSite, QuantizedOp, copy_model, layer_sites


class LayerInput(NamedTuple):
    """The input of a layer, and the kernel that it meets.

    Attributes:
      op: the layer's operation, which quantises both.
      kernel: the kernel.
      axis: of the kernel, along which the features of the input lie; of a depthwise kernel the
        outputs, those of a feature side by side.
      groups: of features which have a kernel each; the axis has those of one.
    """

    op: Any
    kernel: nnx.Variable
    axis: int
    groups: int

    @property
    def is_changed(self) -> bool:
        """Whether its features are not those that the layer is given."""
        return self.op.rotation is not None or self.op.factors is not None

    @property
    def is_depthwise(self) -> bool:
        """Whether each feature has outputs of its own."""
        return self.axis == self.kernel.get_value().ndim - 1

    def scaled(self, per_feature: jax.Array) -> jax.Array:
        """The kernel, what each feature meets multiplied with its number."""
        kernel = self.kernel.get_value()
        rows = jnp.repeat(per_feature, kernel.shape[self.axis] // per_feature.size)
        rows = jnp.expand_dims(rows, ops.other_axes((self.axis,), kernel.ndim))
        return kernel * rows.astype(kernel.dtype)


def layer_inputs(model: nnx.Module) -> dict[str, LayerInput]:
    """The inputs whose basis can be changed, by path.

    Those of dense layers and convolutions whose input and kernel are both quantised, but for
    stacks of layers (``nnx.scan``) and layers that share a kernel, mask it, or have it made anew by
    ``nnx.WeightNorm``.
    """
    found = {}
    for site in layer_sites(model):
        op = site.installed
        if not isinstance(op, QuantizedOp) or op.activations is None or op.weights is None:
            continue
        kernel, axis = site.layer.kernel, _input_axis(site)
        of_one_layer = kernel.get_value().ndim == site.kernel_rank and site.has_own_kernel
        if axis is not None and of_one_layer:
            groups = getattr(site.layer, "feature_group_count", 1)
            found[site.activations] = LayerInput(op, kernel, axis, groups)
    return found


def _input_axis(site: LayerSite) -> int | None:
    """See `LayerInput.axis`; None where a layer has none."""
    match site.layer:
        case nnx.Linear():
            return 0
        case nnx.LinearGeneral(batch_axis=batch, in_features=inputs):
            return len(batch) + len(inputs) - 1
        case nnx.Conv() if site.layer.kernel.get_value().shape[-2] == 1:
            return site.kernel_rank - 1
        case nnx.Conv():
            return site.kernel_rank - 2
    return None


def matching(inputs: dict[str, LayerInput], operands: str, *, to: str) -> dict[str, LayerInput]:
    """Those of some inputs whose whole path a regular expression matches.

    Args:
      inputs: by path.
      operands: the expression.
      to: what is to be done to them, a verb.

    Raises:
      ValueError: there is none.
    """
    chosen = {path: found for path, found in inputs.items() if re.fullmatch(operands, path)}
    if not chosen:
        raise ValueError(
            f"no input to {to} matches {operands!r}: there are "
            f"{', '.join(inputs) or 'none, quantise inputs and kernels of layers first'}"
        )
    return chosen


def refuse_thresholds(path: str, found: LayerInput, *, to: str) -> None:
    """Raises ValueError if thresholds of a layer are frozen or carried, which its basis decides on.

    Args:
      path: of the input.
      found: the input.
      to: what comes before them, a verb.
    """
    for operand in (found.op.activations, found.op.weights):
        if operand.threshold is not None or operand.carried is not None:
            raise ValueError(f"{path} has thresholds already: {to} the model before")


def with_usual_kernels(model: nnx.Module) -> nnx.Module:
    """A copy whose kernels are those of the float model: smoothing and rotation are taken back.

    Without quantisers it computes what the model does, up to the rounding of a rotation.

    Args:
      model: an NNX model, quantised or not.
    """
    model = copy_model(model)
    for found in layer_inputs(model).values():
        op, kernel = found.op, found.kernel
        if op.rotation is not None:
            kernel.set_value(hadamard.rotated_back(kernel.get_value(), found.axis, op.rotation))
            op.rotation = None
        if op.factors is not None:
            kernel.set_value(found.scaled(op.factors.get_value()))
            op.factors = None
    return model
