"""Choices as text, as in Python: ``Int(4, narrow=True)``, ``my_rules.Cubic(2)``.

Such text is read, never run. A name with dots is imported, so that it can only mean what is
installed already, and only frozen dataclasses are constructed.
"""

import ast
import dataclasses
import math
import types
from typing import Any

import numpy as np

from qat_jax.names import TYPES, name_of, named


def to_text(value: Any) -> str:
    """A choice as Python would construct it, defaults left out; a gradient's name as it is.

    Args:
      value: a choice of a quantiser: this library's, or the user's own from a module.

    Raises:
      ValueError: a file has no name for it.

    Example:
      >>> from qat_jax import IntScale, PerChannel, Percentile
      >>> to_text(IntScale(4, PerChannel(), Percentile(99.9)))
      'IntScale(4, coarse=PerChannel(), clipping=Percentile(99.9))'
    """
    if isinstance(value, str):
        return value
    if isinstance(value, types.FunctionType):
        return name_of(value)
    if not dataclasses.is_dataclass(value):
        raise ValueError(f"{value!r} is no choice of a quantiser and cannot be described in a file")
    arguments: list[str] = []
    left_out = False
    for field in dataclasses.fields(value):
        given = getattr(value, field.name)
        required = field.default is field.default_factory is dataclasses.MISSING
        if not field.init or (not required and given == _default(field)):
            left_out = True
        elif required and not field.kw_only and not left_out:
            arguments.append(_argument(given))
        else:
            arguments.append(f"{field.name}={_argument(given)}")
    return f"{name_of(type(value))}({', '.join(arguments)})"


def from_text(text: Any) -> Any:
    """What `to_text` wrote, or a person.

    Args:
      text: an expression; of a class without arguments its name suffices. Other names, such as
        "mad", stay what they are, and so does what is no string.

    Raises:
      ValueError: it cannot be read, or names what is not there; the message says what there is.

    Example:
      >>> from_text("Percentile(99.9)"), from_text("Octav"), from_text("mad")
      (Percentile(percent=99.9), Octav(iterations=None, noise='grid'), 'mad')
    """
    if not isinstance(text, str):
        return text
    try:
        return _constructed(ast.parse(text, mode="eval").body)
    except SyntaxError as error:
        raise ValueError(f"cannot read {text!r}: write it as in Python, such as Int(4)") from error


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _argument(value: Any) -> str:
    if isinstance(value, np.generic):
        value = value.item()  # NumPy's own text, np.float64(0.5), is no literal
    if dataclasses.is_dataclass(value) or isinstance(value, types.FunctionType):
        return to_text(value)
    if isinstance(value, tuple):
        return f"({', '.join(map(_argument, value))}{',' if len(value) == 1 else ''})"
    if isinstance(value, float) and math.isinf(value):
        return "1e999" if value > 0 else "-1e999"  # a literal that is read as one
    text = repr(value)
    try:
        read = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        read = None
    if read != value:
        raise ValueError(f"{text} cannot be described in a file")
    return text


def _constructed(node: ast.expr) -> Any:
    match node:
        case ast.Name(id=name) if name not in TYPES:  # "ste"
            return name
        case ast.Name() | ast.Attribute():
            found = named(ast.unparse(node))
            return found if isinstance(found, types.FunctionType) else _call(node, [], {})
        case ast.Call():
            arguments = [_constructed(argument) for argument in node.args]
            keywords = {str(keyword.arg): _constructed(keyword.value) for keyword in node.keywords}
            return _call(node.func, arguments, keywords)
        case ast.Tuple():
            return tuple(_constructed(part) for part in node.elts)
    return ast.literal_eval(node)


def _call(function: ast.expr, arguments: list[Any], keywords: dict[str, Any]) -> Any:
    name = ast.unparse(function)
    found = named(name)
    if isinstance(found, types.FunctionType):
        raise ValueError(f"{name} is a function, which no file calls: write {name} alone")
    try:
        return found(*arguments, **keywords)
    except TypeError as error:
        raise ValueError(f"not a {name}: {error}") from error
