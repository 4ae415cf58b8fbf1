"""The Lightning callback that shows ranks, budget and loss in TensorBoard during learning."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lowrank_pl.methods.masks.base import dense_sizes
from lowrank_pl.methods.masks.objectives import DATA_TERMS
from lowrank_pl.models.names import block_and_kind
from lowrank_pl.plans.plan import RankPlan
from lowrank_pl.report.rank_history import Kept, RankHistory, kept_by_group
from lowrank_pl.report.rank_map import rank_map
from lowrank_pl.training.data import calibration_data
from lowrank_pl.training.module import RankLearner
from lowrank_pl.training.tensorboard import (
    Chart,
    boards,
    log_everywhere,
    log_settings,
    mark_success,
    void_from,
    write_layout,
)
from lowrank_pl.utils.checks import check_counts

__all__ = ["RankMonitor"]

MANY = 12
"""Models with more blocks get a band over blocks, because a chart with one line per block is unreadable."""


BAND = {"kept over blocks/median": 50, "kept over blocks/lowest tenth": 10, "kept over blocks/highest tenth": 90}


METRICS = ("val/excess", "val/perplexity", "keep/plan", "keep/expected", "final/excess_nats", "final/kept_targeted")
"""Metrics shown with the settings when runs are compared."""


class RankMonitor(Callback):
    """Logs how ranks change: scalars to every logger, and charts and figures to TensorBoard.

    The scalars are the kept fraction of each module type and block, of experts also the least and the greatest one of a
    module type, each type's share of the budget, the learning rate and the seconds per step. TensorBoard also gets a
    page of charts ("Custom Scalars"), rank maps of the hard plan with the history of ranks so far, histograms of the
    soft masks, and the run's settings. The callback does not change the learned result. Only the first process writes.
    After a resume, repeated steps replace their earlier values.

    Args:
        every_n_steps: Steps between scalars.
        map_every_n_steps: Steps between rank maps; by default an eighth of the run, because TensorBoard shows ten
            figures per tag. There is always one at the start and one at the end.
        histogram_every_n_steps: Steps between histograms; by default a twentieth of the run. There is always one at the
            start and one at the end.

    Raises:
        ValueError: A number of steps is below 1.
    """

    def __init__(
        self,
        every_n_steps: int = 10,
        map_every_n_steps: int | None = None,
        histogram_every_n_steps: int | None = None,
    ) -> None:
        check_counts({
            "every_n_steps": every_n_steps, "map_every_n_steps": map_every_n_steps,
            "histogram_every_n_steps": histogram_every_n_steps,
        })  # fmt: skip
        self.every_n_steps = every_n_steps
        self.map_every_n_steps = map_every_n_steps
        self.histogram_every_n_steps = histogram_every_n_steps
        self.history = RankHistory()
        self._done = self._drawn = self._binned = -1
        self._laid_out = False
        self._map_every = self._histogram_every = 1
        self._began = self._rate = self._seconds = 0.0
        self._timed = 0

    # -- when -------------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the settings; after a resume, void the events of later steps."""
        learner = _learner(pl_module)
        self._done = trainer.global_step
        self._map_every = self.map_every_n_steps or _part_of(trainer, 8)
        self._histogram_every = self.histogram_every_n_steps or _part_of(trainer, 20)
        for board in boards(trainer):
            void_from(board, trainer.global_step + 1 if trainer.global_step else 0)
        log_settings(trainer, _settings(trainer, learner), METRICS)
        if not trainer.global_step:
            self.history, self._drawn, self._binned = RankHistory(), -1, -1

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Record start time and learning rate of the batch; before the first batch, log the initial ranks."""
        # Not in on_train_start: the learner sets masks that depend on the budget there, and is called after callbacks.
        if not trainer.global_step and not self.history.steps:
            self._log_due(trainer, _learner(pl_module), everything=True)
        self._began, self._rate = time.perf_counter(), float(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log what is due after an optimizer step."""
        self._seconds += time.perf_counter() - self._began
        if trainer.global_step == self._done:  # one of several batches that make a step
            return
        self._done, self._timed = trainer.global_step, self._timed + 1
        learner = _learner(pl_module)
        if not self._laid_out:
            self._laid_out = True
            for board in boards(trainer):
                write_layout(board, _charts(trainer, learner))
        self._log_due(trainer, learner)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the final ranks and their history."""
        self._log_due(trainer, _learner(pl_module), everything=True)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Mark the run as finished."""
        for board in boards(trainer):
            mark_success(board)

    # -- resume -----------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Flush all events to disk, because a resume continues after them."""
        for board in boards(trainer):
            board.flush()

    def state_dict(self) -> dict[str, Any]:
        """Return the history of the ranks, for the checkpoint."""
        return self.history.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the history of the checkpoint's run."""
        self.history.load_state_dict(state_dict)

    # -- what -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _log_due(self, trainer: Trainer, learner: RankLearner, *, everything: bool = False) -> None:
        """Log what is due at this step, or with ``everything`` all that was not logged at this step yet."""
        step = trainer.global_step
        if not trainer.is_global_zero:
            return
        logged = self.history.steps[-1] if self.history.steps else -1
        if step > logged and (everything or step % self.every_n_steps == 0):
            self._log_scalars(trainer, learner, step)
        if self._drawn < step and (everything or step % self._map_every == 0):
            self._drawn = step
            self._log_figures(trainer, learner, step)
        if self._binned < step and (everything or step % self._histogram_every == 0):
            self._binned = step
            self._log_histograms(trainer, learner, step)

    def _log_scalars(self, trainer: Trainer, learner: RankLearner, step: int) -> None:
        ratios = torch.stack([mask.ratio() for mask in learner.masks.values()])
        sizes = dict(zip(learner.masks, dense_sizes(learner.masks, ratios).tolist(), strict=True))
        kept = kept_by_group(sizes, ratios.tolist())
        self.history.add(step, kept)
        values = _scalars(kept)
        values["keep/dense modules"] = float((ratios >= 1).sum())
        if self._timed:
            values["learning/rate"] = self._rate
            values["learning/seconds a step"] = self._seconds / self._timed
            self._seconds, self._timed = 0.0, 0
        log_everywhere(trainer, values, step)

    def _log_figures(self, trainer: Trainer, learner: RankLearner, step: int) -> None:
        plan = learner.plan()
        log_everywhere(trainer, {"keep/plan": plan.keep_targeted}, step)
        for board in boards(trainer):
            title = f"kept fraction of the hard plan after {step} steps"
            board.add_figure("ranks/map", rank_map(plan, title=title), global_step=step)
            if len(self.history.steps) > 1:
                board.add_figure("ranks/history", self.history.figure(), global_step=step)

    def _log_histograms(self, trainer: Trainer, learner: RankLearner, step: int) -> None:
        gates: dict[str, list[torch.Tensor]] = defaultdict(list)
        for name, mask in learner.masks.items() if boards(trainer) else ():
            gates[block_and_kind(name)[1]].append(mask.soft().float())
        for kind, parts in gates.items():
            values = torch.cat(parts).clamp(0, 1).cpu().numpy()
            for board in boards(trainer):
                board.add_histogram(f"soft masks/{kind}", values, step, bins=np.linspace(0, 1, 31))


