"""A trace of a few steps, for Perfetto or TensorBoard's profiler."""

from pathlib import Path
from types import TracebackType
from typing import Any

import jax

# The first steps of a process compile and fill queues; they say little of the rest.
_STEPS_BEFORE = 5
_STEPS = 5


class StepTrace:
    """Records what the devices do in a few steps soon after the start.

    Args:
        folder: where to write, or None to record nothing.
    """

    def __init__(self, folder: Path | None):
        self._folder = folder
        self._seen = 0
        self._recording = False

    def __enter__(self) -> "StepTrace":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._recording:
            self._stop()

    def before_step(self) -> None:
        """Begins to record, if this is the step to begin with."""
        if self._folder is not None and self._seen == _STEPS_BEFORE:
            jax.profiler.start_trace(str(self._folder))
            self._recording = True
        self._seen += 1

    def after_step(self, outputs: Any) -> Path | None:
        """Ends the recording after its last step, which it waits for.

        Returns:
            The folder, once there is something to look at.
        """
        if not self._recording or self._seen < _STEPS_BEFORE + _STEPS:
            return None
        jax.block_until_ready(outputs)
        self._stop()
        return self._folder

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self._recording = False
