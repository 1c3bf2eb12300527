import math

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qat_jax.training.optimizer import (
    duration_in_steps,
    make_optimizer,
    make_schedule,
    weight_decay_mask,
)

SGD = {"name": "sgd", "momentum": 0.9, "nesterov": False, "weight_decay": 0.1}


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"total_steps": 7}, 7),
        ({"total_epochs": 1.5}, 30),
        ({"total_percent": 25}, 50),
        ({"total_steps": None, "total_epochs": 2}, 40),
    ],
)
def test_durations_are_steps_epochs_or_percent(settings, steps):
    assert duration_in_steps(settings, "total", steps_per_epoch=20, total_steps=200) == steps


@pytest.mark.parametrize("settings", [{}, {"total_steps": 1, "total_epochs": 1}])
def test_a_duration_is_given_exactly_once(settings):
    with pytest.raises(ValueError, match="exactly one of total_steps, total_epochs"):
        duration_in_steps(settings, "total", steps_per_epoch=20)


def test_a_negative_duration_and_a_percentage_of_nothing_are_refused():
    with pytest.raises(ValueError, match="negative"):
        duration_in_steps({"total_steps": -1}, "total", steps_per_epoch=20)
    with pytest.raises(ValueError, match="length of the run"):
        duration_in_steps({"total_percent": 5}, "total", steps_per_epoch=20)


def schedule(total_steps=100, **settings):
    return make_schedule(settings, 0.5, total_steps=total_steps, steps_per_epoch=10)


def test_constant_schedule():
    assert [float(schedule(name="constant")(step)) for step in (0, 50, 99)] == [0.5] * 3


def test_cosine_schedule_after_a_warmup():
    rate = schedule(name="cosine", warmup_percent=20)
    for step in range(20):
        assert float(rate(step)) == pytest.approx(0.5 * step / 20, abs=1e-7)
    for step in range(20, 101):
        expected = 0.25 * (1 + math.cos(math.pi * (step - 20) / 80))
        assert float(rate(step)) == pytest.approx(expected, abs=1e-7)


def test_linear_schedule_after_a_warmup():
    rate = schedule(name="linear", warmup_percent=20)
    for step in range(101):
        expected = 0.5 * min(step / 20, (100 - step) / 80)
        assert float(rate(step)) == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("warmup_steps", [0, 15, 45])
def test_step_decay_counts_from_the_start_of_the_run(warmup_steps):
    rate = schedule(name="step", decay_every_epochs=2, decay_factor=0.1, warmup_steps=warmup_steps)
    for step in range(warmup_steps, 100):
        assert float(rate(jnp.int32(step))) == pytest.approx(0.5 * 0.1 ** (step // 20), rel=1e-5)


def test_impossible_schedules_are_refused():
    with pytest.raises(ValueError, match="choose constant, cosine, linear or step"):
        schedule(name="exponential")
    with pytest.raises(ValueError, match="warm-up of 100 steps fills the run"):
        schedule(name="cosine", warmup_epochs=10)


PARAMS = {
    "conv": {"kernel": jnp.array([[2.0]]), "bias": jnp.array([[2.0]])},
    "norm": {"scale": jnp.array([2.0]), "bias": jnp.array([2.0])},
    "layers": {0: {"kernel": jnp.array([2.0])}},
}


def test_only_kernels_are_decayed():
    assert weight_decay_mask(PARAMS) == {
        "conv": {"kernel": True, "bias": False},
        "norm": {"scale": False, "bias": False},
        "layers": {0: {"kernel": True}},
    }


def updates(settings, count):
    optimizer = make_optimizer(settings, optax.constant_schedule(0.5))
    params, state = PARAMS, optimizer.init(PARAMS)
    gradient = {
        "conv": {"kernel": jnp.array([[1.0]]), "bias": jnp.array([[1.0]])},
        "norm": {"scale": jnp.array([1.0]), "bias": jnp.array([1.0])},
        "layers": {0: {"kernel": jnp.array([1.0])}},
    }
    for _ in range(count):
        update, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, update)
    return params


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_adds_the_penalty_before_the_momentum(nesterov):
    params = updates(SGD | {"nesterov": nesterov}, 2)
    for name, decay in [("kernel", 0.1), ("bias", 0.0)]:
        x, velocity = 2.0, 0.0
        for _ in range(2):
            gradient = 1.0 + decay * x
            velocity = 0.9 * velocity + gradient
            x -= 0.5 * (gradient + 0.9 * velocity if nesterov else velocity)
        np.testing.assert_allclose(params["conv"][name], x, rtol=1e-6)


def test_adamw_decays_beside_the_gradient():
    params = updates({"name": "adamw", "weight_decay": 0.1}, 1)
    # Adam's first update is the sign of the gradient.
    np.testing.assert_allclose(params["conv"]["kernel"], 2 - 0.5 * (1 + 0.1 * 2), rtol=1e-5)
    np.testing.assert_allclose(params["norm"]["scale"], 2 - 0.5, rtol=1e-5)


def test_long_gradients_are_shortened_before_anything_else():
    """All five parameters have gradient 1."""
    for clip_norm, length in [(1.0, 1 / 5**0.5), (99.0, 1.0)]:
        params = updates(SGD | {"weight_decay": 0.0, "clip_norm": clip_norm}, 1)
        np.testing.assert_allclose(params["norm"]["scale"], 2 - 0.5 * length, rtol=1e-6)


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(ValueError, match="choose sgd or adamw"):
        make_optimizer({"name": "adam", "weight_decay": 0}, optax.constant_schedule(1))
