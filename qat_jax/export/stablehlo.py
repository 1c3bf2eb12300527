"""Models as StableHLO, which other frameworks and other versions of JAX run."""

from pathlib import Path
from typing import Any

import jax
import jax.export
from flax import nnx

from qat_jax.array_file import draft_of
from qat_jax.export.tracing import as_function, shape_of, without_the_size
from qat_jax.nnx import copy_model

PLATFORMS = ("cpu", "cuda", "tpu")
_LARGEST_BATCH = 1024


def to_stablehlo(
    model: nnx.Module, *inputs: Any, batch_size: int | None = None
) -> jax.export.Exported:
    """A model as a program, its weights inside.

    Packed weights stay packed: the program unpacks them when it runs. A network in integers is
    exported as such.

    Args:
      model: an NNX model; it is exported in evaluation mode.
      *inputs: a batch for it, or its shapes.
      batch_size: the length of the leading axis of every input; None for any up to 1,024.

    Returns:
      The program, for all of ``PLATFORMS``; `Exported.serialize` makes bytes of it.

    Raises:
      ValueError: what the model computes depends on the size of the batch.
    """
    batch: Any = batch_size
    if batch_size is None:
        # Sizes are then known to stay below those that counts in 32 bits hold.
        (batch,) = jax.export.symbolic_shape("batch", constraints=[f"batch <= {_LARGEST_BATCH}"])
    shapes = [shape_of(x, batch) for x in inputs]
    model = copy_model(model)
    model.eval()
    with without_the_size(
        "thresholds of activations that are found in each batch need its size: "
        "freeze them with calibrate, or give batch_size"
    ):
        return jax.export.export(jax.jit(as_function(model)), platforms=PLATFORMS)(*shapes)


def save_stablehlo(
    model: nnx.Module, path: str | Path, *inputs: Any, batch_size: int | None = None
) -> None:
    """Write `to_stablehlo` of a model to a file, from which ``jax.export.deserialize`` reads it.

    Args:
      model: an NNX model.
      path: the file; an existing one is replaced once the new one is whole.
      *inputs: as for `to_stablehlo`.
      batch_size: likewise.

    Raises:
      FileNotFoundError: the folder of ``path`` does not exist.
      ValueError: as of `to_stablehlo`, or ``path`` is a folder.
    """
    with draft_of(path) as draft:
        draft.write_bytes(to_stablehlo(model, *inputs, batch_size=batch_size).serialize())
