"""Images of noise: a data set to try a recipe on before there is one."""

from __future__ import annotations

from typing import Any

import numpy as np


class FakeImages:
    """Noise with labels, the same at every reading; may be pickled.

    Args:
      count: number of examples.
      size: side of the images, in pixels.
      channels: of the images.
      num_classes: labels run from 0 to num_classes - 1.

    Raises:
      ValueError: one of them is not positive.

    Example:
      >>> example = FakeImages(10, size=4, channels=3, num_classes=2)[7]
      >>> example["image"].shape, example["label"]
      ((4, 4, 3), 1)
    """

    def __init__(self, count: int, *, size: int, channels: int, num_classes: int):
        if min(count, size, channels, num_classes) < 1:
            raise ValueError("fake images need a positive count, size, channels and num_classes")
        self._count = count
        self._shape = (size, size, channels)
        self._num_classes = num_classes

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`image`, uint8 [size, size, channels], and `label`."""
        if not 0 <= index < self._count:
            raise IndexError(f"there are {self._count} fake images, not {index + 1}")
        image = np.random.default_rng(index).integers(0, 256, self._shape, dtype=np.uint8)
        return {"image": image, "label": index % self._num_classes}
