"""How what takes the place of an operation shows itself: short, in Flax's own representations."""

from collections.abc import Iterator
from typing import Any

from flax.nnx import reprlib, visualization

from qat_jax.quantizer import Quantizer
from qat_jax.report import describe

_OPERANDS = ("activations", "weights")


class DescribedQuantizer:
    """Mixed into a module with a ``quantizer``: its type and the quantiser in a few words."""

    quantizer: Quantizer

    def _words(self) -> str:
        return describe(self.quantizer)

    def __nnx_repr__(self) -> Iterator[reprlib.Object | reprlib.Attr]:
        yield reprlib.Object(type(self), kv_sep="", same_line=True)
        yield reprlib.Attr("", self._words(), use_raw_key=True, use_raw_value=True)

    def __treescope_repr__(self, path: str | None, subtree_renderer: Any) -> Any:
        from treescope import rendering_parts  # only notebooks need it

        text = rendering_parts.text(f"{type(self).__name__}({self._words()})")
        return rendering_parts.build_one_line_tree_node(line=text, path=path)


class DescribedOperands:
    """Mixed into a module with ``activations`` and ``weights``: its type and these two."""

    def __nnx_repr__(self) -> Iterator[reprlib.Object | reprlib.Attr]:
        yield reprlib.Object(type(self))
        if (factors := getattr(self, "factors", None)) is not None:
            words = f"of {factors.size} features, see smooth"
            yield reprlib.Attr("factors", words, use_raw_value=True)
        if (block := getattr(self, "rotation", None)) is not None:
            words = f"of blocks of {block} features, see rotate"
            yield reprlib.Attr("rotation", words, use_raw_value=True)
        for name in _OPERANDS:
            operand = getattr(self, name)
            in_float = operand is None
            yield reprlib.Attr(name, "float" if in_float else operand, use_raw_value=in_float)

    def __treescope_repr__(self, path: str | None, subtree_renderer: Any) -> Any:
        return visualization.render_object_constructor(
            object_type=type(self),
            attributes={name: getattr(self, name) for name in _OPERANDS},
            path=path,
            subtree_renderer=subtree_renderer,
        )
