"""What healing starts from: a plan with its factors, an export, or a pruned base, beside the dense model."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowrank_pl.calibration.stored_factors import stored_factors
from lowrank_pl.export.export import is_compressed, load_compressed
from lowrank_pl.factors.compression import compress, deployed_plan
from lowrank_pl.factors.healed import low_rank_embeddings, low_rank_layers
from lowrank_pl.models.base import Base
from lowrank_pl.models.identity import ORIGIN_KEY, Origin
from lowrank_pl.plans.plan import RankPlan
from lowrank_pl.utils.tensor_store import tensor_digest

__all__ = ["HealPair", "HealStart"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HealPair:
    """A compressed model and its dense model, which share all parameters that are equal.

    Args:
        student: The compressed model, without gradients.
        teacher: The dense model, without gradients.
        digest: Digest of all parameters of the student.
        plan: The plan of the student; None for a pruned base.
        weights: Digest of the dense weight of each low-rank layer, by its name, as far as it is known.
    """

    student: PreTrainedModel
    teacher: PreTrainedModel
    digest: str
    plan: RankPlan | None = None
    weights: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class HealStart:
    """Where a healed model comes from; made by :meth:`find`, which loads nothing.

    Args:
        path: The plan, or the folder of the model.
        plan: The plan; None for a pruned base.
        base: The model that the plan compresses, or the folder of the model.
        teacher: The dense model.
        store: Folder of the factors, if it is not where the plan says.
    """

    path: Path
    plan: RankPlan | None
    base: Base
    teacher: Base
    store: Path | None = None

    @classmethod
    def find(cls, path: Path, *, teacher: str | None, store: Path | None, trust_remote_code: bool) -> HealStart:
        """Return the start that ``path`` names.

        Args:
            path: A plan, or the folder of an export or of a pruned base.
            teacher: The dense model; by default the one that the plan or the folder names.
            store: Folder of the factors; by default the one that the plan names.
            trust_remote_code: Run Python code that comes with the models.

        Raises:
            ValueError: There is nothing to heal at ``path``, or it does not say which model is its dense one.
        """
        is_folder = path.is_dir()
        if is_folder and store is not None:
            raise ValueError(
                f"{str(path)!r} is a folder, whose own weights are healed: leave out store, or give a plan"
            )
        file = path / "plan.json" if is_folder else path
        if is_folder and not (path / "config.json").is_file():
            advice = f"give {file}" if file.is_file() else "give a plan.json, or the folder of an export"
            raise ValueError(f"{str(path)!r} is not the folder of a model: {advice}")
        plan = RankPlan.load(file) if file.is_file() or not is_folder else None
        if plan is not None:
            plan.refuse_shared(
                "healing trains the factors of every layer by itself: heal a plan without shared_experts"
            )
        if is_folder and plan is not None and not is_compressed(path):
            raise ValueError(f"{str(path)!r} holds merged dense weights, without factors to train: give its plan")
        config = json.loads((path / "config.json").read_text(encoding="utf-8")) if is_folder else {}
        if plan is None:
            named, compressed = config.get(ORIGIN_KEY, {}).get("base"), str(path)
            dtype = str(config.get("dtype") or "float32")
        else:
            named, compressed = plan.named_base or None, str(plan.origin.get("base", ""))
            dtype = str(plan.origin.get("dtype", "float32"))
        dense = teacher or named
        if dense is None:
            raise ValueError(f"{path} does not say which dense model it was made from: name it with --model.teacher")
        # A base that was pruned first lies in a folder of its own.
        if not compressed or (teacher is not None and plan is not None and "narrowed" not in plan.origin):
            compressed = dense
        options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
        base = Base(str(path) if is_folder else compressed, **options)
        return cls(path, plan, base, Base(str(dense), **options), store)

    @property
    def is_folder(self) -> bool:
        """Whether the compressed model lies in a folder."""
        return self.path.is_dir()

    def load(self, device: torch.device, *, teacher: PreTrainedModel | None = None) -> HealPair:
        """Return both models on ``device``.

        Args:
            device: The device.
            teacher: The dense model, if it is already loaded there.

        Raises:
            ValueError: A model or the factors can't be found, or do not belong together.
        """
        teacher = self.teacher.load().to(device) if teacher is None else teacher
        plan, weights = self.plan, {}
        if plan is None:
            student = self.base.load()
            if Origin.of(student) is None:
                raise ValueError(f"{str(self.path)!r} is neither an export nor a pruned base: there is nothing to heal")
        elif self.is_folder:
            student = load_compressed(
                self.path, dtype=self.base.torch_dtype, trust_remote_code=self.base.trust_remote_code
            )
        else:
            # Equal weights are those of the teacher on the device, so that pivots are chosen there.
            student = _sharing(self.base.load(), teacher).to(device)
            store = stored_factors(plan, student, self.base.tokenizer(), directory=self.store, flag="--model.store")
            compress(student, plan, store)
            plan = deployed_plan(student, plan)
            noted = {
                name: store.notes(name).get("weight")
                for name in (*low_rank_layers(student), *low_rank_embeddings(student))
            }
            weights = {name: digest for name, digest in noted.items() if digest is not None}
        student = _sharing(student, teacher).to(device)
        for model in (student, teacher):
            model.eval().requires_grad_(False)
        return HealPair(
            student, teacher, tensor_digest((*student.named_parameters(), *_stored_codes(student))), plan, weights
        )


def _stored_codes(model: PreTrainedModel) -> list[tuple[str, Tensor]]:
    """Return the codes, zero points and pivots of compressed layers, by name."""
    kinds = ("_packed", "_zeros", ".pivots")
    return [(name, buffer) for name, buffer in model.named_buffers() if name.endswith(kinds)]


def _sharing(model: PreTrainedModel, other: PreTrainedModel) -> PreTrainedModel:
    """Replace the parameters of ``model`` that equal those of ``other`` by them, and return ``model``."""
    theirs = dict(other.named_parameters(remove_duplicate=False))
    shared = 0
    for prefix, module in model.named_modules():
        for key, own in [*module.named_parameters(recurse=False)]:
            found = theirs.get(f"{prefix}.{key}".lstrip("."))
            if found is not None and _equal(own, found):
                setattr(module, key, found)
                shared += found.numel()
    _log.info("%s parameters are shared with the dense model", f"{shared:,}")
    return model


def _equal(one: nn.Parameter, other: nn.Parameter) -> bool:
    same = one is other or (one.shape == other.shape and one.dtype == other.dtype)
    return same and torch.equal(one.to(other.device), other)
