"""What the build adds to the pages: each command's own help, and formulas as MathML, which needs no script."""

from __future__ import annotations

import io
import os
import re
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from html import escape, unescape
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
    from lowrank_pl.cli.main import FUNCTIONS

    return markdown.replace(COMMANDS, "\n\n".join(command_page(name) for name in ("fit", *FUNCTIONS)))


def on_page_content(html: str, **_: Any) -> str:
    """Return the page's HTML with its formulas as MathML."""
    if not _FORMULA.search(html):
        return html
    from latex2mathml.converter import convert

    return _FORMULA.sub(lambda m: convert(unescape(m[2]), display="block" if m[1] == "div" else "inline"), html)


def help_of(command: str) -> str:
    """Return what ``lowrank COMMAND --help`` prints, every option on a line of its own."""
    from lowrank_pl.cli.main import main

    printed = io.StringIO()
    with patch.dict(os.environ, {"COLUMNS": "100000"}), redirect_stdout(printed):
        try:
            main([command, "--help"])
        except SystemExit as done:
            if done.code:
                raise RuntimeError(f"`lowrank {command} --help` ended with {done.code}") from None
    return printed.getvalue()


def read_help(text: str) -> tuple[str, list[Group]]:
    """Return the description in a command's help, and its groups of options.

    Raises:
        ValueError: The text holds no options.
    """
    said: list[str] = []
    groups: list[Group] = []
    for line in text.splitlines()[1:]:
        if re.fullmatch(r"\S.*:", line):
            groups.append(Group(line[:-1]))
        elif not groups:
            said.append(line)
        elif found := re.fullmatch(r"  (-.*?)(?:  +(\S.*))?", line):
            groups[-1].options.append((found[1], found[2] or ""))
        elif line.strip() and groups[-1].options:
            flags, before = groups[-1].options.pop()
            groups[-1].options.append((flags, f"{before} {line.strip()}".strip()))
    groups = [group for group in groups if group.options]
    if not groups:
        raise ValueError(f"no option was found in the help that begins with {text[:200]!r}")
    return "\n".join(said).strip(), groups


def command_page(command: str) -> str:
    """Return the section of one command, Markdown with HTML."""
    from lowrank_pl.cli.main import FIT

    said, groups = read_help(help_of(command))
    if command == "fit":  # its help begins with Lightning's own words for a Trainer's method
        said = FIT
    parts = [f"## lowrank {command}", *(f"<p>{_text(part)}</p>" for part in said.split("\n\n") if part)]
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
