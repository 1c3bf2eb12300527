import jax
import jax.numpy as jnp
import numpy as np

import qat_jax as qj


def test_figures_by_hand():
    x = jnp.array([[1.0, -2.0, 0.0, 4.0], [0.0, 0.0, 0.0, 0.0]])
    quantizer = qj.Quantizer(qj.Int(3, narrow=True), qj.PerChannel(), qj.Fixed((3.0, 0.0)))
    y, found = qj.fake_quant_with_diagnostics(x, quantizer, channel_axis=0)
    np.testing.assert_array_equal(y, [[1, -2, 0, 3], [0, 0, 0, 0]])
    np.testing.assert_allclose(found.sqnr_db, 10 * np.log10(21 / 1), rtol=1e-6)
    assert found.clipped_fraction == 1 / 8
    assert found.threshold_over_max == 0.75


def test_zeros_are_represented_exactly_and_do_not_count():
    quantizer = qj.Quantizer(qj.Int(4, narrow=True), qj.PerChannel(), qj.AbsMax())
    _, found = qj.fake_quant_with_diagnostics(jnp.zeros((2, 3)), quantizer, channel_axis=0)
    assert found.sqnr_db == np.inf
    assert found.threshold_over_max == 0
    x = jnp.array([[2.0, 1.0], [0.0, 0.0]])  # the second channel is dead, its threshold is not
    _, found = qj.fake_quant_with_diagnostics(
        x, quantizer, channel_axis=0, threshold=jnp.array([[2.0], [5.0]])
    )
    assert found.threshold_over_max == 1


def test_unsigned_formats_count_negative_numbers_as_clipped():
    x = jnp.array([-1.0, 0.5, 1.0, 2.0])
    quantizer = qj.Quantizer(qj.Int(4, signed=False), clipping=qj.Fixed(1.0))
    _, found = qj.fake_quant_with_diagnostics(x, quantizer)
    assert found.clipped_fraction == 0.5
    assert found.threshold_over_max == 0.5


def test_six_decibels_a_bit():
    x = jax.random.uniform(jax.random.key(0), (100_000,), minval=-1)
    sqnr = [
        qj.fake_quant_with_diagnostics(x, qj.Quantizer(qj.Int(b), clipping=qj.AbsMax()))[1].sqnr_db
        for b in (6, 7, 8)
    ]
    np.testing.assert_allclose(np.diff(sqnr), [6.02, 6.02], atol=0.1)


def test_half_precision_arrays_and_gradients():
    x = jax.random.normal(jax.random.key(0), (100,)).astype(jnp.bfloat16)
    quantizer = qj.Quantizer(qj.Int(4))

    def loss(x):
        y, found = qj.fake_quant_with_diagnostics(x, quantizer)
        return jnp.sum(y) + found.sqnr_db, found

    gradient, found = jax.grad(loss, has_aux=True)(x)
    np.testing.assert_array_equal(gradient, jax.grad(lambda x: jnp.sum(quantizer(x)))(x))
    assert all(leaf.dtype == jnp.float32 for leaf in found)


def test_numbers_and_lists_serve_as_arrays():
    quantizer = qj.Quantizer(qj.Int(3, narrow=True))
    x = [-1.0, 0.1, 0.3, 0.9]
    y, found = qj.fake_quant_with_diagnostics(x, quantizer, threshold=0.75)
    np.testing.assert_array_equal(y, qj.fake_quant(x, quantizer, threshold=0.75))
    assert found.threshold_over_max == 0.75
    assert found.clipped_fraction == 0.5
