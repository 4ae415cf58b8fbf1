"""The LightningModule that learns ranks: a frozen model with masked layers, in which only the masks are trained."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers import PreTrainedModel

from lowrank_pl.calibration.build import build_factors
from lowrank_pl.calibration.provenance import base_notes, describe_origin, preparation_notes
from lowrank_pl.calibration.sharded_build import SharedBase, open_shared
from lowrank_pl.calibration.subject import Subject
from lowrank_pl.factors.settings import Decomposition
from lowrank_pl.factors.store import FactorStore
from lowrank_pl.methods.allocate.run import allocate_on
from lowrank_pl.methods.masks.acip import ACIP
from lowrank_pl.methods.masks.ara import ARA
from lowrank_pl.methods.masks.base import MaskMethod, ModelMasks, dense_sizes
from lowrank_pl.methods.masks.gumbel import seeded
from lowrank_pl.methods.masks.losses import PlanScore, data_losses
from lowrank_pl.methods.masks.masked_linear import choose_computation, insert_masks, masked_layers
from lowrank_pl.methods.masks.objectives import DataTerms, kept_share
from lowrank_pl.methods.masks.schedule import KeepSchedule, half_cosine
from lowrank_pl.methods.masks.start import check_start, read_start, start_of
from lowrank_pl.methods.prune.base import WidthPruning, pruned_base
from lowrank_pl.models.base import Base
from lowrank_pl.models.forward import enable_activation_checkpointing, refuse_dropout
from lowrank_pl.models.sequences import check_sequences
from lowrank_pl.models.targets import EMBEDDINGS, Targets, decoder_blocks
from lowrank_pl.plans.budget import Budget
from lowrank_pl.plans.constraints import Constraints
from lowrank_pl.plans.plan import RankPlan
from lowrank_pl.training.checkpointing import check_fit, mark
from lowrank_pl.training.data import CalibrationData, calibration_data
from lowrank_pl.training.lightning_internals import attached_trainer, leaves_gradients_to_us
from lowrank_pl.training.monitored import check_callbacks, check_monitored, check_validation
from lowrank_pl.training.precision import check_loss, check_precision
from lowrank_pl.training.sharding import average_gradients, shard_frozen
from lowrank_pl.utils.checks import check_counts
from lowrank_pl.utils.distributed import cooperating

__all__ = ["Compute", "RankLearner", "Start"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """Where learning starts.

    Args:
        plan: A plan that the masks start from, instead of one ratio for all layers: its file, or the name of an
            allocator, which then makes a plan from the learner's own factors and budget.
        keep: First target of the penalties, as a fraction to keep; needs ``steps``.
        steps: Optimizer steps in which the target moves linearly from this ``keep`` to the run's.
        record_order: Choose components by how long they were kept while the target fell (ACIP, arXiv 2502.01717),
            instead of by the final masks. One run then orders the components for all sizes in between.

    Raises:
        ValueError: ``plan`` is neither a plan nor the name of an allocator.
    """

    plan: str | Path | None = None
    keep: float | None = None
    steps: int = 0
    record_order: bool = False

    def __post_init__(self) -> None:
        # So that a wrong name fails now, and not after the factors are built.
        read_start(self.plan)


@dataclass(frozen=True)
class Compute:
    """Settings that trade exact computation, time and memory.

    Args:
        inactive_gate_stride: Use every N-th token for the gradients of inactive gates: unbiased and cheaper. 1 is
            exact.
        gradient_checkpointing: Recompute each block's activations in the backward pass, to save memory.

    Raises:
        ValueError: ``inactive_gate_stride`` below 1.
    """

    inactive_gate_stride: int = 1
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        check_counts({"inactive_gate_stride": self.inactive_gate_stride})


class RankLearner(LightningModule):
    """Learns how many components every linear layer of a frozen causal language model keeps.

    ``configure_model`` loads the base, loads or builds its factors, and inserts masked layers. Training updates only
    the masks, on the data terms and the mask method's penalties. Validation scores the *hard* plan at the exact budget.
    Checkpoints contain only the masks.

    Args:
        base: The model, and how it is loaded. Masks are float32 for every dtype of the base.
        keep: Fraction of the targeted parameters to keep.
        mask: The mask method with its settings; by default ARA.
        data_terms: Weights of cross-entropy, logit divergence and activation divergence.
        decomposition: How weights are decomposed.
        optimizer: Makes the optimizer of the mask parameters.
        lr_scheduler: Makes the learning rate schedule, stepped after every optimizer step; ``cosine`` decays the
            learning rate to 0 along half a cosine over all steps of the run.
        constraints: Which linear layers are targets, how their ranks are constrained, and how they are stored.
        start: Where masks and target start.
        prune: How MLPs are pruned in width before ranks are learned; by default they are not. The pruned base is a
            folder in the cache, and ``keep`` still counts the parameters of the named base.
        store: Folder of the factors; by default one named by their fingerprint in the cache.
        compute: Settings that trade exact computation, time and memory.

    Raises:
        ValueError: ``keep`` is not in (0, 1], ``start`` gives only one of ``keep`` and ``steps``, or
            ``start.record_order`` is set without a falling target, or the mask method can't gate this kind of factors
            or takes no plan to start from.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lowrank_pl import Base, Calibration, CalibrationData
        >>> learner = RankLearner(Base("random:llama"), keep=0.5)
        >>> data = CalibrationData(Calibration("python-docs", length=32, sequences=4), "random:llama")
        >>> trainer = Trainer(max_steps=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        ...                   enable_model_summary=False, accelerator="cpu", num_sanity_val_steps=0)
        >>> trainer.fit(learner, data)
        >>> learner.plan().keep_targeted <= 0.5
        True
    """

    def __init__(
        self,
        base: Base,
        *,
        keep: float = 0.8,
        mask: MaskMethod | None = None,
        data_terms: DataTerms = DataTerms(),
        decomposition: Decomposition = Decomposition(),
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.0),
        lr_scheduler: Literal["cosine"] | LRSchedulerCallable | None = None,
        constraints: Constraints = Constraints(),
        start: Start = Start(),
        prune: WidthPruning | None = None,
        store: Path | None = None,
        compute: Compute = Compute(),
    ) -> None:
        super().__init__()
        self.schedule = KeepSchedule(keep, start.keep, start.steps, falling=start.record_order)
        # The base that the user named, and the one that is compressed: with pruning, a folder in the cache.
        self.named_base = self.base = base
        if EMBEDDINGS in constraints.include:
            _refuse_embeddings()
        if constraints.drop_experts:
            _refuse_dropping()
        constraints.refuse_shared(
            "masks learn the rank of every layer by itself: allocate by fisher with `lowrank allocate`, or leave "
            "shared_experts out"
        )
        self.keep, self.constraints, self.prune, self.compute = keep, constraints, prune, compute
        self.mask_method = mask or ARA()
        self.mask_method.check_base(decomposition.kind)
        self.data_terms, self.decomposition = data_terms, decomposition
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.start, self.start_from = start, read_start(start.plan)
        check_start(self.start_from, self.mask_method)
        self.store_directory = store
        self.strict_loading = False
        self.seconds: dict[str, float] = {}
        self.model: PreTrainedModel | None = None
        self.masks = ModelMasks({})
        self.shared: nn.Module | None = None
        self.lifetimes: ACIP | None = None
        self.score = PlanScore()
        self._averages = False

    # -- building ---------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Check the Trainer's precision, which must not cast the masks, its callbacks, and its device."""
        if self.trainer.strategy.root_device.type == "mps":
            raise ValueError(
                "Apple's GPUs lack float64, which statistics and factors need: use --trainer.accelerator cpu"
            )
        check_callbacks(self.trainer)
        check_precision(
            self.trainer,
            "the masks",
            "use precision '32-true' and load the base in bfloat16 with --model.base.dtype bfloat16",
        )
        if callable(self.lr_scheduler) and isinstance(
            self.lr_scheduler(self.optimizer([nn.Parameter(torch.zeros(()))])), ReduceLROnPlateau
        ):
            raise ValueError(
                "lr_scheduler is ReduceLROnPlateau, which waits for validations; the schedule here steps after every "
                "optimizer step: give cosine, or another schedule of torch.optim.lr_scheduler"
            )
        if str(self.trainer.precision) == "16-mixed" and self.trainer.world_size > 1:
            # Each process scales and checks its gradients before they are averaged: after an overflow in one, the
            # others would average in its infinity and step.
            raise ValueError(
                f"the Trainer's precision is '16-mixed' on {self.trainer.world_size} processes, which skip steps apart "
                "from each other: use precision 'bf16-mixed', or load the base in bfloat16 with --model.base.dtype "
                "bfloat16"
            )

    def configure_model(self) -> None:
        """Load the base, load or build its factors, and insert the masked layers; later calls do nothing."""
        if self.model is not None:
            return
        data = calibration_data(self.trainer)
        device = self.trainer.strategy.root_device
        sharded = isinstance(self.trainer.strategy, ModelParallelStrategy)
        # Lightning calls this hook with its own device as the default. Rotary tables computed there would differ from
        # those of a model that is loaded and moved, and CPU generators do not work there.
        with torch.device("cpu"):
            if self.prune is not None:
                # A base that is to be sharded may not fit on one device.
                self._prune(self.prune, data, torch.device("cpu") if sharded else device)
            began = time.perf_counter()
            shared = open_shared(self.base, self.constraints, device) if sharded else None
            model = self.base.load() if shared is None else shared.skeleton.model
            if self.compute.gradient_checkpointing:
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
        return self.budget.model_parameters * self.base.torch_dtype.itemsize

    def _prune(self, settings: WidthPruning, data: CalibrationData, device: torch.device) -> None:
        with cooperating():
            subject = self._subject(self.named_base.load().to(device), data)
            name, spent = pruned_base(subject, settings, keep=self.keep)
        self.base = replace(self.named_base, name=name)
        self.seconds["narrowing"] = spent or 0.0

    def _subject(self, model: PreTrainedModel, data: CalibrationData, targets: Targets | None = None) -> Subject:
        for sequences in (data.train_sequences, data.validation_sequences):
            if len(sequences):  # There may be none to validate on.
                check_sequences(model, sequences)
        return Subject(
            model, data.tokenizer, data.statistics_sequences, self.constraints, self.base, data.statistics, targets
        )

    def build(
        self, model: PreTrainedModel, data: CalibrationData, *, sharded: bool = False, shared: SharedBase | None = None
    ) -> None:
        """Insert masked layers into ``model`` and learn its ranks from now on.

        Args:
            model: The dense base.
            data: Source of the tokenizer and of the sequences for statistics.
            sharded: Leave the factors on disk; ``shard_frozen`` later reads the rows of this process.
            shared: The base on disk, if ``model`` is its skeleton without weights; the weights stay on disk too.
        """
        subject = self._subject(model, data, None if shared is None else shared.targets)
        self.targets, self.budget = subject.targets, subject.budget(self.keep)
        if self.targets.embeddings:
            _refuse_embeddings()
        self.data_terms.blocks(len(decoder_blocks(model)[1]))
        self.store = self._factors(subject, shared)
        self.notes = [*base_notes(subject), *preparation_notes(self.targets, self.store)]
        self.origin = describe_origin(subject, self.decomposition, self.store)
        share = self._current_budget().share
        start = start_of(self._start_plan(subject), self.budget, self.mask_method, share)
        insert_masks(
            model, self.store, self.mask_method, start.ratios, storage=self.budget.rank_costs, kept=start.kept,
            empty=sharded,
        )  # fmt: skip
        if self.compute.gradient_checkpointing:
            enable_activation_checkpointing(model)
        self.model = model
        self.layers = masked_layers(model)
        masks = {name: layer.mask for name, layer in self.layers.items()}
        self.masks = ModelMasks(masks, self.mask_method.shared_module(masks))
        self.shared = self.masks.shared
        if self.start.record_order:
            self.lifetimes = ACIP({name: mask.rank for name, mask in self.masks.items()})
        for module in self._extra_modules().values() if shared is None else ():
            module.to(model.device)
        learned, frozen = sum(p.numel() for p in self.mask_parameters()), self.budget.model_parameters
        _log.info("%s mask parameters are trained; the base's %s parameters are frozen", f"{learned:,}", f"{frozen:,}")

    def _factors(self, subject: Subject, shared: SharedBase | None) -> FactorStore:
        """Return the store of the factors; all processes build missing ones together."""
        make = build_factors if shared is None else shared.factors
        with cooperating():
            return make(subject, settings=self.decomposition, directory=self.store_directory)

    def _start_plan(self, subject: Subject) -> RankPlan | None:
        """Return the plan to start from; if an allocator makes it, the first process runs it for all."""
        method = self.start_from
        if method is None or isinstance(method, RankPlan):
            return method
        text, trainer = "", attached_trainer(self)
        if trainer is None or trainer.is_global_zero:
            if subject.model.device.type == "meta" and method.needs_model:
                _log.warning("the first process loads the whole base into memory, because %s runs it", method.name)
                subject = replace(subject, model=self.base.load())
            plan = allocate_on(self.store, subject, self._current_budget(), method, directory=self.store_directory)
            text = plan.to_json()
        return RankPlan.from_json(text if trainer is None else trainer.strategy.broadcast(text))

    def mask_parameters(self) -> list[nn.Parameter]:
        """Return the trained parameters: those of the masks in the model's order, then those that masks share."""
        learning = [*self.masks.values(), *self._extra_modules().values()]
        return [parameter for module in learning for parameter in module.parameters()]

    def _extra_modules(self) -> dict[str, nn.Module]:
        """Return the modules with learned parameters or state besides the masks, by name."""
        found = {"shared": self.shared, "lifetimes": self.lifetimes}
        return {name: module for name, module in found.items() if module is not None}

    # -- learning ---------------------------------------------------------------------------------------------------

    @property
    def target_keep(self) -> float:
        """The target of the penalties in this step, as a fraction to keep."""
        return self.schedule.at(0 if attached_trainer(self) is None else self.global_step)

    def _current_budget(self) -> Budget:
        return replace(self.budget, keep=self.target_keep)

    def on_fit_start(self) -> None:
        """Set the base to eval mode; to train mode with gradient checkpointing, which does nothing in eval mode."""
        self._base().train(self.compute.gradient_checkpointing)
        self._averages = leaves_gradients_to_us(self.trainer.strategy)
        most, planned = self.trainer.max_steps, self.trainer.estimated_stepping_batches
        if planned < most:
            _log.warning(
                "learning ends with epoch %d, after %d of the %d steps of max_steps: raise --trainer.max_epochs",
                *(self.trainer.max_epochs, planned, most),
            )

    def training_step(self, tokens: Tensor, batch_idx: int) -> Tensor:
        """Return the loss of one batch of token ids ``[batch, length]``.

        Raises:
            ValueError: The loss is not finite.
        """
        budget = self._current_budget()
        self.mask_method.advance(self.masks, self.global_step, budget)
        stride = self.compute.inactive_gate_stride
        ratios = choose_computation(
            self.layers, self.mask_method.dense_from, stride=stride,
            offset=int(torch.randint(stride, (), generator=seeded("rest", self.global_step, batch_idx))),
        )  # fmt: skip
        terms = data_losses(self._base(), self.layers, self.data_terms, tokens)
        terms |= self.mask_method.penalties(self.masks, ratios, budget.share, self.global_step)
        loss = torch.stack(list(terms.values())).sum()
        check_loss(loss, self.global_step, "lower --model.optimizer.init_args.lr")
        losses = {f"loss/{name}": term.detach() for name, term in terms.items()}
        check_monitored(self.trainer, [*losses, "loss/total"], below="loss/")
        self.log_dict(losses)
        self.log("loss/total", loss.detach(), prog_bar=True)
        kept = kept_share(ratios.detach().clamp(max=1), dense_sizes(self.masks, ratios)) * budget.present / budget.total
        self.log("keep/expected", kept, prog_bar=True)
        self.log_dict({"keep/target": self.target_keep, "keep/overshoot": kept - self.target_keep})
        # Loggers show a value at the step that it belongs to. Lightning's own count is one less, also in validation.
        self.log("step", float(self.global_step + 1))
        return loss

    def on_train_start(self) -> None:
        """Check what callbacks watch, and advance the masks; a resumed checkpoint may be of a finished run."""
        check_validation(self.trainer)
        steps, idle = self.trainer.estimated_stepping_batches, self.mask_method.idle_steps
        if steps <= idle:
            _log.warning(
                "the run has %g steps, and %s learns nothing in its first %d: give more steps (with several processes, "
                "that many times --data.learning.sequences), or a smaller warmup of the mask",
                *(steps, self.mask_method.name, idle),
            )
        self._update_masks(self.global_step)

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """Step, then advance the masks, before any callback writes a checkpoint."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self._update_masks(self.global_step + 1)

    @torch.no_grad()
    def _update_masks(self, step: int) -> None:
        """Advance the masks to ``step``, record their order, and stop the run when the method is finished."""
        self.mask_method.advance(self.masks, step, replace(self.budget, keep=self.schedule.at(step)))
        if self.lifetimes is not None:
            self.lifetimes.record(self.masks, step)
        if not self.trainer.should_stop and self.mask_method.finished(self.masks, self.budget, step):
            _log.info("%s: learning is finished after %d steps", self.mask_method.name, step)
            self.trainer.should_stop = True

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Average gradients over the processes; pass them to the mask method; log their norm."""
        if self._averages:
            average_gradients(self.mask_parameters())
        # Lightning divides each loss by accumulate_grad_batches, also in the last, incomplete step of an epoch, and
        # clips gradients after this hook.
        self.mask_method.observe(self.masks, self.global_step, accumulated=self.trainer.accumulate_grad_batches)
        gradients = [parameter.grad for parameter in self.mask_parameters() if parameter.grad is not None]
        self.log("learning/gradient norm", nn.utils.get_total_norm(gradients))

    def configure_optimizers(self) -> Any:
        """Return the optimizer of the mask parameters, with its learning rate schedule if there is one.

        Raises:
            ValueError: The schedule is ``cosine`` and the run has no last step.
        """
        optimizer = self.optimizer(self.mask_parameters())
        make = self.lr_scheduler
        if make == "cosine":
            make = partial(half_cosine, steps=self.trainer.estimated_stepping_batches)
        if make is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": make(optimizer), "interval": "step"}}

    # -- validation: the hard plan at the exact budget ---------------------------------------------------------------

    def plan(self) -> RankPlan:
        """Return the plan of the present masks at the exact budget, with its origin and notes."""
        if self.lifetimes is None:
            plan = self.mask_method.finalise(self.masks, self.budget)
        else:
            plan = self.lifetimes.finalise(self.budget, self.mask_method, start=self.schedule.start)
        return plan.with_origin(self.origin, self.store.fingerprint, self.notes)

    def on_validation_start(self) -> None:
        """Choose the plan that this validation scores."""
        self.score.begin(self.plan(), self.layers)

    def validation_step(self, tokens: Tensor, batch_idx: int) -> None:
        """Score one batch of token ids ``[batch, length]`` with the hard plan, in the first validation also densely.

        Raises:
            ValueError: A score is not finite.
        """
        self.score.add(self._base(), self.layers, tokens)

    def on_validation_epoch_end(self) -> None:
        """Log the perplexity of the hard plan, and its excess over the dense model in nats."""
        nats, dense = self.score.plan.compute(), self.score.dense.compute()
        # The values are already equal on all processes; sync_dist only avoids a warning of Lightning.
        self.log("val/perplexity", nats.exp(), sync_dist=True)
        self.log("val/excess", nats - dense, prog_bar=True, sync_dist=True)
        self.log("step", float(self.global_step), sync_dist=True)
        if self.trainer.sanity_checking:
            # The sanity check scores only some sequences; the next validation needs the dense score of all.
            self.score.dense.reset()

    # -- checkpoints: masks only -------------------------------------------------------------------------------------

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return the state of the masks and of the modules beside them; all else comes from the base and the store."""
        saved: dict[str, Any] = {}
        for name, mask in self.masks.items():
            saved |= mask.state_dict(prefix=f"model.{name}.mask.")
        for name, module in self._extra_modules().items():
            saved |= module.state_dict(prefix=f"{name}.")
        return saved

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Record the identity of the run that the masks belong to."""
        mark(checkpoint, self._identity())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint's masks belong to this run.

        Raises:
            ValueError: Mask method, size, factors, masks, optimizer or schedule differ; the message says which.
        """
        check_fit(checkpoint, self._identity(), former={"mask": self.mask_method.former_names})

    def _identity(self) -> dict[str, Any]:
        masks = {name: list(value.shape) for name, value in self.state_dict().items()}
        run = {"mask": self.mask_method.name, "keep": self.keep, "factors": self.store.digest, "masks": masks}
        return {**run, **self._step_settings()}

    def _step_settings(self) -> dict[str, Any]:
        """Return the settings of optimizer and schedule; a resumed run gets those of its checkpoint from Lightning."""
        optimizer = self.optimizer(self.mask_parameters())
        found = {"optimizer": type(optimizer).__name__, "lr_scheduler": self.lr_scheduler}
        found |= {f"optimizer {name}": value for name, value in optimizer.defaults.items()}
        if callable(self.lr_scheduler):
            schedule = self.lr_scheduler(optimizer)
            found["lr_scheduler"] = type(schedule).__name__
            found |= {f"lr_scheduler {name}": value for name, value in schedule.state_dict().items()}
        # What is no plain value, such as a function, can't be stored.
        return {name: value for name, value in found.items() if isinstance(value, (int, float, str, tuple, type(None)))}

    def _base(self) -> PreTrainedModel:
        assert self.model is not None, "configure_model has not run"
        return self.model


def _refuse_dropping() -> None:
    raise ValueError(
        "masks were asked to drop experts, and learn the ranks of all: leave out drop_experts (model.constraints), or "
        "choose ranks and experts without learning, with `lowrank allocate --method fisher --drop_experts true`"
    )


def _refuse_embeddings() -> None:
    raise ValueError(
        f"masks were asked to learn ranks of embeddings, and gate linear layers only: leave out {EMBEDDINGS} "
        "(model.constraints.include), or choose these ranks without learning, with `lowrank allocate --method fisher "
        f"--include '*' {EMBEDDINGS}`"
    )
