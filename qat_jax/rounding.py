"""Rounding that makes up for itself, of one kernel: GPTQ, for any grid, granularity and scale.

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
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qat_jax import ops
from qat_jax.formats import Format
from qat_jax.quantizer import Quantizer, code_step, quantize
from qat_jax.scales import reciprocal

_UNFOLDED_AT_ONCE = 1 << 26  # elements of a convolution's input, each once for each window


class RoundedKernel(NamedTuple):
    """A kernel with codes that were chosen.

    Attributes:
      kernel: what its quantiser makes those codes of, in float32 or more.
      quantized: what the quantiser makes of it; the same, but where scales are rounded after codes
        are found (see `IntScale`).
      threshold: the thresholds of the quantiser.
    """

    kernel: jax.Array
    quantized: jax.Array
    threshold: jax.Array


def can_be_rounded(op: Any) -> bool:
    """Whether an operation is one whose kernel can be rounded."""
    return op in _UNFOLDED


def rounded_kernel(
    op: Callable[..., jax.Array],
    x: jax.Array,
    w: jax.Array,
    *args: Any,
    lhs: ops.QuantizeFn | None,
    quantizer: Quantizer,
    threshold: jax.Array | None,
    damping: float,
    layer: str,
    **kwargs: Any,
) -> RoundedKernel:
    """The kernel of an operation, rounded so that it answers an input as it did before.

    Args:
      op: an operation of `ops` that `can_be_rounded`.
      x: the input.
      w: the kernel.
      *args: what else the operation takes.
      lhs: quantises the input, or None.
      quantizer: the kernel's.
      threshold: its thresholds; None: those that the quantiser finds.
      damping: what is added to the energy of each input, as a share of their mean.
      layer: the layer's path, for errors.
      **kwargs: what else the operation takes.

    Raises:
      ValueError: the layer is reached under a transformation, something is not finite, or there is
        too little damping for so few examples.
    """
    layer = layer or "the layer"
    if isinstance(x, jax.core.Tracer) or isinstance(w, jax.core.Tracer):
        raise ValueError(
            f"{layer} runs under jax.jit, scan, remat or the like, where there are no values to "
            "round by: build the model without it, or leave the kernel out with operands=…"
        )
    axes: dict[str, Any] = {}

    def seen(w: jax.Array, **given: Any) -> jax.Array:
        axes.update(given)
        return w

    given = inspect.signature(op).bind(x, w, *args, **kwargs)
    given.apply_defaults()
    given.arguments.update(lhs=lhs, rhs=seen)
    unfolding = _UNFOLDED[op](**given.arguments)
    if threshold is None:
        threshold = quantizer.threshold(w, **axes)
    step = quantize(w, quantizer, threshold=threshold, **axes).step
    step = jnp.broadcast_to(step, w.shape)
    divisor = code_step(w, quantizer, threshold=threshold, **axes)
    energy = _energy(unfolding.parts)
    if not (np.isfinite(energy).all() and jnp.isfinite(step).all()):
        raise ValueError(
            f"{layer} sees something that is not finite: look for NaN or infinity in the batches, "
            "the kernel, or in what the model makes of them"
        )
    try:
        order, factor = _factors(energy, damping)
    except np.linalg.LinAlgError as error:
        raise ValueError(
            f"the inputs of {layer} do not determine its kernel ({error}): give more examples, or "
            f"more damping than {damping}"
        ) from error
    quantized = _in_order(w, step, order, factor, quantizer.format, unfolding)
    kernel = jnp.where(step == divisor, quantized, quantized * (divisor * reciprocal(step)))
    return RoundedKernel(kernel, quantized, threshold)


def _in_order(
    w: jax.Array,
    step: jax.Array,
    order: np.ndarray,
    factor: np.ndarray,
    format: Format,
    unfolding: "_Unfolding",
) -> jax.Array:
    """The kernel rounded in an order of its inputs, in the steps' dtype."""
    dtype = step.dtype

    def rows(a: jax.Array) -> jax.Array:
        return jnp.take_along_axis(unfolding.to_rows(a), order[:, :, None], 1)

    moves = jnp.asarray(factor, dtype)
    rounded = _rounded_rows(rows(w.astype(dtype)), rows(step), moves, format)
    places = rows(jnp.arange(w.size).reshape(w.shape))
    return jnp.zeros(w.size, dtype).at[places.ravel()].set(rounded.ravel()).reshape(w.shape)


class _Unfolding(NamedTuple):
    """A layer's operands as those of a product of matrices, in groups that share nothing.

    Attributes:
      parts: of the left operand, quantised, [group, sample, input]: so many samples at a time as
        memory holds.
      to_rows: makes an array of the kernel's shape one of [group, input, output].
    """

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
    return _Unfolding(iter([samples]), lambda w: _matrices(w, w_batch, w_contracted, w_free))


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

    return _Unfolding(parts(), to_rows)


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
