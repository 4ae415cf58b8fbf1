"""The LightningModule that makes a mixture of experts from a dense model, and trains its experts apart."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torchmetrics import MeanMetric

from lowrank_pl.evaluate.likelihood import Score, perplexity
from lowrank_pl.export.card import plain_card
from lowrank_pl.export.export import check_destination, save_compressed
from lowrank_pl.methods.masks.objectives import next_token_loss
from lowrank_pl.methods.masks.schedule import half_cosine
from lowrank_pl.models.sequences import check_sequences
from lowrank_pl.models.settings import Base
from lowrank_pl.models.upcycling import expert_parameters, upcycled
from lowrank_pl.text.sequences import sequences_fingerprint
from lowrank_pl.training.checkpointing import check_fit, mark, mark_of
from lowrank_pl.training.data import batch_tokens, calibration_data
from lowrank_pl.training.finish_run import Stopwatch
from lowrank_pl.training.lightning_internals import batches_done
from lowrank_pl.training.monitored import check_callbacks, check_validation
from lowrank_pl.training.precision import check_computed_in_half, check_loss, check_precision
from lowrank_pl.utils.files import write_json
from lowrank_pl.utils.formatting import code, rounded_perplexity, table

__all__ = ["FinishUpcycling", "MixtureOfExperts", "Upcycler"]

_log = logging.getLogger(__name__)


_VALIDATED = ("val/perplexity",)


@dataclass(frozen=True)
class MixtureOfExperts:
    """How many experts a block gets, and how they are trained apart.

    Args:
        experts: Experts of each block.
        chosen: Experts that serve each token.
        lr: Highest learning rate of AdamW for experts; it falls to 0 along half a cosine.
        router_lr: The same for routers, which start at random.
        balance: Weight of the loss that keeps the use of experts even (arXiv 2101.03961).
        seed: Seed of the routers.

    Raises:
        ValueError: A number is out of range.
    """

    experts: int = 4
    chosen: int = 2
    lr: float = 1e-4
    router_lr: float = 1e-3
    balance: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.chosen < self.experts:
            raise ValueError(
                f"chosen is {self.chosen} and experts {self.experts}: expected at least 1 and fewer than all to "
                "be chosen"
            )
        if min(self.lr, self.router_lr) <= 0 or self.balance < 0:
            raise ValueError(
                f"lr is {self.lr}, router_lr {self.router_lr}, balance {self.balance}: expected rates above 0 and a "
                "balance of at least 0"
            )


class Upcycler(LightningModule):
    """Makes a Mixtral from a dense model and trains its experts and routers on next-token loss; all else is frozen.

    At first the mixture computes what the dense model computes, so the perplexity before the first step is that of the
    dense model. The optimizer steps of the Trainer (``max_steps``) end the run. With 0 steps the copy is written.

    Args:
        base: The dense model, shaped like Llama.
        mixture: How many experts, and how they are trained.

    Example:
        >>> Upcycler(Base("random:llama"), MixtureOfExperts(experts=4)).mixture.chosen
        2
    """

    def __init__(self, base: Base, mixture: MixtureOfExperts = MixtureOfExperts()) -> None:
        super().__init__()
        self.base, self.mixture = base, mixture
        self.model: Any = None
        self.before: Score | None = None
        self.nats = MeanMetric()
        self.strict_loading = False

    def setup(self, stage: str) -> None:
        """Check the Trainer and the data.

        Raises:
            ValueError: The Trainer or the data can't do what is asked; the message says what to change.
        """
        check_callbacks(self.trainer, (*_VALIDATED, "step"))
        check_precision(self.trainer, "experts and routers", "use precision '32-true' or 'bf16-mixed'")
        check_computed_in_half(self.trainer, self.base, "experts and routers")
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            raise ValueError("upcycling needs the whole model on every device: use --trainer.strategy ddp")
        if not len(calibration_data(self.trainer).validation_sequences):
            raise ValueError(
                "there are no validation sequences, which show whether the mixture is as good as the dense model: set "
                "--data.validation.sequences"
            )

    def configure_model(self) -> None:
        """Load the dense model and copy its MLPs; later calls do nothing."""
        if self.model is not None:
            return
        # Lightning calls this hook with its own device as the default (RankLearner.configure_model).
        with torch.device("cpu"):
            settings = self.mixture
            model = upcycled(self.base.load(), settings.experts, chosen=settings.chosen, seed=settings.seed)
        data = calibration_data(self.trainer)
        for sequences in (data.train_sequences, data.validation_sequences):
            check_sequences(model, sequences)
        model.requires_grad_(False)
        trained = expert_parameters(model)
        for one in trained.values():
            one.data = one.data.float()
            one.requires_grad_(True)
        _log.info("%s parameters are trained", f"{sum(one.numel() for one in trained.values()):,}")
        self.model = model

    def on_train_start(self) -> None:
        """Check what callbacks watch, and score the copy before the first step."""
        check_validation(self.trainer, _VALIDATED)
        self.model.eval()
        self.before = self.score("validate the dense model") if self.before is None else self.before

    def training_step(self, tokens: Tensor, batch_idx: int) -> Tensor:
        """Return the loss of one batch of token ids ``[batch, length]``.

        Raises:
            ValueError: The loss is not finite.
        """
        output = self.model(input_ids=tokens, use_cache=False, output_router_logits=True)
        text = next_token_loss(output.logits, tokens)
        loss: Tensor = text + self.mixture.balance * output.aux_loss
        check_loss(loss, self.global_step, "lower the rates")
        self.log("loss/text", text.detach(), prog_bar=True)
        self.log("loss/balance", output.aux_loss.detach())
        self.log("step", float(self.global_step + 1))
        return loss

    def configure_optimizers(self) -> Any:
        """Return AdamW with a rate for experts and one for routers, both falling to 0 along half a cosine.

        Raises:
            ValueError: The run has no last step.
        """
        trained = expert_parameters(self.model)
        routers = {name: one for name, one in trained.items() if ".mlp.gate." in name}
        groups = [
            {"params": [one for name, one in trained.items() if name not in routers], "lr": self.mixture.lr},
            {"params": list(routers.values()), "lr": self.mixture.router_lr},
        ]
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
        schedule = half_cosine(optimizer, steps=self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def validation_step(self, tokens: Tensor, batch_idx: int) -> None:
        """Score one batch of token ids ``[batch, length]``.

        Raises:
            ValueError: The loss is not finite.
        """
        loss = next_token_loss(self.model(input_ids=tokens, use_cache=False).logits, tokens)
        # Checked for each batch, because the metric would leave a NaN out without an error.
        check_loss(loss, self.global_step, "lower the rates")
        self.nats.update(loss, len(tokens))

    def on_validation_epoch_end(self) -> None:
        """Log the perplexity."""
        self.log("val/perplexity", self.nats.compute().exp(), prog_bar=True, sync_dist=True)
        self.log("step", float(self.global_step), sync_dist=True)
        self.nats.reset()

    def score(self, progress: str) -> Score:
        """Return the score on the validation sequences, with ``progress`` beside the bar."""
        data = calibration_data(self.trainer)
        shown = progress if self.trainer.is_global_zero else None
        with self.trainer.precision_plugin.forward_context():
            return perplexity(
                self.model, data.validation_sequences, batch_size=data.validation.batch_size, progress=shown
            )

    def apartness(self) -> float:
        """Return how far experts are from the mean of their block, relative to it (root mean square)."""
        distance = size = 0.0
        for name, one in expert_parameters(self.model).items():
            if ".mlp.experts." in name:
                mean = one.detach().double().mean(0, keepdim=True)
                distance += (one.detach() - mean).square().sum().item()
                size += mean.square().sum().item() * len(one)
        return float((distance / size) ** 0.5)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return experts and routers; all else comes from the dense model."""
        return {f"model.{name}": one.detach() for name, one in expert_parameters(self.model).items()}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Record the identity of the run, and the score of the dense model."""
        before = None if self.before is None else asdict(self.before)
        mark(checkpoint, {**self._identity(), "before": before})

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint belongs to this run, and take its score of the dense model.

        Raises:
            ValueError: The base or a setting differs; the message says which.
        """
        check_fit(checkpoint, self._identity())
        before = mark_of(checkpoint).get("before")
        self.before = None if before is None else Score(**before)

    def _identity(self) -> dict[str, Any]:
        return {
            "base": self.base.name,
            "dtype": self.base.dtype,
            **asdict(self.mixture),
            # The dense model's score in a checkpoint is of this text.
            "validation sequences": sequences_fingerprint(calibration_data(self.trainer).validation_sequences),
        }


