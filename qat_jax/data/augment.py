"""Random changes to single training images, in NumPy, drawn from a generator that is passed in."""

from __future__ import annotations

import numpy as np


def random_crop_flip(
    image: np.ndarray, rng: np.random.Generator, padding: int = 4, flip: bool = True
) -> np.ndarray:
    """Pads with zeros, crops to the original size at a random place, mirrors every other image.

    The usual augmentation of CIFAR-10 (He et al. 2015, arXiv:1512.03385, section 4.2).

    Args:
      image: [H, W, C], any dtype.
      rng: source of randomness.
      padding: pixels added on each of the four sides.
      flip: mirror left and right with probability 1/2.

    Returns:
      A new array of the shape and dtype of `image`.

    Example:
      >>> import numpy as np
      >>> image = np.ones((8, 8, 1), np.uint8)
      >>> random_crop_flip(image, np.random.default_rng(0), padding=1).shape
      (8, 8, 1)
    """
    height, width, channels = image.shape
    padded = np.zeros((height + 2 * padding, width + 2 * padding, channels), image.dtype)
    padded[padding : padding + height, padding : padding + width] = image
    top, left = rng.integers(0, 2 * padding, size=2, endpoint=True)
    crop = padded[top : top + height, left : left + width]
    if flip and rng.random() < 0.5:
        crop = crop[:, ::-1]
    return np.ascontiguousarray(crop)
