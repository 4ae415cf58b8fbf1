"""``lowrank export``."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowrank_pl.cli.parameters import Flat
from lowrank_pl.cli.plan_parts import PlanParts, plan_figures
from lowrank_pl.utils.files import check_output_files, write_json

if TYPE_CHECKING:
    from lowrank_pl.plans.plan import RankPlan

__all__ = ["export"]

_log = logging.getLogger(__name__)


def export(
    plan: Path,
    *,
    output: Path = Path("model"),
    keep: Sequence[float] | None = None,
    parts: Flat[PlanParts] = PlanParts(),
    merge: bool = False,
    device: str = "auto",
    json: Path | None = None,
) -> Path:
    """Turn any plan into a model that transformers loads, checked by a reload in a fresh process.

    Args:
        plan: A plan written by ``lowrank allocate`` or ``lowrank fit``, or edited by hand.
        output: Folder of the model; with keep, of the models.
        keep: Other sizes, each with a folder of its own, keep-0.90 and so on: --keep 0.9 0.8. They follow from the
            plan's component order, and each is contained in the larger ones.
        parts: Where base and factors are, if they are not where the plan says.
        merge: Write dense weights instead of factors, for runtimes that know no factors.
        device: cpu, cuda, ...; auto takes cuda where there is one.
        json: Write the figures there.

    Returns:
        The folder.
    """
    from lowrank_pl.export.export import check_destination
    from lowrank_pl.plans.plan import RankPlan
    from lowrank_pl.plans.resize import nested
    from lowrank_pl.report.finish import export_plan
    from lowrank_pl.report.scores import Row, row_table
    from lowrank_pl.utils.environment import pick_device

    check_output_files(json)
    given = RankPlan.load(plan)
    # Impossible sizes and folders are refused before anything is loaded.
    todo = {output: given} if keep is None else _folders(output, nested(given, keep))
    base = parts.base_of(given, plan)
    for folder in todo:
        check_destination(folder)
        if folder.exists() and folder.resolve() == Path(base.name).resolve():
            raise ValueError(f"{str(folder)!r} is the plan's base, which the export would replace: name another folder")
    model, tokenizer = base.load().to(pick_device(device)), base.tokenizer()
    factors = parts.factors_of(given, model, tokenizer)
    rows: list[Row] = []
    figures: list[dict[str, Any]] = []
    try:
        for folder, size in todo.items():
            _log.info("exporting %s, %d of %d", folder, len(rows) + 1, len(todo))
            report, size = export_plan(
                model, tokenizer, size, factors, folder, merge=merge, put_back=len(rows) + 1 < len(todo)
            )
            name = "export" if keep is None else folder.name
            rows.append(Row(name, kept_targeted=size.keep_targeted, kept_model=size.keep_model, bytes=report.bytes))
            made = {"model": str(folder), "bytes": report.bytes, "merged": report.merged, "verified": report.verified}
            figures.append({**plan_figures(size), **made})
    except BaseException:
        if rows:
            _log.warning("whole and checked are: %s", ", ".join(str(folder) for folder in [*todo][: len(rows)]))
        raise
    print(f"{row_table(rows)}\n\n{'model ' if keep is None else 'models'} {output}")
    if json is not None:
        write_json(json, figures[0] if keep is None else figures)
    return output


def _folders(output: Path, sizes: Mapping[float, RankPlan]) -> dict[Path, RankPlan]:
    """Return a folder in ``output`` for each size."""
    if (output / "config.json").exists():
        raise ValueError(f"{str(output)!r} is itself a model: name another folder for the models of several sizes")
    # Two digits, so that they sort, unless that would give two sizes one name.
    return {
        output / f"keep-{keep:.2f}" if round(keep, 2) == keep else output / f"keep-{keep}": plan
        for keep, plan in sizes.items()
    }