class FinishUpcycling(Stopwatch):
    """Writes the mixture to ``model/`` in the run's folder, and its figures to ``upcycle.json``.

    The folder is an ordinary checkpoint of Mixtral, checked by a reload in a fresh process.

    Args:
        json: A file for the figures of ``upcycle.json``.
    """

    def __init__(self, json: Path | None = None) -> None:
        super().__init__()
        self.json = json

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the folder, so that a mistake fails now."""
        assert isinstance(pl_module, Upcycler)
        check_destination(Path(trainer.default_root_dir) / "model", sources=[pl_module.base.name])

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Score and write the mixture on the first process, while the others wait."""
        assert isinstance(pl_module, Upcycler)
        if trainer.is_global_zero:
            self._finish(trainer, pl_module)
        trainer.strategy.barrier("finish")

    def _finish(self, trainer: Trainer, upcycler: Upcycler) -> None:
        run, data, model = Path(trainer.default_root_dir), calibration_data(trainer), upcycler.model
        for one in expert_parameters(model).values():
            one.data = one.data.to(upcycler.base.torch_dtype)
        model.eval().requires_grad_(False)
        after = upcycler.score("validate the mixture")
        before = upcycler.before or after
        figures = {
            "base": upcycler.base.name,
            **asdict(upcycler.mixture),
            "steps": trainer.global_step,
            "tokens": batches_done(trainer)[0] * batch_tokens(trainer),
            "minutes": self.learning_seconds() / 60,
            "perplexity": {"dense": before.perplexity, "mixture": after.perplexity},
            "expert_distance": upcycler.apartness(),
        }
        settings = upcycler.mixture
        card = plain_card(
            f"A mixture of {settings.experts} experts",
            f"Made from {code(upcycler.base.name)} by `lowrank upcycle`: every MLP was copied into "
            f"{settings.experts} experts, {settings.chosen} of which serve each token, and experts and routers were "
            f"trained for {trainer.global_step} steps.",
        )
        save_compressed(model, run / "model", tokenizer=data.tokenizer, merge=True, card=card)
        for path in (run / "upcycle.json", self.json):
            if path is not None:
                write_json(path, figures)
        rows = [["dense", rounded_perplexity(before.perplexity)], ["mixture", rounded_perplexity(after.perplexity)]]
        print(f"\n{table(['model', 'perplexity'], rows, 'simple')}\n")
        print(f"experts differ by {figures['expert_distance']:.2%} of their size\nmodel  {run / 'model'}")
        if not figures["expert_distance"]:
            _log.warning("all experts of a block are equal: train them apart with --trainer.max_steps")
        elif after.nats > before.nats:
            _log.warning("the mixture is worse than its dense model: lower --model.mixture.lr, or give more text")
