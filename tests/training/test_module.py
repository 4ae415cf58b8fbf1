"""RankLearner: what learns, what is kept, and that its numbers are those of a slow reference."""

from __future__ import annotations

import inspect
import math
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader

from lowrank_pl import RankPlan, perplexity
from lowrank_pl.calibration.subject import Subject
from lowrank_pl.cli.app import main
from lowrank_pl.factors.compression import compress
from lowrank_pl.factors.settings import Decomposition
from lowrank_pl.methods import masks
from lowrank_pl.methods.allocate import make_allocator
from lowrank_pl.methods.allocate.run import allocate_on
from lowrank_pl.methods.masks.ara import ARA
from lowrank_pl.methods.masks.ars import ARS
from lowrank_pl.methods.masks.dobi_svd import DobiSVD
from lowrank_pl.methods.masks.fermi import Fermi
from lowrank_pl.methods.masks.llrc import LLRC
from lowrank_pl.methods.masks.masked_linear import MaskedLinear
from lowrank_pl.methods.masks.objectives import DataTerms
from lowrank_pl.methods.masks.rescaled import Rescaled
from lowrank_pl.models.base import Base, load_base
from lowrank_pl.models.forward import refuse_dropout
from lowrank_pl.models.tiny import byte_tokenizer, tiny_model
from lowrank_pl.plans.constraints import Constraints
from lowrank_pl.training import module
from lowrank_pl.training.checkpointing import AtomicCheckpoints, read_checkpoint
from lowrank_pl.training.module import RankLearner, Start
from tests.helpers import ROOT
from tests.helpers.tiny_training import fit, logits_of, make_data, make_learner, make_trainer


def save_base(folder, model):
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def built(base="random:llama", data=None, **changes):
    """Return a learner with its masked model, without a Trainer."""
    learner = make_learner(base, **changes)
    learner.build(load_base(base), data or make_data())
    return learner


def subject_of(data):
    return Subject(load_base("random:llama"), data.tokenizer, data.statistics_sequences)


