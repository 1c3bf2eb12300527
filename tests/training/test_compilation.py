"""Steps compiled ahead."""

import jax
import jax.numpy as jnp

from qat_jax.training.compilation import PerShape


def test_a_step_is_compiled_once_for_each_shape_and_says_when_it_takes_more():
    traced, said = [], []

    @jax.jit
    def step(state, batch):
        traced.append(batch["x"].shape)
        pairs = jnp.sin(batch["x"][:, None] * batch["x"])
        return state + 1, (pairs @ pairs).sum()

    compiled = PerShape(step, said.append)
    state = jnp.zeros(())
    for size in (64, 64, 256, 8, 64, 256):
        x = jnp.linspace(0.0, 1.0, size)
        state, value = compiled(state, {"x": x})
        pairs = jnp.sin(x[:, None] * x)
        assert jnp.allclose(value, (pairs @ pairs).sum(), rtol=1e-5)
    assert traced == [(64,), (256,), (8,)]
    assert state == 6
    assert len(said) == 2  # of 64 and of 256; a step of 8 takes less
    assert all(line.startswith("memory of a step on each device: ") for line in said)
