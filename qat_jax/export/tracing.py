"""What is traced of a model for an export: a function of a batch, which may be of any size."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
from flax import nnx
from jax.errors import InconclusiveDimensionOperation


def as_function(model: nnx.Module) -> Callable[..., Any]:
    """A model as a function of its inputs alone."""
    graphdef, state = nnx.split(model)

    def forward(*inputs: jax.Array) -> Any:
        # A copy belongs to the trace, so that Flax's transformations may update what is in it.
        return nnx.merge(graphdef, state, copy=True)(*inputs)

    return forward


def shape_of(x: Any, batch_size: Any) -> jax.ShapeDtypeStruct:
    """The shape of an input for another batch, in the dtype that JAX would give it.

    Args:
      x: an array or a shape.
      batch_size: a number or a symbolic dimension.
    """
    return jax.ShapeDtypeStruct((batch_size, *x.shape[1:]), jax.dtypes.canonicalize_dtype(x.dtype))


@contextlib.contextmanager
def without_the_size(searching: str) -> Iterator[None]:
    """Around a trace for a batch of any size: says in a line what needs the size.

    Args:
      searching: the line for thresholds that are searched for in the batch.

    Raises:
      ValueError: the model needs the size of the batch.
    """
    try:
        yield
    except InconclusiveDimensionOperation as error:
        raise ValueError(searching) from error
    except TypeError as error:
        if "_DimExpr" not in str(error):  # JAX's type of a size that is not known
            raise
        raise ValueError(
            "the model asks for the size of the batch as a number, as len(x) does: write "
            "x.shape[0], or give batch_size"
        ) from error