class Spy(Callback):
    """Keeps what a step logged, the mask gradients and step sizes, and counts how often a layer computed."""

    def __init__(self):
        self.logged, self.gradients, self.step_sizes, self.calls = [], [], [], 0

    def on_train_start(self, trainer, pl_module):
        first = next(iter(pl_module.layers.values()))
        first.register_forward_hook(lambda *_: setattr(self, "calls", self.calls + 1))

    def on_after_backward(self, trainer, pl_module):
        self.gradients.append({name: mask.logits.grad.clone() for name, mask in pl_module.masks.items()})

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.step_sizes.append(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.logged.append({name: value.item() for name, value in trainer.callback_metrics.items()})


# -- what learns ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A learner after two steps, its trainer, and its checkpoint."""
    folder, learner = tmp_path_factory.mktemp("learned"), make_learner()
    saving = ModelCheckpoint(folder, every_n_train_steps=2, save_top_k=0, save_last=True)
    trainer = fit(learner, max_steps=2, enable_checkpointing=True, callbacks=[saving])
    return learner, trainer, folder / "last.ckpt"


@pytest.mark.parametrize("used", ["train", "statistics", "validation"])
def test_sequences_that_do_not_fit_the_model_are_refused(used):
    data = make_data()
    data.setup()
    getattr(data, f"{used}_sequences")[0, 0] = 261
    with pytest.raises(ValueError, match="to 261, but the model's vocabulary is 0 to 260"):
        built(data=data)


def test_only_masks_are_in_the_optimizer(learned):
    learner, trainer, _ = learned
    (group,) = trainer.optimizers[0].param_groups
    assert len(learner.masks) == 14
    assert [id(p) for p in group["params"]] == [id(mask.logits) for mask in learner.masks.values()]
    assert not any(p.requires_grad for n, p in learner.named_parameters() if "mask" not in n)


def test_only_masks_are_in_the_checkpoint(learned):
    learner, _, path = learned
    state = read_checkpoint(path)["state_dict"]
    assert set(state) == {f"model.{name}.mask.logits" for name in learner.masks}
    assert {tuple(value.shape) for value in state.values()} == {(101,)}
    assert path.stat().st_size < 60_000


def test_masks_stay_float32_beside_a_bfloat16_base_and_move():
    learner = make_learner(dtype="bfloat16")
    fit(learner, max_steps=1)
    before = built(dtype="bfloat16").masks
    assert {p.dtype for n, p in learner.model.named_parameters() if "mask" not in n} == {torch.bfloat16}
    for name, mask in learner.masks.items():
        assert mask.logits.dtype == torch.float32
        assert (mask.logits - before[name].logits).abs().max() > 0.01


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_precisions_that_cast_masks_are_refused(precision):
    with pytest.raises(ValueError, match=f"precision is '{precision}'.* use precision '32-true'"):
        fit(make_learner(), max_steps=1, precision=precision)


def test_float16_on_several_processes_is_refused():
    learner = make_learner()
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    learner._trainer = SimpleNamespace(strategy=strategy, precision="16-mixed", world_size=2, callbacks=[])
    with pytest.raises(ValueError, match=r"16-mixed' on 2 processes.*'bf16-mixed'"):
        learner.setup("fit")


def test_a_schedule_that_waits_for_validations_is_refused_before_the_base_is_loaded():
    learner = make_learner(lr_scheduler=ReduceLROnPlateau)
    with pytest.raises(ValueError, match=r"ReduceLROnPlateau.* give cosine"):
        fit(learner, max_steps=1)
    assert learner.model is None


def test_a_loss_that_is_not_finite_ends_the_run(monkeypatch):
    monkeypatch.setattr(module, "data_losses", lambda *_: {"cross_entropy": torch.tensor(torch.nan)})
    with pytest.raises(ValueError, match=r"the loss of step 0 is nan: lower --model\.optimizer\.init_args\.lr"):
        fit(make_learner(), max_steps=1)


def test_mixed_precision_learns():
    learner = make_learner()
    fit(learner, max_steps=1, precision="bf16-mixed")
    assert {mask.logits.dtype for mask in learner.masks.values()} == {torch.float32}


class OtherData(LightningDataModule):
    def train_dataloader(self):
        return DataLoader(torch.zeros(2, 8, dtype=torch.int64))


@pytest.mark.filterwarnings("ignore:You defined a .validation_step. but have no")
def test_a_datamodule_of_another_type_is_refused():
    with pytest.raises(ValueError, match="got OtherData as its datamodule: expected a CalibrationData"):
        fit(make_learner(), OtherData(), max_steps=1)
    with pytest.raises(ValueError, match="got no datamodule: expected a CalibrationData"):
        make_trainer(max_steps=1).fit(make_learner(), OtherData().train_dataloader())


@pytest.mark.parametrize("half", [{"keep_start": 0.9}, {"keep_steps": 4}, {"keep_start": 0.9, "keep_steps": -4}])
def test_half_a_schedule_is_refused(half):
    with pytest.raises(ValueError, match=r"start\.keep is .* and start\.steps .*: a schedule needs both"):
        make_learner(**half)


@pytest.mark.parametrize("keep", [0, 1.5, -1])
def test_an_impossible_keep_is_refused(keep):
    with pytest.raises(ValueError, match=f"keep is {keep}: expected the fraction of parameters to keep"):
        make_learner(keep=keep)


@pytest.mark.parametrize("family", ["gpt2", "gemma3", "phi3", "gpt_neox"])
def test_other_families_learn_too_also_with_gradient_checkpointing(family):
    learner = make_learner(f"random:{family}", gradient_checkpointing=True)
    fit(learner, max_steps=1)
    before = built(f"random:{family}")
    moved = [(mask.logits - before.masks[name].logits).abs().max().item() for name, mask in learner.masks.items()]
    assert min(moved) > 0.01
    assert learner.plan().keep_targeted <= 0.5


# -- gradient checkpointing ----------------------------------------------------------------------------------------


def test_gradient_checkpointing_gives_the_same_gradients_and_is_really_active():
    terms = DataTerms(kl=0.5, divergence=1.0)
    plain, saving = Spy(), Spy()
    fit(make_learner(data_terms=terms), max_steps=2, callbacks=[plain])
    learner = make_learner(data_terms=terms, gradient_checkpointing=True)
    fit(learner, max_steps=2, callbacks=[saving])
    assert learner.model.training
    # Teacher and student; recomputed, the student's layers compute once more.
    assert (plain.calls, saving.calls) == (4, 6)
    for one, other in zip(plain.gradients, saving.gradients, strict=True):
        for name in one:
            assert one[name].abs().max() > 0
            assert torch.equal(one[name], other[name])


def test_dropout_is_refused_with_gradient_checkpointing(tmp_path):
    model = tiny_model("llama")
    model.config.attention_dropout = 0.25
    base = save_base(tmp_path, model)
    with pytest.raises(ValueError, match=r"the base has dropout \(.*attention_dropout = 0.25\), which gradient check"):
        fit(make_learner(base, gradient_checkpointing=True), max_steps=1)


def test_dropout_of_heads_that_are_absent_does_not_count():
    gpt2 = tiny_model("gpt2")
    assert gpt2.config.summary_first_dropout > 0
    refuse_dropout(gpt2)
    gpt2.transformer.h[1].mlp.dropout.p = 0.1
    with pytest.raises(ValueError, match=r"\(transformer.h.1.mlp.dropout.p = 0.1\)"):
        refuse_dropout(gpt2)


# -- the loss against a slow reference -----------------------------------------------------------------------------


def reference_student(learner):
    """Return a dense copy whose weights are the products of the gated factors."""
    copy = tiny_model("llama")
    for name, layer in learner.layers.items():
        share = sum((100 - i) / 100 * p.item() for i, p in enumerate(layer.mask.logits.double().softmax(0)))
        length = min(layer.mask.rank, round(layer.mask.span * share))
        copy.get_submodule(name).weight = torch.nn.Parameter(layer.left[:, :length] @ layer.right[:length])
    return copy


def compared(student, teacher, kind):
    """Return the divergence of activations by a loop over positions."""
    student, teacher = student.double().flatten(0, 1), teacher.double().flatten(0, 1)
    if kind == "cosine":
        each = [float(s @ t / (s.norm() * t.norm())) for s, t in zip(student, teacher, strict=True)]
        return 1 - sum(each) / len(each)
    error = sum(float(((s - t) ** 2).mean()) for s, t in zip(student, teacher, strict=True)) / len(student)
    scale = sum(float((t**2).mean()) for t in teacher) / len(teacher)
    return error / scale if kind == "normalised_mse" else error


@pytest.mark.parametrize(
    ("kind", "places"), [("mse", ("middle", "last")), ("cosine", ("last",)), ("normalised_mse", ("0", "middle"))]
)
@torch.no_grad()
def test_teacher_terms_against_a_dense_copy(kind, places):
    terms = DataTerms(cross_entropy=0.5, kl=2.0, divergence=3.0, divergence_kind=kind, divergence_at=places)
    data, spy = make_data(batch_size=2), Spy()
    learner = built(data=data)
    tokens = data.train_sequences[data.train_dataloader().batches(0)[0]]
    with torch.enable_grad():
        fit(make_learner(data_terms=terms), data, max_steps=1, callbacks=[spy])
    student = reference_student(learner)(tokens, output_hidden_states=True)
    teacher = tiny_model("llama")(tokens, output_hidden_states=True)
    p, q = (out.logits.double().softmax(-1) for out in (teacher, student))
    states = {"0": 1, "middle": 2, "last": -1}  # of two blocks; entry 0 is the embedding
    if "middle" in places:
        # hidden_states has the last block's output only after the norm
        captured = {}
        models = {"student": reference_student(learner), "teacher": tiny_model("llama")}
        for name, model in models.items():
            model.model.layers[1].register_forward_hook(
                lambda _m, _i, out, name=name: captured.update({name: out if torch.is_tensor(out) else out[0]})
            )
            model(tokens)
    each = []
    for place in places:
        pair = (
            (captured["student"], captured["teacher"])
            if place == "middle"
            else (student.hidden_states[states[place]], teacher.hidden_states[states[place]])
        )
        each.append(compared(*pair, kind))
    chosen = q[:, :-1].gather(-1, tokens[:, 1:, None])
    (logged,) = spy.logged
    assert logged["loss/cross_entropy"] == pytest.approx(0.5 * -chosen.log().mean().item(), rel=1e-4)
    assert logged["loss/kl"] == pytest.approx(2.0 * (p * (p / q).log()).sum(-1).mean().item(), rel=1e-3)
    assert logged["loss/divergence"] == pytest.approx(3.0 * sum(each) / len(each), rel=1e-3)
    parts = sum(value for name, value in logged.items() if name.startswith("loss/") and name != "loss/total")
    assert logged["loss/total"] == pytest.approx(parts, rel=1e-5)


def test_a_place_that_the_model_lacks_is_refused():
    terms = DataTerms(divergence=1.0, divergence_at=("7",))
    with pytest.raises(ValueError, match="divergence_at holds '7': expected middle, last or a block from 0 to 1"):
        built(data_terms=terms)


def test_accumulated_batches_make_the_step_of_one_large_batch():
    large, small = make_learner(), make_learner()
    fit(large, make_data(batch_size=2), max_steps=2)
    fit(small, make_data(batch_size=1), max_steps=2, accumulate_grad_batches=2)
    for name, value in logits_of(large).items():
        torch.testing.assert_close(logits_of(small)[name], value, rtol=1e-3, atol=1e-4)


def test_a_learning_rate_schedule_steps_with_the_optimizer():
    learner = make_learner(lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 4))
    trainer = fit(learner, max_steps=3)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.05 / 4)


