"""The inner ring never imports the outer one, and every public name is there and explained."""

from __future__ import annotations

import ast
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

import lowrank_pl

PACKAGE = Path(lowrank_pl.__file__).parent
OUTER = {"module", "data", "callbacks", "checkpointing", "compare", "interrupt", "progress", "short_run", "cli"}
OUTER |= {"__main__", "board", "rank_monitor", "text_samples"}
FORBIDDEN = ("lightning", "pytorch_lightning", "tensorboard", "torch.utils.tensorboard")


def all_modules():
    """Dotted names of the package's modules."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


INNER = [name for name in all_modules() if name.split(".")[1:2] == [] or name.split(".")[1] not in OUTER]


def loaded_by(code: str) -> set[str]:
    """Names in ``sys.modules`` of a fresh process that ran ``code``."""
    report = "\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code + report], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_inner_ring_leaves_lightning_out():
    assert {"lowrank_pl", "lowrank_pl.factors.compression", "lowrank_pl.methods.masks.ara"} <= set(INNER)
    assert "lowrank_pl.training.module" not in INNER
    loaded = loaded_by("\n".join(f"import {name}" for name in INNER))
    assert set(INNER) <= loaded
    assert not [name for name in FORBIDDEN if name in loaded]
    assert not [name for name in OUTER if f"lowrank_pl.{name}" in loaded]


def test_importing_the_package_leaves_lightning_out():
    loaded = loaded_by("import lowrank_pl\nassert lowrank_pl.__version__")
    assert "lowrank_pl.models.hf_format" in loaded
    assert not [name for name in FORBIDDEN if name in loaded]
    assert not [name for name in OUTER if f"lowrank_pl.{name}" in loaded]


@pytest.mark.parametrize("name", INNER)
def test_no_import_of_the_outer_ring_hides_in_a_function(name):
    path = PACKAGE.parent / Path(*name.split("."))
    source = (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text(encoding="utf-8")
    tree = ast.parse(source)
    checking = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in set(ast.walk(tree)) - checking:
        if isinstance(node, ast.Import):
            wanted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            wanted = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for target in wanted:
            assert target.split(".")[0] not in ("lightning", "pytorch_lightning", "tensorboard"), target
            assert target not in {f"lowrank_pl.{outer}" for outer in OUTER}, target


@pytest.mark.parametrize("name", lowrank_pl.__all__)
def test_public_names_resolve_and_are_explained(name):
    thing = getattr(lowrank_pl, name)
    assert thing.__module__.startswith("lowrank_pl."), "a name of someone else's"
    text = inspect.getdoc(thing)
    assert text
    assert "\n\n" in text, "one line is not enough for a public name"


def test_public_names_are_sorted_and_unknown_ones_an_error():
    assert lowrank_pl.__all__ == sorted(lowrank_pl.__all__)
    with pytest.raises(AttributeError, match="module 'lowrank_pl' has no attribute 'Nothing'"):
        _ = lowrank_pl.Nothing


@pytest.mark.parametrize("name", INNER)
def test_modules_export_what_they_say(name):
    module = sys.modules.get(name) or __import__(name, fromlist=["_"])
    assert module.__doc__
    for public in getattr(module, "__all__", ()):
        value = getattr(module, public)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert inspect.getdoc(value), public
