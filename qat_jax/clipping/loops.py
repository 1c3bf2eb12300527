"""Loops over large arrays that run on every core.

From JAX 0.12 on, XLA's CPU backend compiles a whole loop, whatever it reads, into one function that
runs on a single core and takes several times as long to compile. A loop that sorts is left as it
was: its steps are compiled one by one, and the large ones among them are shared by the cores. So
the counters here are advanced by a sort of two numbers, on CPUs only.
"""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

State = TypeVar("State")


def while_loop(
    unfinished: Callable[[jax.Array, State], jax.Array],
    step: Callable[[jax.Array, State], State],
    state: State,
) -> State:
    """`lax.while_loop` that counts its steps.

    Args:
      unfinished: whether to take another step, from the number of those taken, int32 [], and the
        state.
      step: the next state, from the same.
      state: the first one.

    Returns:
      The last state.
    """

    def counted(carry: tuple[jax.Array, State]) -> tuple[jax.Array, State]:
        i, state = carry
        return _next(i), step(i, state)

    _, state = lax.while_loop(lambda carry: unfinished(*carry), counted, (jnp.int32(0), state))
    return state


def repeat(count: int, step: Callable[[jax.Array, State], State], state: State) -> State:
    """``count`` steps: see `while_loop`."""
    return while_loop(lambda i, _: i < count, step, state)


def _next(i: jax.Array) -> jax.Array:
    """One more than i."""
    return lax.platform_dependent(i + 1, cpu=_sorted_out, default=lambda i: i)


def _sorted_out(i: jax.Array) -> jax.Array:
    """Any int32 as it is."""
    return lax.sort(jnp.stack([i, np.int32(np.iinfo(np.int32).max)]), is_stable=False)[0]
