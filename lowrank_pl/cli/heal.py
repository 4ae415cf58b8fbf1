"""``lowrank heal``: a compressed model is trained by Lightning's Trainer to be like its dense model again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser

from lowrank_pl.cli.arguments import fit_words
from lowrank_pl.cli.trainer_cli import ForecastingCLI
from lowrank_pl.cli.workloads import heal_workload
from lowrank_pl.costs.forecast import print_forecast
from lowrank_pl.costs.machine import Machine
from lowrank_pl.training.data import CalibrationData
from lowrank_pl.training.finish_heal import FinishHealing
from lowrank_pl.training.heal import NOT_SHARDED, Healer

__all__ = ["HealCLI", "heal"]

CLASSES: dict[str, type] = {"model": Healer, "data": CalibrationData, "finish": FinishHealing}
"""The classes whose arguments are flags, by the name before the dot."""


def heal(words: Sequence[str]) -> None:
    """Train a compressed model's factors, or a LoRA adapter on it, against the dense model's logits.

    Args:
        words: The words after ``lowrank heal``.

    Raises:
        ArgumentError: Words that can't be understood.
    """
    HealCLI(["heal", *fit_words(words, CLASSES)])


class HealingTrainer(Trainer):
    """Lightning's Trainer, whose ``fit`` goes by the name of the command."""

    def heal(self, model: Healer, datamodule: CalibrationData | None = None, ckpt_path: str | None = None) -> None:
        """Train a compressed model's factors, or a LoRA adapter on it, against the dense model's logits.

        Args:
            model: What is trained.
            datamodule: The text.
            ckpt_path: Checkpoint to go on from, or ``last``.
        """
        self.fit(model, datamodule=datamodule, ckpt_path=ckpt_path, weights_only=True)


class HealCLI(ForecastingCLI):
    """LightningCLI for healing."""

    default_run = "runs/heal"
    about_run = "Folder of the run: plan, factors, model or adapter, figures, logs."
    files = (*ForecastingCLI.files, "model.plan", "model.teacher")

    def __init__(self, args: Sequence[str]) -> None:
        super().__init__(args, Healer, HealingTrainer)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the Trainer methods on offer: ``heal`` alone."""
        return {"heal": {"model", "datamodule"}}

    heal = ForecastingCLI.fit

    def add_parts(self, parser: LightningArgumentParser) -> None:
        """Add ``--dry_run`` and the end of a run."""
        super().add_parts(parser)
        parser.add_lightning_class_args(FinishHealing, "finish")
        parser.link_arguments("model.trust_remote_code", "data.trust_remote_code")

    def before_instantiate_classes(self) -> None:
        """Refuse places that can't be written to, and a second end of the run."""
        super().before_instantiate_classes()
        trainer: Any = self.setting("trainer")
        given = {name: trainer[name] for name in ("max_steps", "max_epochs") if trainer[name] not in (None, -1)}
        if given:
            raise ValueError(
                f"healing ends with its token budget: leave out {' and '.join(f'--trainer.{name}' for name in given)}, "
                "and set --model.settings.tokens"
            )

    def instantiate_classes(self) -> None:
        """Make the classes; the text gets the tokenizer of the dense model, unless another one was given."""
        super().instantiate_classes()
        # Not written into the configuration, which may be used again for the plan of another model.
        self.setting("data", made=True).tokenizer_by_default(self.setting("model", made=True).start.teacher.name)

    def forecast(self, machine: Machine) -> None:
        """Print what the run needs.

        Raises:
            ValueError: The Trainer can't do what is asked, or the token budget does not reach for one step.
        """
        healer, data, trainer = (self.setting(name, made=True) for name in ("model", "data", "trainer"))
        if machine.sharded:
            raise ValueError(NOT_SHARDED)
        print_forecast(
            healer.start.teacher, heal_workload(healer, data, trainer, machine), machine, output=self.setting("json")
        )
