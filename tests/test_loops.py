"""Loops that XLA compiles step by step: what they compute, and what becomes of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from qat_jax import Int
from qat_jax.clipping import Octav, Percentile
from qat_jax.clipping.loops import repeat, while_loop


@pytest.mark.parametrize("count", [0, 1, 7])
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_repeat_is_fori_loop(count, wrap):
    def step(i, state):
        return state[0] * 3 + i, state[1] + state[0]

    start = jnp.int32(2), jnp.arange(3)
    found = wrap(lambda state: repeat(count, step, state))(start)
    expected = lax.fori_loop(0, count, step, start)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype


def test_a_loop_ends_when_nothing_is_unfinished():
    found = while_loop(lambda i, x: (x < 100) & (i < 50), lambda i, x: 2 * x, jnp.float32(1))
    assert found == 128
    assert while_loop(lambda i, x: i < 5, lambda i, x: x + i, jnp.int32(0)) == 10


def test_loops_of_a_batch():
    starts = jnp.arange(1, 6, dtype=jnp.float32)
    found = jax.vmap(lambda x: while_loop(lambda _, x: x < 20, lambda _, x: 2 * x, x))(starts)
    np.testing.assert_array_equal(found, [32, 32, 24, 32, 20])


def test_on_other_platforms_nothing_is_sorted():
    exported = jax.export.export(
        jax.jit(lambda x: repeat(3, lambda _, s: 2 * s, x)), platforms=["cuda"]
    )
    assert "stablehlo.sort" not in exported(jnp.float32(1)).mlir_module()


def test_a_program_for_several_platforms():
    exported = jax.export.export(
        jax.jit(lambda x: Octav().threshold(x, Int(4), (0,))), platforms=["cpu", "cuda"]
    )
    x = jnp.linspace(-1, 1, 1000)
    np.testing.assert_array_equal(exported(x).call(x), Octav().threshold(x, Int(4), (0,)))


@pytest.mark.parametrize("shape", [(64, 4096), (3, 3, 16, 32)])
@pytest.mark.parametrize("clipping", [Octav(), Percentile(99.9)], ids=["octav", "percentile"])
def test_no_search_is_compiled_into_one_function(clipping, shape):
    axes = tuple(range(len(shape) - (len(shape) == 4)))
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    compiled = jax.jit(lambda x: clipping.threshold(x, Int(4), axes)).lower(x).compile().as_text()
    assert " while(" in compiled
    assert " sort(" in compiled  # what XLA removes would not help
    assert "xla_cpu_small_call" not in compiled  # its name for such functions, since JAX 0.12
