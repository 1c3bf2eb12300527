"""GPTQ of a Linen model: layers in the order in which they run, each by `rounding`."""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
from flax import linen as nn
from flax import traverse_util

from qat_jax.batches import joined, positional
from qat_jax.linen.model import QuantizedModel
from qat_jax.linen.operand import THRESHOLDS, WEIGHTS, frozen_thresholds
from qat_jax.linen.operations import LayerCall, interceptor
from qat_jax.rounding import RoundedKernel, can_be_rounded, rounded_kernel


def gptq(
    model: QuantizedModel,
    variables: Mapping[str, Any],
    batches: Iterable[Any],
    *,
    operands: str = ".*",
    damping: float = 0.01,
    **kwargs: Any,
) -> dict[str, Any]:
    """Variables whose kernels are rounded so that layers answer sample batches as they did before.

    As `qat_jax.gptq` does it: all batches go through the model once, as one, outside ``jax.jit``,
    and each layer's kernel is rounded when the layer is reached. A kernel becomes numbers of its
    grid, and its thresholds, those that it had before, are among the variables from then on, as
    `calibrate` puts them there. Kernels of ``Dense``, ``DenseGeneral`` and ``Conv`` are rounded so.

    Args:
      model: a Linen model under a policy.
      variables: its variables, as they are or from `calibrate`.
      batches: inputs of the model, one a batch: arrays, or tuples of positional arguments. Some
        hundred examples do.
      operands: a regular expression; kernels whose whole path (``"stem/weights"``) it does not
        match are left.
      damping: what is added to the energy of each input, as a share of their mean.
      **kwargs: of the call, such as ``train=False``.

    Returns:
      The variables, with kernels and their thresholds anew.

    Raises:
      ValueError: there is no batch, or no such kernel; or a layer is reached under a transformation
        such as ``nn.scan`` or ``nn.remat``, something there is not finite, or there is too little
        damping for so few examples.

    Example:
      >>> from qat_jax.linen import quantize_model
      >>> x = jax.random.normal(jax.random.key(0), (32, 4))
      >>> model = quantize_model(nn.Dense(8), "max-w4a8", x)
      >>> rounded = gptq(model, model.init(jax.random.key(1), x), [x])
      >>> sorted(rounded)
      ['params', 'thresholds']
    """
    inputs = joined(positional(batches))
    if not inputs:
        raise ValueError("no batch to round kernels by: give at least one")
    done: dict[str, RoundedKernel] = {}
    left: list[str] = []
    layer_call = functools.partial(
        _RoundingCall, chosen=operands, damping=damping, done=done, left=left
    )
    with nn.intercept_methods(interceptor(model.placed, layer_call)):
        model.module.apply(variables, *inputs[0], **kwargs)
    if not done:
        kernels = ", ".join(dict.fromkeys(left))
        raise ValueError(
            f"no kernel to round matches {operands!r}: there are "
            f"{kernels or 'none, quantise weights of dense or convolutional layers'}"
        )
    # By tuples, not by paths: parameters may have names with a stroke, as those of nn.WeightNorm.
    parameters = traverse_util.flatten_dict(variables["params"])
    thresholds = frozen_thresholds(variables)
    for path, (kernel, _, threshold) in done.items():
        *layer, _ = path.split("/")
        name = (*layer, "kernel")
        parameters[name] = _with_value(parameters[name], kernel)
        thresholds[path] = threshold
    return {
        **variables,
        "params": traverse_util.unflatten_dict(parameters),
        THRESHOLDS: traverse_util.unflatten_dict(thresholds, sep="/"),
    }


@dataclasses.dataclass(frozen=True)
class _RoundingCall(LayerCall):
    """A layer that rounds its kernel when it is first called, and computes with that.

    Attributes:
      chosen: matches the paths of the kernels that are rounded.
      damping: see `gptq`.
      done: the kernels rounded so far, by path.
      left: the paths of those that could have been.
    """

    chosen: str
    damping: float
    done: dict[str, RoundedKernel]
    left: list[str]

    def operation(self, op: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        path = self.path_of(WEIGHTS)
        lhs, weights = self.operands()
        if weights is None or not can_be_rounded(op):
            return super().operation(op)
        if not re.fullmatch(self.chosen, path):
            self.left.append(path)
            return super().operation(op)

        def rounding(x: jax.Array, w: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
            if path not in self.done:
                self.done[path] = rounded_kernel(
                    op,
                    x,
                    w,
                    *args,
                    lhs=lhs,
                    quantizer=weights.quantizer,
                    threshold=weights.frozen,
                    damping=self.damping,
                    layer=self.path,
                    **kwargs,
                )
            return op(x, self.done[path].quantized.astype(w.dtype), *args, lhs=lhs, **kwargs)

        return rounding


def _with_value(old: Any, kernel: jax.Array) -> Any:
    """A kernel in the place of an old one, in its shape, dtype and box of metadata."""
    value = nn.meta.unbox(old)
    kernel = kernel.reshape(value.shape).astype(value.dtype)
    return nn.meta.replace_boxed(old, kernel)
