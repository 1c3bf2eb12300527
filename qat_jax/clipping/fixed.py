"""Thresholds that are known."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from qat_jax.clipping.groups import keepdims_shape
from qat_jax.clipping.protocol import accumulation_dtype
from qat_jax.formats import Format


@dataclasses.dataclass(frozen=True)
class Fixed:
    """Thresholds given in advance.

    Attributes:
      value: one threshold for every group, or a tuple with one for each group in order. Vectors of
        which the last is shorter than the others take one threshold for all.
    """

    value: float | tuple[float, ...]

    def __post_init__(self) -> None:
        if not all(v >= 0 and math.isfinite(v) for v in np.ravel(self.value)):
            raise ValueError(f"thresholds are finite and not negative, unlike {self.value!r}")
        if np.ndim(self.value):
            value = tuple(np.ravel(self.value).tolist())  # arrays and lists cannot be hashed
        else:
            value = np.asarray(self.value).item()
        object.__setattr__(self, "value", value)

    def threshold(self, x: jax.Array, format: Format, axes: tuple[int, ...]) -> jax.Array:
        """The given thresholds, in the shape of the groups of x."""
        del format
        shape = keepdims_shape(x, axes)
        value = np.asarray(self.value)
        if value.ndim and value.size != math.prod(shape):
            raise ValueError(f"Fixed holds {value.size} thresholds for {math.prod(shape)} groups")
        value = value.reshape(shape) if value.ndim else np.broadcast_to(value, shape)
        return jnp.asarray(value, accumulation_dtype(x))
