"""Lightning callbacks that time a run, and export and score its result."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from transformers import PreTrainedModel

from lowrank_pl.calibration.subject import Subject
from lowrank_pl.evaluate.generation import check_prompts
from lowrank_pl.export.export import check_destination
from lowrank_pl.export.hub import HubRepo, announce_upload, upload
from lowrank_pl.factors.compression import restore_dense
from lowrank_pl.methods.allocate import make_allocator
from lowrank_pl.methods.quantize.settings import Rounding
from lowrank_pl.methods.refit.refitting import Refit
from lowrank_pl.models.identity import Origin
from lowrank_pl.models.offload import exceeds_memory
from lowrank_pl.models.sequences import check_sequences
from lowrank_pl.report.finish import Ending, ExportForm, Finished, Learned, Protocol, finish_run
from lowrank_pl.report.model_card import sample_table
from lowrank_pl.text.sequences import token_windows, warn_of_overlap
from lowrank_pl.training.data import CalibrationData, calibration_data
from lowrank_pl.training.lightning_internals import is_last_step
from lowrank_pl.training.module import RankLearner
from lowrank_pl.training.tensorboard import boards, log_everywhere
from lowrank_pl.utils.distributed import cooperating, one_process_at_a_time
from lowrank_pl.utils.files import write_json

__all__ = ["FinishRun", "ScoreText", "Stopwatch"]

_log = logging.getLogger(__name__)


class Stopwatch(Callback):
    """Measures the seconds of learning, including the parts of a resumed run."""

    def __init__(self) -> None:
        self._began: float | None = None
        self._before = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._began = time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        """Return the seconds spent learning so far, for the checkpoint."""
        return {"learning": self.learning_seconds()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from the seconds that the checkpoint's run had spent."""
        self._before = state_dict["learning"]

    def learning_seconds(self) -> float:
        """Return the seconds spent learning, including those before a resume."""
        # Resuming a finished run starts no training, so the clock may never have started.
        return self._before + (0.0 if self._began is None else time.perf_counter() - self._began)


@dataclass(frozen=True)
class ScoreText:
    """Text that models are scored on at the end of a run.

    Args:
        text: Name of the text; by default the validation sequences.
        length: Tokens per sequence.
        sequences: Number of sequences; by default the whole text.

    Raises:
        ValueError: ``length`` or ``sequences`` is given without a text.
    """

    text: str | None = None
    length: int = 1024
    sequences: int | None = None

    def __post_init__(self) -> None:
        if self.text is None and (self.length, self.sequences) != (1024, None):
            raise ValueError(
                f"score.length is {self.length} and score.sequences {self.sequences} without a score.text: name one "
                "with --finish.score.text, or leave them out; validation sequences have the settings of --data"
            )


