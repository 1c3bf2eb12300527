"""Packed models in safetensors files, which a few lines of NumPy can read as well.

An array is stored under the path of its parameter. A quantised kernel ``"conv1/weights"`` is three
arrays: ``"conv1/weights.codes"`` and ``".scale"``, dense streams of bits (see `qat_jax.integer`),
and ``".coarse"`` where there is one; a frozen threshold is ``"conv1/activations.threshold"``, and
``"conv1/activations.factors"`` is what the features of a smoothed input are multiplied with first;
a kernel's ``"rotation"`` in the metadata, if it is not null, the length of the blocks of features
that are then turned (`hadamard.rotated`).
The metadata has, as JSON under ``"qat_jax"``, what is needed to read them: for each kernel its
shape, format and groups, and for each layer its quantisers. `docs/read_packed.py` is a reader.
"""

import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qat_jax.array_file import read_arrays, read_metadata, write_arrays
from qat_jax.description import describe, restore
from qat_jax.granularity import Groups
from qat_jax.integer.bits import packed_bytes
from qat_jax.integer.model import Packed, PackedKernel, PackedOp, PackedTable, install_kernel
from qat_jax.integer.packed import PackedTensor
from qat_jax.nnx import (
    Carried,
    Factors,
    LayerSite,
    Learned,
    OperandQuantizer,
    Threshold,
    layer_sites,
    operand_quantizers,
    quantize_model,
    report,
)
from qat_jax.policy import Policy, Rule

VERSION = 1
_KEY = "qat_jax"
_WHAT = "packed model"
_PARTS = ("codes", "scale", "coarse")
# What metadata has of each kernel, files from before rotations included, and of each layer.
_DESCRIPTION = {"shape", "dtype", "format", "axes", "vector_size", "scale_bits", "scale_dtype"}
_OPERANDS = {"weights", "activations"}


def save_packed(model: nnx.Module, path: str | Path) -> None:
    """Write a packed model.

    Args:
      model: from `pack_model`.
      path: the safetensors file to write; an existing one is replaced once the new one is whole.

    Raises:
      FileNotFoundError: the folder of ``path`` does not exist.
      ValueError: the model is not packed, a quantiser is a class of one's own, a kernel is cut into
        shards, or ``path`` is a folder or ends in `.npz`.
    """
    arrays = {name: np.asarray(variable.get_value()) for name, variable in _others(model)}
    for name, quantizer in operand_quantizers(model).items():
        if (threshold := quantizer.kept) is not None:
            arrays[f"{name}.threshold"] = np.asarray(threshold)
    kernels = {}
    for site in layer_sites(model):
        if not isinstance(site.installed, PackedOp | PackedTable):
            continue
        if (factors := getattr(site.installed, "factors", None)) is not None:
            arrays[f"{site.activations}.factors"] = np.asarray(factors.get_value())
        packed = site.installed.weights.packed
        if packed.groups.runs > 1:
            raise ValueError(
                f"{site.weights} is cut into {packed.groups.runs} shards, for which a file has no "
                "place: quantise weights with PerTensor or PerChannel"
            )
        kernels[site.weights] = {
            "shape": packed.shape,
            "dtype": np.dtype(packed.dtype).name,
            "format": describe(packed.format),
            "axes": packed.groups.axes,
            "vector_size": packed.groups.vector_size,
            "scale_bits": packed.scale_bits,
            "scale_dtype": packed.scale.dtype.name,
            "rotation": getattr(site.installed, "rotation", None),
        }
        for part in _PARTS:
            if (array := getattr(packed, part)) is not None:
                arrays[f"{site.weights}.{part}"] = _plain(np.asarray(array))
    if not kernels:
        raise ValueError("the model has no packed kernel: pack_model comes first")
    layers = {
        layer.path: {"weights": describe(layer.weights), "activations": describe(layer.activations)}
        for layer in report(model).layers
        if layer.weights or layer.activations
    }
    content = {"version": VERSION, "kernels": kernels, "layers": layers}
    write_arrays(arrays, path, {_KEY: json.dumps(content)})


def load_packed(model: nnx.Module, path: str | Path) -> nnx.Module:
    """Read a packed model.

    Args:
      model: the float model of the same architecture, of which only the architecture is used, and
        the dtype that its layers are told to compute in: one made under ``nnx.eval_shape`` will
        do, if it has no dropout. It is left as it is.
      path: a file that `save_packed` wrote.

    Returns:
      The packed model, bit for bit.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is damaged, something else, of a later version, or of another model; or a
        layer computes in another dtype than when it was packed.
    """
    arrays = read_arrays(path, _WHAT)
    content = _content(path)
    rules = [
        # Only the model knows which of them are embeddings.
        Rule(
            re.escape(layer),
            weights=restore(found["weights"]),
            activations=restore(found["activations"]),
            embeddings=restore(found["weights"]),
        )
        for layer, found in content["layers"].items()
    ]
    model = quantize_model(model, Policy(rules))
    quantizers = operand_quantizers(model)
    for site in layer_sites(model):
        described = content["kernels"].get(site.weights)
        if described is not None:
            _check_shape(path, site.weights, described["shape"], site.kernel.get_value())
            _check_dtype(path, site, np.dtype(described["dtype"]))
            packed = _packed(site.weights, described, arrays)
            if (factors := arrays.pop(f"{site.activations}.factors", None)) is not None:
                site.installed.factors = Factors(jnp.asarray(factors))
            if (rotation := described.get("rotation")) is not None:
                site.installed.rotation = rotation
            install_kernel(site, PackedKernel(packed, quantizers[site.weights].quantizer))
            # A layer that was told no dtype computes in what its kernel and its input call for.
            site.put_kernel(site.kernel.replace(jnp.zeros((0,), packed.dtype)))
    for name, quantizer in quantizers.items():
        if (threshold := arrays.pop(f"{name}.threshold", None)) is not None:
            quantizer.threshold = Threshold(jnp.asarray(threshold))
    _drop_carried(model, arrays)
    others = dict(_others(model))
    if wrong := sorted(others.keys() ^ arrays.keys()):
        raise ValueError(f"{path} is of another model: only one of the two has {wrong[0]!r}")
    for name, variable in others.items():
        _check_shape(path, name, arrays[name].shape, variable.get_value())
        variable.set_value(jnp.asarray(arrays[name]))
    return model


