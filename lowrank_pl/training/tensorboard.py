"""TensorBoard output of a run: writers, events voided by a resume, the page of charts and the table of runs."""

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
"""A chart of lines, given by their tags, or of a band, given by the tags of its middle, lower and upper line."""


def boards(trainer: Trainer) -> list[SummaryWriter]:
    """Return the writers of the Trainer's TensorBoard loggers; none on processes other than the first."""
    if not trainer.is_global_zero:
        return []
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def log_everywhere(trainer: Trainer, values: Mapping[str, float], step: int) -> None:
    """Log ``values`` of optimizer step ``step`` with every logger."""
    for logger in trainer.loggers:
        logger.log_metrics(dict(values), step=step)


def void_from(writer: SummaryWriter, step: int) -> None:
    """Void all events of ``step`` and later steps in TensorBoard, because these steps are repeated.

    A killed run has written events after its last checkpoint. TensorBoard takes the first START event in a folder for
    the beginning of the run, so every run has to write one at step 0.
    """
    _file(writer).add_event(Event(session_log=SessionLog(status=SessionLog.START)), step)


def write_layout(writer: SummaryWriter, charts: Mapping[str, Mapping[str, Chart]]) -> None:
    """Write the layout of the page "Custom Scalars". Charts without tags are omitted.

    Args:
        writer: Writer of the run.
        charts: Charts by the names of group and chart.
    """
    layout: dict[str, dict[str, list[Any]]] = {}
    for group, members in charts.items():
        for name, (form, tags) in members.items():
            if tags:
                # TensorBoard takes the lines of a chart as regular expressions that match from the start of a tag.
                shown = [f"{re.escape(tag)}$" for tag in tags] if form == "Multiline" else list(tags)
                layout.setdefault(group, {})[name] = [form, shown]
    writer.add_custom_scalars(layout)


def log_settings(trainer: Trainer, settings: Mapping[str, Any], metrics: Iterable[str]) -> None:
    """Log the settings of a run with every logger; in TensorBoard they are a row of the page "HParams".

    Args:
        trainer: The Trainer with the loggers.
        settings: Flat mapping; values other than numbers and strings are converted to strings.
        metrics: Tags of scalars whose last values are shown with the settings.
    """
    plain = {name: value if type(value) in (int, float, str) else str(value) for name, value in settings.items()}
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.log_hyperparams(plain, metrics={})  # with metrics it would log values for them too
            if trainer.is_global_zero:
                # Lightning has already written the file, without the settings.
                save_hparams_to_yaml(Path(logger.log_dir, logger.NAME_HPARAMS_FILE), logger.hparams)
        else:
            logger.log_hyperparams(plain)
    for writer in boards(trainer):
        # Written into the run's own file, because `SummaryWriter.add_hparams` would create a second run.
        table, start, _ = hparams(plain, dict.fromkeys(metrics, 0.0))  # type: ignore[no-untyped-call]
        _file(writer).add_summary(table, 0)
        _file(writer).add_summary(start, 0)


def mark_success(writer: SummaryWriter) -> None:
    """Mark the run as finished on the page "HParams"."""
    *_, end = hparams({}, {})  # type: ignore[no-untyped-call]
    _file(writer).add_summary(end, 0)


def _file(writer: SummaryWriter) -> Any:
    """Return the event file of ``writer``: SummaryWriter has no public method for session logs and raw summaries."""
    return writer._get_file_writer()  # type: ignore[no-untyped-call]
