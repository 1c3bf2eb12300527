"""Names of choices in files: this library's as they are, a user's own with their module."""

import importlib
import sys
import types
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
        clipping.Refit,
        scales.FloatScale,
        scales.IntScale,
        scales.E4M3,
        scales.E8M0,
    )
}


def named(name: str, *, importing: bool = True) -> Any:
    """The class or function of a name; nothing is called.

    Args:
      name: of this library's choices; or, of a user's own, ``module.name``: a frozen dataclass, or
        a gradient's function, in a module that Python can import.
      importing: whether to import it; else it must have been.

    Raises:
      ValueError: there is no such choice; the message says where it was looked for.

    Example:
      >>> named("Octav") is named("qat_jax.clipping.Octav")
      True
    """
    if name in TYPES:
        return TYPES[name]
    module, _, attribute = name.rpartition(".")
    if not all(part.isidentifier() for part in [attribute, *module.split(".")]):
        raise ValueError(
            f"no {name!r}: there are {', '.join(TYPES)}; your own have their module, as in "
            f"my_rules.{name}"
        )
    if not importing and module not in sys.modules:
        raise ValueError(f"{name!r} is of a module of your own: import {module} first")
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except Exception as error:  # whatever the module itself raises
        raise ValueError(
            f"cannot import {module!r}, which {name!r} asks for: {error}; start Python where the "
            "module lies, or add its folder to PYTHONPATH"
        ) from error
    if found is None:
        raise ValueError(f"module {module!r} has no {attribute!r}")
    if not (isinstance(found, types.FunctionType) or _is_frozen_dataclass(found)):
        raise ValueError(
            f"{name!r} is neither a frozen dataclass nor a function: put "
            "@dataclasses.dataclass(frozen=True) in front of the class"
        )
    return found


def name_of(choice: Any) -> str:
    """The name under which `named` finds a class or function.

    Args:
      choice: a class of choices, or a gradient's function.

    Raises:
      ValueError: no module has it, as where it was made at a prompt or inside a function.

    Example:
      >>> name_of(clipping.Octav)
      'Octav'
    """
    short = getattr(choice, "__name__", "")
    if TYPES.get(short) is choice:
        return short
    module, name = getattr(choice, "__module__", ""), getattr(choice, "__qualname__", repr(choice))
    full = f"{module}.{name}"
    try:
        found = None if module == "__main__" else named(full)
    except ValueError:
        found = None
    if found is not choice:
        raise ValueError(
            f"{name} is not of this library and cannot be described in a file: move it into a "
            "module that can be imported"
        )
    return full


def _is_frozen_dataclass(found: Any) -> bool:
    parameters = getattr(found, "__dataclass_params__", None)
    return isinstance(found, type) and parameters is not None and parameters.frozen
