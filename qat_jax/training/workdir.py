"""The folder of one run: config.json, metrics.jsonl, TensorBoard events, checkpoints, result.json.

result.json is written last and atomically: a folder that has it is a finished run.
"""

import contextlib
import enum
import importlib.metadata
import json
import math
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
from tensorboardX import SummaryWriter

from qat_jax.training import folder_lock

PACKAGES = ("qat_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")

# Settings that a run may change when it goes on, since its result does not depend on them.
MAY_CHANGE = frozenset(
    {
        "fsdp",
        "hosts",
        "profile",
        "dataset.cache_dir",
        "dataset.in_memory",
        "dataset.num_threads",
        "dataset.num_workers",
    }
)

# What every result.json has, beside what the run ran on.
_OF_A_RESULT = ("experiment", "config", "command", "seed", "wall_seconds", "metrics")
_NON_FINITE = ("nan", "inf", "-inf")  # as text in files: JSON has no such numbers


class WorkdirError(ValueError):
    """A run folder cannot be used; the message says why and what to do."""


class Status(enum.Enum):
    """What a run folder holds."""

    NEW = "new"
    UNFINISHED = "unfinished"
    FINISHED = "finished"


class Workdir:
    """The paths of a run folder and what may be done with it.

    Making one touches nothing on the disk.

    Args:
        path: the folder; `begin` makes it.
        writes: whether this process writes; the other processes of a run only read.
    """

    def __init__(self, path: str | Path, *, writes: bool = True):
        self.path = Path(path)
        self.writes = writes
        self.config_path = self.path / "config.json"
        self.metrics_path = self.path / "metrics.jsonl"
        self.result_path = self.path / "result.json"
        self.checkpoints_path = self.path / "checkpoints"
        self.lock_path = self.path / ".lock"
        self._software: dict[str, Any] | None = None

    def status(self, config: Mapping[str, Any]) -> Status:
        """Says how far the folder's run has come.

        Args:
            config: the resolved settings of the run about to start.

        Raises:
            WorkdirError: the folder is a file, holds something else, or a run of other settings.
        """
        if not self.path.exists():
            return Status.NEW
        if not self.path.is_dir():
            raise WorkdirError(f"{self.path} is a file: choose another --workdir")
        if not self.config_path.exists():
            if not self.is_empty():
                raise WorkdirError(
                    f"{self.path} holds files but no run: choose a new or empty --workdir"
                )
            return Status.NEW
        difference = _first_difference(_read_json(self.config_path), _as_json(config))
        if difference:
            raise WorkdirError(
                f"{self.path} holds a run of other settings ({difference}): "
                "choose another --workdir or remove the folder"
            )
        return Status.FINISHED if self.result_path.exists() else Status.UNFINISHED

    def is_empty(self) -> bool:
        """Whether the folder holds nothing but the file that locks it."""
        return all(path == self.lock_path for path in self.path.iterdir())

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes from writing to the folder, which is made if need be.

        It goes again if nothing was written. Only the process that writes locks.

        Raises:
            WorkdirError: another process has locked it, or it cannot be made or written to.
        """
        if not self.writes:
            yield
            return
        existed = self.path.exists()
        self._make()
        try:
            with folder_lock.held(self.lock_path):
                yield
        except folder_lock.HeldError as error:
            raise WorkdirError(
                f"{self.path} is in use by {error.holder}: wait until that has ended, end it, or "
                "choose another --workdir"
            ) from error
        finally:
            if not existed:
                with contextlib.suppress(OSError):  # It is not empty.
                    self.path.rmdir()

    def _make(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise WorkdirError(
                f"{self.path} cannot be made ({error.strerror}): choose another --workdir"
            ) from error
        if not os.access(self.path, os.W_OK):
            raise WorkdirError(f"{self.path} may not be written to: choose another --workdir")

    def begin(self, config: Mapping[str, Any]) -> None:
        """Makes the folder and writes config.json.

        Raises:
            WorkdirError: it cannot be made or written to.
        """
        self._software = software()
        if not self.writes:
            return
        self._make()
        _write_json(self.config_path, _as_json(config))

    def finish(
        self, config: Mapping[str, Any], metrics: Mapping[str, Any], *, wall_seconds: float
    ) -> dict[str, Any]:
        """Writes result.json, which makes the run a finished one, and returns its content.

        Commit and versions in it are those of `begin`: the code may have been edited since.

        Args:
            config: the resolved settings, with "experiment" and "seed" among them.
            metrics: what was measured; JSON values, or numbers that JSON lacks (see `with_floats`).
            wall_seconds: time of the whole run, in seconds.
        """
        result = {
            "experiment": config["experiment"],
            "config": _as_json(config),
            "command": shlex.join(["python", *sys.orig_argv[1:]]),
            **(self._software or software()),
            "device": device(),
            "seed": config["seed"],
            "wall_seconds": round(wall_seconds, 3),
            "metrics": _as_json(metrics),
        }
        if self.writes:
            _write_json(self.result_path, result)
        return result

    def settings(self) -> dict[str, Any]:
        """The settings that the folder's run began with.

        Raises:
            WorkdirError: the folder holds no run, or a damaged one.
        """
        if not self.config_path.is_file():
            raise WorkdirError(f"{self.path} holds no run: name a folder with a config.json")
        return _read_json(self.config_path)

    def result(self) -> dict[str, Any]:
        """The content of result.json.

        Raises:
            WorkdirError: it is not what a run leaves.
        """
        result = _read_json(self.result_path)
        if missing := [key for key in _OF_A_RESULT if key not in result]:
            raise WorkdirError(
                f"{self.result_path} is of no run of this project, it has no {missing[0]}: remove "
                "it, or name another folder"
            )
        return result


class MetricWriter:
    """Appends metrics to metrics.jsonl and to TensorBoard event files.

    Args:
        workdir: the run folder, begun.
        step: the step the run goes on from, or None for a new start; what the files hold of later
            steps is dropped, so that no step appears twice.
    """

    def __init__(self, workdir: Workdir, step: int | None):
        self._path = workdir.metrics_path
        self._file, self._events = None, None
        if not workdir.writes:
            return
        drop_lines_after(workdir.metrics_path, -1 if step is None else step)
        self._file = workdir.metrics_path.open("a", encoding="utf-8")
        self._events = SummaryWriter(str(workdir.path), purge_step=0 if step is None else step + 1)

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._file is not None and self._events is not None:
            self._file.close()
            self._events.close()

    def write(self, step: int, split: str, metrics: Mapping[str, Any]) -> None:
        """Writes one line and flushes it.

        Args:
            step: optimiser updates made so far.
            split: "train", "test", ….
            metrics: a tree of scalars; nested names are joined by "/".
        """
        if self._file is None or self._events is None:
            return
        values = flatten(metrics)
        line = {"step": step, "split": split, **values}
        self._file.write(json.dumps(_as_json(line)) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._events.add_scalar(f"{split}/{name}", value, step)

    def has(self, step: int, split: str) -> bool:
        """Whether the line of a step and a split is written; False where nothing is."""
        if self._file is None:
            return False
        lines = map(json.loads, self._path.read_text(encoding="utf-8").splitlines())
        return any((line["step"], line["split"]) == (step, split) for line in lines)


def flatten(metrics: Mapping[str, Any]) -> dict[str, float | int]:
    """One Python number a leaf, under the "/"-joined path of its keys.

    Example:
        >>> flatten({"loss": np.float32(0.5), "diagnostics": {"conv1": {"sqnr": 20}}})
        {'diagnostics/conv1/sqnr': 20, 'loss': 0.5}
    """
    leaves = jax.tree_util.tree_leaves_with_path(dict(metrics))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf).item()
        for path, leaf in leaves
    }


def drop_lines_after(path: Path, step: int) -> None:
    """Keeps the lines of a metrics file up to `step`: see `keep_lines`."""
    keep_lines(path, lambda line: line["step"] <= step)


def keep_lines(
    path: Path, wanted: Callable[[dict[str, Any]], bool] = lambda line: True
) -> list[dict[str, Any]]:
    """Keeps the lines of a file of JSON that are wanted; one cut short by a crash goes, too.

    Returns:
        What they say; nothing where there is no file.
    """
    if not path.exists():
        return []
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            if wanted(read := json.loads(line)):
                kept.append((line, read))
    write_text(path, "".join(f"{line}\n" for line, _ in kept))
    return [read for _, read in kept]


def software() -> dict[str, Any]:
    """What a result says of the code that made it."""
    return {"git_commit": git_commit(), "versions": versions()}


def git_commit() -> str | None:
    """The commit of the working tree this package is in, with "-dirty" where files have changed.

    None outside a git working tree.
    """
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        # An installed copy inside somebody else's repository is not of that commit.
        git("ls-files", "--error-unmatch", Path(__file__).name)
        commit = git("rev-parse", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}-dirty" if changed else commit


def versions() -> dict[str, str | None]:
    """The versions of Python and of the packages that decide a result.

    None for this one where it runs from a source tree that is not installed.
    """

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    return {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}


def device() -> dict[str, Any]:
    """Kind and number of the accelerators (or the CPU) that JAX uses."""
    devices = jax.devices()
    return {
        "platform": devices[0].platform,
        "kind": devices[0].device_kind,
        "count": len(devices),
    }


def _as_json(value: Any) -> Any:
    """`value` as JSON gives it back: tuples become lists, NaN and infinity become strings."""
    if isinstance(value, Mapping):
        return {str(key): _as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def with_floats(value: Any) -> Any:
    """What was read from a metrics file, with floats for the strings of NaN and infinity.

    Example:
        >>> with_floats({"conv1": {"sqnr_db": "-inf"}, "split": "test"})
        {'conv1': {'sqnr_db': -inf}, 'split': 'test'}
    """
    if isinstance(value, dict):
        return {key: with_floats(item) for key, item in value.items()}
    if isinstance(value, list):
        return [with_floats(item) for item in value]
    return float(value) if value in _NON_FINITE else value


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # of bytes that are no text, or text that is no JSON
        reason = error
    else:
        if isinstance(content, dict):
            return content
        reason = ValueError("no object")
    raise WorkdirError(f"{path} cannot be read ({reason}): remove its folder and run again")


def _write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a file that is either whole or as it was before."""
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def _first_difference(there: Any, here: Any, name: str = "") -> str | None:
    """What differs that a run must not change."""
    if name in MAY_CHANGE:
        return None
    if isinstance(there, dict) and isinstance(here, dict):
        for key in sorted(there.keys() | here.keys()):
            path = f"{name}.{key}" if name else key
            if difference := _first_difference(there.get(key), here.get(key), path):
                return difference
        return None
    return None if there == here else f"{name} is {there!r} there and {here!r} here"
