"""The correction of ZS-SVD: a gradient step on the truncated weights, then a new decomposition and truncation."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lowrank_pl.calibration.gradients import WeightGradients, collect_gradients
from lowrank_pl.calibration.measures import Passes
from lowrank_pl.calibration.roots import Roots
from lowrank_pl.factors.compression import compressed
from lowrank_pl.factors.decomposition import decompose
from lowrank_pl.factors.store import FactorStore
from lowrank_pl.methods.allocate.base import Problem
from lowrank_pl.models.targets import dense_weight, replaced
from lowrank_pl.plans.plan import RankPlan
from lowrank_pl.text.sequences import sequences_fingerprint
from lowrank_pl.utils.files import atomic_directory
from lowrank_pl.utils.tensor_store import TensorStore, weight_digest

__all__ = ["correct", "projected_step"]

_log = logging.getLogger(__name__)


Reallocate = Callable[[FactorStore, TensorStore], RankPlan]


def correct(
    plan: RankPlan,
    factors: FactorStore,
    problem: Problem,
    *,
    rounds: int,
    sequences: int,
    settings: Mapping[str, Any],
    reallocate: Reallocate,
) -> tuple[RankPlan, FactorStore]:
    """Return the plan after ``rounds`` of correction and the corrected factors that it is for (arXiv 2602.02848).

    A round moves every truncated weight from ``W_r`` to ``W_r + <g, D> / <g, g> g``. This restores the component of the
    truncation error ``D = W - W_r`` along the gradient ``g`` of the loss at ``W_r``. All modules move at once. They are
    decomposed with the same statistics, scored by the gradients at the new weights and truncated to the same budget. A
    module that the plan leaves dense keeps its weight.

    The corrected factors go into a folder inside that of ``factors``. The folder appears when a round is finished, and
    the folder of the round before is then removed. A killed run continues after the last finished round. Memory holds
    the model, at most one more copy of its targeted weights, and their gradients.

    Args:
        plan: The plan to correct.
        factors: The factors that the plan is for.
        problem: The dense model, which stays unchanged, its targets, and the sequences that the factors were made from.
        rounds: Number of rounds, at least 1.
        sequences: Number of the problem's first sequences that gradients are computed on.
        settings: All other settings that affect the plans of later rounds, as JSON values.
        reallocate: Returns the plan for corrected factors and the weight gradients at the corrected weights.

    Raises:
        ValueError: A loss or a gradient is not finite.
    """
    work = _Correction(plan, factors, problem, rounds, sequences, dict(settings))
    done = max((number for number in range(1, rounds + 1) if work.finished(number)), default=0)
    current, gradients = (factors, None) if done == 0 else work.open(done)
    if gradients is not None:
        _log.info("correction: %d of %d rounds are done, in %s", done, rounds, current.directory)
        plan = reallocate(current, gradients)
    for number in range(done + 1, rounds + 1):
        _log.info("correction: round %d of %d", number, rounds)
        current, gradients = work.make(number, plan, current)
        plan = reallocate(current, gradients)
        work.remove(number - 1)
    return plan, current


def projected_step(weight: Tensor, truncated: Tensor, gradient: Tensor) -> Tensor:
    """Return the point on the line ``truncated + s * gradient`` nearest to ``weight``, all ``[out, in]``, float64.

    >>> projected_step(torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2), torch.tensor([[-2.0, 0.0]])).tolist()
    [[3.0, 0.0]]
    """
    truncated, gradient = truncated.double(), gradient.double()
    square = gradient.square().sum()
    # The gradient is 0 for a module that the loss does not depend on; its weight then does not move.
    step = (gradient * (weight.double() - truncated)).sum() / square if square > 0 else square
    return truncated + step * gradient


class _Correction:
    """The rounds of one correction, and their folders."""

    def __init__(
        self,
        plan: RankPlan,
        base: FactorStore,
        problem: Problem,
        rounds: int,
        sequences: int,
        settings: dict[str, Any],
    ) -> None:
        assert problem.model is not None
        assert problem.sequences is not None
        self.base, self.model, self.calibration = base, problem.model, problem.sequences
        self.sequences = problem.sequences[:sequences]
        self.modules = problem.targets.among(plan.modules)
        self.identity = {
            **settings,
            "keep": plan.keep,
            "multiple_of": plan.multiple_of,
            "floors": dict(plan.floors),
            "storage": plan.storage,
            "plan": plan.ranks_digest(),
            "windows": sequences_fingerprint(self.sequences),
            # Runs of different length do not share folders, so none removes the last round of another.
            "rounds": rounds,
        }

    def finished(self, number: int) -> bool:
        """Tell whether round ``number`` is on disk; its folder appears only when it is complete."""
        return (self._folder(number) / "manifest.json").exists()

    def open(self, number: int) -> tuple[FactorStore, TensorStore]:
        """Return the factors and the gradients of a finished round."""
        return self._stores(number, self._folder(number))

    def remove(self, number: int) -> None:
        """Delete the folder of round ``number``."""
        if number > 0:
            shutil.rmtree(self._folder(number), ignore_errors=True)

    def make(self, number: int, plan: RankPlan, factors: FactorStore) -> tuple[FactorStore, TensorStore]:
        """Make round ``number`` from the plan on the factors before it; return its factors and weight gradients."""
        with atomic_directory(self._folder(number)) as building:
            made, gradients = self._stores(number, building)
            self._decompose(plan, factors, made)
            self._differentiate(plan, made, gradients)
        return self.open(number)

    def _folder(self, number: int) -> Path:
        return self._derived(number)[1]

    def _derived(self, number: int) -> tuple[dict[str, Any], Path]:
        """Return fingerprint and final folder of round ``number``."""
        return self.base.derived("correction", {**self.identity, "round": number})

    def _stores(self, number: int, folder: Path) -> tuple[FactorStore, TensorStore]:
        fingerprint, _ = self._derived(number)
        return FactorStore(fingerprint, folder), TensorStore("weight_gradients", fingerprint, folder / "gradients")

    def _decompose(self, plan: RankPlan, factors: FactorStore, made: FactorStore) -> None:
        moving = [target for target in self.modules if plan.modules[target.name].rank is not None]
        with compressed(self.model, plan, factors):
            weights = collect_gradients(
                WeightGradients, self.model, moving, Passes(self.sequences), progress="gradients of the truncated model"
            )
        roots = Roots.of_factors(self.base, self.model, self.calibration, self.modules)
        bar = tqdm(total=len(self.modules), desc="correct", unit="module")
        for inputs, members in roots.by_inputs(self.modules):
            for target in members:
                notes = self.base.notes(target.name)
                if target.name not in weights:
                    made.add(target.name, self.base.factors(target.name), notes=notes)
                else:
                    weight = dense_weight(self.model.get_submodule(target.name)).detach()
                    moved = projected_step(
                        weight, _truncated(plan, factors, target.name, weight.device), weights.pop(target.name).mean
                    )
                    outputs = roots.of_outputs(target.name)
                    made.add(
                        target.name,
                        decompose(moved, inputs=inputs, outputs=outputs),
                        notes={**notes, "weight": weight_digest(weight)},
                    )
                bar.update()
        bar.close()

    def _differentiate(self, plan: RankPlan, made: FactorStore, gradients: TensorStore) -> None:
        moved = [name for name, module in plan.modules.items() if module.rank is not None]
        with _reweighted(self.model, moved, made):
            weights = collect_gradients(
                WeightGradients, self.model, self.modules, Passes(self.sequences),
                progress="gradients of the corrected model",
            )  # fmt: skip
        for name in list(weights):
            gradients.write(name, weights.pop(name).tensors())


def _truncated(plan: RankPlan, factors: FactorStore, name: str, device: torch.device) -> Tensor:
    """Return the weight ``[out, in]`` of a module truncated by the plan, float64."""
    part = factors.kept(name, plan.modules[name])
    return part.left.to(device).double() @ part.right.to(device).double()


@contextmanager
def _reweighted(model: nn.Module, names: Sequence[str], factors: FactorStore) -> Iterator[None]:
    """Replace the weights of the modules ``names`` by the full products of their factors inside the block."""
    whole = {}
    for name in names:
        old = model.get_submodule(name)
        weight = dense_weight(old)
        parts = factors.factors(name)
        new = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        product = parts.left.to(weight.device) @ parts.right.to(weight.device)
        new.weight = nn.Parameter(product.to(weight.dtype), requires_grad=False)
        new.register_parameter("bias", getattr(old, "bias", None))
        whole[name] = new
    with replaced(model, whole):
        yield
