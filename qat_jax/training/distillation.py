"""Learning what another network answers, beside what the examples say."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qat_jax.training.objective import Batch, Objective
from qat_jax.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class Distillation:
    """The share that a teacher has in a loss, after Hinton et al. (arXiv:1503.02531, section 2).

    Quantised networks are mostly taught by their own float network. Its answers say more than
    labels do: how likely it takes each of the others to be.

    Attributes:
        teacher: the teacher's structure, in evaluation mode; its arrays are in the training state.
        weight: the share of the loss that is about the teacher, the rest about the examples.
        temperature: T, by which the logits of both are divided. More than 1 makes unlikely answers
            count for more.

    Raises:
        ValueError: the weight is no share above 0, or the temperature not positive and finite.
    """

    teacher: nnx.GraphDef
    weight: float
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.weight <= 1:
            raise ValueError(f"distillation.weight is {self.weight}: give a share from 0 to 1")
        if not 0 < self.temperature < math.inf:
            raise ValueError(
                f"distillation.temperature is {self.temperature}: give more than 0, such as 1"
            )

    def losses(
        self, objective: Objective, outputs: jax.Array, batch: Batch, arrays: Any
    ) -> jax.Array:
        """The loss of each example, in nats: float32 [B].

        Args:
            objective: what is learned.
            outputs: the student's.
            batch: the examples.
            arrays: the teacher's, as `taught` puts them into a state.
        """
        teacher = nnx.capture(nnx.merge(self.teacher, arrays))  # else what it sows were state
        answers = teacher(*objective.inputs(batch))
        from_teacher = objective.divergences(outputs, answers, batch, self.temperature)
        from_examples = objective.losses(outputs, batch)
        return self.weight * from_teacher + (1 - self.weight) * from_examples


def taught(
    state: TrainState, teacher: nnx.Module, *, weight: float, temperature: float = 1.0
) -> tuple[Distillation, TrainState]:
    """What makes a loss of a teacher, and a training state with its own copy of its arrays.

    The copy lets the training step donate its input without emptying the teacher, which is left in
    evaluation mode.

    Args:
        state: the student's.
        teacher: a network that takes the same inputs and gives outputs of the same shape.
        weight: see `Distillation`.
        temperature: see `Distillation`.

    Raises:
        ValueError: see `Distillation`.
    """
    teacher.eval()
    structure, arrays = nnx.split(teacher)
    copies = jax.tree.map(jnp.copy, nnx.to_pure_dict(arrays))
    return Distillation(structure, weight, temperature), dataclasses.replace(state, teacher=copies)
