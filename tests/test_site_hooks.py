"""What building the documentation does besides MkDocs."""

import base64
import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("mkdocs", reason="the documentation's extra is not installed: make docs")

HOOKS = Path(__file__).parents[1] / "docs" / "site_hooks.py"


@pytest.fixture(scope="module")
def hooks():
    spec = importlib.util.spec_from_file_location("site_hooks", HOOKS)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class SiteFiles:
    """A site of a few files."""

    def __init__(self, *names):
        self.names = names

    def get_file_from_path(self, name):
        return name if name in self.names else None


def linked(hooks, text, source):
    files = SiteFiles("results/quickstart.png", "hardware.md", "octav.md", "results/README.md")
    page = SimpleNamespace(file=SimpleNamespace(src_uri=source))
    return hooks.on_page_markdown(text, page, None, files)


@pytest.mark.parametrize(
    ("source", "before", "after"),
    [
        ("index.md", "![a](../results/quickstart.png)", "![a](results/quickstart.png)"),
        ("api/index.md", "[a](../octav.md#x)", "[a](../octav.md#x)"),
        ("results/README.md", "[a](../docs/hardware.md)", "[a](../hardware.md)"),
        ("tutorials/a.md", "![a](../../results/quickstart.png)", "![a](../results/quickstart.png)"),
        ("index.md", "[the code](../qat_jax/ops.py)", "`qat_jax/ops.py`"),
        ("index.md", "[a](nowhere.md)", "[a](nowhere.md)"),
        ("index.md", "[a](https://arxiv.org/abs/1)", "[a](https://arxiv.org/abs/1)"),
        ("index.md", "[a](#there)", "[a](#there)"),
    ],
)
def test_links_that_work_in_the_repository_work_in_the_site(hooks, source, before, after):
    assert linked(hooks, before, source) == after


@pytest.mark.parametrize(
    ("html", "refused"),
    [
        ('<script src="https://cdn.example/x.js"></script>', True),
        ('<link rel="stylesheet" href="//fonts.example/css">', True),
        ('<img alt="badge" src="http://badge.example/x.svg">', True),
        ('<a href="https://arxiv.org/abs/1">paper</a>', False),
        ('<script src="assets/x.js"></script><a href="https://example.org">a</a>', False),
    ],
)
def test_pages_fetch_nothing(hooks, html, refused):
    page = SimpleNamespace(file=SimpleNamespace(src_uri="index.md"))
    if refused:
        with pytest.raises(hooks.PluginError, match=r"index\.md would fetch"):
            hooks.on_post_page(html, page, None)
    else:
        assert hooks.on_post_page(html, page, None) == html


def test_a_notebook_becomes_a_page(hooks):
    image = base64.b64encode(b"pixels").decode()
    outputs = [
        {"output_type": "stream", "text": ["one\n", "two\n"]},
        {"output_type": "display_data", "data": {"image/png": image, "text/plain": "<Figure>"}},
        {"output_type": "execute_result", "data": {"text/html": ["<b>3</b>"], "text/plain": "3"}},
    ]
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "Text."]},
        {"cell_type": "code", "source": "f(1)", "outputs": outputs},
        {"cell_type": "code", "source": [], "outputs": []},
    ]
    assert hooks.notebook_page({"cells": cells}) == "\n\n".join(
        [
            "# Title\nText.",
            "```python\nf(1)\n```",
            "```text\none\ntwo\n```",
            f'<img alt="Output" src="data:image/png;base64,{image}">',
            '<div class="output"><b>3</b></div>',
        ]
    )
