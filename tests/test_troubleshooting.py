"""Every message that docs/troubleshooting.md quotes is one that the code gives."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()


def normal(message: str) -> str:
    """One line, and one … for several values in a row."""
    return re.sub("…+", "…", " ".join(message.split()))


QUOTED = [normal(quoted) for quoted in re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL)]


def templates() -> Iterator[str]:
    """The strings of the code, with … where a value is filled in."""
    for folder in ("qat_jax", "experiments", "configs"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = (
                        part.value if isinstance(part, ast.Constant) else "…"
                        for part in node.values
                    )
                    yield "".join(parts)
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value


IN_CODE = {normal(template) for template in templates()}


def test_the_page_quotes_messages():
    assert len(QUOTED) == len(set(QUOTED)) > 40


@pytest.mark.parametrize("message", QUOTED)
def test_the_code_gives_this_message(message):
    assert message in IN_CODE
