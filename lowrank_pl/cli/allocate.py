"""``lowrank allocate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lowrank_pl.cli.parameters import Flat, Settings
from lowrank_pl.cli.plan_parts import plan_figures, plan_line
from lowrank_pl.factors.settings import Decomposition
from lowrank_pl.models.settings import Base
from lowrank_pl.plans.constraints import Constraints
from lowrank_pl.text.settings import Calibration
from lowrank_pl.utils.files import check_output_files, write_json

if TYPE_CHECKING:
    from lowrank_pl.plans.plan import RankPlan

__all__ = ["allocate"]


def allocate(
    base: Flat[Base],
    *,
    method: str = "uniform",
    settings: Settings | None = None,
    keep: float = 0.8,
    calibration: Flat[Calibration] = Calibration(),
    constraints: Flat[Constraints] = Constraints(),
    decomposition: Decomposition | None = None,
    output: Path = Path("plan.json"),
    store: Path | None = None,
    device: str = "auto",
    json: Path | None = None,
) -> RankPlan:
    """Write a rank plan without training, by a closed-form allocator.

    Weights are decomposed as the allocator's paper does, unless --decomposition says otherwise: two_sided for fisher,
    asvd for strs, whitened for all others.

    Args:
        base: The model; an export has its type too.
        method: The allocator: uniform, energy, drank, svdllm_v2, strs, zs_svd, or fisher.
        settings: Settings of the allocator, such as --settings.rounds 5 for zs_svd; an unknown one is an error that
            lists those that exist.
        keep: Fraction of the targeted parameters to keep.
        calibration: Text that the factors are made from.
        constraints: Which linear layers are compressed, and what their ranks and storage must respect.
        decomposition: How weights are decomposed; by default as the allocator's paper does.
        output: File of the plan.
        store: Folder of the factors; by default one named by their fingerprint in the cache.
        device: cpu, cuda, ...; auto takes cuda where there is one.
        json: Write the figures there.

    Returns:
        The plan.
    """
    from lowrank_pl.calibration.subject import Subject
    from lowrank_pl.methods.allocate import make_allocator
    from lowrank_pl.methods.allocate.run import allocate_ranks
    from lowrank_pl.report.rank_map import rank_table
    from lowrank_pl.utils.environment import pick_device

    # A wrong path, and a name or a setting that does not exist, is refused before anything is loaded.
    check_output_files(output, json)
    allocator = make_allocator(method, **(settings or {}))
    subject = Subject.load(base, calibration, constraints, device=pick_device(device))
    plan, factors = allocate_ranks(subject, keep=keep, allocator=allocator, decomposition=decomposition, store=store)
    plan.save(output)
    print(f"{plan_line(plan)}\n{rank_table(plan)}\nplan   {output}\nstore  {factors.directory}")
    if json is not None:
        write_json(json, {"plan": str(output), **plan_figures(plan)})
    return plan
