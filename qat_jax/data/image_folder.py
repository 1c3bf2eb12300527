"""Images of a folder or zip file, as an ImageNet classifier is trained and tested on."""

from __future__ import annotations

import functools
import io
import os
import re
import threading
import zipfile
import zlib
from collections.abc import Callable, Sequence
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

    The class of an image is its folder, where images lie in several: the number that the folder is
    named by (`404/…`), or its position among the sorted folders (`n01440764/…`). Where they do not,
    it is the number before the first `_` of its file's name (`404_ILSVRC2012_val_00000001.JPEG`).
    May be pickled, and read by several threads at once.

    Args:
      path: a folder, searched through all of its folders, or a .zip file.
      classes: `class_names` of the images that a network is trained on, so that a folder that has
        not all of them means the same by a class. None: the folders that there are.

    Attributes:
      class_names: the folders that are classes, in the order of these; None where numbers are.

    Raises:
      DataError: there are no images, a name says no class, or `classes` lacks a folder.
    """

    def __init__(self, path: str | os.PathLike[str], classes: Sequence[str] | None = None):
        self._path = Path(path)
        if not self._path.exists():
            raise DataError(f"image folder or zip file {path} does not exist: give another path")
        names, self._read = _open_zip(self._path) if self._path.is_file() else _open(self._path)
        self._names = sorted(name for name in names if name.lower().endswith(_SUFFIXES))
        if not self._names:
            raise DataError(f"{path} has no images: it must hold .JPEG, .jpg or .png files")
        self.class_names: tuple[str, ...] | None = None
        self._labels = self._find_labels(classes)

    @property
    def num_classes(self) -> int:
        """How many classes a network for these images has to know: labels are below it."""
        return len(self.class_names) if self.class_names else max(self._labels) + 1

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

    def _find_labels(self, classes: Sequence[str] | None) -> list[int]:
        folders = [os.path.dirname(name) for name in self._names]
        if "" not in folders:
            found = _below_what_they_share(folders)
            # A single folder is a class if it is known as one; else it is just where images lie.
            if len(set(found)) > 1 or found[0] in (classes or ()):
                return self._labels_of_folders(found, classes)
        numbered = [re.match(r"(\d+)_", os.path.basename(name)) for name in self._names]
        if all(numbered):
            return [int(match[1]) for match in numbered if match]
        indices = [os.path.basename(folder) for folder in folders]
        if all(index.isdecimal() for index in indices):
            return [int(index) for index in indices]
        unnumbered = [n for n, m in zip(self._names, numbered, strict=True) if m is None]
        unnamed = min(unnumbered, key=os.path.dirname)  # one outside all folders, if any
        raise DataError(
            f"{unnamed} in {self._path} says no class: name files <class>_….JPEG, or put each "
            "class into a folder of its own"
        )

    def _labels_of_folders(self, found: list[str], classes: Sequence[str] | None) -> list[int]:
        numbers = [os.path.basename(folder) for folder in found]
        if classes is None and all(number.isdecimal() for number in numbers):
            return [int(number) for number in numbers]
        self.class_names = tuple(sorted(set(found)) if classes is None else classes)
        if unknown := set(found).difference(self.class_names):
            raise DataError(
                f"{self._path} has a folder {min(unknown)}, which is no class of the training "
                "images: take it away, or name the folders of all splits by their classes' numbers"
            )
        label = {name: number for number, name in enumerate(self.class_names)}
        return [label[folder] for folder in found]


def _below_what_they_share(folders: list[str]) -> list[str]:
    """Folders without the path to all of them, which a zip file's split may have of its own."""
    shared = os.path.commonpath({os.path.dirname(folder) for folder in folders})
    return [folder.removeprefix(f"{shared}/") if shared else folder for folder in folders]


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
