"""``lowrank report``: page and model card of a finished run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lowrank_pl.utils.files import check_output_files

__all__ = ["report"]

PAGE = "report.html"


def report(run: Path, *, output: Path | None = None, scores: Sequence[Path] = (), card: bool = True) -> Path:
    """Write one HTML page about a finished run, an export or a comparison, and refresh the model card.

    The page needs no network and no other file. It shows scores, health, the rank map, spectra with their cuts, the
    distribution of the budget, samples, notes and how the model was made. It lists what is missing, each with the
    command that makes it. Files of scores in the folder are recognised by their content: what `doctor`, `evaluate` and
    `bench decode` write with --json, and results of lm-evaluation-harness.

    Args:
        run: Folder of `lowrank fit`, `export` or `compare`.
        output: Path of the page; by default report.html in the folder.
        scores: Further files of scores, one or several.
        card: Write the exported model's README.md again, with the same facts; its front matter is kept.

    Returns:
        Path of the page.

    Raises:
        ValueError: The folder holds no finished run, or a named file holds no scores.
    """
    from lowrank_pl.report.comparison import write_comparison_page
    from lowrank_pl.report.model_card import refresh_card
    from lowrank_pl.report.page import write_page
    from lowrank_pl.report.run_record import read_run

    path = run / PAGE if output is None else output
    check_output_files(output, inputs=[*scores, *run.glob("*.json")])
    if (run / "results.json").is_file() and not (run / "plan.json").exists():
        if scores:
            raise ValueError("--scores was given with a comparison, which has its own scores: leave it out")
        write_comparison_page(run, path)
    else:
        record = read_run(run, scores=scores)
        write_page(record, path)
        for text in record.missing:
            print(f"missing  {text}")
        if card and refresh_card(record):
            assert record.exported is not None
            print(f"card     {record.exported.folder / 'README.md'}")
    print(f"page     {path}, {path.stat().st_size / 1000:,.0f} kB")
    return path
