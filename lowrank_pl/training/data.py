"""Text for learning ranks, for statistics and for validation, as a Lightning data module."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any, cast

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from lowrank_pl.models.base import load_tokenizer
from lowrank_pl.text.sequences import (
    sequences_fingerprint,
    token_windows,
    tokenizer_fingerprint,
    uses_bos,
    warn_of_overlap,
)
from lowrank_pl.text.sources import parse_text
from lowrank_pl.utils.files import sha256_of

__all__ = ["CalibrationData", "Place", "SequenceLoader", "calibration_data"]

Place = tuple[int, int]
"""An epoch, and the number of its batches that are done."""


_log = logging.getLogger(__name__)


class SequenceLoader:
    """Batches of sequences in an order that follows from ``(seed, epoch)``, so that it can be taken up anywhere.

    Where to begin is asked of ``place`` when the first batch of an epoch is fetched. With a Trainer that is its own
    count of the batches that were trained on, which its checkpoints hold: neither batches fetched ahead nor the number
    of workers can shift it. It is no ``DataLoader``, so that Lightning leaves the order and the shares of the processes
    alone.

    Args:
        sequences: int64 ``[sequences, length]``.
        batch_size: Sequences in a batch of one process.
        seed: Seed of the order; None keeps the order of the text.
        rank: Which process this is; batch ``i`` of all processes together is one slice of the order.
        world_size: How many processes there are.
        drop_tail: Leave out the sequences that do not fill a batch of every process. Otherwise the last batch is smaller,
            and only what can't be shared out equally is left out.
        num_workers: Processes that fetch batches ahead; the sequences are in memory, so 0 is usually best.
        place: Returns the epoch and the number of batches of it that are done; by default epochs are counted here.

    Raises:
        ValueError: There are too few sequences for one batch of every process.

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
            others = "" if seed is None else ", others in each epoch"
            left = len(sequences) - self._used
            _log.warning(
                "%d of %d sequences are left out%s: %d are taken at a time", left, len(sequences), others, unit
            )
        epochs = count()
        self._place = place or (lambda: (next(epochs), 0))
        self._windows = sequences
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
        """Yield the batches int64 ``[batch, length]`` that are left of the epoch.

        This is a generator so that the place is asked for at the first batch: Lightning makes the iterator while it
        restores a checkpoint, when its counters are not settled yet.
        """
        epoch, done = self._place()
        loader = DataLoader(
            cast(Dataset[Tensor], self._windows),
            batch_sampler=self.batches(epoch)[done:],
            num_workers=self._num_workers,
            generator=torch.Generator(),  # otherwise every epoch takes a number from the global random state
        )
        yield from loader

    def batches(self, epoch: int) -> list[list[int]]:
        """Return which sequences are in each batch of this process in ``epoch``."""
        size, world = self._batch_size, self._world_size
        order = self._order(epoch)[: self._used]
        steps = [order[begin : begin + size * world] for begin in range(0, len(order), size * world)]
        return [step[self._rank * len(step) // world : (self._rank + 1) * len(step) // world] for step in steps]

    def state_dict(self) -> dict[str, Any]:
        """Return what the order depends on; the place in it is in the Trainer's own state."""
        return {
            "windows": self._fingerprint,
            "seed": self._seed,
            "batch_size": self._batch_size,
            "world_size": self._world_size,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Compare with the data of the run that wrote the checkpoint.

        Raises:
            ValueError: It had other sequences or another seed, so that its place in the epoch has no meaning here.
        """
        mine = self.state_dict()
        other = [key for key, value in mine.items() if state_dict.get(key) != value]
        listed = ", ".join(f"{key} {state_dict.get(key)} there and {mine[key]} here" for key in other)
        if "windows" in other or "seed" in other:
            raise ValueError(
                f"the checkpoint was written while learning from other data ({listed}), its place in the epoch can't "
                "be taken up: give that run's text, tokenizer, length, sequences, shuffle and seed, or start a new run"
            )
        if other:
            _log.warning("this epoch goes on with other batches than the checkpoint's run would have had: %s", listed)

    def _order(self, epoch: int) -> list[int]:
        if self._seed is None:
            return list(range(len(self._windows)))
        generator = torch.Generator().manual_seed(int(sha256_of(str(self._seed), str(epoch))[:15], 16))
        return cast(list[int], torch.randperm(len(self._windows), generator=generator).tolist())


@dataclass(frozen=True)
class _Sequences:
    train: Tensor
    statistics: Tensor
    validation: Tensor


class CalibrationData(pl.LightningDataModule):
    """Token sequences to learn ranks from, to measure statistics on, and to validate with.

    A text is named as :mod:`lowrank_pl.text` says: ``python-docs``, a file, folder or glob, or a hub dataset. Training
    goes on after a checkpoint, also in the middle of an epoch, with exactly the batches that would have followed.

    Args:
        text: What the ranks are learnt from.
        tokenizer: The base model's tokenizer, or the name of the base model to load it of.
        length: Tokens in a sequence.
        sequences: How many sequences an epoch has.
        batch_size: Sequences in a training batch of one process.
        shuffle: Whether each epoch has its own random order.
        seed: Seed of these orders.
        statistics_text: What the moments of activations are measured on; by default the learning text.
        statistics_length: Tokens in a sequence for statistics; by default ``length``.
        statistics_sequences: How many sequences for statistics; by default ``sequences``.
        validation_text: What the hard plan is validated on; by default sequences of the learning text that follow those
            for learning and statistics and are in neither.
        validation_sequences: How many sequences for validation; 0 switches it off.
        validation_batch_size: Sequences in a validation batch of one process.
        num_workers: Processes that fetch batches ahead; the sequences are in memory, so 0 is usually best.
        trust_remote_code: Whether a tokenizer may run code that comes with it.

    >>> from lowrank_pl.models.tiny import byte_tokenizer
    >>> data = CalibrationData("python-docs", byte_tokenizer(), length=32, sequences=6, validation_sequences=2)
    >>> data.train_windows.shape, data.validation_sequences.shape
    (torch.Size([6, 32]), torch.Size([2, 32]))
    >>> next(iter(data.train_dataloader())).shape
    torch.Size([1, 32])
    """

    def __init__(
        self,
        text: str = "python-docs",
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        *,
        length: int = 512,
        sequences: int = 256,
        batch_size: int = 1,
        shuffle: bool = True,
        seed: int = 0,
        statistics_text: str | None = None,
        statistics_length: int | None = None,
        statistics_sequences: int | None = None,
        validation_text: str | None = None,
        validation_sequences: int = 8,
        validation_batch_size: int = 1,
        num_workers: int = 0,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        self.text = text
        self.length = length
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.statistics_text = text if statistics_text is None else statistics_text
        self.statistics_length = length if statistics_length is None else statistics_length
        self.validation_text = text if validation_text is None else validation_text
        self.validation_batch_size = validation_batch_size
        self.num_workers = num_workers
        self.trust_remote_code = trust_remote_code
        self._tokenizer = tokenizer
        self._counts = {
            "sequences": sequences,
            "statistics_sequences": sequences if statistics_sequences is None else statistics_sequences,
            "validation_sequences": validation_sequences,
        }
        self._built: _Sequences | None = None
        self._check_arguments()

    def prepare_data(self) -> None:
        """Fill the token caches, in one process."""
        self.setup()

    def setup(self, stage: str | None = None) -> None:
        """Load the sequences, once.

        Args:
            stage: As Lightning calls it; every stage has the same data.

        Raises:
            ValueError: A text can't be read or is too short.
        """
        if self._built is None:
            self._built = self._build()

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, loaded when it was given by name."""
        if self._tokenizer is None:
            raise ValueError("CalibrationData has tokenizer=None: give the base model's tokenizer, or the model's name")
        if isinstance(self._tokenizer, str):
            self._tokenizer = load_tokenizer(self._tokenizer, trust_remote_code=self.trust_remote_code)
        return self._tokenizer

    @property
    def train_windows(self) -> Tensor:
        """The sequences to learn from, int64 ``[sequences, length]``."""
        return self._ready().train

    @property
    def statistics_sequences(self) -> Tensor:
        """The sequences for statistics, int64 ``[statistics_sequences, statistics_length]``."""
        return self._ready().statistics

    @property
    def validation_sequences(self) -> Tensor:
        """The sequences for validation, int64 ``[validation_sequences, length]``."""
        return self._ready().validation

    def fingerprint(self) -> dict[str, str]:
        """Return SHA-256 fingerprints of all that statistics of a model depend on besides the model."""
        return {
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
            "statistics_sequences": sequences_fingerprint(self.statistics_sequences),
        }

    def train_dataloader(self) -> SequenceLoader:
        """Return the batches int64 ``[batch_size, length]`` of this process."""
        # a Trainer that overfits on a few batches means the same ones in every epoch
        overfitting = getattr(self.trainer, "overfit_batches", 0) > 0
        rank, world_size = self._share()
        return SequenceLoader(
            self.train_windows,
            batch_size=self.batch_size,
            seed=self.seed if self.shuffle and not overfitting else None,
            rank=rank,
            world_size=world_size,
            num_workers=self.num_workers,
            place=self._place if self.trainer is not None and self.trainer.training else None,
        )

    def val_dataloader(self) -> list[SequenceLoader]:
        """Return this process's share of the validation sequences; nothing when there are none."""
        if not len(self.validation_sequences):
            return []
        rank, world_size = self._share()
        loader = SequenceLoader(
            self.validation_sequences,
            batch_size=self.validation_batch_size,
            seed=None,
            rank=rank,
            world_size=world_size,
            drop_tail=False,
            num_workers=self.num_workers,
        )
        return [loader]

    def _check_arguments(self) -> None:
        sizes = {
            "length": (self.length, 2),
            "statistics_length": (self.statistics_length, 2),
            "batch_size": (self.batch_size, 1),
            "validation_batch_size": (self.validation_batch_size, 1),
            "num_workers": (self.num_workers, 0),
            **{name: (value, 0 if name == "validation_sequences" else 1) for name, value in self._counts.items()},
        }
        for name, (value, least) in sizes.items():
            if value < least:
                raise ValueError(f"CalibrationData has {name}={value}, expected {least} or more")

    def _ready(self) -> _Sequences:
        self.setup()
        assert self._built is not None
        return self._built

    def _share(self) -> tuple[int, int]:
        """Return which process this is and of how many."""
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def _place(self) -> Place:
        """Return the epoch and how many of its batches are done, from how many were trained on in all.

        Lightning 2.6.6, going on with ``max_steps`` from a checkpoint of an epoch's end, counts that epoch twice and
        asks it for one batch more. So the epoch follows from all batches processed, and one that is over has none left.
        """
        assert self.trainer is not None
        batches: Any = self.trainer.fit_loop.epoch_loop.batch_progress
        size = int(self.trainer.num_training_batches)
        epoch, done = divmod(batches.total.processed, size)
        return epoch, done if batches.current.ready < size else len(self.train_windows)

    def _build(self) -> _Sequences:
        """Return all sequences; with the learning text alone, those for validation come after all others."""
        learning, statistics, validation = map(parse_text, (self.text, self.statistics_text, self.validation_text))
        held_out = self._counts["validation_sequences"] if validation == learning else 0
        bos = int(uses_bos(self.tokenizer))
        room, statistics_room = self.length - bos, self.statistics_length - bos
        wanted = self._counts["sequences"]
        shared = bool(held_out) and statistics == learning
        if shared:
            # as many learning sequences as cover the tokens that the statistics read
            wanted = max(wanted, -(-self._counts["statistics_sequences"] * statistics_room // room))
        found = self._read(self.text, self.length, wanted + held_out)
        before = len(found) - held_out
        most = before * room // statistics_room if shared else self._counts["statistics_sequences"]
        if before < 1 or most < 1:
            raise ValueError(
                f"text {self.text!r} has {len(found)} sequences of {self.length} tokens, too few to hold out {held_out} "
                "for validation: give a longer text, a validation_text, smaller lengths or fewer validation_sequences"
            )
        return self._reported(
            _Sequences(
                train=found[: min(before, self._counts["sequences"])],
                statistics=self._statistics(most),
                validation=found[before:] if held_out else self._validation(),
            ),
            held_out=bool(held_out),
        )

    def _statistics(self, most: int) -> Tensor:
        wanted = self._counts["statistics_sequences"]
        if most < wanted:
            _log.warning(
                "statistics use %d sequences instead of %d: those held out for validation follow", most, wanted
            )
        return self._read(self.statistics_text, self.statistics_length, min(most, wanted))

    def _validation(self) -> Tensor:
        wanted = self._counts["validation_sequences"]
        if wanted == 0:
            return torch.empty(0, self.length, dtype=torch.int64)
        return self._read(self.validation_text, self.length, wanted)

    def _read(self, text: str, length: int, sequences: int) -> Tensor:
        return token_windows(text, self.tokenizer, length=length, sequences=sequences)

    def _reported(self, built: _Sequences, *, held_out: bool) -> _Sequences:
        """Say in the log what the sequences are, and warn when validation text is among the others."""
        _log.info(
            "%d sequences of %d tokens of %r to learn from, %d of %d of %r for statistics, "
            "%d of %d of %r%s for validation",
            *built.train.shape, self.text, *built.statistics.shape, self.statistics_text, *built.validation.shape,
            self.validation_text, " that follow those" if held_out else "",
        )  # fmt: skip
        warn_of_overlap(built.validation, (built.train, built.statistics), self.tokenizer, "validation windows")
        return built


def calibration_data(trainer: pl.Trainer) -> CalibrationData:
    """Return the datamodule that ``trainer`` was given.

    Raises:
        ValueError: It is of another type.
    """
    data = trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(data, CalibrationData):
        given = "no datamodule" if data is None else f"{type(data).__name__} as its datamodule"
        raise ValueError(f"trainer.fit got {given}: expected a CalibrationData, whose text the factors are made from")
    return data
