import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from qat_jax.data import DataError, load_source, sources


class Checkerboard(tfds.core.GeneratorBasedBuilder):
    """A dataset that only its TFDS name tells of."""

    VERSION = tfds.core.Version("1.0.0")
    code_path = None

    def _info(self):
        image = tfds.features.Tensor(shape=(2, 2, 1), dtype=np.uint8)
        label = tfds.features.ClassLabel(num_classes=2)
        features = tfds.features.FeaturesDict({"image": image, "label": label})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(5):
            yield i, {"image": np.full((2, 2, 1), i, np.uint8), "label": i % 2}


def test_digits_need_no_preparation_and_no_existing_folder(tmp_path):
    assert len(load_source("digits", "test", tmp_path / "new" / "folder")) == 360


def test_the_variable_chooses_the_folder(digits_dir, monkeypatch):
    monkeypatch.setenv("QAT_JAX_DATA", str(digits_dir))
    assert len(load_source("digits", "train[:100]")) == 100


@pytest.mark.parametrize(
    ("split", "other", "shared"),
    [
        ("train", "train[1000:]", True),
        ("train[:1000]", "train[1000:]", False),
        ("train[:1001]", "train[1000:]", True),
        ("train[:90%]", "train[90%:]", False),
        ("train", "test", False),
        ("test+train[:10]", "train[5:20]", True),
    ],
)
def test_splits_that_have_examples_in_common(digits_dir, split, other, shared):
    opened = [load_source("digits", each, digits_dir) for each in (split, other)]
    assert sources.share_examples(*opened) is shared
    assert sources.share_examples(*opened[::-1]) is shared


def test_classes_are_counted_without_reading(digits_dir):
    assert sources.class_count(load_source("digits", "test", digits_dir)) == 10


def test_any_prepared_dataset_by_name(tmp_path):
    Checkerboard(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    source = load_source("checkerboard", "train", tmp_path)
    assert sorted(int(example["image"][0, 0, 0]) for example in source) == list(range(5))


def test_any_dataset_is_prepared_where_tensorflow_is(tmp_path, monkeypatch):
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda _: object())
    assert len(load_source("checkerboard", "train", tmp_path)) == 5
    assert [path.name for path in tmp_path.iterdir()] == ["checkerboard"]


def test_a_failing_download_names_the_mend_and_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("no route to host\nand much more")

    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda _: object())
    monkeypatch.setattr(Checkerboard, "_split_generators", fail)
    with pytest.raises(DataError, match=r"no route to host.*QAT_JAX_DATA.*cifar10_local") as caught:
        load_source("checkerboard", "train", tmp_path)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_format_without_random_access_names_the_mend(tmp_path):
    builder = Checkerboard(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    info = tmp_path / "checkerboard" / "1.0.0" / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(DataError, match=r"tfrecord.*file_format='array_record'"):
        load_source("checkerboard", "train", tmp_path)


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("cifar10_local", "train", "not prepared in .*QAT_JAX_DATA.*-m qat_jax.data.cifar10_local"),
        ("cifar10", "train", "not prepared in .*QAT_JAX_DATA.*cifar10_local"),
        ("no_such_set", "train", "no dataset named 'no_such_set'"),
        ("digits", "trian", "no split 'trian': choose one of train, test"),
        ("digits", "train[:10", r"no split 'train\[:10'"),
        ("digits", "train[:0]", "no examples"),
    ],
)
def test_errors_are_one_line_that_names_the_mend(name, split, message, digits_dir, monkeypatch):
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(DataError, match=message) as caught:
        load_source(name, split, digits_dir)
    assert "\n" not in str(caught.value)
    assert {path.name for path in digits_dir.iterdir()} == {"digits"}


def test_a_missing_data_folder_is_named_before_anything_is_written(tmp_path):
    with pytest.raises(DataError, match=r"data folder .*absent does not exist: pass --config"):
        load_source("cifar10", "train", tmp_path / "absent")
    assert list(tmp_path.iterdir()) == []


def test_training_imports_neither_tensorflow_nor_scikit_learn(digits_dir):
    program = (
        "import sys, qat_jax.data as data;"
        "batches = data.train_batches(data.load_source('digits', 'train', sys.argv[1]),"
        " batch_size=4, seed=0);"
        "next(batches); batches.close();"
        "sys.exit(any(name in sys.modules for name in ('tensorflow', 'sklearn')))"
    )
    subprocess.run([sys.executable, "-c", program, str(digits_dir)], check=True, timeout=60)
