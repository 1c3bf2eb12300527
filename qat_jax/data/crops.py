"""Crops of photographs to the square that an ImageNet classifier expects.

They are torchvision's transforms, on Pillow's resampling, which torchvision's are too: the same
pixels where the same random numbers are drawn.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import PIL.Image


@dataclasses.dataclass(frozen=True)
class CentreCrop:
    """The middle of an image, its shorter side resized before: how networks are evaluated.

    An image that would be smaller than the crop is enlarged to it.

    Attributes:
      size: side of the crop, in pixels.
      resize: length that the shorter side is brought to before; None leaves the image as it is.
      tensorflow: whether what does not come out even is rounded as TensorFlow does, the longer
        side to nearest and half of an odd margin down, instead of as torchvision does, the longer
        side down and half of an odd margin to the even neighbour.

    Raises:
      ValueError: a length is not positive.
    """

    size: int
    resize: int | None = None
    tensorflow: bool = False

    def __post_init__(self) -> None:
        for name in ("size", "resize"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: choose at least 1 pixel")

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """uint8 [H, W, C] to uint8 [size, size, C]."""
        sides = image.shape[:2]
        shorter = max(self.size, self.resize or min(sides))
        if shorter != min(sides):
            to_whole = round if self.tensorflow else int
            height, width = (
                shorter if side == min(sides) else to_whole(shorter * side / min(sides))
                for side in sides
            )
            image = _resize(image, height, width)
        half = math.floor if self.tensorflow else round
        top, left = (half((side - self.size) / 2) for side in image.shape[:2])
        return np.ascontiguousarray(image[top : top + self.size, left : left + self.size])


@dataclasses.dataclass(frozen=True)
class RandomResizedCrop:
    """A random part of an image, of random shape, resized; every other one mirrored.

    The usual augmentation of ImageNet (Szegedy et al., "Going deeper with convolutions",
    arXiv:1409.4842, section 6).

    Attributes:
      size: side of the result, in pixels.
      area: least and greatest share of the image's area.
      aspect: least and greatest width over height; its logarithm is drawn evenly.
      flip: whether to mirror left and right with probability 1/2.
    """

    size: int
    area: tuple[float, float] = (0.08, 1.0)
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """uint8 [H, W, C] to uint8 [size, size, C]."""
        top, left, height, width = self.window(image.shape[0], image.shape[1], rng)
        crop = _resize(image[top : top + height, left : left + width], self.size, self.size)
        if self.flip and rng.random() < 0.5:
            crop = crop[:, ::-1]
        return np.ascontiguousarray(crop)

    def window(
        self, height: int, width: int, rng: np.random.Generator
    ) -> tuple[int, int, int, int]:
        """Top, left, height and width of a random part of an image of that size."""
        for _ in range(10):
            area = height * width * rng.uniform(self.area[0], self.area[1])
            aspect = math.exp(rng.uniform(math.log(self.aspect[0]), math.log(self.aspect[1])))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                top = int(rng.integers(0, height - h, endpoint=True))
                left = int(rng.integers(0, width - w, endpoint=True))
                return top, left, h, w
        # None fits in: the largest in the middle whose shape is allowed.
        least, most = self.aspect
        h, w = height, width
        if width / height < least:
            h = round(width / least)
        elif width / height > most:
            w = round(height * most)
        return (height - h) // 2, (width - w) // 2, h, w


def _resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    channels = image.shape[2]
    picture = PIL.Image.fromarray(image[..., 0] if channels == 1 else image)
    resized = picture.resize((width, height), PIL.Image.Resampling.BILINEAR)
    return np.asarray(resized).reshape(height, width, channels)
