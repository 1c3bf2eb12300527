"""Quantisers as plain JSON values, and back."""

import dataclasses
from typing import Any

from qat_jax import clipping, formats, granularity, scales
from qat_jax.quantizer import Quantizer

TYPES: dict[str, type] = {
    known.__name__: known
    for known in (
        Quantizer,
        formats.Int,
        formats.Float,
        granularity.PerTensor,
        granularity.PerChannel,
        granularity.PerShard,
        granularity.PerVector,
        clipping.AbsMax,
        clipping.Entropy,
        clipping.Exact,
        clipping.Fixed,
        clipping.MseSweep,
        clipping.Octav,
        clipping.Percentile,
        scales.FloatScale,
        scales.IntScale,
        scales.E4M3,
        scales.E8M0,
    )
}


def describe(value: Any) -> Any:
    """A quantiser, or a part of one, as a JSON value.

    Args:
      value: a `Quantizer`, one of its five choices, a number, a string or None.

    Returns:
      For a choice a dictionary of its attributes and, under ``"type"``, its class.

    Raises:
      ValueError: the value is not of this library, and a file has no name for it.

    Example:
      >>> describe(formats.Int(4, narrow=True))
      {'type': 'Int', 'bits': 4, 'signed': True, 'narrow': True}
    """
    if isinstance(value, str | int | float | None):
        return value
    name = type(value).__name__
    if not dataclasses.is_dataclass(value) or TYPES.get(name) is not type(value):
        raise ValueError(f"{value!r} cannot be described in a file: use one of {', '.join(TYPES)}")
    fields = {f.name: describe(getattr(value, f.name)) for f in dataclasses.fields(value)}
    return {"type": name} | fields


def restore(description: Any) -> Any:
    """What `describe` described.

    Args:
      description: what it returned.

    Raises:
      ValueError: there is no such class, or it has no such attributes.
    """
    if not isinstance(description, dict):
        return description
    fields = {name: restore(value) for name, value in description.items() if name != "type"}
    known = TYPES.get(description.get("type", ""))
    if known is None:
        raise ValueError(f"no {description.get('type')!r}: there are {', '.join(TYPES)}")
    try:
        return known(**fields)
    except TypeError as error:
        raise ValueError(f"not a {known.__name__}: {error}") from error
