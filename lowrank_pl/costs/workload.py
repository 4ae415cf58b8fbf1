"""The work of a run that decides on its needs, whichever command it is of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lowrank_pl.calibration.hidden_states import Cache
from lowrank_pl.costs.machine import Machine
from lowrank_pl.costs.model_sizes import ModelSizes
from lowrank_pl.factors.settings import Decomposition
from lowrank_pl.methods.masks.base import MaskMethod
from lowrank_pl.methods.prune.settings import LLMPruner, WidthPruning
from lowrank_pl.plans.budget import check_keep
from lowrank_pl.plans.plan import ModulePlan
from lowrank_pl.plans.storage import Storage, StorageChoice
from lowrank_pl.text.sequences import Calibration
from lowrank_pl.utils.checks import check_counts

__all__ = ["Healed", "Learner", "Preparation", "Refits", "Roundings", "Run", "Scoring", "Step", "Workload"]


@dataclass(frozen=True)
class Preparation:
    """How statistics are measured and factors are made.

    Args:
        calibration: The sequences that statistics are measured on.
        decompositions: How weights are decomposed; each is done once.
        shared: Decompositions in which the experts of a block share right factors, beside the ones in which they don't.
        weight_gradients: Whether mean weight gradients are measured.
        prunings: How bases are pruned, each for every fraction to keep.
        memory: Bytes that the sums of statistics may take at a time; statistics that take more are measured block by
            block. None is most of the device's memory.
        gradient_checkpointing: Whether passes for gradients compute the activations of blocks again.
        by_block: Whether the device holds the weights of one decoder block at a time.
        dropping: Whether it is measured what dropping experts costs.
        cache: Where hidden states wait between blocks of a base of which one block is loaded at a time; by default in
            main memory, unless that is short.

    Raises:
        ValueError: No sequence, or sequences shorter than two tokens.
    """

    calibration: Calibration = Calibration()
    decompositions: Sequence[Decomposition] = (Decomposition(),)
    shared: Sequence[Decomposition] = ()
    weight_gradients: bool = False
    prunings: Sequence[WidthPruning | LLMPruner] = ()
    memory: int | None = None
    gradient_checkpointing: bool = False
    by_block: bool = False
    dropping: bool = False
    cache: Cache | None = None

    def __post_init__(self) -> None:
        check_counts({"sequences": self.calibration.sequences})
        check_counts({"length": self.calibration.length}, least=2)

    @property
    def tokens(self) -> int:
        """Tokens of all calibration sequences."""
        return self.calibration.sequences * self.calibration.length

    @property
    def weighs_tokens(self) -> bool:
        """Whether some decomposition weighs tokens by the size of their gradient."""
        return any(settings.weighs_tokens for settings in self.all_decompositions)

    @property
    def all_decompositions(self) -> Sequence[Decomposition]:
        """All ways in which weights are decomposed."""
        return (*self.decompositions, *self.shared)


@dataclass(frozen=True)
class Step:
    """An optimizer step of one process.

    Args:
        length: Tokens of a sequence.
        batch_size: Sequences that go through the model at once.
        batches: Batches that are accumulated.
        teacher: Whether the dense model runs on every batch too.
        inactive_gate_stride: Every so many-th token gives the gradients of inactive gates.
        gradient_checkpointing: Whether the backward pass computes the activations of blocks again.
    """

    length: int
    batch_size: int = 1
    batches: int = 1
    teacher: bool = False
    inactive_gate_stride: int = 1
    gradient_checkpointing: bool = False

    @property
    def tokens(self) -> int:
        """Tokens of all batches of the step."""
        return self.batches * self.batch_size * self.length


@dataclass(frozen=True)
class Learner:
    """A learning run for every fraction to keep.

    Args:
        name: Name of its phase.
        mask: The mask method.
        step: What a process does in an optimizer step.
        steps: Optimizer steps.
        storage: How low-rank modules are stored in the end.
        validated: Sequences of all validations together.
    """

    name: str
    mask: MaskMethod
    step: Step
    steps: int
    storage: StorageChoice = "auto"
    validated: int = 0

    def stored(self, shape: tuple[int, int], itemsize: int) -> int:
        """Return how many components the masked layer of a module of ``shape`` holds."""
        return self.mask.stored_rank(shape, Storage(self.storage, itemsize))

    def active(self, shape: tuple[int, int], itemsize: int, keep: float) -> int:
        """Return how many components every token is multiplied by at the start, where a step takes longest."""
        stored = self.stored(shape, itemsize)
        if not self.mask.skips_inactive:
            return stored
        share = min(1.0, self.mask.start_keep(keep))
        return min(stored, int(Storage(self.storage, itemsize).rank_at(shape, share)))


@dataclass(frozen=True)
class Healed:
    """A compressed model that is trained against its dense model.

    Args:
        layers: The plan of its layers, by name; layers that it does not have are those of the dense model.
        step: What a process does in an optimizer step.
        steps: Optimizer steps.
        adapter_rank: Rank of the adapter that is trained; None trains the factors.
        adapted: How the names of the adapted layers end; None for all targets.
        validated: Sequences of all validations together.
    """

    layers: Mapping[str, ModulePlan]
    step: Step
    steps: int
    adapter_rank: int | None = None
    adapted: Sequence[str] | None = None
    validated: int = 0


@dataclass(frozen=True)
class Refits:
    """Refits of plans.

    Args:
        count: How many.
        sequences: Sequences of each.
        joint_passes: Passes of every block over all sequences, forward and back, in all joint refits together.
    """

    count: int = 0
    sequences: int = 0
    joint_passes: float = 0


@dataclass(frozen=True)
class Roundings:
    """Plans whose matrices are rounded to a few bits.

    Args:
        count: How many.
        tried_bits: How many numbers of bits are tried on every module, for budgets in bytes.
    """

    count: int = 0
    tried_bits: int = 0


@dataclass(frozen=True)
class Scoring:
    """Scores of the dense and the compressed models.

    Args:
        models: How many models are scored in this process.
        tokens: Tokens that each model is scored on; 0 where they are not known.
        length: Tokens of a sequence.
        from_main_memory: Whether models wait in main memory and come to the device a layer at a time. None does so
            where the device lacks room.

    Raises:
        ValueError: Sequences shorter than two tokens.
    """

    models: int = 0
    tokens: int = 0
    length: int = 512
    from_main_memory: bool | None = None

    def __post_init__(self) -> None:
        check_counts({"length": self.length}, least=2)


@dataclass(frozen=True)
class Workload:
    """All work of a run.

    Args:
        keeps: The fractions of targeted parameters to keep.
        preparation: How statistics are measured and factors are made.
        learners: The learning runs.
        healed: The compressed model that is trained.
        refits: The refits.
        roundings: The plans that are rounded to a few bits.
        scoring: The scores.
        exports: Whether the learned model is exported, and scored in a fresh process.
        reads_shares: Whether each process reads only its own share of a sharded base.

    Raises:
        ValueError: A fraction outside (0, 1], or no fraction.
    """

    keeps: Sequence[float] = (0.8,)
    preparation: Preparation = Preparation()
    learners: Sequence[Learner] = ()
    healed: Healed | None = None
    refits: Refits = Refits()
    roundings: Roundings = Roundings()
    scoring: Scoring = Scoring()
    exports: bool = False
    reads_shares: bool = False

    def __post_init__(self) -> None:
        if not self.keeps:
            raise ValueError("no fraction to keep was given: expected one or more in (0, 1]")
        for keep in self.keeps:
            check_keep(keep)


@dataclass(frozen=True)
class Run:
    """A run whose needs are forecast.

    Args:
        model: Sizes of the base.
        work: What the run does.
        machine: The processes that share the work.
        program: Bytes of main memory that Python and its libraries take in a process.
    """

    model: ModelSizes
    work: Workload
    machine: Machine
    program: float = 0.0

    @property
    def scores_from_main_memory(self) -> bool:
        """Whether models wait in main memory while they are scored and exported."""
        chosen = self.work.scoring.from_main_memory
        return self.machine.scores_from_main_memory(self.model.bytes) if chosen is None else chosen
