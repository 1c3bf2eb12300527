import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qat_jax as qj
from qat_jax.integer import pack, unpack
from qat_jax.storage import array_storage

QUANTIZERS = {
    "octav-w3a3": qj.preset("octav-w3a3").rules[-1].weights,
    "auto": qj.Quantizer(qj.Int(8, signed=None), qj.PerChannel()),
    "4/6": qj.preset("vsquant-4/4U/4/6").rules[-1].weights,
    "3/10": qj.Quantizer(
        qj.Int(3, narrow=True), qj.PerVector(16), qj.AbsMax(), scale=qj.IntScale(10)
    ),
    "fp16": qj.preset("vsquant-4/4U/fp16/fp16").rules[-1].weights,
    "nvfp4": qj.preset("nvfp4").rules[-1].weights,
    "mxfp4": qj.preset("mxfp4").rules[-1].weights,
    "mxfp6": qj.Quantizer(qj.Float(3, 2), qj.PerVector(32), qj.AbsMax(), scale=qj.E8M0()),
    "mxint8": qj.preset("mxint8").rules[-1].weights,
}


@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize("size", [5, 32, 35])
@pytest.mark.parametrize("positive", [True, False])
def test_packing_loses_nothing_and_takes_the_bits_that_are_reported(name, size, positive):
    quantizer = QUANTIZERS[name]
    x = jax.random.normal(jax.random.key(size), (2, size, 3))
    q = qj.quantize(jnp.abs(x) if positive else x, quantizer, channel_axis=2, vector_axis=1)
    packed = pack(q, quantizer)
    back = unpack(packed)
    for found, expected in ((back.codes, q.codes), map(jax.jit(qj.dequantize), (back, q))):
        np.testing.assert_array_equal(*(np.asarray(y, np.float32) for y in (found, expected)))
    spare = 2  # bytes at the end of codes and scales
    assert 0 <= packed.nbytes - array_storage(q, quantizer).bytes <= spare


def test_a_group_that_is_not_finite_stays_so():
    quantizer = QUANTIZERS["4/6"]
    x = jnp.ones((1, 32, 2)).at[0, 3, 1].set(jnp.nan)
    q = qj.quantize(x, quantizer, channel_axis=2, vector_axis=1)
    values = qj.dequantize(unpack(pack(q, quantizer)))
    assert jnp.isnan(values[..., 1]).all()
    assert jnp.isfinite(values[..., 0]).all()
