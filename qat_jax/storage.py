"""What a quantised model weighs: codes, scales and coarse scales, in bits."""

import dataclasses
import functools
import math
from typing import Any

import jax
from flax import nnx

from qat_jax.batches import abstract
from qat_jax.integer.model import IntegerOp, PackedOp, PackedTable
from qat_jax.integer.packed import unpack
from qat_jax.nnx import (
    Factors,
    is_own_parameter,
    layer_sites,
    operand_codes,
    operand_quantizers,
)
from qat_jax.quantizer import QTensor, Quantizer

_COARSE_BITS = 32
_FACTOR_BITS = 8  # of the exponent, which is all of a power of two


@dataclasses.dataclass(frozen=True)
class Storage:
    """The bits of one array, or of several together.

    Attributes:
      elements: numbers that are stood for.
      code_bits: of all codes.
      scale_bits: of all scales.
      coarse_bits: of all coarse scales.
    """

    elements: int
    code_bits: int
    scale_bits: int = 0
    coarse_bits: int = 0

    @property
    def bits_per_element(self) -> float:
        """All bits over all elements: M / V more than the format's with M-bit scales of vectors."""
        return (self.code_bits + self.scale_bits + self.coarse_bits) / max(self.elements, 1)

    @property
    def bytes(self) -> int:
        """All bits, packed densely."""
        return math.ceil((self.code_bits + self.scale_bits + self.coarse_bits) / 8)

    def __add__(self, other: "Storage") -> "Storage":
        fields = (field.name for field in dataclasses.fields(self))
        return Storage(*(getattr(self, name) + getattr(other, name) for name in fields))


def array_storage(q: QTensor, quantizer: Quantizer) -> Storage:
    """The storage of a quantised array; an abstract one (``jax.eval_shape``) will do.

    Args:
      q: codes and scales.
      quantizer: what made them.

    Returns:
      Its storage.

    Example:
      >>> import jax.numpy as jnp, qat_jax as qj
      >>> vs = qj.Quantizer(qj.Int(4), qj.PerVector(16), qj.AbsMax(), scale=qj.IntScale(4))
      >>> q = jax.eval_shape(lambda x: qj.quantize(x, vs, vector_axis=0), jnp.ones((1024, 1024)))
      >>> round(array_storage(q, vs).bits_per_element, 3)
      4.25
    """
    elements = math.prod(q.shape)
    coarse = 0 if q.coarse is None else q.coarse.size * _COARSE_BITS
    return Storage(
        elements=elements,
        code_bits=elements * quantizer.format.bits,
        scale_bits=q.scale.size * quantizer.scale.bits,
        coarse_bits=coarse,
    )


def operand_storage(model: nnx.Module, *inputs: Any) -> dict[str, Storage]:
    """The storage of every quantised operand of a model; nothing is computed.

    Args:
      model: a quantised NNX model, packed or not. Of a network in integers, the kernels alone.
      *inputs: a batch for it: activations are counted as large as it makes them.

    Returns:
      By ``"path of the layer/operand"``.
    """
    graphdef, state = nnx.split(model)

    sown = abstract(functools.partial(operand_codes, graphdef), state, *inputs)
    quantizers = operand_quantizers(model)
    found = {
        path: array_storage(sown[path], operand.quantizer)
        for path, operand in quantizers.items()
        if path in sown
    }
    for site in layer_sites(model):
        if isinstance(site.installed, PackedOp | PackedTable | IntegerOp):
            kernel = site.installed.weights
            codes = jax.eval_shape(unpack, kernel.packed)
            found[site.weights] = array_storage(codes, kernel.quantizer)
    return found


def model_storage(model: nnx.Module, *inputs: Any) -> Storage:
    """The storage of a model's parameters: quantised where they are, as they are elsewhere.

    A kernel that several layers share is counted once for each way in which they quantise it.

    Args:
      model: an NNX model.
      *inputs: a batch for it, of any size.

    Returns:
      The sum over kernels, biases, normalisations and the like.
    """
    operands = operand_storage(model, *inputs)
    kernels: dict[tuple[int, Any], Storage] = {}
    in_float, quantised = set(), set()
    for site in layer_sites(model):
        kernel = site.kernel
        if site.weights in operands:
            hook: Any = site.installed
            kernels[id(kernel), hook.weights.quantizer] = operands[site.weights]
            quantised.add(id(kernel))
        else:
            in_float.add(id(kernel))
    parameters = {id(x): x for _, x in nnx.iter_graph(model) if is_own_parameter(x)}
    as_they_are = [
        Storage(x.size, 8 * x.size * x.dtype.itemsize)
        for key, x in parameters.items()
        if key in in_float or key not in quantised
    ]
    factors = [
        Storage(0, _FACTOR_BITS * x.size)
        for _, x in nnx.iter_graph(model)
        if isinstance(x, Factors)
    ]
    return sum([*kernels.values(), *as_they_are, *factors], Storage(0, 0))
