"""Loops over large arrays that run on every core.

From JAX 0.12 on, XLA's CPU backend compiles a whole loop, whatever it reads, into one function that
runs on a single core and takes several times as long to compile. A loop that sorts is left as it
was: its steps are compiled one by one, and the large ones among them are shared by the cores. So
the loops here sort two numbers in every step, on CPUs only, beside a plain counter, from which XLA
still tells how often a loop runs.
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

    def counted(carry: tuple[jax.Array, jax.Array, State]) -> tuple[jax.Array, jax.Array, State]:
        i, _, state = carry
        same = lax.platform_dependent(i, cpu=_sorted_out, default=lambda i: i)
        return i + 1, same, step(i, state)

    zero = jnp.int32(0)
    _, last, state = lax.while_loop(
        lambda carry: unfinished(carry[0], carry[2]), counted, (zero, zero, state)
    )
    # Never negative, which XLA does not know: it would remove a sort that nothing depends on.
    return jax.tree.map(lambda leaf: jnp.where(last < 0, jnp.zeros_like(leaf), leaf), state)


def repeat(count: int, step: Callable[[jax.Array, State], State], state: State) -> State:
    """``count`` steps: see `while_loop`."""
    return while_loop(lambda i, _: i < count, step, state)


def _sorted_out(i: jax.Array) -> jax.Array:
    """Any int32 as it is."""
    return lax.sort(jnp.stack([i, np.int32(np.iinfo(np.int32).max)]), is_stable=False)[0]
