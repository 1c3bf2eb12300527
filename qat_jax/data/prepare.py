"""Preparing a TFDS dataset once: whole or not at all, quietly, and safe against company."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from tensorflow_datasets.core import constants as tfds_constants

DATA_DIR_VARIABLE = "QAT_JAX_DATA"
_RANDOM_ACCESS_FORMAT = "array_record"


class DataError(Exception):
    """Data asked for cannot be had; the message is one line that names the mend."""


def resolve_data_dir(data_dir: str | os.PathLike[str] | None = None) -> Path:
    """Folder of prepared datasets: the argument, else $QAT_JAX_DATA, else TFDS's own default."""
    chosen = data_dir or os.environ.get(DATA_DIR_VARIABLE) or tfds_constants.get_default_data_dir()
    return Path(chosen).expanduser()


def prepare_once(
    make_builder: Callable[..., Any], data_dir: Path, *, show_progress: bool = False
) -> Any:
    """Prepares a dataset in `data_dir` unless it is there already.

    The set is written in a temporary folder inside `data_dir` and renamed into place, so that a
    failure leaves nothing behind and of several processes that start together one wins while the
    others use its result.

    Args:
      make_builder: called with `data_dir=`, returns a `tfds.core.DatasetBuilder`.
      data_dir: folder of prepared datasets; made if it does not exist.
      show_progress: show TFDS's progress bars, if standard error is a terminal.

    Returns:
      The builder of the prepared dataset.

    Raises:
      DataError: nothing can be written to `data_dir`.
    """
    builder = make_builder(data_dir=data_dir)
    if not is_prepared(builder):
        _make_writable(data_dir)
        with tempfile.TemporaryDirectory(prefix=".preparing-", dir=data_dir) as workshop:
            draft = make_builder(data_dir=workshop)
            with _progress(show_progress):
                draft.download_and_prepare(file_format=_RANDOM_ACCESS_FORMAT)
            _move_into_place(Path(draft.data_path), Path(builder.data_path))
        # The first builder read its description before there was anything to describe.
        builder = make_builder(data_dir=data_dir)
    return builder


def is_prepared(builder: Any) -> bool:
    """Whether the builder's dataset is in its folder, of which only a whole one bears the name."""
    return Path(builder.data_path).exists()


def _make_writable(data_dir: Path) -> None:
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        if not os.access(data_dir, os.W_OK):
            raise PermissionError("it may not be written to")
    except OSError as error:
        raise DataError(
            f"cannot prepare a dataset in {data_dir} ({error.strerror or error}): pass "
            f"--config.dataset.data_dir or set {DATA_DIR_VARIABLE} to a folder of your own"
        ) from error


def _move_into_place(draft: Path, destination: Path) -> None:
    destination.parent.mkdir(parents=True, exist_ok=True)
    try:
        draft.rename(destination)
    except OSError:
        if not destination.exists():
            raise


@contextlib.contextmanager
def _progress(show: bool) -> Iterator[None]:
    """Lets TFDS's bars through on a terminal only, and its talk of temporary folders nowhere."""
    quiet = not (show and sys.stderr.isatty())
    if quiet:
        tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        if quiet:
            tfds.enable_progress_bar()
