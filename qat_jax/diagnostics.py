"""Diagnostics: how well a quantiser fits its array, as scalars computed inside the step."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qat_jax.clipping import accumulation_dtype
from qat_jax.granularity import ChannelAxis, VectorAxis
from qat_jax.quantizer import Quantizer, fake_quant


class Diagnostics(NamedTuple):
    """One operand's figures: scalars, float32 (float64 for float64 arrays). A pytree.

    Attributes:
      sqnr_db: signal to quantisation noise, 10 log10(Σ x² / Σ (x - x̂)²), in dB; infinite where
        the array is represented exactly.
      clipped_fraction: the share of the elements that lie beyond their threshold.
      threshold_over_max: the mean over groups of the threshold over the largest magnitude; 1 for
        max scaling, less where clipping pays; groups of zeros do not count.
    """

    sqnr_db: jax.Array
    clipped_fraction: jax.Array
    threshold_over_max: jax.Array


def fake_quant_with_diagnostics(
    x: jax.Array,
    quantizer: Quantizer,
    *,
    channel_axis: ChannelAxis = None,
    vector_axis: VectorAxis = None,
    threshold: jax.Array | None = None,
    learned: bool = False,
) -> tuple[jax.Array, Diagnostics]:
    """`fake_quant` and its figures, from one search for the threshold.

    Args:
      x: floating-point array.
      quantizer: the description.
      channel_axis: the axis or axes with a scale each.
      vector_axis: the axis or axes along which vectors lie.
      threshold: use these thresholds instead of searching for them.
      learned: whether given thresholds get a gradient: see `fake_quant`.

    Returns:
      The fake-quantised array, and its diagnostics, which no gradient flows into.
    """
    axes: dict[str, Any] = {"channel_axis": channel_axis, "vector_axis": vector_axis}
    x = jnp.asarray(x)
    if threshold is None and not learned:
        threshold = quantizer.threshold(x, **axes)
    y = fake_quant(x, quantizer, **axes, threshold=threshold, learned=learned)
    return y, diagnose(x, y, jnp.asarray(threshold, accumulation_dtype(x)), quantizer, **axes)


def diagnose(
    x: jax.Array,
    quantized: jax.Array,
    threshold: jax.Array,
    quantizer: Quantizer,
    *,
    channel_axis: ChannelAxis = None,
    vector_axis: VectorAxis = None,
) -> Diagnostics:
    """The figures of an array, its quantised version and its thresholds.

    Args:
      x: the original array.
      quantized: what became of it, of the same shape.
      threshold: its thresholds, one a group or broadcastable to that.
      quantizer: the description that was used.
      channel_axis: the axis or axes with a scale each.
      vector_axis: the axis or axes along which vectors lie.

    Returns:
      The diagnostics.
    """
    x, quantized, threshold = jax.lax.stop_gradient((x, quantized, threshold))
    groups = quantizer.granularity.groups(x.ndim, channel_axis, vector_axis)
    magnitude = quantizer.format.magnitude(x).astype(threshold.dtype)
    largest = groups.reduce(
        magnitude, lambda x, axes: jnp.max(x, axis=axes, keepdims=True, initial=0)
    )
    x = x.astype(threshold.dtype)
    noise = jnp.sum(jnp.square(x - quantized))
    upper = groups.expand(threshold, x.shape)
    clipped = (x > upper) | (x < quantizer.format.lower(upper))
    ratio = jnp.where(largest > 0, threshold / jnp.where(largest > 0, largest, 1), 0)
    sqnr_db = 10 * (jnp.log10(jnp.sum(jnp.square(x))) - jnp.log10(noise))
    return Diagnostics(
        sqnr_db=jnp.where(noise == 0, jnp.inf, sqnr_db),
        clipped_fraction=jnp.mean(clipped, dtype=threshold.dtype),
        threshold_over_max=jnp.sum(ratio) / jnp.maximum(jnp.sum(largest > 0), 1),
    )
