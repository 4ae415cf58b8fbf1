"""What jsonargparse says of words that it can't read, in one sentence that names what it would have read."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from importlib import import_module

__all__ = ["explain_parse_error"]

BASE_CLASSES = {"model.optimizer": "torch.optim.Optimizer"}
"""Base classes of the flags whose errors name none."""


REQUIRED = {
    "model.base.name": "a hub id, folder, .gguf file or package:NAME, such as meta-llama/Llama-3.2-1B",
    "model.plan": "the plan.json of a run",
    "model.settings.tokens": "how many tokens to train on, such as 1000000",
}
"""What is expected of flags that have no default."""


_HOMES = ("lightning.pytorch.", "lowrank_pl.methods.", "torch.optim.")
"""Modules whose classes are named to users: what ``lowrank fit`` adds by itself is not."""


def explain_parse_error(message: str) -> str:
    r"""Return what is wrong in one sentence: an unknown class or option with those that exist, or a wrong value.

    jsonargparse lists every type of a union with what the words lack for it, and names no class or option that exists.

    Args:
        message: The text of a ``jsonargparse.ArgumentError``.

    Returns:
        The sentence; the message on one line if it is of another kind.

    >>> explain_parse_error('Parser key "model.keep":\n  Expected a <class \'float\'>. Got value: abc')
    'Parser key "model.keep": Expected a float. Got value: abc'
    """
    line = re.sub(r"<class '([\w.]+\.)?(\w+)'>", r"\2", " ".join(message.split())).rstrip(".")
    found = re.search(r'Parser key "([^"]+)"', message)
    if found is None:
        absent = re.search(r"arguments are required: (.+)", line)
        # The name of the command comes first.
        return _required([name.partition(".")[2] for name in absent[1].split(", ")]) if absent else line
    flag = f"--{found[1]}"
    if re.search(r"Got value: None$", line):
        return _required([found[1]])
    option = re.search(r"class_path '([\w.]+)':\s*Option '([\w.]+)' is not", message)
    # Of an optimizer, the option comes first.
    later = re.search(r"Option '([\w.]+)' is not accepted.*?class_path='([\w.]+)'", message, re.S)
    if option or later:
        path, name = option.groups() if option else later.groups()[::-1]  # type: ignore[union-attr]
        kind = _class_at(path)
        names = [one for one in inspect.signature(kind).parameters if one not in ("self", "args", "kwargs", "params")]
        return f"{flag}: {kind.__name__} has no option {name!r}; it has {', '.join(names)}"
    value = re.search(r'class_path \'([\w.]+)\':\s*Parser key "([\w.]+)":\s*(.*)', message)
    if value:
        said = re.sub(r"<class '(\w+)'>", r"\1", value[3])
        return f"{flag}: {value[2]} of {value[1].rpartition('.')[2]}: {said}"
    given = re.search(r"Given value: (.*)|import path string: (.*)", message)
    names = [*_class_names(found[1], message), *_literals(message)]
    if given and names:
        return f"{flag} is {given[1] or given[2]!r}: expected one of {', '.join(names)}"
    return line


def _required(names: list[str]) -> str:
    """Return the sentence on flags that were not given."""
    expected = [f" ({REQUIRED[name]})" if name in REQUIRED else "" for name in names]
    flags = [f"--{name.removesuffix('.name')}{said}" for name, said in zip(names, expected, strict=True)]
    return f"{' and '.join(flags)} must be given"


def _class_at(path: str) -> type:
    module, _, name = path.rpartition(".")
    found: type = getattr(import_module(module), name)
    return found


def _class_names(flag: str, message: str) -> list[str]:
    """Return the names of the classes that ``flag`` takes; none if the given class is known."""
    if not re.search(r"import path|has no attribute|No module named", message, re.IGNORECASE):
        return []
    union = re.search(r"Subtypes: \[(.*)\]", message)
    paths = re.findall(r"(?:lightning|lowrank_pl|torch\.optim\.lr_scheduler)\.[\w.]+", union[1] if union else "")
    bases = {_class_at(path) for path in [*paths, BASE_CLASSES.get(flag)] if path}
    return sorted({kind.__name__ for base in bases for kind in _derived(base) if _is_named(kind)})


def _is_named(kind: type) -> bool:
    return kind.__module__.startswith(_HOMES) and not kind.__name__.startswith("_")


def _derived(kind: type) -> Iterator[type]:
    """Yield all classes below ``kind`` that can be made."""
    derived: type
    for derived in kind.__subclasses__():
        if not inspect.isabstract(derived):
            yield derived
        yield from _derived(derived)


def _literals(message: str) -> list[str]:
    texts = re.findall(r"- Expected a typing.Literal\[(.*?)\]", message)
    return list(dict.fromkeys(value.strip(" '") for text in texts for value in text.split(",")))
