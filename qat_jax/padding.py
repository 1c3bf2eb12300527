"""Padding of sequences, which must not move a threshold."""

import contextlib
import contextvars
from collections.abc import Iterator

import jax
import jax.numpy as jnp

# The axes of examples and of positions: in what a layer is given, in queries, keys and values …
TOKENS = (0, 1)
# … and in attention weights [batch, heads, queries, keys], which for padded keys are 0 already.
QUERIES = (0, -2)

_mask: contextvars.ContextVar[jax.Array | None] = contextvars.ContextVar("mask", default=None)


@contextlib.contextmanager
def ignore_padding(mask: jax.Array | None) -> Iterator[None]:
    """Where a quantised model is called, lets its quantisers see zeros in the place of padding.

    What stands at padding has no part in the answer, but in the maximum, the mean or the sum that
    a threshold comes from. Zeros have no part in those of OCTAV, of the maximum and of the least
    error; a percentile counts them. Quantised are the zeros, too, so that the model must not use
    what is at padding: attend to nothing there, as a mask for its attention sees to.

    Args:
        mask: bool [batch, length], False for padding; None for no padding. An operand of other
            leading axes, and one of two axes, is left as it is.

    Example:
        >>> from flax import nnx
        >>> from qat_jax import quantize_model
        >>> model = quantize_model(nnx.Sequential(nnx.Linear(1, 1, rngs=nnx.Rngs(0))), "max-w4a4")
        >>> x = jnp.array([[[1.0], [2.0], [99.0]]])
        >>> with ignore_padding(jnp.array([[True, True, False]])):
        ...     same = model(x)[:, :2] == model(x[:, :2])
        >>> bool(same.all())
        True
    """
    token = _mask.set(mask)
    try:
        yield
    finally:
        _mask.reset(token)


def without_padding(x: jax.Array, axes: tuple[int, int] | None) -> jax.Array:
    """Zeros in the place of padding, inside `ignore_padding`.

    Args:
        x: an operand.
        axes: its axes of examples and of positions; None for an operand that has none.
    """
    mask = _mask.get()
    if mask is None or axes is None or x.ndim < 3:
        return x
    if tuple(x.shape[axis] for axis in axes) != mask.shape:
        return x
    positions = axes[1] % x.ndim
    shape = [x.shape[axis] if axis in (0, positions) else 1 for axis in range(x.ndim)]
    return jnp.where(mask.reshape(shape), x, jnp.zeros((), x.dtype))
