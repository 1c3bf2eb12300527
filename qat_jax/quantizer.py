"""A quantiser: the independent choices as one value, and the functions that apply it."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from qat_jax.clipping import Clipping, Octav, accumulation_dtype
from qat_jax.formats import Int
from qat_jax.gradients import GradientRule, gradient_rule, with_gradient
from qat_jax.granularity import ChannelAxis, Granularity, PerTensor


@dataclasses.dataclass(frozen=True)
class Quantizer:
    """How to quantise an array: a hashable value, safe as a static argument of ``jax.jit``.

    Calling it is `fake_quant`, so that it can stand wherever an operation of ``ops`` takes a
    function of (x, channel_axis).

    Attributes:
      format: which numbers exist.
      granularity: which elements share a scale.
      clipping: how the threshold is found.
      gradient: what the backward pass believes: "ste", "pwl", "mad" or a rule of ``gradients``.

    Example:
      >>> w4 = Quantizer(Int(4), granularity=PerTensor(), clipping=Octav(), gradient="mad")
      >>> w4(jnp.array([0.0, 0.11, -0.52, 1.0])).shape
      (4,)
    """

    format: Int
    granularity: Granularity = PerTensor()
    clipping: Clipping = Octav()
    gradient: str | GradientRule = "mad"

    def __post_init__(self) -> None:
        gradient_rule(self.gradient)

    def __call__(self, x: jax.Array, channel_axis: ChannelAxis = None) -> jax.Array:
        """Fake quantisation of x: see `fake_quant`."""
        return fake_quant(x, self, channel_axis=channel_axis)

    def threshold(self, x: jax.Array, channel_axis: ChannelAxis = None) -> jax.Array:
        """The clipping threshold of each group of x, keeping x's dimensions."""
        x = jnp.asarray(x)
        axes = self.granularity.group_axes(x.ndim, channel_axis)
        return self.clipping.threshold(x, self.format, axes)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QTensor:
    """A quantised array: integer codes and their scale. A pytree.

    Attributes:
      codes: integers of the original shape.
      scale: the step between neighbouring codes, float32 (float64 for a float64 original), of the
        same number of dimensions as ``codes`` and length 1 along axes that share a scale. NaN for
        a group that held NaN or infinity.
      format: the format of the codes (static).
      dtype: of the original array (static).
    """

    codes: jax.Array
    scale: jax.Array
    format: Int = dataclasses.field(metadata={"static": True})
    dtype: np.dtype = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the original array."""
        return self.codes.shape


def fake_quant(
    x: jax.Array,
    quantizer: Quantizer,
    *,
    channel_axis: ChannelAxis = None,
    threshold: jax.Array | None = None,
) -> jax.Array:
    """Quantise and dequantise in one step, with the quantiser's gradient.

    Args:
      x: floating-point array of any shape; half precision is quantised in float32.
      quantizer: the description.
      channel_axis: the axis or axes with a scale each, for granularities that have them.
      threshold: use these thresholds, broadcastable to x, instead of searching for them.

    Returns:
      An array of x's shape and dtype. A group whose threshold is 0 becomes 0; NaN and infinity
      become NaN, and so does, with a threshold found from the data, all of their group.

    Example:
      >>> x = jnp.array([-1.0, 0.1, 0.3, 0.9])
      >>> fake_quant(x, Quantizer(Int(3, narrow=True)), threshold=0.75)
      Array([-0.75,  0.  ,  0.25,  0.75], dtype=float32)
    """
    x = jnp.asarray(x)
    if threshold is None:
        threshold = quantizer.threshold(x, channel_axis)
    else:
        threshold = jax.lax.stop_gradient(jnp.asarray(threshold, accumulation_dtype(x)))
    return _fake_quant_at(quantizer.format, quantizer.gradient)(x, threshold)


def quantize(
    x: jax.Array,
    quantizer: Quantizer,
    *,
    channel_axis: ChannelAxis = None,
    threshold: jax.Array | None = None,
) -> QTensor:
    """Quantise to integer codes and a scale. Not differentiable: see `fake_quant`.

    ``dequantize(quantize(x, …))`` equals ``fake_quant(x, …)`` bit for bit for finite x. Integers
    cannot hold a NaN, so a group with a non-finite element gets a NaN scale.

    Args:
      x: as for `fake_quant`.
      quantizer: as for `fake_quant`.
      channel_axis: as for `fake_quant`.
      threshold: as for `fake_quant`.

    Returns:
      Codes of x's shape with their scale.

    Example:
      >>> q = quantize(jnp.array([-1.0, 0.1, 0.3, 0.9]), Quantizer(Int(3)), threshold=1.0)
      >>> q.codes, q.scale
      (Array([-4,  0,  1,  3], dtype=int8), Array([0.25], dtype=float32))
    """
    x = jax.lax.stop_gradient(jnp.asarray(x))
    if threshold is None:
        threshold = quantizer.threshold(x, channel_axis)
    threshold = jnp.asarray(threshold, accumulation_dtype(x))
    threshold = threshold.reshape((1,) * (x.ndim - threshold.ndim) + threshold.shape)
    shared = tuple(axis for axis in range(x.ndim) if threshold.shape[axis] == 1)
    codes, step = _codes(x, threshold, quantizer.format)
    finite = jnp.all(jnp.isfinite(x), axis=shared, keepdims=True)
    return QTensor(
        codes=codes.astype(quantizer.format.code_dtype),
        scale=jnp.where(finite, step, jnp.nan),
        format=quantizer.format,
        dtype=x.dtype,
    )


def dequantize(q: QTensor) -> jax.Array:
    """The real numbers that a quantised array stands for, in its original dtype.

    Args:
      q: codes and scale.

    Returns:
      Floating-point array of q's shape and dtype.
    """
    return (q.codes.astype(q.scale.dtype) * q.scale).astype(q.dtype)


def _codes(x: jax.Array, threshold: jax.Array, format: Int) -> tuple[jax.Array, jax.Array]:
    """Codes of x, still as floating point, and the step between them."""
    grid = format.grid(x)
    # Products with 1/L, not quotients: compilers may turn a division by a constant into one.
    step = threshold * (1 / grid.steps)
    step = jnp.where(jnp.isinf(step), jnp.nan, step)
    # A step too small for its reciprocal (0 above all) quantises everything to 0. NaN is not less.
    tiny = jnp.finfo(step.dtype).tiny
    step = jnp.where(step < tiny, 0, step)
    per_step = jnp.where(step == 0, 0, 1 / jnp.where(step == 0, 1, step))
    codes = grid.round(x.astype(step.dtype) * per_step)
    return jnp.where(codes == 0, 0, codes), step  # integers have no -0


@functools.cache
def _fake_quant_at(
    format: Int, gradient: str | GradientRule
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    def forward(x: jax.Array, threshold: jax.Array) -> jax.Array:
        codes, step = _codes(x, threshold, format)
        # Saturation would make a number of an infinity.
        return jnp.where(jnp.isfinite(x), codes * step, jnp.nan).astype(x.dtype)

    return with_gradient(forward, format.lower, gradient)
