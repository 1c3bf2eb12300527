"""The quantisers inside JAX's transformations."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.collectives import Traffic, traffic
from qat_jax import (
    AbsMax,
    Int,
    Octav,
    PerChannel,
    PerShard,
    PerTensor,
    PerVector,
    Quantizer,
    fake_quant,
    octav,
)

QUANTIZERS = [
    Quantizer(Int(4, signed=None), PerTensor(), Octav(), "mad"),
    Quantizer(Int(4), PerChannel(), Octav(), "pwl"),
    Quantizer(Int(4, narrow=True), PerTensor(), AbsMax(), "ste"),
]
X = jax.random.normal(jax.random.key(0), (4, 6, 5))


def loss(x, quantizer):
    y = fake_quant(x, quantizer, channel_axis=-1)
    return jnp.sum(jnp.sin(y.astype(jnp.float32)) * 3)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_jit_grad_vmap_scan_remat(quantizer, dtype):
    x = X.astype(dtype)
    expected = [jax.value_and_grad(loss)(row, quantizer) for row in x]
    values = np.array([value for value, _ in expected], np.float32)
    gradients = np.array([gradient.astype(jnp.float32) for _, gradient in expected])
    tolerance = {"rtol": 1e-5 if dtype == jnp.float32 else 2e-2, "atol": 1e-6}

    def one(x):
        return jax.value_and_grad(jax.remat(loss, static_argnums=1))(x, quantizer)

    for found in (
        jax.jit(jax.vmap(one))(x),
        jax.lax.scan(lambda carry, row: (carry, one(row)), 0, x)[1],
        jax.vmap(jax.jit(one))(x),
    ):
        np.testing.assert_allclose(found[0].astype(jnp.float32), values, **tolerance)
        np.testing.assert_allclose(found[1].astype(jnp.float32), gradients, **tolerance)


def test_vmapped_thresholds_are_those_of_single_examples():
    s = jax.vmap(lambda x: octav(x, Int(4)))(X)
    for row, expected in zip(s, X, strict=True):
        np.testing.assert_allclose(row, octav(expected, Int(4)), rtol=1e-6)


def on_eight_devices():
    """Run in a process of its own: the number of devices is fixed when JAX starts."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    x = jax.random.normal(jax.random.key(0), (64, 33, 16))
    sharded = jax.device_put(x, NamedSharding(mesh, P("data")))
    for quantizer in QUANTIZERS:
        # Under jit a sharded array has the thresholds of the whole.
        step = jax.jit(jax.value_and_grad(loss), static_argnums=1)
        value, gradient = step(sharded, quantizer)
        expected, expected_gradient = step(x, quantizer)
        np.testing.assert_allclose(value, expected, rtol=1e-4)
        np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-4, atol=1e-5)
        assert gradient.sharding.is_equivalent_to(sharded.sharding, 3)

        # Inside shard_map every shard is an array of its own.
        mapped = jax.shard_map(
            lambda x, q=quantizer: fake_quant(x, q, channel_axis=-1),
            mesh=mesh,
            in_specs=P("data"),
            out_specs=P("data"),
        )
        parts = jnp.split(x, 8)
        by_hand = [fake_quant(part, quantizer, channel_axis=-1) for part in parts]
        np.testing.assert_allclose(mapped(sharded), jnp.concatenate(by_hand), rtol=1e-4, atol=1e-5)
        gradient = jax.jit(jax.grad(lambda x, m=mapped: jnp.sum(jnp.sin(m(x)) * 3)))(sharded)
        by_hand = [jax.grad(loss)(part, quantizer) for part in parts]
        np.testing.assert_allclose(gradient, jnp.concatenate(by_hand), rtol=1e-4, atol=1e-5)

    # Split along another axis, as by tensor parallelism.
    for spec in (P(None, "data"), P(None, None, "data")):
        y = jax.random.normal(jax.random.key(1), (4, 16, 24))
        other = jax.device_put(y, NamedSharding(mesh, spec))
        for quantizer in QUANTIZERS:
            step = jax.jit(jax.grad(loss), static_argnums=1)
            np.testing.assert_allclose(step(other, quantizer), step(y, quantizer), rtol=1e-4)

    # A learned threshold has the sum of what the shards say.
    def learned(x, s):
        return fake_quant(x, QUANTIZERS[0], threshold=s, learned=True)

    def of_shards(s):
        return jax.shard_map(learned, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"))(
            sharded, s
        ).sum()

    s = jnp.full((1, 1, 1), 1.5)
    expected = jax.grad(lambda s: learned(x, s).sum())(s)
    np.testing.assert_allclose(jax.jit(jax.grad(of_shards))(s), expected, rtol=1e-4)

    # PerShard is for meshes of explicit axes too, which are the default of jax.make_mesh.
    explicit = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(explicit):
        shards = Quantizer(Int(4), PerShard(8), AbsMax())
        placed = jax.device_put(x, NamedSharding(explicit, P("data")))
        np.testing.assert_allclose(jax.jit(shards)(placed), shards(x), rtol=1e-6)

    # The search must not gather the array: one sum and two counts travel, together, in each of the
    # Newton steps and in the one that finds the mean.
    program = jax.jit(lambda x: octav(x, Int(4))).lower(sharded).compile().as_text()
    assert traffic(program) == Traffic(collectives=11, bytes=11 * 3 * 4)

    # Nor does the sample of a large one; over the whole, one iteration is enough here.
    x = jax.random.normal(jax.random.key(0), (64, 33, 128))
    large = jax.device_put(x, NamedSharding(mesh, P("data")))
    search = jax.jit(lambda x: octav(x, Int(4))).lower(large).compile()
    assert traffic(search.as_text(), unknown_trips=1) == Traffic(12, bytes=12 * 3 * 4)
    np.testing.assert_allclose(search(large), octav(x, Int(4)), rtol=1e-6)

    # Vectors are turned where they are, few of them and many.
    for shape in ((64, 48), (128, 32, 32, 16)):
        x = jax.random.normal(jax.random.key(0), shape)
        placed = jax.device_put(x, NamedSharding(mesh, P("data")))
        vectors = Quantizer(Int(4), PerVector(16), Octav())
        found = jax.jit(lambda x, q=vectors: q.threshold(x, 1, -1)).lower(placed).compile()
        assert traffic(found.as_text()) == Traffic(0, 0)
        np.testing.assert_allclose(found(placed), vectors.threshold(x, 1, -1), rtol=1e-6)

    # With a threshold for each shard nothing travels at all.
    local = Quantizer(Int(4), PerShard(8), Octav())
    program = jax.jit(local).lower(sharded).compile().as_text()
    assert traffic(program) == Traffic(0, 0)
    np.testing.assert_allclose(jax.jit(local)(sharded), local(jax.device_get(sharded)), rtol=1e-6)


def test_sharded_arrays():
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    environment = os.environ | {"XLA_FLAGS": flags}
    code = "from tests.test_transforms import on_eight_devices; on_eight_devices()"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