@pytest.mark.parametrize(("limits", "steps"), [({"max_steps": 3}, 3), ({"max_steps": -1, "max_epochs": 2}, 8)])
def test_a_cosine_ends_with_the_run(limits, steps):
    spy = Spy()
    trainer = fit(make_learner(lr_scheduler="cosine"), make_data(sequences=4), callbacks=[spy], **limits)
    rates = [0.05 * (1 + math.cos(math.pi * step / steps)) / 2 for step in range(steps + 1)]
    assert spy.step_sizes == pytest.approx(rates[:-1])
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("steps", "told"), [(9, True), (2, False)])
def test_epochs_that_end_before_the_steps_do_are_told(steps, told, caplog):
    fit(make_learner(), make_data(sequences=4), max_steps=steps, max_epochs=2)
    said = "learning ends with epoch 2, after 8 of the 9 steps of max_steps: raise --trainer.max_epochs"
    assert (said in caplog.messages) == told
    assert ("--trainer.max_epochs" in caplog.text) == told


def test_a_cosine_that_was_resumed_ends_with_the_longer_run(tmp_path):
    fit(make_learner(lr_scheduler="cosine"), max_steps=2).save_checkpoint(tmp_path / "half.ckpt")
    spy = Spy()
    fit(make_learner(lr_scheduler="cosine"), max_steps=4, ckpt_path=tmp_path / "half.ckpt", callbacks=[spy])
    assert spy.step_sizes == pytest.approx([0.0, 0.05 * (1 + math.cos(math.pi * 3 / 4)) / 2], abs=1e-12)


