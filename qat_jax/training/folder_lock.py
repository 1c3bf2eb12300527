"""One process at a time in a folder: a file that the kernel unlocks when its holder dies.

Windows has no such locks: nothing is held there, and two runs in one folder spoil each other.
"""

import contextlib
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None  # type: ignore[assignment]


class HeldError(Exception):
    """Another process has the lock.

    Attributes:
        holder: "process N on HOST".
    """

    def __init__(self, holder: str):
        super().__init__(f"held by {holder}")
        self.holder = holder


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Holds the lock that a file is; where system or file system have no locks, holds nothing.

    Args:
        path: the file, removed at the end. One that a killed process left is taken over.

    Raises:
        HeldError: by another process, or by this one already.
    """
    if fcntl is None:
        yield
        return
    file = _take(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()


def _take(path: Path) -> TextIO:
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with file:
                file.seek(0)
                raise HeldError(file.read().strip() or "another process") from None
        except OSError:
            return file
        if _is_file_of(path, file):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}\n")
            file.flush()
            return file
        # Between opening and locking its holder removed it: this lock is of a file without a name.
        file.close()


def _is_file_of(path: Path, file: TextIO) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
