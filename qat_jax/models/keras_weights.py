"""Pretrained MobileNet v1 weights under the names of Keras's application of that name."""

from pathlib import Path

import jax.numpy as jnp
from flax import nnx

from qat_jax.models.mobilenet_v1 import MobileNetV1
from qat_jax.safetensors_file import read_arrays

_BATCH_NORM = {"scale": "gamma", "bias": "beta", "mean": "moving_mean", "var": "moving_variance"}


def load_keras_mobilenet_v1(model: MobileNetV1, path: str | Path) -> None:
    """Replace a MobileNet's parameters and batch statistics, in place, by those of a file.

    The names are `conv1/kernel`, `conv_dw_1/depthwise_kernel`, `conv_pw_1_bn/gamma`,
    `conv_preds/bias` and so on, kernels HWIO. Everything is checked before anything is replaced.

    Args:
        model: of the file's width and classes.
        path: a safetensors file of floating-point arrays.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a safetensors file, or its names, shapes or dtypes are not exactly
            those of the model.
    """
    arrays = read_arrays(path, "weights")
    variables = {
        _keras_name(node_path): node
        for node_path, node in nnx.iter_graph(model)
        if isinstance(node, nnx.Param | nnx.BatchStat)
    }
    if differing := sorted(arrays.keys() ^ variables.keys()):
        raise ValueError(
            f"{path} is not of a MobileNet v1 in Keras's names: {len(differing)} names differ, "
            f"such as {differing[0]!r}: rename its arrays"
        )
    olds = {name: variable.get_value() for name, variable in variables.items()}
    for name, old in olds.items():
        array, shape = arrays[name], _keras_shape(name, old.shape)
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name} in {path} is {array.dtype}: convert it to floating point")
        if array.shape != shape:
            raise ValueError(
                f"{name} in {path} has shape {array.shape}, the model needs {shape}: "
                "build it with the file's width and classes"
            )
    for name, variable in variables.items():
        old = olds[name]
        variable.set_value(jnp.asarray(arrays[name].reshape(old.shape), dtype=old.dtype))


def _keras_name(path: tuple) -> str:
    """`blocks/0/depthwise_bn/scale` is `conv_dw_1_bn/gamma`."""
    *layers, leaf = path
    if layers == ["classifier"]:
        return f"conv_preds/{leaf}"
    if layers[0] in ("conv1", "bn1"):
        layer = {"conv1": "conv1", "bn1": "conv1_bn"}[layers[0]]
    else:
        _, number, kind = layers
        kind = kind.replace("depthwise", "conv_dw").replace("pointwise", "conv_pw")
        base, is_bn, _ = kind.partition("_bn")
        layer = f"{base}_{number + 1}{is_bn}"
    if leaf in _BATCH_NORM:
        return f"{layer}/{_BATCH_NORM[leaf]}"
    return f"{layer}/{'depthwise_kernel' if 'conv_dw' in layer else 'kernel'}"


def _keras_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """HW1C is HWC1 for depthwise kernels, IO is 11IO for the classifier's: only 1s move."""
    if name.endswith("depthwise_kernel"):
        height, width, one, channels = shape
        return height, width, channels, one
    return (1, 1, *shape) if name == "conv_preds/kernel" else shape