def test_inactive_gates_learn_from_some_tokens():
    exact, some = Spy(), Spy()
    fit(make_learner(), max_steps=1, callbacks=[exact])
    fit(make_learner(inactive_gate_stride=4), max_steps=1, callbacks=[some])
    assert exact.logged[0]["loss/total"] == some.logged[0]["loss/total"]
    pairs = [(gradient, some.gradients[0][name]) for name, gradient in exact.gradients[0].items()]
    near = torch.stack([torch.nn.functional.cosine_similarity(one, two, dim=0) for one, two in pairs])
    assert near.max() < 0.99999
    assert near.mean() > 0.5  # eight tokens stand for 32


def test_a_stride_of_no_tokens_is_refused():
    with pytest.raises(ValueError, match="inactive_gate_stride is 0: expected a whole number of at least 1"):
        make_learner(inactive_gate_stride=0)


def test_a_cosine_needs_an_end():
    with pytest.raises(ValueError, match="cosine needs a run with an end: give the trainer max_steps"):
        fit(make_learner(lr_scheduler="cosine"), max_steps=-1, max_epochs=-1)


# -- settings that shape the plan ----------------------------------------------------------------------------------


def test_the_target_moves_from_its_start_to_keep():
    spy = Spy()
    learner = make_learner(keep_start=0.9, keep_steps=4)
    fit(learner, max_steps=6, callbacks=[spy])
    assert [step["keep/target"] for step in spy.logged] == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.5, 0.5])
    assert spy.logged[0]["keep/expected"] == pytest.approx(0.9, abs=0.01)
    assert learner.plan().keep_targeted <= 0.5


def test_masks_start_from_a_plan(tmp_path):
    first = built()
    names = list(first.masks)
    wishes = {name: 12.0 if number % 2 else 3.0 for number, name in enumerate(names)}
    plan = first.budget.fit(wishes, method="hand")
    learner = built(start=plan.save(tmp_path / "plan.json"))
    for name, mask in learner.masks.items():
        entry = plan.modules[name]
        assert mask.ratio().item() == pytest.approx(entry.numbers(4) / entry.dense_parameters, abs=0.005)
    assert {name: entry.rank for name, entry in learner.plan().modules.items()} == pytest.approx(
        {name: entry.rank for name, entry in plan.modules.items()}, abs=1
    )


STARTING = [ARA(), LLRC(), LLRC(any_k=False), ARS(), ARS(any_k=True), DobiSVD(), Fermi()]