def _learner(module: LightningModule) -> RankLearner:
    assert isinstance(module, RankLearner)
    return module


def _part_of(trainer: Trainer, parts: int) -> int:
    """Return the number of steps in one of ``parts`` parts of the run; 100 if the run has no end."""
    steps = trainer.estimated_stepping_batches
    return 100 if math.isinf(steps) else max(1, math.ceil(steps / parts))


def _scalars(kept: Kept) -> dict[str, float]:
    values = {f"kept by type/{kind}": value for kind, value in kept.kinds.items()}
    values |= {f"kept by block/{block}": value for block, value in kept.blocks.items()}
    values |= {f"share of budget/{kind}": value for kind, value in kept.shares.items()}
    for kind, (least, most) in kept.experts.items():
        values |= {f"kept by expert/{kind} least": least, f"kept by expert/{kind} most": most}
    if len(kept.blocks) > MANY:
        values |= {tag: float(np.percentile([*kept.blocks.values()], at)) for tag, at in BAND.items()}
    return values


def _charts(trainer: Trainer, learner: RankLearner) -> Mapping[str, Mapping[str, Chart]]:
    """Return the page of charts of the tags that this run has, the most important first."""
    sizes = dict.fromkeys(learner.masks, 1)
    kept = kept_by_group(sizes, [1.0] * len(sizes))
    tags = _scalars(kept)
    experts: dict[str, Chart] = {
        f"{kind}: all experts, least, most": (
            "Margin", [f"kept by type/{kind}", f"kept by expert/{kind} least", f"kept by expert/{kind} most"]
        )
        for kind in kept.experts
    }  # fmt: skip
    of = {group: [tag for tag in tags if tag.startswith(f"{group}/")] for group in ("kept by type", "kept by block")}
    shares = [tag for tag in tags if tag.startswith("share of budget/")]
    terms = [tag for tag in trainer.callback_metrics if tag.startswith("loss/")]
    data = [tag for tag in terms if tag.removeprefix("loss/") in DATA_TERMS]
    penalties = [tag for tag in terms if tag not in data and tag != "loss/total"]
    scored = trainer.enable_validation and len(calibration_data(trainer).validation_sequences)
    blocks: Chart = ("Margin", [*BAND]) if len(of["kept by block"]) > MANY else ("Multiline", of["kept by block"])
    return {
        "Quality of the hard plan": {"nats lost against the dense model": ("Multiline", ["val/excess"] * bool(scored))},
        "Budget": {
            "kept: target, soft masks, hard plan": ("Multiline", ["keep/target", "keep/expected", "keep/plan"]),
            "overshoot of the soft masks": ("Multiline", ["keep/overshoot"]),
            "where it goes: share of each type": ("Multiline", shares),
            "modules left dense": ("Multiline", ["keep/dense modules"]),
        },
        "Ranks by type": {"kept fraction of each type": ("Multiline", of["kept by type"])},
        "Ranks by block": {"kept fraction of each block": blocks},
        **({"Ranks by expert": experts} if experts else {}),
        "Loss": {
            "total": ("Multiline", ["loss/total"]),
            "data terms": ("Multiline", data),
            "penalties": ("Multiline", penalties),
        },
        "Learning": {
            "learning rate": ("Multiline", ["learning/rate"]),
            "seconds a step": ("Multiline", ["learning/seconds a step"]),
            "gradient norm of the masks": ("Multiline", ["learning/gradient norm"]),
        },
    }


