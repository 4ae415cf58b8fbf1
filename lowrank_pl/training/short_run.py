"""Short learning runs of ``lowrank compare`` with Lightning, on a model that is already loaded."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from transformers import PreTrainedModel

from lowrank_pl.calibration.subject import Subject
from lowrank_pl.factors.compression import restore_dense
from lowrank_pl.factors.store import FactorStore
from lowrank_pl.methods.healing import Healing
from lowrank_pl.methods.recipes import Learning, Recipe
from lowrank_pl.plans.plan import HEALED, RankPlan
from lowrank_pl.training.checkpointing import AtomicCheckpoints
from lowrank_pl.training.data import CalibrationData, StatisticsText, ValidationText
from lowrank_pl.training.finish_heal import ScoreHealing
from lowrank_pl.training.finish_run import Stopwatch
from lowrank_pl.training.heal import Healer
from lowrank_pl.training.interrupt import StopBetweenBatches, explain_interruption
from lowrank_pl.training.module import Compute, RankLearner, Start
from lowrank_pl.training.progress import LearningBar
from lowrank_pl.training.rank_monitor import RankMonitor

__all__ = ["ShortRuns"]

_log = logging.getLogger(__name__)

HELD_BACK = 8
"""Sequences that decide whether healing helped; they come after those that are trained on."""


@dataclass(frozen=True)
class ShortRuns:
    """Short learning runs for a comparison, on a model that is already loaded.

    Args:
        subject: The dense base with its text. The model has masked layers only during a run.
        seed: Seed of the order of sequences.
    """

    subject: Subject
    seed: int

    def learn(self, method: Recipe, keep: float, folder: Path) -> tuple[RankPlan, FactorStore, float]:
        """Return the learned plan, the factors that it is for, and the seconds of learning.

        ``folder`` holds checkpoints and TensorBoard events; a killed run continues from its last checkpoint there.
        """
        learning = method.learning
        assert learning is not None
        seed_everything(self.seed, verbose=False)
        learner, data = self._learner(method, learning, keep), self._data(learning.sequences, learning.batch_size)
        watch = Stopwatch()
        callbacks = [watch, RankMonitor(map_every_n_steps=learning.steps)]
        trainer = self._trainer(folder, callbacks, max_steps=learning.steps, max_epochs=-1)
        model = self.subject.model
        device = model.device
        try:
            # Use the loaded model; configure_model would load a second one.
            learner.build(model, data)
            self._fit(trainer, learner, data, folder)
            return learner.plan(), learner.store, watch.learning_seconds()
        finally:
            restore_dense(model).to(device)

    def heal(
        self, plan: RankPlan, store: FactorStore, settings: Healing, folder: Path
    ) -> tuple[RankPlan, FactorStore, float]:
        """Return the plan and the factors after training, and its seconds; what was given where it did not help.

        Batches are single sequences of the calibration text. ``folder`` is as for ``learn``.
        """
        _, ending = self._healed(plan.save(folder / "plan.json"), settings, folder, store=store.directory)
        if ending.plan is None:
            return replace(plan, notes=(*plan.notes, _dropped(ending))), store, ending.learning_seconds()
        return ending.plan, FactorStore.existing(ending.plan.origin["store"]), ending.learning_seconds()

    def heal_pruned(self, settings: Healing, folder: Path) -> tuple[PreTrainedModel, str, float]:
        """Return the pruned base with a trained adapter merged into it, a note that says so, and the seconds.

        The adapter is left out where it did not help. Batches and ``folder`` are as for ``heal``.
        """
        assert self.subject.base is not None
        healer, ending = self._healed(Path(self.subject.base.name), settings, folder)
        assert ending.healed is not None
        if not ending.healed.kept:
            return healer.adapter.unload(), _dropped(ending), ending.learning_seconds()
        return healer.adapter.merge_and_unload(), f"{HEALED}{ending.healed}", ending.learning_seconds()

    def _healed(
        self, start: Path, settings: Healing, folder: Path, *, store: Path | None = None
    ) -> tuple[Healer, ScoreHealing]:
        """Train what ``start`` names, and return its module and the end of its run."""
        base, calibration = self.subject.base, self.subject.calibration
        assert base is not None
        assert calibration is not None
        seed_everything(self.seed, verbose=False)
        healer = Healer(start, settings, store=store, trust_remote_code=base.trust_remote_code)
        data = self._data(max(1, settings.tokens // calibration.length), 1, held_back=HELD_BACK)
        ending = ScoreHealing(folder / "factors")
        # Factors of a base in half precision are trained in float32, and computed with in bfloat16.
        mixed = settings.train == "factors" and healer.start.base.dtype != "float32"
        trainer = self._trainer(
            folder, [ending], max_epochs=-1, gradient_clip_val=1.0, precision="bf16-mixed" if mixed else "32-true"
        )
        model = self.subject.model
        device = model.device
        # A pruned base is not the dense model, which is loaded beside it.
        teacher = model if healer.start.teacher.name == base.name else None
        try:
            healer.build(healer.start.load(device, teacher=teacher), data)
            self._fit(trainer, healer, data, folder)
        finally:
            model.to(device)
        return healer, ending

    def _data(self, sequences: int, batch_size: int, *, held_back: int = 0) -> CalibrationData:
        calibration = self.subject.calibration
        assert calibration is not None
        return CalibrationData(
            replace(calibration, sequences=sequences),
            self.subject.tokenizer,
            statistics=StatisticsText(sequences=len(self.subject.sequences)),
            validation=ValidationText(sequences=held_back),
            batch_size=batch_size,
            seed=self.seed,
        )

    def _fit(self, trainer: Trainer, module: LightningModule, data: CalibrationData, folder: Path) -> None:
        last = folder / "checkpoints" / "last.ckpt"
        with explain_interruption(trainer, lambda: "run the same command again to go on"):
            trainer.fit(module, data, ckpt_path=str(last) if last.exists() else None, weights_only=True)

    def _learner(self, method: Recipe, learning: Learning, keep: float) -> RankLearner:
        assert self.subject.base is not None
        return RankLearner(
            self.subject.base,
            keep=keep,
            mask=learning.mask,
            data_terms=learning.data_terms,
            decomposition=method.decomposition,
            optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=learning.lr, weight_decay=0.0),
            lr_scheduler="cosine" if learning.cosine else None,
            constraints=method.constrained(self.subject.constraints),
            start=Start(plan=learning.start),
            compute=Compute(inactive_gate_stride=learning.inactive_gate_stride),
        )

    def _trainer(self, folder: Path, callbacks: Sequence[Callback], **settings: Any) -> Trainer:
        device = self.subject.model.device
        checkpoints = ModelCheckpoint(
            folder / "checkpoints", every_n_train_steps=25, save_last=True, save_top_k=1, enable_version_counter=False
        )
        return Trainer(
            **settings,
            accelerator="auto" if device.type != "cpu" else "cpu",
            devices=1 if device.type == "cpu" else [device.index or 0],
            default_root_dir=folder,
            limit_val_batches=0,
            logger=TensorBoardLogger(folder, name="", version="tensorboard", default_hp_metric=False),
            callbacks=[checkpoints, *callbacks, LearningBar(), StopBetweenBatches()],
            plugins=[AtomicCheckpoints()],
            num_sanity_val_steps=0,
            log_every_n_steps=1,
            enable_model_summary=False,
        )


def _dropped(ending: ScoreHealing) -> str:
    _log.warning("healing did not help: the row is that of the model before it")
    return f"healing was tried and dropped: {ending.healed}"