@pytest.mark.parametrize("name", ["fisher", "zs_svd"])
@pytest.mark.parametrize("method", STARTING, ids=lambda method: f"{method.name}-{'any_k' if method.any_k else 'first'}")
def test_every_mask_starts_at_exactly_the_ranks_of_an_allocated_plan(method, name):
    kind = {"fisher": "two_sided", "zs_svd": "whitened"}[name]
    learner = built(mask=method, start=name, keep=0.7, decomposition=Decomposition(kind))
    plan = learner._start_plan(subject_of(make_data()))
    assert plan.method == name
    assert len({module.rank for module in plan.modules.values()}) > 3
    for key, mask in learner.masks.items():
        entry = plan.modules[key]
        if entry.rank is None:
            assert mask.ratio().item() >= min(1.0, method.dense_from) - 1e-6
        else:
            assert mask.kept().sum().item() == entry.rank
    assert {n: m.rank for n, m in learner.plan().modules.items()} == {n: m.rank for n, m in plan.modules.items()}


def test_every_mask_that_takes_a_start_is_tried():
    kinds = [kind for kind in vars(masks).values() if isinstance(kind, type) and issubclass(kind, masks.MaskMethod)]
    starting = {kind for kind in kinds if not inspect.isabstract(kind) and not kind.own_start}
    assert starting == {type(method) for method in STARTING}


@pytest.mark.parametrize("name", ["uniform", "zs_svd"])
def test_masks_start_from_a_plan_that_an_allocator_makes(name):
    learner = built(start=name, keep=0.6)
    method = make_allocator(name)
    plan = allocate_on(learner.store, subject_of(make_data()), learner.budget, method)
    for key, mask in learner.masks.items():
        entry = plan.modules[key]
        assert mask.ratio().item() == pytest.approx(
            min(1, entry.numbers(4) / entry.dense_parameters), abs=sum(mask.shape) / (2 * entry.dense_parameters)
        )
    assert method.needs_gradients is (name == "zs_svd")


def test_an_allocator_makes_the_start_for_the_first_target():
    learner = built(start="uniform", keep_start=0.8, keep_steps=5)
    assert sum(mask.ratio().item() for mask in learner.masks.values()) / 14 == pytest.approx(0.8, abs=0.05)


def test_a_start_that_is_neither_file_nor_allocator_is_refused():
    with pytest.raises(ValueError, match="'fishr', which is no file, and no allocator is called 'fishr': expected one"):
        make_learner(start="fishr")


@pytest.mark.parametrize("path", ["runs/plan", "plan.json", Path("uniform")])
def test_a_start_that_looks_like_a_file_has_to_be_one(path):
    with pytest.raises(ValueError, match=f"no plan at .*{path}"):
        make_learner(start=path)


def test_masks_of_prefixes_start_from_the_count_of_a_subset_and_say_so(tmp_path, caplog):
    first = built()
    scores = {name: torch.arange(min(shape)).float() for name, shape in first.budget.shapes.items()}
    plan = first.budget.select(scores, method="hand")
    learner = built(start=plan.save(tmp_path / "plan.json"))
    assert "keep components that are not the first ones: masks of ara start from as many" in caplog.text
    for name, mask in learner.masks.items():
        entry = plan.modules[name]
        assert mask.ratio().item() == pytest.approx(entry.numbers(4) / entry.dense_parameters, abs=0.005)


# -- one order for every size --------------------------------------------------------------------------------------


def annealed(**changes):
    return make_learner(**{"keep": 0.3, "keep_start": 0.9, "keep_steps": 12, "record_order": True, **changes})


@pytest.mark.parametrize("mask", [ARS(), LLRC(export_prefix=True, start_high=0.4, start_low=0.2)], ids=["ars", "llrc"])
def test_an_order_leaves_prefixes_to_methods_whose_plans_keep_prefixes(mask):
    learner = annealed(mask=mask)
    fit(learner, max_steps=16)
    assert not learner.plan().any_k_modules


