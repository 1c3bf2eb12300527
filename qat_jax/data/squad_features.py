"""From questions to what a BERT reads: windows of WordPiece tokens, and where answers lie in them.

As BERT does it (Devlin et al., 2019, section 4.2): `[CLS] question [SEP] context [SEP]`, a context
that is too long in windows that overlap.
"""

import dataclasses
import hashlib
import json
import os
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import BertWordPieceTokenizer

from qat_jax.array_file import draft_of
from qat_jax.data.prepare import DataError
from qat_jax.data.squad import Answer, Question
from qat_jax.text_file import read_text

QUESTION_FIELDS: tuple[str, ...] = ("tokens", "token_types", "token_mask", "start", "end")
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
_FORMAT = 1  # of cached files: raise it with every change to what they hold
# What a damaged file raises; flags of a zip file that NumPy never sets are RuntimeErrors.
_DAMAGE = (
    OSError,
    ValueError,
    TypeError,
    EOFError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
)


class WordPiece:
    """BERT's tokens.

    Args:
        vocabulary: a text file, a token a line, whose number is its line's.
        lowercase: whether upper case and accents count for nothing, as in "uncased" models.

    Attributes:
        size: how many tokens there are: their numbers are below it.

    Raises:
        DataError: there is no such file, or it lacks one of BERT's special tokens.
        ValueError: it is no text.
    """

    def __init__(self, vocabulary: str | os.PathLike[str], *, lowercase: bool = True) -> None:
        path = Path(vocabulary)
        if not path.is_file():
            raise DataError(f"no vocabulary at {path}: name a vocab.txt")
        # Not `splitlines`: vocabularies of many languages have tokens that it takes for line ends.
        tokens = read_text(path).removesuffix("\n").split("\n")
        numbers = {token: number for number, token in enumerate(tokens)}
        missing = [token for token in _SPECIAL if token not in numbers]
        if missing:
            raise DataError(f"{path} is no vocabulary of BERT's: it has no {', '.join(missing)}")
        self.size = len(tokens)
        self.padding, _, self.cls, self.sep = (numbers[token] for token in _SPECIAL)
        self.fingerprint = hashlib.sha256(path.read_bytes() + bytes([lowercase])).hexdigest()
        self._tokenizer = BertWordPieceTokenizer(numbers, lowercase=lowercase)

    def encode(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """The tokens of each text, int32 [T], and the characters they cover, int32 [T, 2]."""
        encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [
            (
                np.array(encoding.ids, np.int32),
                np.array(encoding.offsets, np.int32).reshape(-1, 2),
            )
            for encoding in encodings
        ]


@dataclasses.dataclass(frozen=True)
class SquadFeatures:
    """Windows of tokens, N of them, each L long: a source for `train_batches` and `eval_batches`.

    Attributes:
        questions: what they were made of.
        tokens: int32 [N, L].
        context_start: int32 [N], the position of the first token of the context.
        lengths: int32 [N], tokens that are no padding.
        start: int32 [N], the first token of the answer; 0, the [CLS], if it is not in the window.
        end: int32 [N], its last token, or 0.
        question_index: int32 [N], whose window it is.
        offsets: int32 [N, L, 2], the characters of the context that a token covers; -1 for tokens
            that are not of the context.
    """

    questions: tuple[Question, ...]
    tokens: np.ndarray
    context_start: np.ndarray
    lengths: np.ndarray
    start: np.ndarray
    end: np.ndarray
    question_index: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int, /) -> dict[str, Any]:
        """One window.

        Returns:
            `tokens` and `token_types`, int32 [L]; `token_mask`, bool [L], False for padding;
            `start` and `end`, int32.
        """
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int], /) -> list[dict[str, Any]]:
        """Several windows, each as `__getitem__` gives it."""
        positions = np.arange(self.tokens.shape[1])
        in_window = positions < self.lengths[indices, None]
        of_context = in_window & (positions >= self.context_start[indices, None])
        columns = (
            self.tokens[indices],
            of_context.astype(np.int32),
            in_window,
            self.start[indices],
            self.end[indices],
        )
        return [
            dict(zip(QUESTION_FIELDS, window, strict=True)) for window in zip(*columns, strict=True)
        ]

    def cut(self, length: int) -> "SquadFeatures":
        """These windows without what follows the first `length` tokens: padding, or not read."""
        return dataclasses.replace(
            self, tokens=self.tokens[:, :length], offsets=self.offsets[:, :length]
        )

    def by_length(self) -> "SquadFeatures":
        """These windows, the longest first."""
        order = np.argsort(-self.lengths, kind="stable")
        rows = {
            field.name: getattr(self, field.name)[order]
            for field in dataclasses.fields(self)
            if field.name != "questions"
        }
        return dataclasses.replace(self, **rows)


def make_features(
    questions: Sequence[Question],
    wordpiece: WordPiece,
    *,
    length: int = 384,
    stride: int = 128,
    max_question_length: int = 64,
) -> SquadFeatures:
    """Cut questions and contexts into windows of tokens.

    Args:
        questions: what to cut.
        wordpiece: how.
        length: tokens of a window, L.
        stride: tokens from the start of a window of a context to the start of the next (BERT's
            "doc_stride"): a step. What others call a stride may be the overlap instead.
        max_question_length: tokens of a question that are kept.

    Raises:
        ValueError: a window has no room for `stride` tokens of context.

    The answer of a window is the question's first, if the window has all of it.
    """
    if not 0 < stride <= length - max_question_length - 3:
        raise ValueError(
            f"windows of {length} tokens have room for {length - max_question_length - 3} of "
            f"context beside a question of {max_question_length}: stride {stride} must be at least "
            "1 and no more than that"
        )
    contexts = list(dict.fromkeys(question.context for question in questions))
    encoded = dict(zip(contexts, wordpiece.encode(contexts), strict=True))
    asked = wordpiece.encode([question.question for question in questions])
    windows = [
        window
        for index, (question, (tokens, _)) in enumerate(zip(questions, asked, strict=True))
        for window in _windows(
            index,
            question,
            tokens[:max_question_length],
            *encoded[question.context],
            length,
            stride,
        )
    ]
    count = len(windows)
    tokens = np.full((count, length), wordpiece.padding, np.int32)
    offsets = np.full((count, length, 2), -1, np.int32)
    for row, window in enumerate(windows):
        parts = ([wordpiece.cls], window.question, [wordpiece.sep], window.context, [wordpiece.sep])
        tokens[row, : window.length] = np.concatenate(parts)
        offsets[row, window.context_start : window.length - 1] = window.offsets

    def column(values: Any) -> np.ndarray:
        return np.fromiter(values, np.int32, count)

    return SquadFeatures(
        questions=tuple(questions),
        tokens=tokens,
        context_start=column(window.context_start for window in windows),
        lengths=column(window.length for window in windows),
        start=column(window.answer[0] for window in windows),
        end=column(window.answer[1] for window in windows),
        question_index=column(window.question_index for window in windows),
        offsets=offsets,
    )


def cached_features(
    questions: Sequence[Question],
    wordpiece: WordPiece,
    folder: str | os.PathLike[str],
    *,
    length: int = 384,
    stride: int = 128,
    max_question_length: int = 64,
) -> SquadFeatures:
    """What `make_features` makes, kept in a folder for the next time.

    Args:
        questions: as of `make_features`.
        wordpiece: likewise.
        folder: where; it is made if it is not there. A file's name tells what it was made of, so
            that a change of anything makes another file; a damaged file is made again.
        length: as of `make_features`.
        stride: likewise.
        max_question_length: likewise.
    """
    folder = Path(folder)
    settings = {"length": length, "stride": stride, "max_question_length": max_question_length}
    content = [_FORMAT, wordpiece.fingerprint, settings, [*map(dataclasses.astuple, questions)]]
    name = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]
    path = folder / f"squad-{name}.npz"
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return SquadFeatures(tuple(questions), **arrays)
    except _DAMAGE:  # or not there
        features = make_features(questions, wordpiece, **settings)
    arrays = {
        field.name: getattr(features, field.name)
        for field in dataclasses.fields(features)
        if field.name != "questions"
    }
    folder.mkdir(parents=True, exist_ok=True)
    with draft_of(path) as draft, draft.open("xb") as file:
        np.savez_compressed(file, **arrays)
    return features


@dataclasses.dataclass(frozen=True)
class _Window:
    """A question and a part of its context."""

    question_index: int
    question: np.ndarray
    context: np.ndarray
    offsets: np.ndarray
    answer: tuple[int, int]

    @property
    def context_start(self) -> int:
        return len(self.question) + 2

    @property
    def length(self) -> int:
        return self.context_start + len(self.context) + 1


def _windows(
    index: int,
    question: Question,
    asked: np.ndarray,
    context: np.ndarray,
    offsets: np.ndarray,
    length: int,
    stride: int,
) -> list[_Window]:
    room = length - len(asked) - 3
    span = _token_span(question.answers[0], offsets) if question.answers else None
    windows = []
    for first in range(0, max(len(context) - room, 0) + stride, stride):
        past = min(first + room, len(context))
        answer = (0, 0)
        if span is not None and first <= span[0] and span[1] < past:
            shift = len(asked) + 2 - first
            answer = (span[0] + shift, span[1] + shift)
        windows.append(_Window(index, asked, context[first:past], offsets[first:past], answer))
    return windows


def _token_span(answer: Answer, offsets: np.ndarray) -> tuple[int, int] | None:
    """The first and the last of the tokens that have a character of the answer."""
    past = answer.start + len(answer.text)
    (touched,) = np.nonzero((offsets[:, 0] < past) & (offsets[:, 1] > answer.start))
    return (int(touched[0]), int(touched[-1])) if len(touched) else None
