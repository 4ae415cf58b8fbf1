"""``--dry_run``: the needs of a run, told from the base's configuration before anything is loaded or written."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from lowrank_pl.costs.estimate import Estimate, Phase, Speeds, hold_freed_memory
from lowrank_pl.costs.factor_phases import (
    decomposition_phase,
    load_phase,
    norms_phase,
    pruning_phases,
    share_phase,
    statistics_phases,
)
from lowrank_pl.costs.learning_phases import (
    export_phase,
    healing_phases,
    learning_phase,
    refit_phase,
    rounding_phase,
    scoring_phase,
)
from lowrank_pl.costs.machine import Machine
from lowrank_pl.costs.model_sizes import model_sizes
from lowrank_pl.costs.probe import existing_folder, probe
from lowrank_pl.costs.workload import Run, Workload
from lowrank_pl.models.base import Base
from lowrank_pl.models.offload import STREAMED_BATCH_SIZE
from lowrank_pl.plans.constraints import Constraints
from lowrank_pl.utils.environment import resident_memory, total_memory
from lowrank_pl.utils.files import cache_root
from lowrank_pl.utils.formatting import duration, gigabytes, table
from lowrank_pl.utils.json_files import write_figures

__all__ = ["estimate", "print_forecast"]

_log = logging.getLogger(__name__)

_MORE_GPU_MEMORY = (
    "`lowrank decompose` makes the factors with one decoder block on the GPU; learning needs less with "
    "--model.compute.gradient_checkpointing true, and on more GPUs with -c strategy/fsdp"
)
_MORE_RAM = "`lowrank decompose --cache disk` makes the factors with the hidden states on disk"
_LESS_RAM = (
    "the hidden states are on disk already; a smaller --memory lowers what statistics take in `lowrank decompose`, and "
    "a smaller --length what a sequence does"
)
_MORE_DISK = "let LOWRANK_HOME name a folder on a larger disk"


def estimate(run: Run) -> Estimate:
    """Return what ``run`` needs, phase by phase."""
    phases = list(_phases(run))
    if run.machine.on_cpu:
        phases = hold_freed_memory(phases)
    return Estimate(phases, run.machine, list(_notes(run)))


def _phases(run: Run) -> Iterator[Phase]:
    work, preparation = run.work, run.work.preparation
    if not preparation.by_block:
        yield load_phase(run)
    if preparation.prunings:
        yield from pruning_phases(run)
    yield from statistics_phases(run)
    if preparation.all_decompositions:
        yield decomposition_phase(run)
    if work.reads_shares:
        yield share_phase(run)
    for learner in work.learners:
        yield learning_phase(run, learner)
    if work.healed is not None:
        yield from healing_phases(run)
    if work.refits.count and preparation.weighs_tokens:
        yield norms_phase(run)
    if work.refits.count:
        yield refit_phase(run)
    if work.roundings.count:
        yield rounding_phase(run)
    if work.scoring.models:
        yield scoring_phase(run)
    if work.exports:
        yield export_phase(run)


def _notes(run: Run) -> Iterator[str]:
    work, machine = run.work, run.machine
    yield "not counted: reading and tokenising text; counted in full: what the caches already hold"
    if work.preparation.prunings:
        yield (
            "the phases after pruning are counted once, for the base as it is: every pruned base needs its own, each "
            "less than that"
        )
    if machine.processes > 1:
        yield "GPU memory and RAM are those of one process; disk is that of all"
    if not machine.on_cpu:
        yield "GPU memory is that of tensors: CUDA takes about half a GB more"
        if machine.memory is None:
            yield "the GPU is not here: what adapts to its memory, as statistics do, is counted at its least"
    if machine.sharded and not work.preparation.by_block:
        yield (
            "statistics and factors of this base are made in the main memory of every process, which is slow: make "
            "them first with `lowrank decompose`"
        )
    if machine.sharded and not work.reads_shares:
        yield "every process loads the whole base into main memory before it is sharded"
    if run.scores_from_main_memory:
        yield f"models are scored from main memory: all weights are read for every {STREAMED_BATCH_SIZE} sequences"
        if work.learners and (work.refits.count or work.roundings.count):
            yield "the run refuses a refit and a rounding there: leave them out, in `fit` with --finish.refit null"
    if machine.here:
        yield from _untimed(run)


def _untimed(run: Run) -> Iterator[str]:
    """Yield what the time leaves out."""
    if run.machine.sharded:
        yield "the time leaves out what processes send each other"
    if run.scores_from_main_memory:
        yield "the time leaves out the weights' way from main memory to the GPU"
    if run.work.scoring.models and not run.work.scoring.tokens:
        yield "the time leaves scoring out: the length of the text is not known; give a number of sequences to score"


def print_forecast(
    base: Base,
    work: Workload,
    machine: Machine,
    *,
    constraints: Constraints = Constraints(),
    output: str | Path | None = None,
) -> Estimate:
    """Print what a run needs, and return it.

    The table by phase and the table by part tell memory and disk; the last table tells the peak of each, and whether
    this machine has that much. A time is told only of a run on this machine, from speeds measured in some seconds.

    Args:
        base: The base, of which only the configuration is read. The name may be ``shapes:NAME`` for a large model.
        work: What the run does.
        machine: The processes that share the work.
        constraints: Which linear layers are targets.
        output: A JSON file for the figures.

    Raises:
        ValueError: The base doesn't exist, or has no target.
    """
    _log.info("reading the shapes of %s; no weight is loaded", base.name)
    length = work.preparation.calibration.length
    model = model_sizes(base, length=length, constraints=constraints)
    if model.embeddings:
        # Their statistics need passes through the whole model.
        work = replace(work, preparation=replace(work.preparation, by_block=False))
    found = estimate(Run(model, work, machine, program=resident_memory()))
    speeds = probe(base, model, device=machine.device, length=length) if machine.here else None
    used = f", {(model.parameters - sum(model.idle)) / 1e9:,.2f} of them for a token" if any(model.idle) else ""
    title = (
        f"{base.name}: {model.parameters / 1e9:,.2f} billion parameters{used} in {base.dtype}, {len(model.shapes):,} "
        f"targets; {machine.describe()}"
    )
    notes = [*([] if speeds is None else [f"time: {speeds.source}"]), *found.notes]
    parts = [title, found.phase_table(speeds), found.part_table(), "\n".join(notes), _summary(found, speeds)]
    print("\n\n".join(parts))
    if output is not None:
        write_figures(output, {"base": base.name, "parameters": model.parameters, **found.figures(speeds)})
    return found


@dataclass(frozen=True)
class _Need:
    """The most that a run needs of something.

    Args:
        name: Name of it.
        needed: Bytes.
        phase: The phase that needs them.
        here: Bytes that this machine has; None where the run is elsewhere, or the system doesn't tell.
        cure: What to do where this machine has less.
    """

    name: str
    needed: float
    phase: str
    here: float | None = None
    cure: str = ""

    @property
    def lacking(self) -> bool:
        """Whether this machine has less than is needed."""
        return self.here is not None and self.needed > self.here


def _needs(found: Estimate) -> Iterator[_Need]:
    machine = found.machine

    def most(name: str, size: Callable[[Phase], float], here: float | None = None, cure: str = "") -> _Need:
        peak = found.peak(size)
        return _Need(name, size(peak), peak.name, here if machine.here else None, cure)

    more_ram = _LESS_RAM if any(phase.scratch for phase in found.phases) else _MORE_RAM
    if not machine.on_cpu:
        yield most("GPU memory of a process", found.device_bytes, machine.memory, _MORE_GPU_MEMORY)
    if machine.processes == 1:
        yield most("RAM", found.host_bytes, total_memory(), more_ram)
    else:
        yield most("RAM of a process", found.host_bytes)
        name = f"RAM of the {machine.processes_of_a_node} processes of a node"
        yield most(name, found.node_bytes, total_memory(), more_ram)
    yield _Need("disk", found.disk_bytes(), "all phases together", _free_disk() if machine.here else None, _MORE_DISK)


def _summary(found: Estimate, speeds: Speeds | None) -> str:
    """Return the peaks, whether this machine has room for them, and what to do where it has not."""
    needs = list(_needs(found))
    rows = [(need.name, gigabytes(need.needed), need.phase, *_verdict(need)) for need in needs]
    if speeds is not None:
        rows.append(("time", duration(found.seconds(speeds)), "all phases together", "", ""))
    head, align = ("", "needed", "in", "here", "fits"), ("left", "right", "left", "right", "left")
    shown = 5 if found.machine.here else 3
    told = table(head[:shown], [row[:shown] for row in rows], "simple", align=align[:shown])
    return "\n".join([told, *(f"TOO LITTLE {need.name}: {need.cure}" for need in needs if need.lacking)])


def _verdict(need: _Need) -> tuple[str, str]:
    return ("", "") if need.here is None else (gigabytes(need.here), "NO" if need.lacking else "yes")


def _free_disk() -> float:
    """Return the free bytes on the disk of the caches."""
    return float(shutil.disk_usage(existing_folder(cache_root())).free)
