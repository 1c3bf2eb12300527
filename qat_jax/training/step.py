"""The jitted steps of training, evaluation and prediction.

The training step gives its input state's memory to its output state.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from qat_jax.training.distillation import Distillation
from qat_jax.training.objective import Batch, Objective
from qat_jax.training.sharding import Placement
from qat_jax.training.state import GraphDefs, TrainState, only

TrainStep = Callable[[TrainState, Batch], tuple[TrainState, dict[str, Any]]]
EvalStep = Callable[[TrainState, Batch], dict[str, jax.Array]]
AverageDecay = Callable[[jax.Array], jax.Array]


class Collected(NamedTuple):
    """Something that modules sow and a step returns.

    Attributes:
        type: what it is sown under (see `nnx.capture`).
        summarise: makes a tree of scalars of all that was sown.
    """

    type: type[nnx.Variable]
    summarise: Callable[[nnx.State], Any] = nnx.to_pure_dict


def warmed_up(decay: float) -> AverageDecay:
    """The share of the old in a moving average, less in the first steps: min(d, (1+t) / (10+t)).

    Were it d from the start, the initial weights would count as much as 1 / (1-d) steps.

    Raises:
        ValueError: `decay` is no share below 1.
    """
    if not 0 <= decay < 1:
        raise ValueError(f"average_decay is {decay}: give at least 0 and less than 1")
    return lambda step: jnp.minimum(decay, (1 + step) / (10 + step))


def make_train_step(
    graphdefs: GraphDefs,
    optimizer: optax.GradientTransformation,
    *,
    objective: Objective,
    schedule: optax.Schedule,
    accumulate: int = 1,
    average_decay: float | AverageDecay = 0.0,
    collect: Mapping[str, Collected] | None = None,
    distillation: Distillation | None = None,
    placement: Placement | None = None,
) -> TrainStep:
    """One optimiser update as a jitted function that donates its input state.

    Args:
        graphdefs: the model's structure.
        optimizer: the transformation whose state is in the `TrainState`.
        objective: what the model is called with, and the loss that is minimised.
        schedule: the learning rate by step, for the metrics.
        accumulate: parts that a batch is cut into, which run one after the other and whose
            gradients are averaged: a batch that does not fit into memory at once. Batch norms and
            dynamic thresholds see a part at a time.
        average_decay: the share of the old in the moving average of the parameters and batch
            statistics, of a state that keeps one; of each step, if it is a function of it.
        collect: what to return, by name among the metrics, of what the forward pass sows.
        distillation: the share in the loss of the teacher whose arrays the state has, if it has
            one.
        placement: where the state lives; None leaves it to the compiler.

    Returns:
        step(state, batch) -> (state, metrics), metrics being float32 scalars `loss`, `accuracy`
        (the share of examples answered correctly), `grad_norm`, `learning_rate`, and what is
        collected, means over the parts.

    Raises:
        ValueError: `accumulate` is not positive; when tracing, if the parts are unequal.
    """
    if accumulate < 1:
        raise ValueError(f"accumulate is {accumulate}: cut the batch into at least 1 part")

    def loss_fn(
        params: Any, model_state: Any, teacher: Any, batch: Batch
    ) -> tuple[jax.Array, tuple[Any, dict[str, Any]]]:
        if placement is not None:
            params, teacher = placement.gather((params, teacher))
        model = nnx.merge(graphdefs.train, params, model_state)
        outputs, sown = _apply(model, objective.inputs(batch), collect or {})
        if distillation is None:
            losses = objective.losses(outputs, batch)
        else:
            losses = distillation.losses(objective, outputs, batch, teacher)
        loss = losses.mean()
        accuracy = jnp.mean(objective.correct(outputs, batch))
        new_model_state = nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.Param)))
        return loss, (new_model_state, {"loss": loss, "accuracy": accuracy, **sown})

    def gradients(state: TrainState, batch: Batch) -> tuple[Any, tuple[Any, dict[str, Any]]]:
        """The model's new state; gradients and metrics."""

        def part(model_state: Any, batch: Batch) -> tuple[Any, tuple[Any, dict[str, Any]]]:
            grads, (model_state, metrics) = jax.grad(loss_fn, has_aux=True)(
                state.params, model_state, state.teacher, batch
            )
            return model_state, (grads, metrics)

        if accumulate == 1:
            return part(state.model_state, batch)
        return _scan_mean(part, state.model_state, batch, accumulate)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
        model_state, (grads, metrics) = gradients(state, batch)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics |= {
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
        }
        average, statistics = state.average, state.average_statistics
        if average is not None:
            decay = average_decay(state.step) if callable(average_decay) else average_decay
            new = params, only(model_state, statistics)
            average, statistics = optax.incremental_update(new, (average, statistics), 1 - decay)
        new_state = TrainState(
            step=state.step + 1,
            params=params,
            model_state=model_state,
            opt_state=opt_state,
            average=average,
            average_statistics=statistics,
            teacher=state.teacher,
        )
        if placement is not None:
            new_state, metrics = placement.keep_state(new_state), placement.gather(metrics)
        return new_state, metrics

    return jax.jit(train_step, donate_argnums=0)


