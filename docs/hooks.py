"""What the build adds to the pages: each command's own help, and formulas as MathML, which needs no script."""

from __future__ import annotations

import inspect
import io
import os
import re
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from html import escape, unescape
from importlib import import_module
from typing import Any
from unittest.mock import patch

COMMANDS = "<!-- commands -->"
_FACTS = re.compile(r"(.*?)\s*\(((?:required|type:|default:).*)\)", re.DOTALL)
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


@dataclass
class Group:
    """Options under one heading of a command's help.

    Args:
        title: The heading.
        options: Flags and what is said of them.
    """

    title: str
    options: list[tuple[str, str]] = field(default_factory=list)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Return the page's Markdown; that of the commands with the help of each."""
    if COMMANDS not in markdown:
        return markdown
    from lowrank_pl.cli.app import COMMANDS as NAMES

    return markdown.replace(COMMANDS, "\n\n".join(command_page(name) for name in NAMES))


def on_page_content(html: str, **_: Any) -> str:
    """Return the page's HTML with its formulas as MathML."""
    if not _FORMULA.search(html):
        return html
    from latex2mathml.converter import convert

    return _FORMULA.sub(lambda m: convert(unescape(m[2]), display="block" if m[1] == "div" else "inline"), html)


def lightning_help(command: str) -> str:
    """Return what ``--help`` of a command that trains prints, every option on a line of its own."""
    from lowrank_pl.cli.app import main

    printed = io.StringIO()
    with patch.dict(os.environ, {"COLUMNS": "100000"}), redirect_stdout(printed):
        try:
            main([command, "--help"])
        except SystemExit as done:
            if done.code:
                raise RuntimeError(f"`lowrank {command} --help` ended with {done.code}") from None
    return printed.getvalue()


def read_help(text: str) -> list[Group]:
    """Return the groups of options in the help of a command that trains.

    Raises:
        ValueError: The text holds no options.
    """
    groups: list[Group] = []
    for line in text.splitlines()[1:]:
        if re.fullmatch(r"\S.*:", line):
            groups.append(Group(line[:-1]))
        elif groups and (found := re.fullmatch(r"  (-.*?)(?:  +(\S.*))?", line)):
            groups[-1].options.append((found[1], found[2] or ""))
        elif line.strip() and groups and groups[-1].options:
            flags, before = groups[-1].options.pop()
            groups[-1].options.append((flags, f"{before} {line.strip()}".strip()))
    groups = [group for group in groups if group.options]
    if not groups:
        raise ValueError(f"no option was found in the help that begins with {text[:200]!r}")
    return groups


def flag_group(command: str) -> Group:
    """Return the options of a command that cyclopts reads."""
    from lowrank_pl.cli.app import flags_of

    group = Group("options")
    for flag in flags_of(command):
        if not flag.show:
            continue
        default = flag.field_info.default
        values = default if isinstance(default, (list, tuple)) else [default]
        facts = "required" if flag.required else f"default: {' '.join(map(str, values))}"
        known = flag.required or not (default is None or default == {} or values == ())
        group.options.append((_usage(flag), f"{flag.parameter.help} ({facts})" if known else flag.parameter.help))
    return group


def _usage(flag: Any) -> str:
    """Return how a flag is written: ``--keep KEEP ...``."""
    word = flag.name.rpartition(".")[2].removeprefix("--").upper()
    choices = flag.get_choices()
    value = "" if flag.hint is bool else f" {{{','.join(choices)}}}" if choices else f" {word}"
    several = " ..." if flag.token_count()[1] else ""
    return f"{f'{word}, ' if flag.index is not None else ''}{flag.name}{value}{several}"


def command_page(command: str) -> str:
    """Return the section of one command, Markdown with HTML."""
    from lowrank_pl.cli.app import COMMANDS as NAMES
    from lowrank_pl.cli.app import TRAINING_COMMANDS

    path, sentence = NAMES[command]
    if command in TRAINING_COMMANDS:
        groups, paragraphs = read_help(lightning_help(command)), [sentence]
    else:
        module, _, name = path.partition(":")
        description = inspect.getdoc(getattr(import_module(module), name)) or ""
        groups, paragraphs = [flag_group(command)], description.partition("\n\nArgs:")[0].split("\n\n")
    parts = [f"## lowrank {command}", *(f"<p>{_text(part)}</p>" for part in paragraphs)]
    for group in groups:
        options = "\n".join(_option(flags, text) for flags, text in group.options)
        found = f'<dl class="options">\n{options}\n</dl>'
        if len(groups) > 1:
            found = f"<details><summary>{_text(_title(group))}</summary>\n{found}\n</details>"
        parts.append(found)
    return "\n\n".join(parts)


def _title(group: Group) -> str:
    """Return a group's heading: the flag that all of the group's begin with, and the first sentence."""
    if group.title == "options":
        return "General"
    parents = [flags.split()[0] for flags, _ in group.options if flags.endswith(" CONFIG")]
    return f"{f'``{parents[0]}`` ' if parents else ''}{group.title.split('. ')[0]}"


def _option(flags: str, text: str) -> str:
    found = _FACTS.fullmatch(text)
    said, facts = (found[1], found[2]) if found else (text, "")
    facts = re.sub(r"<class '(\w+)'>", r"\1", facts)
    below = f'<div class="facts">{escape(facts)}</div>' if facts else ""
    return f"<dt><code>{escape(flags)}</code></dt>\n<dd>{_text(said)}{below}</dd>"


def _text(said: str) -> str:
    """Return plain text as HTML, with what stands in double backticks as code."""
    return re.sub(r"``(.+?)``", r"<code>\1</code>", escape(" ".join(said.split()), quote=False))
