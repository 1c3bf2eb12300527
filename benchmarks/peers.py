"""Searches for thresholds by other libraries, where those are (``pip install '.[peers]'``).

Each runs as its users run it: PyTorch, eagerly, on as many threads as it takes. What is left of it
here is the threshold alone, so that all are judged on the same grid.
"""

import importlib
import importlib.util
from collections.abc import Callable

import numpy as np

# Finds the thresholds of an array given before: one, or one for each of its columns.
Search = Callable[[], np.ndarray]


def searches(x: np.ndarray, bits: int) -> dict[tuple[str, str], Search]:
    """By granularity ("tensor" or "channels") and name, of the libraries there are.

    Args:
        x: float32 [rows, channels].
        bits: of a signed code; all grids are narrow.
    """
    found: dict[tuple[str, str], Search] = {}
    if importlib.util.find_spec("torch") is None:
        return found
    if bits == 8:  # the only width that it looks for
        found["tensor", "torch, HistogramObserver"] = _torch_histogram(x)
    if importlib.util.find_spec("brevitas"):
        for granularity, name in (("tensor", "PerTensor"), ("channels", "PerChannel")):
            found[granularity, "Brevitas, MSE"] = _brevitas(x, bits, f"Int8Weight{name}FloatMSE")
    if importlib.util.find_spec("modelopt"):
        found["tensor", "ModelOpt, MSE"] = _modelopt(x, bits, axis=None)
        found["channels", "ModelOpt, MSE"] = _modelopt(x, bits, axis=1)
    return found


def _torch_histogram(x: np.ndarray) -> Search:
    torch = importlib.import_module("torch")
    observer = importlib.import_module("torch.ao.quantization.observer")
    tensor = torch.from_numpy(x)

    def search() -> np.ndarray:
        found = observer.HistogramObserver(
            dtype=torch.qint8, qscheme=torch.per_tensor_symmetric, quant_min=-127, quant_max=127
        )
        found(tensor)
        return found.calculate_qparams()[0].numpy() * 127

    return search


def _brevitas(x: np.ndarray, bits: int, quantizer: str) -> Search:
    """A Fibonacci search of 20 steps, each of which quantises the array."""
    torch = importlib.import_module("torch")
    layers = importlib.import_module("brevitas.nn")
    layer = layers.QuantLinear(
        *x.shape,
        bias=False,
        weight_quant=getattr(importlib.import_module("brevitas.quant"), quantizer),
        weight_bit_width=bits,
    )
    layer.weight.data = torch.from_numpy(np.ascontiguousarray(x.T))  # channels first

    def search() -> np.ndarray:
        for module in layer.modules():
            if hasattr(module, "init_done"):  # a layer searches once and keeps what it found
                module.init_done = False
                torch.nn.init.ones_(module.value)
        with torch.no_grad():
            scale = layer.weight_quant(layer.weight).scale
        return scale.numpy().reshape(1, -1) * (2 ** (bits - 1) - 1)

    return search


def _modelopt(x: np.ndarray, bits: int, axis: int | None) -> Search:
    """39 multiples of the maximum, from a quarter to four."""
    torch = importlib.import_module("torch")
    calib = importlib.import_module("modelopt.torch.quantization.calib")
    functions = importlib.import_module("modelopt.torch.quantization.tensor_quant")
    tensor = torch.from_numpy(x)

    def search() -> np.ndarray:
        calibrator = calib.MseCalibrator(
            tensor.abs().amax() if axis is None else tensor.abs().amax(0, keepdim=True),
            axis=axis,
            quant_func=lambda x, amax: functions.fake_tensor_quant(x, amax, None, bits),
        )
        calibrator.collect(tensor)
        return calibrator.compute_amax().numpy().reshape(1, -1)

    return search
