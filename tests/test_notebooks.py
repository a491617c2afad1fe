"""The notebooks run from top to bottom, and are kept with what they show."""

import subprocess
import sys

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient

FOLDER = ROOT / "experiments" / "notebooks"
NOTEBOOKS = sorted(file.name for file in FOLDER.glob("*.ipynb"))


def shown(notebook):
    """What the code cells show."""
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def is_whole(notebook, name):
    """Shell lines fail in silence: none may have, and the one that looks for the wrong bit has to find it."""
    text = "".join(output.get("text", "") for output in shown(notebook))
    return "not found" not in text and ("damaged" in text) == name.startswith("3")


def test_they_are_all_here():
    assert [name.split("_")[0] for name in NOTEBOOKS] == ["1", "2", "3", "4", "5"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_kept_as_executed(name):
    """In order, with pictures or tables, without errors, and without the names of anybody's folders."""
    notebook = nbformat.read(FOLDER / name, as_version=4)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    kinds = {kind for output in shown(notebook) for kind in output.get("data", {})}
    assert name.startswith("3") or {"image/png", "text/html"} & kinds
    assert not any(output.output_type == "error" for output in shown(notebook))
    assert is_whole(notebook, name)
    text = (FOLDER / name).read_text(encoding="utf-8")
    assert not any(place in text for place in ("/home/", "/root/", "/tmp/", "/Users/"))


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("notebooks") / "demo"
    command = [sys.executable, "-m", "experiments.quickstart", "--out", str(folder), "--steps", "20"]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True, timeout=600)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_it_runs(demo, name, monkeypatch):
    monkeypatch.setenv("DEMO", str(demo))
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")  # else jupyter_core warns that it will become the default
    monkeypatch.delenv("XLA_FLAGS")  # a notebook asks for devices itself
    notebook = nbformat.read(FOLDER / name, as_version=4)
    place = {"metadata": {"path": str(FOLDER)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=place).execute()
    assert is_whole(notebook, name)
