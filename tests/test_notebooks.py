"""The notebooks run from top to bottom: the first on the real model, the others on a tiny one."""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest

from tests.helpers import ROOT

NOTEBOOKS = ROOT / "notebooks"
TINY = {"LOWRANK_BASE": "random:llama", "LOWRANK_BLOCKS": "*", "LOWRANK_STEPS": "3"}
# One block of SmolLM2-135M, half the text.
REAL = {"LOWRANK_BLOCKS": "*.layers.14.*", "LOWRANK_STEPS": "2", "LOWRANK_SEQUENCES": "4"}


@pytest.fixture(scope="module")
def runner():
    spec = importlib.util.spec_from_file_location("run_notebooks", NOTEBOOKS / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", autouse=True)
def _forked_kernels(tmp_path_factory):
    """Let kernels be forked, which have imported what the first cells import."""
    folder = tmp_path_factory.mktemp("jupyter")
    kernel = folder / "kernels" / "python3"
    kernel.mkdir(parents=True)
    words = [sys.executable, str(ROOT / "tests" / "helpers" / "fork_kernel.py"), "{connection_file}"]
    spec = {"argv": words, "display_name": "forked", "language": "python"}
    (kernel / "kernel.json").write_text(json.dumps(spec))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PATH", str(folder))
        yield


def run(runner, monkeypatch, folder, name, settings):
    """Return what the notebook printed, and how many pictures it drew; the model or results are in ``folder/out``."""
    for key, value in {**settings, "LOWRANK_OUTPUT": str(folder / "out"), "TQDM_DISABLE": "1"}.items():
        monkeypatch.setenv(key, value)
    outputs = [
        output
        for cell in runner.executed(NOTEBOOKS / f"{name}.ipynb", folder, timeout=600).cells
        for output in cell.get("outputs", [])
    ]
    drawn = sum("image/png" in output.get("data", {}) for output in outputs)
    return "".join(output.get("text", "") for output in outputs), drawn


# Jupyter's kernel manager leaves its sockets to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")


def test_the_first_model_is_compressed_for_real(runner, monkeypatch, tmp_path):
    printed, drawn = run(runner, monkeypatch, tmp_path, "compress_your_first_model", REAL)
    assert drawn == 2
    scores = {
        line.split()[0]: float(line.split()[1]) for line in printed.splitlines() if " %" in line and " MB" in line
    }
    # That of the real model on Python's documentation, and one block of thirty does little harm.
    assert 10 < scores["dense"] < scores["learned"] < 40
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert len(plan["modules"]) == 7
    assert (tmp_path / "out" / "model.safetensors").stat().st_size > 500e6


@pytest.mark.parametrize(
    ("name", "pictures", "said"),
    [
        ("reading_ranks", 4, "kept before"),
        ("compare_the_methods", 3, "fisher+pivoted"),
        ("serve_and_fine_tune", 1, "reloaded with the same logits: True"),
    ],
)
def test_the_others_run_on_a_tiny_model(runner, monkeypatch, tmp_path, name, pictures, said):
    printed, drawn = run(runner, monkeypatch, tmp_path, name, TINY)
    assert drawn == pictures
    assert said in printed


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_are_small_and_named_by_the_runner(runner, path):
    assert path.stem in runner.ORDER
    assert path.stat().st_size < 300_000
