import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from qat_jax.training.checkpoint import CheckpointError, Checkpoints
from qat_jax.training.state import create_state
from tests.training.tiny_training import TinyNet, examples


def at_step(state, step):
    return dataclasses.replace(state, step=jnp.int32(step))


def test_a_state_comes_back_bit_for_bit(lab, tmp_path):
    state, _ = lab.train_step(lab.state(), examples(0, 8))
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.restore(state) is None
        assert not (tmp_path / "c").exists()
        checkpoints.save(state, seconds=2.5)
    with Checkpoints(tmp_path / "c") as checkpoints:
        restored, seconds = checkpoints.restore(lab.state())
    assert seconds == 2.5
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    assert jax.tree.structure(restored) == jax.tree.structure(state)


def test_random_keys_of_a_model_are_kept(lab, tmp_path):
    class Dropping(nnx.Module):
        def __init__(self, rngs):
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

    _, state = create_state(Dropping(nnx.Rngs(7)), lab.optimizer)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, seconds=0)
        _, other = create_state(Dropping(nnx.Rngs(8)), lab.optimizer)
        restored, _ = checkpoints.restore(other)
    key = jax.random.key_data(restored.model_state["dropout"]["rngs"]["key"])
    expected = jax.random.key_data(state.model_state["dropout"]["rngs"]["key"])
    np.testing.assert_array_equal(key, expected)


def test_the_newest_are_kept_and_the_newest_whole_one_is_restored(lab, tmp_path):
    state = lab.state()
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (3, 5, 7):
            checkpoints.save(at_step(state, step), seconds=step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["5", "7"]

    for path in (tmp_path / "7" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(b"x")
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        restored, _ = checkpoints.restore(state)
        assert int(restored.step) == 5
        checkpoints.save(at_step(state, 7), seconds=7)
        assert int(checkpoints.restore(state)[0].step) == 7


def damage(checkpoint):
    for path in (checkpoint / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(b"x")


def test_a_run_that_fell_back_saves_again_and_loses_nothing(lab, tmp_path):
    state = lab.state()

    def names():
        return sorted(path.name for path in tmp_path.iterdir())

    def save(*steps):
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.restore(state)
            for step in steps:
                checkpoints.save(at_step(state, step), seconds=step)

    def restored():
        with Checkpoints(tmp_path) as checkpoints:
            return int(checkpoints.restore(state)[0].step)

    save(50, 100)
    damage(tmp_path / "100")
    assert restored() == 50
    assert names() == ["100", "50"]  # who only reads changes nothing
    save(60, 70)
    assert names() == ["60", "70", "damaged-100-1"]
    assert restored() == 70
    save(100)
    damage(tmp_path / "100")
    save(80)
    assert names() == ["70", "80", "damaged-100-1", "damaged-100-2"]
    assert restored() == 80


def test_a_step_that_is_not_saved_is_an_error(lab, tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(at_step(lab.state(), 7), seconds=0)
        with pytest.raises(
            CheckpointError, match=r"step 5 cannot be saved in .* a later one: move"
        ):
            checkpoints.save(at_step(lab.state(), 5), seconds=0)


def test_only_damaged_checkpoints_are_an_error(lab, tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(at_step(lab.state(), 1), seconds=0)
    shutil.rmtree(tmp_path / "1" / "state" / "d")
    shutil.rmtree(tmp_path / "1" / "state" / "ocdbt.process_0")
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(CheckpointError, match="remove that folder to start again"),
    ):
        checkpoints.restore(lab.state())


def test_a_checkpoint_of_another_model_or_optimiser_is_refused(lab, tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(lab.state(width=4), seconds=0)
        with pytest.raises(CheckpointError, match=r"float32\[4\] there and float32\[5\] here"):
            checkpoints.restore(lab.state(width=5))
        _, other = create_state(TinyNet(4, nnx.Rngs(0)), optax.adam(0.1))
        with pytest.raises(CheckpointError, match=r"opt_state.* is nothing there"):
            checkpoints.restore(other)
