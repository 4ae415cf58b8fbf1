"""A base that no process holds whole: opened by all together, its factors made block by block, or why that can't be."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowrank_pl.calibration.build import build_factors
from lowrank_pl.calibration.build_by_block import build_factors_by_block
from lowrank_pl.factors.settings import Decomposition
from lowrank_pl.factors.store import FactorStore
from lowrank_pl.models.lazy import NotBlockwiseError, Skeleton, open_skeleton
from lowrank_pl.models.targets import Targets
from lowrank_pl.utils.distributed import cooperating, is_first, total

__all__ = ["SharedBase", "open_shared"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SharedBase:
    """A base without its weights, of which each process loads what it needs.

    Args:
        skeleton: The model and its files.
        targets: What was found in it.
    """

    skeleton: Skeleton
    targets: Targets

    def factors(
        self,
        sequences: Tensor,
        tokenizer: PreTrainedTokenizerBase,
        *,
        settings: Decomposition,
        directory: str | Path | None,
        load: Callable[[], PreTrainedModel],
    ) -> FactorStore:
        """Return the store that ``build_factors`` gives of the base, made with one block in memory where that can be.

        Args:
            sequences: ``[sequences, length]`` calibration token ids.
            tokenizer: The one that made them.
            settings: How to decompose.
            directory: Folder of the store; by default one named by the fingerprint in the cache.
            load: Loads the whole base, for factors that are missing and can't be made otherwise.
        """
        how: dict[str, Any] = {"settings": settings, "directory": directory}
        try:
            return build_factors_by_block(self.skeleton, self.targets, sequences, tokenizer, **how)
        except NotBlockwiseError as error:
            if is_first():
                _log.warning(
                    "every process loads the whole base into memory to make its factors: %s; run `lowrank decompose` "
                    "with the same base, decomposition, text and sequences before, and they are found",
                    error,
                )
        return build_factors(load(), self.targets, sequences, tokenizer, **how)


def open_shared(
    base: str,
    *,
    include: Sequence[str],
    exclude: Sequence[str],
    dtype: torch.dtype,
    device: torch.device,
    trust_remote_code: bool = False,
) -> SharedBase | None:
    """Return the base without its weights; None where some process can't open it so, and all have to load it whole.

    Args:
        base: As for ``load_base``.
        include: Globs of modules to target.
        exclude: Globs of modules to leave alone.
        dtype: Type of the weights that will be loaded.
        device: Where they go.
        trust_remote_code: Whether Python code that comes with the model may run.

    Raises:
        ValueError: The base is none, or no target is left.
    """
    found, reason = None, "another process can't read its files"
    with cooperating():
        try:
            skeleton = open_skeleton(base, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
            found = SharedBase(skeleton, skeleton.find_targets(include=include, exclude=exclude))
        except NotBlockwiseError as error:
            reason = str(error)
        if total(found is None) == 0:
            return found
        if is_first():
            _log.warning("%s is loaded whole by every process before it is sharded: %s", base, reason)
    return None
