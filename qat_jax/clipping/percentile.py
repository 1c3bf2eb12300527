"""A percentile of the magnitudes."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax

from qat_jax.clipping.groups import groups_last, keepdims_shape, merged
from qat_jax.clipping.protocol import accumulation_dtype
from qat_jax.formats import Format


@dataclasses.dataclass(frozen=True)
class Percentile:
    """The magnitude that a given share of a group does not exceed.

    Interpolated linearly between the two magnitudes next to it, as NumPy does. The magnitudes are
    sorted, which takes a CPU as long as 40 to 1000 passes over them.

    Attributes:
      percent: the share, above 0 and at most 100, which is the largest magnitude. 99.9, 99.99 and
        99.999 are those of Wu et al., "Integer quantization for deep learning inference"
        (arXiv:2004.09602, section 3.3).
    """

    percent: float

    def __post_init__(self) -> None:
        if not 0 < self.percent <= 100:
            raise ValueError(f"percent lies above 0 and at most at 100, unlike {self.percent!r}")

    def threshold(self, x: jax.Array, format: Format, axes: tuple[int, ...]) -> jax.Array:
        """The percentile of |x| (of max(x, 0) for an unsigned format) of each group of x."""
        x = lax.stop_gradient(x)
        dtype = accumulation_dtype(x)
        shape = keepdims_shape(x, axes)
        size = math.prod(x.shape[axis] for axis in axes)
        if size == 0:
            return jnp.zeros(shape, dtype)
        groups = format.magnitude(groups_last(x, axes)).astype(dtype)
        ascending = jnp.sort(merged(groups, x.ndim - len(axes)))
        # In Python's precision: a float32 cannot count beyond 2**24. The zeros that fill up blocks
        # come first.
        below, share = divmod(self.percent / 100 * (size - 1), 1)
        lower = ascending.shape[1] - size + int(below)
        upper = min(lower + 1, ascending.shape[1] - 1)
        threshold = (1 - share) * ascending[:, lower] + share * ascending[:, upper]
        largest = ascending[:, -1]
        return jnp.where(jnp.isfinite(largest), threshold, largest).reshape(shape)
