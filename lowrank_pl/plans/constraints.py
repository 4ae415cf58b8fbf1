"""What a plan may touch, and in which steps: targets, floors, multiples and storage; importable without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lowrank_pl.models.targets import Targets
    from lowrank_pl.plans.budget import Budget

__all__ = ["Constraints", "Form", "StorageChoice"]

Form = Literal["factored", "pivoted"]
"""Two factors, or independent rows (or columns) and the coefficients of all other rows (or columns)."""

StorageChoice = Literal["factored", "pivoted", "auto"]
"""One form for all modules, or the smaller one for each module."""


@dataclass(frozen=True)
class Constraints:
    """Which linear layers are compressed, and what their ranks and their storage must respect.

    Args:
        include: Globs of modules to target, on full names or names inside a block. The word ``embeddings`` beside them
            targets the token embeddings and the head too (tied ones count once), which no glob does.
        exclude: Globs of modules to leave alone; these modules are not counted in ``keep``.
        multiple_of: Every rank is a multiple of this.
        floors: Least kept fraction by glob on module names; 1.0 keeps a module dense.
        storage: How low-rank modules are stored: ``factored`` (two factors), ``pivoted``, or ``auto`` for the smaller.
            Embeddings and head are always factored.
        alike_experts: The experts of a block get equal ranks: one for all gates, one for all ups, one for all downs.
        drop_experts: Experts may be dropped whose tokens other experts can take at a lower predicted loss than ranks
            would cost for the same parameters (with ``fisher``).
        shared_experts: The experts of a block share one right factor for their gates and another for their ups.

    Raises:
        ValueError: Experts may be dropped, and are to share factors or to be alike.
    """

    include: Sequence[str] = ("*",)
    exclude: Sequence[str] = ()
    multiple_of: int = 1
    floors: dict[str, float] = field(default_factory=dict)
    storage: StorageChoice = "auto"
    alike_experts: bool = False
    drop_experts: bool = False
    shared_experts: bool = False

    def __post_init__(self) -> None:
        for asked in ("shared_experts", "alike_experts"):
            if self.drop_experts and getattr(self, asked):
                raise ValueError(
                    f"drop_experts chooses among experts by what each of them costs, and {asked} treats those of a "
                    f"block as one: leave out {asked} or drop_experts"
                )

    def targets(self, model: PreTrainedModel) -> Targets:
        """Return the linear layers of ``model`` that are to be compressed.

        Raises:
            ValueError: A glob fits no module, nothing is left to compress, or no targets are experts that could share
                a factor.
        """
        from lowrank_pl.models.targets import find_targets

        return self.stacked(find_targets(model, include=self.include, exclude=self.exclude))

    def stacked(self, targets: Targets) -> Targets:
        """Return ``targets``, with the experts that are to share a right factor stacked.

        Raises:
            ValueError: Factors are to be shared, but no two targets are gates or ups of experts of one block.
        """
        return targets.stacked() if self.shared_experts else targets

    def refuse_shared(self, what: str) -> None:
        """Refuse shared right factors where ``what``, a clause, says why they can't be.

        Raises:
            ValueError: ``shared_experts`` is true.
        """
        if self.shared_experts:
            raise ValueError(f"shared_experts is true, but {what}")

    def budget(self, model: PreTrainedModel, targets: Targets, keep: float) -> Budget:
        """Return the budget of ``keep`` of the targeted parameters of a dense ``model``.

        For a pruned base, ``keep`` counts the parameters that the base had before pruning.

        Raises:
            ValueError: ``keep`` lies outside (0, 1], or a floor or a multiple is impossible, or no targets are experts
                that could be alike or dropped.
        """
        from lowrank_pl.models.identity import Origin
        from lowrank_pl.models.targets import droppable, model_parameters
        from lowrank_pl.plans.budget import Budget

        if self.drop_experts:
            droppable(model, targets)

        before = Origin.of(model)
        pruned = 0 if before is None else before.left_out(targets)
        return Budget(
            keep=keep,
            shapes=targets.shapes,
            model_parameters=model_parameters(model) + pruned,
            bytes_per_parameter=model.dtype.itemsize,
            multiple_of=self.multiple_of,
            floors=dict(self.floors),
            storage=self.storage,
            left_out=pruned,
            embeddings=tuple(target.name for target in targets.embeddings),
            alike_experts=self.alike_experts,
            drop_experts=self.drop_experts,
            stacks=targets.stacks,
        )
