"""Sample batches, and the thresholds that they suggest."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def refuse_one_array(batches: Any) -> None:
    """Raises ValueError if batches are one array, whose rows would be taken for batches."""
    if isinstance(batches, jax.Array | np.ndarray):
        raise ValueError("batches is one array: give a list of batches, [x] for one")


def positional(batches: Iterable[Any]) -> Iterator[tuple[Any, ...]]:
    """Each batch as positional arguments. Raises ValueError as `refuse_one_array` does."""
    refuse_one_array(batches)
    return (batch if isinstance(batch, tuple) else (batch,) for batch in batches)


def joined(batches: Iterable[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """All batches as one, along their first axes; none of none. Flags are those of the first."""
    parts = list(batches)
    return [jax.tree.map(_concatenated, *parts)] if parts else []


def _concatenated(*leaves: Any) -> Any:
    return jnp.concatenate(leaves) if is_array(leaves[0]) else leaves[0]


def is_array(leaf: Any) -> bool:
    """Whether a leaf of a batch is an array, and no flag or the like."""
    return hasattr(leaf, "dtype")


@dataclasses.dataclass(frozen=True)
class Rest:
    """What a batch is besides its arrays, to be a constant of a program.

    Attributes:
      structure: the tree of the batch.
      leaves: its leaves; None in the place of each array.
    """

    structure: jax.tree_util.PyTreeDef
    leaves: tuple[Any, ...]

    def with_arrays(self, arrays: Mapping[int, Any]) -> Any:
        """The batch again, or one like it, of arrays by their places among the leaves."""
        leaves = [arrays.get(place, leaf) for place, leaf in enumerate(self.leaves)]
        return jax.tree.unflatten(self.structure, leaves)


def arrays_apart(batch: Any) -> tuple[dict[int, Any], Rest]:
    """The arrays of a batch by their places among its leaves, and the rest."""
    leaves, structure = jax.tree.flatten(batch)
    arrays = {place: leaf for place, leaf in enumerate(leaves) if is_array(leaf)}
    others = (None if place in arrays else leaf for place, leaf in enumerate(leaves))
    return arrays, Rest(structure, tuple(others))


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``jax.jit`` of a function of a state and a batch whose flags stay what they are.

    Args:
      function: called with the state and the batch as positional arguments; leaves of the batch
        that are no arrays, such as ``train=False``, are constants of the program.
    """

    @functools.partial(jax.jit, static_argnums=0)
    def program(rest: Rest, state: Any, arrays: dict[int, Any]) -> Any:
        return function(state, *rest.with_arrays(arrays))

    def call(state: Any, *inputs: Any) -> Any:
        arrays, rest = arrays_apart(inputs)
        return program(rest, state, arrays)

    return call


def abstract(function: Callable[..., Any], state: Any, *inputs: Any) -> Any:
    """``jax.eval_shape`` of a function of a state and a batch: see `compiled`."""
    arrays, rest = arrays_apart(inputs)
    return jax.eval_shape(
        lambda state, arrays: function(state, *rest.with_arrays(arrays)), state, arrays
    )


def mean_candidates(
    observe: Callable[..., dict[str, jax.Array]], batches: Iterable[Any], *, pool: bool
) -> dict[str, jax.Array]:
    """The means of the thresholds that batches suggest, by operand.

    Args:
      observe: from a batch, as positional arguments, to candidates by operand.
      batches: arrays, or tuples of positional arguments.
      pool: join them to one.

    Raises:
      ValueError: there is no batch, or one that is not finite somewhere in the model.
    """
    batches = positional(batches)
    if pool:
        batches = joined(batches)
    total: dict[str, jax.Array] = {}
    count = 0
    for batch in batches:
        count += 1
        for path, candidate in observe(*batch).items():
            _check_finite(candidate, path, count)
            total[path] = total.get(path, 0) + candidate
    if not count:
        raise ValueError("no batch to calibrate with: give at least one")
    return {path: found / count for path, found in total.items()}


def mean_of_runs(candidates: Sequence[jax.Array]) -> jax.Array:
    """Of a layer's runs on one batch, which may have been on arrays of other ranks."""
    shape = candidates[0].shape
    return jnp.mean(jnp.stack([found.reshape(shape) for found in candidates]), axis=0)


def _check_finite(candidate: jax.Array, path: str, batch: int) -> None:
    if not np.isfinite(candidate).all():
        raise ValueError(
            f"{path} is not finite in batch {batch}: a threshold frozen to that would make NaN of "
            "everything; look for NaN or infinity in the batch, or in what the model makes of it"
        )
