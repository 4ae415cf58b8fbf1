"""Numbers and tables as text that people read."""

from __future__ import annotations

import re
from collections.abc import Sequence

from tabulate import tabulate

__all__ = [
    "code",
    "duration",
    "escaped",
    "gigabytes",
    "longest_run",
    "megabytes",
    "memory_size",
    "percent",
    "rounded_perplexity",
    "table",
]


def table(head: Sequence[str], body: Sequence[Sequence[str]], fmt: str, *, align: Sequence[str] | None = None) -> str:
    """Return text cells as a table in ``tabulate``'s format ``fmt``; in Markdown, the cells' own text means nothing.

    Args:
        head: Column headers.
        body: Rows of cells.
        fmt: Name of the format, such as ``simple`` or ``github``.
        align: Alignment of each column; by default the first is ``left`` and the others are ``right``.
    """
    align = align or ("left", *["right"] * (len(head) - 1))
    if fmt == "github":
        head, body = [escaped(name) for name in head], [[escaped(cell) for cell in row] for row in body]
    return tabulate(body, headers=head, tablefmt=fmt, colalign=align, disable_numparse=True)


def escaped(text: str) -> str:
    """Return ``text`` on one line, without any meaning in Markdown or HTML; line breaks become ``<br>``.

    >>> escaped("<b> of a_b, *c*")
    '&#60;b&#62; of a_b, &#42;c&#42;'
    """
    # An underscore between letters means nothing, and names of layers are easier to read with it. Addresses, and names
    # behind an @, would become links.
    special = r"[\\`*\[\]<>|~$&#@]|:(?=//)|(?<=www)\.|(?<![^\W_])_|_(?![^\W_])"
    found = re.sub(special, lambda one: f"&#{ord(one.group())};", text.strip())
    return re.sub(r"\s*\n\s*", "<br>", found)


def code(text: str) -> str:
    """Return ``text`` as Markdown's code on one line, whatever backticks it holds.

    >>> code("a `b` c")
    '``a `b` c``'
    """
    line = " ".join(text.split())
    fence = "`" * (1 + longest_run(line, "`"))
    padding = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{padding}{line}{padding}{fence}"


def longest_run(text: str, mark: str) -> int:
    """Return how often ``mark``, one character, is repeated at most in a row.

    >>> longest_run("a `b` ```", "`")
    3
    """
    return max((len(run) for run in re.findall(f"{re.escape(mark)}+", text)), default=0)


def percent(share: float) -> str:
    """Return a fraction as a percentage.

    >>> percent(0.8049)
    '80.5 %'
    """
    return f"{100 * share:.1f} %"


def megabytes(count: int) -> str:
    """Return bytes as megabytes.

    >>> megabytes(538_060_672)
    '538.1 MB'
    """
    return f"{count / 1e6:,.1f} MB"


def rounded_perplexity(value: float) -> str:
    """Return a perplexity rounded to two decimals, or in scientific notation from 100,000 on.

    >>> rounded_perplexity(23.456), rounded_perplexity(1.5e7)
    ('23.46', '1.5e+07')
    """
    return f"{value:.2f}" if value < 1e5 else f"{value:.1e}"


def gigabytes(size: float) -> str:
    """Return bytes in GB, in MB below one GB, and ``-`` for none.

    >>> gigabytes(2.5e9), gigabytes(3e6), gigabytes(0)
    ('2.50 GB', '3 MB', '-')
    """
    if not size:
        return "-"
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.0f} MB"


def duration(seconds: float) -> str:
    """Return seconds in the largest unit (hours, minutes, seconds) of which there is at least one.

    >>> duration(4.2), duration(150), duration(7200)
    ('4.2 s', '2.5 min', '2.0 h')
    """
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.1f} s"


_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def memory_size(text: str) -> int:
    """Return the bytes that ``text`` names: a number with or without a unit, KB, MB, GB, TB or KiB, MiB, GiB.

    Raises:
        ValueError: It names no amount of memory.

    >>> memory_size("8GB"), memory_size("1.5 GiB"), memory_size("4096")
    (8000000000, 1610612736, 4096)
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([A-Z]*)\s*", text.upper())
    size = int(float(found[1]) * _UNITS[found[2]]) if found and found[2] in _UNITS else 0
    if not size:
        raise ValueError(
            f"{text!r} is no amount of memory: expected a positive number and a unit, such as 8GB or 512MiB"
        )
    return size
