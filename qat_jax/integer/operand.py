"""What the integer datapath multiplies: codes, integer scales inside the sum, the rest outside."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from qat_jax.formats import Int
from qat_jax.quantizer import QTensor


@dataclasses.dataclass(frozen=True)
class Operand:
    """An operand of an integer operation, element by element.

    Attributes:
      codes: integers.
      scale: integers of the same shape, of each code the scale of its vector; None where all
        codes that are summed up share one.
      outer: what codes times scales are multiplied by, float32 or, where the array was, float64;
        of the codes' rank, of length 1 wherever it does not differ.
      vector_size: elements that share a scale; 0 where there is no ``scale``.
      code_bits: N.
      unsigned: whether no code is negative; None where the codes themselves say so at run time.
      scale_bits: M; 0 where there is no ``scale``.
      narrow: whether the lowest code is minus the highest.
    """

    codes: jax.Array
    scale: jax.Array | None
    outer: jax.Array
    vector_size: int
    code_bits: int
    unsigned: bool | None
    scale_bits: int
    narrow: bool = False

    @classmethod
    def of(cls, q: QTensor, scale_bits: int) -> "Operand":
        """A quantised array, ready to be multiplied.

        Args:
          q: codes of an integer format and their scales.
          scale_bits: M, the bits of integer scales.

        Raises:
          ValueError: there is no integer datapath for such codes or scales.
        """
        if not isinstance(q.format, Int):
            raise ValueError(
                f"{q.format} has no integer datapath: its codes are floating-point numbers"
            )
        unsigned = None if q.format.signed is None else not q.format.signed
        size = q.groups.vector_size
        if size is None:
            dtype = jnp.promote_types(q.scale.dtype, jnp.float32)
            outer = q.groups.expand(q.scale.astype(dtype), q.shape)
            if q.coarse is not None:
                outer = outer * q.coarse
            return cls(q.codes, None, outer, 0, q.format.bits, unsigned, 0, q.format.narrow)
        if q.coarse is None or not jnp.issubdtype(q.scale.dtype, jnp.integer):
            raise ValueError(
                "scales that differ inside a sum need integers in an integer datapath: "
                "quantise them, scale=IntScale(bits), or share one scale a channel or tensor"
            )
        scale = jnp.broadcast_to(q.groups.expand(q.scale, q.shape), q.shape)
        return cls(
            q.codes, scale, q.coarse, size, q.format.bits, unsigned, scale_bits, q.format.narrow
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the codes."""
        return self.codes.shape

    @property
    def ndim(self) -> int:
        """Of the codes."""
        return self.codes.ndim

    @property
    def largest_code(self) -> int:
        """The largest magnitude that a code can have."""
        if self.unsigned is False:
            return 2 ** (self.code_bits - 1) - self.narrow
        return 2**self.code_bits - 1

    @property
    def largest_scale(self) -> int:
        """The largest that an integer scale can be; 1 where there is none."""
        return max(2**self.scale_bits - 1, 1)

    def rearranged(self, move: Callable[[jax.Array], jax.Array]) -> "Operand":
        """The same with codes and scales moved about; ``outer`` stays as it is."""
        scale = None if self.scale is None else move(self.scale)
        return dataclasses.replace(self, codes=move(self.codes), scale=scale)

    def reshape(self, shape: tuple[int, ...]) -> "Operand":
        """The same with two adjacent axes, for which ``outer`` has one number, made one."""
        merged = next(axis for axis in range(len(shape)) if self.shape[axis] != shape[axis])
        reshaped = self.rearranged(lambda x: x.reshape(shape))
        return dataclasses.replace(reshaped, outer=jnp.squeeze(self.outer, merged))
