"""``lowrank upcycle``: a mixture of experts from a dense model, whose experts Lightning's Trainer trains apart."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser

from lowrank_pl.cli.arguments import fit_words
from lowrank_pl.cli.trainer_cli import TrainerCLI
from lowrank_pl.training.data import CalibrationData
from lowrank_pl.training.upcycle import FinishUpcycling, Upcycler

__all__ = ["UpcycleCLI", "upcycle"]

CLASSES: dict[str, type] = {"model": Upcycler, "data": CalibrationData, "finish": FinishUpcycling}
"""The classes whose arguments are flags, by the name before the dot."""


def upcycle(words: Sequence[str]) -> None:
    """Make a mixture of experts from a dense model: copy its MLPs, and train the copies apart.

    Args:
        words: The words after ``lowrank upcycle``.

    Raises:
        ArgumentError: Words that can't be understood.
    """
    UpcycleCLI(["upcycle", *fit_words(words, CLASSES)])


class UpcyclingTrainer(Trainer):
    """Lightning's Trainer, whose ``fit`` goes by the name of the command."""

    def upcycle(self, model: Upcycler, datamodule: CalibrationData | None = None, ckpt_path: str | None = None) -> None:
        """Make a mixture of experts from a dense model: copy its MLPs, and train the copies apart.

        Args:
            model: What is trained.
            datamodule: The text.
            ckpt_path: Checkpoint to go on from, or ``last``.
        """
        self.fit(model, datamodule=datamodule, ckpt_path=ckpt_path, weights_only=True)


class UpcycleCLI(TrainerCLI):
    """LightningCLI for mixtures made from dense models."""

    default_run = "runs/upcycle"
    about_run = "Folder of the run: model, figures, logs."
    files = (*TrainerCLI.files, "model.base.name")

    def __init__(self, args: Sequence[str]) -> None:
        super().__init__(args, Upcycler, UpcyclingTrainer)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the Trainer methods on offer: ``upcycle`` alone."""
        return {"upcycle": {"model", "datamodule"}}

    upcycle = TrainerCLI.fit

    def add_parts(self, parser: LightningArgumentParser) -> None:
        """Add the end of a run, and where the text's tokenizer comes from."""
        parser.add_lightning_class_args(FinishUpcycling, "finish")
        parser.link_arguments("model.base.name", "data.tokenizer")
        parser.link_arguments("model.base.trust_remote_code", "data.trust_remote_code")
