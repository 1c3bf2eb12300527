"""Which images a config means, and what their labels are."""

import threading

import numpy as np
import PIL.Image
import pytest

from configs import imagenet_mobilenet_v1_ptq
from experiments import build, tasks
from qat_jax.data import DataError

FLOWERS = ("daisy", "rose", "tulip")


def put(folder, *names):
    for name in names:
        (folder / name).mkdir(parents=True)
        PIL.Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(folder / name / "x.png")


def task(folder, **splits):
    config = imagenet_mobilenet_v1_ptq.get_config()
    config.dataset.update(data_dir=str(folder), size=4, **splits)
    config.model.num_classes = 3
    with config.unlocked():
        config.dataset.validation_split = None
        config.dataset.num_threads = 3
    return build.task(config)


def test_the_training_images_say_which_folder_is_which_class(tmp_path):
    put(tmp_path / "train", *FLOWERS)
    put(tmp_path / "test", *FLOWERS[1:])
    chosen = task(tmp_path, train_split="train", test_split="test")
    assert [example["label"] for example in chosen.test_source()] == [1, 2]
    put(tmp_path / "test", "dandelion")
    with pytest.raises(DataError, match="a folder dandelion, which is no class"):
        chosen.test_source()


def test_folders_of_some_classes_are_not_counted_from_0(tmp_path):
    put(tmp_path / "test", *FLOWERS[1:])
    with pytest.raises(ValueError, match="which of 3 classes the 2 folders of test are"):
        task(tmp_path, test_split="test").test_source()
    put(tmp_path / "test", FLOWERS[0])
    assert len(task(tmp_path, test_split="test").test_source()) == 3


def test_the_network_knows_every_class(tmp_path):
    put(tmp_path / "test", "2", "3")
    with pytest.raises(ValueError, match=r"model\.num_classes=4"):
        task(tmp_path, test_split="test").test_source()


def test_a_folder_is_not_held_out_of_itself(tmp_path):
    put(tmp_path / "train", *FLOWERS)
    put(tmp_path / "test", *FLOWERS)
    chosen = task(tmp_path, train_split="train", test_split="test")
    for held_out in ("train", "train/../train", "."):
        chosen.config.dataset.validation_split = held_out
        with pytest.raises(ValueError, match="would not be held out"):
            chosen.validation_source()
    chosen.config.dataset.validation_split = "test"
    assert len(chosen.validation_source()) == 3


def test_a_set_without_images_is_refused():
    config = imagenet_mobilenet_v1_ptq.get_config()
    chosen = build.task(config)
    object.__setattr__(chosen, "_examples", lambda split: [{"question": "what?"}])
    with pytest.raises(ValueError, match="no set of images with labels, it has no image"):
        chosen.test_source()


def test_evaluation_reads_with_as_many_threads_as_training(tmp_path):
    put(tmp_path / "test", *FLOWERS)
    chosen = task(tmp_path, test_split="test")
    together = threading.Barrier(3, timeout=20)

    class Source:
        def __len__(self):
            return 3

        def __getitem__(self, index):
            together.wait()  # each of three readers waits for the others
            return {"image": np.zeros((4, 4, 3), np.uint8), "label": index}

    assert len(list(tasks.eval_batches(chosen, Source(), 1))) == 3
