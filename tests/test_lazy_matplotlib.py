"""Importing any module of the package leaves matplotlib out: only what draws a figure loads it, when it draws."""

from __future__ import annotations

import json
import pkgutil
import subprocess
import sys

import lowrank_pl

SCRIPT = """
import builtins, importlib, json, sys

importers, real_import = [], builtins.__import__

def spy(name, globals=None, locals=None, fromlist=(), level=0):
    if name.split(".")[0] == "matplotlib":
        importers.append((globals or {}).get("__name__", ""))
    return real_import(name, globals, locals, fromlist, level)

builtins.__import__ = spy
for name in json.load(sys.stdin):
    importlib.import_module(name)
    # torchmetrics, which Lightning imports, loads matplotlib itself.
    if "matplotlib" in sys.modules and "torchmetrics" not in sys.modules:
        importers.append(name)
print(json.dumps([name for name in importers if name.startswith("lowrank_pl")]))
"""


def test_no_module_loads_matplotlib_when_it_is_imported():
    modules = [module.name for module in pkgutil.walk_packages(lowrank_pl.__path__, "lowrank_pl.")]
    # The outer ring comes last, since it loads Lightning.
    modules.sort(key=lambda name: name.startswith(("lowrank_pl.cli", "lowrank_pl.training", "lowrank_pl.__main__")))
    modules.remove("lowrank_pl.__main__")  # which would run the command
    assert "lowrank_pl.report.rank_map" in modules
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], input=json.dumps(modules), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []
