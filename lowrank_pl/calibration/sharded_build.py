"""A base that no process holds whole: all processes open it together and make its factors block by block."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lowrank_pl.calibration.build import build_factors
from lowrank_pl.calibration.build_by_block import build_factors_by_block
from lowrank_pl.calibration.subject import Subject
from lowrank_pl.factors.settings import Decomposition
from lowrank_pl.factors.store import FactorStore
from lowrank_pl.models.base import Base
from lowrank_pl.models.lazy import NotBlockwiseError, Skeleton, open_skeleton
from lowrank_pl.models.targets import Targets
from lowrank_pl.plans.constraints import Constraints
from lowrank_pl.utils.distributed import cooperating, is_first, total_across_processes

__all__ = ["SharedBase", "open_shared"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SharedBase:
    """A base without its weights. Each process loads the weights that it needs.

    Args:
        base: Where it comes from.
        skeleton: The model and its files.
        targets: The linear layers to compress.
    """

    base: Base
    skeleton: Skeleton
    targets: Targets

    def factors(self, subject: Subject, *, settings: Decomposition, directory: str | Path | None) -> FactorStore:
        """Return the store that ``build_factors`` gives, made with one block in memory where that is possible.

        Where it is not, every process loads the whole base.

        Args:
            subject: The skeleton's model with its targets, its tokenizer and the calibration sequences.
            settings: How to decompose.
            directory: Folder of the store; by default one named by the fingerprint in the cache.
        """
        try:
            return build_factors_by_block(self.skeleton, subject, settings=settings, directory=directory)
        except NotBlockwiseError as error:
            if is_first():
                _log.warning(
                    "every process loads the whole base into memory to make its factors: %s; to avoid this, run "
                    "`lowrank decompose` with the same base, decomposition, text and sequences first",
                    error,
                )
        whole = replace(subject, model=self.base.load(), known_targets=self.targets)
        return build_factors(whole, settings=settings, directory=directory)


def open_shared(base: Base, constraints: Constraints, device: torch.device) -> SharedBase | None:
    """Return the base without its weights; None where some process can't open it in this way, so all load it whole.

    Args:
        base: The base.
        constraints: Which linear layers are targets.
        device: Where the weights go.

    Raises:
        ValueError: The base is unknown, or no target is left.
    """
    found, reason = None, "another process can't read its files"
    with cooperating():
        try:
            skeleton = open_skeleton(
                base.name, dtype=base.torch_dtype, device=device, trust_remote_code=base.trust_remote_code
            )
            targets = constraints.stacked(
                skeleton.find_targets(include=constraints.include, exclude=constraints.exclude)
            )
            found = SharedBase(base, skeleton, targets)
        except NotBlockwiseError as error:
            reason = str(error)
        if total_across_processes(found is None) == 0:
            return found
        if is_first():
            _log.warning("%s is loaded whole by every process before it is sharded: %s", base.name, reason)
    return None
