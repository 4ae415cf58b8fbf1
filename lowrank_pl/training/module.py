"""The LightningModule that learns ranks: a frozen model with masked layers, of which only the masks move."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowrank_pl.calibration.build import build_factors
from lowrank_pl.calibration.provenance import base_notes, describe_origin, preparation_notes
from lowrank_pl.calibration.sharded_build import SharedBase, open_shared
from lowrank_pl.factors.settings import Decomposition
from lowrank_pl.factors.store import FactorStore
from lowrank_pl.methods.allocate.run import draw
from lowrank_pl.methods.masks.acip import Lifetimes
from lowrank_pl.methods.masks.ara import ARA
from lowrank_pl.methods.masks.base import Mask, MaskMethod, dense_sizes
from lowrank_pl.methods.masks.gumbel import seeded
from lowrank_pl.methods.masks.losses import PlanScore, data_losses
from lowrank_pl.methods.masks.masked_linear import choose_computation, insert_masks, masked_layers
from lowrank_pl.methods.masks.objectives import DataTerms, kept_share
from lowrank_pl.methods.masks.schedule import KeepSchedule, half_cosine
from lowrank_pl.methods.masks.start import read_start, start_of
from lowrank_pl.methods.prune.base import WidthPruning, pruned_base
from lowrank_pl.models.base import load_base
from lowrank_pl.models.forward import enable_activation_checkpointing, refuse_dropout
from lowrank_pl.models.identity import Origin
from lowrank_pl.models.targets import Targets, decoder_blocks, find_targets
from lowrank_pl.plans.budget import Budget, budget_for
from lowrank_pl.plans.plan import RankPlan
from lowrank_pl.plans.storage import StorageChoice
from lowrank_pl.training.checkpointing import check_fit, mark
from lowrank_pl.training.data import CalibrationData, calibration_data
from lowrank_pl.training.sharding import average_gradients, shard_frozen
from lowrank_pl.utils.distributed import cooperating

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
        mask: The mask method with its settings; ARA's ``ARA`` by default.
        data_terms: Weights of cross-entropy, logit divergence and activation divergence.
        decomposition: How weights are decomposed.
        optimizer: Makes the optimizer of the mask parameters.
        lr_scheduler: Makes its schedule, stepped after every optimizer step.
        cosine: Let the step size fall to 0 along half a cosine over all steps of the run, instead of a schedule.
        include: Globs of modules to target, on full names or names inside a block.
        exclude: Globs of modules to leave alone; they are not counted in ``keep``.
        multiple_of: Every rank is a multiple of this.
        floors: Least kept fraction by glob on module names; 1.0 keeps these dense.
        storage: How low-rank modules are stored in the end, which decides on what a rank costs: as two factors,
            pivoted, or ``auto`` for the smaller of both.
        start: A plan to start the masks from, instead of the same ratio everywhere: its file, or the name of an
            allocator that draws it on the learner's own factors and budget.
        narrow: How hidden features of MLPs are left out before ranks are learned; left out, all stay. The run's base is
            then a folder in the cache; ``keep`` counts the parameters of the base that was named.
        store: Folder of the factors; by default one named by their fingerprint in the cache.
        keep_start: Where a schedule of the aimed-at fraction starts; needs ``keep_steps``.
        keep_steps: Optimizer steps over which the aim moves linearly from ``keep_start`` to ``keep``.
        record_order: Draw plans by how long components were kept while the aim came down from ``keep_start`` (ACIP,
            arXiv 2502.01717) instead of by the masks as they are: one run then orders them for all sizes between.
        inactive_gate_stride: Gates of components that are off learn from every so many-th token of a batch, which is an unbiased
            estimate and saves most of what they cost; 1 is exact.
        gradient_checkpointing: Recompute block activations in the backward pass, to save memory.
        trust_remote_code: Run Python code that comes with the base.

    Raises:
        ValueError: ``keep`` outside (0, 1], half of a schedule, an order without a schedule that comes down, two
            schedules of the step size, ``inactive_gate_stride`` below 1, or a start that is neither a plan nor an allocator.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lowrank_pl import CalibrationData
        >>> learner = RankLearner("random:llama", keep=0.5)
        >>> data = CalibrationData("python-docs", "random:llama", length=32, sequences=4, validation_sequences=2)
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
        cosine: bool = False,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        multiple_of: int = 1,
        floors: dict[str, float] | None = None,
        storage: StorageChoice = "auto",
        start: str | Path | None = None,
        prune: WidthPruning | None = None,
        store: Path | None = None,
        keep_start: float | None = None,
        keep_steps: int = 0,
        record_order: bool = False,
        inactive_gate_stride: int = 1,
        gradient_checkpointing: bool = False,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        self.schedule = KeepSchedule(keep, keep_start, keep_steps, falling=record_order)
        self.base, self.named_base, self.keep, self.dtype_name = base, base, keep, dtype
        self.prune = prune
        if inactive_gate_stride < 1:
            raise ValueError(
                f"inactive_gate_stride is {inactive_gate_stride}: expected a whole number of at least 1, which is exact"
            )
        self.inactive_gate_stride = inactive_gate_stride
        self.mask_method = mask or ARA()
        self.mask_method.check_base(decomposition.kind)
        self.data_terms, self.decomposition = data_terms, decomposition
        if cosine and lr_scheduler is not None:
            raise ValueError("cosine and lr_scheduler both say how the step size moves: give one of them")
        self.optimizer, self.lr_scheduler, self.cosine = optimizer, lr_scheduler, cosine
        self.include, self.exclude = tuple(include), tuple(exclude)
        self.multiple_of, self.floors, self.storage = multiple_of, floors or {}, storage
        self.start = read_start(start)
        self.store_directory = store
        self.record_order = record_order
        self.gradient_checkpointing, self.trust_remote_code = gradient_checkpointing, trust_remote_code
        self.strict_loading = False
        self.seconds: dict[str, float] = {}
        self.model: PreTrainedModel | None = None
        self.masks: dict[str, Mask] = {}
        self.shared: nn.Module | None = None
        self.lifetimes: Lifetimes | None = None
        self.score = PlanScore()

    # -- building ---------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Refuse precisions that would cast the masks, and devices that factors can't be made on."""
        if self.trainer.strategy.root_device.type == "mps":
            raise ValueError(
                "Apple's GPUs lack float64, which statistics and factors are made in: use --trainer.accelerator cpu"
            )
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
        device = self.trainer.strategy.root_device
        sharded = isinstance(self.trainer.strategy, ModelParallelStrategy)
        # The Trainer would have everything made on its device, where tables of angles come out other than in a model
        # that is loaded and moved, and where generators of the CPU can't draw.
        with torch.device("cpu"):
            if self.prune is not None:
                # What is to be sharded may be more than a device holds.
                self._prune(self.prune, data, torch.device("cpu") if sharded else device)
            began = time.perf_counter()
            shared = self._open_shared(device) if sharded else None
            model = self.dense_base() if shared is None else shared.skeleton.model
            if self.gradient_checkpointing:
                refuse_dropout(model)
            if not sharded:
                model.to(device)
            self.build(model, data, sharded=sharded, shared=shared)
        self.seconds["factors"] = time.perf_counter() - began
        if sharded:
            skeleton = None if shared is None else shared.skeleton
            shard_frozen(model, self.store, self.mask_parameters(), device, skeleton)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the dense base's parameters."""
        return self.budget.model_parameters * getattr(torch, self.dtype_name).itemsize  # type: ignore[no-any-return]

    def dense_base(self, *, as_named: bool = False) -> PreTrainedModel:
        """Return the whole base, loaded anew; as it was before a narrowing where it is wanted ``as_named``."""
        base = self.named_base if as_named else self.base
        return load_base(base, dtype=getattr(torch, self.dtype_name), trust_remote_code=self.trust_remote_code)

    def _prune(self, settings: WidthPruning, data: CalibrationData, device: torch.device) -> None:
        with cooperating():
            self.base, spent = pruned_base(
                self.named_base, settings, keep=self.keep, model=self.dense_base(as_named=True).to(device),
                tokenizer=data.tokenizer, sequences=data.statistics_sequences, include=self.include, exclude=self.exclude,
            )  # fmt: skip
        self.seconds["narrowing"] = spent or 0.0

    def _open_shared(self, device: torch.device) -> SharedBase | None:
        return open_shared(
            self.base, include=self.include, exclude=self.exclude, dtype=getattr(torch, self.dtype_name), device=device,
            trust_remote_code=self.trust_remote_code,
        )  # fmt: skip

    def build(
        self, model: PreTrainedModel, data: CalibrationData, *, sharded: bool = False, shared: SharedBase | None = None
    ) -> None:
        """Make ``model`` the one that this learner works on.

        Args:
            model: The dense base.
            data: Gives the tokenizer and the sequences for statistics.
            sharded: Leave the factors on disk, for ``shard_frozen`` to read this process's share of them.
            shared: What ``model`` is the skeleton of, where it has no weights; these are left on disk as well.
        """
        globs = {"include": self.include, "exclude": self.exclude}
        targets = find_targets(model, **globs) if shared is None else shared.targets
        self.budget = budget_for(
            model, targets, self.keep, multiple_of=self.multiple_of, floors=self.floors, storage=self.storage
        )
        self.data_terms.blocks(len(decoder_blocks(model)[1]))
        self.store = self._factors(model, targets, data, shared)
        self.notes = [*base_notes(model, targets), *preparation_notes(targets, self.store)]
        self.origin = describe_origin(
            base=self.base, dtype=self.dtype_name, text=data.statistics_text, sequences=data.statistics_sequences,
            settings=self.decomposition, store=self.store, narrowed=Origin.of(model),
        )  # fmt: skip
        share = self._aimed_at().share
        start = start_of(self._start_plan(model, targets, data), self.budget, self.mask_method, share)
        insert_masks(
            model, self.store, self.mask_method, start.ratios, prices=self.budget.prices, kept=start.kept,
            empty=sharded,
        )  # fmt: skip
        if self.gradient_checkpointing:
            enable_activation_checkpointing(model)
        self.model = model
        self.layers = masked_layers(model)
        self.masks = {name: layer.mask for name, layer in self.layers.items()}
        self.shared = self.mask_method.share(self.masks)
        if self.record_order:
            self.lifetimes = Lifetimes({name: mask.rank for name, mask in self.masks.items()})
        for module in self._beside().values() if shared is None else ():
            module.to(model.device)
        learnt, frozen = sum(p.numel() for p in self.mask_parameters()), self.budget.model_parameters
        _log.info("%s mask parameters learn, the base's %s do not move", f"{learnt:,}", f"{frozen:,}")

    def _factors(
        self, model: PreTrainedModel, targets: Targets, data: CalibrationData, shared: SharedBase | None
    ) -> FactorStore:
        """Return the store of the factors, which all processes build together."""
        sequences, tokenizer = data.statistics_sequences, data.tokenizer
        how: dict[str, Any] = {"settings": self.decomposition, "directory": self.store_directory}
        with cooperating():
            if shared is None:
                return build_factors(model, targets, sequences, tokenizer, **how)
            return shared.factors(sequences, tokenizer, load=self.dense_base, **how)

    def _start_plan(self, model: PreTrainedModel, targets: Targets, data: CalibrationData) -> RankPlan | None:
        """Return the plan to start from; an allocator draws it on the first process, for all."""
        if self.start is None or isinstance(self.start, RankPlan):
            return self.start
        text = ""
        if not self._trainer or self.trainer.is_global_zero:
            if model.device.type == "meta" and self.start.needs_model:
                _log.warning("the first process loads the whole base into memory, which %s runs", self.start.name)
                model = self.dense_base()
            text = draw(
                self.start, self._aimed_at(), self.store, targets, model, data.statistics_sequences,
                data.tokenizer, directory=self.store_directory,
            ).to_json()  # fmt: skip
        return RankPlan.from_json(self.trainer.strategy.broadcast(text) if self._trainer else text)

    def mask_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that learn: those of the masks in the model's order, then what they share."""
        learning = [*self.masks.values(), *self._beside().values()]
        return [parameter for module in learning for parameter in module.parameters()]

    def _beside(self) -> dict[str, nn.Module]:
        """Return what learns or remembers beside the masks, by name."""
        found = {"shared": self.shared, "lifetimes": self.lifetimes}
        return {name: module for name, module in found.items() if module is not None}

    # -- learning ---------------------------------------------------------------------------------------------------

    @property
    def aim(self) -> float:
        """The fraction to keep that the penalties aim at in this step."""
        return self.schedule.at(self.global_step if self._trainer else 0)

    def _aimed_at(self) -> Budget:
        return replace(self.budget, keep=self.aim)

    def on_fit_start(self) -> None:
        """Put the base in train mode when it checkpoints gradients, which is inert in eval mode; else in eval mode."""
        self._base().train(self.gradient_checkpointing)
        most, planned = self.trainer.max_steps, self.trainer.estimated_stepping_batches
        if planned < most:
            _log.warning(
                "learning ends with epoch %d, after %d of the %d steps of max_steps: raise --trainer.max_epochs",
                *(self.trainer.max_epochs, planned, most),
            )

    def training_step(self, tokens: Tensor, batch_idx: int) -> Tensor:
        """Return the loss of one batch of token ids ``[batch, length]``."""
        budget = self._aimed_at()
        self.mask_method.advance(self.masks, self.global_step, budget)
        ratios = choose_computation(
            self.layers, self.mask_method.dense_from, every=self.inactive_gate_stride,
            offset=int(torch.randint(self.inactive_gate_stride, (), generator=seeded("rest", self.global_step, batch_idx))),
        )  # fmt: skip
        terms = data_losses(self._base(), self.layers, self.data_terms, tokens)
        terms |= self.mask_method.penalties(self.masks, ratios, budget.share, self.global_step)
        loss = torch.stack(list(terms.values())).sum()
        self.log_dict({f"loss/{name}": term.detach() for name, term in terms.items()})
        self.log("loss/total", loss.detach(), prog_bar=True)
        kept = kept_share(ratios.detach().clamp(max=1), dense_sizes(self.masks, ratios)) * budget.present / budget.total
        self.log("keep/expected", kept, prog_bar=True)
        self.log_dict({"keep/aim": self.aim, "keep/overshoot": kept - self.aim})
        # Loggers put it at the step that it is part of; Lightning's own count is one less, also in validation.
        self.log("step", float(self.global_step + 1))
        return loss

    def on_train_start(self) -> None:
        """Look where the masks are: a checkpoint may be of a run that had come to its end."""
        self._look_at_masks(self.global_step)

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """Step, then look where the masks are, before any callback writes a checkpoint of it."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self._look_at_masks(self.global_step + 1)

    @torch.no_grad()
    def _look_at_masks(self, step: int) -> None:
        self.mask_method.advance(self.masks, step, replace(self.budget, keep=self.schedule.at(step)))
        if self.lifetimes is not None:
            self.lifetimes.record(self.masks, step)
        if not self.trainer.should_stop and self.mask_method.finished(self.masks, self.budget, step):
            _log.info("%s: learning is over after %d steps", self.mask_method.name, step)
            self.trainer.should_stop = True

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Average gradients over processes where FSDP2, which leaves masks alone, is in charge; let the method look."""
        if isinstance(self.trainer.strategy, ModelParallelStrategy) and self.trainer.world_size > 1:
            average_gradients(self.mask_parameters())
        # Lightning divides each loss by this, clips after this hook, and steps on what an epoch's end leaves over.
        self.mask_method.observe(self.masks, self.global_step, accumulated=self.trainer.accumulate_grad_batches)
        gradients = [parameter.grad for parameter in self.mask_parameters() if parameter.grad is not None]
        self.log("learning/gradient norm", nn.utils.get_total_norm(gradients))

    def configure_optimizers(self) -> Any:
        """Return the optimizer of the mask parameters, with its schedule if one was given.

        Raises:
            ValueError: The step size is to fall along a cosine over a run that has no end.
        """
        optimizer = self.optimizer(self.mask_parameters())
        make = self.lr_scheduler
        if self.cosine:
            steps = self.trainer.estimated_stepping_batches
            if steps == math.inf:
                raise ValueError("cosine needs a run with an end: give the trainer max_steps, or the data windows")
            make = partial(half_cosine, steps=int(steps))
        if make is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": make(optimizer), "interval": "step"}}

    # -- validation: the hard plan at the exact budget ---------------------------------------------------------------

    def plan(self) -> RankPlan:
        """Return the plan that the masks stand for now, at the exact budget, with its origin and notes."""
        if self.lifetimes is None:
            plan = self.mask_method.finalise(self.masks, self.budget)
        else:
            plan = self.lifetimes.finalise(self.budget, method=self.mask_method.name, start=self.schedule.start)
        return plan.with_origin(self.origin, self.store.fingerprint, self.notes)

    def on_validation_start(self) -> None:
        """Take the plan that this validation scores."""
        self.score.begin(self.plan(), self.layers)

    def validation_step(self, tokens: Tensor, batch_idx: int) -> None:
        """Score one batch of token ids ``[batch, length]`` with the hard plan, the first time densely too.

        Raises:
            ValueError: A score is not finite.
        """
        self.score.add(self._base(), self.layers, tokens)

    def on_validation_epoch_end(self) -> None:
        """Log perplexity of the hard plan and its excess over the dense model in nats."""
        nats, dense = self.score.plan.compute(), self.score.dense.compute()
        # Already the same on all processes; without sync_dist Lightning would warn that they may not be.
        self.log("val/perplexity", nats.exp(), sync_dist=True)
        self.log("val/excess", nats - dense, prog_bar=True, sync_dist=True)
        self.log("step", float(self.global_step), sync_dist=True)
        if self.trainer.sanity_checking:
            # It saw some of the sequences only; the next validation needs the dense score of all.
            self.score.dense.reset()

    # -- checkpoints: masks only -------------------------------------------------------------------------------------

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return the masks and what they share, alone: everything else comes from the base and the store."""
        saved: dict[str, Any] = {}
        for name, mask in self.masks.items():
            saved |= mask.state_dict(prefix=f"model.{name}.mask.")
        for name, module in self._beside().items():
            saved |= module.state_dict(prefix=f"{name}.")
        return saved

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
        masks = {name: list(value.shape) for name, value in self.state_dict().items()}
        return {"mask": self.mask_method.name, "keep": self.keep, "factors": self.store.digest, "masks": masks}

    def _base(self) -> PreTrainedModel:
        assert self.model is not None, "configure_model has not run"
        return self.model
