"""Images of a folder or zip file, as an ImageNet classifier is trained and tested on."""

from __future__ import annotations

import functools
import io
import os
import re
import threading
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from qat_jax.data.prepare import DataError

_SUFFIXES = (".jpeg", ".jpg", ".png")
# What a damaged file raises; Pillow calls a broken PNG a SyntaxError.
_DAMAGE = (OSError, SyntaxError, zipfile.BadZipFile, zlib.error)


class ImageFolder:
    """The images of a folder or a zip file, read at random, in the order of their names.

    The class of an image is the number before the first `_` of its file's name
    (`404_ILSVRC2012_val_00000001.JPEG`), or else its folder: the number that the folder is named by
    (`404/…`), or its position among the sorted folders (`n01440764/…`). May be pickled, and read
    by several threads at once.

    Args:
      path: a folder, searched through all of its folders, or a .zip file.

    Raises:
      DataError: there are no images, or a name says no class.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self._path = Path(path)
        if not self._path.exists():
            raise DataError(f"image folder or zip file {path} does not exist: give another path")
        names, self._read = _open_zip(self._path) if self._path.is_file() else _open(self._path)
        self._names = sorted(name for name in names if name.lower().endswith(_SUFFIXES))
        if not self._names:
            raise DataError(f"{path} has no images: it must hold .JPEG, .jpg or .png files")
        self._labels = self._find_labels()

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`image`, uint8 [H, W, 3] of its own size, and `label`.

        Raises:
          DataError: the file is damaged.
        """
        name = self._names[index]
        try:
            with PIL.Image.open(io.BytesIO(self._read(name))) as file:
                image = file.convert("RGB")
        except _DAMAGE as error:
            raise DataError(
                f"cannot read {name} in {self._path} ({error}): get a fresh copy of it"
            ) from error
        return {"image": np.asarray(image), "label": self._labels[index]}

    def _find_labels(self) -> list[int]:
        numbered = [re.match(r"(\d+)_", os.path.basename(name)) for name in self._names]
        if all(numbered):
            return [int(match[1]) for match in numbered if match]
        folders = [os.path.dirname(name) for name in self._names]
        indices = [os.path.basename(folder) for folder in folders]
        if all(index.isdecimal() for index in indices):
            return [int(index) for index in indices]
        classes = sorted(set(folders))
        if len(classes) == 1 or "" in classes:
            unnumbered = [n for n, m in zip(self._names, numbered, strict=True) if m is None]
            unnamed = min(unnumbered, key=os.path.dirname)  # one outside all folders, if any
            raise DataError(
                f"{unnamed} in {self._path} says no class: name files <class>_….JPEG, or put each "
                "class into a folder of its own"
            )
        return [classes.index(folder) for folder in folders]


def _open(folder: Path) -> tuple[list[str], Callable[[str], bytes]]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return [path.relative_to(folder).as_posix() for path in files], functools.partial(_read, folder)


def _read(folder: Path, name: str) -> bytes:
    return (folder / name).read_bytes()


def _open_zip(path: Path) -> tuple[list[str], Callable[[str], bytes]]:
    try:
        archive = _Zip(path)
    except zipfile.BadZipFile as error:
        raise DataError(f"{path} is not a zip file ({error}): get a fresh copy of it") from error
    return archive.names(), archive.read


class _Zip:
    """A zip file that stays open: opening it reads the names of all images, however many.

    One open archive cannot be read by several threads at once, so they take turns at the bytes;
    decoding, which takes far longer, is left to each.
    """

    def __init__(self, path: Path):
        self._path = path
        self._archive = zipfile.ZipFile(path)
        self._turn = threading.Lock()

    def __reduce__(self) -> tuple[type[_Zip], tuple[Path]]:
        return _Zip, (self._path,)

    def names(self) -> list[str]:
        return self._archive.namelist()

    def read(self, name: str) -> bytes:
        with self._turn:
            return self._archive.read(name)
