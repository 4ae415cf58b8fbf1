"""The command ``lowrank``: ``fit`` through LightningCLI, everything else plain functions."""

from __future__ import annotations

import inspect
import logging
import os
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.accelerators import MPSAccelerator
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy

from lowrank_pl.cli.arguments import bare_flags, readable_options, readable_words
from lowrank_pl.cli.bench import bench
from lowrank_pl.cli.commands import allocate, export, refit
from lowrank_pl.cli.compare import compare
from lowrank_pl.cli.decompose import decompose
from lowrank_pl.cli.doctor import BrokenModelError, doctor
from lowrank_pl.cli.evaluate import evaluate
from lowrank_pl.cli.prune import prune
from lowrank_pl.cli.report import report
from lowrank_pl.cli.workloads import fit_workload
from lowrank_pl.costs.forecast import print_forecast
from lowrank_pl.costs.machine import machine_of
from lowrank_pl.export.reload import ExportError
from lowrank_pl.training.checkpointing import AtomicCheckpoints, mark_of, read_checkpoint
from lowrank_pl.training.data import CalibrationData
from lowrank_pl.training.finish_run import FinishRun
from lowrank_pl.training.interrupt import StopBetweenBatches, explain_interruption
from lowrank_pl.training.lightning_internals import extend_timeout
from lowrank_pl.training.module import RankLearner
from lowrank_pl.training.progress import LearningBar
from lowrank_pl.training.rank_monitor import RankMonitor
from lowrank_pl.training.text_samples import TextSamples
from lowrank_pl.utils.distributed import LostProcessError, explain_lost_process
from lowrank_pl.utils.files import atomic_write
from lowrank_pl.version import __version__

__all__ = ["RankCLI", "main"]

FUNCTIONS: dict[str, Callable[..., Any]] = {
    "evaluate": evaluate,
    "decompose": decompose,
    "allocate": allocate,
    "refit": refit,
    "prune": prune,
    "export": export,
    "doctor": doctor,
    "report": report,
    "compare": compare,
    "bench": bench,
}


GROUPS: dict[str, type] = {
    "model": RankLearner,
    "data": CalibrationData,
    "monitor": RankMonitor,
    "samples": TextSamples,
    "finish": FinishRun,
}


PATIENCE = timedelta(hours=12)
"""How long processes wait for each other: the first one refits, exports and scores, which takes more than the half hour
of a strategy that says nothing else."""


_log = logging.getLogger(__name__)


FIT = "Learn ranks for a model, export it and score it beside the baselines."