def _content(path: str | Path) -> dict[str, Any]:
    """What the metadata says."""
    written = read_metadata(path, _WHAT).get(_KEY)
    if written is None:
        raise ValueError(f"{path} is not a packed model: write one with save_packed")
    try:
        content = json.loads(written)
        version, kernels, layers = (content[name] for name in ("version", "kernels", "layers"))
        later = version > VERSION
        whole = all(kernel.keys() >= _DESCRIPTION for kernel in kernels.values())
        whole &= all(layer.keys() >= _OPERANDS for layer in layers.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: its metadata cannot be read ({error!r})") from error
    if later:
        raise ValueError(f"{path} has layout {version}, this qat_jax knows {VERSION}: upgrade it")
    if not whole:
        raise ValueError(f"{path} is damaged: its metadata lacks a part")
    return content


def _packed(name: str, described: dict[str, Any], arrays: dict[str, np.ndarray]) -> PackedTensor:
    """A kernel out of its arrays, which are taken from the rest."""
    codes, scale, coarse = (arrays.pop(f"{name}.{part}", None) for part in _PARTS)
    if codes is None or scale is None:
        raise ValueError(f"the codes or scales of {name} are missing: the file is damaged")
    bits, shape = described["scale_bits"], tuple(described["shape"])
    format = restore(described["format"])
    groups = Groups(tuple(described["axes"]), described["vector_size"])
    stored = jnp.dtype(described["scale_dtype"])
    if bits is None and scale.dtype.itemsize == stored.itemsize:  # see `_plain`
        scale = scale.view(stored)
    if (bits is not None or scale.dtype == jnp.float8_e4m3fn) and coarse is None:
        raise ValueError(f"the coarse scales of {name} are missing: the file is damaged")
    compact = groups.compact_shape(shape)
    lengths = {
        "codes": (codes.shape, (packed_bytes(math.prod(shape), format.bits),)),
        "scales": (
            scale.shape,
            compact if bits is None else (packed_bytes(math.prod(compact), bits),),
        ),
    }
    for what, (found, expected) in lengths.items():
        if found != expected:
            raise ValueError(
                f"the {what} of {name} have shape {found}, not {expected}: the file is damaged"
            )
    return PackedTensor(
        codes=jnp.asarray(codes),
        scale=jnp.asarray(scale),
        coarse=None if coarse is None else jnp.asarray(coarse),
        format=format,
        scale_bits=bits,
        groups=groups,
        shape=shape,
        dtype=np.dtype(described["dtype"]),
    )


def _plain(array: np.ndarray) -> np.ndarray:
    """The same bytes in a type that every reader knows."""
    return array.view(np.uint8) if array.dtype.name.startswith("float8") else array


def _others(model: nnx.Module) -> Iterator[tuple[str, nnx.Variable]]:
    """What is neither packed nor of a quantised operation nor a random number generator's."""
    elsewhere = Packed | Factors | Threshold | Learned | Carried | nnx.RngState
    for path, node in nnx.iter_graph(model):
        if not isinstance(node, nnx.Variable) or isinstance(node, elsewhere):
            continue
        if node.get_value().size:  # a packed kernel leaves nothing behind
            yield "/".join(map(str, path)), node


def _drop_carried(model: nnx.Module, arrays: dict[str, np.ndarray]) -> None:
    """Takes away the thresholds that training carried, which earlier files hold."""
    for path, node in nnx.iter_graph(model):
        if isinstance(node, OperandQuantizer):
            arrays.pop("/".join(map(str, (*path, "carried"))), None)


def _check_dtype(path: str | Path, site: LayerSite, packed: np.dtype) -> None:
    told = getattr(site.layer, "dtype", None)
    if told is not None and np.dtype(told) != packed:
        raise ValueError(
            f"{path} was packed where {site.path} computes in {packed}, here it does in "
            f"{np.dtype(told)}: make the model with dtype=jnp.{packed}"
        )


def _check_shape(path: str | Path, name: str, shape: Sequence[int], value: jax.Array) -> None:
    if tuple(shape) != value.shape:
        raise ValueError(
            f"{path} is of another model: {name} has shape {tuple(shape)} there, {value.shape} here"
        )
