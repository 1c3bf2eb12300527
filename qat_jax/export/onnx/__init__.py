"""Models as ONNX, with QuantizeLinear and DequantizeLinear pairs."""

try:
    import onnx as _onnx  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("ONNX export needs onnx: pip install 'qat_jax[export]'") from error

from qat_jax.export.onnx.model import EXACT_SESSION, save_onnx, to_onnx

__all__ = ["EXACT_SESSION", "save_onnx", "to_onnx"]
