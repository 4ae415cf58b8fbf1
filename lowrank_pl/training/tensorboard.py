"""TensorBoard's side of a run: its writers, what a resume makes void, the page of charts and the table of runs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Trainer
from lightning.pytorch.core.saving import save_hparams_to_yaml
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

__all__ = ["Chart", "boards", "log_everywhere", "log_settings", "mark_success", "void_from", "write_layout"]

Chart = tuple[Literal["Multiline", "Margin"], Sequence[str]]
"""A chart of lines by their tags, or of a band by those of its middle, lower and upper line."""


def boards(trainer: Trainer) -> list[SummaryWriter]:
    """Return the writers of the Trainer's TensorBoard loggers; none on processes other than the first."""
    if not trainer.is_global_zero:
        return []
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def log_everywhere(trainer: Trainer, values: Mapping[str, float], step: int) -> None:
    """Give ``values`` of optimizer step ``step`` to every logger."""
    for logger in trainer.loggers:
        logger.log_metrics(dict(values), step=step)


def void_from(writer: SummaryWriter, step: int) -> None:
    """Tell TensorBoard that what it has of ``step`` and later steps is void, because these steps are done again.

    A run that was killed has written points of steps after its last checkpoint. TensorBoard takes the first such word
    in a folder for the beginning of the run, so every run has to say it at step 0.
    """
    _file(writer).add_event(Event(session_log=SessionLog(status=SessionLog.START)), step)


def write_layout(writer: SummaryWriter, charts: Mapping[str, Mapping[str, Chart]]) -> None:
    """Write the page "Custom Scalars": charts by group, and tags by chart. Charts without tags are left out.

    Args:
        writer: Where to.
        charts: By the group's name and the chart's.
    """
    layout: dict[str, dict[str, list[Any]]] = {}
    for group, members in charts.items():
        for name, (form, tags) in members.items():
            if tags:
                # The lines of a chart are looked up as regular expressions that match from the start of a tag.
                shown = [f"{re.escape(tag)}$" for tag in tags] if form == "Multiline" else list(tags)
                layout.setdefault(group, {})[name] = [form, shown]
    writer.add_custom_scalars(layout)


def log_settings(trainer: Trainer, settings: Mapping[str, Any], metrics: Iterable[str]) -> None:
    """Give the settings of a run to every logger, for TensorBoard as a line of its page "HParams".

    Args:
        trainer: Whose loggers.
        settings: Flat; what is neither a number nor text is written as text.
        metrics: Tags of scalars whose last values stand beside the settings, whenever the run logs them.
    """
    plain = {name: value if type(value) in (int, float, str) else str(value) for name, value in settings.items()}
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.log_hyperparams(plain, metrics={})  # with metrics it would log values for them too
            if trainer.is_global_zero:
                # Lightning has written it by now, without them.
                save_hparams_to_yaml(Path(logger.log_dir, logger.NAME_HPARAMS_FILE), logger.hparams)
        else:
            logger.log_hyperparams(plain)
    for writer in boards(trainer):
        # Written into the run's own file: `SummaryWriter.add_hparams` would make a second run of it.
        table, start, _ = hparams(plain, dict.fromkeys(metrics, 0.0))  # type: ignore[no-untyped-call]
        _file(writer).add_summary(table, 0)
        _file(writer).add_summary(start, 0)


def mark_success(writer: SummaryWriter) -> None:
    """Tell the page "HParams" that the run has come to its end."""
    *_, end = hparams({}, {})  # type: ignore[no-untyped-call]
    _file(writer).add_summary(end, 0)


def _file(writer: SummaryWriter) -> Any:
    return writer._get_file_writer()  # type: ignore[no-untyped-call]
