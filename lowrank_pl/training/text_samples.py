"""The Lightning callback that shows continuations of prompts in TensorBoard during learning."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.seed import isolate_rng

from lowrank_pl.evaluate.generation import check_prompts, generate_samples
from lowrank_pl.methods.masks.losses import planned_computations
from lowrank_pl.methods.masks.masked_linear import Computation, computing_with
from lowrank_pl.report.model_card import sample_table
from lowrank_pl.training.data import CalibrationData, calibration_data
from lowrank_pl.training.finish_run import FinishRun
from lowrank_pl.training.module import RankLearner
from lowrank_pl.training.tensorboard import boards
from lowrank_pl.utils.checks import check_counts

__all__ = ["TextSamples"]

_log = logging.getLogger(__name__)


BEGINNINGS = 3
"""Number of validation sequences whose first tokens are continued if no prompt is given."""


BEGINNING = 12
"""Number of these first tokens."""


class TextSamples(Callback):
    """Writes greedy continuations of a few prompts to TensorBoard, by the dense model and by the present hard plan.

    They are written before learning, after every validation, and at the end. The callback does not change the learned
    result: it uses no random number and restores the mode of every module. Without a TensorBoard logger nothing is
    generated. With FSDP2 all processes would have to generate in lockstep; the callback then does nothing and logs a
    warning.

    Args:
        prompts: Texts to continue. The default is those of ``FinishRun`` or, if it has none, the first words of three
            validation sequences. An empty list generates nothing.
        max_new_tokens: Maximum length of a continuation; together with the number of prompts it sets the cost.
        every_n_steps: Optimizer steps between continuations; by default they follow every validation.

    Raises:
        ValueError: A number is below 1.
    """

    def __init__(
        self, prompts: Sequence[str] | None = None, max_new_tokens: int = 24, every_n_steps: int | None = None
    ) -> None:
        check_counts({"max_new_tokens": max_new_tokens, "every_n_steps": every_n_steps})
        self.prompts = prompts if prompts is None else tuple(prompts)
        self.max_new_tokens = max_new_tokens
        self.every_n_steps = every_n_steps
        self._dense: dict[str, str] = {}
        self._prompts: tuple[str, ...] = ()
        self._shown = -1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the prompts before anything is loaded."""
        if stage == "fit" and self.prompts:
            check_prompts(calibration_data(trainer).tokenizer, self.prompts)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the prompts, and check that they fit the model.

        Raises:
            ValueError: A prompt is too long.
        """
        self._prompts = ()
        if self.prompts == () or not any(isinstance(logger, TensorBoardLogger) for logger in trainer.loggers):
            return
        if isinstance(trainer.strategy, ModelParallelStrategy) and trainer.world_size > 1:
            if trainer.is_global_zero:
                _log.warning(
                    "no continuations while learning: %d processes share the model and would have to generate in "
                    "lockstep; the exported model is sampled at the end",
                    trainer.world_size,
                )
            return
        data = calibration_data(trainer)
        self._prompts = self.prompts or _prompts_of_finish(trainer) or _beginnings(data)
        assert isinstance(pl_module, RankLearner)
        check_prompts(data.tokenizer, self._prompts, pl_module.model, max_new_tokens=self.max_new_tokens)
        if not self._prompts:
            _log.info("no continuations while learning: there is neither a prompt nor a validation sequence")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Continue the prompts before anything is learned, unless the run was resumed."""
        if trainer.global_step == 0:
            self._show(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Continue the prompts if due after this step."""
        if self.every_n_steps is not None and trainer.global_step % self.every_n_steps == 0:
            self._show(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Continue the prompts after a validation, unless ``every_n_steps`` is given."""
        if self.every_n_steps is None and not trainer.sanity_checking:
            self._show(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Continue the prompts a last time."""
        self._show(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return the dense continuations and the last step with continuations, for the checkpoint."""
        return {"dense": dict(self._dense), "max_new_tokens": self.max_new_tokens, "shown": self._shown}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue after the last step that the checkpoint's run has shown."""
        self._shown = state_dict["shown"]
        if state_dict["max_new_tokens"] == self.max_new_tokens:
            self._dense = dict(state_dict["dense"])

    def _show(self, trainer: Trainer, learner: LightningModule) -> None:
        writers, step = boards(trainer), trainer.global_step
        if not writers or not self._prompts or self._shown >= step:
            return
        self._shown = step
        assert isinstance(learner, RankLearner)
        plan, data = learner.plan(), calibration_data(trainer)
        if not set(self._prompts) <= set(self._dense):
            self._dense = dict(zip(self._prompts, self._continue(learner, data, "dense"), strict=True))
        now = self._continue(learner, data, planned_computations(plan, learner.layers))
        rows = [(prompt, self._dense[prompt], text) for prompt, text in zip(self._prompts, now, strict=True)]
        text = sample_table(rows, name=f"hard plan after {step} steps, {100 * plan.keep_targeted:.1f} % kept")
        for writer in writers:
            writer.add_text("samples/while learning", text, step)

    def _continue(
        self, learner: RankLearner, data: CalibrationData, computations: dict[str, Computation] | Computation
    ) -> list[str]:
        assert learner.model is not None
        # Validation runs in inference mode. Its tensors must not stay in the model, for example in rotary tables.
        with isolate_rng(), torch.inference_mode(False), computing_with(dict(learner.layers), computations):
            return generate_samples(learner.model, data.tokenizer, self._prompts, max_new_tokens=self.max_new_tokens)


def _prompts_of_finish(trainer: Trainer) -> tuple[str, ...]:
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    finishing = [callback for callback in callbacks if isinstance(callback, FinishRun)]
    return finishing[0].prompts if finishing else ()


def _beginnings(data: CalibrationData) -> tuple[str, ...]:
    """Return the first words of some validation sequences, without empty texts."""
    heads = data.validation_sequences[:BEGINNINGS, :BEGINNING].tolist()
    texts = [str(data.tokenizer.decode(head, skip_special_tokens=True)).strip() for head in heads]
    return tuple(text for text in texts if text)
