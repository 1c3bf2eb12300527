"""What a person sees of a run: a progress bar on a terminal, plain log lines elsewhere."""

import logging
import sys
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from qat_jax.training.hosts import is_first

logger = logging.getLogger(__name__)


class ProgressBar:
    """Counts the steps of a run on standard error if that is a terminal.

    Args:
        name: what is running.
        total: steps in all.
        completed: steps made before.
    """

    def __init__(self, name: str, total: int, completed: int = 0):
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=Console(stderr=True),
            disable=not (sys.stderr.isatty() and is_first()),
        )
        self._task = self._bar.add_task(name, total=total, completed=completed, note="")

    def __enter__(self) -> "ProgressBar":
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def advance(self) -> None:
        """Counts one step."""
        self._bar.advance(self._task)

    def note(self, text: str) -> None:
        """Shows a few words beside the bar."""
        self._bar.update(self._task, note=text)

    def message(self, text: str) -> None:
        """Prints a line above the bar, or logs it where there is no bar."""
        if self._bar.disable:
            logger.info(text)
        else:
            self._bar.console.print(text, highlight=False)
