import pickle
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import PIL.Image
import pytest

from qat_jax.data import DataError, ImageFolder, eval_batches


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
    images = ImageFolder(flat, size=5)
    assert [(images[i]["label"], images[i]["image"][1, 1, 0]) for i in range(3)] == [
        (12, 20),
        (3, 10),
        (7, 30),
    ]


def test_a_zip_file_is_a_folder(flat, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for path in flat.iterdir():
            archive.write(path, path.name)
    images, same = ImageFolder(tmp_path / "a.zip", size=5), ImageFolder(flat, size=5)
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda i: images[i % 3]["image"], range(60)))
    for i, image in enumerate(read):
        np.testing.assert_array_equal(image, same[i % 3]["image"])


def test_folders_are_classes_in_sorted_order(tmp_path):
    for name in ("n02", "n01"):
        save(tmp_path / name / "x.jpg")
    assert [image["label"] for image in ImageFolder(tmp_path, size=2)] == [0, 1]


def test_folders_named_by_numbers_are_those_classes(tmp_path):
    for name in ("9", "10", "007"):
        save(tmp_path / name / "x.png")
    images = ImageFolder(tmp_path, size=2)
    assert [image["label"] for image in images] == [7, 10, 9]


@pytest.mark.parametrize("zipped", [False, True])
def test_it_may_be_pickled(flat, tmp_path, zipped):
    if zipped:
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
            archive.write(flat / "3_x_10.png", "3_x_10.png")
    images = ImageFolder(tmp_path / "a.zip" if zipped else flat, size=5)
    copy = pickle.loads(pickle.dumps(images))
    np.testing.assert_array_equal(copy[0]["image"], images[0]["image"])


def test_a_zip_file_is_opened_once(tmp_path, monkeypatch):
    """Opening reads the whole list of names: done for each image it takes hours for ImageNet."""
    save(tmp_path / "0_.png")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(tmp_path / "0_.png", "0_.png")
    images = ImageFolder(tmp_path / "a.zip", size=5)
    monkeypatch.setattr(zipfile, "ZipFile", None)
    assert images[0]["image"].shape == (5, 5, 3)


def test_the_crop_is_the_centre(tmp_path):
    pixels = np.arange(7 * 9).reshape(7, 9, 1).repeat(3, 2).astype(np.uint8)
    PIL.Image.fromarray(pixels).save(tmp_path / "0_.png")
    image = ImageFolder(tmp_path, size=4)[0]["image"]
    np.testing.assert_array_equal(image, pixels[1:5, 2:6])


def test_the_shorter_side_is_resized(tmp_path):
    save(tmp_path / "0_.png", size=(40, 20))
    assert ImageFolder(tmp_path, size=10, resize=10)[0]["image"].shape == (10, 10, 3)


def test_an_image_smaller_than_the_crop_is_enlarged(flat):
    image = ImageFolder(flat, size=14)[0]["image"]
    assert image.shape == (14, 14, 3)
    assert image[7, 7, 0] == 20


def test_an_odd_margin_is_halved_as_tensorflow_does(shared_data):
    path = shared_data / "imagenet" / "ilsvrc2012_val_subset1000_227.zip"
    if not path.is_file():
        pytest.skip(f"no ImageNet images at {path}")
    whole, cropped = (ImageFolder(path, size=size) for size in (227, 224))
    assert len(whole) == 1000
    np.testing.assert_array_equal(cropped[5]["image"], whole[5]["image"][1:225, 1:225])
    assert cropped[5]["label"] == 5


def test_it_feeds_the_evaluation_pipeline(flat):
    batch = next(iter(eval_batches(ImageFolder(flat, size=4), batch_size=2)))
    assert batch["image"].shape == (2, 4, 4, 3)
    assert batch["image"].dtype == np.uint8


def test_what_is_wrong_is_named(flat, tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        ImageFolder(tmp_path / "none", size=4)
    (flat / "9_broken.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"cannot read 9_broken\.png"):
        ImageFolder(flat, size=4)[3]
    save(flat / "nameless.png")
    with pytest.raises(DataError, match=r"nameless\.png in .* says no class"):
        ImageFolder(flat, size=4)
    save(tmp_path / "mixed" / "n01" / "x.png")
    save(tmp_path / "mixed" / "stray.png")
    with pytest.raises(DataError, match=r"stray\.png in .* says no class"):
        ImageFolder(tmp_path / "mixed", size=4)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="has no images"):
        ImageFolder(tmp_path / "empty", size=4)
    (tmp_path / "torn.zip").write_bytes(b"PK")
    with pytest.raises(DataError, match="not a zip file"):
        ImageFolder(tmp_path / "torn.zip", size=4)
    with pytest.raises(ValueError, match="size is 0: choose"):
        ImageFolder(flat, size=0)


def test_damage_inside_is_named(flat, tmp_path):
    name = "3_x_10.png"
    raw = (flat / name).read_bytes()
    at = raw.index(b"IDAT")
    short = raw[: at - 4] + (4).to_bytes(4, "big") + raw[at:]
    (flat / name).write_bytes(short)  # what Pillow calls a SyntaxError
    with pytest.raises(DataError, match=r"cannot read 3_x_10\.png .*: get a fresh copy"):
        ImageFolder(flat, size=4)[1]
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, raw)
        start = archive.infolist()[0].header_offset + 30 + len(name)
    packed = bytearray((tmp_path / "a.zip").read_bytes())
    packed[start] = 0xFF
    (tmp_path / "a.zip").write_bytes(packed)
    with pytest.raises(DataError, match=r"cannot read 3_x_10\.png .*: get a fresh copy"):
        ImageFolder(tmp_path / "a.zip", size=4)[0]
