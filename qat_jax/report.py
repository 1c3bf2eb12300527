"""What each layer of a quantised model got, as a table."""

import dataclasses
import html
from collections.abc import Sequence
from typing import Any

from qat_jax.formats import Float, Format, Int
from qat_jax.granularity import Granularity, PerShard, PerVector
from qat_jax.quantizer import Quantizer
from qat_jax.scales import FloatScale, Scale


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """One layer's entry.

    Attributes:
      path: the layer's path in the model.
      kind: the layer's type.
      weights: quantiser of its kernel, None if left in floating point.
      activations: quantiser of its input, likewise.
    """

    path: str
    kind: str
    weights: Quantizer | None
    activations: Quantizer | None


@dataclasses.dataclass(frozen=True)
class Rest:
    """What nothing quantises: embeddings, biases, norms and other parameters that are no kernel.

    Attributes:
      parameters: how many they are.
      bytes: as they are stored.
      of: how many parameters the model has.
    """

    parameters: int
    bytes: int
    of: int

    @classmethod
    def of_arrays(cls, arrays: Sequence[Any], in_kernels: int) -> "Rest":
        """What these parameters are, beside so many that kernels have."""
        count = sum(x.size for x in arrays)
        return cls(count, sum(x.size * x.dtype.itemsize for x in arrays), count + in_kernels)

    def __str__(self) -> str:
        share = 100 * self.parameters / max(self.of, 1)
        return (
            f"beside these kernels: {self.parameters:,} of {self.of:,} parameters ({share:.3g} %), "
            f"{self.bytes:,} bytes, which stay as they are"
        )


_FLOAT = "float"  # what has no quantiser
_HEAD = ("layer", "type", "weights", "activations")


@dataclasses.dataclass(frozen=True, repr=False)
class Report:
    """Every layer that could be quantised, in order of definition.

    It is a table at a prompt, printed, and in a notebook.

    Attributes:
      layers: of each what it got.
      rest: what no layer's kernel is.
    """

    layers: tuple[LayerReport, ...]
    rest: Rest

    def __repr__(self) -> str:
        rows = [_HEAD, *self._rows]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
                 for row in rows]  # fmt: skip
        return "\n".join([*lines, str(self.rest)])

    def _repr_html_(self) -> str:
        # Colours are the page's own, be it light or dark; what stays in float stands back.
        lines = [_html_row("th", _HEAD), *(_html_row("td", row) for row in self._rows)]
        below = "caption-side:bottom;text-align:left"
        caption = f'<caption style="{below}">{html.escape(str(self.rest))}</caption>\n'
        return f"<table>\n{caption}{''.join(lines)}</table>"

    @property
    def _rows(self) -> list[tuple[str, str, str, str]]:
        return [
            (layer.path, layer.kind, describe(layer.weights), describe(layer.activations))
            for layer in self.layers
        ]


def _html_row(tag: str, cells: Sequence[str]) -> str:
    path, kind, *operands = cells
    left = "text-align:left"
    styles = [left, left, *(left + (";opacity:.55" if x == _FLOAT else "") for x in operands)]
    written = [
        f'<{tag} style="{style}">{html.escape(text)}</{tag}>'
        for style, text in zip(styles, (path, kind, *operands), strict=True)
    ]
    return f"<tr>{''.join(written)}</tr>\n"


def describe(quantizer: Quantizer | None) -> str:
    """A quantiser in a few words.

    Example:
      >>> describe(Quantizer(Int(4, signed=None)))
      'auto4 PerTensor Octav mad'
    """
    if quantizer is None:
        return _FLOAT
    gradient = quantizer.gradient
    return " ".join(
        [
            _describe_format(quantizer.format),
            _describe_granularity(quantizer.granularity),
            type(quantizer.clipping).__name__,
            *_describe_scale(quantizer.scale),
            gradient if isinstance(gradient, str) else getattr(gradient, "__name__", "custom"),
        ]
    )


def _describe_format(format: Format) -> str:
    if isinstance(format, Float):
        return f"e{format.exponent}m{format.mantissa}"
    if not isinstance(format, Int):
        return type(format).__name__
    kind = {True: "int", False: "uint", None: "auto"}[format.signed]
    return f"{kind}{format.bits}{' narrow' if format.narrow else ''}"


def _describe_granularity(granularity: Granularity) -> str:
    name = type(granularity).__name__
    match granularity:
        case PerVector(size=number) | PerShard(count=number):
            return f"{name}({number})"
    return name


def _describe_scale(scale: Scale) -> list[str]:
    if scale == FloatScale():
        return []
    return [f"{type(scale).__name__}({scale.bits})"]
