"""Pretrained MobileNet v1 weights under the names of Keras's application of that name."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError
from safetensors.numpy import load_file

from qat_jax.models.mobilenet_v1 import MobileNetV1

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
        ValueError: it is not a safetensors file, or its names or shapes are not the model's.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"weights file {path} does not exist: give the path of a .safetensors file"
        )
    try:
        arrays = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error})") from error
    variables = {
        _keras_name(node_path): node
        for node_path, node in nnx.iter_graph(model)
        if isinstance(node, nnx.Param | nnx.BatchStat)
    }
    if differing := sorted(arrays.keys() ^ variables.keys()):
        raise ValueError(
            f"{path} is not of a MobileNet v1 in Keras's names: {len(differing)} names differ, "
            f"such as {differing[0]!r}"
        )
    values = {name: _model_layout(name, array) for name, array in arrays.items()}
    for name, variable in variables.items():
        if values[name].shape != variable.get_value().shape:
            raise ValueError(
                f"{name} in {path} has shape {values[name].shape} in the model's layout, the model "
                f"needs {variable.get_value().shape}: build it with the file's width and classes"
            )
    for name, variable in variables.items():
        variable.set_value(jnp.asarray(values[name], dtype=variable.get_value().dtype))


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


def _model_layout(name: str, array: np.ndarray) -> np.ndarray:
    """HWC1 to HW1C for depthwise kernels, 11IO to IO for the classifier's."""
    if name.endswith("depthwise_kernel"):
        return array.transpose(0, 1, 3, 2)
    return array.reshape(array.shape[-2:]) if name == "conv_preds/kernel" else array
