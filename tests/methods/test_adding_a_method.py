"""The page *Adding a method*: its code is short, and its commands run with the methods that the code defines."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import sys

import pytest

from lowrank_pl.cli.app import main
from lowrank_pl.methods.masks import paper_of
from lowrank_pl.plans.plan import RankPlan
from tests.helpers import ROOT
from tests.helpers.tiny_training import fit, make_learner

PAGE = (ROOT / "docs" / "adding-a-method.md").read_text(encoding="utf-8")


def fenced(language):
    """The fenced blocks of a language on the page."""
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def statements(tree):
    """How many lines of code there are, without docstrings, imports and blank lines."""
    docstrings = {
        node.body[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None
    }
    found = {node for node in ast.walk(tree) if isinstance(node, ast.stmt)} - docstrings
    return sum(not isinstance(node, ast.Import | ast.ImportFrom) for node in found)


@pytest.fixture
def my_package(tmp_path, monkeypatch):
    """The page's module, where Python finds it."""
    monkeypatch.setenv("LOWRANK_HOME", str(tmp_path / "home"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_package", raising=False)
    (code,) = fenced("python")
    (tmp_path / "my_package.py").write_text(code, encoding="utf-8")
    yield tmp_path
    sys.modules.pop("my_package", None)


def words_of(command):
    """The words of the one line of the page that begins like this, after ``lowrank``."""
    (block,) = fenced("bash")
    (line,) = [line for line in block.splitlines() if line.startswith(f"lowrank {command} ")]
    return shlex.split(line)[1:]


def test_an_allocator_takes_four_lines_and_a_mask_ten():
    (code,) = fenced("python")
    classes = {node.name: statements(node) for node in ast.parse(code).body if isinstance(node, ast.ClassDef)}
    assert classes == {"Largest": 4, "SigmoidMask": 6, "Sigmoid": 4}


def test_the_page_s_allocator_makes_a_plan(my_package):
    path = my_package / "plan.json"
    main([*words_of("allocate"), "--output", str(path)])
    plan = RankPlan.load(path)
    assert (plan.method, len({module.rank for module in plan.modules.values()}) > 3) == ("largest", True)
    assert 0.48 < plan.keep_targeted <= 0.5


def test_the_page_s_mask_learns_a_plan(my_package):
    learner = make_learner(mask=importlib.import_module("my_package").Sigmoid())
    fit(learner, max_steps=4)
    plan = learner.plan()
    assert (plan.method, len({module.rank for module in plan.modules.values()}) > 3) == ("sigmoid", True)
    assert 0.48 < plan.keep_targeted <= 0.5


def test_fit_finds_the_page_s_mask(my_package, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    main([*words_of("fit"), "--run", str(my_package / "run"), "--dry_run"])
    assert "learning" in capsys.readouterr().out


def test_the_page_s_method_has_no_paper():
    assert paper_of("sigmoid") is None
