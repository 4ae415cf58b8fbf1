"""The Lightning callback that decides whether healing helped, and writes the healed model."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lowrank_pl.evaluate.likelihood import Divergence
from lowrank_pl.export.export import check_destination
from lowrank_pl.factors.healed import healed_plan
from lowrank_pl.plans.plan import RankPlan
from lowrank_pl.report.finish import Protocol, finish_healing
from lowrank_pl.report.model_card import adapter_card
from lowrank_pl.report.scores import Row, row_table
from lowrank_pl.text.sequences import sequences_fingerprint
from lowrank_pl.training.data import calibration_data
from lowrank_pl.training.finish_run import Stopwatch
from lowrank_pl.training.heal import Healer
from lowrank_pl.training.lightning_internals import is_last_step
from lowrank_pl.training.tensorboard import log_everywhere
from lowrank_pl.utils.files import atomic_directory, atomic_write, check_output_folder, write_json

__all__ = ["FinishHealing", "Healed", "ScoreHealing"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Healed:
    """The result of healing.

    Args:
        train: What was trained: ``factors`` or ``lora``.
        tokens: Tokens that were trained on.
        minutes: Wall time of the training, with validations.
        before: Divergence from the dense model on held-back sequences before the training.
        after: The same after it.
    """

    train: str
    tokens: int
    minutes: float
    before: Divergence
    after: Divergence

    @property
    def kept(self) -> bool:
        """Whether the divergence fell, so that the result is written."""
        return self.after.kl < self.before.kl

    def __str__(self) -> str:
        """Return the result in a sentence, for notes, cards and logs."""
        what = "the factors were trained" if self.train == "factors" else "a LoRA adapter was trained"
        return (
            f"{what} on {self.tokens:,} tokens in {self.minutes:.2f} minutes; on {self.after.tokens:,} held-back "
            f"tokens KL {self.before.kl:.4f} -> {self.after.kl:.4f}, excess {self.before.excess_nats:.4f} -> "
            f"{self.after.excess_nats:.4f} nats per token"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON values."""
        scores = {
            name: {**asdict(one), "excess_nats": one.excess_nats, "perplexity": one.perplexity}
            for name, one in (("before", self.before), ("after", self.after))
        }
        return {"train": self.train, "tokens": self.tokens, "minutes": self.minutes, **scores, "kept": self.kept}


