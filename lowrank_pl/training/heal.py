"""The LightningModule that heals a compressed model: factors, or an adapter, learn the dense model's logits."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MeanMetric
from transformers import PreTrainedModel

from lowrank_pl.evaluate.likelihood import Divergence, compared, divergence
from lowrank_pl.factors.healed import low_rank_embeddings, low_rank_layers
from lowrank_pl.methods.healing import Healing
from lowrank_pl.methods.masks.objectives import logit_kl
from lowrank_pl.models.forward import activation_checkpointing
from lowrank_pl.models.hf_experts import all_experts_called
from lowrank_pl.models.sequences import check_sequences
from lowrank_pl.text.sequences import sequences_fingerprint
from lowrank_pl.training.checkpointing import check_fit, mark, mark_of
from lowrank_pl.training.data import CalibrationData, batch_tokens, calibration_data
from lowrank_pl.training.heal_start import HealPair, HealStart
from lowrank_pl.training.lightning_internals import batches_done, end_after
from lowrank_pl.training.monitored import check_callbacks, check_validation
from lowrank_pl.training.precision import check_computed_in_half, check_loss, check_precision
from lowrank_pl.utils.files import at_home

__all__ = ["NOT_SHARDED", "Healer"]

_log = logging.getLogger(__name__)

VALIDATED = ("val/kl", "val/perplexity", "val/excess")

METRICS = ("loss/kl", "learning/gradient norm", "learning/rate", "step", *VALIDATED)
"""The metrics of every healing run."""


NOT_SHARDED = "healing needs the whole model on every device, and FSDP2 would shard it: use --trainer.strategy ddp"
"""What is wrong with a strategy that shards."""


class Healer(LightningModule):
    """Trains a compressed model to predict what its dense model predicts; ranks stay as they are.

    The loss is the KL divergence of the compressed model's next-token distribution from that of the dense model, in
    nats per token. Either the low-rank layers are trained (both factors, or the two parts of a pivoted layer; pivots
    stay), or a LoRA adapter on the model. Dense layers, embeddings, norms and biases are frozen. The run ends with the
    token budget, whatever ``max_epochs`` of the Trainer says.

    Both models are in memory, but share every parameter that is equal. What is trained is float32 for every type of the
    base. Checkpoints contain only that. The data module's validation sequences decide whether the result is any good.

    Args:
        plan: A plan, whose factors are trained. Or the folder of an export; or that of a base pruned by ``lowrank
            prune``, which only an adapter can heal.
        settings: What is trained, for how many tokens, and how fast.
        teacher: The dense model; by default the one that the plan or the folder names.
        store: Folder of the plan's factors; by default the one that the plan names.
        trust_remote_code: Run Python code that comes with the models.
        gradient_checkpointing: Recompute each block's activations in the backward pass, to save memory.

    Raises:
        ValueError: There is nothing to heal at ``plan``, or ``factors`` are to be trained where there are none.

    Example:
        >>> from lowrank_pl import CalibrationData
        >>> healer = Healer("plan.json", Healing(tokens=1_000_000))  # doctest: +SKIP
        >>> data = CalibrationData(tokenizer=healer.start.teacher.name)  # doctest: +SKIP
    """

    def __init__(
        self,
        plan: str | Path,
        settings: Healing,
        *,
        teacher: str | None = None,
        store: Path | None = None,
        trust_remote_code: bool = False,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.settings, self.gradient_checkpointing = settings, gradient_checkpointing
        self.start = HealStart.find(at_home(plan), teacher=teacher, store=store, trust_remote_code=trust_remote_code)
        if self.start.plan is not None and self.start.plan.is_rounded and settings.train == "factors":
            raise ValueError(
                f"the matrices of {plan} are rounded to a few bits, which training does not keep: heal the plan before "
                "rounding, or train an adapter on top with train lora"
            )
        if self.start.plan is None and settings.train == "factors":
            raise ValueError(
                f"{str(plan)!r} is a pruned base without factors: heal it with an adapter, --model.settings.train lora"
            )
        self.strict_loading = False
        self.model: PreTrainedModel | None = None
        self.before: Divergence | None = None
        self.scores = nn.ModuleDict({name: MeanMetric() for name in ("kl", "nats", "dense_nats")})
        # In a tuple, so that the teacher and the wrapper of the adapter are no submodules: neither is trained or saved.
        self._pair: tuple[HealPair, ...] = ()
        self._adapter: tuple[Any, ...] = ()

    # -- building ---------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Check the Trainer and the budget, and let the run end with the budget.

        Raises:
            ValueError: The Trainer or the data can't do what is asked; the message says what to change.
        """
        trainer, data = self.trainer, calibration_data(self.trainer)
        check_callbacks(trainer, METRICS)
        check_precision(
            trainer,
            "what is trained",
            "use precision '32-true', or 'bf16-mixed', which computes in bfloat16 and trains in float32",
        )
        if isinstance(trainer.strategy, ModelParallelStrategy):
            raise ValueError(NOT_SHARDED)
        if self.settings.train == "factors":
            check_computed_in_half(trainer, self.start.base, "its factors")
        if not len(data.validation_sequences):
            raise ValueError(
                "there are no validation sequences, which decide whether healing helped: set "
                "--data.validation.sequences"
            )
        if trainer.max_steps not in (-1, self.steps):
            raise ValueError(
                f"the run ends after its {self.settings.tokens:,} tokens, and max_steps is {trainer.max_steps}: leave "
                "out max_steps, or change tokens"
            )
        end_after(trainer, self.steps)
        accumulated, of_epoch = int(trainer.accumulate_grad_batches), self._batches_per_epoch
        _log.info(
            "a budget of %s tokens, %d steps of %s tokens, from a text of %s tokens",
            *(f"{self.settings.tokens:,}", self.steps),
            *(f"{batch_tokens(self.trainer) * accumulated:,}", f"{data.train_sequences.numel():,}"),
        )
        if of_epoch % accumulated:
            _log.info(
                "an epoch has %d batches, of which %d make one step: its last step has the %d that are left",
                *(of_epoch, accumulated, of_epoch % accumulated),
            )

    @property
    def steps(self) -> int:
        """Optimizer steps of the run.

        Raises:
            ValueError: The token budget does not reach for one step.
        """
        accumulated = int(self.trainer.accumulate_grad_batches)
        return self.settings.steps(batch_tokens(self.trainer), accumulated=accumulated, epoch=self._batches_per_epoch)

    @property
    def tokens_done(self) -> int:
        """Tokens that were trained on so far, before a resume too."""
        return batches_done(self.trainer)[0] * batch_tokens(self.trainer)

    @property
    def _batches_per_epoch(self) -> int:
        data, trainer = calibration_data(self.trainer), self.trainer
        return data.batches_of_epoch(
            len(data.train_sequences), processes=int(trainer.world_size), limit=trainer.limit_train_batches
        )

    def configure_model(self) -> None:
        """Load both models, and choose what is trained; later calls do nothing."""
        if self.model is not None:
            return
        data = calibration_data(self.trainer)
        # Lightning calls this hook with its own device as the default (RankLearner.configure_model).
        with torch.device("cpu"):
            self.build(self.start.load(self.trainer.strategy.root_device), data)

    def build(self, pair: HealPair, data: CalibrationData) -> None:
        """Train the student of ``pair`` from now on.

        Args:
            pair: The two models; the student is trained in place.
            data: Text to train and to validate on.

        Raises:
            ValueError: A model can't run on the sequences, or there is no low-rank layer to train.
        """
        for model in (pair.student, pair.teacher):
            for sequences in (data.train_sequences, data.validation_sequences):
                check_sequences(model, sequences)
        self._pair, self.model = (pair,), pair.student
        if self.settings.train == "lora":
            self._add_adapter(pair.student)
        else:
            layers = low_rank_layers(pair.student)
            if not layers:
                raise ValueError(f"{self.start.path} leaves every layer dense: there are no factors to heal")
            for layer in layers.values():
                for part in (layer.weight, layer.right):
                    part.data = part.data.float()
                    part.requires_grad_(True)
            for name in low_rank_embeddings(pair.student):
                _log.info("%s is of low rank and stays as it is, with a head that is tied to it", name)
        count = sum(parameter.numel() for parameter in self.trained().values())
        _log.info("%s parameters are trained (%s)", f"{count:,}", self.settings.train)

    def _add_adapter(self, student: PreTrainedModel) -> None:
        from peft import LoraConfig, get_peft_model

        lora = self.settings.lora
        targets = "all-linear" if lora.targets is None else list(lora.targets)
        config = LoraConfig(
            r=lora.rank, lora_alpha=lora.alpha, target_modules=targets, lora_dropout=0.0, use_rslora=lora.rslora,
            task_type="CAUSAL_LM",
        )  # fmt: skip
        # The same adapter to start from in every run and process.
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            # PEFT itself asks for it.
            warnings.filterwarnings("ignore", ".is_gradient_checkpointing", FutureWarning)
            torch.manual_seed(0)
            self._adapter = (get_peft_model(student, config),)

    @property
    def pair(self) -> HealPair:
        """The compressed and the dense model."""
        assert self._pair, "configure_model has not run"
        return self._pair[0]

    @property
    def adapter(self) -> Any:
        """The ``PeftModel`` around the compressed model; None if its factors are trained."""
        return self._adapter[0] if self._adapter else None

    def trained(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters by their names in the compressed model."""
        return {name: one for name, one in self.pair.student.named_parameters() if one.requires_grad}

    # -- training ---------------------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        """Check what callbacks watch, and score the model as it is before the first step."""
        check_validation(self.trainer, VALIDATED)
        self.pair.student.eval()  # No dropout: a resumed run could not repeat its random numbers.
        if self.before is None:
            self.before = self.score("validate before healing")
            _log.info("before healing: %s", _figures(self.before))

    def training_step(self, tokens: Tensor, batch_idx: int) -> Tensor:
        """Return the mean KL divergence of one batch of token ids ``[batch, length]``.

        Raises:
            ValueError: The loss is not finite.
        """
        with torch.no_grad():
            wanted = self.pair.teacher(input_ids=tokens, use_cache=False).logits
        memory = activation_checkpointing(self.pair.student) if self.gradient_checkpointing else nullcontext()
        with memory, all_experts_called():
            logits = self.pair.student(input_ids=tokens, use_cache=False).logits
        loss = logit_kl(logits, wanted)
        check_loss(loss, self.global_step, "lower --model.settings.lr")
        self.log("loss/kl", loss.detach(), prog_bar=True)
        # Loggers show a value at the step that it belongs to, as in RankLearner.
        self.log("step", float(self.global_step + 1))
        self.log("learning/rate", self.settings.learning_rate(self.global_step, self.steps))
        return loss

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Compute the gradients; experts without tokens get zeros, because DDP waits for all of them."""
        with all_experts_called():
            super().backward(loss, *args, **kwargs)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the norm of the gradients."""
        gradients = [one.grad for one in self.trained().values() if one.grad is not None]
        self.log("learning/gradient norm", nn.utils.get_total_norm(gradients))

    def configure_optimizers(self) -> Any:
        """Return AdamW, and the learning rate that rises and then falls to 0 along half a cosine."""
        settings, steps = self.settings, self.steps
        # The second moments of a short run have to forget its first steps.
        optimizer = torch.optim.AdamW(
            list(self.trained().values()), lr=settings.lr, betas=(0.9, 0.95), weight_decay=settings.weight_decay
        )
        schedule = LambdaLR(optimizer, lambda step: settings.learning_rate(step, steps) / settings.lr)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # -- validation: the model as it would be exported ---------------------------------------------------------------

    @contextmanager
    def as_exported(self) -> Iterator[None]:
        """Give the low-rank layers the type of the base while the block runs, and compute without autocast."""
        stored = self.start.base.torch_dtype
        cast = {} if self._adapter else {one: one.data for one in self.trained().values() if one.dtype != stored}
        with torch.inference_mode(False), torch.no_grad():
            for one in cast:
                one.data = one.data.to(stored)
        try:
            with torch.autocast(self.pair.student.device.type, enabled=False):
                yield
        finally:
            for one, data in cast.items():
                one.data = data

    def score(self, progress: str | None = None) -> Divergence:
        """Return the divergence of the model, as it would be exported, from the dense one on the validation sequences.

        Args:
            progress: Label of a progress bar.
        """
        data = calibration_data(self.trainer)
        with self.as_exported():
            return divergence(
                self.pair.student, self.pair.teacher, data.validation_sequences,
                batch_size=data.validation.batch_size, progress=progress if self.trainer.is_global_zero else None,
            )  # fmt: skip

    def validation_step(self, tokens: Tensor, batch_idx: int) -> None:
        """Score one batch of token ids ``[batch, length]``."""
        with self.as_exported():
            kl, _, nats, dense_nats = compared(self.pair.student, self.pair.teacher, tokens).mean(1) / len(tokens)
        for name, value in (("kl", kl), ("nats", nats), ("dense_nats", dense_nats)):
            self._mean(name).update(value.float(), weight=len(tokens))

    def on_validation_epoch_end(self) -> None:
        """Log KL divergence, perplexity, and excess over the dense model in nats."""
        kl, nats, dense_nats = (self._mean(name).compute() for name in ("kl", "nats", "dense_nats"))
        for metric in self.scores.values():
            assert isinstance(metric, MeanMetric)
            metric.reset()
        # The values are already equal on all processes; sync_dist only avoids a warning of Lightning.
        self.log("val/kl", kl, prog_bar=True, sync_dist=True)
        self.log("val/perplexity", nats.exp(), sync_dist=True)
        self.log("val/excess", nats - dense_nats, prog_bar=True, sync_dist=True)
        self.log("step", float(self.global_step), sync_dist=True)

    def _mean(self, name: str) -> MeanMetric:
        metric = self.scores[name]
        assert isinstance(metric, MeanMetric)
        return metric

    # -- checkpoints: what is trained, only ---------------------------------------------------------------------------

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return the trained parameters; all else comes from the plan and the dense model."""
        return {f"model.{name}": one.detach() for name, one in self.trained().items()}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Record the identity of the run, and the scores before healing."""
        before = None if self.before is None else asdict(self.before)
        mark(checkpoint, {**self._identity(), "before": before})

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint belongs to this run, and take its scores before healing.

        Raises:
            ValueError: The start, the settings or the trained parameters differ; the message says which.
        """
        check_fit(checkpoint, self._identity())
        before = mark_of(checkpoint).get("before")
        self.before = None if before is None else Divergence(**before)

    def _identity(self) -> dict[str, Any]:
        trained = {name: list(one.shape) for name, one in self.trained().items()}
        lora = asdict(self.settings.lora) if self._adapter else {}
        data = calibration_data(self.trainer)
        return {
            **{key: value for key, value in asdict(self.settings).items() if key != "lora"},
            **{f"lora {key}": list(value) if isinstance(value, tuple) else value for key, value in lora.items()},
            "the compressed model": self.pair.digest,
            "teacher": self.start.teacher.name,
            "steps": self.steps,
            "validation sequences": sequences_fingerprint(data.validation_sequences),
            "trained": trained,
        }


def _figures(found: Divergence) -> str:
    return f"KL {found.kl:.4f}, excess {found.excess_nats:.4f} nats per token, perplexity {found.perplexity:.3f}"
