"""GPTQ of an NNX model: layers in the order in which they run, each by `rounding`."""

import re
from collections.abc import Iterable
from typing import Any

import jax
from flax import nnx

from qat_jax.batches import joined, positional
from qat_jax.nnx import (
    LayerSite,
    QuantizedOp,
    Threshold,
    copy_model,
    in_basis,
    layer_sites,
)
from qat_jax.rounding import can_be_rounded, rounded_kernel


def gptq(
    model: nnx.Module,
    batches: Iterable[Any],
    *,
    operands: str = ".*",
    damping: float = 0.01,
) -> tuple[str, ...]:
    """Round kernels, in place, so that layers answer sample batches as they did before.

    All batches go through the model once, as one, outside ``jax.jit``: each layer's kernel is
    rounded when the layer is reached, given what the layers before it, rounded already, make of
    the batches, and its own activations quantised. A kernel becomes numbers of its grid, and its
    thresholds are frozen to those it had before, so that simulation, packed models and exports all
    compute with the codes that were chosen. Kernels of dense and convolutional layers are rounded
    so; those of ``Einsum`` and ``ConvTranspose`` are left. A layer that runs again is rounded by
    its first run.

    Args:
      model: a quantised NNX model, in either mode, which it keeps.
      batches: inputs of the model, one a batch: arrays, or tuples of positional arguments. Some
        hundred examples do.
      operands: a regular expression; kernels whose whole path (``"layer1/0/conv1/weights"``) it
        does not match are left.
      damping: what is added to the energy of each input, as a share of their mean.

    Returns:
      The paths of the kernels, in the order in which their layers run.

    Raises:
      ValueError: there is no batch, or no such kernel; or a layer is reached under a transformation
        such as ``nnx.scan`` or ``nnx.remat``, something there is not finite, or there is too little
        damping for so few examples. The model is then unchanged.

    Example:
      >>> from qat_jax import quantize_model
      >>> model = nnx.Sequential(nnx.Linear(4, 8, rngs=nnx.Rngs(0)))
      >>> model = quantize_model(model, "max-w4a8")
      >>> gptq(model, [jax.random.normal(jax.random.key(0), (32, 4))])
      ('layers/0/weights',)
    """
    inputs = joined(positional(batches))
    if not inputs:
        raise ValueError("no batch to round kernels by: give at least one")
    rounding = copy_model(model)
    rounding.eval()
    sites = {site.path: site for site in layer_sites(rounding) if _can_be_rounded(site, operands)}
    if not sites:
        kernels = [site.weights for site in layer_sites(model) if _can_be_rounded(site)]
        raise ValueError(
            f"no kernel to round matches {operands!r}: there are "
            f"{', '.join(kernels) or 'none, quantise weights of dense or convolutional layers'}"
        )
    done: dict[str, _RoundingOp] = {}
    for path, site in sites.items():
        site.install(_RoundingOp(site.installed, path, damping, done))
    rounding(*inputs[0])
    for site in layer_sites(model):
        if (found := done.get(site.path)) is not None:
            kernel = site.layer.kernel
            old = kernel.get_value()
            kernel.set_value(found.kernel.reshape(old.shape).astype(old.dtype))
            site.installed.weights.threshold = found.weights.threshold
    return tuple(sites[path].weights for path in done)


def _can_be_rounded(site: LayerSite, operands: str = ".*") -> bool:
    return (
        isinstance(site.installed, QuantizedOp)
        and site.has_own_kernel
        and can_be_rounded(site.installed.op)
        and site.installed.weights is not None
        and re.fullmatch(operands, site.weights) is not None
    )


class _RoundingOp(nnx.Module):
    """Takes the place of a quantised operation and rounds the kernel when it is called.

    Attributes:
      own: the operation.
      weights: its quantiser of the kernel, whose thresholds are frozen afterwards.
      kernel: the rounded kernel, once the operation has run.
      quantized: what its quantiser makes of that.
    """

    def __init__(
        self, own: QuantizedOp, path: str, damping: float, done: dict[str, "_RoundingOp"]
    ) -> None:
        self.own = own
        self.weights: Any = own.weights
        self.kernel: Any = nnx.data(None)
        self.quantized: Any = nnx.data(None)
        self._path = path
        self._damping = damping
        self._done = nnx.static(done)

    def __call__(self, x: jax.Array, w: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        """The operation, with the rounded kernel."""
        lhs = in_basis(self.own, self.own.activations)
        if self.kernel is None:
            self.kernel, self.quantized, threshold = rounded_kernel(
                self.own.op,
                x,
                w,
                *args,
                lhs=lhs,
                quantizer=self.weights.quantizer,
                threshold=self.weights.kept,
                damping=self._damping,
                layer=self._path,
                **kwargs,
            )
            if self.weights.threshold is None:
                self.weights.threshold = Threshold(threshold)
            self._done[self._path] = self
        return self.own.op(x, self.quantized.astype(w.dtype), *args, lhs=lhs, **kwargs)
