"""``lowrank decompose``."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lowrank_pl.cli.parameters import Flat
from lowrank_pl.factors.settings import Decomposition
from lowrank_pl.models.settings import Base
from lowrank_pl.plans.constraints import Constraints
from lowrank_pl.text.settings import Calibration
from lowrank_pl.utils.files import check_output_files
from lowrank_pl.utils.json_files import write_figures

if TYPE_CHECKING:
    import torch

    from lowrank_pl.factors.store import FactorStore
    from lowrank_pl.models.targets import Targets

__all__ = ["decompose"]

_log = logging.getLogger(__name__)


def decompose(
    base: Flat[Base],
    *,
    decomposition: Decomposition = Decomposition(),
    calibration: Flat[Calibration] = Calibration(),
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    drop_experts: bool = False,
    shared_experts: bool = False,
    store: Path | None = None,
    cache: Literal["ram", "disk"] | None = None,
    memory: str | None = None,
    gradient_checkpointing: bool = False,
    device: str = "auto",
    json: Path | None = None,
    dry_run: bool = False,
) -> FactorStore | None:
    """Make a model's factors, one block in memory at a time; allocate and fit then find them made.

    Where gradients are needed (two_sided, fwsvd), all sequences go forward through one block after the other, and back
    in the opposite order. A .gguf file, a model whose blocks share more than the hidden state, and a decomposition with
    at_keep are loaded whole instead. A killed run goes on at the module it was at.

    Args:
        base: The model.
        decomposition: How weights are decomposed, such as --decomposition.kind svd; by default whitened.
        calibration: Text that the statistics are measured on.
        include: Globs of modules to target, on full names or names inside a block; the word embeddings beside them
            targets embeddings and head too, and loads the model whole.
        exclude: Globs of modules to leave alone.
        drop_experts: Measure what dropping each expert of a mixture costs too, for lowrank allocate --drop_experts
            true; with two_sided.
        shared_experts: Make the factors of lowrank allocate --shared_experts true: those of a mixture's gates of a
            block share one right factor, and those of its ups another.
        store: Folder of the factors; by default one named by their fingerprint in the cache.
        cache: Where the hidden states of all sequences wait between blocks, and before every block for gradients: ram,
            or disk for memory-mapped files; by default ram, unless they would fill half of the free memory.
        memory: Memory for statistics that are collected at a time, such as 8GB, but at least for those of a block; by
            default most of the free memory. In a model that is loaded whole, statistics that take more are collected
            block by block.
        gradient_checkpointing: In a model that is loaded whole, compute activations again in backward passes.
        device: cpu, cuda, ...; auto takes cuda where there is one.
        json: Write the figures there.
        dry_run: Print what the factors need; nothing is loaded, and no file but that of --json is written.

    Returns:
        The factors; None for a dry run.
    """
    from lowrank_pl.calibration.build import build_factors
    from lowrank_pl.calibration.provenance import preparation_notes
    from lowrank_pl.calibration.subject import Subject
    from lowrank_pl.cli.workloads import decompose_workload
    from lowrank_pl.costs.forecast import print_forecast
    from lowrank_pl.costs.machine import machine_of
    from lowrank_pl.models.base import model_files
    from lowrank_pl.models.lazy import NotBlockwiseError
    from lowrank_pl.text.sources import text_files
    from lowrank_pl.utils.environment import peak_memory, pick_device
    from lowrank_pl.utils.formatting import memory_size

    # A dry run reads no text.
    check_output_files(json, inputs=[*model_files(base.name), *([] if dry_run else text_files(calibration.text))])
    began = time.perf_counter()
    budget = None if memory is None else memory_size(memory)
    constraints = Constraints(include, exclude, drop_experts=drop_experts, shared_experts=shared_experts)
    if drop_experts and decomposition.kind != "two_sided":
        raise ValueError(
            f"drop_experts is true, but the decomposition is {decomposition.kind}: what dropping an expert costs is "
            "compared with two_sided factors; add --decomposition.kind two_sided, or leave out drop_experts"
        )
    if dry_run:
        work = decompose_workload(
            base.name, decomposition, calibration, memory=budget, gradient_checkpointing=gradient_checkpointing,
            dropping=drop_experts, cache=cache,
        )  # fmt: skip
        print_forecast(base, work, machine_of(device), constraints=constraints, output=json)
        return None
    place = pick_device(device)
    by_block = _ByBlock(decomposition, store, budget, cache)
    try:
        made, targets = by_block.factors(base, calibration, constraints, device=place)
        how = "block by block"
    except NotBlockwiseError as error:
        _log.warning("%s is loaded whole: %s", base.name, error)
        subject, how = Subject.load(base, calibration, constraints, device=place), "loaded whole"
        made = build_factors(
            subject, settings=decomposition, directory=store, memory=budget,
            gradient_checkpointing=gradient_checkpointing,
        )  # fmt: skip
        targets = subject.targets
    seconds, memory_used, notes = time.perf_counter() - began, peak_memory(), preparation_notes(targets, made)
    head = f"{decomposition.kind}: factors of {len(targets.names)} modules, {how}, in {seconds:.0f} s"
    print("\n".join([f"{head} and {memory_used / 1e9:.2f} GB of memory", *notes, f"store  {made.directory}"]))
    if json is not None:
        write_figures(json, {
            "store": str(made.directory), "kind": decomposition.kind, "modules": len(targets.names),
            "block_by_block": how == "block by block", "seconds": seconds, "peak_memory": memory_used, "notes": notes,
        })  # fmt: skip
    return made


@dataclass(frozen=True)
class _ByBlock:
    """How factors are built with one block in memory."""

    settings: Decomposition
    directory: Path | None
    memory: int | None
    cache: Literal["ram", "disk"] | None

    def factors(
        self, base: Base, calibration: Calibration, constraints: Constraints, *, device: torch.device
    ) -> tuple[FactorStore, Targets]:
        """Return the factors and their targets.

        Raises:
            NotBlockwiseError: The base has to be loaded whole.
        """
        from lowrank_pl.calibration.build_by_block import build_factors_by_block, refuse_compressed
        from lowrank_pl.calibration.subject import Subject
        from lowrank_pl.models.lazy import open_skeleton

        refuse_compressed(self.settings)
        tokenizer = base.tokenizer()
        sequences = calibration.tokens(tokenizer)
        skeleton = open_skeleton(
            base.name, dtype=base.torch_dtype, device=device, trust_remote_code=base.trust_remote_code
        )
        targets = constraints.stacked(skeleton.find_targets(include=constraints.include, exclude=constraints.exclude))
        subject = Subject(skeleton.model, tokenizer, sequences, constraints, base, calibration, targets)
        made = build_factors_by_block(
            skeleton, subject, settings=self.settings, directory=self.directory, memory=self.memory, cache=self.cache
        )
        return made, targets
