"""What a method works on: a dense model, its targets, and the text that it is calibrated on."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowrank_pl.models.base import Base
from lowrank_pl.models.sequences import check_sequences
from lowrank_pl.models.targets import Targets
from lowrank_pl.plans.budget import Budget
from lowrank_pl.plans.constraints import Constraints
from lowrank_pl.text.sequences import Calibration

__all__ = ["Subject"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Subject:
    """A dense model with its targets, its tokenizer and the sequences that it is calibrated on.

    Args:
        model: The dense model, on the device that is to do the work. Methods leave it as it was.
        tokenizer: The model's tokenizer.
        sequences: ``[sequences, length]`` calibration token ids, as ``token_windows`` makes them.
        constraints: Which linear layers are targets, and what their ranks must respect.
        base: Where the model comes from. Plans remember it, so that ``lowrank export`` finds the model again.
        calibration: What the sequences were cut from. Plans remember it, so that lost factors can be made again.
        known_targets: The targets, where a probe of ``model`` cannot find them, as in a model without weights.

    Raises:
        ValueError: The model can't be run on the sequences, for a reason that ``check_sequences`` names.

    Example:
        >>> from lowrank_pl.models.tiny import byte_tokenizer, tiny_model
        >>> subject = Subject(tiny_model("llama"), byte_tokenizer(), torch.arange(256).view(4, 64))
        >>> len(subject.targets.modules), subject.budget(0.5).keep
        (14, 0.5)
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    sequences: Tensor
    constraints: Constraints = Constraints()
    base: Base | None = None
    calibration: Calibration | None = None
    known_targets: Targets | None = None

    def __post_init__(self) -> None:
        check_sequences(self.model, self.sequences)

    @classmethod
    def load(
        cls,
        base: Base,
        calibration: Calibration = Calibration(),
        constraints: Constraints = Constraints(),
        *,
        device: str | torch.device = "cpu",
    ) -> Subject:
        """Return the subject with the model loaded on ``device`` and the text cut into sequences.

        Raises:
            ValueError: The base or the text can't be found or read, or they do not fit each other.
        """
        tokenizer = base.tokenizer()
        # The text is cheap to read: a mistake in its name is found before the weights are loaded.
        sequences = calibration.tokens(tokenizer)
        count, length = sequences.shape
        _log.info("calibration: %d sequences of %d tokens of %r", count, length, calibration.text)
        return cls(base.load().to(device), tokenizer, sequences, constraints, base, calibration)

    @cached_property
    def targets(self) -> Targets:
        """The linear layers to compress."""
        return self.constraints.targets(self.model) if self.known_targets is None else self.known_targets

    def budget(self, keep: float) -> Budget:
        """Return the budget of ``keep`` of the targeted parameters.

        Raises:
            ValueError: ``keep`` lies outside (0, 1], or a constraint is impossible.
        """
        return self.constraints.budget(self.model, self.targets, keep)

    def on(self, sequences: Tensor) -> Subject:
        """Return the same model on other ``sequences`` ``[sequences, length]``."""
        return replace(self, sequences=sequences, known_targets=self.targets)
