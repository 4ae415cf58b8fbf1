"""Who may import whom. The tables below are the rule; CONTRIBUTING.md links here."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest

import lowrank_pl

# Each sub-package, from the ground up, and the sub-packages that it may import besides itself.
MAY_IMPORT = {
    "utils": "",
    "text": "utils",
    "models": "utils",
    "plans": "utils models",
    "factors": "utils models plans",
    "evaluate": "utils models plans factors",
    "serving": "models",
    "export": "utils text models plans factors evaluate serving",
    "calibration": "utils text models plans factors",
    "methods.allocate": "utils text models plans factors evaluate calibration",
    "methods.masks": "utils models plans factors methods.allocate",
    "methods.refit": "utils text models plans factors calibration",
    "methods.quantize": "utils text models plans factors evaluate calibration",
    "methods.prune": "utils models plans factors export calibration",
    "methods": "utils plans factors methods.allocate methods.masks methods.refit methods.prune methods.quantize",
    "report": "utils models plans factors evaluate export calibration methods.allocate methods.masks methods.refit "
    "methods.quantize",
    "costs": "utils text models plans factors evaluate serving calibration methods.masks methods.prune",
    "training": "utils text models plans factors evaluate export calibration methods.allocate methods.masks "
    "methods.refit methods.prune methods.quantize methods report",
    "cli": "utils text models plans factors evaluate export calibration methods.allocate methods.refit "
    "methods.prune methods.quantize methods report costs training",
}

# Libraries that only some may import: sub-packages or single modules.
ONLY_IN = {
    "triton": "serving.triton_rows",
    "vllm": "serving.vllm_method",
    "lightning": "training cli",
    "pytorch_lightning": "",
    "tensorboard": "training cli",
    "torch.utils.tensorboard": "training cli",
    # Slow to import, so it comes in only where a file is read, or settings of any type are.
    "pydantic": "utils.checks utils.json_files plans.plan_schema report.file_schemas",
    "matplotlib": "utils.figures evaluate.size_curve report.comparison report.rank_history report.rank_map",
}

# Libraries that some may not import, and the modules of theirs that may all the same.
NOT_IN = {("utils", "transformers"): "", ("plans", "transformers"): "plans.budget plans.constraints"}

# Modules that need a library which the package does not depend on.
NEEDS = {"serving.vllm_method": "vllm"}

PACKAGE = Path(lowrank_pl.__file__).parent
LIGHTNING = ("lightning", "pytorch_lightning", "tensorboard", "torch.utils.tensorboard")


class Import(NamedTuple):
    """One imported name: ``from module import name``, or ``import module``, where the name is empty."""

    module: str
    name: str


def find_modules() -> dict[str, Path]:
    """Return the files of the package's modules by dotted name, without the leading ``lowrank_pl.``."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = find_modules()
OUTER = {name for name in MODULES if name.split(".")[0] in ("training", "cli", "__main__")}
INNER = [name for name in MODULES if name not in OUTER and (name not in NEEDS or find_spec(NEEDS[name]))]


def full(name: str) -> str:
    return f"lowrank_pl.{name}".rstrip(".")


def inside(name: str, packages: str) -> bool:
    """Tell whether ``name`` is, or lies in, one of the space-separated ``packages``."""
    return any(f"{name}.".startswith(f"{package}.") for package in packages.split())


def room_of(module: str) -> str:
    """Return the sub-package that ``module`` lies in: the longest that the table names."""
    return max((room for room in MAY_IMPORT if inside(module, room)), key=len, default="")


@cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


