"""Weights in and out of safetensors files under PyTorch's names and layouts.

A variable's name is its path in the model under `module.`, as PyTorch's DataParallel saves it:
`layer1/0/bn1/mean` is `module.layer1.0.bn1.running_mean`. Convolution kernels are OIHW in the
file and HWIO in the model; linear kernels are transposed.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from qat_jax.safetensors_file import read_arrays

_PREFIX = "module"
_TORCH_NAMES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
# PyTorch's batch normalisation counts its batches; with a fixed momentum nothing reads the count.
_IGNORED_SUFFIX = ".num_batches_tracked"


def load_weights(model: nnx.Module, path: str | Path) -> None:
    """Replace a model's parameters and batch statistics, in place, by those of a file.

    Everything is checked before anything is replaced: after an error the model is as it was.
    Values take the dtype of the variable they replace.

    Args:
        model: a model of `Conv`, `Linear` and `BatchNorm` layers, such as `CifarResNet`; one made
            under `nnx.eval_shape` will do, and saves drawing weights that are replaced anyway.
        path: a safetensors file of floating-point arrays under PyTorch's names.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a safetensors file, or its names, shapes or dtypes are not exactly
            those of the model.
    """
    arrays = _read(path)
    variables = _named_variables(model)
    olds = {name: variable.get_value() for name, variable in variables.items()}
    _check_names(path, arrays, olds)
    news = {name: _from_torch_layout(array) for name, array in arrays.items()}
    for name, old in olds.items():
        _check_array(path, name, news[name], old)
    for name, variable in variables.items():
        variable.set_value(jnp.asarray(news[name], dtype=olds[name].dtype))


def save_weights(model: nnx.Module, path: str | Path) -> None:
    """Write a model's parameters and batch statistics to a file that `load_weights` reads.

    Args:
        model: a model of `Conv`, `Linear` and `BatchNorm` layers, such as `CifarResNet`.
        path: the safetensors file to write; an existing one is replaced.

    Raises:
        FileNotFoundError: the folder of `path` does not exist.
        ValueError: a variable of the model has no PyTorch name.
    """
    folder = Path(path).parent
    if not folder.is_dir():
        raise FileNotFoundError(f"folder {folder} does not exist: make it before saving {path}")
    arrays = {
        # The file holds the buffer as it lies in memory, so a transposed view will not do.
        name: np.ascontiguousarray(_to_torch_layout(np.asarray(variable.get_value())))
        for name, variable in _named_variables(model).items()
    }
    save_file(arrays, path)


def _named_variables(model: nnx.Module) -> dict[str, nnx.Variable]:
    """Parameters and batch statistics of a model by their PyTorch names."""
    return {
        _torch_name(path): node
        for path, node in nnx.iter_graph(model)
        if isinstance(node, (nnx.Param, nnx.BatchStat))
    }


def _torch_name(path: tuple) -> str:
    *layer, leaf = path
    if leaf not in _TORCH_NAMES:
        raise ValueError(
            f"variable {'/'.join(map(str, path))} has no PyTorch name: "
            "load and save models of Conv, Linear and BatchNorm layers only"
        )
    return ".".join(map(str, (_PREFIX, *layer, _TORCH_NAMES[leaf])))


def _from_torch_layout(array: np.ndarray) -> np.ndarray:
    """OIHW to HWIO, [out, in] to [in, out]; vectors as they are."""
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T


def _to_torch_layout(array: np.ndarray) -> np.ndarray:
    """HWIO to OIHW, [in, out] to [out, in]; vectors as they are."""
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T


def _read(path: str | Path) -> dict[str, np.ndarray]:
    arrays = read_arrays(path, "weights")
    return {name: a for name, a in arrays.items() if not name.endswith(_IGNORED_SUFFIX)}


def _check_names(
    path: str | Path, found: dict[str, np.ndarray], expected: dict[str, jax.Array]
) -> None:
    differences = [
        f"{label} names: {len(names)} (such as {min(names)})"
        for label, names in [
            ("missing", expected.keys() - found.keys()),
            ("unexpected", found.keys() - expected.keys()),
        ]
        if names
    ]
    if differences:
        raise ValueError(
            f"{path} does not fit the model: {' and '.join(differences)}; the file holds "
            f"{_depth(found)} convolutional and linear layers, the model {_depth(expected)}: build "
            "the model with the file's depth, or name the arrays as save_weights does"
        )


def _depth(arrays: dict) -> int:
    """Number of convolutional and linear layers: their kernels alone are not vectors."""
    return sum(array.ndim > 1 for array in arrays.values())


def _check_array(path: str | Path, name: str, value: np.ndarray, old: jax.Array) -> None:
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(f"{name} in {path} is {value.dtype}: convert it to floating point")
    if value.shape != old.shape:
        raise ValueError(
            f"{name} in {path} has shape {value.shape} in the model's layout, the model needs "
            f"{old.shape}: build the model with the file's width, input channels and classes"
        )