def _settings(trainer: Trainer, learner: RankLearner) -> dict[str, Any]:
    """Return the settings that distinguish runs, as a flat mapping.

    TensorBoard sorts them by name and shows the first five. The names are chosen so that these vary most often.
    """
    data, optimizer = calibration_data(trainer), trainer.optimizers[0]
    terms = {key: value for key, value in asdict(learner.data_terms).items() if isinstance(value, float | str)}
    steps = trainer.estimated_stepping_batches
    start = learner.start_from
    return {
        "base": learner.named_base.name.rstrip("/").rsplit("/", 1)[-1],  # the columns are narrow
        "keep": learner.keep,
        "mask": learner.mask_method.name,
        "prepare.decomposition": learner.decomposition.kind,
        "prepare.storage": str(learner.constraints.storage),
        "prepare.dtype": learner.base.dtype,
        "prepare.prune": "none" if learner.prune is None else "by block" if learner.prune.by_block else "one width",
        "start": "none" if start is None else start.method if isinstance(start, RankPlan) else start.name,
        "optimizer": type(optimizer).__name__,
        "lr": optimizer.defaults["lr"],
        "steps": "open" if math.isinf(steps) else int(steps),
        "text": data.learning.text,
        "text.length": data.learning.length,
        "text.batch": data.batch_size * trainer.accumulate_grad_batches * trainer.world_size,
        **{f"terms.{key}": value for key, value in terms.items()},
        **{f"mask.{key}": value for key, value in vars(learner.mask_method).items()},
    }
