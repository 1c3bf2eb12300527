"""A packed model of qat_jax, read with NumPy alone.

    python docs/read_packed.py MODEL.safetensors

`read(path)` returns every parameter as floats by name, quantised kernels as `LAYER/kernel`.
"""

import json
import math
import sys

import numpy as np

TYPES = {"BOOL": "?", "U8": "u1", "U16": "<u2", "U32": "<u4", "U64": "<u8", "BF16": "<u2"}
TYPES |= {"I8": "i1", "I16": "<i2", "I32": "<i4", "I64": "<i8", "F64": "<f8"}
TYPES |= {"F32": "<f4", "F16": "<f2"}


def arrays_of(path):
    """The arrays of a safetensors file by name, and its metadata."""
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        data = file.read()
    metadata = header.pop("__metadata__", {})
    found = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        array = np.frombuffer(data[start:end], TYPES[entry["dtype"]]).reshape(entry["shape"])
        if entry["dtype"] == "BF16":  # the upper half of a float32
            array = (array.astype("<u4") << 16).view("<f4")
        found[name] = array
    return found, metadata


def unpack(stream, bits, shape):
    """Numbers of a few bits from a dense stream, lowest bits first."""
    size = math.prod(shape)
    planes = np.unpackbits(stream, count=size * bits, bitorder="little").reshape(size, bits)
    return (planes.astype(np.int64) << np.arange(bits)).sum(1).reshape(shape)


def small_float(patterns, exponent_bits, mantissa_bits):
    """The numbers that patterns of sign, exponent and mantissa stand for."""
    exponent = (patterns >> mantissa_bits) & (2**exponent_bits - 1)
    mantissa = (patterns & (2**mantissa_bits - 1)) / 2.0**mantissa_bits
    lowest = 2 - 2 ** (exponent_bits - 1)
    scale = 2.0 ** (np.maximum(exponent, 1) - 1 + lowest)
    sign = 1 - 2 * (patterns >> (exponent_bits + mantissa_bits))
    return sign * (mantissa + (exponent > 0)) * scale


def kernel(entry, codes, scale, coarse):
    """A kernel in float32: codes times scales, and times coarse scales where there are any."""
    shape, format, axes = entry["shape"], entry["format"], entry["axes"]
    patterns = unpack(
        codes, format.get("bits") or 1 + format["exponent"] + format["mantissa"], shape
    )
    if format["type"] == "Float":
        values = small_float(patterns, format["exponent"], format["mantissa"])
    else:
        negative = format["signed"] & (patterns >> (format["bits"] - 1))
        values = patterns - (negative << format["bits"])
    few = [1 if axis in axes else n for axis, n in enumerate(shape)]
    length = math.prod(shape[axis] for axis in axes)
    if entry["vector_size"]:
        few[axes[0]] = -(-length // entry["vector_size"])
    if entry["scale_bits"]:
        scale = unpack(scale, entry["scale_bits"], few)
    elif entry["scale_dtype"] == "float8_e4m3fn":
        scale = small_float(scale.astype(int), 4, 3)
    elif entry["scale_dtype"] == "float8_e8m0fnu":
        scale = 2.0 ** (scale.astype(int) - 127)
    step = np.float32(scale) * (1 if coarse is None else coarse)
    if entry["vector_size"]:  # vectors run through axes, one after the other
        step = np.repeat(step, entry["vector_size"], axes[0]).take(range(length), axes[0])
        step = step.reshape([n if a in axes else few[a] for a, n in enumerate(shape)])
    return np.float32(values) * step


def read(path):
    """Every parameter in floats, by name."""
    arrays, metadata = arrays_of(path)
    for name, entry in json.loads(metadata["qat_jax"])["kernels"].items():
        parts = [arrays.pop(f"{name}.{part}", None) for part in ("codes", "scale", "coarse")]
        arrays[name.removesuffix("weights") + "kernel"] = kernel(entry, *parts)
    return arrays


if __name__ == "__main__":
    for name, array in sorted(read(sys.argv[1]).items()):
        print(f"{name:50} {array.dtype!s:8} {array.shape}")
