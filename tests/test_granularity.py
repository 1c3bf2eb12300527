import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qat_jax as qj
from qat_jax import PerChannel, PerShard, PerTensor, PerVector
from tests.vsquant_reference import vectors


def largest(x, axes):
    return jnp.max(jnp.abs(x), axis=axes, keepdims=True)


@settings(max_examples=25)
@given(
    shape=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    size=st.sampled_from([1, 2, 3, 5, 256]),
    data=st.data(),
)
def test_vectors_of_any_axis(shape, size, data):
    axis = data.draw(st.integers(0, len(shape) - 1))
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    groups = PerVector(size).groups(x.ndim, None, axis)

    @jax.jit
    def reduced_and_expanded(x):
        found = groups.reduce(x, largest)
        return found, jnp.broadcast_to(groups.expand(found, x.shape), x.shape)

    found, expanded = reduced_and_expanded(x)
    cuts = vectors(shape[axis], size)
    expected = [np.abs(np.take(x, list(c), axis)).max(axis, keepdims=True) for c in cuts]
    np.testing.assert_array_equal(found, np.concatenate(expected, axis))
    assert found.shape == groups.compact_shape(x.shape)
    whose = np.repeat(np.arange(len(cuts)), [len(cut) for cut in cuts])
    np.testing.assert_array_equal(expanded, np.take(np.asarray(found), whose, axis))


def test_vectors_through_several_axes_are_read_in_order():
    kernel = jnp.arange(3 * 3 * 1 * 2.0).reshape(3, 3, 1, 2)
    groups = PerVector(4).groups(4, None, (0, 1))
    found = groups.reduce(kernel, largest)
    np.testing.assert_array_equal(found[:, 0, 0, 0], [6, 14, 16])
    assert found.shape == (3, 1, 1, 2)
    window = groups.expand(found, kernel.shape)[..., 0, 0]
    np.testing.assert_array_equal(window, [[6, 6, 6], [6, 14, 14], [14, 14, 16]])


def test_of_nothing_there_are_no_vectors():
    q = qj.quantize(jnp.zeros((3, 0)), qj.Quantizer(qj.Int(4), PerVector(4)), vector_axis=1)
    assert (q.codes.shape, q.scale.shape) == ((3, 0), (3, 0))


def test_the_reduction_sees_no_padding():
    seen = []

    def count(x, axes):
        seen.append(x.size)
        return jnp.min(x, axis=axes, keepdims=True)

    found = PerVector(16).groups(2, None, 1).reduce(jnp.ones((3, 20)), count)
    assert sum(seen) == 60
    np.testing.assert_array_equal(found, np.ones((3, 2)))


def test_other_granularities_do_not_cut():
    assert PerTensor().groups(3, 0, 1).compact_shape((2, 3, 4)) == (1, 1, 1)
    assert PerChannel().groups(3, -1, 1).compact_shape((2, 3, 4)) == (1, 1, 4)


def test_a_shard_is_quantised_like_a_tensor_of_its_own():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((8, 3, 5)), jnp.float32)
    x = x * jnp.arange(1.0, 9)[:, None, None]
    shards = qj.Quantizer(qj.Int(3), PerShard(4), qj.Octav(), "mad")
    tensor = dataclasses.replace(shards, granularity=PerTensor())
    assert shards.threshold(x).shape == (4, 1, 1)
    y = shards(x)
    np.testing.assert_allclose(
        y, jnp.concatenate([tensor(part) for part in jnp.split(x, 4)]), rtol=1e-6
    )
    np.testing.assert_array_equal(qj.fake_quant(x, shards, threshold=shards.threshold(x)), y)
    q = qj.quantize(x, shards)
    assert q.scale.shape == (4, 1, 1)
    np.testing.assert_array_equal(qj.dequantize(q), y)
    gradient = jax.grad(lambda x: shards(x).sum())(x)
    by_hand = [jax.grad(lambda x: tensor(x).sum())(part) for part in jnp.split(x, 4)]
    np.testing.assert_allclose(gradient, jnp.concatenate(by_hand), rtol=1e-6)
    with pytest.raises(ValueError, match="8 examples cannot be cut into 3 equal shards"):
        qj.fake_quant(x, dataclasses.replace(shards, granularity=PerShard(3)))
    with pytest.raises(ValueError, match="at least 1 shard, not 0"):
        PerShard(0)


@pytest.mark.parametrize("size", [0, 257, -1])
def test_impossible_vectors_are_refused(size):
    with pytest.raises(ValueError, match="1 to 256 elements"):
        PerVector(size)


def test_vectors_need_an_axis():
    with pytest.raises(ValueError, match="needs vector_axis"):
        PerVector(4).groups(2, 0, None)
    with pytest.raises(ValueError, match="adjacent axes"):
        PerVector(4).groups(3, None, (0, 2))


def test_axes_may_be_numpys():
    x = jnp.arange(6.0).reshape(2, 3)
    np.testing.assert_array_equal(qj.octav(x, qj.Int(4), np.int64(0)), qj.octav(x, qj.Int(4), 0))
