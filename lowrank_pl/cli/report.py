"""What ``lowrank report`` does: writes the page and the model card of a finished run; a plain typed function."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lowrank_pl.report.comparison import write_comparison_page
from lowrank_pl.report.model_card import refresh_card
from lowrank_pl.report.page import write_page
from lowrank_pl.report.run_record import read_run

__all__ = ["report"]

PAGE = "report.html"


def report(run: Path, *, output: Path | None = None, scores: Sequence[Path] = (), card: bool = True) -> Path:
    """Write a finished run, an export or a comparison down as one HTML page, and refresh the model card.

    The page needs no network and no other file. It has scores, health, the rank map, spectra and their cuts, where the
    budget went, samples, notes and how the model was made; what is missing is said, with the command that makes it.
    Files of scores in the folder are found by what they hold: what `doctor`, `evaluate` and `bench decode` write with
    --json, and results of lm-evaluation-harness.

    Args:
        run: Folder of `lowrank fit`, `export` or `compare`.
        output: The page; by default report.html in the folder.
        scores: More files of scores, one or several.
        card: Write the exported model's README.md again, with the same facts; its front matter stays.

    Returns:
        The page.

    Raises:
        ValueError: The folder holds no finished run, or a file of scores holds none.
    """
    path = run / PAGE if output is None else output
    if (run / "results.json").is_file() and not (run / "plan.json").exists():
        if scores:
            raise ValueError("--scores goes with a run or an export: a comparison has its own")
        write_comparison_page(run, path)
    else:
        record = read_run(run, scores=scores)
        write_page(record, path)
        for text in record.missing:
            print(f"missing  {text}")
        if card and refresh_card(record):
            assert record.model is not None
            print(f"card     {record.model / 'README.md'}")
    print(f"page     {path}, {path.stat().st_size / 1000:,.0f} kB")
    return path
