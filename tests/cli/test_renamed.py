"""Old names of flags, keys and classes lead to the new ones."""

from __future__ import annotations

import inspect
from dataclasses import fields, is_dataclass
from importlib import import_module
from typing import get_type_hints

import pytest

from lowrank_pl.cli import fit
from lowrank_pl.cli.app import COMMANDS, TRAINING_COMMANDS, flags_of
from lowrank_pl.cli.renamed import CLASSES, NAMES, explain_old_names, table


@pytest.mark.parametrize(
    ("command", "words", "expected"),
    [
        ("allocate", "--windows 4", "--windows is --sequences now"),
        ("allocate", "--windows=4 --keep 0.5", "--windows is --sequences now"),
        ("fit", "--model.include *.q", "--model.include is --model.constraints.include now"),
        ("fit", "--model.narrow.share 0.5", "--model.narrow is --model.prune now"),
        ("fit", "--model.mask lowrank_pl.masks.ARS", "lowrank_pl.masks.ARS is lowrank_pl.methods.masks.ARS now"),
        ("fit", "--model.base random:llama --model.base.dtype bfloat16 --model.start.keep 1", None),
        ("fit", "--dry_run", None),
    ],
)  # fmt: skip
def test_words(command, words, expected):
    assert explain_old_names(command, words.split()) == expected


def test_keys_of_files(tmp_path):
    (tmp_path / "x.yaml").write_text("recipes: {mine: {learning: {windows: 3, steps: 2}}}\nscore_windows: {a: 3}\n")
    found = explain_old_names("compare", ["-c", str(tmp_path / "x.yaml")])
    assert "recipes.*.learning.windows is recipes.*.learning.sequences now" in found
    assert "score_windows is score_sequences now" in found


def fit_flags(above, function):
    for name, hint in get_type_hints(function).items():
        yield f"{above}{name}"
        for kind in (hint, *getattr(hint, "__args__", ())):
            if inspect.isclass(kind) and is_dataclass(kind):
                yield from (f"{above}{name}.{field.name}" for field in fields(kind))


def known_flags(command):
    if command not in TRAINING_COMMANDS:
        return {name.removeprefix("--") for argument in flags_of(command) for name in argument.names}
    return {flag for group, made in fit.CLASSES.items() for flag in fit_flags(f"{group}.", made.__init__)} | {"dry_run"}


@pytest.mark.parametrize("command", NAMES)
def test_new_names_exist_and_old_ones_do_not(command):
    known = known_flags(command)
    for old, new in NAMES[command].items():
        if "recipes" in old or " of " in new:
            continue
        assert new.split(",")[0] in known, new
        group = any(flag.startswith(f"{old}.") for flag in known)
        assert "=" in old or old not in known or group, old


def test_new_classes_exist():
    for new in CLASSES.values():
        module, _, name = f"lowrank_pl.{new}".rpartition(".")
        assert hasattr(import_module(module), name)


def test_the_table_has_every_old_name():
    lines = table().splitlines()
    assert len(lines) == 2 + 1 + sum(map(len, NAMES.values())) + len(CLASSES)
    assert "| `fit` | `model.dtype` | `model.base.dtype` |" in lines
    assert set(NAMES) <= set(COMMANDS)
