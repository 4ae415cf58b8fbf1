"""What ``lowrank decompose`` does: the factors of a base, made block by block where that is possible."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from lowrank_pl.calibration.build import build_factors
from lowrank_pl.calibration.build_by_block import build_factors_by_block, refuse_compressed
from lowrank_pl.calibration.hidden_states import Cache
from lowrank_pl.calibration.provenance import preparation_notes
from lowrank_pl.calibration.statistics import memory_size
from lowrank_pl.calibration.subject import Subject
from lowrank_pl.cli.workloads import decompose_workload
from lowrank_pl.costs.forecast import print_forecast
from lowrank_pl.costs.machine import machine_of
from lowrank_pl.factors.settings import Decomposition
from lowrank_pl.factors.store import FactorStore
from lowrank_pl.models.base import Base, DType
from lowrank_pl.models.lazy import NotBlockwiseError, open_skeleton
from lowrank_pl.models.targets import Targets
from lowrank_pl.plans.constraints import Constraints
from lowrank_pl.text.sequences import Calibration
from lowrank_pl.utils.environment import peak_memory, pick_device
from lowrank_pl.utils.files import write_json

__all__ = ["decompose"]

_log = logging.getLogger(__name__)


def decompose(
    base: str,
    *,
    decomposition: Decomposition = Decomposition(),
    text: str = "python-docs",
    length: int = 512,
    sequences: int = 256,
    dtype: DType = "float32",
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    store: Path | None = None,
    cache: Cache | None = None,
    memory: str | None = None,
    gradient_checkpointing: bool = False,
    device: str = "auto",
    trust_remote_code: bool = False,
    json: Path | None = None,
    dry_run: bool = False,
) -> FactorStore | None:
    """Make a model's factors, one block in memory at a time; allocate and fit then find them made.

    Where gradients are needed (two_sided, fwsvd), all sequences go forward through one block after the other, and back
    through one before the other. A .gguf file, a model whose blocks share more than the hidden state, or what at_keep
    measures, is loaded whole instead. A killed run goes on at the module it was at.

    Args:
        base: Hub id, folder, .gguf file, package:NAME, random:FAMILY or layers:NAME.
        decomposition: How weights are decomposed, such as --decomposition.kind svd; by default whitened.
        text: Calibration text: file, glob, hub dataset or python-docs.
        length: Tokens of a calibration sequence.
        sequences: How many sequences.
        dtype: Type to load weights in.
        include: Globs of modules to target, on full names or names inside a block.
        exclude: Globs of modules to leave alone.
        store: Folder of the factors; by default one named by their fingerprint in the cache.
        cache: Where the hidden states of all sequences wait between blocks, for gradients those before each of them: ram,
            or disk for memory-mapped files; by default ram, unless they would fill half of what is free.
        memory: What statistics that are collected at a time may take, such as 8GB, but at least those of a block; by
            default most of what is free. Of a model that is loaded whole, what takes more is collected block by block.
        gradient_checkpointing: Of a model that is loaded whole, compute activations again in backward passes.
        device: cpu, cuda, ...; auto takes cuda where there is one.
        trust_remote_code: Run Python code that comes with the base.
        json: Write the figures there.
        dry_run: Print what the factors need; nothing is loaded or written.

    Returns:
        The factors; None of a dry run.
    """
    began = time.perf_counter()
    budget = None if memory is None else memory_size(memory)
    described, constraints = Base(base, dtype, trust_remote_code), Constraints(include, exclude)
    calibration = Calibration(text, length, sequences)
    if dry_run:
        work = decompose_workload(
            base, decomposition, calibration, memory=budget, gradient_checkpointing=gradient_checkpointing
        )
        print_forecast(described, work, machine_of(device), constraints=constraints, output=json)
        return None
    place = pick_device(device)
    try:
        found = _by_block(described, calibration, constraints, decomposition, store, budget, cache, place)
        how = "block by block"
    except NotBlockwiseError as error:
        _log.warning("%s is loaded whole: %s", base, error)
        subject, how = Subject.load(described, calibration, constraints, device=place), "loaded whole"
        made = build_factors(
            subject, settings=decomposition, directory=store, memory=budget,
            gradient_checkpointing=gradient_checkpointing,
        )  # fmt: skip
        found = made, subject.targets
    made, targets = found
    seconds, memory_used, notes = time.perf_counter() - began, peak_memory(), preparation_notes(targets, made)
    head = f"{decomposition.kind}: factors of {len(targets.modules)} modules, {how}, in {seconds:.0f} s"
    print("\n".join([f"{head} and {memory_used / 1e9:.2f} GB of memory", *notes, f"store  {made.directory}"]))
    if json is not None:
        write_json(json, {
            "store": str(made.directory), "kind": decomposition.kind, "modules": len(targets.modules),
            "block_by_block": how == "block by block", "seconds": seconds, "peak_memory": memory_used, "notes": notes,
        })  # fmt: skip
    return made


def _by_block(
    base: Base,
    calibration: Calibration,
    constraints: Constraints,
    settings: Decomposition,
    directory: Path | None,
    memory: int | None,
    cache: Cache | None,
    device: torch.device,
) -> tuple[FactorStore, Targets]:
    """Return the factors, made with one block in memory, and their targets.

    Raises:
        NotBlockwiseError: The base has to be loaded whole.
    """
    refuse_compressed(settings)
    tokenizer = base.tokenizer()
    sequences = calibration.tokens(tokenizer)
    skeleton = open_skeleton(base.name, dtype=base.torch_dtype, device=device, trust_remote_code=base.trust_remote_code)
    targets = skeleton.find_targets(include=constraints.include, exclude=constraints.exclude)
    subject = Subject(skeleton.model, tokenizer, sequences, constraints, base, calibration, targets)
    made = build_factors_by_block(skeleton, subject, settings=settings, directory=directory, memory=memory, cache=cache)
    return made, targets
