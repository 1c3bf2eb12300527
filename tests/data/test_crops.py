import math

import numpy as np
import PIL.Image
import pytest

from qat_jax.data import CentreCrop, ImageFolder, RandomResizedCrop


def resized(image, height, width):
    """Bilinear with antialiasing, written down in float64: a triangle as wide as the ratio."""

    def matrix(before, after):
        ratio = before / after
        reach = max(ratio, 1.0)
        centres = (np.arange(after) + 0.5) * ratio
        distance = np.abs(np.arange(before) + 0.5 - centres[:, None]) / reach
        weights = np.maximum(1 - distance, 0)
        return weights / weights.sum(1, keepdims=True)

    rows, columns = matrix(image.shape[0], height), matrix(image.shape[1], width)
    return np.einsum("ih,hwc,jw->ijc", rows, image.astype(float), columns)


def noise(height, width, channels=3, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, channels), dtype=np.uint8)


def torchvision_box(height, width, resize, size):
    """Sides after Resize(resize) and the corner of CenterCrop(size), as its documentation says."""
    short, long = min(height, width), max(height, width)
    sides = {short: resize, long: int(resize * long / short)}
    height, width = sides[height], sides[width]
    return height, width, round((height - size) / 2.0), round((width - size) / 2.0)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("height", "width", "resize", "size"),
    [(50, 37, 32, 28), (37, 50, 32, 27), (40, 40, 16, 16), (20, 33, 32, 28), (32, 45, 32, 28)],
)
def test_centre_crop_is_that_of_torchvision(height, width, resize, size, channels):
    image = noise(height, width, channels)
    new_height, new_width, top, left = torchvision_box(height, width, resize, size)
    expected = resized(image, new_height, new_width)[top : top + size, left : left + size]
    found = CentreCrop(size, resize)(image)
    assert (found.shape, found.dtype) == ((size, size, channels), np.uint8)
    # Each of the two passes rounds to whole numbers.
    assert np.abs(found - expected).max() <= 1.01


def test_without_resizing_the_middle_is_left_as_it_is():
    image = noise(7, 9)
    np.testing.assert_array_equal(CentreCrop(4)(image), image[2:6, 2:6])
    np.testing.assert_array_equal(CentreCrop(4, tensorflow=True)(image), image[1:5, 2:6])


def test_the_longer_side_is_rounded():
    image = noise(20, 31)  # 31 * 11 / 20 = 17.05; 31 * 13 / 20 = 20.15; 31 * 9 / 20 = 13.95
    down, nearest = (CentreCrop(9, 9, tensorflow=tensorflow)(image) for tensorflow in (False, True))
    np.testing.assert_allclose(down, resized(image, 9, 13)[:, 2:11], atol=1.01)
    np.testing.assert_allclose(nearest, resized(image, 9, 14)[:, 2:11], atol=1.01)


def test_an_image_smaller_than_the_crop_is_enlarged():
    image = noise(7, 9)
    found = CentreCrop(14)(image)
    np.testing.assert_allclose(found, resized(image, 14, 18)[:, 2:16], atol=1.01)


def test_photographs_keep_their_middle(shared_data):
    path = shared_data / "imagenet" / "ilsvrc2012_val_subset1000_227.zip"
    if not path.is_file():
        pytest.skip(f"no ImageNet images at {path}")
    images = ImageFolder(path)
    assert len(images) == 1000
    image, label = images[5]["image"], images[5]["label"]
    assert (image.shape, label) == ((227, 227, 3), 5)
    np.testing.assert_array_equal(CentreCrop(224, tensorflow=True)(image), image[1:225, 1:225])
    np.testing.assert_array_equal(CentreCrop(224)(image), image[2:226, 2:226])


@pytest.mark.parametrize("options", [dict(size=0), dict(size=4, resize=-1)])
def test_impossible_lengths_are_refused(options):
    with pytest.raises(ValueError, match="choose at least 1 pixel"):
        CentreCrop(**options)


def test_random_windows_have_the_shares_and_shapes_asked_for():
    crop = RandomResizedCrop(8)
    rng = np.random.default_rng(0)
    windows = np.array([crop.window(300, 400, rng) for _ in range(2000)])
    top, left, height, width = windows.T
    assert (top >= 0).all()
    assert (top + height <= 300).all()
    assert (left + width <= 400).all()
    share, aspect = height * width / (300 * 400), width / height
    assert 0.079 < share.min() < 0.09
    assert 0.9 < share.max() <= 1
    assert 0.74 < aspect.min() < 0.77
    assert 1.30 < aspect.max() < 1.35
    # The logarithm of the shape is drawn evenly: its median is that of a square.
    small = share < 0.4  # which always fit in
    assert abs(np.median(np.log(aspect[small]))) < 0.03
    # Shares are drawn evenly, and small ones always fit in.
    assert np.mean(share[small] < 0.24) == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize(
    ("height", "width", "window"),
    [(100, 1000, (0, 433, 100, 133)), (1000, 100, (433, 0, 133, 100)), (10, 10, (0, 0, 10, 10))],
)
def test_where_no_window_fits_it_is_the_largest_in_the_middle(height, width, window):
    crop = RandomResizedCrop(8, area=(40.0, 50.0))
    assert crop.window(height, width, np.random.default_rng(0)) == window


def test_a_random_crop_is_its_window_resized_and_maybe_mirrored():
    image = noise(40, 60)
    crop = RandomResizedCrop(16)
    mirrored = 0
    for seed in range(40):
        top, left, height, width = crop.window(40, 60, np.random.default_rng(seed))
        expected = resized(image[top : top + height, left : left + width], 16, 16)
        found = crop(image, np.random.default_rng(seed))
        assert (found.shape, found.dtype) == ((16, 16, 3), np.uint8)
        same, turned = (np.abs(found - x).max() for x in (expected, expected[:, ::-1]))
        assert min(same, turned) <= 1.01
        mirrored += turned < same
    assert 8 < mirrored < 32
    unmirrored = RandomResizedCrop(16, flip=False)(image, np.random.default_rng(0))
    assert (
        min(
            np.abs(unmirrored - crop(image, np.random.default_rng(0))).max(),
            np.abs(unmirrored[:, ::-1] - crop(image, np.random.default_rng(0))).max(),
        )
        == 0
    )


def test_the_reference_resize_is_that_of_pillow_in_floating_point():
    plane = noise(31, 23, 1)[..., 0].astype(np.float32)
    picture = PIL.Image.fromarray(plane).resize((11, 40), PIL.Image.Resampling.BILINEAR)
    np.testing.assert_allclose(
        np.asarray(picture), resized(plane[..., None], 40, 11)[..., 0], rtol=1e-4
    )
    assert math.isclose(plane.mean(), np.asarray(picture).mean(), rel_tol=0.02)
