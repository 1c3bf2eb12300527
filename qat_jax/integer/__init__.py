"""Packed storage and the bit-exact integer datapath."""

from qat_jax.integer.bits import pack_bits, unpack_bits
from qat_jax.integer.datapath import contract
from qat_jax.integer.model import Packed, integer_model, pack_model
from qat_jax.integer.operand import Operand
from qat_jax.integer.ops import conv_general_dilated, dot_general, einsum
from qat_jax.integer.packed import PackedTensor, pack, unpack
from qat_jax.integer.widths import Datapath, Widths

__all__ = [
    "Datapath",
    "Operand",
    "Packed",
    "PackedTensor",
    "Widths",
    "contract",
    "conv_general_dilated",
    "dot_general",
    "einsum",
    "integer_model",
    "pack",
    "pack_bits",
    "pack_model",
    "unpack",
    "unpack_bits",
]
