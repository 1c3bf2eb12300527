"""How the gradient of the loss fares on its way back through the quantisers of a network.

One gradient estimator after the other takes the place of all quantisers' own, the forward pass
being the same. The gradient is measured where it leaves each quantiser, in one step of training.
"""

import dataclasses
import itertools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import qat_jax as qj
from qat_jax.granularity import ChannelAxis, VectorAxis
from qat_jax.nnx import Operand, OperandQuantizer, captured_by_operand, is_weight
from qat_jax.sensitivity import with_replaced_quantizers
from qat_jax.training.objective import Batch, Objective

RULES = ("ste", "pwl", "mad")


@dataclasses.dataclass(frozen=True)
class Flow:
    """One operand and the gradients that it gets.

    Attributes:
        operand: its path.
        clipped: the share of its elements beyond their threshold.
        predicted: of an activation, the variance with the straight-through estimator over that
            with the derivative of clipping (PWL), if clipped elements got gradients like all others
            and all of the gradient went through every quantiser between here and the loss
            (arXiv:2206.06501, proposition 4.1); of weights 1.
        ste: the variance of the loss's gradient with the straight-through estimator; so the next
            two.
        pwl: with the piece-wise linear one.
        mad: with magnitude-aware differentiation.
        ste_zeros: the share of elements without any gradient; so the next two.
        pwl_zeros: with the piece-wise linear estimator.
        mad_zeros: with magnitude-aware differentiation.
    """

    operand: str
    clipped: float
    predicted: float
    ste: float
    pwl: float
    mad: float
    ste_zeros: float
    pwl_zeros: float
    mad_zeros: float


class Offset(nnx.Variable):
    """What is added to an operand: zeros, by which the loss is differentiated."""


class Probe(nnx.Module):
    """Takes the place of a quantiser, so that the gradient that leaves it can be asked for.

    Attributes:
        own: the quantiser, with the estimator in question.
        offset: zeros of the operand's shape.
    """

    def __init__(self, own: OperandQuantizer, rule: str, shape: tuple[int, ...]) -> None:
        quantizer = dataclasses.replace(own.quantizer, gradient=rule)
        self.own = OperandQuantizer(quantizer, own.token_axes)
        self.offset = Offset(jnp.zeros(shape))

    def __call__(
        self, x: jax.Array, channel_axis: ChannelAxis = None, vector_axis: VectorAxis = None
    ) -> jax.Array:
        """What the quantiser makes of x."""
        return self.own(x + self.offset.get_value(), channel_axis, vector_axis)


def flows(model: nnx.Module, objective: Objective, batch: Batch) -> list[Flow]:
    """The gradients of a step of training, in the order of the network.

    Args:
        model: a quantised network that finds its thresholds in every batch.
        objective: what it is trained for.
        batch: examples and their labels.
    """
    arrays = training_operands(model, objective, batch)
    found = {rule: gradients(model, objective, batch, rule, arrays) for rule in RULES}
    clipped = {path: found["pwl"][path] == 0 for path in arrays}
    clipped = {path: mask & (found["ste"][path] != 0) for path, mask in clipped.items()}
    predictions = predicted_ratios(
        {path: (clipped[path], x) for path, x in arrays.items() if not is_weight(path)}
    )
    return [
        Flow(
            operand=path,
            clipped=float(jnp.mean(clipped[path])),
            predicted=predictions.get(path, 1.0),
            **{rule: float(jnp.var(found[rule][path])) for rule in RULES},
            **{f"{rule}_zeros": float(jnp.mean(found[rule][path] == 0)) for rule in RULES},
        )
        for path in arrays
    ]


def predicted_ratios(
    activations: Mapping[str, tuple[jax.Array, jax.Array]],
) -> dict[str, float]:
    """Proposition 4.1 for measured clipped shares: 1/(1 - share), multiplied back from the loss.

    A ReLU lets gradients through only where its output is not 0, so that the share that counts
    between two quantisers is that of the non-zero elements.

    Args:
        activations: for each in order which of its elements are clipped, and its elements.
    """
    alone, passed_on = [], []
    for clipped, x in activations.values():
        count = jnp.sum(clipped)
        alone.append(float(1 / (1 - count / x.size)))
        passed_on.append(float(1 / (1 - count / jnp.maximum(jnp.sum(x != 0), 1))))
    # Of each, the product of what the quantisers after it multiply by.
    after = list(itertools.accumulate(reversed(passed_on[1:]), operator.mul, initial=1.0))
    return {
        path: own * above
        for path, own, above in zip(activations, alone, reversed(after), strict=True)
    }


def training_operands(
    model: nnx.Module, objective: Objective, batch: Batch
) -> dict[str, jax.Array]:
    """What reaches each quantiser in a forward pass of training, in the order of the network."""
    model.train()
    graphdef, state = nnx.split(model)

    @jax.jit
    def forward(state: nnx.State, batch: Batch) -> dict[str, jax.Array]:
        _, captured = nnx.capture(nnx.merge(graphdef, state), Operand)(*objective.inputs(batch))
        return captured_by_operand(captured)

    found = forward(state, batch)
    return {path: found[path] for path in qj.operand_quantizers(model)}


def gradients(
    model: nnx.Module,
    objective: Objective,
    batch: Batch,
    rule: str,
    arrays: Mapping[str, jax.Array],
) -> dict[str, jax.Array]:
    """The gradient of the mean loss with respect to each operand, before it is quantised.

    Args:
        model: as for `flows`.
        objective: likewise.
        batch: likewise.
        rule: the estimator of all quantisers: "ste", "pwl" or "mad".
        arrays: the operands.
    """
    probed = with_replaced_quantizers(model, lambda path, own: Probe(own, rule, arrays[path].shape))
    probed.train()
    graphdef, offsets, *others = nnx.split(probed, Offset, ...)

    @jax.jit
    @jax.grad
    def gradient(offsets: nnx.State, others: list[nnx.State], batch: Batch) -> jax.Array:
        # A copy: batch norms note their statistics, and those of the arguments are not to change.
        model = nnx.merge(graphdef, offsets, *others, copy=True)
        outputs = model(*objective.inputs(batch))
        return jnp.mean(objective.losses(outputs, batch))

    found = nnx.to_flat_state(gradient(offsets, others, batch))
    return {_operand(path): variable.get_value() for path, variable in found}


def _operand(path: Sequence[Any]) -> str:
    """An operand's path from that of its offset: LAYER/HOOK/OPERAND/offset."""
    *layer, _, operand, _ = map(str, path)
    return "/".join([*layer, operand])
