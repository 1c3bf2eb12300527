"""Models for elsewhere: packed files and StableHLO here, ONNX in `qat_jax.export.onnx`."""

from qat_jax.export.packed_file import load_packed, save_packed
from qat_jax.export.stablehlo import save_stablehlo, to_stablehlo

__all__ = ["load_packed", "save_packed", "save_stablehlo", "to_stablehlo"]
