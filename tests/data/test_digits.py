import subprocess
import sys
from collections import Counter

import numpy as np
from sklearn.datasets import load_digits

from qat_jax.data import load_source
from qat_jax.data.digits import grey_levels_to_uint8, stratified_split


def read(split, digits_dir):
    source = load_source("digits", split, digits_dir)
    return [(example["image"], example["label"]) for example in source]


def test_splits_hold_every_image_once(digits_dir):
    train, test = read("train", digits_dir), read("test", digits_dir)
    assert (len(train), len(test)) == (1437, 360)
    images, labels = load_digits(return_X_y=True)
    levels = np.rint(images * 255 / 16).astype(np.uint8)
    expected = Counter(
        (image.tobytes(), label) for image, label in zip(levels, labels.tolist(), strict=True)
    )
    assert Counter((image.tobytes(), label) for image, label in train + test) == expected
    assert all(image.shape == (8, 8, 1) and image.dtype == np.uint8 for image, _ in train[:5])


def test_split_is_stratified_and_never_changes():
    labels = load_digits().target
    train, test = stratified_split(labels)
    assert set(train).isdisjoint(test)
    share = np.bincount(labels[test]) - np.bincount(labels) / 5
    assert np.abs(share).max() <= 1
    # Any other split would make results of different versions incomparable.
    assert test[:8].tolist() == [9, 12, 15, 27, 34, 39, 52, 59]


def test_grey_levels_fill_the_byte():
    np.testing.assert_array_equal(grey_levels_to_uint8(np.array([0, 8, 16])), [0, 128, 255])


def test_processes_that_start_together_all_succeed(tmp_path):
    program = (
        "import random, sys; random.seed(0); from qat_jax.data import load_source;"
        "print(len(load_source('digits', 'train', sys.argv[1])))"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    runs = [subprocess.Popen(command, **pipes) for _ in range(2)]
    for run in runs:
        output, errors = run.communicate(timeout=60)
        assert (run.returncode, output, errors) == (0, "1437\n", "")
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]  # nothing left lying about
