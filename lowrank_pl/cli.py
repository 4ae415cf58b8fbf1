"""The command ``lowrank``: ``fit`` through LightningCLI, everything else plain functions."""

from __future__ import annotations

import inspect
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger

from lowrank_pl import __version__
from lowrank_pl.bench import bench
from lowrank_pl.callbacks import FinishRun, RankMonitor
from lowrank_pl.commands import allocate, evaluate, export
from lowrank_pl.data import CalibrationData
from lowrank_pl.export import ExportError
from lowrank_pl.files import atomic_write
from lowrank_pl.module import RankLearner

__all__ = ["RankCLI", "main"]

FUNCTIONS: dict[str, Callable[..., Any]] = {
    "evaluate": evaluate,
    "allocate": allocate,
    "export": export,
    "bench": bench,
}
FIT = "Learn ranks for a model, export it and score it beside the baselines."


class RankCLI(LightningCLI):
    """LightningCLI for learning ranks: ``--run`` names the folder that everything of a run goes to."""

    def __init__(self, args: Sequence[str]) -> None:
        super().__init__(
            RankLearner,
            CalibrationData,
            trainer_defaults={"max_epochs": 1, "num_sanity_val_steps": 0, "log_every_n_steps": 1},
            save_config_callback=SaveConfig,
            save_config_kwargs={"save_to_log_dir": False},
            auto_configure_optimizers=False,
            # Otherwise settings in a checkpoint silently win over YAML and flags.
            load_from_checkpoint_support=False,
            parser_kwargs={"prog": "lowrank", "version": __version__},
            args=list(args),
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the Trainer methods on offer: ``fit`` alone."""
        return {"fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add ``--run``, ``--json`` and the callbacks of every run."""
        parser.add_argument("--run", type=str, default="runs/fit", help="Folder of the run: plan, model, scores, logs.")
        parser.add_argument("--json", type=str | None, default=None, help="Write the table's figures there.")
        parser.add_lightning_class_args(RankMonitor, "monitor")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.add_lightning_class_args(FinishRun, "finish")
        parser.set_defaults({
            "model.mask": {"class_path": "lowrank_pl.masks.Staircase"},
            "checkpoint.every_n_train_steps": 50,
            "checkpoint.save_last": True,
            "checkpoint.enable_version_counter": False,
        })  # fmt: skip
        parser.link_arguments("model.base", "data.tokenizer")
        parser.link_arguments("model.trust_remote_code", "data.trust_remote_code")
        parser.link_arguments("run", "trainer.default_root_dir")
        parser.link_arguments("run", "checkpoint.dirpath", compute_fn=lambda run: str(Path(run) / "checkpoints"))
        parser.link_arguments("json", "finish.json")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Return the Trainer; without a logger of the user's own it logs to ``RUN/tensorboard``."""
        config = self._get(self.config, "trainer")
        if config.logger is None or config.logger is True:
            run = Path(self._get(self.config, "run"))
            kwargs["logger"] = TensorBoardLogger(run, name="", version="tensorboard", default_hp_metric=False)
        return super().instantiate_trainer(**kwargs)



class SaveConfig(SaveConfigCallback):
    """Writes the whole configuration to ``config.yaml`` in the run's folder, from which the run can be repeated."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write it, on the first process."""
        text = self.parser.dump(self.config, skip_none=False)
        atomic_write(Path(trainer.default_root_dir) / "config.yaml", text)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; a user's mistake ends in one sentence and a non-zero exit status.

    Args:
        argv: The words after ``lowrank``; by default those of this process.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s", stream=sys.stderr)
    _quiet_others()
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return
    try:
        _dispatch(words)
    except KeyboardInterrupt:
        sys.exit(_said("interrupted: what was finished is kept, nothing half-written is left", 130))
    except (ValueError, OSError, ExportError) as error:
        if os.environ.get("LOWRANK_DEBUG"):
            raise
        sys.exit(_said(f"error: {error}", 1))


def usage() -> str:
    """Return what ``lowrank --help`` prints."""
    lines = [f"  {name:10} {what}" for name, what in {"fit": FIT, **_first_sentences()}.items()]
    return "\n".join([
        "usage: lowrank COMMAND [options]", "", "commands:", *lines, "",
        "`lowrank COMMAND --help` lists the options. LOWRANK_DEBUG=1 shows the traceback of an error,",
        "LOWRANK_HOME the folder of token and factor caches.",
    ])  # fmt: skip


def _first_sentences() -> dict[str, str]:
    return {name: (inspect.getdoc(function) or "").split("\n\n")[0] for name, function in FUNCTIONS.items()}


def _dispatch(words: list[str]) -> None:
    if words[0] in FUNCTIONS:
        auto_cli(FUNCTIONS, as_positional=False, args=words, prog="lowrank", version=__version__, parser_mode="yaml")
    elif words[0] == "fit" or words[0].startswith("-"):
        RankCLI(words)
    else:
        known = ", ".join(["fit", *FUNCTIONS])
        raise ValueError(f"there is no command {words[0]!r}: expected one of {known}")


def _said(message: str, code: int) -> int:
    print(f"lowrank: {message}", file=sys.stderr)
    return code


def _quiet_others() -> None:
    """Leave the terminal to this package: others speak from warnings on."""
    for name in ("httpx", "httpcore", "fsspec", "matplotlib", "datasets", "urllib3"):
        logging.getLogger(name).setLevel(logging.WARNING)
