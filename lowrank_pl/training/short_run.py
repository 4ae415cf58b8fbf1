"""One short learning run of ``lowrank compare``, by Lightning, on the model that is already there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowrank_pl.factors.compression import restore_dense
from lowrank_pl.factors.store import FactorStore
from lowrank_pl.methods.recipes import Learning, Recipe
from lowrank_pl.plans.plan import RankPlan
from lowrank_pl.training.checkpointing import AtomicCheckpoints
from lowrank_pl.training.data import CalibrationData
from lowrank_pl.training.finish_run import Stopwatch
from lowrank_pl.training.interrupt import StopBetweenBatches, explain_interruption
from lowrank_pl.training.module import RankLearner
from lowrank_pl.training.progress import LearningBar
from lowrank_pl.training.rank_monitor import RankMonitor

__all__ = ["Subject"]


@dataclass(frozen=True)
class Subject:
    """What the methods of a comparison are compared on: a model and its calibration text; masks learn on it in short.

    Args:
        model: The dense base; masked layers are in it only while it learns.
        base: Its name.
        dtype: The type that it was loaded in.
        tokenizer: Its tokenizer.
        calibration: Text to learn from.
        tokens: ``[sequences, length]`` token ids of it, for statistics.
        options: ``include``, ``exclude`` and ``multiple_of`` of the learner.
        seed: Of the order of sequences.
        trust_remote_code: Run Python code that comes with the base.
    """

    model: PreTrainedModel
    base: str
    dtype: Literal["float32", "bfloat16", "float16"]
    tokenizer: PreTrainedTokenizerBase
    calibration: str
    tokens: Tensor
    options: dict[str, Any]
    seed: int
    trust_remote_code: bool

    def learn(self, method: Recipe, keep: float, folder: Path) -> tuple[RankPlan, FactorStore, float]:
        """Return the plan that the recipe's mask learned, the factors that it is for, and the seconds of learning.

        A run that was killed goes on from its checkpoint in ``folder``, where its events for TensorBoard are as well.
        """
        learning = method.learning
        assert learning is not None
        seed_everything(self.seed, verbose=False)
        learner, data = self._learner(method, learning, keep), self._data(learning)
        watch = Stopwatch()
        trainer = self._trainer(learning, folder, watch)
        last = folder / "checkpoints" / "last.ckpt"
        device = self.model.device
        try:
            # On the model that is there: a learner would load a second one.
            learner.build(self.model, data)
            with explain_interruption(trainer, lambda: "run the same command again to go on"):
                trainer.fit(learner, data, ckpt_path=str(last) if last.exists() else None, weights_only=True)
            return learner.plan(), learner.store, watch.learning_seconds()
        finally:
            restore_dense(self.model).to(device)

    def _data(self, learning: Learning) -> CalibrationData:
        count, length = self.tokens.shape
        return CalibrationData(
            self.calibration,
            self.tokenizer,
            length=length,
            sequences=learning.sequences,
            batch_size=learning.batch_size,
            seed=self.seed,
            statistics_sequences=count,
            validation_sequences=0,
        )

    def _learner(self, method: Recipe, learning: Learning, keep: float) -> RankLearner:
        return RankLearner(
            self.base,
            keep=keep,
            dtype=self.dtype,
            mask=learning.mask,
            data_terms=learning.data_terms,
            decomposition=method.decomposition,
            optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=learning.lr, weight_decay=0.0),
            cosine=learning.cosine,
            start=learning.start,
            inactive_gate_stride=learning.inactive_gate_stride,
            storage=method.storage,
            trust_remote_code=self.trust_remote_code,
            **self.options,
        )

    def _trainer(self, learning: Learning, folder: Path, watch: Stopwatch) -> Trainer:
        device = self.model.device
        checkpoints = ModelCheckpoint(
            folder / "checkpoints", every_n_train_steps=25, save_last=True, save_top_k=1, enable_version_counter=False
        )
        monitor = RankMonitor(map_every_n_steps=learning.steps)
        return Trainer(
            max_steps=learning.steps,
            max_epochs=-1,
            accelerator="auto" if device.type != "cpu" else "cpu",
            devices=1 if device.type == "cpu" else [device.index or 0],
            default_root_dir=folder,
            limit_val_batches=0,
            logger=TensorBoardLogger(folder, name="", version="tensorboard", default_hp_metric=False),
            callbacks=[checkpoints, watch, monitor, LearningBar(), StopBetweenBatches()],
            plugins=[AtomicCheckpoints()],
            num_sanity_val_steps=0,
            log_every_n_steps=1,
            enable_model_summary=False,
        )
