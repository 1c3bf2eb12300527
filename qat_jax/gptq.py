"""Rounding that makes up for itself: GPTQ, for any grid, granularity and scale.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers" (arXiv:2210.17323). The weights of an output are rounded one after the other, and
those not rounded yet are moved so that the layer's output stays where it was, as far as they can.
Scales are those of the original weights, so that the order is free: inputs of most energy come
first, since what is rounded last has nothing to make up with.
"""

import functools
import inspect
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from qat_jax import ops
from qat_jax.batches import joined, positional
from qat_jax.formats import Format
from qat_jax.nnx import (
    LayerSite,
    QuantizedOp,
    Threshold,
    copy_model,
    in_basis,
    layer_sites,
)
from qat_jax.quantizer import quantize
from qat_jax.scales import reciprocal

_UNFOLDED_AT_ONCE = 1 << 26  # elements of a convolution's input, each once for each window


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
        and site.installed.op in _UNFOLDED
        and site.installed.weights is not None
        and re.fullmatch(operands, site.weights) is not None
    )


class _RoundingOp(nnx.Module):
    """Takes the place of a quantised operation and rounds the kernel when it is called.

    Attributes:
      own: the operation.
      weights: its quantiser of the kernel, whose thresholds are frozen afterwards.
      kernel: the rounded kernel, once the operation has run.
    """

    def __init__(
        self, own: QuantizedOp, path: str, damping: float, done: dict[str, "_RoundingOp"]
    ) -> None:
        self.own = own
        self.weights: Any = own.weights
        self.kernel: Any = nnx.data(None)
        self._path = path
        self._damping = damping
        self._done = nnx.static(done)

    def __call__(self, x: jax.Array, w: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        """The operation, with the rounded kernel."""
        if isinstance(x, jax.core.Tracer) or isinstance(w, jax.core.Tracer):
            raise ValueError(
                f"{self._path or 'the layer'} runs under jax.jit, scan, remat or the like, where "
                "there are no values to round by: build the model without it, or leave the kernel "
                "out with operands=…"
            )
        axes: dict[str, Any] = {}

        def seen(w: jax.Array, **given: Any) -> jax.Array:
            axes.update(given)
            return w

        given = inspect.signature(self.own.op).bind(x, w, *args, **kwargs)
        given.apply_defaults()
        lhs = in_basis(self.own, self.own.activations)
        given.arguments.update(lhs=lhs, rhs=seen)
        unfolding = _UNFOLDED[self.own.op](**given.arguments)
        if self.kernel is None:
            self.kernel = self._rounded(w, axes, unfolding)
            self._done[self._path] = self
        return self.own.op(unfolding.x, self.kernel.astype(w.dtype), *args, **kwargs)

    def _rounded(self, w: jax.Array, axes: dict[str, Any], unfolding: "_Unfolding") -> jax.Array:
        quantizer = self.weights.quantizer
        if self.weights.threshold is None:
            self.weights.threshold = Threshold(quantizer.threshold(w, **axes))
        q = quantize(w, quantizer, threshold=self.weights.kept, **axes)
        step = jnp.broadcast_to(q.step, w.shape)
        dtype = step.dtype
        energy = _energy(unfolding.parts)
        if not (np.isfinite(energy).all() and jnp.isfinite(step).all()):
            raise ValueError(
                f"{self._path or 'the layer'} sees something that is not finite: look for NaN or "
                "infinity in the batches, the kernel, or in what the model makes of them"
            )
        try:
            order, factor = _factors(energy, self._damping)
        except np.linalg.LinAlgError as error:
            raise ValueError(
                f"the inputs of {self._path or 'the layer'} do not determine its kernel ({error}): "
                f"give more examples, or more damping than {self._damping}"
            ) from error
        in_order = order[:, :, None]
        rows, steps = (
            jnp.take_along_axis(unfolding.to_rows(a.astype(dtype)), in_order, 1) for a in (w, step)
        )
        rounded = _rounded_rows(rows, steps, jnp.asarray(factor, dtype), quantizer.format)
        places = unfolding.to_rows(jnp.arange(w.size).reshape(w.shape))
        places = jnp.take_along_axis(places, in_order, 1)
        return jnp.zeros(w.size, dtype).at[places.ravel()].set(rounded.ravel()).reshape(w.shape)


class _Unfolding(NamedTuple):
    """A layer's operands as those of a product of matrices, in groups that share nothing.

    Attributes:
      x: the left operand, quantised.
      parts: of it, [group, sample, input]: so many samples at a time as memory holds.
      to_rows: makes an array of the kernel's shape one of [group, input, output].
    """

    x: jax.Array
    parts: Iterator[jax.Array]
    to_rows: Callable[[jax.Array], jax.Array]


def _unfolded_dot_general(
    x: jax.Array,
    w: jax.Array,
    dimension_numbers: lax.DotDimensionNumbers,
    lhs: ops.QuantizeFn | None,
    rhs: ops.QuantizeFn | None,
    **_: Any,
) -> _Unfolding:
    x, _w = ops.dot_general_operands(x, w, dimension_numbers, lhs, rhs)
    (x_contracted, w_contracted), (x_batch, w_batch) = dimension_numbers
    x_free = ops.other_axes((*x_batch, *x_contracted), x.ndim)
    w_free = ops.other_axes((*w_batch, *w_contracted), w.ndim)
    samples = _matrices(x, x_batch, x_free, x_contracted)
    return _Unfolding(x, iter([samples]), lambda w: _matrices(w, w_batch, w_contracted, w_free))


def _unfolded_convolution(
    x: jax.Array,
    w: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None,
    rhs_dilation: Sequence[int] | None,
    dimension_numbers: lax.ConvGeneralDilatedDimensionNumbers,
    feature_group_count: int,
    lhs: ops.QuantizeFn | None,
    rhs: ops.QuantizeFn | None,
    **_: Any,
) -> _Unfolding:
    spec = lax.conv_dimension_numbers(x.shape, w.shape, dimension_numbers)
    x, _w = ops.convolution_operands(x, w, spec, feature_group_count, lhs, rhs)
    output, features, *window = spec.rhs_spec
    window_shape = tuple(w.shape[axis] for axis in window)

    def parts() -> Iterator[jax.Array]:
        count = math.ceil(x.size * math.prod(window_shape) / _UNFOLDED_AT_ONCE)
        for part in jnp.array_split(x, min(count, x.shape[spec.lhs_spec[0]]), spec.lhs_spec[0]):
            patches = lax.conv_general_dilated_patches(
                part, window_shape, window_strides, padding, lhs_dilation, rhs_dilation, spec
            )
            # XLA has the features first in these, then the window.
            patches = jnp.moveaxis(patches, spec.out_spec[1], -1)
            inputs = patches.shape[-1] // feature_group_count
            yield jnp.moveaxis(patches.reshape(-1, feature_group_count, inputs), 1, 0)

    def to_rows(w: jax.Array) -> jax.Array:
        outputs = w.shape[output] // feature_group_count
        rows = w.transpose(features, *window, output).reshape(-1, feature_group_count, outputs)
        return jnp.moveaxis(rows, 1, 0)

    return _Unfolding(x, parts(), to_rows)


_UNFOLDED: dict[Callable[..., jax.Array], Callable[..., _Unfolding]] = {
    ops.dot_general: _unfolded_dot_general,
    ops.conv_general_dilated: _unfolded_convolution,
}


def _matrices(x: jax.Array, *axes: Sequence[int]) -> jax.Array:
    """Three dimensions, each made of several."""
    shape = [math.prod(x.shape[axis] for axis in part) for part in axes]
    return x.transpose(*itertools.chain(*axes)).reshape(shape)


def _energy(parts: Iterable[jax.Array]) -> np.ndarray:
    """Sums over samples of the products of each two inputs: float64 [group, input, input]."""

    def products(part: jax.Array) -> np.ndarray:
        part = part.astype(jnp.promote_types(part.dtype, jnp.float32))
        found = jnp.einsum("gsk,gsl->gkl", part, part, precision=lax.Precision.HIGHEST)
        return np.asarray(found, np.float64)

    # One at a time: of a wide layer each is hundreds of megabytes.
    return functools.reduce(np.add, map(products, parts))


def _factors(energy: np.ndarray, damping: float) -> tuple[np.ndarray, np.ndarray]:
    """The order in which inputs are rounded, and Cholesky's factor of the inverse energy in it.

    Row k of the factor says how far the weights after the k-th move for an error in the k-th.
    """
    own = np.diagonal(energy, axis1=1, axis2=2)
    order = np.argsort(-own, axis=1, kind="stable")
    mean = own.mean(axis=1)
    added = np.where(mean > 0, damping * mean, 1)  # inputs that are always 0: rounding is free
    energy = energy + added[:, None, None] * np.eye(energy.shape[-1])
    energy = np.take_along_axis(energy, order[:, :, None], axis=1)
    energy = np.take_along_axis(energy, order[:, None, :], axis=2)
    return order, np.linalg.cholesky(np.linalg.inv(energy)).swapaxes(1, 2)


@functools.partial(jax.jit, static_argnames="format")
def _rounded_rows(
    weights: jax.Array, steps: jax.Array, factor: jax.Array, format: Format
) -> jax.Array:
    """Weights [group, input, output] rounded input after input (the paper's equations 2 and 3)."""
    grid = format.grid(weights)
    per_step = reciprocal(steps)

    def round_input(k: int, weights: jax.Array) -> jax.Array:
        codes = grid.round(weights[:, k] * per_step[:, k])
        rounded = jnp.where(codes == 0, 0, codes * steps[:, k])
        error = (weights[:, k] - rounded) / factor[:, k, k, None]
        weights = weights - factor[:, k, :, None] * error[:, None, :]
        return weights.at[:, k].set(rounded)

    return lax.fori_loop(0, weights.shape[1], round_input, weights)
