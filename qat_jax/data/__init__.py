"""Data: datasets by name, random-access sources, and reproducible batches from them.

`load_source` opens a dataset of images, `load_questions` with `make_features` one of questions;
`train_batches` and `eval_batches` turn them into NumPy batches.
"""

import importlib.util

if importlib.util.find_spec("grain") is None:
    raise ModuleNotFoundError("data needs grain and others: pip install 'qat_jax[experiments]'")

from qat_jax.data.augment import random_crop_flip
from qat_jax.data.bucketing import Bucketing, Sequences
from qat_jax.data.crops import CentreCrop, RandomResizedCrop
from qat_jax.data.fake import FakeImages
from qat_jax.data.image_folder import ImageFolder
from qat_jax.data.pipeline import InMemory, PreparedSource, eval_batches, train_batches
from qat_jax.data.prepare import DataError
from qat_jax.data.sources import load_source
from qat_jax.data.squad import Answer, Question, load_questions, read_questions
from qat_jax.data.squad_answers import RankedAnswer, best_answers, ranked_answers
from qat_jax.data.squad_features import (
    QUESTION_FIELDS,
    SquadFeatures,
    WordPiece,
    cached_features,
    make_features,
)
from qat_jax.data.squad_metrics import exact_match, f1, score

__all__ = [
    "QUESTION_FIELDS",
    "Answer",
    "Bucketing",
    "CentreCrop",
    "DataError",
    "FakeImages",
    "ImageFolder",
    "InMemory",
    "PreparedSource",
    "Question",
    "RandomResizedCrop",
    "RankedAnswer",
    "Sequences",
    "SquadFeatures",
    "WordPiece",
    "best_answers",
    "cached_features",
    "eval_batches",
    "exact_match",
    "f1",
    "load_questions",
    "load_source",
    "make_features",
    "random_crop_flip",
    "ranked_answers",
    "read_questions",
    "score",
    "train_batches",
]
