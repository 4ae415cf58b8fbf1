"""Old names of commands, flags, YAML keys and classes, and what they are called now.

``python -m lowrank_pl.cli.renamed`` prints the table as Markdown, for the changelog.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from lowrank_pl.cli.arguments import SHORT
from lowrank_pl.cli.config_files import ConfigFileError, find_config, read_config

__all__ = ["COMMAND_NAMES", "explain_old_names"]

COMMAND_NAMES = {"narrow": "prune"}


PACKAGE = "lowrank_pl."


_SEQUENCES = {"windows": "sequences"}


NAMES: dict[str, dict[str, str]] = {
    "fit": {
        "model.base": "model.base.name",
        "model.dtype": "model.base.dtype",
        "model.trust_remote_code": "model.base.trust_remote_code",
        "model.include": "model.constraints.include",
        "model.exclude": "model.constraints.exclude",
        "model.multiple_of": "model.constraints.multiple_of",
        "model.floors": "model.constraints.floors",
        "model.storage": "model.constraints.storage",
        "model.cosine": "model.lr_scheduler, with the value cosine",
        "model.start": "model.start.plan",
        "model.keep_start": "model.start.keep",
        "model.keep_steps": "model.start.steps",
        "model.record_order": "model.start.record_order",
        "model.narrow": "model.prune",
        "model.rest_every": "model.compute.inactive_gate_stride",
        "model.gradient_checkpointing": "model.compute.gradient_checkpointing",
        "data.text": "data.learning.text",
        "data.length": "data.learning.length",
        "data.windows": "data.learning.sequences",
        "data.sequences": "data.learning.sequences",
        "data.statistics_text": "data.statistics.text",
        "data.statistics_length": "data.statistics.length",
        "data.statistics_windows": "data.statistics.sequences",
        "data.statistics_sequences": "data.statistics.sequences",
        "data.validation_text": "data.validation.text",
        "data.validation_windows": "data.validation.sequences",
        "data.validation_sequences": "data.validation.sequences",
        "data.validation_batch_size": "data.validation.batch_size",
        "data.shuffle": "data.seed, where null keeps the order of the text",
        "finish.score_text": "finish.score.text",
        "finish.score_length": "finish.score.length",
        "finish.score_windows": "finish.score.sequences",
        "finish.score_sequences": "finish.score.sequences",
        "finish.refit.windows": "finish.refit.sequences",
        "dry_run=h100": "dry_run, without a value: times are measured on this machine",
    },
    "evaluate": {
        **_SEQUENCES,
        **{name: f"{name} of `lowrank evaluate-plan`" for name in ("plan", "keep_curve", "base", "store", "output")},
    },
    "evaluate-plan": {
        **_SEQUENCES,
        **{name: f"{name} of `lowrank evaluate` on an export" for name in ("prompts", "tasks", "reference")},
    },
    "allocate": _SEQUENCES,
    "decompose": {**_SEQUENCES, "dry_run=h100": "dry_run, without a value: times are measured on this machine"},
    "refit": {"settings.windows": "settings.sequences"},
    "prune": _SEQUENCES,
    "doctor": _SEQUENCES,
    "compare": {
        "calibration": "text",
        "calibration_length": "length",
        "calibration_windows": "sequences",
        "score_windows": "score_sequences",
        "recipes.*.narrow": "recipes.*.prune",
        "recipes.*.refit.windows": "recipes.*.refit.sequences",
        "recipes.*.learning.windows": "recipes.*.learning.sequences",
        "recipes.*.learning.rest_every": "recipes.*.learning.inactive_gate_stride",
        "dry_run=h100": "dry_run, without a value: times are measured on this machine",
    },
    "bench": {"rest_every": "inactive_gate_stride"},
}
"""By command, what flags and YAML keys were called, and are called now; with a value behind ``=`` where that is old."""


CLASSES = {
    "masks.Staircase": "methods.masks.ARA",
    "masks.PerValue": "methods.masks.LLRC",
    "masks.Tanh": "methods.masks.DobiSVD",
    "masks.ARS": "methods.masks.ARS",
    "masks.Fermi": "methods.masks.Fermi",
    "masks.Rescaled": "methods.masks.Rescaled",
}
"""What mask classes were called, and are called now. Allocators and recipes know their own former names."""


def explain_old_names(command: str, words: Sequence[str]) -> str | None:
    """Return which old names are among ``words`` and the files that they name, and the new ones; None without any.

    Args:
        command: The command.
        words: What follows it, which the command could not understand.

    >>> explain_old_names("allocate", ["--windows", "16"])
    '--windows is --sequences now'
    """
    found = []
    for flag, name, value in _given(words):
        for old, new in NAMES.get(command, {}).items():
            if _is_old(name, str(value), old, new):
                found.append(f"{flag}{old.partition('=')[0]} is {flag}{new} now")
        renamed = CLASSES.get(str(value).removeprefix(PACKAGE))
        if renamed is not None:
            found.append(f"{value} is {PACKAGE}{renamed} now")
    return "; ".join(dict.fromkeys(found)) or None


def _is_old(name: str, value: str, old: str, new: str) -> bool:
    old, equals, old_value = old.partition("=")
    if equals:
        return name == old and value == old_value
    # A new group may be called as an old value was.
    below = not new.startswith(f"{old}.") and fnmatchcase(name, f"{old}.*")
    return below or fnmatchcase(name, old)


def _given(words: Sequence[str]) -> Iterator[tuple[str, str, Any]]:
    """Yield what stands before every name that is given, the name, and its value."""
    for place, word in enumerate(words):
        flag, equals, value = word.partition("=")
        following = value if equals else next(iter(words[place + 1 :]), "")
        if flag in ("-c", "--config"):
            try:
                settings = read_config(find_config(following))
            except ConfigFileError:
                continue
            yield from (("", name, value) for name, value in _leaves(settings))
        elif flag.startswith("--"):
            name = flag[2:].replace("-", "_")
            yield "--", SHORT.get(name, name), following


def _leaves(settings: Mapping[Any, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        name = f"{above}{key}"
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{name}.")
        else:
            yield name, value


def table() -> str:
    """Return all old names with the new ones as a Markdown table."""
    rows = [("", f"`lowrank {old}`", f"`lowrank {new}`") for old, new in COMMAND_NAMES.items()]
    for command, names in NAMES.items():
        rows += [(f"`{command}`", f"`{old}`", new if " " in new else f"`{new}`") for old, new in names.items()]
    rows += [("classes", f"`{PACKAGE}{old}`", f"`{PACKAGE}{new}`") for old, new in CLASSES.items()]
    lines = ["| command | was | is |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
