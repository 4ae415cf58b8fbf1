"""Text for learning ranks, for statistics and for validation, as a Lightning data module."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import count
from typing import Any, cast

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from lowrank_pl.models.base import load_tokenizer
from lowrank_pl.text.sequences import (
    Calibration,
    sequences_fingerprint,
    uses_bos,
    warn_of_overlap,
)
from lowrank_pl.text.sources import TextSource, parse_mixture
from lowrank_pl.training.lightning_internals import batches_done
from lowrank_pl.utils.checks import check_counts
from lowrank_pl.utils.files import sha256_of

__all__ = [
    "CalibrationData",
    "Place",
    "SequenceLoader",
    "StatisticsText",
    "ValidationText",
    "batch_tokens",
    "calibration_data",
]

Place = tuple[int, int]
"""An epoch, and the number of its batches that training has done."""


_log = logging.getLogger(__name__)


class SequenceLoader:
    """Batches of sequences in an order that depends only on ``(seed, epoch)``, so that a run can resume at any batch.

    When the first batch of an epoch is fetched, ``place`` says where to begin. With a Trainer this is its own count of
    trained batches, which its checkpoints contain, so prefetching and the number of workers can't shift it. The class
    is not a ``DataLoader``, so that Lightning does not change the order or its distribution over processes.

    Args:
        sequences: int64 ``[sequences, length]``.
        batch_size: Sequences in a batch of one process.
        seed: Seed of the order; None keeps the order of the text.
        rank: Rank of this process; batches ``i`` of all processes together are one slice of the order.
        world_size: Number of processes.
        drop_tail: Omit the sequences that do not fill a batch of every process. Otherwise the last batch is smaller,
            and only sequences that can't be divided equally are omitted.
        num_workers: Processes that prefetch batches; the sequences are in memory, so 0 is usually best.
        place: Returns the epoch and the number of its batches that are done; by default the loader counts epochs.

    Raises:
        ValueError: The sequences do not fill one batch of every process.

    >>> loader = SequenceLoader(torch.arange(10).view(5, 2), batch_size=2, seed=None)
    >>> [batch.tolist() for batch in loader]
    [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]
    """

    def __init__(
        self,
        sequences: Tensor,
        *,
        batch_size: int,
        seed: int | None,
        rank: int = 0,
        world_size: int = 1,
        drop_tail: bool = True,
        num_workers: int = 0,
        place: Callable[[], Place] | None = None,
    ) -> None:
        unit = world_size * batch_size if drop_tail else world_size
        self._used = len(sequences) // unit * unit
        if self._used == 0:
            raise ValueError(
                f"{len(sequences)} sequences of text are fewer than one batch of {batch_size} for each of {world_size} "
                "processes: give more text or a smaller batch size"
            )
        if rank == 0 and self._used < len(sequences):
            others = "" if seed is None else ", different ones in each epoch"
            left = len(sequences) - self._used
            _log.warning(
                "%d of %d sequences are left out%s: %d are taken at a time", left, len(sequences), others, unit
            )
        epochs = count()
        self._place = place or (lambda: (next(epochs), 0))
        self._sequences = sequences
        self._batch_size = batch_size
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self._num_workers = num_workers
        self._fingerprint = sequences_fingerprint(sequences)

    def __len__(self) -> int:
        """Return the number of batches of this process in an epoch."""
        return -(-self._used // (self._world_size * self._batch_size))

    def __iter__(self) -> Iterator[Tensor]:
        """Yield the remaining batches of the epoch, int64 ``[batch, length]``.

        As a generator, it calls ``place`` at the first batch and not before: Lightning makes the iterator while it
        restores a checkpoint, before its counters are restored.
        """
        epoch, done = self._place()
        loader = DataLoader(
            cast(Dataset[Tensor], self._sequences),
            batch_sampler=self.batches(epoch)[done:],
            num_workers=self._num_workers,
            generator=torch.Generator(),  # otherwise every epoch would use a number of the global random state
        )
        yield from loader

    def batches(self, epoch: int) -> list[list[int]]:
        """Return the indices of the sequences in each batch of this process in ``epoch``."""
        size, world = self._batch_size, self._world_size
        order = self._order(epoch)[: self._used]
        steps = [order[begin : begin + size * world] for begin in range(0, len(order), size * world)]
        return [step[self._rank * len(step) // world : (self._rank + 1) * len(step) // world] for step in steps]

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the order depends on; the Trainer's own state has the position in it."""
        return {
            "windows": self._fingerprint,
            "seed": self._seed,
            "batch_size": self._batch_size,
            "world_size": self._world_size,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check the data of the run that wrote the checkpoint.

        Raises:
            ValueError: The sequences or the seed differ, so the checkpoint's position in the epoch has no meaning here.
        """
        mine = self.state_dict()
        other = [key for key, value in mine.items() if state_dict.get(key) != value]
        # The key is the one of checkpoints that were written before sequences were called so.
        names = {key: "sequences" if key == "windows" else key for key in other}
        listed = ", ".join(f"{name} {state_dict.get(key)} there and {mine[key]} here" for key, name in names.items())
        if "windows" in other or "seed" in other:
            raise ValueError(
                f"the checkpoint was written while learning from other data ({listed}), so its epoch can't be resumed: "
                "give that run's text, tokenizer, length, sequences and seed, or start a new run"
            )
        if other:
            _log.warning("this epoch continues with other batches than in the checkpoint's run: %s", listed)

    def _order(self, epoch: int) -> list[int]:
        if self._seed is None:
            return list(range(len(self._sequences)))
        generator = torch.Generator().manual_seed(int(sha256_of(str(self._seed), str(epoch))[:15], 16))
        return cast(list[int], torch.randperm(len(self._sequences), generator=generator).tolist())


@dataclass(frozen=True)
class _Sequences:
    train: Tensor
    statistics: Tensor
    validation: Tensor


@dataclass(frozen=True)
class StatisticsText:
    """Text on which the moments of activations are measured.

    Args:
        text: Name of the text; by default the learning text.
        length: Tokens per sequence; by default as for learning.
        sequences: Number of sequences; by default as for learning.
    """

    text: str | None = None
    length: int | None = None
    sequences: int | None = None

    def resolved(self, learning: Calibration) -> Calibration:
        """Return the text, with the settings of ``learning`` for all that are None."""
        given = {name: value for name, value in asdict(self).items() if value is not None}
        return replace(learning, **given)


@dataclass(frozen=True)
class ValidationText:
    """Text on which the hard plan is validated.

    Args:
        text: Name of the text. By default validation uses sequences of the learning text that come after those for
            learning and statistics, so that neither contains them.
        sequences: Number of sequences, of the same length as for learning; 0 switches validation off.
        batch_size: Sequences in a validation batch of one process.
    """

    text: str | None = None
    sequences: int = 8
    batch_size: int = 1


class CalibrationData(pl.LightningDataModule):
    """Token sequences for learning ranks, for statistics and for validation.

    The name of a text is ``python-docs``, a file, folder or glob, or a hub dataset (``lowrank_pl.text``). A run that is
    resumed, even in the middle of an epoch, continues with exactly the batches that would have followed.

    Args:
        learning: Text that ranks are learned from; an epoch has its number of sequences.
        tokenizer: The base model's tokenizer, or the name of the base model.
        statistics: Text for the moments of activations.
        validation: Text for validating the hard plan.
        batch_size: Sequences in a training batch of one process.
        seed: Seed of the random order of each epoch; None keeps the order of the text.
        num_workers: Processes that prefetch batches; the sequences are in memory, so 0 is usually best.
        trust_remote_code: Whether to run code that comes with a tokenizer.

    Raises:
        ValueError: A number is out of range.

    >>> from lowrank_pl.models.tiny import byte_tokenizer
    >>> learning = Calibration("python-docs", length=32, sequences=6)
    >>> data = CalibrationData(learning, byte_tokenizer(), validation=ValidationText(sequences=2))
    >>> data.train_sequences.shape, data.validation_sequences.shape
    (torch.Size([6, 32]), torch.Size([2, 32]))
    >>> next(iter(data.train_dataloader())).shape
    torch.Size([1, 32])
    """

    def __init__(
        self,
        learning: Calibration = Calibration(),
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        *,
        statistics: StatisticsText = StatisticsText(),
        validation: ValidationText = ValidationText(),
        batch_size: int = 1,
        seed: int | None = 0,
        num_workers: int = 0,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        self.learning = learning
        self.statistics = statistics.resolved(learning)
        self.validation = validation
        self.validation_text = learning.text if validation.text is None else validation.text
        self.batch_size = batch_size
        self.seed = seed
        self.num_workers = num_workers
        self.trust_remote_code = trust_remote_code
        self._tokenizer = tokenizer
        self._built: _Sequences | None = None
        self._check_arguments()

    def prepare_data(self) -> None:
        """Fill the token caches; Lightning calls this in one process."""
        self.setup()

    def setup(self, stage: str | None = None) -> None:
        """Load the sequences, once.

        Args:
            stage: Lightning's stage; every stage has the same data.

        Raises:
            ValueError: A text can't be read, or is too short.
        """
        if self._built is None:
            self._built = self._build()

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, loaded if it was given by name."""
        if self._tokenizer is None:
            raise ValueError("CalibrationData has tokenizer=None: give the base model's tokenizer, or the model's name")
        if isinstance(self._tokenizer, str):
            self._tokenizer = load_tokenizer(self._tokenizer, trust_remote_code=self.trust_remote_code)
        return self._tokenizer

    def tokenizer_by_default(self, base: str) -> None:
        """Take the tokenizer of the model ``base`` if none was given."""
        if self._tokenizer is None:
            self._tokenizer = base

    @property
    def train_sequences(self) -> Tensor:
        """The sequences to learn from, int64 ``[sequences, length]``."""
        return self._ready().train

    @property
    def statistics_sequences(self) -> Tensor:
        """The sequences for statistics, int64 ``[sequences, length]``."""
        return self._ready().statistics

    @property
    def validation_sequences(self) -> Tensor:
        """The sequences for validation, int64 ``[sequences, length]``."""
        return self._ready().validation

    def batches_of_epoch(self, sequences: int, *, processes: int, limit: int | float | None) -> int:
        """Return how many batches an epoch has for one process.

        Args:
            sequences: The sequences to learn from.
            processes: The processes that share them.
            limit: ``limit_train_batches``: a number of batches, or a fraction of them; None limits nothing.

        >>> data = CalibrationData(batch_size=2)
        >>> [data.batches_of_epoch(40, processes=2, limit=limit) for limit in (4, 0.5, None)]
        [4, 5, 10]
        """
        batches = max(1, sequences // (self.batch_size * processes))
        if limit is None:
            return batches
        return max(1, min(batches, limit) if isinstance(limit, int) else int(batches * limit))

    def train_dataloader(self) -> SequenceLoader:
        """Return the batches int64 ``[batch_size, length]`` of this process."""
        # With overfit_batches the Trainer expects the same batches in every epoch.
        overfitting = getattr(self.trainer, "overfit_batches", 0) > 0
        rank, world_size = self._process()
        return SequenceLoader(
            self.train_sequences,
            batch_size=self.batch_size,
            seed=None if overfitting else self.seed,
            rank=rank,
            world_size=world_size,
            num_workers=self.num_workers,
            place=self._place if self.trainer is not None and self.trainer.training else None,
        )

    def val_dataloader(self) -> list[SequenceLoader]:
        """Return this process's batches of validation sequences; an empty list without validation."""
        if not len(self.validation_sequences):
            return []
        rank, world_size = self._process()
        loader = SequenceLoader(
            self.validation_sequences,
            batch_size=self.validation.batch_size,
            seed=None,
            rank=rank,
            world_size=world_size,
            drop_tail=False,
            num_workers=self.num_workers,
        )
        return [loader]

    def _check_arguments(self) -> None:
        check_counts({
            "learning.length": self.learning.length, "statistics.length": self.statistics.length,
        }, least=2)  # fmt: skip
        check_counts({
            "learning.sequences": self.learning.sequences, "statistics.sequences": self.statistics.sequences,
            "validation.batch_size": self.validation.batch_size, "batch_size": self.batch_size,
        })  # fmt: skip
        check_counts({"validation.sequences": self.validation.sequences, "num_workers": self.num_workers}, least=0)

    def _ready(self) -> _Sequences:
        self.setup()
        assert self._built is not None
        return self._built

    def _process(self) -> tuple[int, int]:
        """Return the rank of this process and the number of processes."""
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def _place(self) -> Place:
        """Return the epoch and the number of its batches that are done, from the batches of the whole run.

        Lightning 2.6.6, resumed with ``max_steps`` from a checkpoint at the end of an epoch, counts that epoch twice
        and requests one more batch of it. The epoch is therefore computed from the total number of batches, and a
        finished epoch has no batches left.
        """
        assert self.trainer is not None
        processed, fetched = batches_done(self.trainer)
        size = int(self.trainer.num_training_batches)
        epoch, done = divmod(processed, size)
        return epoch, done if fetched < size else len(self.train_sequences)

    def _build(self) -> _Sequences:
        """Return all sequences; validation sequences of the learning text come after all others of that text."""
        texts = (self.learning.text, self.statistics.text, self.validation_text)
        # Usually they are one text, whose folder is listed once.
        parsed = {text: parse_mixture(text) for text in dict.fromkeys(texts)}
        learning, statistics, validation = (parsed[text] for text in texts)
        held_out_of_learning = _same(validation, learning)
        if not held_out_of_learning and set(validation) & set(learning):
            raise ValueError(
                f"validation text {self.validation_text!r} shares a text with {self.learning.text!r}, which is learned "
                "from: give another text or another part=, or leave validation.text out to hold out sequences of all"
            )
        held_out = self.validation.sequences if held_out_of_learning else 0
        bos = int(uses_bos(self.tokenizer))
        room, statistics_room = self.learning.length - bos, self.statistics.length - bos
        wanted = self.learning.sequences
        same = _same(statistics, learning)
        shared = bool(held_out) and same
        if shared:
            # Enough learning sequences to cover the tokens of the statistics.
            wanted = max(wanted, -(-self.statistics.sequences * statistics_room // room))
        found = replace(self.learning, sequences=wanted + held_out).tokens(self.tokenizer)
        before = len(found) - held_out
        most = before * room // statistics_room if shared else self.statistics.sequences
        if before < 1 or most < 1:
            raise ValueError(
                f"text {self.learning.text!r} has {len(found)} sequences of {self.learning.length} tokens, too few to "
                f"hold out {held_out} for validation: give a longer text, a validation.text, smaller lengths or fewer "
                "validation.sequences"
            )
        return self._logged(
            _Sequences(
                train=found[: min(before, self.learning.sequences)],
                statistics=self._statistics(most, found[:before] if same else None),
                validation=found[before:] if held_out else self._validation(),
            ),
            held_out=bool(held_out),
        )

    def _statistics(self, most: int, learning: Tensor | None) -> Tensor:
        """Return the sequences for statistics, ``most`` at most; ``learning`` are sequences of the same text."""
        wanted = self.statistics.sequences
        if most < wanted:
            _log.warning(
                "statistics use %d sequences instead of %d: the next ones are held out for validation", most, wanted
            )
        taken = min(most, wanted)
        if learning is not None and taken <= len(learning) and self.statistics.length == self.learning.length:
            return learning[:taken]
        return replace(self.statistics, sequences=taken).tokens(self.tokenizer)

    def _validation(self) -> Tensor:
        length, wanted = self.learning.length, self.validation.sequences
        if wanted == 0:
            return torch.empty(0, length, dtype=torch.int64)
        return Calibration(self.validation_text, length, wanted).tokens(self.tokenizer)

    def _logged(self, built: _Sequences, *, held_out: bool) -> _Sequences:
        """Log the sequences, and warn of validation text that is also used elsewhere; return ``built``."""
        _log.info(
            "%d sequences of %d tokens of %r to learn from, %d of %d of %r for statistics, "
            "%d of %d of %r%s for validation",
            *built.train.shape, self.learning.text, *built.statistics.shape, self.statistics.text,
            *built.validation.shape, self.validation_text, " (held out, after those)" if held_out else "",
        )  # fmt: skip
        warn_of_overlap(built.validation, (built.train, built.statistics), self.tokenizer, "validation sequences")
        return built


def _same(one: tuple[TextSource, ...], other: tuple[TextSource, ...]) -> bool:
    """Return whether two texts have the same sequences; mixtures that differ in shares alone do not."""
    return one == other and (len(one) == 1 or [source.share for source in one] == [source.share for source in other])


def calibration_data(trainer: pl.Trainer) -> CalibrationData:
    """Return the datamodule of ``trainer``.

    Raises:
        ValueError: It is not a ``CalibrationData``.
    """
    data = trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(data, CalibrationData):
        given = "no datamodule" if data is None else f"{type(data).__name__} as its datamodule"
        raise ValueError(f"trainer.fit got {given}: expected a CalibrationData, whose text the factors are made from")
    return data


def batch_tokens(trainer: pl.Trainer) -> int:
    """Return the tokens of one training batch, of all processes together."""
    data = calibration_data(trainer)
    return data.batch_size * data.learning.length * int(trainer.world_size)
