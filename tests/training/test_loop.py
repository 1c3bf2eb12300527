import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qat_jax as qj
from qat_jax.data import DataError
from qat_jax.training.checkpoint import Checkpoints
from qat_jax.training.loop import NON_FINITE, Interrupted, NonFiniteLossError, Plan
from qat_jax.training.state import create_state
from qat_jax.training.step import Collected, make_train_step
from tests.training.tiny_training import train_data

PLAN = Plan(total=7, eval_every=3, checkpoint_every=2, log_every=1)


def lines(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def signalling(number, at_step):
    """Training data that sends this process a signal just before a step."""

    def data(start_step):
        for step, batch in enumerate(train_data(start_step), start_step):
            if step == at_step:
                os.kill(os.getpid(), number)
            yield batch
            if step > at_step + 3:
                raise AssertionError("the signal was not obeyed")

    return data


def assert_same(first, second):
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_a_run_evaluates_logs_and_saves_when_planned(lab, tmp_path):
    state, metrics = lab.fit(tmp_path, PLAN)
    assert int(state.step) == 7
    assert metrics["count"] == 11
    tested = [line["step"] for line in lines(tmp_path) if line["split"] == "test"]
    trained = [line["step"] for line in lines(tmp_path) if line["split"] == "train"]
    assert tested == [0, 3, 6, 7]
    assert trained == [1, 2, 3, 4, 5, 6, 7]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["6", "7"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(lab, tmp_path, number):
    whole, _ = lab.fit(tmp_path / "whole", PLAN)
    before = signal.getsignal(number)
    with pytest.raises(
        Interrupted, match="at step 5, which is saved: run the same command"
    ) as stop:
        lab.fit(tmp_path / "halves", PLAN, train_data=signalling(number, at_step=4))
    assert stop.value.signal_number == number
    assert (tmp_path / "halves" / "checkpoints" / "5").exists()
    assert signal.getsignal(number) is before
    resumed, _ = lab.fit(tmp_path / "halves", PLAN)
    assert_same(resumed, whole)
    assert lines(tmp_path / "halves") == lines(tmp_path / "whole")


def test_a_crash_loses_only_what_came_after_the_last_checkpoint(lab, tmp_path):
    def failing(start_step):
        for step, batch in enumerate(train_data(start_step), start_step):
            if step == 5:
                raise OSError("the disk is gone")
            yield batch

    whole, _ = lab.fit(tmp_path / "whole", PLAN)
    with pytest.raises(OSError, match="the disk is gone"):
        lab.fit(tmp_path / "halves", PLAN, train_data=failing)
    with Checkpoints(tmp_path / "halves" / "checkpoints") as checkpoints:
        assert int(checkpoints.restore(lab.state())[0].step) == 4
    resumed, _ = lab.fit(tmp_path / "halves", PLAN)
    assert_same(resumed, whole)
    assert lines(tmp_path / "halves") == lines(tmp_path / "whole")


def ending(at_step, error, number=None):
    """Training data that cannot be read at a step, where a signal comes too."""

    def data(start_step):
        for step, batch in enumerate(train_data(start_step), start_step):
            if step == at_step:
                if number is not None:
                    os.kill(os.getpid(), number)
                raise error
            yield batch

    return data


@pytest.mark.parametrize(
    ("data", "expected", "message"),
    [
        (ending(5, DataError("cannot read a.jpg")), DataError, "^cannot read a.jpg; stopped at"),
        (ending(5, OSError("the readers died"), signal.SIGINT), Interrupted, "by SIGINT at"),
        (ending(5, DataError("cannot read"), signal.SIGTERM), Interrupted, "by SIGTERM at"),
    ],
)
def test_what_was_done_before_reading_failed_is_saved(lab, tmp_path, data, expected, message):
    whole, _ = lab.fit(tmp_path / "whole", PLAN)
    with pytest.raises(expected, match=message + " step 5, which is saved: run the same command"):
        lab.fit(tmp_path / "halves", PLAN, train_data=data)
    resumed, _ = lab.fit(tmp_path / "halves", PLAN)
    assert_same(resumed, whole)
    assert lines(tmp_path / "halves") == lines(tmp_path / "whole")


def test_data_that_cannot_be_read_at_all_leaves_nothing_to_resume(lab, tmp_path):
    with pytest.raises(DataError, match="torn; stopped at step 0, before the first was done"):
        lab.fit(tmp_path, PLAN, train_data=ending(0, DataError("torn")))
    assert not (tmp_path / "checkpoints").exists()


def test_a_signal_before_the_first_step_leaves_nothing_to_resume(lab, tmp_path):
    def stopping(state):
        os.kill(os.getpid(), signal.SIGTERM)
        return lab.evaluate(state)

    with pytest.raises(Interrupted, match="before the first was done"):
        lab.fit(tmp_path, PLAN, evaluate=stopping)
    lab.fit(tmp_path, PLAN)
    assert [line["step"] for line in lines(tmp_path) if line["split"] == "test"] == [0, 3, 6, 7]


def test_a_run_whose_last_step_is_saved_is_only_evaluated_again(lab, tmp_path):
    first, metrics = lab.fit(tmp_path, PLAN)
    written = lines(tmp_path)
    again, metrics_again = lab.fit(tmp_path, PLAN)
    assert_same(first, again)
    assert metrics_again == metrics
    assert lines(tmp_path) == written


@pytest.mark.parametrize(("log_every", "bad"), [(1, 3), (100, 3), (100, 4)])
def test_a_non_finite_loss_ends_the_run_and_is_never_saved(lab, tmp_path, log_every, bad):
    @jax.jit
    def exploding(state, batch):
        state, metrics = lab.train_step(state, batch)
        loss = jnp.where(state.step == bad, jnp.nan, metrics["loss"])
        return state, metrics | {"loss": loss}

    plan = Plan(total=7, eval_every=100, checkpoint_every=2, log_every=log_every)
    with pytest.raises(NonFiniteLossError, match=rf"nan at step {bad}: lower optimizer"):
        lab.fit(tmp_path, plan, train_step=exploding)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["2"]


def test_a_gradient_that_is_not_finite_ends_the_run_too(lab, tmp_path):
    """The loss may not show it: XLA's CPU backend has a mean after a ReLU that hides NaN."""

    @jax.jit
    def exploding(state, batch):
        state, metrics = lab.train_step(state, batch)
        return state, metrics | {"grad_norm": jnp.where(state.step == 3, jnp.nan, 1.0)}

    plan = Plan(total=7, eval_every=100, checkpoint_every=2, log_every=1)
    with pytest.raises(NonFiniteLossError, match="norm of the gradient is nan at step 3: lower"):
        lab.fit(tmp_path, plan, train_step=exploding)


def test_a_non_finite_loss_names_the_operand_that_saw_it_first(lab, tmp_path):
    """A kernel becomes infinite; what comes after it is not finite either."""
    model = qj.quantize_model(lab.model(), qj.uniform_policy(4, 4, edge_bits=4))
    graphdefs, _ = create_state(model, lab.optimizer)
    step = make_train_step(
        graphdefs,
        lab.optimizer,
        objective=lab.objective,
        schedule=lab.schedule,
        collect={NON_FINITE: Collected(qj.NonFinite, qj.captured_by_operand)},
    )
    state = create_state(model, lab.optimizer)[1]
    state.params["linear"]["kernel"] = state.params["linear"]["kernel"].at[0, 0].set(jnp.inf)
    operands = tuple(qj.operand_quantizers(model))
    assert operands[-1] == "linear/weights"
    with pytest.raises(
        NonFiniteLossError, match="nan at step 1, and first in the operand linear/weights:"
    ):
        lab.fit(
            tmp_path,
            PLAN,
            state=state,
            train_step=step,
            evaluate=lambda state: {"loss": 0.0, "count": 0},
            operands=operands,
        )


def test_memory_is_said_and_steps_are_traced(lab, tmp_path, caplog):
    caplog.set_level("INFO")
    plan = Plan(total=12, eval_every=12, checkpoint_every=12, log_every=12)
    lab.fit(tmp_path, plan, trace=tmp_path / "trace")
    assert "memory of a step on each device" in caplog.text
    assert f"a trace is in {tmp_path / 'trace'}" in caplog.text
    assert list((tmp_path / "trace").rglob("*.xplane.pb"))


def test_a_plan_of_no_steps_is_refused():
    with pytest.raises(ValueError, match="eval_every must be at least 1"):
        Plan(total=7, eval_every=0, checkpoint_every=2, log_every=1)
