"""``lowrank fit``: ranks are learned by Lightning's Trainer, through LightningCLI."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch.cli import LightningArgumentParser

from lowrank_pl.cli.arguments import fit_words
from lowrank_pl.cli.trainer_cli import ForecastingCLI
from lowrank_pl.cli.workloads import fit_workload
from lowrank_pl.costs.forecast import print_forecast
from lowrank_pl.costs.machine import Machine
from lowrank_pl.training.data import CalibrationData
from lowrank_pl.training.finish_run import FinishRun
from lowrank_pl.training.module import RankLearner
from lowrank_pl.training.rank_monitor import RankMonitor
from lowrank_pl.training.text_samples import TextSamples

__all__ = ["RankCLI", "fit"]

CLASSES: dict[str, type] = {
    "model": RankLearner,
    "data": CalibrationData,
    "monitor": RankMonitor,
    "samples": TextSamples,
    "finish": FinishRun,
}
"""The classes whose arguments are flags, by the name before the dot."""


def fit(words: Sequence[str]) -> None:
    """Learn ranks for a model, export it and score it beside the baselines.

    Args:
        words: The words after ``lowrank fit``.

    Raises:
        ArgumentError: Words that can't be understood.
    """
    RankCLI(["fit", *fit_words(words, CLASSES)])


class RankCLI(ForecastingCLI):
    """LightningCLI for learning ranks."""

    default_run = "runs/fit"
    about_run = "Folder of the run: plan, model, scores, logs."
    files = (*ForecastingCLI.files, "model.base.name", "model.start.plan")
    texts = (*ForecastingCLI.texts, "finish.score.text")

    def __init__(self, args: Sequence[str]) -> None:
        super().__init__(args, RankLearner)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the Trainer methods on offer: ``fit`` alone."""
        return {"fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule", "weights_only"}}

    def add_parts(self, parser: LightningArgumentParser) -> None:
        """Add ``--dry_run``, the callbacks of every run, and where the text's tokenizer comes from."""
        super().add_parts(parser)
        parser.add_lightning_class_args(RankMonitor, "monitor")
        parser.add_lightning_class_args(TextSamples, "samples")
        parser.add_lightning_class_args(FinishRun, "finish")
        parser.set_defaults({"model.mask": {"class_path": "lowrank_pl.methods.masks.ARA"}})
        parser.link_arguments("model.base.name", "data.tokenizer")
        parser.link_arguments("model.base.trust_remote_code", "data.trust_remote_code")

    def forecast(self, machine: Machine) -> None:
        """Print what the run needs."""
        learner, data, trainer, finish = (
            self.setting(name, made=True) for name in ("model", "data", "trainer", "finish")
        )
        print_forecast(
            learner.base, fit_workload(learner, data, trainer, finish, machine), machine,
            constraints=learner.constraints, output=self.setting("json"),
        )  # fmt: skip