@cache
def imports_of(module: str) -> tuple[Import, ...]:
    """Return all imports of ``module``, in functions and under ``TYPE_CHECKING`` too, by full names."""
    package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
    found = []
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Import):
            found += [Import(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = full(package).split(".")[: len(full(package).split(".")) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                is_module = f"{source}.{alias.name}".removeprefix("lowrank_pl.") in MODULES
                found.append(Import(f"{source}.{alias.name}", "") if is_module else Import(source, alias.name))
    return tuple(found)


def own_imports(module: str) -> list[Import]:
    """Return the imports from lowrank_pl, the modules named without ``lowrank_pl.``."""
    ours = [one for one in imports_of(module) if inside(one.module, "lowrank_pl")]
    return [Import(one.module.removeprefix("lowrank_pl").lstrip("."), one.name) for one in ours]


@cache
def exported_by(module: str) -> frozenset[str]:
    """Return the names in ``__all__`` as the source lists them; none where a package computes them."""
    for node in tree_of(module).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return frozenset(ast.literal_eval(node.value))
    return frozenset()


def test_table_names_every_sub_package():
    folders = {".".join(path.parent.relative_to(PACKAGE).parts) for path in PACKAGE.rglob("__init__.py")} - {""}
    assert {room_of(folder) for folder in folders} == set(MAY_IMPORT)


def test_imports_run_downwards():
    rooms = list(MAY_IMPORT)
    for place, room in enumerate(rooms):
        assert set(MAY_IMPORT[room].split()) <= set(rooms[:place]), room


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_sub_package_imports_only_what_the_table_allows(room):
    allowed = {room, *MAY_IMPORT[room].split()}
    wrong = [
        f"{module} imports {target}"
        for module in MODULES
        if room_of(module) == room
        for target, _ in own_imports(module)
        if target != "version" and room_of(target) not in allowed
    ]
    assert not wrong


@pytest.mark.parametrize("library", ONLY_IN)
def test_library_is_imported_only_where_it_may_be(library):
    wrong = [
        module
        for module in MODULES
        for target, name in imports_of(module)
        if (inside(target, library) or f"{target}.{name}" == library) and not inside(module, ONLY_IN[library])
    ]
    assert not wrong


@pytest.mark.parametrize(("room", "library"), NOT_IN)
def test_library_is_not_imported_where_it_may_not_be(room, library):
    wrong = [
        module
        for module in MODULES
        if inside(module, room) and not inside(module, NOT_IN[room, library])
        for target, _ in imports_of(module)
        if inside(target, library)
    ]
    assert not wrong


@pytest.mark.parametrize("module", MODULES)
def test_names_that_a_module_imports_are_exported_where_they_come_from(module):
    unlisted = [f"{source}.{name}" for source, name in own_imports(module) if name and name not in exported_by(source)]
    assert not unlisted


def test_every_re_export_is_imported():
    used = {(source, name) for module in MODULES for source, name in own_imports(module)}
    unused = [
        f"{module}.{name}"
        for module, path in MODULES.items()
        if path.name != "__init__.py"
        for _, name in own_imports(module)
        if name in exported_by(module) and (module, name) not in used
    ]
    assert not unused


@pytest.mark.parametrize("module", [name for name, path in MODULES.items() if path.name == "__init__.py"])
def test_sub_package_says_what_it_is_for_and_its_public_names_resolve(module):
    package = importlib.import_module(full(module))
    assert package.__doc__
    for name in getattr(package, "__all__", ()):
        assert getattr(package, name) is not None


@pytest.mark.parametrize("module", MODULES)
def test_names_of_ours_in_texts_exist(module):
    source = MODULES[module].read_text(encoding="utf-8")
    for name in set(re.findall(r"(?<![\w/.-])lowrank_pl(?:\.[A-Za-z_]\w*)+", source)):
        parts = name.split(".")
        known = max(size for size in range(1, len(parts) + 1) if ".".join(parts[1:size]) in MODULES)
        thing = importlib.import_module(".".join(parts[:known]))
        for part in parts[known:]:
            assert hasattr(thing, part), name
            thing = getattr(thing, part)


IMPORTS = """
import builtins, importlib, json, sys

importers, real_import = [], builtins.__import__

def spy(name, globals=None, locals=None, fromlist=(), level=0):
    if name.split(".")[0] == "matplotlib":
        importers.append((globals or {}).get("__name__", ""))
    return real_import(name, globals, locals, fromlist, level)

builtins.__import__ = spy
found = {}
for ring, names in json.loads(sys.argv[1]).items():
    for name in names:
        importlib.import_module(name)
        # torchmetrics, which Lightning imports, loads matplotlib itself.
        if "matplotlib" in sys.modules and "torchmetrics" not in sys.modules:
            importers.append(name)
    found[ring] = sorted(sys.modules)
print(json.dumps(found | {"matplotlib": [name for name in importers if name.startswith("lowrank_pl")]}))
"""


@pytest.fixture(scope="module")
def loaded() -> dict[str, list[str]]:
    """What a new process has imported, ring by ring, and which modules of ours imported matplotlib."""
    rings = {"root": ["lowrank_pl"], "inner": [full(name) for name in INNER]}
    rings["outer"] = [full(name) for name in sorted(OUTER - {"__main__"})]  # which would run the command
    words = [sys.executable, "-c", IMPORTS, json.dumps(rings)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_no_module_loads_matplotlib_when_it_is_imported(loaded):
    assert full("report.rank_map") in loaded["inner"]
    assert loaded["matplotlib"] == []


def test_importing_all_but_the_outer_ring_leaves_lightning_out(loaded):
    assert {full(name) for name in INNER} <= set(loaded["inner"])
    assert not {*LIGHTNING, *map(full, OUTER)} & set(loaded["inner"])


def test_importing_the_package_leaves_lightning_out(loaded):
    assert not {*LIGHTNING, *map(full, OUTER)} & set(loaded["root"])


SCHEMAS = ("plans.plan_schema", "report.file_schemas")


@pytest.mark.parametrize("module", sorted({*MODULES} - {*SCHEMAS}))
def test_schemas_and_pydantic_are_imported_inside_functions(module):
    above = [node for node in tree_of(module).body if isinstance(node, ast.Import | ast.ImportFrom)]
    named = {getattr(node, "module", None) or node.names[0].name for node in above}
    assert not named & {"pydantic", *map(full, SCHEMAS)}


@pytest.mark.parametrize("name", lowrank_pl.__all__)
def test_public_names_resolve_and_are_explained(name):
    thing = getattr(lowrank_pl, name)
    assert thing.__module__.startswith("lowrank_pl."), "a name of someone else's"
    text = inspect.getdoc(thing)
    assert text
    assert "\n\n" in text, "one line is not enough for a public name"


def test_public_names_are_sorted_and_unknown_ones_an_error():
    assert lowrank_pl.__all__ == sorted(lowrank_pl.__all__)
    with pytest.raises(AttributeError, match="Nothing"):
        _ = lowrank_pl.Nothing


@pytest.mark.parametrize("name", INNER)
def test_modules_export_what_they_say(name):
    module = importlib.import_module(full(name))
    assert module.__doc__
    for public in getattr(module, "__all__", ()):
        value = getattr(module, public)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert inspect.getdoc(value), public
