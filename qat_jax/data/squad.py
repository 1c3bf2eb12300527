"""SQuAD: questions whose answers are spans of a text.

Rajpurkar, Zhang, Lopyrev and Liang (2016, version 1.1); Rajpurkar, Jia and Liang (2018, version
2.0, where some questions have no answer).
"""

import dataclasses
import gzip
import json
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from qat_jax.data.prepare import DataError
from qat_jax.data.sources import load_source

JSON = "squad_json"  # the name under which files are read
_DECOMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".xz": lzma.decompress,
    ".gz": gzip.decompress,
}
_SLICE = re.compile(r"(.+)\[(-?\d+)?:(-?\d+)?(?::(-?\d+)?)?\]")
# What a file raises that is damaged, or holds something else.
_DAMAGE = (ValueError, TypeError, EOFError, OSError, lzma.LZMAError, zlib.error)


@dataclasses.dataclass(frozen=True)
class Answer:
    """A span of a context.

    Attributes:
        text: what it says.
        start: the position of its first character.
    """

    text: str
    start: int


@dataclasses.dataclass(frozen=True)
class Question:
    """A question about a text.

    Attributes:
        id: its name in the files.
        question: what is asked.
        context: the text.
        answers: what different people took for the answer; the first is trained on.
        is_impossible: whether the text does not say (version 2.0).
    """

    id: str
    question: str
    context: str
    answers: tuple[Answer, ...]
    is_impossible: bool = False


def load_questions(
    name: str, split: str, data_dir: str | os.PathLike[str] | None = None
) -> list[Question]:
    """The questions of a set, in its order.

    Args:
        name: `squad_json`, or the TFDS name of a set with SQuAD's features: `squad`, `squad/v2.0`.
        split: for `squad_json` a file in `data_dir`, of JSON, or that in .xz or .gz, or a slice
            of its questions in Python's notation: `FILE[:100]`, `FILE[::5]`; else a TFDS split or
            slice.
        data_dir: the folder of the files, or of prepared datasets (see `load_source`).

    Raises:
        DataError: there is no such set, or it holds something else.
    """
    if name == JSON:
        if data_dir is None:
            raise DataError(f"{JSON} needs the files' folder: pass --config.dataset.data_dir")
        return _read_slice(Path(data_dir).expanduser(), split)
    source = load_source(name, split, data_dir)
    return [_of_tfds(source[index]) for index in range(len(source))]


def _read_slice(folder: Path, split: str) -> list[Question]:
    sliced = _SLICE.fullmatch(split)
    if sliced is None:
        return read_questions(folder / split)
    start, stop, step = (int(part) if part else None for part in sliced.groups()[1:])
    if step == 0 or not (kept := read_questions(folder / sliced[1])[start:stop:step]):
        raise DataError(f"{split} has no question: choose another slice, such as {sliced[1]}[:100]")
    return kept


def read_questions(path: str | os.PathLike[str]) -> list[Question]:
    """The questions of a file in SQuAD's format, version 1.1 or 2.0.

    Args:
        path: JSON, or that in .xz or .gz.

    Raises:
        DataError: there is no such file, or it is not SQuAD's.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"no file {path}: name one of SQuAD's JSON files, plain, .xz or .gz")
    try:
        content = _DECOMPRESS.get(path.suffix, bytes)(path.read_bytes())
        questions = list(_of_json(json.loads(content)))
    except KeyError as error:
        raise DataError(f"{path} is not in SQuAD's format: something has no {error}") from error
    except _DAMAGE as error:
        raise DataError(f"{path} cannot be read as SQuAD's JSON: {error}") from error
    if not questions:
        raise DataError(f"{path} has no question: choose another file")
    return questions


def _of_json(content: Mapping[str, Any]) -> Iterator[Question]:
    for article in content["data"]:
        for paragraph in article["paragraphs"]:
            for asked in paragraph["qas"]:
                yield Question(
                    id=asked["id"],
                    question=asked["question"],
                    context=paragraph["context"],
                    answers=tuple(
                        Answer(answer["text"], answer["answer_start"])
                        for answer in asked["answers"]
                    ),
                    is_impossible=asked.get("is_impossible", False),
                )


def _of_tfds(example: Mapping[str, Any]) -> Question:
    answers = example["answers"]
    return Question(
        id=_text(example["id"]),
        question=_text(example["question"]),
        context=_text(example["context"]),
        answers=tuple(
            Answer(_text(text), int(start))
            for text, start in zip(answers["text"], answers["answer_start"], strict=True)
        ),
        is_impossible=bool(example.get("is_impossible", False)),
    )


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
