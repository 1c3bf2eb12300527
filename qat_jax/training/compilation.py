"""Compiling a step before it runs, to know the memory it will take."""

from collections.abc import Callable
from typing import Any


def compile_ahead(step: Any, *arguments: Any) -> tuple[Callable[..., Any], str]:
    """Compiles a jitted function for arguments like these.

    Args:
        step: what `jax.jit` returned.
        arguments: what it will be called with; of arrays only shapes, dtypes and places count.

    Returns:
        The compiled function, and a line about its memory on each device.
    """
    compiled = step.lower(*arguments).compile()
    return compiled, memory_line(compiled.memory_analysis())


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
