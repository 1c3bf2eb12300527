"""Named arrays in files: safetensors, or NumPy's npz where a path ends in `.npz`."""

import contextlib
import os
import uuid
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

# Types of other libraries that the readers of neither kind of file know.
_UNREADABLE = ("float8", "float6_", "float4_", "int4", "uint4", "int2", "uint2")


def read_arrays(path: str | Path, what: str) -> dict[str, np.ndarray]:
    """All arrays of a file by name.

    Args:
      path: a safetensors or npz file.
      what: what it holds, for messages: "weights".

    Returns:
      The arrays.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not such a file, or an npz that holds pickled objects.
    """
    with _readable(path, what):
        if not _is_npz(path):
            return load_file(path)
        with _npz(path) as file:
            return {name: file[name] for name in file.files}


def read_names(path: str | Path, what: str) -> set[str]:
    """The names alone, without reading the arrays; arguments and errors as of `read_arrays`."""
    with _readable(path, what):
        if _is_npz(path):
            with _npz(path) as file:
                return set(file.files)
        with safe_open(path, framework="np") as opened:
            return set(opened.keys())


def read_metadata(path: str | Path, what: str) -> dict[str, str]:
    """The texts beside the arrays of a safetensors file; errors as of `read_arrays`."""
    with _readable(path, what), safe_open(path, framework="np") as file:
        return file.metadata() or {}


def write_arrays(
    arrays: Mapping[str, np.ndarray], path: str | Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a file that `read_arrays` reads.

    Args:
      arrays: by name.
      path: the file, a safetensors file unless it ends in `.npz`; an existing one is replaced
        once the new one is whole.
      metadata: texts for `read_metadata`.

    Raises:
      FileNotFoundError: the folder of ``path`` does not exist.
      ValueError: ``path`` is a folder, npz cannot hold metadata or an array's dtype, such as
        bfloat16, or neither can hold it, such as float8.
    """
    for name, array in arrays.items():
        if array.dtype.name.startswith(_UNREADABLE):
            raise ValueError(f"no file has {array.dtype} ({name}): convert it to float32 first")
    if metadata and _is_npz(path):
        raise ValueError(f"npz has no place for metadata: save {path} as a .safetensors file")
    # Either format holds a buffer as it lies in memory, so a transposed view will not do.
    contiguous = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    with draft_of(path) as draft:
        if _is_npz(path):
            _write_npz(contiguous, draft)
        else:
            save_file(contiguous, draft, metadata and dict(metadata))


@contextlib.contextmanager
def draft_of(path: str | Path) -> Iterator[Path]:
    """A file to write first, which then takes the place of another.

    So there is never half a file under the right name, whatever ends the process.

    Args:
      path: the file to be replaced, or to be made.

    Yields:
      The path of the draft, beside it. After an error the draft is removed and ``path`` as it was.

    Raises:
      FileNotFoundError: the folder of ``path`` does not exist.
      ValueError: ``path`` is a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give the path of a file in it")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"folder {path.parent} does not exist: make it first")
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}.unfinished")  # other processes' apart
    try:
        yield draft
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def _write_npz(arrays: Mapping[str, np.ndarray], path: Path) -> None:
    for name, array in arrays.items():
        if array.dtype.kind == "V":  # NumPy would forget which
            raise ValueError(f"npz has no {array.dtype} ({name}): save a .safetensors file")
    with zipfile.ZipFile(path, "w") as archive:  # np.savez refuses a few names, such as "file"
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def _is_npz(path: str | Path) -> bool:
    return Path(path).suffix == ".npz"


def _npz(path: str | Path) -> np.lib.npyio.NpzFile:
    file = np.load(path, allow_pickle=False)
    if not isinstance(file, np.lib.npyio.NpzFile):
        raise ValueError("a single array")
    return file


@contextlib.contextmanager
def _readable(path: str | Path, what: str) -> Iterator[None]:
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"{what} file {path} does not exist: give the path of a .safetensors or .npz file"
        )
    kind = "npz" if _is_npz(path) else "safetensors"
    try:
        yield
    except (AttributeError, KeyError) as error:  # of a dtype, looked up by its name
        raise ValueError(
            f"{path} has arrays of a type that NumPy does not know ({error}), such as float8: "
            f"convert the {what} to float32 or bfloat16 first"
        ) from error
    except (SafetensorError, zipfile.BadZipFile, zlib.error, EOFError, ValueError) as error:
        raise ValueError(
            f"{path} is not a readable {kind} file ({error}): convert the {what} with "
            f"{'numpy.savez' if kind == 'npz' else 'safetensors'} first"
        ) from error
