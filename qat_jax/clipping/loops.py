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

# What is sorted again and again.
_PAIR = np.array([0, np.iinfo(np.int32).max], np.int32)


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
        i, pair, state = carry
        pair = lax.platform_dependent(pair, cpu=_sorted, default=lambda pair: pair)
        return i + 1, pair, step(i, state)

    start = jnp.int32(0), jnp.asarray(_PAIR), state
    _, pair, state = lax.while_loop(lambda carry: unfinished(carry[0], carry[2]), counted, start)
    # Never negative, which XLA does not know: it would remove a sort that nothing depends on.
    return jax.tree.map(lambda leaf: jnp.where(pair[0] < 0, jnp.zeros_like(leaf), leaf), state)


def repeat(count: int, step: Callable[[jax.Array, State], State], state: State) -> State:
    """``count`` steps: see `while_loop`."""
    return while_loop(lambda i, _: i < count, step, state)


def _sorted(pair: jax.Array) -> jax.Array:
    return lax.sort(pair, is_stable=False)
