"""Datasets by name, as sources that are read at random: prepared on first use where possible."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from qat_jax.data.digits import Digits, prepare_digits
from qat_jax.data.prepare import (
    DATA_DIR_VARIABLE,
    DataError,
    is_prepared,
    prepare_once,
    resolve_data_dir,
)

_CHOOSE_DATA_DIR = f"pass --config.dataset.data_dir or set {DATA_DIR_VARIABLE}"


def load_source(name: str, split: str, data_dir: str | os.PathLike[str] | None = None) -> Any:
    """Opens one split of a dataset for reading at random.

    Args:
      name: `digits` (made on first use), `cifar10_local` (prepared by its own command), or any
        TFDS name such as `cifar10` (prepared already, or downloaded and prepared by TFDS, which
        needs TensorFlow for that).
      split: a TFDS split or slice of one: `train`, `test`, `train[:90%]`.
      data_dir: folder of prepared datasets; default $QAT_JAX_DATA, else TFDS's own.

    Returns:
      A `tfds.data_source`: `len`, and `source[i]` as a dictionary of the dataset's features.

    Raises:
      DataError: there is no such dataset, split or folder, or it cannot be prepared.
    """
    folder = resolve_data_dir(data_dir)
    if name == Digits.name:
        builder = prepare_digits(folder)
    else:
        if (data_dir or os.environ.get(DATA_DIR_VARIABLE)) and not folder.is_dir():
            raise DataError(f"data folder {folder} does not exist: {_CHOOSE_DATA_DIR}")
        builder = _cifar10_local(folder) if name == "cifar10_local" else _by_name(name, folder)
    return _open_split(builder, split)


def class_count(source: Any) -> int | None:
    """How many classes a `tfds.data_source` says that its labels are of; None where it does not."""
    features = source.dataset_info.features
    return getattr(features["label"], "num_classes", None) if "label" in features else None


def share_examples(source: Any, other: Any) -> bool:
    """Whether two splits of one dataset, each a `tfds.data_source`, have examples in common."""
    return any(
        ours.filename == theirs.filename
        and ours.skip < theirs.skip + theirs.take
        and theirs.skip < ours.skip + ours.take
        for ours in _parts(source)
        for theirs in _parts(other)
    )


def _parts(source: Any) -> Sequence[Any]:
    """The ranges of files that a split is read from."""
    return source.dataset_info.splits[source.split].file_instructions


def _cifar10_local(folder: Path) -> Any:
    # Imported late: `python -m qat_jax.data.cifar10_local` must find its module not yet imported,
    # or TFDS meets the builder twice.
    from qat_jax.data.cifar10_local import PREPARE_COMMAND, Cifar10Local

    builder = Cifar10Local(data_dir=folder)
    if not is_prepared(builder):
        raise DataError(
            f"cifar10_local is not prepared in {folder}: {_CHOOSE_DATA_DIR}, or make it with "
            f"{PREPARE_COMMAND}"
        )
    return builder


def _by_name(name: str, folder: Path) -> Any:
    make_builder = functools.partial(tfds.builder, name)
    try:
        builder = make_builder(data_dir=folder)
    except tfds.core.registered.DatasetNotFoundError as error:
        raise DataError(
            f"no dataset named {name!r} in TFDS or in {folder}: use digits, cifar10_local or a "
            "name from https://www.tensorflow.org/datasets/catalog"
        ) from error
    if is_prepared(builder):
        return builder
    mend = f"{_CHOOSE_DATA_DIR} to a folder where it is prepared, or use cifar10_local"
    if importlib.util.find_spec("tensorflow") is None:
        raise DataError(
            f"dataset {name!r} is not prepared in {folder} and TFDS needs TensorFlow, which is "
            f"not installed, to prepare it: {mend}"
        )
    try:
        return prepare_once(make_builder, folder, show_progress=True)
    except Exception as error:  # TFDS and the network fail in too many ways to list
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"TFDS could not prepare {name!r} ({reason}): {mend}") from error


def _open_split(builder: Any, split: str) -> Any:
    try:
        chosen = builder.info.splits[split]
    except (KeyError, ValueError, AssertionError) as error:
        known = ", ".join(builder.info.splits)
        raise DataError(
            f"dataset {builder.name!r} has no split {split!r}: choose one of {known}, or a slice "
            "such as train[:90%]"
        ) from error
    if not chosen.num_examples:
        raise DataError(f"split {split!r} of dataset {builder.name!r} has no examples: widen it")
    try:
        return builder.as_data_source(split)
    except NotImplementedError as error:
        raise DataError(
            f"{builder.data_path} is in the format {builder.info.file_format.value}, which cannot "
            "be read at random: prepare it in another data_dir with file_format='array_record'"
        ) from error