def test_components_are_ordered_by_when_they_were_last_kept():
    class Watch(Callback):
        def __init__(self):
            self.last = {}

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            for name, mask in pl_module.masks.items():
                kept = [True] * mask.rank if mask.ratio() >= 1 else mask.kept().tolist()
                for j, on in enumerate(kept):
                    if on:
                        self.last[name, j] = trainer.global_step

    learner, watch = annealed(), Watch()
    fit(learner, max_steps=16, callbacks=[watch])
    scores = learner.lifetimes.scores()
    for name, mask in learner.masks.items():
        # step 0, before the first batch, had the first prefix
        expected = [watch.last.get((name, j), -1) - j / mask.rank for j in range(mask.rank)]
        for j, value in enumerate(scores[name].tolist()):
            assert value == pytest.approx(expected[j]) or value in (-j / mask.rank, -1 - j / mask.rank)
    assert len({round(value.max().item()) for value in scores.values()}) <= 2
    plan = learner.plan()
    assert plan.method == "ara"
    assert plan.keep_targeted <= 0.3
    assert "components in the order in which they were last kept from keep 0.9 to 0.3" in plan.notes
    assert torch.equal(plan.order.scores["model.layers.0.mlp.up_proj"], scores["model.layers.0.mlp.up_proj"].float())


def test_the_order_survives_a_checkpoint(tmp_path):
    def saving(folder):
        return ModelCheckpoint(folder, every_n_train_steps=5, save_top_k=-1, filename="{step}")

    whole, rest = annealed(), annealed()
    fit(whole, max_steps=14, enable_checkpointing=True, callbacks=[saving(tmp_path)])
    path = tmp_path / "step=5.ckpt"
    with pytest.warns(UserWarning, match="The dirpath has changed"):
        fit(rest, max_steps=14, ckpt_path=path, enable_checkpointing=True, callbacks=[saving(tmp_path / "rest")])
    assert torch.equal(whole.lifetimes.last, rest.lifetimes.last)
    with pytest.raises(ValueError, match=r"15 masks differ|masks differ, e\.g\. lifetimes\.last"):
        built(keep=0.3).on_load_checkpoint(read_checkpoint(path))


@pytest.mark.parametrize(
    ("changes", "given"),
    [({"keep_start": None, "keep_steps": 0}, "None and 0.3"), ({"keep_start": 0.2}, "0.2 and 0.3")],
)
def test_an_order_needs_a_target_that_comes_down(changes, given):
    with pytest.raises(ValueError, match=rf"record_order needs a start\.keep above keep: they are {given}"):
        annealed(**changes)


def test_a_plan_that_does_not_cover_the_modules_is_refused(tmp_path):
    plan = built(include=("*.mlp.*",)).plan()
    missing = r"model\.layers\.0\.self_attn\.q_proj and 7 more modules"
    with pytest.raises(
        ValueError, match=rf"{missing}: .* the same include and exclude, or .* \(--model\.start\.plan\)"
    ):
        built(start=plan.save(tmp_path / "plan.json"))


@pytest.fixture(scope="module")
def constrained():
    """The plan of a learner with every kind of constraint."""
    learner = make_learner(
        multiple_of=4, floors={"*.k_proj": 1.0, "*.up_proj": 0.6}, exclude=("*.down_proj",), include=("*.layers.*",)
    )
    fit(learner, max_steps=2)
    return learner.plan()


def test_what_is_excluded_is_not_in_the_plan(constrained):
    assert not any("down_proj" in name for name in constrained.modules)


def test_floors_hold(constrained):
    assert all(entry.rank is None for name, entry in constrained.modules.items() if "k_proj" in name)
    kept = {name: entry.numbers(4) / entry.dense_parameters for name, entry in constrained.modules.items()}
    assert min(share for name, share in kept.items() if "up_proj" in name) >= 0.6


def test_ranks_are_multiples_within_the_budget(constrained):
    assert {entry.rank % 4 for entry in constrained.modules.values() if entry.rank} == {0}
    assert constrained.keep_targeted <= 0.5


def test_impossible_floors_are_refused():
    with pytest.raises(ValueError, match=r"the floors and multiple_of 1 need at least .*: raise keep or lower them"):
        built(floors={"*": 0.9})


def test_the_plan_says_where_its_factors_come_from():
    learner = built()
    plan = RankPlan.from_json(learner.plan().to_json())
    assert plan.origin["base"] == "random:llama"
    assert plan.origin["calibration"] == {"text": "python-docs", "length": 32, "windows": 8}
    assert plan.fingerprint == learner.store.fingerprint
    assert any(note.startswith("requested ranks scaled by") for note in plan.notes)


