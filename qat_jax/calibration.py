"""Thresholds in a model's state: found on sample batches and frozen, or carried along."""

import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qat_jax.array_file import read_arrays, write_arrays
from qat_jax.batches import compiled, mean_candidates, mean_of_runs
from qat_jax.granularity import Granularity, PerChannel, PerTensor, PerVector
from qat_jax.nnx import (
    Candidate,
    Carried,
    LayerSite,
    OperandQuantizer,
    Threshold,
    captured_in_evaluation,
    is_weight,
    layer_sites,
    operand_quantizers,
)


def calibrate(
    model: nnx.Module,
    batches: Iterable[Any],
    *,
    operands: str = ".*",
    pool: bool = False,
) -> tuple[str, ...]:
    """Freeze thresholds, in place, that sample batches suggest.

    Each quantiser's own clipping rule finds a candidate in each batch, in a forward pass of the
    evaluation mode without quantisation; the threshold is the mean of the candidates
    (arXiv:2206.06501, section 5, which takes 5 batches; 10 for BERT). From then on the quantiser
    searches for nothing. Calibrating again replaces the thresholds.

    Frozen are the thresholds of weights and of activations with one scale a tensor. A scale for
    each example, token or vector of an activation has nothing to be learnt from other batches:
    those stay dynamic.

    Args:
      model: a quantised NNX model.
      batches: inputs of the model, one a batch: arrays, or tuples of positional arguments.
      operands: a regular expression; operands whose whole path (``"layer1/0/conv1/weights"``) it
        does not match stay as they are.
      pool: search once in all batches joined instead, which is exact for every rule, at the price
        of their memory.

    Returns:
      The paths of the frozen operands.

    Raises:
      ValueError: there is no batch, or no operand to freeze, or a batch that is not finite
        somewhere in the model; the model is then unchanged.

    Example:
      >>> from qat_jax import quantize_model
      >>> model = nnx.Sequential(nnx.Linear(4, 8, rngs=nnx.Rngs(0)))
      >>> model = quantize_model(model, "max-w4a4")
      >>> calibrate(model, [jnp.ones((2, 4)), 3 * jnp.ones((2, 4))])
      ('layers/0/activations', 'layers/0/weights')
      >>> model.layers[0].dot_general.activations.threshold[...]
      Array([[2.]], dtype=float32)
    """
    quantizers = {
        path: quantizer
        for path, quantizer in operand_quantizers(model).items()
        if re.fullmatch(operands, path) and _outlives_a_batch(path, quantizer)
    }
    if not quantizers:
        raise ValueError(
            f"no operand to calibrate matches {operands!r}: there are "
            f"{', '.join(operand_quantizers(model)) or 'none, quantise the model first'}; "
            "activations need granularity PerTensor()"
        )
    observe = _observer(model, quantizers)
    found = mean_candidates(observe, batches, pool=pool)
    if not found:
        raise ValueError(
            f"no operand that matches {operands!r} runs in evaluation, or all run inside "
            "transformations that drop what is sown there, such as nnx.scan with StateAxes of "
            "...: None: give ... the axis 0"
        )
    for path, threshold in found.items():
        quantizers[path].threshold = Threshold(threshold)
    return tuple(found)


def carry_thresholds(model: nnx.Module, *inputs: Any) -> tuple[str, ...]:
    """Let training, in place, search for thresholds from those of the step before.

    Weights and activations drift slowly: a search that begins where the last one ended reads its
    operand once, mostly (`Octav.refined`). The first step begins with what a batch suggests, in a
    forward pass without quantisation. What is carried is a part of the model's state, as batch
    statistics are. In evaluation mode (``model.eval()``) thresholds are found from nothing, as
    always, so that an answer does not depend on what was trained before it. A model without dropout
    and batch norms shows no mode when it is quantised: call ``model.eval()`` after that.

    Carried are the thresholds of operands with one scale a tensor or a channel (weights only),
    whose clipping rule can `refine` and which are not frozen.

    Args:
      model: a quantised NNX model.
      *inputs: a batch for it.

    Returns:
      The paths of the operands that carry.

    Raises:
      ValueError: there is none; the model is then unchanged.

    Example:
      >>> from qat_jax import quantize_model
      >>> model = nnx.Sequential(nnx.Linear(4, 8, rngs=nnx.Rngs(0)))
      >>> model = quantize_model(model, "octav-w4a4")
      >>> carry_thresholds(model, jnp.ones((2, 4)))
      ('layers/0/activations', 'layers/0/weights')
    """
    quantizers = {
        path: quantizer
        for path, quantizer in operand_quantizers(model).items()
        if quantizer.quantizer.refines
        and quantizer.threshold is None
        and _outlives_a_batch(path, quantizer)
    }
    if not quantizers:
        raise ValueError(
            "no operand can carry thresholds: quantise the model with clipping Octav() and "
            "granularity PerTensor(), or PerChannel() for weights, and do not freeze them"
        )
    candidates = _observer(model, quantizers)(*inputs)
    for path, candidate in candidates.items():
        quantizers[path].carried = Carried(candidate)
    return tuple(candidates)


