"""``--dry_run``: what a run will need, told from the base's configuration before anything is loaded or written."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from lowrank_pl.costs.anatomy import Anatomy, anatomy, read_config
from lowrank_pl.costs.estimate import Estimate, Phase, held_on_to
from lowrank_pl.costs.factor_phases import (
    decomposition_phase,
    load_phase,
    narrowing_phases,
    norms_phase,
    share_phase,
    statistics_phases,
)
from lowrank_pl.costs.learning_phases import export_phase, learning_phase, refit_phase, scoring_phase, waits
from lowrank_pl.costs.machine import DryRun, machine_of
from lowrank_pl.costs.probe import ASSUMED, existing_folder, probe
from lowrank_pl.costs.workload import Machine, Workload
from lowrank_pl.factors.settings import Decomposition
from lowrank_pl.models.base import loads_in_parts
from lowrank_pl.models.offload import STREAMED_BATCH_SIZE
from lowrank_pl.utils.environment import resident_memory, total_memory
from lowrank_pl.utils.files import cache_root, write_json
from lowrank_pl.utils.formatting import gigabytes

__all__ = ["dry_run", "dry_run_decompose", "estimate"]

_log = logging.getLogger(__name__)


def estimate(model: Anatomy, work: Workload, machine: Machine, *, program: float = 0.0) -> Estimate:
    """Return what ``work`` on ``model`` needs, phase by phase.

    Args:
        model: Sizes of the base.
        work: What the run does.
        machine: What it is spread over.
        program: Bytes of main memory that Python and its libraries take.
    """
    phases = list(_phases(model, work, machine, program))
    if machine.unified:
        phases = held_on_to(phases)
    return Estimate(phases, machine.unified, list(_notes(model, work, machine)))


def _phases(model: Anatomy, work: Workload, machine: Machine, program: float) -> Iterator[Phase]:
    if not work.streamed:
        yield load_phase(model, machine, program)
    if work.prunings:
        yield from narrowing_phases(model, work, machine, program)
    yield from statistics_phases(model, work, machine, program)
    if work.decompositions:
        yield decomposition_phase(model, work, machine, program)
    if work.shared:
        yield share_phase(model, machine, program)
    for learner in work.learners:
        yield learning_phase(model, learner, work, machine, program)
    if work.refits and work.weighs_tokens:
        yield norms_phase(model, work, machine, program)
    if work.refits:
        yield refit_phase(model, work, machine, program)
    if work.models:
        yield scoring_phase(model, work, machine, program)
    if work.exports:
        yield export_phase(model, work, machine, program)


def _notes(model: Anatomy, work: Workload, machine: Machine) -> Iterator[str]:
    yield "nothing that a cache already holds is taken off; text that is read and tokenised is not counted"
    if work.prunings:
        yield "what comes after the narrowing is counted as if nothing were left out: it is less"
    if not machine.unified:
        yield "GPU memory is what tensors take; CUDA itself takes about half a GB beside them"
    if machine.processes > 1:
        yield f"memory is that of one of {machine.processes} processes, which share statistics and decomposition"
    if machine.sharded and not work.streamed:
        yield (
            "a base that is to be sharded is measured and decomposed whole, in the main memory of every process, and "
            "takes longer there than the time says; `lowrank decompose` makes the factors on a GPU before"
        )
    if work.shared:
        yield "each process reads its own share of the base, and no more where the factors are made before"
    elif machine.sharded:
        yield "every process loads the whole base into main memory before it is sharded"
    if waits(model, work, machine):
        yield (
            "models are scored and exported from main memory; that a layer's weights come to the device for every "
            f"{STREAMED_BATCH_SIZE} sequences is not in the time"
        )
    if work.models and not work.scored:
        yield "the whole text is scored, whose tokens are not known before it is read: scoring is left out"


def dry_run(
    base: str,
    work: Workload,
    machine: Machine,
    *,
    dtype: str,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    speeds: DryRun = True,
    trust_remote_code: bool = False,
    json: str | Path | None = None,
) -> Estimate:
    """Print what a run needs, in memory, disk, tokens and time, and return it.

    Args:
        base: Anything that ``load_base`` takes, or ``shapes:NAME`` for a large model by name; only its configuration
            is read.
        work: What the run does.
        machine: What it is spread over.
        dtype: Type that the base is loaded in.
        include: Globs of modules to target.
        exclude: Globs of modules to leave alone.
        speeds: True measures them here, in seconds; a name takes those of :data:`lowrank_pl.costs.probe.ASSUMED`.
        trust_remote_code: Run Python code that comes with the base.
        json: Write the figures there too.

    Raises:
        ValueError: There is no such base, or no target in it.
    """
    _log.info("reading the shapes of %s; no weight is loaded", base)
    kind = getattr(torch, dtype)
    model = anatomy(
        base, dtype=kind, length=work.length, include=include, exclude=exclude, trust_remote_code=trust_remote_code
    )
    found = estimate(model, work, machine, program=resident_memory())
    if speeds is True:
        config = read_config(base, trust_remote_code=trust_remote_code)
        measured = probe(model, config, dtype=kind, device=machine.device, length=work.length)
    else:
        measured = ASSUMED[str(speeds)]
    shown = f"{base}: {model.parameters / 1e9:,.2f} billion parameters in {dtype}, {len(model.modules)} targets"
    print("\n".join([shown, "", found.text(measured), *_shortages(found, machine, speeds)]))
    if json is not None:
        write_json(json, {"base": base, "parameters": model.parameters, **found.figures(measured)})
    return found


def dry_run_decompose(
    base: str,
    *,
    decomposition: Decomposition,
    sequences: int,
    length: int,
    dtype: str = "float32",
    device: str = "auto",
    memory: int | None = None,
    gradient_checkpointing: bool = False,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    speeds: DryRun = True,
    trust_remote_code: bool = False,
    json: str | Path | None = None,
) -> Estimate:
    """Print what making factors alone needs, and return it; arguments that are not said here are those of ``dry_run``.

    They are made with one decoder block loaded at a time where the base's files can be read in parts.

    Args:
        base: The base.
        decomposition: How weights are decomposed.
        sequences: Sequences that statistics are measured on.
        length: Tokens of each.
        dtype: Type that the base is loaded in.
        device: ``cpu``, ``cuda``, ... or ``auto``.
        memory: Bytes that statistics may take at a time; None is no limit.
        gradient_checkpointing: Whether passes for gradients compute activations again.
        include: Globs of modules to target.
        exclude: Globs of modules to leave alone.
        speeds: As in ``dry_run``.
        trust_remote_code: Likewise.
        json: Likewise.
    """
    work = Workload(
        sequences=sequences, length=length, decompositions=(decomposition,), memory=memory,
        recomputed=gradient_checkpointing,
        streamed=decomposition.block_by_block and loads_in_parts(base),
    )  # fmt: skip
    return dry_run(
        base, work, machine_of(device, speeds=speeds), dtype=dtype, include=include, exclude=exclude, speeds=speeds,
        trust_remote_code=trust_remote_code, json=json,
    )  # fmt: skip


def _shortages(found: Estimate, machine: Machine, speeds: DryRun) -> Iterator[str]:
    """Yield in sentences what there is too little of: on this machine, or on the GPU whose speeds are assumed."""
    if machine.memory is not None and not machine.unified:
        size = machine.memory
        large = [phase.name for phase in found.phases if found.device_bytes(phase) > size]
        if large:
            yield f"TOO LITTLE GPU MEMORY: {gigabytes(size)}, and more is needed for {', '.join(large)}"
    if speeds is not True:
        return
    total, memory = found.totals(), total_memory()
    if memory is not None and total["memory"] > memory:
        yield f"TOO LITTLE RAM: {gigabytes(memory)}, and {gigabytes(total['memory'])} are needed"
    free = shutil.disk_usage(existing_folder(cache_root())).free
    if total["disk"] > free:
        yield f"TOO LITTLE DISK: {gigabytes(free)} are free, and {gigabytes(total['disk'])} are needed"
