"""Initial kernels."""

import jax
import numpy as np
import pytest
from flax import nnx

from qat_jax.models import CifarResNet
from qat_jax.models.initializers import he_normal, he_normal_fan_out, lecun_normal

SHAPES = [(3, 3, 5, 7), (1, 1, 8, 3), (3, 3, 1, 6), (2, 5, 5, 3, 4), (6, 4), (3, 3, 70, 128)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("drawn", "plain"),
    [
        (lecun_normal, nnx.initializers.lecun_normal()),
        (he_normal, nnx.initializers.he_normal()),
        (he_normal_fan_out, nnx.initializers.variance_scaling(2.0, "fan_out", "normal")),
    ],
)
def test_they_are_flax_s_but_for_rounding(shape, drawn, plain):
    key = jax.random.key(3)
    found = drawn(key, shape, np.float32)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, plain(key, shape, np.float32), rtol=3e-7)


def test_a_network_s_kernels_have_the_deviation_of_he_et_al():
    model = CifarResNet(8, width=32, rngs=nnx.Rngs(0))
    kernel = model.layer3[0].conv2.kernel.get_value()
    assert kernel.shape == (3, 3, 128, 128)
    assert np.std(kernel) == pytest.approx(np.sqrt(2 / (9 * 128)), rel=0.01)
