import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qat_jax.training.checkpoint import Checkpoints
from qat_jax.training.evaluation import evaluate, predict
from qat_jax.training.objective import Normalisation, SpanExtraction, cross_entropy
from qat_jax.training.state import create_state, restore_model
from qat_jax.training.step import (
    Collected,
    make_eval_step,
    make_predict_step,
    make_train_step,
    warmed_up,
)
from tests.training.tiny_training import eval_data, examples


def test_normalisation_is_in_units_of_the_images_range():
    image = np.array([[[[0, 255]]]], np.uint8)
    out = Normalisation(mean=(0.25, 0.5), std=(0.5, 2.0))(image)
    np.testing.assert_allclose(out, [[[[-0.5, 0.25]]]])
    assert out.dtype == jnp.float32


def test_normalisation_takes_numbers_only():
    with pytest.raises(ValueError, match="one number a channel"):
        Normalisation(mean=("abc",), std=(1.0,))


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_cross_entropy_in_closed_form(smoothing):
    logits, label = np.array([[1.0, -2.0, 0.5], [0.0, 0.0, 3.0]]), np.array([2, 0])
    target = np.eye(3)[label] * (1 - smoothing) + smoothing / 3
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -(target * log_p).sum(-1)
    np.testing.assert_allclose(cross_entropy(logits, label, smoothing), expected, rtol=1e-6)


def test_a_step_is_gradient_descent_with_fresh_batch_statistics(lab):
    state, batch = lab.state(), examples(0, 8)
    before = jax.device_get(state)
    state, metrics = lab.train_step(state, batch)

    model = lab.model()

    def loss_fn(model):
        logits = model(lab.objective.normalise(batch["image"]))
        return cross_entropy(logits, batch["label"]).mean()

    loss, grads = nnx.value_and_grad(loss_fn)(model)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    assert float(metrics["learning_rate"]) == 0.5
    assert int(state.step) == 1
    expected = before.params["conv"]["kernel"] - 0.5 * grads["conv"]["kernel"][...]
    np.testing.assert_allclose(state.params["conv"]["kernel"], expected, rtol=1e-4, atol=1e-6)
    statistic = model.norm.mean[...]
    assert abs(statistic).max() > 0
    np.testing.assert_allclose(state.model_state["norm"]["mean"], statistic, rtol=1e-4, atol=1e-6)
    norm = np.sqrt(sum(np.square(leaf).sum() for leaf in jax.tree.leaves(grads)))
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-4)


def test_a_batch_in_parts_gives_the_mean_of_their_gradients(lab):
    settings = dict(objective=lab.objective, schedule=lab.schedule)
    step = make_train_step(lab.graphdefs, lab.optimizer, accumulate=4, **settings)
    state, batch = lab.state(), examples(0, 8)
    before = jax.device_get(state)
    state, metrics = step(state, batch)

    model, grads, losses = lab.model(), [], []
    for part in range(4):  # batch norms keep what they saw of the parts before

        def loss_fn(model, part=part):
            logits = model(lab.objective.normalise(batch["image"][part::4]))
            return cross_entropy(logits, batch["label"][part::4]).mean()

        loss, grad = nnx.value_and_grad(loss_fn)(model)
        losses.append(float(loss))
        grads.append(grad["conv"]["kernel"][...])
    expected = before.params["conv"]["kernel"] - 0.5 * np.mean(grads, axis=0)
    np.testing.assert_allclose(state.params["conv"]["kernel"], expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(metrics["loss"], np.mean(losses), rtol=1e-5)
    statistic = model.norm.mean[...]
    np.testing.assert_allclose(state.model_state["norm"]["mean"], statistic, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="accumulate is 0"):
        make_train_step(lab.graphdefs, lab.optimizer, accumulate=0, **settings)


def test_the_average_of_the_parameters_is_evaluated(lab, tmp_path):
    graphdefs, state = create_state(lab.model(), lab.optimizer, averages=True)
    step = make_train_step(
        graphdefs,
        lab.optimizer,
        objective=lab.objective,
        schedule=lab.schedule,
        average_decay=0.75,
    )
    expected = jax.device_get(state.params)
    for seed in range(3):
        state, _ = step(state, examples(seed, 8))
        new = jax.device_get(state.params)
        expected = jax.tree.map(lambda old, new: 0.75 * old + 0.25 * new, expected, new)
    jax.tree.map(lambda *a: np.testing.assert_allclose(*a, rtol=1e-5), state.average, expected)

    plain = dataclasses.replace(state, params=state.average, average=None)
    ours, theirs = (
        evaluate(make_eval_step(graphdefs, objective=lab.objective), s, eval_data(), lab.devices)
        for s in (state, plain)
    )
    assert ours == theirs
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, seconds=0.0)
        restored, _ = checkpoints.restore(state)
    jax.tree.map(np.testing.assert_array_equal, restored.average, state.average)


