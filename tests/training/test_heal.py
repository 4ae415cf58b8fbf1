"""Healing: factors or an adapter learn the dense model's logits; ranks stay, and runs resume to the same bits."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lowrank_pl import Base, Constraints, RankPlan, Subject, allocate_ranks, load_compressed
from lowrank_pl.calibration.build import statistics_of
from lowrank_pl.cli.export import export
from lowrank_pl.evaluate.likelihood import divergence
from lowrank_pl.export.export import save_compressed
from lowrank_pl.factors.compression import compress
from lowrank_pl.factors.healed import healed_plan
from lowrank_pl.factors.settings import Decomposition
from lowrank_pl.factors.store import FactorStore
from lowrank_pl.methods.healing import Healing, Lora
from lowrank_pl.methods.prune.llm_pruner import apply_llm_pruner
from lowrank_pl.methods.prune.settings import LLMPruner
from lowrank_pl.methods.refit.refitting import refit
from lowrank_pl.models.base import load_base
from lowrank_pl.models.tiny import byte_tokenizer
from lowrank_pl.text.settings import Calibration
from lowrank_pl.training.checkpointing import read_checkpoint
from lowrank_pl.training.finish_heal import FinishHealing
from lowrank_pl.training.heal import Healer
from tests.helpers.tiny_training import LENGTH, make_data, make_trainer

TEXT = Calibration("python-docs::part=0%-10%", LENGTH, 8)
FACTORS = Healing(tokens=40 * LENGTH, lr=3e-3)
LORA = Healing(tokens=40 * LENGTH, train="lora", lr=1e-2, lora=Lora(rank=4, alpha=8))


pytestmark = [
    # PEFT itself asks for it.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]


def subject_of(dtype="float32", storage="factored"):
    return Subject.load(Base("random:llama", dtype=dtype), TEXT, Constraints(storage=storage))


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    """The file of a plan whose layers are stored in all three forms."""
    folder = tmp_path_factory.mktemp("plan")
    subject = subject_of(storage="auto")
    made, _ = allocate_ranks(subject, keep=0.5, allocator="energy", store=folder / "store")
    names = list(made.modules)
    modules = {**made.modules, names[0]: replace(made.modules[names[0]], storage="factored")}
    modules[names[1]] = replace(modules[names[1]], rank=None)
    assert len(made.pivoted_modules) > 5
    return replace(made, modules=modules).save(folder / "plan.json")


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """The folder of a base pruned by LLM-Pruner."""
    folder, subject = tmp_path_factory.mktemp("pruned") / "model", subject_of()
    statistics = statistics_of(subject)
    apply_llm_pruner(
        subject.model, subject.targets, statistics, LLMPruner(skip_first=0, skip_last=0), base="random:llama", keep=0.6
    )
    save_compressed(subject.model, folder, tokenizer=byte_tokenizer(), verify=False)
    return folder


def heal(start, run, settings=FACTORS, *, ckpt_path=None, callbacks=(), data=None, trainer=None, **options):
    healer = Healer(start, settings, **options)
    made = make_trainer(default_root_dir=run, max_epochs=-1, callbacks=[FinishHealing(), *callbacks], **(trainer or {}))
    made.fit(healer, data or make_data(sequences=20), ckpt_path=ckpt_path)
    return healer, made.callbacks[0].healed


@pytest.fixture(scope="module")
def healed(plan, tmp_path_factory):
    run = tmp_path_factory.mktemp("healed")
    healer, result = heal(plan, run)
    return run, healer, result


def from_dense(model):
    data = make_data(sequences=20)
    data.setup("fit")
    return divergence(model, load_base("random:llama"), data.validation_sequences)


# -- factors -------------------------------------------------------------------------------------------------------


def test_divergence_on_held_back_text_falls_and_the_export_is_that_model(healed):
    run, _, result = healed
    assert result.kept
    assert result.tokens == FACTORS.tokens
    assert result.after.kl < 0.9 * result.before.kl
    assert from_dense(load_compressed(run / "model")).kl == result.after.kl


@pytest.mark.parametrize("trainer", [
    {"accumulate_grad_batches": 8}, {"accumulate_grad_batches": 3, "limit_train_batches": 4},
])  # fmt: skip
def test_accumulation_that_does_not_divide_an_epoch_trains_the_whole_budget(plan, tmp_path, trainer):
    _, result = heal(plan, tmp_path, trainer=trainer)
    assert result.tokens == FACTORS.tokens


def test_ranks_and_frozen_weights_stay(plan, healed):
    run, *_ = healed
    export(plan, output=run / "unhealed")
    before, after = (load_compressed(run / name).state_dict() for name in ("unhealed", "model"))
    assert {name: one.shape for name, one in before.items()} == {name: one.shape for name, one in after.items()}
    changed = {name for name, one in after.items() if not torch.equal(one, before[name])}
    parts = {
        name.removesuffix("right") + end for name in before if name.endswith(".right") for end in ("right", "weight")
    }
    assert changed == parts


def test_the_plan_says_what_was_trained_and_gives_the_healed_model_again(plan, healed, tmp_path):
    run, _, result = healed
    before, after = RankPlan.load(plan), RankPlan.load(run / "plan.json")
    assert after.fingerprint != before.fingerprint
    assert (before.healed, after.healed) == ("", str(result))
    assert f"KL {result.before.kl:.4f} -> {result.after.kl:.4f}, excess {result.before.excess_nats:.4f}" in after.healed
    again = export(run / "plan.json", output=tmp_path / "again")
    assert from_dense(load_compressed(again)).kl == pytest.approx(result.after.kl, rel=1e-4)


def test_page_and_card_say_that_the_model_was_trained(healed):
    run, _, result = healed
    assert "**After the compression the model was healed**" in (run / "model" / "README.md").read_text()
    for file in (run / "report.html", run / "model" / "README.md"):
        text = file.read_text()
        assert "were not fine-tuned" not in text
        assert f"{result.tokens:,} tokens" in text
    assert json.loads((run / "summary.json").read_text())["healed"]["excess_nats"] == result.after.excess_nats


def test_an_export_can_be_healed_further(healed, tmp_path):
    run, _, result = healed
    _, more = heal(run / "model", tmp_path)
    assert more.before.kl == pytest.approx(result.after.kl)
    assert RankPlan.load(tmp_path / "plan.json").healed.startswith(f"{result}; ")


def test_healed_factors_are_neither_cut_nor_refitted(healed, tmp_path):
    run, *_ = healed
    plan = RankPlan.load(run / "plan.json")
    name = next(name for name, module in plan.modules.items() if module.rank is not None)
    smaller = {**plan.modules, name: replace(plan.modules[name], rank=1)}
    replace(plan, modules=smaller).save(tmp_path / "plan.json")
    with pytest.raises(ValueError, match="heal a plan of that rank"):
        export(tmp_path / "plan.json", output=tmp_path / "model")
    with pytest.raises(ValueError, match="no component order"):
        export(run / "plan.json", output=tmp_path / "model", keep=[0.4])
    subject = subject_of()
    with pytest.raises(ValueError, match="refit first, then heal"):
        refit(plan, FactorStore.existing(plan.origin["store"]), subject, sequences=subject.sequences)


def test_the_result_is_dropped_if_divergence_does_not_fall(plan, tmp_path, caplog):
    _, result = heal(plan, tmp_path, Healing(tokens=4 * LENGTH, lr=10.0, warmup=0.0))
    assert not result.kept
    assert "the result is dropped" in caplog.text
    assert {path.name for path in tmp_path.iterdir()} == {"heal.json"}


def test_a_base_in_half_precision_is_trained_in_float32_and_exported_as_it_was(tmp_path):
    made, _ = allocate_ranks(subject_of("bfloat16"), keep=0.5, allocator="uniform", store=tmp_path / "store")
    file = made.save(tmp_path / "plan.json")
    with pytest.raises(ValueError, match=r"--trainer.precision bf16-mixed"):
        heal(file, tmp_path / "run")
    _, result = heal(file, tmp_path / "run", trainer={"precision": "bf16-mixed"}, gradient_checkpointing=True)
    assert result.kept
    assert {one.dtype for one in load_compressed(tmp_path / "run" / "model", dtype="auto").parameters()} == {
        torch.bfloat16
    }


# -- resume --------------------------------------------------------------------------------------------------------


class Dies(Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 17:
            raise RuntimeError("killed")


@pytest.mark.parametrize("settings", [FACTORS, LORA], ids=["factors", "lora"])
def test_a_killed_run_goes_on_to_the_same_bits(plan, tmp_path, settings):
    def saving(name):
        return ModelCheckpoint(tmp_path / name, every_n_train_steps=5, save_last=True, save_top_k=1)

    checkpoints = {"enable_checkpointing": True}
    with pytest.raises(RuntimeError, match="killed"):
        heal(plan, tmp_path, settings, callbacks=[Dies(), saving("killed")], trainer=checkpoints)
    last = str(tmp_path / "killed" / "last.ckpt")
    with pytest.raises(ValueError, match="lr is"):
        heal(plan, tmp_path, replace(settings, lr=0.5), ckpt_path=last)
    _, after = heal(plan, tmp_path, settings, callbacks=[saving("resumed")], trainer=checkpoints, ckpt_path=last)
    _, expected = heal(plan, tmp_path / "whole", settings, callbacks=[saving("whole")], trainer=checkpoints)
    assert (after.before, after.after, after.tokens) == (expected.before, expected.after, expected.tokens)
    mine, theirs = (read_checkpoint(tmp_path / name / "last.ckpt")["state_dict"] for name in ("resumed", "whole"))
    assert len(mine) == len(theirs) == (2 * 13 if settings is FACTORS else 2 * 14)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


# -- adapters ------------------------------------------------------------------------------------------------------


def with_adapter(folder, model):
    from peft import PeftModel

    return from_dense(PeftModel.from_pretrained(model, folder / "adapter").base_model.model)


def test_an_adapter_lies_beside_the_export(plan, tmp_path):
    _, result = heal(plan, tmp_path, LORA)
    assert result.kept
    model = load_compressed(tmp_path / "model")
    assert from_dense(model).kl == pytest.approx(result.before.kl)
    assert with_adapter(tmp_path, model).kl == pytest.approx(result.after.kl)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["base_model_name_or_path"]) == (4, str(tmp_path / "model"))
    assert "a LoRA adapter was trained on" in (tmp_path / "adapter" / "README.md").read_text()
    plan = RankPlan.load(tmp_path / "plan.json")
    assert "a LoRA adapter was trained on" in plan.notes[-1]
    assert not plan.healed, "the exported model itself was not trained"


def test_llm_pruners_base_is_healed_by_an_adapter(pruned, tmp_path):
    _, result = heal(pruned, tmp_path, LORA)
    assert result.kept
    assert result.after.kl < 0.9 * result.before.kl
    assert with_adapter(tmp_path, load_compressed(pruned)).kl == pytest.approx(result.after.kl)
    assert not (tmp_path / "model").exists()


# -- mistakes ------------------------------------------------------------------------------------------------------


def test_a_budget_below_one_step_is_refused(plan, tmp_path):
    with pytest.raises(ValueError, match="budget of 31 tokens is below the 32 tokens of one optimizer step"):
        heal(plan, tmp_path, replace(FACTORS, tokens=LENGTH - 1))


def test_a_step_takes_no_more_batches_than_an_epoch_has():
    assert Healing(tokens=200).steps(100, accumulated=4, epoch=2) == 1
    with pytest.raises(ValueError, match="below the 200 tokens of one optimizer step"):
        Healing(tokens=199).steps(100, accumulated=4, epoch=2)


def test_a_plan_without_factors_is_refused(plan, tmp_path):
    lost = replace(RankPlan.load(plan), origin={"base": "random:llama"}).save(tmp_path / "lost.json")
    with pytest.raises(ValueError, match=r"--model.store"):
        heal(lost, tmp_path / "run")


def test_an_adapter_without_peft_is_refused(monkeypatch):
    monkeypatch.setattr("lowrank_pl.methods.healing.find_spec", lambda _: None)
    with pytest.raises(ValueError, match="pip install peft"):
        Healing(tokens=1, train="lora")


def test_precisions_that_cast_what_is_trained_are_refused(plan, tmp_path):
    with pytest.raises(ValueError, match="use precision '32-true', or 'bf16-mixed'"):
        heal(plan, tmp_path, trainer={"precision": "bf16-true"})


def test_a_pruned_base_has_no_factors(pruned):
    with pytest.raises(ValueError, match=r"--model.settings.train lora"):
        Healer(pruned, FACTORS)


def test_held_back_text_is_needed(plan, tmp_path):
    with pytest.raises(ValueError, match=r"--data.validation.sequences"):
        heal(plan, tmp_path, data=make_data(validation_sequences=0))


def test_folders_that_hold_nothing_to_heal_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"give a plan\.json, or the folder of an export"):
        Healer(tmp_path, FACTORS)
    load_base("random:llama").save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match=r"--model.teacher"):
        Healer(tmp_path / "dense", LORA)


def test_embeddings_of_low_rank_stay_as_they_are_and_are_kept(tmp_path):
    subject = Subject.load(Base("random:gemma3"), TEXT, Constraints(include=("*", "embeddings")))
    plan, factors = allocate_ranks(subject, keep=0.4, allocator="uniform", decomposition=Decomposition("svd"))
    student = compress(load_base("random:gemma3"), plan, factors)
    healed = healed_plan(student, plan, tmp_path, settings={}, note="test", weights={})
    again = compress(load_base("random:gemma3"), healed, FactorStore.existing(healed.origin["store"]))
    tokens = torch.arange(8)[None]
    torch.testing.assert_close(again(tokens).logits, student(tokens).logits)
    assert healed.embedded == plan.embedded == ("model.embed_tokens",)
