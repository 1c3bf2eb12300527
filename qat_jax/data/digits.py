"""Handwritten digits as a TFDS dataset: the small real image set that needs no download.

The 1,797 images of 8 × 8 pixels come with scikit-learn (a copy of the test part of the UCI
"Optical Recognition of Handwritten Digits").
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from qat_jax.data.prepare import prepare_once, resolve_data_dir

IMAGE_SHAPE = (8, 8, 1)
SPLIT_SEED = 0
_TEST_EVERY = 5


class Digits(tfds.core.GeneratorBasedBuilder):
    """1,437 training and 360 test images, uint8 [8, 8, 1], of ten digits."""

    VERSION = tfds.core.Version("1.0.0")
    # Nothing is downloaded, so TFDS need not look for checksums beside the code (which it does
    # with a package that it does not declare as a dependency).
    code_path = None

    def _info(self) -> Any:
        return tfds.core.DatasetInfo(
            builder=self,
            description="scikit-learn's handwritten digits; grey levels 0…16 scaled to 0…255.",
            homepage="https://archive.ics.uci.edu/dataset/80",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Tensor(
                        shape=IMAGE_SHAPE, dtype=np.uint8, encoding="bytes"
                    ),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager  # nothing to download
        # Two seconds of imports, for whoever prepares the digits alone.
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        images = grey_levels_to_uint8(images).reshape(-1, *IMAGE_SHAPE)
        train, test = stratified_split(labels)
        return {
            "train": self._generate_examples(images, labels, train),
            "test": self._generate_examples(images, labels, test),
        }

    def _generate_examples(
        self, images: np.ndarray, labels: np.ndarray, indices: np.ndarray
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        for index in indices.tolist():
            yield index, {"image": images[index], "label": int(labels[index])}


def grey_levels_to_uint8(levels: np.ndarray) -> np.ndarray:
    """Scales grey levels 0…16 to uint8 0…255: round(level · 255 / 16)."""
    return np.rint(levels * (255 / 16)).astype(np.uint8)


def stratified_split(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Splits examples into training and test, a fifth of every class (±1) in the test.

    Args:
      labels: integer [N].

    Returns:
      Sorted training and test indices, disjoint, together 0 … N-1.
    """
    # RandomState, because its stream, unlike Generator's, is promised never to change.
    shuffled = np.random.RandomState(SPLIT_SEED).permutation(len(labels))
    class_by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    test = class_by_class[::_TEST_EVERY]
    return np.setdiff1d(class_by_class, test), np.sort(test)


def prepare_digits(data_dir: str | os.PathLike[str] | None = None) -> Any:
    """Returns the builder of the digits, prepared in `data_dir` on first use (about a second)."""
    return prepare_once(Digits, resolve_data_dir(data_dir))