class RankCLI(LightningCLI):
    """LightningCLI for learning ranks: ``--run`` names the folder that everything of a run goes to."""

    def __init__(self, args: Sequence[str]) -> None:
        super().__init__(
            RankLearner,
            CalibrationData,
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

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the Trainer methods on offer: ``fit`` alone."""
        return {"fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule", "weights_only"}}

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the words; LightningCLI's own would warn that they are the command line's."""
        self.config = parser.parse_args(args)

    def _parse_ckpt_path(self) -> None:
        """Look at the checkpoint before anything is loaded; LightningCLI's own would take settings from it."""
        path = self.config[self.config.subcommand].get("ckpt_path")
        # A folder is what FSDP2 writes; the words are Lightning's own.
        if path and path not in ("last", "best", "hpc") and not Path(path).is_dir():
            mark_of(read_checkpoint(path))

    def fit(self, model: LightningModule, **kwargs: Any) -> None:
        """Run the Trainer; after Ctrl-C, or the end of another process, say how to go on."""

        def advice() -> str:
            # Not whatever lies in the folder: that may be another run's.
            written = [c.last_model_path for c in self.trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
            last = next(filter(None, [*written, kwargs.get("ckpt_path")]), None)
            return f"go on with --ckpt_path {last}" if last else "there is no checkpoint of this run yet"

        with explain_interruption(self.trainer, advice), explain_lost_process(advice):
            self.trainer.fit(model, weights_only=True, **kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add ``--run``, ``--json`` and the callbacks of every run."""
        parser.add_argument("--run", type=str, default="runs/fit", help="Folder of the run: plan, model, scores, logs.")
        parser.add_argument("--json", type=str | None, default=None, help="Write the table's figures there.")
        parser.add_argument(
            "--dry_run", type=bool, default=False, help="Print what the run needs; nothing is loaded or written."
        )
        parser.add_lightning_class_args(RankMonitor, "monitor")
        parser.add_lightning_class_args(TextSamples, "samples")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.add_lightning_class_args(FinishRun, "finish")
        parser.set_defaults({
            "model.mask": {"class_path": "lowrank_pl.methods.masks.ARA"},
            "checkpoint.every_n_train_steps": 50,
            "checkpoint.save_last": True,
            "checkpoint.enable_version_counter": False,
        })  # fmt: skip
        parser.link_arguments("model.base.name", "data.tokenizer")
        parser.link_arguments("model.base.trust_remote_code", "data.trust_remote_code")
        parser.link_arguments("run", "trainer.default_root_dir")
        parser.link_arguments("run", "checkpoint.dirpath", compute_fn=lambda run: str(Path(run) / "checkpoints"))
        parser.link_arguments("json", "finish.json")

    def instantiate_classes(self) -> None:
        """Make model, data and Trainer; in a dry run only what describes the run, which is then printed."""
        if not self._get(self.config, "dry_run"):
            return super().instantiate_classes()
        config = self.parser.instantiate_classes(self.config)
        trainer, learner = self._get(config, "trainer"), self._get(config, "model")
        machine = machine_of(
            trainer.accelerator, trainer.devices, trainer.num_nodes,
            sharded=isinstance(trainer.strategy, ModelParallelStrategy),
        )  # fmt: skip
        print_forecast(
            learner.base,
            fit_workload(learner, self._get(config, "data"), trainer, self._get(config, "finish"), machine),
            machine,
            constraints=learner.constraints,
            output=self._get(self.config, "json"),
        )
        return None

    def _run_subcommand(self, subcommand: str) -> None:
        if not self._get(self.config, "dry_run"):
            super()._run_subcommand(subcommand)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Return the Trainer with what the user has not chosen: TensorBoard, a progress bar, atomic checkpoints."""
        config = self._get(self.config_init, "trainer")
        if config.logger is None or config.logger is True:
            run = Path(self._get(self.config, "run"))
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
        trainer = super().instantiate_trainer(**kwargs, callbacks=callbacks, plugins=plugins)
        # Only now is it known which strategy "auto" has chosen.
        extend_timeout(trainer.strategy, PATIENCE)
        return trainer


def _listed(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, Sequence) else [value]


class SaveConfig(SaveConfigCallback):
    """Writes the whole configuration to ``config.yaml`` in the run's folder, from which the run can be repeated."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write it, on the first process."""
        text = self.parser.dump(self.config, skip_unset=False)
        atomic_write(Path(trainer.default_root_dir) / "config.yaml", text)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; a user's mistake ends in one sentence and a non-zero exit status.

    Args:
        argv: The words after ``lowrank``; by default those of this process.

    Raises:
        SystemExit: With status 1 after an error, 2 after words that can't be understood, 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    # Of several processes that do the same, the first says it.
    ranks = (os.environ.get(name) for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK"))
    first = int(next(filter(None, ranks), 0)) == 0
    level = logging.INFO if first else logging.WARNING
    logging.basicConfig(level=level, format="%(name)s: %(message)s", stream=sys.stderr)
    _quiet_others()
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return
    if words[0] not in ("fit", *FUNCTIONS) and not words[0].startswith("-"):
        known = ", ".join(["fit", *FUNCTIONS])
        sys.exit(_said(f"error: there is no command {words[0]!r}: expected one of {known}", 2))
    try:
        _dispatch(bare_flags(words, "dry_run"))
    except KeyboardInterrupt as interrupt:
        said = str(interrupt) or "what was finished is kept"
        sys.exit(_said(f"interrupted: {said}, nothing half-written is left", 130))
    except ArgumentError as error:
        said = " ".join(str(error).split())
        command = words[0] if words[0] in FUNCTIONS else "fit"
        sys.exit(_said(f"error: {said}; `lowrank {command} --help` lists the options", 2))
    except BrokenModelError as broken:
        sys.exit(_said(str(broken), 1))
    except (ValueError, OSError, ExportError, MisconfigurationException, LostProcessError) as error:
        if os.environ.get("LOWRANK_DEBUG"):
            raise
        sys.exit(_said(f"error: {error}", 1))


def usage() -> str:
    """Return what ``lowrank --help`` prints."""
    lines = [f"  {name:10} {what}" for name, what in {"fit": FIT, **_first_sentences()}.items()]
    return "\n".join([
        "usage: lowrank COMMAND [options]", "", "commands:", *lines, "",
        "`lowrank COMMAND --help` lists the options, -c FILE reads them from YAML. LOWRANK_DEBUG=1 shows the traceback",
        "of an error, LOWRANK_HOME is the folder of token and factor caches.",
    ])  # fmt: skip


def _first_sentences() -> dict[str, str]:
    return {name: (inspect.getdoc(function) or "").split("\n\n")[0] for name, function in FUNCTIONS.items()}


def _dispatch(words: list[str]) -> None:
    if words[0] in FUNCTIONS:
        words = [words[0], *readable_words(words[1:], FUNCTIONS[words[0]])]
        auto_cli(
            FUNCTIONS, as_positional=False, args=words, prog="lowrank", version=__version__, parser_mode="yaml",
            exit_on_error=False,
        )  # fmt: skip
    else:
        RankCLI([words[0], *readable_options(words[1:], GROUPS)])


def _said(message: str, code: int) -> int:
    print(f"lowrank: {message}", file=sys.stderr)
    return code


CHATTER = (
    "Tip: For seamless",  # advertises
    "TPU available",
    "`Trainer.fit` stopped: `max_",  # the bar shows it
    "Detected KeyboardInterrupt",  # `main` says it
)


EXPECTED = (
    r".*isinstance\(treespec, LeafSpec\)",  # of Lightning 2.6 on torch 2.13
    r"Found \d+ module\(s\) in eval mode",  # the frozen base, on purpose
    r"Checkpoint directory .* exists and is not empty",  # of a run that goes on
    r'Be aware that when using `ckpt_path`.*: \["ModelCheckpoint\{[^"]*"\]',  # it saves at other steps now, no more
    r"The dirpath has changed",  # of a run that goes on in another folder
    r"Detected an existing checkpoint in .*last\.ckpt",  # of FSDP2
    r".*does not have many workers",  # the sequences are in memory
    r".*number of training batches .* is smaller than the logging interval",
)
"""Lines that others log and warnings that others give, by their beginning, which no user of this command needs."""


def _quiet_others() -> None:
    """Leave the terminal to this package: others speak from warnings on, and not of what is meant to be so."""
    libraries = ("httpx", "httpcore", "fsspec", "matplotlib", "datasets", "urllib3", "absl", "lm_eval")
    for name in (*libraries, "lowrank_pl.plans.budget"):
        # The plan's notes are said once, at the end, by FinishRun.
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).addFilter(_no_chatter)
    for message in EXPECTED:
        warnings.filterwarnings("ignore", message=message)


def _no_chatter(record: logging.LogRecord) -> bool:
    return not any(words in record.getMessage() for words in CHATTER)
