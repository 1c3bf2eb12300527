"""Compiling a step before it runs, to know the memory it will take."""

from collections.abc import Callable
from typing import Any

import jax


class PerShape:
    """A jitted step, compiled ahead once for every shape of its batches.

    Args:
        step: what `jax.jit` returned, of a state and a batch.
        say: is told what memory a step takes, at first and whenever it is more than before.
    """

    def __init__(self, step: Any, say: Callable[[str], None]) -> None:
        self._step, self._say = step, say
        self._compiled: dict[Any, Callable[..., Any]] = {}
        self._most = -1

    def __call__(self, state: Any, batch: Any) -> Any:
        """What the step returns."""
        shapes = tuple(array.shape for array in jax.tree.leaves(batch))
        if shapes not in self._compiled:
            self._compiled[shapes] = compiled = self._step.lower(state, batch).compile()
            memory = compiled.memory_analysis()
            if (passing := getattr(memory, "temp_size_in_bytes", 0)) > self._most:
                self._most = passing
                self._say(memory_line(memory))
        return self._compiled[shapes](state, batch)


def memory_line(memory: Any) -> str:
    """What `memory_analysis` of a compiled function says, for people.

    Example:
        >>> class Memory:
        ...     argument_size_in_bytes, output_size_in_bytes = 3 * 2**20, 2 * 2**20
        ...     alias_size_in_bytes, temp_size_in_bytes = 2 * 2**20, 7 * 2**20
        >>> memory_line(Memory)
        'memory of a step on each device: 10 MiB, 3 of them state and batch, 7 passing'
    """
    if memory is None:  # not every backend tells
        return "memory of a step on each device: unknown to this backend"
    mib = 2**20
    # What is given back in place of an argument takes no room of its own.
    kept = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    passing = memory.temp_size_in_bytes
    return (
        f"memory of a step on each device: {round((kept + passing) / mib):,} MiB, "
        f"{round(kept / mib):,} of them state and batch, {round(passing / mib):,} passing"
    )
