"""``lowrank allocate``."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from lowrank_pl.cli.parameters import Flat, Settings
from lowrank_pl.cli.plan_parts import plan_figures, plan_line

# cyclopts looks here for the types of inherited fields, too.
from lowrank_pl.factors.settings import Decomposition, Kind, Labels, Side  # noqa: F401
from lowrank_pl.methods.quantize.settings import ByteBudget
from lowrank_pl.models.settings import Base
from lowrank_pl.plans.constraints import Constraints
from lowrank_pl.text.settings import Calibration
from lowrank_pl.utils.files import check_output_files
from lowrank_pl.utils.json_files import write_figures

if TYPE_CHECKING:
    from lowrank_pl.plans.plan import RankPlan

__all__ = ["AllocatorsDecomposition", "allocate"]


@dataclass(frozen=True)
class AllocatorsDecomposition(Decomposition):
    """How weights are decomposed; the kind is the allocator's by default.

    Args:
        kind: What weights errors: svd, asvd, fwsvd, whitened or two_sided; by default as the allocator's paper does.
    """

    kind: Kind | None = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        # Without a kind, the settings are checked once the allocator has given one.
        if self.kind is not None:
            super().__post_init__()

    def resolved(self, default: Decomposition) -> Decomposition:
        """Return the decomposition, with the kind of ``default`` if none was given."""
        given = {part.name: getattr(self, part.name) for part in fields(Decomposition)}
        return Decomposition(**{**given, "kind": self.kind or default.kind})


def allocate(
    base: Flat[Base],
    *,
    method: str | None = None,
    settings: Settings | None = None,
    keep: float | None = None,
    keep_bytes: float | None = None,
    bytes: str | None = None,
    calibration: Flat[Calibration] = Calibration(),
    constraints: Flat[Constraints] = Constraints(),
    decomposition: AllocatorsDecomposition = AllocatorsDecomposition(),
    output: Path = Path("plan.json"),
    store: Path | None = None,
    device: str = "auto",
    json: Path | None = None,
) -> RankPlan:
    """Write a rank plan without training, by a closed-form allocator.

    --include '*' embeddings gives the token embeddings and the head ranks too, with --method fisher, energy or uniform.
    Tied ones are one matrix.

    Weights are decomposed as the allocator's paper does, unless --decomposition.kind says otherwise: two_sided for
    fisher and bytes, asvd for strs, whitened for all others.

    With --keep_bytes or --bytes, every module gets a rank and bits in one budget, its matrices and the embeddings are
    rounded, and the plan is for the rounded matrices.

    Args:
        base: The model; an export has its type too.
        method: The allocator: uniform, energy, drank, svdllm_v2, strs, zs_svd, or fisher; bytes for a budget in
            bytes. By default fisher, uniform where --decomposition.kind is one that fisher can't read, and bytes
            with such a budget.
        settings: Settings of the allocator, such as --settings.rounds 5 for zs_svd or --settings.group 64 for bytes; an
            unknown one is an error that lists those that exist.
        keep: Fraction of the targeted parameters to keep; 0.8 by default.
        keep_bytes: Fraction of the dense model's bytes to keep instead, of all its weights.
        bytes: Bytes of all weights on disk instead, such as 60MB.
        calibration: Text that the factors are made from.
        constraints: Which linear layers are compressed, and what their ranks and storage must respect.
        decomposition: How weights are decomposed.
        output: File of the plan.
        store: Folder of the factors; by default one named by their fingerprint in the cache.
        device: cpu, cuda, ...; auto takes cuda where there is one.
        json: Write the figures there.

    Returns:
        The plan.
    """
    from lowrank_pl.calibration.build import build_factors
    from lowrank_pl.calibration.subject import Subject
    from lowrank_pl.methods.allocate import ALLOCATORS, make_allocator
    from lowrank_pl.methods.allocate.run import allocate_ranks
    from lowrank_pl.methods.quantize import byte_budget
    from lowrank_pl.models.base import model_files
    from lowrank_pl.report.rank_map import rank_table
    from lowrank_pl.text.sources import text_files
    from lowrank_pl.utils.environment import pick_device

    # A wrong path, and a name or a setting that does not exist, is refused before anything is loaded.
    check_output_files(output, json, inputs=[*model_files(base.name), *text_files(calibration.text)])
    budget = _byte_budget(method, keep, keep_bytes, bytes, settings or {})
    usual = "fisher" if decomposition.kind in (None, *ALLOCATORS["fisher"].kinds) else "uniform"
    allocator = make_allocator(method or usual, **(settings or {})) if budget is None else None
    own = Decomposition("two_sided") if allocator is None else allocator.default_decomposition()
    made_by = decomposition.resolved(own)
    subject = Subject.load(base, calibration, constraints, device=pick_device(device))
    if budget is not None:
        byte_budget.check_budget(subject, budget, made_by)
        made = build_factors(subject, settings=made_by, directory=store)
        plan, factors = byte_budget.allocate_bytes(subject, budget, store=made)
    else:
        assert allocator is not None
        plan, factors = allocate_ranks(
            subject, keep=0.8 if keep is None else keep, allocator=allocator, decomposition=made_by, store=store
        )
    plan.save(output)
    print(f"{plan_line(plan)}\n{rank_table(plan)}\nplan   {output}\nstore  {factors.directory}")
    if json is not None:
        write_figures(json, {"plan": str(output), **plan_figures(plan)})
    return plan


def _byte_budget(
    method: str | None, keep: float | None, keep_bytes: float | None, size: str | None, settings: Settings
) -> ByteBudget | None:
    """Return the budget in bytes that was given; None if ranks alone are asked for.

    Raises:
        ValueError: The arguments contradict each other, or a setting does not exist.
    """
    if keep_bytes is None and size is None:
        if method == "bytes":
            raise ValueError("the method bytes was given no budget: add --keep_bytes 0.3 or --bytes 60MB")
        return None
    if keep is not None or method not in (None, "bytes"):
        given = f"--keep {keep}" if keep is not None else f"--method {method}"
        raise ValueError(
            f"{given} was given with a budget in bytes, which chooses ranks and bits together: leave it out, or round "
            "its plan with `lowrank quantize`"
        )
    known = {part.name for part in fields(ByteBudget)} - {"keep", "size"}
    if unknown := sorted(set(settings) - known):
        raise ValueError(f"bytes has no setting {unknown[0]!r}: expected one of {', '.join(sorted(known))}")
    return ByteBudget(keep=keep_bytes, size=size, **settings)
