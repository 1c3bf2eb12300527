"""Named arrays out of a safetensors file."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file


def read_arrays(path: str | Path, what: str) -> dict[str, np.ndarray]:
    """All arrays of a file by name.

    Args:
      path: a safetensors file.
      what: what it holds, for messages: "weights".

    Returns:
      The arrays.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not a safetensors file.
    """
    with _readable(path, what):
        return load_file(path)


def read_names(path: str | Path, what: str) -> set[str]:
    """The names alone, without reading the arrays; arguments and errors as of `read_arrays`."""
    with _readable(path, what), safe_open(path, framework="np") as file:
        return set(file.keys())


def read_metadata(path: str | Path, what: str) -> dict[str, str]:
    """The texts beside the arrays; arguments and errors as of `read_arrays`."""
    with _readable(path, what), safe_open(path, framework="np") as file:
        return file.metadata() or {}


@contextlib.contextmanager
def _readable(path: str | Path, what: str) -> Iterator[None]:
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"{what} file {path} does not exist: give the path of a .safetensors file"
        )
    try:
        yield
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a readable safetensors file ({error}): "
            f"convert the {what} with safetensors first"
        ) from error
