"""No clipping at all."""

import dataclasses

import jax
from jax import lax

from qat_jax.clipping.groups import largest_of
from qat_jax.clipping.protocol import accumulation_dtype
from qat_jax.formats import Format


@dataclasses.dataclass(frozen=True)
class AbsMax:
    """The largest magnitude: nothing is clipped ("max scaling")."""

    def threshold(self, x: jax.Array, format: Format, axes: tuple[int, ...]) -> jax.Array:
        """Max of |x| (of max(x, 0) for an unsigned format) over ``axes``."""
        x = lax.stop_gradient(x)
        largest = largest_of(format.magnitude(x), axes, keepdims=True)
        return largest.astype(accumulation_dtype(x))