def test_batch_statistics_are_averaged_with_the_parameters(lab, tmp_path):
    graphdefs, state = create_state(lab.model(), lab.optimizer, averages=True)
    settings = {"objective": lab.objective, "schedule": lab.schedule}
    step = make_train_step(graphdefs, lab.optimizer, average_decay=warmed_up(0.2), **settings)
    expected = jax.device_get((state.params, state.model_state["norm"]))
    for number, decay in enumerate((1 / 10, 2 / 11, 0.2, 0.2)):
        state, _ = step(state, examples(number, 8))
        new = jax.device_get((state.params, state.model_state["norm"]))
        expected = jax.tree.map(lambda o, n, d=decay: d * o + (1 - d) * n, expected, new)
    model = restore_model(graphdefs, state)
    found = (
        nnx.to_pure_dict(nnx.state(model, nnx.Param)),
        {name: getattr(model.norm, name)[...] for name in ("mean", "var")},
    )
    jax.tree.map(lambda *a: np.testing.assert_allclose(*a, rtol=1e-5), found, expected)

    # What is restored is judged and goes on alike.
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, seconds=0.0)
        restored, _ = checkpoints.restore(state)
    judge = make_eval_step(graphdefs, objective=lab.objective)
    ours, theirs = (evaluate(judge, s, eval_data(), lab.devices) for s in (state, restored))
    assert ours == theirs
    after, again = (step(s, examples(9, 8))[0] for s in (state, restored))
    jax.tree.map(np.testing.assert_array_equal, after.average_statistics, again.average_statistics)


def test_an_average_forgets_a_share():
    with pytest.raises(ValueError, match=r"average_decay is 1\.0: give at least 0 and less than 1"):
        warmed_up(1.0)


def test_the_input_state_is_donated_but_the_model_keeps_its_arrays(lab):
    state = lab.state()
    lab.train_step(state, examples(0, 8))
    assert state.params["conv"]["kernel"].is_deleted()
    assert not lab.model().conv.kernel[...].is_deleted()


def test_what_the_model_sows_is_collected_on_request(lab):
    step = make_train_step(
        lab.graphdefs,
        lab.optimizer,
        objective=lab.objective,
        schedule=lab.schedule,
        collect={"diagnostics": Collected(nnx.Intermediate)},
    )
    structure = jax.tree.structure(lab.state())
    state, metrics = step(lab.state(), examples(0, 8))
    (largest,) = metrics["diagnostics"]["largest"]
    assert float(largest) > 0
    assert jax.tree.structure(state) == structure
    assert "diagnostics" not in lab.train_step(lab.state(), examples(0, 8))[1]


def test_evaluation_counts_every_example_once(lab):
    state = lab.state()
    model = restore_model(lab.graphdefs, state)
    correct, losses = 0, []
    for batch in eval_data():
        valid = batch["mask"]
        logits = model(lab.objective.normalise(batch["image"][valid]))
        correct += int((np.argmax(logits, -1) == batch["label"][valid]).sum())
        losses.extend(np.asarray(cross_entropy(logits, batch["label"][valid])))
    metrics = evaluate(lab.eval_step, state, eval_data(), lab.devices)
    assert metrics["count"] == 11
    assert metrics["correct"] == correct
    assert metrics["accuracy"] == correct / 11
    assert metrics["loss"] == pytest.approx(np.mean(losses), rel=1e-5)


def test_prediction_leaves_the_padding_out(lab):
    state = lab.state()
    step = make_predict_step(lab.graphdefs, objective=lab.objective)
    outputs, loss = predict(step, state, eval_data(), lab.devices)
    model = restore_model(lab.graphdefs, state)
    images = np.concatenate([batch["image"][batch["mask"]] for batch in eval_data()])
    expected = model(lab.objective.normalise(images))
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-6)
    metrics = evaluate(lab.eval_step, state, eval_data(), lab.devices)
    assert loss == pytest.approx(metrics["loss"], rel=1e-5)


def test_predictions_of_batches_of_different_lengths_end_in_zeros(lab):
    batches = [
        {"x": np.full((2, length), length, np.float32), "mask": np.array([True, length > 3])}
        for length in (5, 3, 4)
    ]

    def step(state, batch):
        x = batch["x"]
        return {"outputs": np.stack([x, -x], -1), "mask": batch["mask"], "loss": x[:, 0]}

    outputs, loss = predict(step, None, batches, lab.devices)
    assert outputs.shape == (5, 5, 2)
    for said, length in zip(outputs, [5, 5, 3, 4, 4], strict=True):
        expected = np.where(np.arange(5)[:, None] < length, length, 0) * [1, -1]
        np.testing.assert_array_equal(said, expected)
    assert loss == pytest.approx((5 + 5 + 3 + 4 + 4) / 5)


def test_an_empty_evaluation_set_is_refused(lab):
    with pytest.raises(ValueError, match="empty"):
        evaluate(lab.eval_step, lab.state(), [], lab.devices)
    with pytest.raises(ValueError, match="empty"):
        predict(lab.eval_step, lab.state(), [], lab.devices)


def test_a_span_is_judged_by_both_of_its_ends_and_never_in_the_padding():
    objective = SpanExtraction()
    logits = np.array(
        [[[0.0, 0.0], [2.0, 1.0], [1.0, 3.0], [9.0, 9.0]]] * 2, np.float32
    )  # the last token is padding
    batch = {
        "token_mask": np.array([[True, True, True, False]] * 2),
        "start": np.array([1, 1]),
        "end": np.array([2, 1]),
    }
    np.testing.assert_array_equal(objective.correct(logits, batch), [True, False])
    start = np.log(np.exp([0.0, 2.0, 1.0]).sum()) - 2.0
    end = np.log(np.exp([0.0, 1.0, 3.0]).sum()) - np.array([3.0, 1.0])
    np.testing.assert_allclose(objective.losses(logits, batch), (start + end) / 2, rtol=1e-6)
