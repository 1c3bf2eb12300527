"""Other libraries' searches find what ours find: else the benchmark compares nothing."""

import jax.numpy as jnp
import numpy as np
import pytest

import qat_jax as qj
from benchmarks import peers

pytest.importorskip("brevitas")
pytest.importorskip("modelopt")


@pytest.mark.parametrize("bits", [4, 8])
def test_other_libraries_thresholds_are_almost_optimal(bits):
    x = np.random.default_rng(0).standard_normal((512, 8), np.float32)
    found = peers.searches(x, bits)
    assert len(found) == (4 if bits == 4 else 5)
    for (granularity, name), search in found.items():
        where = qj.PerTensor() if granularity == "tensor" else qj.PerChannel()
        exact = qj.Quantizer(qj.Int(bits, narrow=True), where, qj.Exact())

        def error(threshold, exact=exact):
            y = qj.fake_quant(jnp.asarray(x), exact, channel_axis=1, threshold=threshold)
            return float(jnp.mean((x - y) ** 2))

        best = error(exact.threshold(jnp.asarray(x), 1))
        # ModelOpt tries multiples of the maximum that lie a tenth of it apart.
        assert best * 0.99 < error(jnp.asarray(search())) < best * 1.2, name