class FinishRun(Stopwatch):
    """Exports the learned model after training, and scores it with the dense model and the baselines.

    The run's folder (``trainer.default_root_dir``) then holds ``plan.json``, ``model/``, ``summary.json``,
    ``rank_map.png`` and ``report.html``.

    Args:
        score: Text for the table. Never learn from it or calibrate on it.
        baselines: Allocators to compare with, on the same factors.
        prompts: Prompts that the dense and the compressed model continue.
        max_new_tokens: Maximum length of a continuation.
        merge: Export dense weights for any runtime instead of factors.
        any_size: Write components beside the weights, so that the folder serves every size down from its own.
        refit: How to refit the learned plan's factors to the compressed model's own inputs, on the learning sequences;
            by default they are not refitted.
        rounding: How to round the learned plan's matrices, and the embeddings, to a few bits; by default they stay as
            they are.
        streamed: Whether to keep models in main memory, score them one layer at a time on the device, and export from
            main memory. This is the default if FSDP2 shards a base that does not fit on one device. A streamed run has
            no refit, no rounding and no continuations.
        json: A file for the table's figures.
        push_to_hub: Repository of the Hugging Face hub to upload the finished model to, with the scores in its card:
            me/model, or name, private and revision. The token is that of ``hf auth login``, or ``HF_TOKEN``.

    Raises:
        ValueError: A baseline is not the name of an allocator, ``push_to_hub`` can't be a repository, or ``any_size``
            is given with ``merge``, ``refit`` or ``rounding``.
    """

    def __init__(
        self,
        score: ScoreText = ScoreText(),
        baselines: Sequence[str] = ("uniform",),
        prompts: Sequence[str] = (),
        max_new_tokens: int = 40,
        merge: bool = False,
        refit: Refit | None = None,
        streamed: bool | None = None,
        json: Path | None = None,
        push_to_hub: str | HubRepo | None = None,
        any_size: bool = False,
        rounding: Rounding | None = None,
    ) -> None:
        super().__init__()
        self.score = score
        self.baselines, self.prompts, self.max_new_tokens = tuple(baselines), tuple(prompts), max_new_tokens
        self.form = ExportForm(merge=merge, any_size=any_size)
        self.refit, self.streamed, self.json = refit, streamed, json
        if any_size and refit is not None:
            raise ValueError("a refit fits the factors to one size: leave out any_size, or the refit with refit null")
        self.rounding = rounding
        if any_size and rounding is not None:
            raise ValueError("rounded matrices have one size: leave out any_size, or the rounding with rounding null")
        for name in baselines:
            make_allocator(name)
        self.repo = HubRepo(push_to_hub) if isinstance(push_to_hub, str) else push_to_hub
        self.finished: Finished | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the baselines, the folder and the text for scores, so that a mistake fails now, not after hours."""
        if stage == "fit":
            assert isinstance(pl_module, RankLearner)
            check_destination(Path(trainer.default_root_dir) / "model", sources=[pl_module.named_base.name])
            if self.repo is not None and trainer.is_global_zero:
                announce_upload(self.repo)
            self._check_baselines(pl_module)
            if self.streamed:
                self._refuse_fitting_in_parts("streamed is true")
            data = calibration_data(trainer)
            self.protocol = self._protocol(data)
            check_prompts(data.tokenizer, self.prompts)

    def _check_baselines(self, learner: RankLearner) -> None:
        for name in self.baselines:
            try:
                make_allocator(name).check_decomposition(learner.decomposition)
            except ValueError as error:
                raise ValueError(f"the baseline {name} can't use the factors of this run: {error}") from None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the model can be scored on the text, exported and refitted, so that a mistake fails now.

        Raises:
            ValueError: The text or a prompt is too long for the model, or ``merge`` or ``refit`` is impossible.
        """
        assert isinstance(pl_module, RankLearner)
        assert pl_module.model is not None
        check_sequences(pl_module.model, self.protocol.sequences)
        if self.prompts:
            tokenizer = calibration_data(trainer).tokenizer
            check_prompts(tokenizer, self.prompts, pl_module.model, max_new_tokens=self.max_new_tokens)
        origin = Origin.of(pl_module.model)
        if self.form.merge and origin is not None and not origin.one_width:
            has = f"has {origin.described}" if origin.heads_left else f"has MLPs of {origin.widths} hidden neurons"
            raise ValueError(
                f"the base {has}, which no plain config of dense weights can "
                "describe: leave out --finish.merge, or prune all MLPs to one width with --model.prune.by_block false"
            )
        if (self.refit or self.rounding) and self._streams(trainer, pl_module, ever=True):
            size = pl_module.weight_bytes / 1e9
            self._refuse_fitting_in_parts(f"the base of {size:,.1f} GB does not fit on one with its compressed version")

    def _refuse_fitting_in_parts(self, why: str) -> None:
        for what, wanted in (("refit", self.refit), ("rounding", self.rounding)):
            if wanted is not None:
                raise ValueError(
                    f"a {what} needs the dense and the compressed model on one device, but {why}, so the result is "
                    f"scored one layer at a time: leave the {what} out with --finish.{what} null"
                )

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Write the plan with the last step, so that no later failure loses it."""
        assert isinstance(pl_module, RankLearner)
        if trainer.is_global_zero and is_last_step(trainer):
            pl_module.plan().save(Path(trainer.default_root_dir) / "plan.json")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finish the run on the first process, while the others wait."""
        assert isinstance(pl_module, RankLearner)
        if trainer.is_global_zero:
            pl_module.seconds["learning"] = self.learning_seconds()
            self.finished = self._finish(trainer, pl_module)
            self._log_result(trainer, self.finished)
            run = Path(trainer.default_root_dir)
            if self.json:
                write_json(self.json, json.loads((run / "summary.json").read_text(encoding="utf-8")))
            print(f"\n{self.finished.text(run)}")
            if self.repo is not None:
                print(f"hub          {upload(self.finished.report.directory, self.repo)}")
        trainer.strategy.barrier("finish")

    def _finish(self, trainer: Trainer, learner: RankLearner) -> Finished:
        run, plan, data = Path(trainer.default_root_dir), learner.plan(), calibration_data(trainer)
        # Before a large model is loaded: a failure then does not lose the plan.
        plan.save(run / "plan.json")
        for note in plan.notes:
            _log.info("%s", note)
        device = trainer.strategy.root_device
        streams = self._streams(trainer, learner)
        if streams:
            _log.warning(
                "models of %.1f GB stay in main memory and are scored one layer at a time on %s; prompts are skipped",
                *(learner.weight_bytes / 1e9, device),
            )
        place = torch.device("cpu") if streams else device
        model = self._dense_model(trainer, learner).to(place)
        learned = Learned(
            Subject(model, data.tokenizer, data.statistics_sequences, known_targets=learner.targets),
            plan, learner.store, learner.budget, learner.seconds, learner.store_directory,
            unpruned=self._unpruned(learner, place),
        )  # fmt: skip
        ending = Ending(
            self.protocol, self.baselines, self.form, self.refit, refit_sequences=data.train_sequences,
            rounding=self.rounding, streamed_on=device if streams else None,
        )  # fmt: skip
        return finish_run(run, learned, ending)

    def _streams(self, trainer: Trainer, learner: RankLearner, *, ever: bool = False) -> bool:
        """Return whether the model is scored one layer at a time; ``ever`` ignores what else is on the device."""
        if self.streamed is not None:
            return self.streamed
        sharded = isinstance(trainer.strategy, ModelParallelStrategy)
        return sharded and exceeds_memory(learner.weight_bytes, trainer.strategy.root_device, ever=ever)

    def _dense_model(self, trainer: Trainer, learner: RankLearner) -> PreTrainedModel:
        """Return the dense base: restored from the masked model, or loaded again if that is sharded."""
        if not isinstance(trainer.strategy, ModelParallelStrategy):
            assert learner.model is not None
            return restore_dense(learner.model)
        return learner.base.load()

    def _unpruned(self, learner: RankLearner, place: torch.device) -> Callable[[], PreTrainedModel] | None:
        """Return a function that loads the base without pruning; None if the base was not pruned."""
        if learner.base == learner.named_base:
            return None
        return lambda: learner.named_base.load().to(place)

    def _protocol(self, data: CalibrationData) -> Protocol:
        if self.score.text is None:
            sequences, text = data.validation_sequences, f"validation sequences of {data.validation_text}"
            if not len(sequences):
                raise ValueError(
                    "there is neither a score.text nor a validation sequence: give --finish.score.text or "
                    "--data.validation.sequences"
                )
        else:
            text = self.score.text
            # The first process tokenises, and the others read its cache.
            with cooperating(), one_process_at_a_time():
                sequences = token_windows(
                    text, data.tokenizer, length=self.score.length, sequences=self.score.sequences
                )
            known = (data.train_sequences, data.statistics_sequences)
            warn_of_overlap(sequences, known, data.tokenizer, "sequences to score")
        return Protocol(text, sequences, self.prompts, self.max_new_tokens)

    def _log_result(self, trainer: Trainer, finished: Finished) -> None:
        """Log the continuations, and the final scores, which TensorBoard shows with the run's settings."""
        rows = {row.name: row for row in finished.rows}
        metrics = {
            f"final/{figure}": float(getattr(rows["learned"], figure))
            for figure in ("perplexity", "excess_nats", "kept_targeted", "kept_model")
        }
        log_everywhere(trainer, metrics, trainer.global_step)
        for board in boards(trainer):
            if finished.samples:
                board.add_text("samples/exported model", sample_table(finished.samples), trainer.global_step)
