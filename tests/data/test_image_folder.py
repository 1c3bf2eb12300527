import pickle
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import PIL.Image
import pytest

from qat_jax.data import CentreCrop, DataError, ImageFolder, PreparedSource, eval_batches


def save(path, size=(9, 7), value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((size[1], size[0], 3), value, np.uint8)
    pixels[0, 0] = 255
    PIL.Image.fromarray(pixels).save(path)


@pytest.fixture
def flat(tmp_path):
    for label, value in ((3, 10), (12, 20), (7, 30)):
        save(tmp_path / "flat" / f"{label}_x_{value}.png", value=value)
    (tmp_path / "flat" / "notes.txt").write_text("not an image")
    return tmp_path / "flat"


def test_numbers_in_names_are_classes(flat):
    images = ImageFolder(flat)
    assert [(images[i]["label"], images[i]["image"][1, 1, 0]) for i in range(3)] == [
        (12, 20),
        (3, 10),
        (7, 30),
    ]


def test_a_zip_file_is_a_folder(flat, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for path in flat.iterdir():
            archive.write(path, path.name)
    images, same = ImageFolder(tmp_path / "a.zip"), ImageFolder(flat)
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda i: images[i % 3]["image"], range(60)))
    for i, image in enumerate(read):
        np.testing.assert_array_equal(image, same[i % 3]["image"])


def test_folders_are_classes_in_sorted_order(tmp_path):
    for name in ("n02", "n01"):
        save(tmp_path / name / "x.jpg")
    assert [image["label"] for image in ImageFolder(tmp_path)] == [0, 1]


def test_folders_named_by_numbers_are_those_classes(tmp_path):
    for name in ("9", "10", "007"):
        save(tmp_path / name / "x.png")
    images = ImageFolder(tmp_path)
    assert [image["label"] for image in images] == [7, 10, 9]


def labels(folder, classes=None):
    images = ImageFolder(folder, classes)
    return {images[i]["image"][1, 1, 0].item(): images[i]["label"] for i in range(len(images))}


def test_folders_count_before_numbers_in_names(tmp_path):
    save(tmp_path / "daisy" / "100080576_f52e8ee070_n.png", value=1)
    save(tmp_path / "rose" / "102501987_3cdb8e5394_n.png", value=2)
    assert labels(tmp_path) == {1: 0, 2: 1}
    # A folder by itself is just where images lie, unless it is known as a class.
    save(tmp_path / "all" / "9_x.png", value=3)
    assert ImageFolder(tmp_path / "rose").num_classes == 102501988
    assert ImageFolder(tmp_path / "all")[0]["label"] == 9


def test_classes_are_those_of_other_images_where_they_are_given(tmp_path):
    for name in ("daisy", "rose", "tulip"):
        save(tmp_path / "train" / name / "x.png")
    for value, name in enumerate(("rose", "tulip")):
        save(tmp_path / "test" / name / f"{value}_x.png", value=value)
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w") as archive:
            archive.write(tmp_path / "test" / name / f"{value}_x.png", f"test/{name}/{value}_x.png")
    train = ImageFolder(tmp_path / "train")
    assert train.class_names == ("daisy", "rose", "tulip")
    assert labels(tmp_path / "test", train.class_names) == {0: 1, 1: 2}
    assert ImageFolder(tmp_path / "test", train.class_names).num_classes == 3
    assert labels(tmp_path / "tulip.zip", train.class_names) == {1: 2}
    save(tmp_path / "test" / "dandelion" / "x.png")
    with pytest.raises(DataError, match="a folder dandelion, which is no class of the training"):
        ImageFolder(tmp_path / "test", train.class_names)


@pytest.mark.parametrize("zipped", [False, True])
def test_it_may_be_pickled(flat, tmp_path, zipped):
    if zipped:
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
            archive.write(flat / "3_x_10.png", "3_x_10.png")
    images = ImageFolder(tmp_path / "a.zip" if zipped else flat)
    copy = pickle.loads(pickle.dumps(images))
    np.testing.assert_array_equal(copy[0]["image"], images[0]["image"])


def test_a_zip_file_is_opened_once(tmp_path, monkeypatch):
    """Opening reads the whole list of names: done for each image it takes hours for ImageNet."""
    save(tmp_path / "0_.png")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(tmp_path / "0_.png", "0_.png")
    images = ImageFolder(tmp_path / "a.zip")
    monkeypatch.setattr(zipfile, "ZipFile", None)
    assert images[0]["image"].shape == (7, 9, 3)


def test_images_keep_their_size(tmp_path):
    pixels = np.arange(7 * 9 * 3).reshape(7, 9, 3).astype(np.uint8)
    PIL.Image.fromarray(pixels).save(tmp_path / "0_.png")
    np.testing.assert_array_equal(ImageFolder(tmp_path)[0]["image"], pixels)


def test_grey_images_become_coloured(tmp_path):
    PIL.Image.fromarray(np.full((4, 5), 9, np.uint8)).save(tmp_path / "0_.png")
    assert ImageFolder(tmp_path)[0]["image"].tolist() == [[[9] * 3] * 5] * 4


def test_it_feeds_the_evaluation_pipeline(flat):
    source = PreparedSource(ImageFolder(flat), CentreCrop(4))
    batch = next(iter(eval_batches(source, batch_size=2)))
    assert batch["image"].shape == (2, 4, 4, 3)
    assert batch["image"].dtype == np.uint8


def test_what_is_wrong_is_named(flat, tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        ImageFolder(tmp_path / "none")
    (flat / "9_broken.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"cannot read 9_broken\.png"):
        ImageFolder(flat)[3]
    save(flat / "nameless.png")
    with pytest.raises(DataError, match=r"nameless\.png in .* says no class"):
        ImageFolder(flat)
    save(tmp_path / "mixed" / "n01" / "x.png")
    save(tmp_path / "mixed" / "stray.png")
    with pytest.raises(DataError, match=r"stray\.png in .* says no class"):
        ImageFolder(tmp_path / "mixed")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="has no images"):
        ImageFolder(tmp_path / "empty")
    (tmp_path / "torn.zip").write_bytes(b"PK")
    with pytest.raises(DataError, match="not a zip file"):
        ImageFolder(tmp_path / "torn.zip")


def test_damage_inside_is_named(flat, tmp_path):
    name = "3_x_10.png"
    raw = (flat / name).read_bytes()
    at = raw.index(b"IDAT")
    short = raw[: at - 4] + (4).to_bytes(4, "big") + raw[at:]
    (flat / name).write_bytes(short)  # what Pillow calls a SyntaxError
    with pytest.raises(DataError, match=r"cannot read 3_x_10\.png .*: get a fresh copy"):
        ImageFolder(flat)[1]
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, raw)
        start = archive.infolist()[0].header_offset + 30 + len(name)
    packed = bytearray((tmp_path / "a.zip").read_bytes())
    packed[start] = 0xFF
    (tmp_path / "a.zip").write_bytes(packed)
    with pytest.raises(DataError, match=r"cannot read 3_x_10\.png .*: get a fresh copy"):
        ImageFolder(tmp_path / "a.zip")[0]
