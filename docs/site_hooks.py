"""What building the site does besides MkDocs.

Files outside docs/ that pages refer to keep the links that work in the repository: results/ becomes
a part of the site, and links into the code become plain text. Notebooks become pages. A page that
would fetch anything from the network when it is viewed is refused.
"""

import base64
import json
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
SHOWN_RESULTS = {".png", ".csv", ".json", ".md", ".yaml"}
TUTORIALS = "tutorials"
_LINK = re.compile(r"(!?\[[^\]]*\])\(([^)\s]+)\)")
_FETCHED = re.compile(r"<(?:script|img|iframe|link)\b[^>]*\b(?:src|href)=\"?(?:https?:)?//[^>]*>")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Fill in the tutorials, whatever notebooks there are."""
    names = [f"{TUTORIALS}/index.md", *(f"{TUTORIALS}/{path.stem}.md" for path in notebooks())]
    for section in config.nav or []:
        if isinstance(section, dict) and section.get("Tutorials") == TUTORIALS:
            section["Tutorials"] = names
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add results/ and the notebooks' pages."""
    for path in sorted((ROOT / "results").iterdir()):
        if path.suffix in SHOWN_RESULTS:
            name = f"results/{path.name}"
            if path.suffix == ".md":
                files.append(File.generated(config, name, content=path.read_text()))
            else:
                files.append(File.generated(config, name, abs_src_path=str(path)))
    for path in notebooks():
        name = f"{TUTORIALS}/{path.stem}.md"
        files.append(
            File.generated(config, name, content=notebook_page(json.loads(path.read_text())))
        )
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Give links that leave docs/ their place in the site."""
    source = page.file.src_uri
    # Where the page's file lies in the repository.
    folder = Path(source).parent if source.startswith("results/") else Path("docs", source).parent

    def relinked(match: re.Match[str]) -> str:
        text, target = match.groups()
        path, hash_, anchor = target.partition("#")
        if not path or ":" in path or path.startswith("/"):
            return match[0]
        inside = _normal(folder / path)
        there = re.sub(r"\.ipynb$", ".md", inside.removeprefix("docs/"))
        if files.get_file_from_path(there) is not None:
            return f"{text}({_relative(there, source)}{hash_}{anchor})"
        if (ROOT / inside).exists():  # the site has no code
            return f"`{inside}`"
        return match[0]  # for MkDocs to complain of

    return _LINK.sub(relinked, markdown)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Refuse what would be fetched from the network."""
    if (found := _FETCHED.search(output)) is not None:
        raise PluginError(f"{page.file.src_uri} would fetch {found[0]}: a page has to work offline")
    return output


def notebooks() -> list[Path]:
    """The tutorials, in the order in which their index names them."""
    folder = ROOT / "docs" / TUTORIALS
    index = (folder / "index.md").read_text()

    def place(path: Path) -> tuple[bool, int, str]:
        found = index.find(path.name)
        return found < 0, found, path.name

    return sorted(folder.glob("*.ipynb"), key=place)


def notebook_page(notebook: dict[str, Any]) -> str:
    """A notebook as Markdown: its text, its code and what this printed or drew."""
    return "\n\n".join(_cell(cell) for cell in notebook["cells"] if "".join(cell["source"]).strip())


def _cell(cell: dict[str, Any]) -> str:
    source = "".join(cell["source"])
    if cell["cell_type"] != "code":
        return source
    return "\n\n".join([f"```python\n{source}\n```", *map(_output, cell["outputs"])])


def _output(output: dict[str, Any]) -> str:
    data = output.get("data", {"text/plain": output.get("text", "")})
    for kind in ("image/png", "text/html", "text/plain"):
        if kind not in data:
            continue
        content = "".join(data[kind])
        if kind == "image/png":
            encoded = base64.b64encode(base64.b64decode(content)).decode()
            return f'<img alt="Output" src="data:image/png;base64,{encoded}">'
        if kind == "text/html":
            return f'<div class="output">{content}</div>'
        return f"```text\n{content.rstrip()}\n```" if content.strip() else ""
    return ""


def _normal(path: Path) -> str:
    """A path without its "..", which need not exist."""
    parts: list[str] = []
    for part in path.parts:
        if part == ".." and parts:
            parts.pop()
        elif part != ".":
            parts.append(part)
    return "/".join(parts)


def _relative(target: str, source: str) -> str:
    """One file of the site from another, as Markdown links to it."""
    return "../" * source.count("/") + target
