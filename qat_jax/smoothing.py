"""Outliers of activations moved into kernels: SmoothQuant, by powers of two.

Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language
Models" (arXiv:2211.10438). A feature of a layer's input is divided by a factor and its row of the
kernel multiplied with it, so that one threshold serves all features better. The factors here are
powers of two: in floating point nothing is rounded, the layer computes what it did bit for bit,
and hardware shifts.
"""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qat_jax import ops
from qat_jax.batches import compiled, positional
from qat_jax.features import LayerInput, layer_inputs, matching, refuse_thresholds
from qat_jax.nnx import Factors, Magnitude, captured_in_evaluation, in_all_runs


def smooth(
    model: nnx.Module,
    batches: Iterable[Any],
    *,
    operands: str = ".*",
    strength: float = 0.5,
) -> tuple[str, ...]:
    """Move outliers of activations into kernels, in place, as sample batches suggest.

    Feature j of a layer's input is divided by max|x_j|^strength / max|w_j|^(1 - strength)
    (arXiv:2211.10438, equation 4), w_j being the part of the kernel that it meets, which is
    multiplied with the same: here by the power of two next to that, after what the features of a
    layer have in common is taken out. Without quantisers the model computes what it did, bit for
    bit. Comes before thresholds are frozen or carried and before `gptq`. Smoothing again corrects
    the factors.

    Smoothed are dense layers and convolutions whose input and kernel are both quantised; those
    that share a kernel, stacks of layers (``nnx.scan``), and convolutions of several feature groups
    that are not depthwise are left.

    Args:
      model: a quantised NNX model, in either mode, which it keeps.
      batches: inputs of the model, one a batch: arrays, or tuples of positional arguments.
      operands: a regular expression; inputs whose whole path (``"layer1/0/conv1/activations"``) it
        does not match are left.
      strength: between 0, where only the kernels are evened out, and 1, where the inputs are.

    Returns:
      The paths of the inputs that are smoothed.

    Raises:
      ValueError: there is no batch, or no such input; one is not finite, or has thresholds that are
        frozen or carried; ``strength`` is not between 0 and 1. The model is then unchanged.

    Example:
      >>> from qat_jax import quantize_model
      >>> model = nnx.Sequential(nnx.Linear(2, 8, rngs=nnx.Rngs(0)))
      >>> model = quantize_model(model, "max-w8a8")
      >>> smooth(model, [jnp.array([[1.0, 64.0]])])
      ('layers/0/activations',)
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength lies between 0 and 1, unlike {strength!r}")
    chosen = matching(_smoothable(model), operands, to="smooth")
    for path, found in chosen.items():
        if found.op.rotation is not None:
            raise ValueError(f"{path} is rotated already: smooth the model before")
        refuse_thresholds(path, found, to="smooth")
    magnitudes = _magnitudes(model, batches)
    factors: dict[str, np.ndarray] = {}
    for path, found in chosen.items():
        if runs := in_all_runs(magnitudes, path):
            largest = np.max(np.asarray(runs, np.float64), axis=0)
            if not np.isfinite(largest).all():
                raise ValueError(
                    f"{path} is not finite: look for NaN or infinity in the batches, or in what "
                    "the model makes of them"
                )
            factors[path] = _factors(largest, found, strength)
    if not factors:
        raise ValueError(f"no layer whose input matches {operands!r} runs in evaluation")
    for path, divisors in factors.items():
        _divide(chosen[path], divisors)
    return tuple(factors)


def _smoothable(model: nnx.Module) -> dict[str, LayerInput]:
    """What can be smoothed, by the path of the input."""
    return {
        path: found
        for path, found in layer_inputs(model).items()
        if found.groups == 1 or found.is_depthwise
    }


def _magnitudes(model: nnx.Module, batches: Iterable[Any]) -> dict[str, np.ndarray]:
    """The largest magnitude of each feature of each operand, in all batches."""
    graphdef, state = nnx.split(model)

    @compiled
    def observe(state: nnx.State, *inputs: Any) -> dict[str, jax.Array]:
        return captured_in_evaluation(graphdef, state, Magnitude, *inputs)

    total: dict[str, np.ndarray] = {}
    for batch in positional(batches):
        found = {path: np.asarray(value) for path, value in observe(state, *batch).items()}
        total = {path: np.maximum(value, total.get(path, 0)) for path, value in found.items()}
    if not total:
        raise ValueError("no batch to smooth by: give at least one")
    return total


def _factors(largest: np.ndarray, found: LayerInput, strength: float) -> np.ndarray:
    """What each feature is divided by, given its largest magnitude."""
    kernel = found.kernel.get_value()
    others = ops.other_axes((found.axis,), kernel.ndim)
    of_kernel = np.asarray(jnp.max(jnp.abs(kernel), axis=others), np.float64)
    of_kernel = of_kernel.reshape(largest.size, -1).max(axis=1)
    used = (largest > 0) & (of_kernel > 0)  # the others have nothing to even out
    ratio = np.where(used, largest, 1) ** strength / np.where(used, of_kernel, 1) ** (1 - strength)
    exponents = np.log2(ratio)
    # What is common to all says nothing: without it kernels stay as large as they were.
    exponents -= exponents[used].mean() if used.any() else 0
    return np.where(used, 2.0 ** np.round(exponents), 1)


def _divide(found: LayerInput, divisors: np.ndarray) -> None:
    found.kernel.set_value(found.scaled(jnp.asarray(divisors)))
    before = 1 if found.op.factors is None else found.op.factors.get_value()
    found.op.factors = Factors(jnp.asarray(before / divisors, jnp.float32))