def _scan_mean(
    function: Callable[[Any, Batch], tuple[Any, Any]], carry: Any, batch: Batch, parts: int
) -> tuple[Any, Any]:
    """`function` of each part of a batch in turn: the last carry and the mean of what it returns.

    Every part takes an example of each run of `parts` examples, so that a batch that is split over
    devices stays where it is.
    """
    stacked = {
        name: jnp.moveaxis(array.reshape(-1, parts, *array.shape[1:]), 1, 0)
        for name, array in batch.items()
    }
    first = {name: array[0] for name, array in stacked.items()}
    zeros = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
        jax.eval_shape(function, carry, first)[1],
    )

    def add(before: tuple[Any, Any], part: Batch) -> tuple[tuple[Any, Any], None]:
        carry, total = before
        carry, value = function(carry, part)
        return (carry, jax.tree.map(jnp.add, total, value)), None

    (carry, total), _ = jax.lax.scan(add, (carry, zeros), stacked)
    return carry, jax.tree.map(lambda leaf: leaf / parts, total)


def make_eval_step(
    graphdefs: GraphDefs, *, objective: Objective, placement: Placement | None = None
) -> EvalStep:
    """Sums over one evaluation batch, in which padding counts for nothing.

    Returns:
        step(state, batch with "mask": bool [B]) -> {"loss": float32 [], "correct": int32 [],
        "count": int32 []}, each a sum over the examples whose mask is True.
    """

    def eval_step(state: TrainState, batch: Batch) -> dict[str, jax.Array]:
        outputs = _evaluated(graphdefs, state, objective.inputs(batch))
        mask = batch["mask"]
        # `where`, not a product: what a padded example gives may be NaN.
        loss = jnp.where(mask, objective.losses(outputs, batch), 0.0)
        return {
            "loss": loss.sum(),
            "correct": (mask & objective.correct(outputs, batch)).sum(dtype=jnp.int32),
            "count": mask.sum(dtype=jnp.int32),
        }

    return jax.jit(eval_step, out_shardings=placement and placement.replicated)


def make_predict_step(
    graphdefs: GraphDefs, *, objective: Objective, placement: Placement | None = None
) -> EvalStep:
    """What the model says to one evaluation batch.

    Returns:
        step(state, batch with "mask": bool [B]) -> {"outputs": [B, …], "mask": bool [B], "loss":
        float32 [B]}, of all examples of all processes.
    """

    def predict_step(state: TrainState, batch: Batch) -> dict[str, jax.Array]:
        outputs = _evaluated(graphdefs, state, objective.inputs(batch))
        losses = objective.losses(outputs, batch)
        return {"outputs": outputs, "mask": batch["mask"], "loss": losses}

    return jax.jit(predict_step, out_shardings=placement and placement.replicated)


def _evaluated(graphdefs: GraphDefs, state: TrainState, inputs: tuple[jax.Array, ...]) -> jax.Array:
    model = nnx.merge(graphdefs.evaluation, state.evaluated_params, state.evaluated_model_state)
    return _apply(model, inputs)[0]


def _apply(
    model: Any,
    inputs: tuple[jax.Array, ...],
    collect: Mapping[str, Collected] = MappingProxyType({}),
) -> tuple[jax.Array, dict[str, Any]]:
    """A forward pass and what was collected; sown outside a capture, it would become state."""
    result = nnx.capture(model, *(collected.type for collected in collect.values()))(*inputs)
    if not collect:
        return result, {}
    outputs, *states = result
    named = zip(collect.items(), states, strict=True)
    return outputs, {name: collected.summarise(state) for (name, collected), state in named}
