"""The notebook runs from top to bottom, on a tiny model."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


# Jupyter's kernel manager leaves its sockets to the garbage collector.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_quickstart_runs_on_a_tiny_model(monkeypatch, tmp_path):
    monkeypatch.setenv("LOWRANK_BASE", "random:llama")
    monkeypatch.setenv("LOWRANK_STEPS", "3")
    monkeypatch.setenv("LOWRANK_OUTPUT", str(tmp_path / "model"))
    notebook = nbformat.read(NOTEBOOKS / "quickstart.ipynb", as_version=4)
    NotebookClient(notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    drawn = [
        output for cell in notebook.cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})
    ]
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert len(drawn) == 1
    assert "learned" in printed
    assert (tmp_path / "model" / "model.safetensors").exists()