CONFIGS = ROOT / "configs"
# In place of texts from the hub and a model of billions of parameters.
SMALL = """
    --model.base.name random:llama --data.batch_size 1
    --data.learning.text python-docs --data.learning.length 32 --data.learning.sequences 8
    --data.statistics.length 32 --data.statistics.sequences 8 --data.validation.sequences 2
    --trainer.max_steps 2 --trainer.accelerator cpu --trainer.val_check_interval 2 --finish.baselines []
"""


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.parametrize(
    "name", ["llrc", "llrc_whitened", "llrc_two_sided", "fisher_llrc", "ars", "dobi_svd", "fermi", "rescaled", "best"]
)
def test_the_shipped_configuration_of_every_mask_runs(tmp_path, name):
    main(["fit", "-c", str(CONFIGS / f"{name}.yaml"), "--run", str(tmp_path), *SMALL.split()])
    plan = RankPlan.load(tmp_path / "plan.json")
    method = "rescaled" if name == "best" else "llrc" if "llrc" in name else name
    assert plan.method == method
    assert plan.storage == ("auto" if name in ("rescaled", "best") else "factored")
    assert any(note.startswith("refitted ") for note in plan.notes) == (name == "best")
    text = (CONFIGS / f"{name}.yaml").read_text()
    kind = {"llrc": LLRC, "ars": ARS, "dobi_svd": DobiSVD, "fermi": Fermi}.get(method, Rescaled)
    # Every setting is written out, so that a reader need not look anywhere else.
    for setting in inspect.signature(kind).parameters:
        assert f"      {setting}: " in text


# -- validation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sanity", [0, 1])
def test_validation_is_the_perplexity_of_the_compressed_model(sanity):
    learner, data = make_learner(), make_data(validation_batch_size=2)
    trainer = fit(learner, data, max_epochs=1, num_sanity_val_steps=sanity)
    dense = perplexity(tiny_model("llama"), data.validation_sequences)
    small = perplexity(compress(tiny_model("llama"), learner.plan(), learner.store), data.validation_sequences)
    assert trainer.callback_metrics["val/perplexity"].item() == pytest.approx(small.perplexity, rel=1e-4)
    assert trainer.callback_metrics["val/excess"].item() == pytest.approx(small.nats - dense.nats, abs=1e-5)
    assert {layer.computation for layer in learner.layers.values()} <= {"mask", "dense"}


class Poison(Callback):
    """Makes the embedding of one token NaN."""

    def __init__(self, token):
        self.token = token

    def on_validation_start(self, trainer, pl_module):
        with torch.no_grad():
            pl_module.model.get_input_embeddings().weight[self.token] = math.nan


def test_one_sequence_of_nan_among_others_is_an_error():
    data = make_data()
    first, *_, last = data.validation_sequences
    token = next(token for token in last.tolist() if token not in first.tolist())
    with pytest.raises(ValueError, match="validation of the hard plan gave nan nats a token"):
        fit(make_learner(), data, max_epochs=1, callbacks=[Poison(token)])


def test_early_stopping_watches_the_hard_plan():
    stop = EarlyStopping("val/excess", patience=1, min_delta=100.0)
    trainer = fit(make_learner(), max_epochs=5, callbacks=[stop])
    assert trainer.current_epoch == 2


# -- checkpoints ---------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(learned):
    return learned[2]


def test_a_checkpoint_of_another_model_is_refused(checkpoint, tmp_path):
    base = save_base(tmp_path / "deeper", tiny_model("llama", layers=4))
    with pytest.raises(
        ValueError, match=r"does not fit this run: factors is .*14 of 28 masks differ, e\.g\. .*layers\.2\."
    ):
        fit(make_learner(base), max_steps=4, ckpt_path=checkpoint)


def test_a_checkpoint_of_the_same_factors_and_masks_is_taken(checkpoint):
    built().on_load_checkpoint(read_checkpoint(checkpoint))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"decomposition": Decomposition(kind="svd")},
            r"factors is '.*' there and '.*' here\. Resume with the settings",
        ),
        ({"mask": ARA(steps=50)}, r"14 of 14 masks differ, e\.g\. .*logits: \[101\] there, \[51\] here"),
    ],
    ids=["factors", "masks"],
)
def test_a_checkpoint_of_something_else_is_refused(checkpoint, changes, message):
    with pytest.raises(ValueError, match=message):
        built(**changes).on_load_checkpoint(read_checkpoint(checkpoint))


def test_a_checkpoint_that_is_not_ours_is_refused():
    with pytest.raises(ValueError, match="was not written by this version of lowrank_pl"):
        built().on_load_checkpoint({"state_dict": {}})


class Evil:
    def __reduce__(self):
        return (print, ("code ran",))


@pytest.fixture
def evil(tmp_path, capsys):
    path = tmp_path / "evil.ckpt"
    torch.save({"state_dict": {}, "x": Evil()}, path)
    yield path
    assert "code ran" not in capsys.readouterr().out


