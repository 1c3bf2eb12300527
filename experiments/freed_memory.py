"""Memory that a step frees is kept for the next one, which saves a twelfth to a fifth on CPUs.

XLA's CPU backend allocates what a step passes on anew every time. glibc takes gigabytes from the
kernel for it and gives them back, and the kernel clears every page again. Batches of several
lengths keep more than any of them needs (see docs/performance.md).
"""

import ctypes
import os
import sys

# Of glibc's malloc.h: mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Lets this process keep the memory that it frees.

    Call it before anything is computed. Nothing is changed where the environment says already how
    memory is allocated: `GLIBC_TUNABLES`, or a variable that begins with `MALLOC_`.

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
    return all(mallopt(name, value) for name, value in settings)
