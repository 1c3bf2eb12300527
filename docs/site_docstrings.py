"""Docstrings as the site reads them: one example is a section of examples, too."""

import re
from typing import Any

from griffe import Extension, Object

_EXAMPLE = re.compile(r"^(\s*)Example:$", re.MULTILINE)


class Examples(Extension):
    """Google's style knows the section in the plural alone."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Renames the section of every docstring."""
        if obj.docstring is not None:
            obj.docstring.value = _EXAMPLE.sub(r"\1Examples:", obj.docstring.value)
