"""Memory that a step frees is kept for the next one, which saves a twelfth to a fifth on CPUs.

XLA's CPU backend allocates what a step passes on anew every time. glibc takes gigabytes from the
kernel for it and gives them back, and the kernel clears every page again. Batches of several
lengths keep more than any of them needs (see docs/performance.md): what is kept is a cache, so it
is given back where memory runs short.
"""

import contextlib
import ctypes
import functools
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

# Of glibc's malloc.h: mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
_CGROUPS = Path("/sys/fs/cgroup")
_SECONDS_BETWEEN_LOOKS = 1.0


def keep_freed_memory(reserve: float = 0.25) -> bool:
    """Lets this process keep the memory that it frees, while there is enough of it.

    Call it before anything is computed. Nothing is changed where the environment says already how
    memory is allocated: `GLIBC_TUNABLES`, or a variable that begins with `MALLOC_`.

    Args:
        reserve: the share of the machine's memory, or of that which its control group may use, that
            is to stay available: while less is left, what is not in use is given back.

    Returns:
        Whether something was changed: False too where the C library is another than glibc.
    """
    chosen = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if chosen or mallopt is None:
        return False
    # From the heap, not mapped for each array; never given back; one heap for all threads, since
    # those of other threads are too small for such arrays.
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_ARENA_MAX, 1))
    kept = all(mallopt(name, value) for name, value in settings)
    _guard_reserve(reserve)
    return kept


@functools.cache  # one thread is enough, however often a process is asked to keep what it frees
def _guard_reserve(reserve: float) -> None:
    def watch() -> None:
        with contextlib.suppress(OSError, KeyError):  # a kernel that does not say what is left
            while True:
                if share_left() < reserve:
                    ctypes.CDLL(None).malloc_trim(0)
                time.sleep(_SECONDS_BETWEEN_LOOKS)

    threading.Thread(target=watch, name="freed-memory", daemon=True).start()


def share_left() -> float:
    """The share of memory that is left, of the machine or of a control group above this process.

    Files that the kernel holds in memory count as left: it drops them where it needs to.
    """
    return min(_shares_left())


def _shares_left() -> Iterator[float]:
    machine = _numbers(Path("/proc/meminfo"))
    yield machine["MemAvailable:"] / machine["MemTotal:"]
    # Control groups of version 2, as containers and SLURM limit memory by.
    groups = Path("/proc/self/cgroup").read_text().splitlines()
    own = next((line.removeprefix("0::/") for line in groups if line.startswith("0::")), None)
    if own is None:
        return
    for group in (_CGROUPS / own, *(_CGROUPS / own).parents):
        limit = group / "memory.max"
        if limit.is_file() and (most := limit.read_text().strip()) != "max":
            yield 1 - _numbers(group / "memory.stat")["anon"] / int(most)


def _numbers(path: Path) -> dict[str, int]:
    """The number behind each name of such a file."""
    lines = (line.split() for line in path.read_text().splitlines())
    return {words[0]: int(words[1]) for words in lines}
