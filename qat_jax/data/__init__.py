"""Image data: datasets by name, random-access sources, and reproducible batches from them.

`load_source` opens a dataset; `train_batches` and `eval_batches` turn it into NumPy batches.
"""

from qat_jax.data.augment import random_crop_flip
from qat_jax.data.crops import CentreCrop, RandomResizedCrop
from qat_jax.data.fake import FakeImages
from qat_jax.data.image_folder import ImageFolder
from qat_jax.data.pipeline import PreparedSource, eval_batches, train_batches
from qat_jax.data.prepare import DataError
from qat_jax.data.sources import load_source

__all__ = [
    "CentreCrop",
    "DataError",
    "FakeImages",
    "ImageFolder",
    "PreparedSource",
    "RandomResizedCrop",
    "eval_batches",
    "load_source",
    "random_crop_flip",
    "train_batches",
]
