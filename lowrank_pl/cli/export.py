"""``lowrank export``."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowrank_pl.cli.parameters import Flat
from lowrank_pl.cli.plan_parts import PlanParts, plan_figures
from lowrank_pl.models.settings import Base
from lowrank_pl.utils.files import check_output_files
from lowrank_pl.utils.json_files import write_figures

if TYPE_CHECKING:
    from lowrank_pl.export.hub import HubRepo
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
    any_size: bool = False,
    push_to_hub: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    device: str = "auto",
    json: Path | None = None,
) -> Path:
    """Turn any plan into a model that transformers loads, checked by a reload in a fresh process.

    Args:
        plan: A plan written by ``lowrank allocate`` or ``lowrank fit``, or edited by hand. With keep, also the folder
            of an export: smaller sizes are cut from it, without its base and its store.
        output: Folder of the model; with keep, of the models.
        keep: Other sizes, each with a folder of its own, keep-0.90 and so on: --keep 0.9 0.8. They follow from the
            plan's component order, and each is contained in the larger ones.
        parts: Where base and factors are, if they are not where the plan says.
        merge: Write dense weights instead of factors, for runtimes that know no factors.
        any_size: Write components beside the weights, so that load_compressed and --keep serve every size down from the
            folder's own. Otherwise a folder serves sizes that cut no layer it stores dense or pivoted.
        push_to_hub: Repository of the Hugging Face hub to upload the finished folder to: me/model. The token is that of
            hf auth login, or HF_TOKEN in the environment.
        private: Make a new repository private; by default as its owner has set.
        revision: Branch of the repository, made if it does not exist; main by default.
        device: cpu, cuda, ...; auto takes cuda where there is one.
        json: Write the figures there.

    Returns:
        The folder.
    """
    from lowrank_pl.export.export import check_destination, smaller_plan
    from lowrank_pl.export.hub import announce_upload, upload
    from lowrank_pl.models.base import model_files
    from lowrank_pl.plans.plan import RankPlan
    from lowrank_pl.plans.resize import components_below, nested
    from lowrank_pl.report.finish import ExportForm, export_cut, export_plan
    from lowrank_pl.report.scores import Row, bits_and_memory, row_table
    from lowrank_pl.utils.environment import pick_device

    check_output_files(json, inputs=model_files(plan))
    form = ExportForm(merge=merge, any_size=any_size)
    repo = _repository(push_to_hub, private=private, revision=revision, sizes=keep)
    source = plan if plan.is_dir() else None
    given = RankPlan.load(plan) if source is None else _exported_plan(source, keep, parts)
    parts.check_outputs(given, json)
    # Impossible sizes and folders are refused before anything is loaded.
    if keep is None:
        todo = {output: given}
    elif source is None:
        todo = _folders(output, nested(given, keep))
    else:
        sizes = sorted(set(keep), reverse=True)
        todo = _folders(output, {size: smaller_plan(source, given, size) for size in sizes})
    if any_size:
        if source is not None:
            raise ValueError(
                f"--any_size needs the factors: give the plan, {source / 'plan.json'}, instead of the folder"
            )
        for size in todo.values():
            if size.is_rounded:
                raise ValueError(
                    "the plan rounds numbers to a few bits, so that no smaller size is cut: leave out --any_size"
                )
            components_below(size)
    base = parts.base_of(given, plan) if source is None else Base(str(source))
    for folder in todo:
        check_destination(folder, sources=[base.name])
    if repo is not None:
        announce_upload(repo)
    place = pick_device(device)
    if source is None:
        model, tokenizer = base.load().to(place), base.tokenizer()
        factors = parts.factors_of(given, model, tokenizer)
    rows: list[Row] = []
    figures: list[dict[str, Any]] = []
    try:
        for folder, size in todo.items():
            _log.info("exporting %s, %d of %d", folder, len(rows) + 1, len(todo))
            if source is None:
                more = len(rows) + 1 < len(todo)
                report, size = export_plan(model, tokenizer, size, factors, folder, form=form, put_back=more)
            else:
                trust = parts.trust_remote_code
                report, size = export_cut(source, size.keep, folder, merge=merge, device=place, trust_remote_code=trust)
            name = "export" if keep is None else folder.name
            kept = {"kept_targeted": size.keep_targeted, "kept_model": size.keep_model}
            bits, memory = (None, None) if merge else bits_and_memory(size)
            rows.append(Row(name, **kept, bytes=report.bytes, bits=bits, memory=memory))
            made = {"model": str(folder), "bytes": report.bytes, "merged": report.merged, "verified": report.verified}
            figures.append({**plan_figures(size), **made, "nested_bytes": report.nested_bytes})
    except BaseException:
        if rows:
            _log.warning("whole and checked are: %s", ", ".join(str(folder) for folder in [*todo][: len(rows)]))
        raise
    print(f"{row_table(rows)}\n\n{'model ' if keep is None else 'models'} {output}")
    if any_size:
        sizes_beside = ", ".join(f"{one['nested_bytes'] / 1e6:,.1f} MB" for one in figures)
        print(f"nested {sizes_beside} of components for smaller sizes, beside the weights")
    if json is not None:
        write_figures(json, figures[0] if keep is None else figures)
    if repo is not None:
        (folder,) = todo
        print(f"hub    {upload(folder, repo)}")
    return output


def _exported_plan(source: Path, keep: Sequence[float] | None, parts: PlanParts) -> RankPlan:
    """Return the plan of the export in the folder ``source``, from which sizes are cut."""
    from lowrank_pl.export.export import plan_of_export

    if not keep:
        raise ValueError(f"{str(source)!r} is a folder: give a plan, or the sizes to cut from this export with --keep")
    if parts.base is not None or parts.store is not None:
        raise ValueError(
            f"sizes of the export {str(source)!r} are cut from its own weights: leave out --base and --store, or give "
            f"the plan, {source / 'plan.json'}"
        )
    return plan_of_export(source)


def _repository(
    name: str | None, *, private: bool | None, revision: str | None, sizes: Sequence[float] | None
) -> HubRepo | None:
    """Return the repository to upload to; None if there is none."""
    from lowrank_pl.export.hub import HubRepo

    if name is None:
        if private is not None or revision is not None:
            raise ValueError("--private and --revision say how to upload: name the repository with --push_to_hub")
        return None
    if sizes is not None and len(set(sizes)) != 1:
        raise ValueError(
            f"{len(set(sizes))} sizes can't go to one repository: give one --keep, or several "
            "commands with a --revision each"
        )
    return HubRepo(name, private, revision)


def _folders(output: Path, sizes: Mapping[float, RankPlan]) -> dict[Path, RankPlan]:
    """Return a folder in ``output`` for each size."""
    if (output / "config.json").exists():
        raise ValueError(f"{str(output)!r} is itself a model: name another folder for the models of several sizes")
    # Two digits, so that they sort, unless that would give two sizes one name.
    return {
        output / f"keep-{keep:.2f}" if round(keep, 2) == keep else output / f"keep-{keep}": plan
        for keep, plan in sizes.items()
    }
