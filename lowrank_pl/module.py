"""The LightningModule that learns ranks: a frozen model with masked layers, of which only the masks move."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torchmetrics import MeanMetric
from transformers import PreTrainedModel

from lowrank_pl.activations import recompute_blocks, refuse_dropout, watched_forward
from lowrank_pl.base_model import load_base
from lowrank_pl.budget import check_keep
from lowrank_pl.checkpointing import check_fit, mark
from lowrank_pl.data import CalibrationData, calibration_data
from lowrank_pl.factor_store import FactorStore
from lowrank_pl.layers import Choice, chosen, insert_masks, masked_layers, plan_choice
from lowrank_pl.masks import Mask, MaskMethod, Staircase
from lowrank_pl.objectives import DataTerms, next_token_loss
from lowrank_pl.plan import RankPlan
from lowrank_pl.prepare import Decomposition, budget_for, build_factors, describe_origin, preparation_notes
from lowrank_pl.sharding import average_gradients, shard_frozen
from lowrank_pl.targets import decoder_blocks, find_targets

__all__ = ["RankLearner"]

_log = logging.getLogger(__name__)


class RankLearner(LightningModule):
    """Learns how many components every linear map of a frozen causal language model keeps.

    ``configure_model`` loads the base, takes or builds its factors and puts masked layers in; training then steps the
    masks alone on the data terms and the mask method's penalties. Validation scores the *hard* plan at the exact
    budget. Checkpoints hold the masks and nothing else.

    Args:
        base: Hub id, local folder, ``.gguf`` file, ``package:NAME`` or ``random:FAMILY``.
        keep: Fraction of the targeted parameters to keep.
        dtype: Type that the base is loaded in; masks are float32 whatever it is.
        mask: The mask method with its settings; ARA's ``Staircase`` by default.
        data_terms: Weights of cross-entropy, logit divergence and activation divergence.
        decomposition: How weights are decomposed.
        optimizer: Makes the optimizer of the mask parameters.
        lr_scheduler: Makes its schedule, stepped after every optimizer step.
        include: Globs of modules to target, on full names or names inside a block.
        exclude: Globs of modules to leave alone; they are not counted in ``keep``.
        multiple_of: Every rank is a multiple of this.
        floors: Least kept fraction by glob on module names; 1.0 keeps these dense.
        start: A plan to start the masks from, instead of the same ratio everywhere.
        store: Folder of the factors; by default one named by their fingerprint in the cache.
        keep_start: Where a schedule of the aimed-at fraction starts; needs ``keep_steps``.
        keep_steps: Optimizer steps over which the aim moves linearly from ``keep_start`` to ``keep``.
        gradient_checkpointing: Recompute block activations in the backward pass, to save memory.
        trust_remote_code: Run Python code that comes with the base.

    Raises:
        ValueError: ``keep`` outside (0, 1], or half of a schedule.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lowrank_pl import CalibrationData
        >>> learner = RankLearner("random:llama", keep=0.5)
        >>> data = CalibrationData("python-docs", "random:llama", length=32, windows=4, validation_windows=2)
        >>> trainer = Trainer(max_steps=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        ...                   enable_model_summary=False, accelerator="cpu", num_sanity_val_steps=0)
        >>> trainer.fit(learner, data)
        >>> learner.plan().keep_targeted <= 0.5
        True
    """

    def __init__(
        self,
        base: str,
        *,
        keep: float = 0.8,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        mask: MaskMethod | None = None,
        data_terms: DataTerms = DataTerms(),
        decomposition: Decomposition = Decomposition(),
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.0),
        lr_scheduler: LRSchedulerCallable | None = None,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        multiple_of: int = 1,
        floors: dict[str, float] | None = None,
        start: Path | None = None,
        store: Path | None = None,
        keep_start: float | None = None,
        keep_steps: int = 0,
        gradient_checkpointing: bool = False,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        check_keep(keep)
        if (keep_start is None) != (keep_steps == 0) or keep_steps < 0:
            raise ValueError(f"keep_start is {keep_start} and keep_steps {keep_steps}: a schedule needs both")
        if keep_start is not None:
            check_keep(keep_start)
        self.base, self.keep, self.dtype_name = base, keep, dtype
        self.mask_method = mask or Staircase()
        self.data_terms, self.decomposition = data_terms, decomposition
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.include, self.exclude = tuple(include), tuple(exclude)
        self.multiple_of, self.floors = multiple_of, floors or {}
        self.start_plan = None if start is None else RankPlan.load(start)
        self.store_directory = store
        self.keep_start, self.keep_steps = keep_start, keep_steps
        self.gradient_checkpointing, self.trust_remote_code = gradient_checkpointing, trust_remote_code
        self.strict_loading = False
        self.seconds: dict[str, float] = {}
        self.model: PreTrainedModel | None = None
        self._validation_nats, self._dense_nats = MeanMetric(), MeanMetric()

    # -- building ---------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Refuse precisions that would cast the masks."""
        precision = str(self.trainer.precision)
        if precision.endswith("-true") and precision != "32-true":
            raise ValueError(
                f"the Trainer's precision is {precision!r}, which casts the masks too: steps of 1e-3 then vanish in "
                "rounding. Use precision '32-true' and load the base in bfloat16 with --model.dtype bfloat16"
            )

    def configure_model(self) -> None:
        """Load the base, take or build its factors, put the masked layers in; once."""
        if self.model is not None:
            return
        data = calibration_data(self.trainer)
        sharded = isinstance(self.trainer.strategy, ModelParallelStrategy)
        began = time.perf_counter()
        model = load_base(self.base, dtype=getattr(torch, self.dtype_name), trust_remote_code=self.trust_remote_code)
        if self.gradient_checkpointing:
            refuse_dropout(model)
        if not sharded:
            model.to(self.trainer.strategy.root_device)
        self.build(model, data)
        self.seconds["factors"] = time.perf_counter() - began
        if sharded:
            shard_frozen(model, self.device_mesh["data_parallel"], self.mask_parameters())  # type: ignore[index]

    def build(self, model: PreTrainedModel, data: CalibrationData) -> None:
        """Make ``model`` the one that this learner works on.

        Args:
            model: The dense base.
            data: Gives the tokenizer and the windows for statistics.
        """
        targets = find_targets(model, include=self.include, exclude=self.exclude)
        self.budget = budget_for(model, targets, self.keep, multiple_of=self.multiple_of, floors=self.floors)
        self.data_terms.blocks(len(decoder_blocks(model)[1]))
        self.store = self._factors(model, targets, data)
        self.notes = preparation_notes(targets, self.store)
        self.origin = describe_origin(
            base=self.base,
            dtype=self.dtype_name,
            text=data.statistics_text,
            windows=data.statistics_windows,
            settings=self.decomposition,
            store=self.store,
        )
        insert_masks(model, self.store, self.mask_method, self._starting_ratios())
        if self.gradient_checkpointing:
            recompute_blocks(model)
        self.model = model
        self.layers = masked_layers(model)
        self.masks: dict[str, Mask] = {name: layer.mask for name, layer in self.layers.items()}
        learnt, frozen = sum(p.numel() for p in self.mask_parameters()), self.budget.model_parameters
        _log.info("%s mask parameters learn, the base's %s do not move", f"{learnt:,}", f"{frozen:,}")

    def _factors(self, model: PreTrainedModel, targets: Any, data: CalibrationData) -> FactorStore:
        """Build the factors on the first process; the others wait, then find them made."""

        def build() -> FactorStore:
            return build_factors(
                model, targets, data.statistics_windows, data.tokenizer, settings=self.decomposition,
                directory=self.store_directory,
            )  # fmt: skip

        if not self._trainer or self.trainer.world_size == 1:
            return build()
        if self.trainer.is_global_zero:
            build()
        self.trainer.strategy.barrier("factors")
        return build()

    def _starting_ratios(self) -> dict[str, float]:
        if self.start_plan is None:
            return dict.fromkeys(self.budget.shapes, self.aim)
        plan = self.start_plan.modules
        missing = [name for name, shape in self.budget.shapes.items() if name not in plan or plan[name].shape != shape]
        if missing:
            raise ValueError(f"the plan to start from does not cover {missing[0]} and {len(missing) - 1} more modules")
        return {name: plan[name].parameters / plan[name].dense_parameters for name in self.budget.shapes}

    def mask_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that learn, in the model's order."""
        return [parameter for mask in self.masks.values() for parameter in mask.parameters()]

    # -- learning ---------------------------------------------------------------------------------------------------

    @property
    def aim(self) -> float:
        """The fraction to keep that the penalties aim at in this step."""
        if self.keep_start is None:
            return self.keep
        done = min(1.0, (self.global_step if self._trainer else 0) / self.keep_steps)
        return self.keep_start + done * (self.keep - self.keep_start)

    def on_fit_start(self) -> None:
        """Put the base in train mode when it checkpoints gradients, which is inert in eval mode; else in eval mode."""
        self._base().train(self.gradient_checkpointing)

    def training_step(self, tokens: Tensor, batch_idx: int) -> Tensor:
        """Return the loss of one batch of token ids ``[batch, length]``."""
        ratios = self.set_dense_switches()
        terms = self._data_terms(tokens)
        terms |= self.mask_method.penalties(self.masks, ratios, self.aim)
        loss = torch.stack(list(terms.values())).sum()
        self.log_dict({f"loss/{name}": term.detach() for name, term in terms.items()})
        self.log("loss/total", loss.detach(), prog_bar=True)
        self.log("keep/expected", self.expected_keep(ratios), prog_bar=True)
        self.log("keep/aim", self.aim)
        return loss

    def set_dense_switches(self) -> Tensor:
        """Let modules whose ratio has reached 1 compute densely; return all ratios ``[modules]``, differentiable."""
        ratios = torch.stack([mask.ratio() for mask in self.masks.values()])
        # One transfer for all modules: asking each mask for itself would wait for the device once a layer.
        for layer, dense in zip(self.layers.values(), (ratios >= 1).tolist(), strict=True):
            layer.choice = "dense" if dense else "mask"
        return ratios

    def expected_keep(self, ratios: Tensor) -> float:
        """Return the fraction of targeted parameters that ``ratios`` ``[modules]`` stand for."""
        sizes = torch.tensor([m * n for m, n in self.budget.shapes.values()], device=ratios.device)
        return ((ratios.detach().clamp(max=1) * sizes).sum() / sizes.sum()).item()

    def _data_terms(self, tokens: Tensor) -> dict[str, Tensor]:
        model = self._base()
        places = self.data_terms.blocks(len(decoder_blocks(model)[1]))
        teacher_logits, teacher_activations = None, None
        if self.data_terms.needs_teacher:
            with torch.no_grad(), chosen(self.layers, "dense"):
                teacher_logits, teacher_activations = watched_forward(model, tokens, places)
        logits, activations = watched_forward(model, tokens, places)
        return self.data_terms.compute(tokens, logits, activations, teacher_logits, teacher_activations)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Average the mask gradients over processes when FSDP2, which leaves masks alone, is in charge."""
        if isinstance(self.trainer.strategy, ModelParallelStrategy) and self.trainer.world_size > 1:
            average_gradients(self.mask_parameters())

    def configure_optimizers(self) -> Any:
        """Return the optimizer of the mask parameters, with its schedule if one was given."""
        optimizer = self.optimizer(self.mask_parameters())
        if self.lr_scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.lr_scheduler(optimizer), "interval": "step"},
        }

    # -- validation: the hard plan at the exact budget ---------------------------------------------------------------

    def plan(self) -> RankPlan:
        """Return the plan that the masks stand for now, at the exact budget, with its origin and notes."""
        plan = self.mask_method.finalise(self.masks, self.budget)
        return plan.with_origin(self.origin, self.store.fingerprint, self.notes)

    def on_validation_start(self) -> None:
        """Take the plan that this validation scores."""
        modules = self.plan().modules
        self._choices = {name: plan_choice(m.rank, m.indices, self.device) for name, m in modules.items()}
        self._need_dense = self._dense_nats.update_count == 0
        self._validation_nats.reset()

    def validation_step(self, tokens: Tensor, batch_idx: int) -> None:
        """Score one batch of token ids ``[batch, length]`` with the hard plan, the first time densely too.

        Raises:
            ValueError: A score is not finite.
        """
        self._score(tokens, self._choices, self._validation_nats)
        if self._need_dense:
            self._score(tokens, "dense", self._dense_nats)

    def _score(self, tokens: Tensor, choices: dict[str, Choice] | Choice, nats: MeanMetric) -> None:
        with chosen(self.layers, choices):
            loss = next_token_loss(self._base()(input_ids=tokens, use_cache=False).logits, tokens)
        # Asked of each batch: the metric would leave a NaN out and say little.
        if not torch.isfinite(loss):
            which = "dense model" if choices == "dense" else "hard plan"
            raise ValueError(
                f"validation of the {which} gave {loss.item()} nats a token: its logits are not finite; "
                "load the base in a wider type or check the weights"
            )
        nats.update(loss, weight=tokens[:, 1:].numel())

    def on_validation_epoch_end(self) -> None:
        """Log perplexity of the hard plan and its excess over the dense model in nats."""
        nats, dense = self._validation_nats.compute(), self._dense_nats.compute()
        # Already the same on all processes; without sync_dist Lightning would warn that they may not be.
        self.log("val/perplexity", nats.exp(), sync_dist=True)
        self.log("val/excess", nats - dense, prog_bar=True, sync_dist=True)
        if self.trainer.sanity_checking:
            # It saw some of the windows only; the next validation needs the dense score of all.
            self._dense_nats.reset()

    # -- checkpoints: masks only -------------------------------------------------------------------------------------

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return the mask parameters alone: everything else comes from the base and the store."""
        return {name: value.detach() for name, value in self.named_parameters() if value.requires_grad}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Record what the masks belong to."""
        mark(checkpoint, self._identity())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint whose masks do not fit.

        Raises:
            ValueError: It is of another kind, model, store or mask; the message says what differs.
        """
        check_fit(checkpoint, self._identity())

    def _identity(self) -> dict[str, Any]:
        masks = {name: list(value.shape) for name, value in self.named_parameters() if value.requires_grad}
        return {"mask": self.mask_method.name, "factors": self.store.digest, "masks": masks}

    def _base(self) -> PreTrainedModel:
        assert self.model is not None, "configure_model has not run"
        return self.model
