"""Programs for batches of any size: what a model may not ask of them."""

import contextlib
from collections.abc import Iterator

from jax.errors import InconclusiveDimensionOperation


@contextlib.contextmanager
def without_its_size(searching: str) -> Iterator[None]:
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
