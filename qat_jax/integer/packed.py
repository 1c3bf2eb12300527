"""Quantised arrays as they are stored: codes and integer scales at their true width."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from qat_jax.formats import Format, Int
from qat_jax.granularity import Groups
from qat_jax.integer.bits import pack_bits, unpack_bits
from qat_jax.quantizer import QTensor, Quantizer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedTensor:
    """A quantised array without a wasted bit. A pytree.

    Attributes:
      codes: uint8, the codes' bits (see `pack_bits`).
      scale: uint8, the bits of integer scales; scales of another kind as they are.
      coarse: what integer and E4M3 scales are multiples of, or None.
      format: of the codes (static); it has a sign of its own, or none.
      scale_bits: of an integer scale; None for another kind (static).
      groups: which codes share a scale (static).
      shape: of the array (static).
      dtype: of the array (static).
    """

    codes: jax.Array
    scale: jax.Array
    coarse: jax.Array | None
    format: Format = dataclasses.field(metadata={"static": True})
    scale_bits: int | None = dataclasses.field(metadata={"static": True})
    groups: Groups = dataclasses.field(metadata={"static": True})
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    dtype: np.dtype = dataclasses.field(metadata={"static": True})

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in jax.tree.leaves(self))


def pack(q: QTensor, quantizer: Quantizer) -> PackedTensor:
    """Store a quantised array densely.

    Where the sign was picked from the data, the codes at hand say which it was, so that this
    cannot be traced.

    Args:
      q: codes and scales.
      quantizer: what made them.

    Returns:
      The same in fewer bytes: `unpack` brings it back.

    Example:
      >>> import qat_jax as qj
      >>> vs = qj.Quantizer(qj.Int(4, narrow=True), qj.PerVector(16), scale=qj.IntScale(4))
      >>> packed = pack(qj.quantize(jnp.ones((64, 64)), vs, vector_axis=0), vs)
      >>> packed.nbytes * 8 / 64**2  # one float32 besides
      4.2578125
    """
    format = q.format
    if isinstance(format, Int) and format.signed is None:
        format = dataclasses.replace(format, signed=bool(jnp.any(q.codes < 0)))
    integers = jnp.issubdtype(q.scale.dtype, jnp.integer)
    scale_bits = quantizer.scale.bits if integers else None
    codes, scale = _dense(q.codes, q.scale, format, scale_bits)
    return PackedTensor(
        codes=codes,
        scale=scale,
        coarse=q.coarse,
        format=format,
        scale_bits=scale_bits,
        groups=q.groups,
        shape=q.shape,
        dtype=q.dtype,
    )


@functools.partial(jax.jit, static_argnames=("format", "scale_bits"))
def _dense(
    codes: jax.Array, scale: jax.Array, format: Format, scale_bits: int | None
) -> tuple[jax.Array, jax.Array]:
    packed = pack_bits(format.to_bits(codes), format.bits)
    return packed, scale if scale_bits is None else pack_bits(scale, scale_bits)


@functools.partial(jax.jit, inline=True)
def unpack(packed: PackedTensor) -> QTensor:
    """The codes and scales that `pack` stored.

    Args:
      packed: what it returned.

    Returns:
      Codes in the narrowest dtype of their format.
    """
    scale = packed.scale
    if packed.scale_bits is not None:
        shape = packed.groups.compact_shape(packed.shape)
        scale = unpack_bits(scale, packed.scale_bits, shape)
    codes = unpack_bits(packed.codes, packed.format.bits, packed.shape)
    return QTensor(
        codes=packed.format.from_bits(codes),
        scale=scale,
        coarse=packed.coarse,
        format=packed.format,
        groups=packed.groups,
        dtype=packed.dtype,
    )
