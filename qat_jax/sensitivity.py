"""What each quantiser of a network costs: its loss with some of them on and the others off.

Every operand gets all of its alternatives at once and a switch, so that one compiled program
measures any combination.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qat_jax.granularity import ChannelAxis, VectorAxis
from qat_jax.nnx import OperandQuantizer, copy_model, layer_sites
from qat_jax.quantizer import Quantizer

FLOAT, OWN = 0, 1  # choices of an operand; alternatives come after


class Choice(nnx.Variable):
    """Which of its quantisers an operand has: state, and no parameter."""


class Switch(nnx.Module):
    """Takes the place of an `OperandQuantizer`: one of several, or none, chosen at run time.

    Attributes:
      quantizers: what there is to choose from.
      choice: int32, 0 for none of them, n for the n-th.
    """

    def __init__(self, quantizers: Sequence[OperandQuantizer]) -> None:
        self.quantizers = nnx.List(quantizers)
        self.choice = Choice(jnp.asarray(OWN, jnp.int32))

    def __call__(
        self, x: jax.Array, channel_axis: ChannelAxis = None, vector_axis: VectorAxis = None
    ) -> jax.Array:
        """The chosen fake quantisation of x."""
        axes: dict[str, Any] = {"channel_axis": channel_axis, "vector_axis": vector_axis}
        chosen = [functools.partial(quantizer, **axes) for quantizer in self.quantizers]
        return jax.lax.switch(self.choice.get_value(), [lambda x: x, *chosen], x)


def with_switches(
    model: nnx.Module, alternatives: Mapping[str, Sequence[Quantizer]] | None = None
) -> nnx.Module:
    """A copy of a quantised model whose quantisers can be chosen at run time.

    Args:
      model: a quantised NNX model.
      alternatives: other quantisers of an operand, by its path.

    Returns:
      A copy that computes what the evaluation mode does until a `Choice` is changed: carried
      thresholds are left behind. Alternatives find theirs in every call.

    Raises:
      ValueError: an alternative is for no operand of the model.
    """
    others = dict(alternatives or {})

    def switch(path: str, own: OperandQuantizer) -> Switch:
        own.carried = None  # a branch of a switch cannot change the model
        more = [OperandQuantizer(other, own.token_axes) for other in others.pop(path, ())]
        return Switch([own, *more])

    model = with_replaced_quantizers(model, switch)
    if others:
        raise ValueError(f"the model quantises no {min(others)}: see operand_quantizers(model)")
    return model


def with_replaced_quantizers(
    model: nnx.Module, make: Callable[[str, OperandQuantizer], nnx.Module]
) -> nnx.Module:
    """A copy of a quantised model with other modules in the place of its quantisers.

    Args:
      model: a quantised NNX model.
      make: given an operand's path and its quantiser, what takes its place: called with the
        operand, ``channel_axis`` and ``vector_axis``.
    """
    model = copy_model(model)
    for site in layer_sites(model):
        if not isinstance(site.installed, nnx.Module):
            continue
        for name, own in list(vars(site.installed).items()):
            if isinstance(own, OperandQuantizer):
                path = "/".join(filter(None, (site.path, name)))
                setattr(site.installed, name, make(path, own))
    return model


def losses_of(
    model: nnx.Module,
    loss: Callable[..., jax.Array],
    choices: Iterable[Mapping[str, int]],
    *arrays: Any,
) -> Iterator[float]:
    """The loss with each of some choices of quantisers.

    Args:
      model: from `with_switches`.
      loss: given the model and the arrays, a scalar; traced once.
      choices: for each measurement the operands whose choice is not `FLOAT`.
      *arrays: what the loss is computed from, such as images and labels; pytrees.

    Yields:
      The losses, one at a time, in order.

    Raises:
      ValueError: a choice is for no operand of the model, or of no quantiser that it has.
    """
    graphdef, found, *rest = nnx.split(model, Choice, ...)
    paths = {"/".join(map(str, path)): path for path, _ in nnx.to_flat_state(found)}
    by_operand = {_operand_of(name): path for name, path in paths.items()}
    counts = {
        _operand_of("/".join(map(str, (*path, "choice")))): len(switch.quantizers)
        for path, switch in nnx.iter_graph(model)
        if isinstance(switch, Switch)
    }

    @jax.jit
    def measured(chosen: dict, rest: list[nnx.State], *arrays: Any) -> jax.Array:
        state = nnx.from_flat_state([(path, Choice(c)) for path, c in chosen.items()])
        return loss(nnx.merge(graphdef, state, *rest), *arrays)

    for choice in choices:
        if unknown := choice.keys() - by_operand.keys():
            raise ValueError(f"no operand {min(unknown)!r}: there are {', '.join(by_operand)}")
        for operand, number in choice.items():
            if not 0 <= number <= counts[operand]:
                raise ValueError(
                    f"{operand} has no choice {number}: 0 is float, 1 its own quantiser, and "
                    f"{counts[operand]} the last"
                )
        chosen = dict.fromkeys(by_operand.values(), np.int32(FLOAT))
        chosen |= {by_operand[operand]: np.int32(number) for operand, number in choice.items()}
        yield float(measured(chosen, rest, *arrays))


def _operand_of(path: str) -> str:
    """An operand's path from that of its `Choice`: LAYER/HOOK/OPERAND/choice."""
    *layer, _, operand, _ = path.split("/")
    return "/".join([*layer, operand])
