"""Weights in and out of safetensors and npz files under other libraries' names and layouts."""

import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from qat_jax.array_file import read_arrays, write_arrays
from qat_jax.features import layer_inputs, with_usual_kernels
from qat_jax.models import conventions
from qat_jax.models.conventions import Convention
from qat_jax.nnx import is_own_parameter


def load_weights(model: nnx.Module, path: str | Path) -> None:
    """Replace a model's parameters and batch statistics, in place, by those of a file.

    The file's names tell which library's they are (see `conventions`). Everything is checked
    before anything is replaced: after an error the model is as it was. Values take the dtype of
    the variable they replace.

    Args:
        model: a model of this room, or of `Conv`, `Linear` and `BatchNorm` layers; one made
            under `nnx.eval_shape` will do, and saves drawing weights that are replaced anyway.
        path: a safetensors or npz file of floating-point arrays.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not such a file, or its names, shapes or dtypes are not exactly
            those of the model; or that is smoothed or rotated.
    """
    if any(found.is_changed for found in layer_inputs(model).values()):
        raise ValueError(
            "the model is smoothed or rotated, which its kernels are a part of: load weights into "
            "the float model, before"
        )
    arrays = read_arrays(path, "weights")
    known = conventions.of_model(model)
    convention = max(known, key=lambda known: len(arrays.keys() & _named(model, known).keys()))
    variables = _named(model, convention)
    arrays = {convention.renamed(name): array for name, array in arrays.items()}
    arrays = {
        name: array
        for name, array in arrays.items()
        if name in variables or not re.fullmatch(convention.ignored, name)
    }
    _check_names(path, arrays, variables)
    for name, variable in variables.items():
        _check_array(path, name, arrays[name], _shape_in_file(convention, name, variable))
    for name, variable in variables.items():
        before = variable.get_value()
        value = convention.from_file(name, arrays[name]).reshape(before.shape)
        variable.set_value(jnp.asarray(value, dtype=before.dtype))


def save_weights(model: nnx.Module, path: str | Path, library: str | None = None) -> None:
    """Write a model's parameters and batch statistics to a file that `load_weights` reads.

    Args:
        model: a model of this room, or of `Conv`, `Linear` and `BatchNorm` layers; of a smoothed or
            rotated one the kernels are written as they were before.
        path: the safetensors file to write, or npz if it ends so; an existing one is replaced
            once the new one is whole.
        library: whose names and layouts; None is the first of those that the model has.

    Raises:
        FileNotFoundError: the folder of `path` does not exist.
        ValueError: the library has no such model, a variable no name in it, `path` is a folder, or
            the model is packed.
    """
    known = {convention.library: convention for convention in conventions.of_model(model)}
    library = library or next(iter(known))
    if library not in known:
        raise ValueError(
            f"no names for {type(model).__name__} in {library!r}: give one of {', '.join(known)}"
        )
    convention = known[library]
    variables = _named(with_usual_kernels(model), convention)
    if empty := [name for name, variable in variables.items() if not variable.get_value().size]:
        raise ValueError(f"{empty[0]} is packed: qat_jax.export.save_packed writes such a model")
    arrays = {
        name: convention.to_file(name, np.asarray(variable.get_value()))
        for name, variable in variables.items()
    }
    write_arrays(arrays, path)


def _named(model: nnx.Module, convention: Convention) -> dict[str, nnx.Variable]:
    """Parameters and batch statistics of a model by their names in a library.

    Learned thresholds have none: `save_thresholds` writes those.
    """
    return {
        convention.name(model, path): node
        for path, node in nnx.iter_graph(model)
        if is_own_parameter(node) or isinstance(node, nnx.BatchStat)
    }


def _shape_in_file(convention: Convention, name: str, variable: nnx.Variable) -> tuple[int, ...]:
    as_large = np.broadcast_to(np.zeros(()), variable.get_value().shape)  # takes no memory
    return convention.to_file(name, as_large).shape


def _check_names(path: str | Path, found: dict[str, Any], expected: dict[str, Any]) -> None:
    differences = [
        f"{label} names: {len(names)} (such as {min(names)})"
        for label, names in [
            ("missing", expected.keys() - found.keys()),
            ("unexpected", found.keys() - expected.keys()),
        ]
        if names
    ]
    if differences:
        in_file = _depth(array.shape for array in found.values())
        in_model = _depth(variable.get_value().shape for variable in expected.values())
        raise ValueError(
            f"{path} does not fit the model: {' and '.join(differences)}; the file holds "
            f"{in_file} convolutional and linear layers, the model {in_model}: build "
            "the model with the file's depth, or name the arrays as save_weights does"
        )


def _depth(shapes: Any) -> int:
    """Number of convolutional and linear layers: their kernels alone are not vectors."""
    return sum(len(shape) > 1 for shape in shapes)


def _check_array(path: str | Path, name: str, array: np.ndarray, shape: tuple[int, ...]) -> None:
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(f"{name} in {path} is {array.dtype}: convert it to floating point")
    if array.shape != shape:
        raise ValueError(
            f"{name} in {path} has shape {array.shape}, the model needs {shape}: build the model "
            "with the file's width, input channels and classes"
        )