def save_thresholds(model: nnx.Module, path: str | Path) -> None:
    """Write the frozen thresholds of a model to a safetensors file, or an npz.

    Args:
      model: a calibrated NNX model.
      path: the file to write, npz if it ends so; an existing one is replaced.

    Raises:
      FileNotFoundError: the folder of ``path`` does not exist.
      ValueError: the model has no frozen thresholds.
    """
    frozen = {
        name: np.asarray(kept)
        for name, quantizer in operand_quantizers(model).items()
        if (kept := quantizer.kept) is not None
    }
    if not frozen:
        raise ValueError("the model has no frozen thresholds: calibrate it first")
    write_arrays(frozen, path)


def load_thresholds(model: nnx.Module, path: str | Path) -> None:
    """Freeze, in place, the thresholds of a file that `save_thresholds` wrote.

    Args:
      model: an NNX model, quantised as the saved one was.
      path: a safetensors or npz file.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is damaged, or of another model; the model is then unchanged.
    """
    arrays = read_arrays(path, "thresholds")
    quantizers = operand_quantizers(model)
    unknown = sorted(arrays.keys() - quantizers.keys())
    if unknown:
        raise ValueError(
            f"{path} has thresholds for {unknown[0]!r}, which the model does not quantise: "
            "quantise it with the policy that was calibrated"
        )
    kernels = {site.path: site for site in layer_sites(model) if site.kernel is not None}
    for name, array in arrays.items():
        granularity = quantizers[name].quantizer.granularity
        if not any(
            _fits(shape, granularity, kernel)
            for shape, kernel in _of_one_layer(array.shape, name, kernels)
        ):
            raise ValueError(
                f"{path} has thresholds of shape {array.shape} for {name!r}, which does not go "
                f"with {granularity} there: they are of another model or policy"
            )
        if not (np.isfinite(array) & (array >= 0)).all():
            raise ValueError(f"{path} has thresholds for {name!r} that are negative or not finite")
    for name, array in arrays.items():
        quantizers[name].threshold = Threshold(jnp.asarray(array))


def _of_one_layer(
    shape: tuple[int, ...], operand: str, kernels: Mapping[str, LayerSite]
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...] | None]]:
    """A shape of thresholds, and the kernel's if it is known, without the axes of a stack.

    The thresholds of a stack, as ``nnx.vmap`` and ``nnx.scan`` take layers, are stacked in front;
    where in a kernel the layers lie is not said anywhere, so that all that is possible comes.
    """
    layer = operand.rpartition("/")[0]
    # Attention has no kernel of its own, but layers inside that are stacked as it is.
    site = kernels.get(layer) or next(
        (site for path, site in kernels.items() if path.startswith(f"{layer}/")), None
    )
    if site is None:
        yield shape, None
        return
    kernel = site.kernel.shape
    depth = len(kernel) - site.kernel_rank
    for stack in itertools.combinations(range(len(kernel)), depth):
        if shape[:depth] == tuple(kernel[axis] for axis in stack):
            one = tuple(length for axis, length in enumerate(kernel) if axis not in stack)
            yield shape[depth:], one if is_weight(operand) else None


def _fits(shape: tuple[int, ...], granularity: Granularity, kernel: tuple[int, ...] | None) -> bool:
    """Whether thresholds of a shape can be those of an operand; of kernels their shape is known."""
    if isinstance(granularity, PerTensor):
        return math.prod(shape) == 1
    if kernel is None or not isinstance(granularity, PerChannel | PerVector):
        return True
    possible = [{1, length} for length in kernel]
    if isinstance(granularity, PerVector):
        # They lie along the input features, or through the window of a depthwise kernel.
        window = math.prod(kernel[:-2])
        for lengths, length in zip(possible, kernel, strict=True):
            lengths.update(-(-cut // granularity.size) for cut in (length, window))
    return len(shape) == len(kernel) and all(
        found in lengths for found, lengths in zip(shape, possible, strict=True)
    )


def _outlives_a_batch(path: str, quantizer: OperandQuantizer) -> bool:
    """Whether the thresholds of an operand mean something for other batches than their own."""
    return is_weight(path) or isinstance(quantizer.quantizer.granularity, PerTensor)


def _observer(model: nnx.Module, paths: Iterable[str]) -> Callable[..., dict[str, jax.Array]]:
    """Those operands' candidates in a batch, in that order, if they run; means over their runs."""
    graphdef, state = nnx.split(model)

    @compiled
    def observe(state: nnx.State, *inputs: Any) -> dict[str, jax.Array]:
        runs: dict[str, list[jax.Array]] = {}
        candidates = captured_in_evaluation(graphdef, state, Candidate, *inputs)
        for name, candidate in candidates.items():
            runs.setdefault(re.sub(r"/\d+$", "", name), []).append(candidate)
        return {name: mean_of_runs(found) for name, found in runs.items()}

    def in_order(*inputs: Any) -> dict[str, jax.Array]:
        candidates = observe(state, *inputs)
        return {path: candidates[path] for path in paths if path in candidates}

    return in_order
