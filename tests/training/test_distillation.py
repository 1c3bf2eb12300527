import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from flax import nnx

from qat_jax.training.checkpoint import Checkpoints
from qat_jax.training.distillation import taught
from qat_jax.training.objective import SpanExtraction, divergence
from qat_jax.training.state import create_state
from qat_jax.training.step import make_train_step
from tests.training.tiny_training import TinyNet, examples


def logits(seed, *shape):
    return 3 * np.random.default_rng(seed).standard_normal(shape)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_the_divergence_is_kullback_and_leiblers(temperature):
    ours, theirs = logits(0, 5, 7), logits(1, 5, 7)
    q, p = (scipy.special.softmax(array / temperature, axis=-1) for array in (ours, theirs))
    expected = temperature**2 * scipy.stats.entropy(p, q, axis=-1)
    np.testing.assert_allclose(divergence(ours, theirs, temperature), expected, rtol=1e-5)
    gradient = jax.grad(lambda x: divergence(x, theirs, temperature).sum())(jnp.asarray(ours))
    np.testing.assert_allclose(gradient, temperature * (q - p), atol=1e-5)


def test_the_divergence_of_what_is_equal_is_nothing():
    x = jnp.asarray(logits(0, 4, 9))
    np.testing.assert_allclose(divergence(x, x, 2.0), 0, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_padding_has_no_part_in_the_divergence_of_spans(temperature):
    ours, theirs = jnp.asarray(logits(0, 2, 6, 2)), jnp.asarray(logits(1, 2, 6, 2))
    batch = {
        "token_mask": np.arange(6)[None] < np.array([[4], [6]]),
        "start": np.zeros(2, np.int32),
        "end": np.zeros(2, np.int32),
    }

    def divergences(ours):
        return SpanExtraction().divergences(ours, theirs, batch, temperature)

    for i, length in enumerate((4, 6)):
        each = [divergence(ours[i, :length, k], theirs[i, :length, k], temperature) for k in (0, 1)]
        np.testing.assert_allclose(divergences(ours)[i], np.mean(each), rtol=1e-5)
    gradient = jax.grad(lambda ours: divergences(ours).sum())(ours)
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient[0, 4:], 0)


@pytest.fixture(scope="module")
def teacher():
    return TinyNet(4, nnx.Rngs(1))


def step_and_state(lab, teacher, **settings):
    _, state = create_state(lab.model(), lab.optimizer)
    distillation, state = taught(state, teacher, **settings)
    step = make_train_step(
        lab.graphdefs,
        lab.optimizer,
        objective=lab.objective,
        schedule=lab.schedule,
        distillation=distillation,
    )
    return step, state


@pytest.mark.parametrize("weight", [0.25, 1.0])
def test_a_step_descends_the_share_of_each(lab, teacher, weight):
    step, state = step_and_state(lab, teacher, weight=weight, temperature=2.0)
    batch = examples(0, 8)
    before, arrays = jax.device_get((state.params, state.teacher))
    state, metrics = step(state, batch)

    model, images = lab.model(), lab.objective.normalise(batch["image"])
    answers = nnx.capture(teacher)(images)

    def loss_fn(model):
        outputs = model(images)
        from_examples = lab.objective.losses(outputs, batch)
        from_teacher = divergence(outputs, answers, 2.0)
        return (weight * from_teacher + (1 - weight) * from_examples).mean()

    loss, grads = nnx.value_and_grad(loss_fn)(model)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    expected = before["conv"]["kernel"] - 0.5 * grads["conv"]["kernel"][...]
    np.testing.assert_allclose(state.params["conv"]["kernel"], expected, rtol=1e-4, atol=1e-6)
    # The teacher stays as it is, its batch statistics too.
    jax.tree.map(np.testing.assert_array_equal, state.teacher, arrays)


def test_a_state_has_its_own_copy_of_a_teacher(lab, teacher):
    _, state = step_and_state(lab, teacher, weight=0.5)
    theirs = nnx.to_pure_dict(nnx.state(teacher))
    jax.tree.map(np.testing.assert_array_equal, state.teacher, theirs)
    pairs = zip(jax.tree.leaves(state.teacher), jax.tree.leaves(theirs), strict=True)
    assert all(a.unsafe_buffer_pointer() != b.unsafe_buffer_pointer() for a, b in pairs)
    assert teacher.norm.use_running_average  # as a teacher is asked


def test_a_teacher_is_saved_and_taken_up_again(lab, teacher, tmp_path):
    step, state = step_and_state(lab, teacher, weight=0.5)
    state, _ = step(state, examples(0, 8))
    _, other = step_and_state(lab, TinyNet(4, nnx.Rngs(2)), weight=0.5)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, seconds=0.0)
        restored, _ = checkpoints.restore(other)
    jax.tree.map(np.testing.assert_array_equal, restored.teacher, state.teacher)


@pytest.mark.parametrize("weight", [-0.5, 0.0, 1.5, float("nan")])
def test_a_weight_is_a_share(lab, teacher, weight):
    with pytest.raises(ValueError, match=r"distillation\.weight is .*: give a share"):
        taught(lab.state(), teacher, weight=weight)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_a_temperature_is_positive(lab, teacher, temperature):
    with pytest.raises(ValueError, match="give more than 0, such as 1"):
        taught(lab.state(), teacher, weight=0.5, temperature=temperature)
