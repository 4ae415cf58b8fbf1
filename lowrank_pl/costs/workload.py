"""What a run does, as far as its cost goes, whichever command it is of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from lowrank_pl.factors.settings import Decomposition
from lowrank_pl.methods.masks.base import MaskMethod
from lowrank_pl.methods.prune.base import WidthPruning
from lowrank_pl.models.offload import too_large
from lowrank_pl.plans.budget import check_keep
from lowrank_pl.plans.storage import Storage, StorageChoice

__all__ = ["Learner", "Machine", "Workload"]


@dataclass(frozen=True)
class Machine:
    """What a run is spread over.

    Args:
        device: ``cpu`` or ``cuda``.
        processes: One a device.
        sharded: Whether the frozen weights are spread over the processes (FSDP2), instead of each holding all.
        memory: Bytes of the memory of a device, main memory where that is a CPU, if they are known.

    Raises:
        ValueError: No process.
    """

    device: str = "cpu"
    processes: int = 1
    sharded: bool = False
    memory: float | None = None

    def __post_init__(self) -> None:
        if self.processes < 1:
            raise ValueError(f"{self.processes} processes were asked for: expected at least 1")

    @property
    def unified(self) -> bool:
        """Whether the device computes in main memory."""
        return self.device == "cpu"

    def lacks_room(self, weights: float) -> bool:
        """Return whether the end of a run on a base of so many bytes, which is sharded, scores it from main memory."""
        return self.sharded and not self.unified and self.memory is not None and too_large(weights, self.memory)


@dataclass(frozen=True)
class Learner:
    """One learning run.

    Args:
        name: What its phase is called.
        mask: The mask method.
        storage: How low-rank modules are stored in the end.
        steps: Optimizer steps.
        sequences: Sequences of a batch of one process, over all batches of a step.
        batch_size: Sequences that go through the model at once.
        length: Tokens of a sequence.
        validated: Sequences of all validations together.
        teacher: Whether the dense model runs on every batch too.
        inactive_gate_stride: Gates that are off learn from every so many-th token.
        recomputed: Whether a backward pass computes the activations of blocks again.
    """

    name: str
    mask: MaskMethod
    steps: int
    length: int
    storage: StorageChoice = "auto"
    sequences: int = 1
    batch_size: int = 1
    validated: int = 0
    teacher: bool = False
    inactive_gate_stride: int = 1
    recomputed: bool = False

    def stored(self, shape: tuple[int, int], itemsize: int) -> int:
        """Return the components of a module of ``shape`` that its masked layer holds."""
        return self.mask.stored_rank(shape, Storage(self.storage, itemsize))

    def lit(self, shape: tuple[int, int], itemsize: int, keep: float) -> int:
        """Return the components that every token goes through, at the start, which is the dearest step."""
        stored = self.stored(shape, itemsize)
        if not self.mask.skips_inactive:
            return stored
        share = min(1.0, self.mask.start_keep(keep))
        return min(stored, int(Storage(self.storage, itemsize).rank_at(shape, share)))


@dataclass(frozen=True)
class Workload:
    """All that a run does.

    Args:
        keeps: The fractions of targeted parameters to keep.
        sequences: Sequences that statistics are measured on.
        length: Tokens of each.
        decompositions: How weights are decomposed, each once.
        weight_gradients: Whether mean weight gradients are measured.
        prunings: How MLPs are narrowed, each for every one of ``keeps``.
        learners: Learning runs, each of which is done for every one of ``keeps``.
        refitted: Sequences of each refit.
        refits: How many refits.
        scored: Tokens that a model is scored on.
        score_length: Tokens of a sequence of these.
        models: How many models are scored from memory.
        exports: Whether the learned model is exported, and scored in a fresh process.
        waiting: Whether models wait in main memory while they are scored and exported, and come to the device a layer
            at a time; None where the machine lacks room for them.
        memory: Bytes that the sums of statistics may take at a time; what takes more is measured block by block. By
            default most of what is free.
        recomputed: Whether the passes for gradients compute the activations of blocks again.
        streamed: Whether the device holds one decoder block's weights at a time while factors are made.
        shared: Whether each process reads its own share of a base that is to be sharded, and no more of it.

    Raises:
        ValueError: A fraction outside (0, 1], no fraction, or a number below its least.
    """

    keeps: Sequence[float] = (0.8,)
    sequences: int = 256
    length: int = 512
    decompositions: Sequence[Decomposition] = field(default_factory=lambda: (Decomposition(),))
    weight_gradients: bool = False
    prunings: Sequence[WidthPruning] = ()
    learners: Sequence[Learner] = ()
    refitted: int = 0
    refits: int = 0
    scored: int = 0
    score_length: int = 512
    models: int = 0
    exports: bool = False
    waiting: bool | None = None
    memory: int | None = None
    recomputed: bool = False
    streamed: bool = False
    shared: bool = False

    def __post_init__(self) -> None:
        if not self.keeps:
            raise ValueError("no fraction to keep was given: expected one or more in (0, 1]")
        for keep in self.keeps:
            check_keep(keep)
        for name, least in (("sequences", 1), ("length", 2), ("refitted", 0), ("scored", 0), ("score_length", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}: expected a whole number of at least {least}")

    @property
    def weighs_tokens(self) -> bool:
        """Whether tokens count by the size of their gradient in some decomposition."""
        return any(settings.weighs_tokens for settings in self.decompositions)
