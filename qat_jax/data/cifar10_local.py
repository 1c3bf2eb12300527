"""CIFAR-10 as a TFDS dataset made from a folder of local files, without a download or TensorFlow.

One command prepares it: `python -m qat_jax.data.cifar10_local --source=DIR`.
"""

from __future__ import annotations

import argparse
import functools
import io
import itertools
import os
import sys
import textwrap
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import tensorflow_datasets as tfds

from qat_jax.data.prepare import DataError, is_prepared, prepare_once, resolve_data_dir

IMAGE_SHAPE = (32, 32, 3)
CLASS_NAMES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
# File names of a split, in the two layouts read: ours, and the official binary archive's.
_PATTERNS = {
    "train": ("cifar10_train_*.npz", "data_batch_*.bin"),
    "test": ("cifar10_test_*.npz", "test_batch.bin"),
}

Examples = Iterator[tuple[np.ndarray, int]]


class Cifar10Local(tfds.core.GeneratorBasedBuilder):
    """The features of TFDS's `cifar10` (id, image, label), as many examples as there are files.

    Images are stored as raw bytes rather than PNG: three times as fast to read at random.

    Args:
      source: folder of local files; only preparing needs it.
      **kwargs: as for every `tfds.core.DatasetBuilder`.
    """

    VERSION = tfds.core.Version("1.0.0")
    # Nothing is downloaded, so TFDS need not look for checksums beside the code (which it does
    # with a package that it does not declare as a dependency).
    code_path = None

    def __init__(self, *, source: str | os.PathLike[str] | None = None, **kwargs: Any):
        super().__init__(**kwargs)
        self._source = source

    def _info(self) -> Any:
        return tfds.core.DatasetInfo(
            builder=self,
            description="CIFAR-10 (Krizhevsky 2009) made from local files.",
            homepage="https://www.cs.toronto.edu/~kriz/cifar.html",
            features=tfds.features.FeaturesDict(
                {
                    "id": tfds.features.Text(),
                    "image": tfds.features.Tensor(
                        shape=IMAGE_SHAPE, dtype=np.uint8, encoding="bytes"
                    ),
                    "label": tfds.features.ClassLabel(names=CLASS_NAMES),
                }
            ),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager  # nothing to download
        if self._source is None:
            raise DataError(f"cifar10_local is not prepared: run {PREPARE_COMMAND}")
        files = find_files(self._source)
        return {split: self._generate_examples(split, files[split]) for split in _PATTERNS}

    def _generate_examples(
        self, split: str, files: Sequence[Path]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        examples = itertools.chain.from_iterable(map(read_examples, files))
        for index, (image, label) in enumerate(examples):
            yield index, {"id": f"{split}_{index:05d}", "image": image, "label": label}


PREPARE_COMMAND = "python -m qat_jax.data.cifar10_local --source=DIR --data_dir=DATA"


def find_files(source: str | os.PathLike[str]) -> dict[str, list[Path]]:
    """Finds the files of each split, in order.

    Raises:
      DataError: the folder does not exist or lacks the files of a split.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise DataError(f"source folder {folder} does not exist: pass --source=DIR")
    found = {}
    for split, patterns in _PATTERNS.items():
        layouts = [sorted(folder.glob(pattern)) for pattern in patterns]
        found[split] = next(filter(None, layouts), [])
        if not found[split]:
            wanted = " or ".join(patterns)
            raise DataError(f"no {split} files in {folder}: it must hold {wanted}")
    return found


def read_examples(path: Path) -> Examples:
    """Yields (image uint8 [32, 32, 3], label) from one file of either layout.

    Raises:
      DataError: the file is damaged or of another layout.
    """
    read = _read_npz if path.suffix == ".npz" else _read_binary
    try:
        yield from read(path)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(f"cannot read {path}: {error}; get a fresh copy of it") from error


def _read_npz(path: Path) -> Examples:
    """Labels, and lossless WebP strips of images stacked one below the other."""
    with np.load(path, allow_pickle=False) as contents:
        labels = contents["labels"]
        strips = sorted(name for name in contents.files if name.startswith("webp_"))
        images = itertools.chain.from_iterable(_decode_strip(contents[name]) for name in strips)
        yield from zip(images, labels.tolist(), strict=True)


def _decode_strip(encoded: np.ndarray) -> np.ndarray:
    with PIL.Image.open(io.BytesIO(encoded.tobytes())) as strip:
        return np.asarray(strip.convert("RGB")).reshape(-1, *IMAGE_SHAPE)


def _read_binary(path: Path) -> Examples:
    """Records of one label byte and the red, green and blue planes."""
    records = np.fromfile(path, np.uint8).reshape(-1, 1 + 3 * 32 * 32)
    planes = records[:, 1:].reshape(-1, 3, 32, 32)
    images = np.ascontiguousarray(planes.transpose(0, 2, 3, 1))
    yield from zip(images, records[:, 0].tolist(), strict=True)


def prepare_cifar10_local(
    source: str | os.PathLike[str],
    data_dir: str | os.PathLike[str] | None = None,
    *,
    show_progress: bool = False,
) -> Any:
    """Returns the builder of `cifar10_local`, prepared in `data_dir` from the files in `source`.

    Raises:
      DataError: a folder or file is missing or damaged; nothing has been written then.
    """
    find_files(source)
    make_builder = functools.partial(Cifar10Local, source=source)
    return prepare_once(make_builder, resolve_data_dir(data_dir), show_progress=show_progress)


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m qat_jax.data.cifar10_local",
        description="Make the dataset cifar10_local from a folder of CIFAR-10 files.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=textwrap.dedent("""\
            --source is a folder in one of two layouts:
              cifar10_train_*.npz, cifar10_test_*.npz   labels (uint8) and webp_00, webp_01, …:
                                                        the bytes of lossless WebP strips, 32
                                                        pixels wide, images one below the other
              data_batch_*.bin, test_batch.bin          the "binary version" of
                                                        https://www.cs.toronto.edu/~kriz/cifar.html

            The images found are all taken, in the order of the file names. Then train with
              --config.dataset.name=cifar10_local --config.dataset.data_dir=DATA
            """),
    )
    parser.add_argument("--source", required=True, metavar="DIR", help="folder of CIFAR-10 files")
    parser.add_argument(
        "--data_dir",
        metavar="DATA",
        help="folder of prepared datasets (default: $QAT_JAX_DATA, else TFDS's own)",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command; what is wrong with it ends in one line on standard error and status 2."""
    options = _parse_arguments(arguments)
    data_dir = resolve_data_dir(options.data_dir)
    present = Cifar10Local(data_dir=data_dir)
    was_prepared = is_prepared(present)
    try:
        builder = (
            present
            if was_prepared
            else prepare_cifar10_local(options.source, data_dir, show_progress=True)
        )
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    sizes = ", ".join(f"{info.num_examples} {name}" for name, info in builder.info.splits.items())
    hint = "; delete that folder to make it again" if was_prepared else ""
    done = "already prepared" if was_prepared else "prepared"
    print(f"cifar10_local {done} in {builder.data_path}: {sizes} images{hint}")


if __name__ == "__main__":
    main()
