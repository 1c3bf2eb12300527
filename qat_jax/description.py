"""Quantisers as plain JSON values, and back."""

import dataclasses
import types
from typing import Any

from qat_jax.names import name_of, named


def describe(value: Any) -> Any:
    """A quantiser, or a part of one, as a JSON value.

    Args:
      value: a `Quantizer`, one of its five choices, a number, a string, None, or a tuple of those.

    Returns:
      For a choice a dictionary of its attributes and, under ``"type"``, its class; for a gradient
      of the user's own one with the function's name.

    Raises:
      ValueError: a choice is not of this library and of no module either.

    Example:
      >>> from qat_jax.formats import Int
      >>> describe(Int(4, narrow=True))
      {'type': 'Int', 'bits': 4, 'signed': True, 'narrow': True}
    """
    if isinstance(value, str | int | float | None):
        return value
    if isinstance(value, tuple):
        return [describe(part) for part in value]
    if isinstance(value, types.FunctionType):
        return {"type": name_of(value)}
    name = name_of(type(value))
    return {"type": name} | {f.name: describe(getattr(value, f.name)) for f in _fields(value)}


def restore(description: Any) -> Any:
    """What `describe` described.

    Nothing is imported: a file must not choose what code runs.

    Args:
      description: what it returned.

    Raises:
      ValueError: there is no such class, it has no such attributes, or the module of a user's own
        has not been imported.
    """
    if isinstance(description, list):
        return tuple(map(restore, description))
    if not isinstance(description, dict):
        return description
    fields = {name: restore(value) for name, value in description.items() if name != "type"}
    known = named(description.get("type", ""), importing=False)
    if isinstance(known, types.FunctionType):
        return known
    try:
        return known(**fields)
    except TypeError as error:
        raise ValueError(f"not a {known.__name__}: {error}") from error


def _fields(value: Any) -> list[dataclasses.Field]:
    return [field for field in dataclasses.fields(value) if field.init]