class ScoreHealing(Stopwatch):
    """Scores the healed model on held-back sequences, and stores its factors if it is better.

    Args:
        folder: Folder for the store of the healed factors; by default ``factors`` in the run's folder.

    Attributes:
        healed: The result, once the run has ended.
        plan: The plan of the healed factors, if they were kept.
    """

    def __init__(self, folder: Path | None = None) -> None:
        super().__init__()
        self.folder = folder
        self.healed: Healed | None = None
        self.plan: RankPlan | None = None

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Score the result on the first process, while the others wait."""
        assert isinstance(pl_module, Healer)
        if trainer.is_global_zero:
            self._finish(trainer, pl_module)
        trainer.strategy.barrier("finish")

    def _finish(self, trainer: Trainer, healer: Healer) -> None:
        assert healer.before is not None, "training has not started"
        self.healed = healed = Healed(
            healer.settings.train, healer.tokens_done, self.learning_seconds() / 60, healer.before,
            healer.score("validate after healing"),
        )  # fmt: skip
        _log.info("%s", healed)
        if not healed.kept:
            _log.warning(
                "the result is dropped: KL divergence on held-back text did not fall (%.4f -> %.4f). Lower "
                "--model.settings.lr, or give more tokens and more text",
                *(healed.before.kl, healed.after.kl),
            )
        elif healer.adapter is None:
            self.plan = self._store_factors(healer, self.folder or Path(trainer.default_root_dir) / "factors", healed)

    def _store_factors(self, healer: Healer, folder: Path, healed: Healed) -> RankPlan:
        """Store the trained factors in the type of the base, and return their plan."""
        plan = healer.pair.plan
        assert plan is not None, "a pruned base has no factors"
        for one in healer.trained().values():
            one.data = one.data.to(healer.start.base.torch_dtype)
        data, settings = calibration_data(healer.trainer), asdict(healer.settings)
        return healed_plan(
            healer.pair.student, plan, folder, note=str(healed), weights=healer.pair.weights,
            settings={
                "tokens": healed.tokens,
                **{name: settings[name] for name in ("lr", "warmup", "weight_decay")},
                "windows": sequences_fingerprint(data.train_sequences),
            },
        )  # fmt: skip


class FinishHealing(ScoreHealing):
    """Scores the healed model on held-back sequences, and writes it if its divergence from the dense model fell.

    The run's folder (``trainer.default_root_dir``) then holds ``heal.json``. With trained factors it also holds
    ``plan.json``, ``factors/``, ``model/``, ``summary.json``, ``rank_map.png`` and ``report.html``. With an adapter it
    holds ``adapter/``, a folder of PEFT, and, if healing started from a plan, ``model/``, which the adapter is for.

    Args:
        json: A file for the figures of ``heal.json``.
    """

    def __init__(self, json: Path | None = None) -> None:
        super().__init__()
        self.json = json

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the folders, so that a mistake fails now, not after hours.

        Raises:
            ValueError: A folder can't be written, or holds the plan or model that is healed.
        """
        assert isinstance(pl_module, Healer)
        run = Path(trainer.default_root_dir)
        if _exports(pl_module):
            start = pl_module.start
            if start.path.resolve() == (run / "plan.json").resolve():
                raise ValueError(
                    f"{str(start.path)!r} is the plan that is healed, which would be replaced: give this run another "
                    "folder with --run"
                )
            check_destination(run / "model", sources=[start.path, start.base.name, start.teacher.name])
        if pl_module.settings.train == "lora":
            _check_adapter(run / "adapter")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Say with the last step what comes now."""
        if is_last_step(trainer):
            _log.info("the token budget is spent; validating the result")

    def _finish(self, trainer: Trainer, healer: Healer) -> None:
        super()._finish(trainer, healer)
        run, healed = Path(trainer.default_root_dir), self.healed
        assert healed is not None
        for path in (run / "heal.json", self.json):
            if path is not None:
                write_json(path, healed.to_dict())
        figures = {"kl": healed.after.kl, "excess_nats": healed.after.excess_nats}
        log_everywhere(trainer, {f"final/{name}": value for name, value in figures.items()}, trainer.global_step)
        if healed.kept:
            self._write(run, healer, healed)

    def _write(self, run: Path, healer: Healer, healed: Healed) -> None:
        """Write the healed model or the adapter, and say where all is."""
        data, plan, exports = calibration_data(healer.trainer), self.plan, _exports(healer)
        rows, places = _rows(healed, healer.pair.plan), {"figures": run / "heal.json"}
        if healer.adapter is not None:
            _save_adapter(healer, run / "model" if exports else healer.start.path, run / "adapter", str(healed))
            places["adapter"] = run / "adapter"
            # The exported model itself is not changed by the adapter beside it.
            plan = healer.pair.plan if exports else None
            beside = f"the folder adapter beside this model holds an adapter for it: {healed}"
            plan = None if plan is None else replace(plan, notes=(*plan.notes, beside))
        if plan is not None:
            finish_healing(
                run, healer.pair.student, data.tokenizer, plan, rows,
                Protocol(f"validation sequences of {data.validation_text}", data.validation_sequences),
                facts={"healed": healed.to_dict(), "seconds": {"healing": healed.minutes * 60},
                       "date": datetime.now().astimezone().isoformat(timespec="seconds")},
            )  # fmt: skip
            places |= {"model": run / "model", "plan": run / "plan.json", "report": run / "report.html"}
        print(f"\n{row_table(rows)}\n\n{healed}\n")
        print("\n".join(f"{name:8} {place}" for name, place in places.items()))


def _exports(healer: Healer) -> bool:
    """Return whether a model is written: an adapter on a model that already lies in a folder needs no second one."""
    return healer.settings.train == "factors" or not healer.start.is_folder


def _check_adapter(folder: Path) -> None:
    check_output_folder(folder)
    if folder.exists() and any(folder.iterdir()) and not (folder / "adapter_config.json").is_file():
        raise ValueError(f"{str(folder)!r} holds other files than an adapter: name another folder with --run")


def _save_adapter(healer: Healer, base: Path, folder: Path, said: str) -> None:
    """Write the adapter as PEFT does, and take it off the model."""
    adapter = healer.adapter
    adapter.peft_config["default"].base_model_name_or_path = str(base)
    with atomic_directory(folder) as place:
        # Embeddings are not trained, so PEFT need not compare them with those of a model on the hub.
        adapter.save_pretrained(place, save_embedding_layers=False)
        atomic_write(place / "README.md", adapter_card(str(base), said))
    adapter.unload()


def _rows(healed: Healed, plan: RankPlan | None) -> list[Row]:
    """Return the table: the dense model, and the compressed one before and after healing."""
    before, after = healed.before, healed.after
    sizes: dict[str, Any] = {}
    if plan is not None:
        sizes = {"kept_targeted": plan.keep_targeted, "kept_model": plan.keep_model, "bytes": plan.bytes}
    name = "healed" if healed.train == "factors" else "healed, LoRA"
    dense_bytes = None if plan is None else plan.dense_bytes
    return [
        Row("dense", before.dense_perplexity, 0.0, 1.0, 1.0, dense_bytes),
        Row("not healed", before.perplexity, before.excess_nats, **sizes),
        Row(name, after.perplexity, after.excess_nats, **sizes, seconds=healed.minutes * 60),
    ]
