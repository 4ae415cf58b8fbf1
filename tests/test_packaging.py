"""A wheel brings everything along that the commands need, and works without the repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from zipfile import ZipFile

import pytest

from tests.helpers import ROOT

PIP = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", "--no-input"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy: a build leaves folders behind."""
    pytest.importorskip("pip")
    folder = tmp_path_factory.mktemp("packaging")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        (folder / "source").mkdir(exist_ok=True)
        shutil.copy(ROOT / name, folder / "source")
    for name in ("lowrank_pl", "configs"):
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    words = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(folder / "built"), folder / "source"]
    subprocess.run([*PIP, *words], check=True, timeout=300)
    (built,) = (folder / "built").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel):
    """The folder that the wheel is installed in, and nothing else."""
    target = wheel.parent / "installed"
    subprocess.run([*PIP, "install", "--no-deps", "--no-index", "--target", target, wheel], check=True, timeout=300)
    return target


def in_installed(installed, *words):
    """Return what a program prints that finds the installed package, and its dependencies behind it."""
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, *words], cwd=installed, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_module_and_data_file_is_in_the_wheel(wheel):
    package = ROOT / "lowrank_pl"
    files = [path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    expected = {f"lowrank_pl/{path.relative_to(package)}" for path in files}
    expected |= {f"lowrank_pl/{path.relative_to(ROOT)}" for path in (ROOT / "configs").rglob("*.yaml")}
    names = {name for name in ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == expected
    assert {"lowrank_pl/py.typed", "lowrank_pl/configs/demo.yaml", "lowrank_pl/report/templates/run.html"} <= names


def test_the_command_works_without_the_repository(installed):
    assert "evaluate-plan" in in_installed(installed, "bin/lowrank", "--help")


def test_shipped_configurations_are_found_without_the_repository(installed):
    code = (
        "from lowrank_pl.cli.config_files import find_config; print(find_config('demo'), find_config('allocate/strs'))"
    )
    expected = [installed / "lowrank_pl" / "configs" / name for name in ("demo.yaml", "allocate/strs.yaml")]
    assert in_installed(installed, "-c", code).split() == [str(path) for path in expected]
