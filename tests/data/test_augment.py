import numpy as np
import pytest

from qat_jax.data.augment import random_crop_flip


def every_outcome(image, padding, flip):
    """All crops of the padded image, by the definition, pixel by pixel."""
    height, width, _ = image.shape
    outcomes = set()
    for top in range(2 * padding + 1):
        for left in range(2 * padding + 1):
            crop = np.zeros_like(image)
            for y in range(height):
                for x in range(width):
                    from_y, from_x = y + top - padding, x + left - padding
                    if 0 <= from_y < height and 0 <= from_x < width:
                        crop[y, x] = image[from_y, from_x]
            outcomes.add(crop.tobytes())
            if flip:
                outcomes.add(crop[:, ::-1].tobytes())
    return outcomes


@pytest.mark.parametrize(("padding", "flip"), [(0, False), (0, True), (1, True), (2, False)])
def test_draws_exactly_the_crops_there_are(padding, flip):
    image = np.arange(1, 4 * 5 * 3 + 1, dtype=np.uint8).reshape(4, 5, 3)
    rng = np.random.default_rng(0)
    drawn = [random_crop_flip(image, rng, padding, flip) for _ in range(500)]
    assert {crop.tobytes() for crop in drawn} == every_outcome(image, padding, flip)
    assert all(crop.shape == image.shape and crop.dtype == np.uint8 for crop in drawn)
    assert all(crop.flags.c_contiguous for crop in drawn)


def test_flips_half_the_time():
    image = np.arange(4, dtype=np.uint8).reshape(1, 4, 1)
    rng = np.random.default_rng(1)
    flips = sum(random_crop_flip(image, rng, padding=0)[0, 0, 0] == 3 for _ in range(1000))
    assert 430 < flips < 570  # more than four standard deviations either way


def test_leaves_the_original_alone():
    image = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    kept = image.copy()
    random_crop_flip(image, np.random.default_rng(0), padding=0, flip=False)[:] = 0
    np.testing.assert_array_equal(image, kept)
