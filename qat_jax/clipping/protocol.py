"""What a clipping rule is."""

from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from qat_jax.formats import Format, Int


class Clipping(Protocol):
    """What the library asks of a clipping rule; write your own with this one method."""

    def threshold(self, x: jax.Array, format: Format, axes: tuple[int, ...]) -> jax.Array:
        """The threshold of each group of x, with ``axes`` kept at length 1."""
        ...


@runtime_checkable
class Refining(Clipping, Protocol):
    """A clipping rule that is faster from thresholds that were right a little before."""

    def refined(
        self, x: jax.Array, format: Format, axes: tuple[int, ...], start: jax.Array
    ) -> jax.Array:
        """The threshold of each group of x, from an earlier one, which may be 0 or not finite."""
        ...


def accumulation_dtype(x: jax.Array) -> np.dtype:
    """The dtype of sums and scales over x: float32, or float64 where x is."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"quantisers take floating-point arrays, not {x.dtype}: cast it first")
    return jnp.promote_types(x.dtype, jnp.float32)


def uniform(format: Format, rule: Clipping) -> Int:
    """The format, if its codes are evenly spaced, as the rule supposes; a ValueError if not."""
    if not isinstance(format, Int):
        raise ValueError(
            f"{type(rule).__name__} supposes evenly spaced codes, unlike those of {format}: "
            "use Exact, MseSweep or AbsMax"
        )
    return format
