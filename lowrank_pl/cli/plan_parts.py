"""What the commands that read or write a plan share: its base, its factors, and how it is shown."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowrank_pl.models.settings import Base
from lowrank_pl.utils.files import check_output_files
from lowrank_pl.utils.json_files import write_figures

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lowrank_pl.calibration.subject import Subject
    from lowrank_pl.factors.store import FactorStore
    from lowrank_pl.plans.plan import RankPlan

__all__ = ["PlanParts", "finish_plan", "plan_figures", "plan_line"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlanParts:
    """Where the parts of a plan are, if they are not where the plan says.

    Args:
        base: The dense base; by default the one that the plan names.
        store: Folder of the factors; by default the one that the plan names. Factors that are gone are built again,
            but not those that were refitted, healed, corrected or rounded.
        trust_remote_code: Run Python code that comes with the base.
    """

    base: str | None = None
    store: Path | None = None
    trust_remote_code: bool = False

    def check_outputs(self, plan: RankPlan, *paths: Path | None) -> None:
        """Refuse to write ``paths`` over files of the base of ``plan``.

        Raises:
            ValueError: A path is one of them.
        """
        from lowrank_pl.models.base import model_files

        check_output_files(*paths, inputs=model_files(self.base or plan.origin.get("base")))

    def base_of(self, plan: RankPlan, path: Path) -> Base:
        """Return the base of ``plan``, in the type that the plan was made in.

        Args:
            plan: The plan.
            path: Its file, for the error.

        Raises:
            ValueError: Neither the plan nor the user names a base, or there is no such base here.
        """
        from lowrank_pl.models.base import resolve_base

        name = self.base or plan.origin.get("base")
        if name is None:
            raise ValueError(f"{path} does not say which base it is for: name it with --base")
        try:
            resolve_base(str(name))
        except ValueError as error:
            if self.base is not None:
                raise
            raise ValueError(
                f"{error}; {path} names it as it was called where the plan was made: give --base"
            ) from None
        dtype = plan.origin.get("dtype", "float32")
        return Base(str(name), dtype=dtype, trust_remote_code=self.trust_remote_code)

    def subject_of(self, plan: RankPlan, path: Path, device: str) -> Subject:
        """Return the dense base of ``plan`` with the text and the targets that the plan was made from.

        Args:
            plan: The plan.
            path: Its file, for errors.
            device: Where the model goes: cpu, cuda, ..., or auto.

        Raises:
            ValueError: Nobody names a base, or the plan does not say what text it was made from.
        """
        from lowrank_pl.calibration.subject import Subject
        from lowrank_pl.plans.constraints import Constraints
        from lowrank_pl.text.sequences import sequences_fingerprint
        from lowrank_pl.text.settings import Calibration
        from lowrank_pl.utils.environment import pick_device

        origin = plan.origin.get("calibration")
        if origin is None:
            raise ValueError(f"{path} does not say what text it was made from: allocate anew with `lowrank allocate`")
        base = self.base_of(plan, path)
        model, tokenizer = base.load().to(pick_device(device)), base.tokenizer()
        own = Calibration(origin["text"], origin["length"], origin["windows"])
        sequences = own.tokens(tokenizer)
        # A path may name another file here.
        if plan.fingerprint.get("text") not in (None, sequences_fingerprint(sequences)):
            _log.warning("%s was made from another text than the one that %r is here", path, own.text)
        constraints = Constraints(include=plan.layers, shared_experts=plan.shares_experts)
        return Subject(model, tokenizer, sequences, constraints, base=base, calibration=own)

    def factors_of(self, plan: RankPlan, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> FactorStore:
        """Return the factors that ``plan`` was made for: those on disk, or built again in the cache.

        Args:
            plan: The plan.
            model: Its dense base.
            tokenizer: The base's tokenizer.

        Raises:
            ValueError: The factors are gone, and the plan does not say how to build them.
        """
        from lowrank_pl.calibration.stored_factors import stored_factors

        return stored_factors(plan, model, tokenizer, directory=self.store)


def finish_plan(plan: RankPlan, factors: FactorStore, output: Path, json: Path | None) -> None:
    """Write a plan that was made from another one, show it with its notes, and write its figures.

    Args:
        plan: The plan.
        factors: The factors that it is for.
        output: File of the plan.
        json: File of the figures; None writes none.
    """
    plan.save(output)
    print("\n".join([plan_line(plan), *plan.notes, f"plan   {output}", f"store  {factors.directory}"]))
    if json is not None:
        write_figures(json, {"plan": str(output), **plan_figures(plan)})


def plan_line(plan: RankPlan) -> str:
    """Return how much ``plan`` keeps, in one line."""
    rounded = f", {plan.keep_bytes:.2%} of its bytes" if plan.is_rounded else ""
    return (
        f"{plan.method}: kept {plan.keep_targeted:.4%} of the targeted parameters ({plan.requested} requested), "
        f"{plan.keep_model:.2%} of the model, {plan.bytes / 1e6:,.1f} MB{rounded}"
    )


def plan_figures(plan: RankPlan) -> dict[str, Any]:
    """Return the figures of ``plan`` as JSON values."""
    return {
        "method": plan.method,
        "keep": plan.keep,
        "kept_targeted": plan.keep_targeted,
        "kept_model": plan.keep_model,
        "bytes": plan.bytes,
        **({"kept_bytes": plan.keep_bytes, "bits": plan.bits} if plan.is_rounded else {}),
        "dense_modules": len(plan.dense_modules),
        **({"dropped_experts": len(plan.dropped_experts)} if plan.dropped_modules else {}),
        "modules": len(plan.modules),
        "notes": list(plan.notes),
    }
