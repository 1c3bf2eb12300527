"""Padding of sequences, which must not move a threshold."""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

# The axes of examples and of positions: in what a layer is given, in queries, keys and values …
TOKENS = (0, 1)
# … and in attention weights [batch, heads, queries, keys], which for padded keys are 0 already.
QUERIES = (0, -2)


class _Padding(NamedTuple):
    """A mask, and whether it was given while a function was being traced."""

    mask: jax.Array | None
    traced: bool


_NONE = _Padding(None, False)
_padding: contextvars.ContextVar[_Padding] = contextvars.ContextVar("padding", default=_NONE)
# Else a function compiled without a mask, or with the mask of another trace, would be used again.
_compiled_apart = jax.make_user_context(None)


@contextlib.contextmanager
def ignore_padding(mask: jax.Array | None) -> Iterator[None]:
    """Where a quantised model is called, lets its quantisers see zeros in the place of padding.

    What stands at padding has no part in the answer, but in the maximum, the mean or the sum that
    a threshold comes from. Zeros have no part in those of OCTAV, of the maximum and of the least
    error; a percentile counts them. Quantised are the zeros, too, so that the model must not use
    what is at padding: attend to nothing there, as a mask for its attention sees to.

    A function under ``jax.jit`` takes the mask as an argument and enters this inside: compiled, it
    would keep a mask from outside for good.

    Args:
        mask: bool [batch, length], False for padding; None for no padding. An operand of other
            leading axes, and one of two axes, is left as it is.

    Raises:
        ValueError: the mask is not bool [batch, length]; or, in a quantiser, a compiled function is
            called inside.

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
    if mask is not None and (mask.ndim != 2 or mask.dtype != bool):
        raise ValueError(
            f"the mask is {mask.dtype} of shape {mask.shape}: give bool [batch, length], False for "
            "padding, not that of an attention"
        )
    traced = mask is not None and _is_tracing()
    token = _padding.set(_Padding(mask, traced))
    key = None if mask is None else object() if traced else "outside"
    try:
        with _compiled_apart(key):
            yield
    finally:
        _padding.reset(token)


def keep_padding() -> contextlib.AbstractContextManager[None]:
    """Inside a function that is compiled for one use: the mask around it is meant for it."""
    return ignore_padding(_padding.get().mask)


def without_padding(x: jax.Array, axes: tuple[int, int] | None) -> jax.Array:
    """Zeros in the place of padding, inside `ignore_padding`.

    Args:
        x: an operand.
        axes: its axes of examples and of positions; None for an operand that has none.
    """
    mask, traced = _padding.get()
    if mask is None:
        return x
    if not traced and _is_tracing():
        raise ValueError(
            "ignore_padding is outside the compiled function, which would keep this mask for good: "
            "give the function the mask as an argument and enter ignore_padding inside"
        )
    if axes is None or x.ndim < 3:
        return x
    if tuple(x.shape[axis] for axis in axes) != mask.shape:
        return x
    positions = axes[1] % x.ndim
    shape = [x.shape[axis] if axis in (0, positions) else 1 for axis in range(x.ndim)]
    return jnp.where(mask.reshape(shape), x, jnp.zeros((), x.dtype))


def _is_tracing() -> bool:
    """Whether what is computed now becomes part of a compiled function."""
    return isinstance(jnp.zeros(()), jax.core.Tracer)
