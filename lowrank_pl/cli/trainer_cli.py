"""What the commands that train share: LightningCLI with a folder of its own for every run, and clear errors."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError
from jsonargparse.typing import register_type
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.accelerators import MPSAccelerator
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy

from lowrank_pl.costs.machine import Machine, machine_of
from lowrank_pl.models.base import model_files
from lowrank_pl.text.sources import text_files
from lowrank_pl.training.checkpointing import AtomicCheckpoints, mark_of, read_checkpoint
from lowrank_pl.training.data import CalibrationData
from lowrank_pl.training.interrupt import StopBetweenBatches, explain_interruption, explain_kill
from lowrank_pl.training.lightning_internals import HookedCLI, RunCheckpoint, extend_timeout
from lowrank_pl.training.progress import LearningBar
from lowrank_pl.utils.distributed import cooperating, explain_lost_process, gather_from_all
from lowrank_pl.utils.files import LOCK, at_home, atomic_write, check_output_files, check_output_folder, locked
from lowrank_pl.version import __version__

__all__ = ["ForecastingCLI", "TrainerCLI"]

TIMEOUT = timedelta(hours=12)
"""How long processes wait for each other: the first one refits, exports and scores, which takes more than the half hour
that strategies wait by default."""


_log = logging.getLogger(__name__)


# jsonargparse leaves a ~ as it is.
register_type(Path, serializer=str, deserializer=at_home, type_check=isinstance, fail_already_registered=False)


class TrainerCLI(HookedCLI):
    """LightningCLI whose ``--run`` names the folder that everything of a run goes to.

    Attributes:
        default_run: The folder, if none is named.
        about_run: What ``--help`` says of it.
        files: The settings that name files, or models, that the command reads.
        texts: The settings that name its texts.

    Args:
        args: The command and the words after it.
        model: The LightningModule.
        trainer: The Trainer class, which has a method of the command's name.
    """

    default_run: str
    about_run: str
    files: tuple[str, ...] = ("ckpt_path",)
    texts: tuple[str, ...] = ("data.learning.text", "data.statistics.text", "data.validation.text")

    def __init__(self, args: Sequence[str], model: type[LightningModule], trainer: type[Trainer] = Trainer) -> None:
        super().__init__(
            model,
            CalibrationData,
            trainer_class=trainer,
            trainer_defaults={
                "num_sanity_val_steps": 0,
                "log_every_n_steps": 1,
                "enable_model_summary": False,
            },
            save_config_callback=SaveConfig,
            save_config_kwargs={"save_to_log_dir": False},
            auto_configure_optimizers=False,
            # Otherwise settings in a checkpoint silently win over YAML and flags.
            load_from_checkpoint_support=False,
            parser_kwargs={"prog": "lowrank", "version": __version__, "exit_on_error": False},
            args=list(args),
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the words; LightningCLI's own would warn that they are the command line's.

        Raises:
            ArgumentError: A group of options is null, of which a class would have to be made.
        """
        self.config = parser.parse_args(args)
        command = self.config.subcommand
        if command and (path := self.config[command].get("ckpt_path")):
            # Lightning declares it as a text.
            self.config[command]["ckpt_path"] = str(at_home(path))
        for group in self._subcommand_parsers[command]._action_groups if command else ():
            if getattr(group, "group_class", None) and self.config[command].get(group.dest, {}) is None:
                raise ArgumentError(None, f"{group.dest} is null: expected its options, or leave it out")

    def check_checkpoint(self, path: str | None) -> None:
        """Refuse a checkpoint that no run of this version wrote, before anything is loaded."""
        # A folder is what FSDP2 writes; the words are Lightning's own.
        if path and path not in ("last", "best", "hpc") and not Path(path).is_dir():
            mark_of(read_checkpoint(path))

    def before_instantiate_classes(self) -> None:
        """Refuse places that can't be written to, and figures in a file that the command reads."""
        check_output_folder(self.setting("run"))
        # A dry run reads no text.
        texts = [self.setting(name) for name in self.texts] if self.runs() else []
        check_output_files(
            self.setting("json"),
            inputs=[
                *(file for name in self.files for file in model_files(self.setting(name))),
                *text_files(*filter(None, texts)),
            ],
        )

    def fit(self, model: LightningModule, **kwargs: Any) -> None:
        """Run the Trainer in a folder of its own; after Ctrl-C, or the end of another process, say how to go on."""

        def advice() -> str:
            # Not whatever lies in the folder: that may be another run's.
            written = [c.last_model_path for c in self.trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
            last = next(filter(None, [*written, kwargs.get("ckpt_path")]), None)
            return f"go on with --ckpt_path {last}" if last else "there is no checkpoint of this run yet"

        explain_kill(advice)
        with _own_folder(self.trainer), explain_interruption(self.trainer, advice), explain_lost_process(advice):
            self.trainer.fit(model, weights_only=True, **kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add ``--run``, ``--json`` and checkpoints."""
        parser.add_argument("--run", type=Path, default=self.default_run, help=self.about_run)
        parser.add_argument("--json", type=Path | None, default=None, help="Write the table's figures there.")
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        parser.set_defaults({
            "checkpoint.every_n_train_steps": 50,
            "checkpoint.save_last": True,
            "checkpoint.enable_version_counter": False,
        })  # fmt: skip
        parser.link_arguments("run", "trainer.default_root_dir")
        parser.link_arguments("run", "checkpoint.dirpath", compute_fn=lambda run: str(Path(run) / "checkpoints"))
        self.add_parts(parser)
        parser.link_arguments("json", "finish.json")

    def add_parts(self, parser: LightningArgumentParser) -> None:
        """Add the callbacks of the command, of which ``finish`` takes ``json``, and what they need."""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Return the Trainer with what the user has not chosen: TensorBoard, a progress bar, atomic checkpoints."""
        config = self.setting("trainer", made=True)
        if config.logger is None or config.logger is True:
            run = Path(self.setting("run"))
            kwargs["logger"] = TensorBoardLogger(run, name="", version="tensorboard", default_hp_metric=False)
        callbacks, plugins = _listed(config.callbacks), _listed(config.plugins)
        if config.enable_progress_bar is not False and not any(isinstance(c, ProgressBar) for c in callbacks):
            callbacks.append(LearningBar())
        callbacks.append(StopBetweenBatches())
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins.append(AtomicCheckpoints())
        if config.max_epochs is None:
            # One epoch, unless there is another end.
            kwargs["max_epochs"] = 1 if config.max_steps < 0 else -1
        if config.accelerator == "auto" and MPSAccelerator.is_available():
            _log.warning("running on the CPU: Apple's GPUs lack float64, which statistics and factors are made in")
            kwargs["accelerator"] = "cpu"
        try:
            trainer = super().instantiate_trainer(**kwargs, callbacks=callbacks, plugins=plugins)
        except TypeError as error:
            if "devices" not in str(error):
                raise
            # What other accelerators say of wrong devices is an exception of Lightning's own.
            raise ValueError(
                f"trainer.devices is {config.devices!r}: expected a number of processes ({error})"
            ) from error
        # Only now is it known what strategy "auto" is.
        extend_timeout(trainer.strategy, TIMEOUT)
        return trainer


class ForecastingCLI(TrainerCLI):
    """A ``TrainerCLI`` that takes ``--dry_run``."""

    def add_parts(self, parser: LightningArgumentParser) -> None:
        """Add ``--dry_run``."""
        parser.add_argument(
            "--dry_run",
            type=bool,
            default=False,
            help="Print what the run needs; nothing is loaded, and no file but that of --json is written.",
        )

    def runs(self) -> bool:
        """Return whether the Trainer runs, which it does not in a dry run."""
        return not self.setting("dry_run")

    def instantiate_classes(self) -> None:
        """Make model, data and Trainer; in a dry run only what describes the run, whose needs are then printed."""
        if not self.setting("dry_run"):
            return super().instantiate_classes()
        self.config_init = self.parser.instantiate_classes(self.config)
        trainer = self.setting("trainer", made=True)
        self.forecast(
            machine_of(
                trainer.accelerator, trainer.devices, trainer.num_nodes,
                sharded=isinstance(trainer.strategy, ModelParallelStrategy),
            )
        )  # fmt: skip
        return None

    def forecast(self, machine: Machine) -> None:
        """Print what the run needs.

        Args:
            machine: The processes of the run.
        """
        raise NotImplementedError


def _own_folder(trainer: Trainer) -> AbstractContextManager[None]:
    """Keep other runs out of the run's folder; the first process does so for all."""
    run = Path(trainer.default_root_dir)
    if not trainer.is_global_zero:
        return nullcontext()
    return locked(run / LOCK, f"writing to {run}", otherwise="give this one another folder with --run")


def _listed(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, Sequence) else [value]


class SaveConfig(SaveConfigCallback):
    """Writes the whole configuration to ``config.yaml`` in the run's folder, from which the run can be repeated."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that all processes have the same configuration.

        Raises:
            ValueError: A setting differs; the processes would wait for each other once only some of them have ended.
        """
        ours = {"the version of lowrank_pl": __version__, **vars(self.config.as_flat())}
        with cooperating():
            of_all = gather_from_all({name: str(value) for name, value in ours.items()})
        for rank, theirs in enumerate(of_all):
            for name in sorted({*theirs, *of_all[0]}):
                first, other = of_all[0].get(name), theirs.get(name)
                if first != other:
                    raise ValueError(
                        f"{name} is {first} in process 0 and {other} in process {rank}: start all processes of a run "
                        "with the same settings"
                    )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write it, now that budget and checkpoint were found to fit: a refused start leaves an earlier run's file."""
        super().setup(trainer, pl_module, "fit")

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write it, on the first process."""
        text = self.parser.dump(self.config, skip_unset=False)
        atomic_write(Path(trainer.default_root_dir) / "config.yaml", text)
