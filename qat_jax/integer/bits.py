"""Numbers of a few bits, stored without gaps.

The layout is one stream of bits: number 0 first, each number's lowest bit first, bytes filled from
their lowest bit. Only the last byte may have bits to spare.
"""

import jax
import jax.numpy as jnp

_WIDTHS = range(1, 17)


def pack_bits(numbers: jax.Array, bits: int) -> jax.Array:
    """Store numbers densely.

    Args:
      numbers: unsigned integers below 2**bits, of any shape.
      bits: of a number, 1 to 16.

    Returns:
      uint8 [ceil(numbers.size * bits / 8)].

    Example:
      >>> pack_bits(jnp.array([1, 2, 3]), 4)
      Array([33,  3], dtype=uint8)
    """
    _check(bits)
    planes = (numbers.reshape(-1, 1).astype(jnp.uint16) >> jnp.arange(bits, dtype=jnp.uint16)) & 1
    return jnp.packbits(planes.astype(jnp.uint8).reshape(-1), bitorder="little")


def unpack_bits(packed: jax.Array, bits: int, shape: tuple[int, ...]) -> jax.Array:
    """The numbers that `pack_bits` stored.

    Args:
      packed: uint8, what it returned.
      bits: of a number.
      shape: of the numbers.

    Returns:
      uint8 of that shape, uint16 for more than 8 bits.

    Raises:
      ValueError: there are more bytes than such numbers take, or fewer.
    """
    _check(bits)
    size = 1
    for length in shape:
        size *= length
    if packed.shape != (packed_bytes(size, bits),):
        raise ValueError(
            f"{size} numbers of {bits} bits take {packed_bytes(size, bits)} bytes, "
            f"not an array of shape {packed.shape}"
        )
    dtype = jnp.uint8 if bits <= 8 else jnp.uint16
    planes = jnp.unpackbits(packed, count=size * bits, bitorder="little").reshape(size, bits)
    numbers = planes.astype(dtype) << jnp.arange(bits, dtype=dtype)
    return jnp.sum(numbers, axis=1, dtype=dtype).reshape(shape)


def packed_bytes(size: int, bits: int) -> int:
    """The bytes that so many numbers take."""
    return -(-size * bits // 8)


def _check(bits: int) -> None:
    if bits not in _WIDTHS:
        raise ValueError(f"numbers of 1 to 16 bits can be packed, not of {bits}")