@pytest.mark.parametrize("read", [read_checkpoint, AtomicCheckpoints().load_checkpoint])
def test_a_checkpoint_that_would_run_code_is_refused(evil, read):
    with pytest.raises(ValueError, match=r"evil\.ckpt is no checkpoint of a run of ours"):
        read(evil)


def test_lightning_runs_no_code_of_a_checkpoint(evil):
    with pytest.raises(Exception, match="Weights only load failed"):
        fit(make_learner(), max_steps=1, ckpt_path=evil)


def test_a_checkpoint_that_is_absent_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no checkpoint at .*none\.ckpt: expected a file that a run of ours wrote"):
        read_checkpoint(tmp_path / "none.ckpt")


def test_a_file_that_is_no_checkpoint_is_named(tmp_path):
    (tmp_path / "text.ckpt").write_text("no zip")
    with pytest.raises(ValueError, match=r"text\.ckpt is damaged or no checkpoint of a run of ours \(.*\): resume"):
        read_checkpoint(tmp_path / "text.ckpt")


def test_a_tensor_is_no_checkpoint(tmp_path):
    torch.save(torch.ones(2), tmp_path / "tensor.ckpt")
    with pytest.raises(ValueError, match="holds a Tensor: expected a checkpoint"):
        read_checkpoint(tmp_path / "tensor.ckpt")


def test_a_checkpoint_whose_tensor_is_marked_as_a_folder_is_refused(tmp_path):
    path = tmp_path / "a.ckpt"
    AtomicCheckpoints().save_checkpoint({"a": torch.arange(300.0)}, path)
    whole = bytearray(path.read_bytes())
    entry = whole.rindex(b"PK\x01\x02", 0, whole.rindex(b"/data/0"))
    whole[entry + 38] ^= 0x10  # The attributes of this entry in the table of contents.
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=r"a\.ckpt is damaged \(.*data/0 is marked as a folder\): resume"):
        read_checkpoint(path)


def test_flipped_bits_of_a_checkpoint_are_found(tmp_path):
    written = {"a": torch.arange(300.0), "state": {"b": torch.ones(5), "n": 3}}
    path = tmp_path / "a.ckpt"
    AtomicCheckpoints().save_checkpoint(written, path)
    whole, silent = path.read_bytes(), 0
    places = range(0, len(whole), 13)
    for place in places:
        data = bytearray(whole)
        data[place] ^= 16
        path.write_bytes(data)
        with suppress(ValueError):
            read = read_checkpoint(path)
            # Bytes between the parts of a file mean nothing.
            assert torch.equal(read["a"], written["a"])
            assert torch.equal(read["state"]["b"], written["state"]["b"])
            assert read["state"]["n"] == 3
            silent += 1
    assert silent < len(places) / 2


def test_a_checkpoint_that_was_cut_off_is_found(tmp_path):
    path = tmp_path / "a.ckpt"
    AtomicCheckpoints().save_checkpoint({"a": torch.arange(300.0)}, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"a\.ckpt is damaged"):
        read_checkpoint(path)


def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    AtomicCheckpoints().save_checkpoint({"step": 1}, path)

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        AtomicCheckpoints().save_checkpoint({"step": 2}, path)
    assert AtomicCheckpoints().load_checkpoint(path) == {"step": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_the_model_is_built_once():
    learner = make_learner()
    trainer = fit(learner, max_steps=1)
    model = learner.model
    trainer.validate(learner, make_data(), verbose=False)
    assert learner.model is model
    assert sum(isinstance(module, MaskedLinear) for module in model.modules()) == 14


def test_masks_refuse_embeddings_before_anything_is_loaded():
    with pytest.raises(
        ValueError, match=r"gate linear layers only.*allocate --method fisher --include '\*' embeddings"
    ):
        RankLearner(Base("no/such/model"), constraints=Constraints(include=("*", "embeddings")))


def test_masks_refuse_shared_factors_before_anything_is_loaded():
    with pytest.raises(ValueError, match=r"shared_experts is true, .*`lowrank allocate`"):
        RankLearner(Base("no/such/model"), constraints=Constraints(shared_experts=True))


def test_a_plan_to_start_from_is_refused_before_the_base_is_loaded_where_masks_start_by_themselves():
    with pytest.raises(ValueError, match=r"rescaled have a start of their own.*--model\.start\.plan"):
        RankLearner(
            Base("no/such-base"),
            mask=masks.Rescaled(),
            decomposition=Decomposition("two_sided"),
            start=Start(plan="uniform"),
        )
