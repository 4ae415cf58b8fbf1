"""Runs the notebooks of this folder from top to bottom and keeps what they print and draw, each whole or not at all.

    python notebooks/run.py [NAME ...]

Files that they write go to a temporary folder. Progress bars are not kept. LOWRANK_HOME, where factors are cached,
is shared, so that the second notebook finds what the first has measured.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
from nbclient import NotebookClient
from tqdm import tqdm

from lowrank_pl.utils.files import atomic_write

HERE = Path(__file__).parent
ORDER = ("compress_your_first_model", "reading_ranks", "compare_the_methods", "serve_and_fine_tune")


def executed(path: Path, folder: Path, *, timeout: float = 3600) -> nbformat.NotebookNode:
    """Return the notebook at ``path`` with the outputs of a run in ``folder``.

    Args:
        path: The notebook.
        folder: Where its files go.
        timeout: Seconds that a cell may take.

    Raises:
        CellExecutionError: A cell failed.
    """
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=timeout, kernel_name="python3", resources={"metadata": {"path": folder}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # the time of day
        if "outputs" in cell:
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return notebook


def main(names: list[str]) -> None:
    """Run the notebooks called ``names``, or all."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    for name in tqdm(names or ORDER, unit="notebook"):
        began = time.perf_counter()
        with TemporaryDirectory() as folder:
            notebook = executed(HERE / f"{name}.ipynb", Path(folder))
        atomic_write(HERE / f"{name}.ipynb", nbformat.writes(notebook) + "\n")
        tqdm.write(f"{name}: {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
