import numpy as np
import pytest

from qat_jax.data import load_source


@pytest.fixture(scope="session")
def digits_dir(tmp_path_factory):
    """A data folder with the digits in it."""
    folder = tmp_path_factory.mktemp("data")
    load_source("digits", "train", folder)
    return folder


@pytest.fixture
def numbered():
    """37 examples whose label is their index and whose pixels tell it too."""
    rng = np.random.default_rng(0)
    return [
        {"image": rng.integers(1, 256, (8, 8, 3)).astype(np.uint8), "label": i} for i in range(37)
    ]
