"""The tutorials, each from a clean kernel: they check themselves what they say."""

import re
import tempfile
from pathlib import Path

import nbformat
import pytest
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "docs" / "tutorials"
TUTORIALS = sorted(FOLDER.glob("*.ipynb"))
_LARGEST = 80_000  # bytes of a file, its figures included


@pytest.fixture
def sockets():
    """A folder of a short name: sockets in files take no port that another worker might take."""
    with tempfile.TemporaryDirectory() as folder:
        yield folder


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_runs(path, tmp_path, monkeypatch, sockets):
    for variable in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "TMPDIR"):
        (tmp_path / variable).mkdir()
        monkeypatch.setenv(variable, str(tmp_path / variable))
    kernel = AsyncKernelManager(transport="ipc", ip=f"{sockets}/s")
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(FOLDER)}}
    NotebookClient(
        notebook, timeout=600, startup_timeout=300, km=kernel, resources=resources
    ).execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert any("assert" in cell.source for cell in code)


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_is_as_it_is_committed(path):
    written = path.read_text(encoding="utf-8")
    notebook = nbformat.reads(written, as_version=4)
    nbformat.validate(notebook)
    assert len(written) < _LARGEST
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    assert all(out.output_type != "error" and out.get("name") != "stderr" for out in outputs)
    assert not re.search(r"0x[0-9a-f]{8}|/home/|/root/|/tmp/", written)


def test_there_are_tutorials():
    assert {path.stem for path in TUTORIALS} >= {"quantise_your_model", "linen", "extend"}
