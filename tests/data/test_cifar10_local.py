import io
import re
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest

from qat_jax.data import DataError, load_source
from qat_jax.data.cifar10_local import find_files, main, prepare_cifar10_local, read_examples


def encoded(images):
    """The bytes of a lossless WebP strip of images, as they lie in the npz files."""
    buffer = io.BytesIO()
    PIL.Image.fromarray(images.reshape(-1, 32, 3)).save(buffer, "WEBP", lossless=True)
    return np.frombuffer(buffer.getvalue(), np.uint8)


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3)).astype(np.uint8)


@pytest.fixture
def labels():
    return np.array([3, 1, 4, 1, 5, 9, 2, 6, 0], np.uint8)


@pytest.fixture
def npz_folder(tmp_path, images, labels):
    """Two training files of 3 + 1 and 2 images, one test file of 3."""
    folder = tmp_path / "npz"
    folder.mkdir()

    def save(name, start, middle, end):
        strips = {"webp_00": encoded(images[start:middle])}
        if middle < end:
            strips["webp_01"] = encoded(images[middle:end])
        np.savez(folder / name, labels=labels[start:end], **strips)

    save("cifar10_train_00.npz", 0, 3, 4)
    save("cifar10_train_01.npz", 4, 6, 6)
    save("cifar10_test_some.npz", 6, 9, 9)
    return folder


@pytest.fixture
def binary_folder(tmp_path, images, labels):
    """The same examples in the official binary layout."""
    folder = tmp_path / "binary"
    folder.mkdir()
    planes = images.transpose(0, 3, 1, 2).reshape(9, -1)
    records = np.concatenate([labels[:, None], planes], axis=1)
    records[:4].tofile(folder / "data_batch_1.bin")
    records[4:6].tofile(folder / "data_batch_2.bin")
    records[6:].tofile(folder / "test_batch.bin")
    return folder


@pytest.mark.parametrize("layout", ["npz_folder", "binary_folder"])
def test_holds_the_files_examples_in_order(layout, request, tmp_path, images, labels):
    builder = prepare_cifar10_local(request.getfixturevalue(layout), tmp_path / "data")
    assert builder.info.features["label"].names[6] == "frog"
    seen = {}
    for split, count in {"train": 6, "test": 3}.items():
        source = load_source("cifar10_local", split, tmp_path / "data")
        assert len(source) == count
        seen |= {example["id"].decode(): example for example in source}
    names = [f"train_{i:05d}" for i in range(6)] + [f"test_{i:05d}" for i in range(3)]
    assert sorted(seen) == sorted(names)
    for name, image, label in zip(names, images, labels, strict=True):
        np.testing.assert_array_equal(seen[name]["image"], image)
        assert seen[name]["label"] == label


def test_the_one_command(npz_folder, tmp_path):
    command = [sys.executable, "-m", "qat_jax.data.cifar10_local", f"--source={npz_folder}"]
    command.append(f"--data_dir={tmp_path / 'data'}")
    first = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert "prepared in" in first.stdout
    assert "6 train, 3 test" in first.stdout
    assert first.stderr == ""
    again = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert "already prepared" in again.stdout


def test_a_missing_folder_is_named_and_nothing_written(tmp_path, capsys):
    with pytest.raises(SystemExit, match=r"^2$"):
        main(["--source=/nowhere", f"--data_dir={tmp_path / 'data'}"])
    assert "/nowhere does not exist: pass --source" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("removed", "split"), [("*_train_*", "train"), ("*_test_*", "test")])
def test_missing_files_are_named(npz_folder, removed, split):
    for path in npz_folder.glob(removed):
        path.unlink()
    with pytest.raises(DataError, match=rf"no {split} files in .*cifar10_{split}_\*\.npz"):
        find_files(npz_folder)


def cut_short(folder):
    path = folder / "cifar10_train_00.npz"
    path.write_bytes(path.read_bytes()[:200])


def forget_a_label(folder):
    path = folder / "cifar10_train_00.npz"
    with np.load(path) as contents:
        np.savez(path, **dict(contents, labels=contents["labels"][:-1]))


def hide_a_pickle(folder):
    path = folder / "cifar10_train_00.npz"
    with np.load(path) as contents:
        np.savez(path, **dict(contents, labels=np.array([{"code": 1}], object)))


@pytest.mark.parametrize("damage", [cut_short, forget_a_label, hide_a_pickle])
def test_a_damaged_file_is_named_and_nothing_written(npz_folder, tmp_path, capsys, damage):
    damage(npz_folder)
    with pytest.raises(SystemExit, match=r"^2$"):
        main([f"--source={npz_folder}", f"--data_dir={tmp_path / 'data'}"])
    said = capsys.readouterr().err
    assert re.search(r"^error: cannot read .*cifar10_train_00\.npz", said)
    assert said.count("\n") == 1
    assert list((tmp_path / "data").iterdir()) == []


def test_real_test_images(shared_data, cifar10_test):
    path = shared_data / "cifar10" / "cifar10_test_first1000_lossless.npz"
    images, labels = zip(*read_examples(path), strict=True)
    np.testing.assert_array_equal(images, cifar10_test[0])
    np.testing.assert_array_equal(labels, cifar10_test[1])
    assert np.bincount(labels).tolist() == [103, 89, 100, 103, 90, 86, 112, 102, 106, 109]
