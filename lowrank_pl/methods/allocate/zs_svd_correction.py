"""The correction of ZS-SVD: a gradient step on the truncated weights, then a new decomposition and truncation."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lowrank_pl.calibration.gradients import WeightGradients, collect_gradients
from lowrank_pl.calibration.measures import Passes
from lowrank_pl.calibration.roots import Roots
from lowrank_pl.calibration.statistics import Statistics, statistics_of_factors
from lowrank_pl.factors.compression import compressed
from lowrank_pl.factors.decomposition import decompose
from lowrank_pl.factors.settings import Decomposition
from lowrank_pl.factors.store import FactorStore
from lowrank_pl.methods.allocate.base import Problem
from lowrank_pl.models.targets import dense_weight, replaced
from lowrank_pl.plans.plan import RankPlan
from lowrank_pl.text.sequences import sequences_fingerprint
from lowrank_pl.utils.files import LOCK, atomic_directory, locked
from lowrank_pl.utils.tensor_store import TensorStore, weight_digest

__all__ = ["Rounds", "check_reprofile", "correct", "projected_step"]

_log = logging.getLogger(__name__)

_MEASURED = "measured"
"""Folder of what a round measures again, inside the folder of its factors until they are made."""


Reallocate = Callable[[FactorStore, TensorStore], RankPlan]


@dataclass(frozen=True)
class Rounds:
    """How often weights are corrected, and on what.

    Args:
        count: Number of rounds, at least 1.
        batch: Number of calibration sequences that gradients are computed on.
        reprofile: Measure the statistics that weight the factors again in every round, in the model with the moved
            weights and on all calibration sequences.
        random_batch: Draw the sequences for the step of each round at random; otherwise they are the first ones. The
            gradients that score components are those of the first ones in both cases.
    """

    count: int
    batch: int
    reprofile: bool = False
    random_batch: bool = False

    def sequences(self, calibration: Tensor, number: int) -> Tensor:
        """Return the sequences of ``calibration`` ``[sequences, length]`` that the step of a round is taken on.

        Args:
            calibration: All calibration token ids.
            number: Which round, from 1; the same round draws the same sequences.
        """
        if not self.random_batch:
            return calibration[: self.batch]
        drawn = torch.randperm(len(calibration), generator=torch.Generator().manual_seed(number))
        return calibration[drawn[: self.batch]]


def correct(
    plan: RankPlan,
    factors: FactorStore,
    problem: Problem,
    *,
    rounds: Rounds,
    settings: Mapping[str, Any],
    reallocate: Reallocate,
) -> tuple[RankPlan, FactorStore]:
    """Return the plan after all ``rounds`` of correction and the corrected factors that it is for (arXiv 2602.02848).

    A round moves every truncated weight from ``W_r`` to ``W_r + <g, D> / <g, g> g``. This restores the component of the
    truncation error ``D = W - W_r`` along the gradient ``g`` of the loss at ``W_r``. All modules move at once. They are
    decomposed with the same statistics, scored by the gradients at the new weights and truncated to the same budget. A
    module that the plan leaves dense keeps its weight.

    The authors' released code measures the inputs again in every round, in the model with the moved weights, and takes
    the step on one random sequence (``Rounds``). All modules are then decomposed again, also those that stay dense.

    The corrected factors go into a folder inside that of ``factors``. The folder appears when a round is finished, and
    the folder of the round before is then removed. A killed run continues after the last finished round. Memory holds
    the model, at most one more copy of its targeted weights, and their gradients.

    Args:
        plan: The plan to correct.
        factors: The factors that the plan is for.
        problem: The dense model, which stays unchanged, its targets, and the sequences that the factors were made from.
        rounds: How many rounds, and what each measures.
        settings: All other settings that affect the plans of later rounds, as JSON values.
        reallocate: Returns the plan for corrected factors and the weight gradients at the corrected weights.

    Raises:
        ValueError: A loss or a gradient is not finite, or no statistics weight the factors that could be measured
            again.
    """
    work = _Correction(plan, factors, problem, rounds, dict(settings))
    # Another run of the same correction would remove the round that this one reads.
    with locked(work.lock, f"correcting {factors.directory}"):
        done = max((number for number in range(1, rounds.count + 1) if work.finished(number)), default=0)
        current, gradients = (factors, None) if done == 0 else work.open(done)
        # A run that was killed after a round may have left the one before it.
        work.remove(done - 1)
        if gradients is not None:
            _log.info("correction: %d of %d rounds are done, in %s", done, rounds.count, current.directory)
            plan = reallocate(current, gradients)
        for number in range(done + 1, rounds.count + 1):
            _log.info("correction: round %d of %d", number, rounds.count)
            current, gradients = work.make(number, plan, current)
            plan = reallocate(current, gradients)
            work.remove(number - 1)
        return plan, current


def check_reprofile(made_by: Decomposition) -> None:
    """Check that the statistics behind factors can be measured again in the corrected model.

    Raises:
        ValueError: There are none, or they are those of another compressed model.
    """
    if not made_by.needs or made_by.at_keep is not None:
        what = "with at_keep" if made_by.needs else f"of the kind {made_by.kind!r}, which needs none"
        raise ValueError(
            f"reprofile measures the statistics of factors again in the corrected model, and was given factors "
            f"{what}: leave it out, or take another decomposition"
        )


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
        rounds: Rounds,
        settings: dict[str, Any],
    ) -> None:
        assert problem.model is not None
        assert problem.sequences is not None
        self.base, self.model, self.calibration = base, problem.model, problem.sequences
        self.rounds = rounds
        self.sequences = problem.sequences[: rounds.batch]
        self.made_by = Decomposition.of_fingerprint(base.fingerprint)
        if rounds.reprofile:
            check_reprofile(self.made_by)
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
            "rounds": rounds.count,
        }
        if plan.alike_experts:
            self.identity["alike_experts"] = True
        if rounds.reprofile:
            self.identity["reprofile"] = True
        if rounds.random_batch:
            self.identity["random_batch"] = [rounds.batch, sequences_fingerprint(self.calibration)]

    @property
    def lock(self) -> Path:
        """The lock file of all corrections of these factors."""
        return self.base.directory / f"correction{LOCK}"

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
            self._decompose(number, plan, factors, made)
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

    def _decompose(self, number: int, plan: RankPlan, factors: FactorStore, made: FactorStore) -> None:
        moving = [target for target in self.modules if plan.modules[target.name].rank is not None]
        passes = Passes(self.rounds.sequences(self.calibration, number))
        with compressed(self.model, plan, factors):
            gradients = collect_gradients(
                WeightGradients, self.model, moving, passes, progress="gradients of the truncated model"
            )

        def moved(name: str) -> Tensor:
            weight = self._weight(name)
            return projected_step(weight, _truncated(plan, factors, name, weight.device), gradients.pop(name).mean)

        if not self.rounds.reprofile:
            roots = Roots.of_factors(self.base, self.model, self.calibration, self.modules)
            self._write(made, roots, lambda name: moved(name) if name in gradients else None)
            return
        # All weights have to be in place at once; float32, so that they take no more than the gradients that they
        # replace.
        weights = {name: moved(name).float() for name in list(gradients)}
        with _reweighted(self.model, weights.items()):
            roots = self._roots_again(made)
        self._write(made, roots, lambda name: weights.pop(name) if name in weights else self._weight(name))
        shutil.rmtree(made.directory / _MEASURED)

    def _weight(self, name: str) -> Tensor:
        return dense_weight(self.model.get_submodule(name)).detach()

    def _roots_again(self, made: FactorStore) -> Roots:
        """Return the roots of the model as it is now; what they are made from lies inside the folder of ``made``."""
        base = statistics_of_factors(self.base, self.model, self.calibration)
        statistics = Statistics(
            self.model, base.passes, {**base.source, "correction": made.fingerprint["correction"]},
            directory=made.directory / _MEASURED,
        )  # fmt: skip
        return Roots(self.made_by, statistics, self.modules, self.model.device)

    def _write(self, made: FactorStore, roots: Roots, weight_of: Callable[[str], Tensor | None]) -> None:
        """Write the factors of all modules: of the weight ``weight_of`` each, or the base's where there is none."""
        bar = tqdm(total=len(self.modules), desc="correct", unit="module")
        for inputs, members in roots.by_inputs(self.modules):
            for target in members:
                notes = self.base.notes(target.name)
                weight = weight_of(target.name)
                if weight is None:
                    made.add(target.name, self.base.factors(target.name), notes=notes)
                else:
                    found = decompose(weight, inputs=inputs, outputs=roots.of_outputs(target.name))
                    made.add(target.name, found, notes={**notes, "weight": weight_digest(self._weight(target.name))})
                bar.update()
        bar.close()

    def _differentiate(self, plan: RankPlan, made: FactorStore, gradients: TensorStore) -> None:
        moved = [name for name, module in plan.modules.items() if module.rank is not None]
        products = ((name, _product(made, name, self._weight(name))) for name in moved)
        with _reweighted(self.model, products):
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


def _product(factors: FactorStore, name: str, like: Tensor) -> Tensor:
    """Return the whole product of the factors of a module, with the type and the device of ``like``."""
    parts = factors.factors(name)
    return (parts.left.to(like.device) @ parts.right.to(like.device)).to(like.dtype)


@contextmanager
def _reweighted(model: nn.Module, weights: Iterable[tuple[str, Tensor]]) -> Iterator[None]:
    """Replace the weights of modules by ``weights`` ``[out, in]``, by name, inside the block."""
    whole = {}
    for name, weight in weights:
        old = model.get_submodule(name)
        new = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        new.weight = nn.Parameter(weight.to(dense_weight(old).dtype), requires_grad=False)
        new.register_parameter("bias", getattr(old, "bias", None))
        whole[name] = new
    with replaced(model, whole):
        yield
