"""Checks of a folder's files: Python code that comes with it, digests, and components for smaller sizes."""

from __future__ import annotations

from pathlib import Path

from lowrank_pl.export.export import CODE_FILES
from lowrank_pl.export.health.diagnosis import Finding, first_few
from lowrank_pl.factors.components import NestedComponents
from lowrank_pl.models.digests import DIGESTS, changed_files
from lowrank_pl.plans.plan import RankPlan

__all__ = ["check_code", "check_components", "check_digests"]

OURS = {path.name: path for path in CODE_FILES}
"""The files of the package that exports hold copies of."""


def check_code(folder: Path, *, trusted: bool) -> Finding | None:
    """Return whether the Python files in ``folder`` are copies of the package's; None if it has no Python files.

    They are read and not run.

    Args:
        folder: The folder.
        trusted: Whether the user allowed the folder's code to be run.
    """
    files = sorted(file.relative_to(folder) for file in folder.rglob("*.py"))
    if not files:
        return None
    other = [str(file) for file in files if not _is_copy(folder / file, OURS.get(str(file)))]
    figures = {"files": [str(file) for file in files], "differ": other}
    if not other:
        return Finding("code", "healthy", f"its {len(files)} Python files are those of this package", figures)
    message = f"Python files that differ from this package's: {first_few(other)}"
    if trusted:
        return Finding("code", "healthy", f"{message}; the model's own code was allowed to run", figures)
    advice = "nothing here has run them; read them before you pass trust_remote_code, or export the model again"
    return Finding("code", "warning", message, figures, advice)


def _is_copy(file: Path, ours: Path | None) -> bool:
    return ours is not None and file.is_file() and file.read_bytes() == ours.read_bytes()


def check_digests(folder: Path, *, expected: bool) -> Finding | None:
    """Return whether the files in ``folder`` are as they were exported; None if that is not known of its kind.

    Args:
        folder: The folder.
        expected: Whether it holds an export, which has digests unless an earlier version wrote it.
    """
    changed = changed_files(folder)
    if changed is None:
        advice = "export it again"
        message = f"there is no {DIGESTS}, so that damage to the weights is found only where it makes them absurd"
        return Finding("digests", "warning", message, {}, advice) if expected else None
    if not changed:
        return Finding("digests", "healthy", "all files are as they were exported", {"changed": []})
    weights = [name for name in changed if name.endswith(".safetensors") or name == DIGESTS]
    others = [name for name in changed if name not in weights]
    message = f"changed or lost since the export: {first_few([*weights, *others])}"
    if weights:
        return Finding("digests", "broken", message, {"changed": changed}, "copy the folder again or export it again")
    advice = f"copy the folder again, unless you changed them; then delete {DIGESTS}"
    return Finding("digests", "warning", message, {"changed": changed}, advice)


def check_components(folder: Path, plan: RankPlan) -> Finding | None:
    """Return whether the components for smaller sizes are whole; None if the folder has none.

    Each has to be there, of the plan's factors and shapes, and finite.

    Args:
        folder: The folder.
        plan: Its plan.
    """
    nested = NestedComponents.of_export(folder, plan)
    if not nested.folder.is_dir():
        return None
    try:
        wrong = nested.check()
    except ValueError as error:
        wrong = [str(error)]
    figures = {"layers": len(nested.names), "bytes": nested.bytes, "wrong": wrong}
    if wrong:
        advice = "the model in its own size does not need them; export it again for smaller ones"
        return Finding("components", "broken", f"smaller sizes can't be cut: {first_few(wrong)}", figures, advice)
    return Finding("components", "healthy", f"there are {nested.describe()}, all finite", figures)
