"""Named arrays out of a safetensors file."""

from pathlib import Path

import numpy as np
from safetensors import SafetensorError
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
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"{what} file {path} does not exist: give the path of a .safetensors file"
        )
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a readable safetensors file ({error}): "
            f"convert the {what} with safetensors first"
        ) from error
