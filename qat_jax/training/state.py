"""The training state as a pytree of plain arrays, made from and put back into a Flax NNX model.

The loop carries arrays only; the model's static structure (its graph definitions for training and
for evaluation) is closed over by the steps.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

PyTree = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The arrays of a run: all that changes during training, and a teacher's.

    Attributes:
        step: int32 [], the number of optimiser updates made so far.
        params: nested dict of arrays, the model's `nnx.Param` values.
        model_state: nested dict of arrays, every other variable (batch statistics, RNG counts).
        opt_state: the optimiser's state.
        average: the moving average of `params` over the steps, or None.
        average_statistics: likewise of the batch statistics in `model_state`, which fit `params`
            and not their average; a nested dict with these alone.
        teacher: the arrays of a network to learn from, which stay as they are (see
            `distillation`), or None.
    """

    step: jax.Array
    params: PyTree
    model_state: PyTree
    opt_state: PyTree
    average: PyTree = None
    average_statistics: PyTree = None
    teacher: PyTree = None

    @property
    def evaluated_params(self) -> PyTree:
        """The parameters that the run is judged by: the average where there is one."""
        return self.params if self.average is None else self.average

    @property
    def evaluated_model_state(self) -> PyTree:
        """Likewise, what goes with them: averaged batch statistics where there are some."""
        return _overlaid(self.model_state, self.average_statistics or {})


class GraphDefs(NamedTuple):
    """The static structure of one model in its two modes."""

    train: nnx.GraphDef
    evaluation: nnx.GraphDef


def split_model(model: nnx.Module) -> tuple[GraphDefs, PyTree, PyTree]:
    """Takes a model apart into its structure and its arrays.

    The model is left in training mode (`model.train()`).

    Returns:
        The graph definitions, the parameters and the rest of the state; the latter two as nested
        dicts of arrays.
    """
    model.eval()
    evaluation = nnx.graphdef(model)
    model.train()
    graphdefs = GraphDefs(train=nnx.graphdef(model), evaluation=evaluation)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    model_state = nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.Param)))
    return graphdefs, params, model_state


def create_state(
    model: nnx.Module, optimizer: optax.GradientTransformation, *, averages: bool = False
) -> tuple[GraphDefs, TrainState]:
    """Makes the state before the first step, with its own copy of the model's arrays.

    The copy lets the training step donate its input without emptying `model`.

    Args:
        model: where to start.
        optimizer: what will update the parameters.
        averages: whether an average of the parameters and batch statistics is kept.
    """
    graphdefs, params, model_state = split_model(model)
    statistics = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
    params, model_state = jax.tree.map(jnp.copy, (params, model_state))
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        model_state=model_state,
        opt_state=optimizer.init(params),
        average=jax.tree.map(jnp.copy, params) if averages else None,
        average_statistics=jax.tree.map(jnp.copy, statistics) if averages else None,
    )
    return graphdefs, state


def only(tree: PyTree, like: PyTree) -> PyTree:
    """The part of a nested dict that another one has."""
    if not isinstance(like, dict):
        return tree
    return {key: only(tree[key], value) for key, value in like.items()}


def _overlaid(tree: PyTree, part: PyTree) -> PyTree:
    """A nested dict with what a part of it has in the place of its own."""
    if not isinstance(part, dict):
        return part
    return tree | {key: _overlaid(tree[key], value) for key, value in part.items()}


def restore_model(graphdefs: GraphDefs, state: TrainState) -> nnx.Module:
    """Puts the arrays of `state` back into a model, in evaluation mode."""
    return nnx.merge(graphdefs.evaluation, state.evaluated_params, state.evaluated_model_state)


def count_parameters(params: PyTree) -> int:
    """The number of scalars in `params`."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
