"""Fields of frozen dataclasses that hold a count."""

import math
import operator
from typing import Any


def settle_count(owner: Any, name: str, says: str, least: int = 1, most: float = math.inf) -> None:
    """Makes a field a Python integer: equal values are to be alike in all they do.

    Args:
      owner: a dataclass, in its ``__post_init__``.
      name: of the field.
      says: what the field is, for the error.
      least: of what it may be.
      most: of what it may be.

    Raises:
      ValueError: it is no integer, or lies outside.
    """
    value = getattr(owner, name)
    try:
        count = operator.index(value)
    except TypeError:
        count = None
    if count is None or isinstance(value, bool) or not least <= count <= most:
        raise ValueError(f"{says}, not {value!r}")
    object.__setattr__(owner, name, count)
