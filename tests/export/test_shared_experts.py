"""Experts that share a right factor, from the constraint to the reloaded export."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lowrank_pl.calibration.subject import Subject
from lowrank_pl.cli.doctor import doctor
from lowrank_pl.cli.quantize import quantize as quantize_plan
from lowrank_pl.export.export import load_compressed, save_compressed
from lowrank_pl.factors.components import AnySize
from lowrank_pl.factors.compression import compress, compressed
from lowrank_pl.factors.settings import Decomposition
from lowrank_pl.methods.allocate.run import allocate_ranks
from lowrank_pl.methods.quantize.quantizing import quantize
from lowrank_pl.methods.quantize.settings import Rounding
from lowrank_pl.methods.recipes import recipe
from lowrank_pl.methods.refit.plan import UNCHANGED
from lowrank_pl.methods.refit.refitting import Refit, refit
from lowrank_pl.methods.refit.settings import Joint
from lowrank_pl.models.base import load_base
from lowrank_pl.models.hf_format import LowRankConfig
from lowrank_pl.models.hf_layers import LowRankLinear, SharedLowRankLinear
from lowrank_pl.models.tiny import byte_tokenizer
from lowrank_pl.plans.constraints import Constraints
from lowrank_pl.plans.plan import ModulePlan
from lowrank_pl.plans.resize import nested
from lowrank_pl.report.page_cells import cells
from lowrank_pl.report.rank_map import rank_map, rank_table
from lowrank_pl.serving.optimize import optimized
from lowrank_pl.training.heal_start import HealStart

GATES = "model.layers.0.mlp.experts.gate_proj"
OWNER = "model.layers.0.mlp.experts.0.gate_proj"
OTHER = "model.layers.0.mlp.experts.2.gate_proj"
WHITENED = Decomposition("whitened")


def subject_of(sequences, family="mixtral", **constraints):
    given = {"include": ["*experts*"], "shared_experts": True, **constraints}
    return Subject(load_base(f"random:{family}"), byte_tokenizer(), sequences[:4], Constraints(**given))


@pytest.fixture(scope="module")
def made(sequences, tmp_path_factory):
    """A plan at half the size in which all experts share, and its factors."""
    store = tmp_path_factory.mktemp("shared") / "factors"
    subject = subject_of(sequences, storage="factored")
    return allocate_ranks(subject, keep=0.5, allocator="uniform", decomposition=WHITENED, store=store)


@pytest.fixture(scope="module")
def small(made):
    return compress(load_base("random:mixtral"), *made)


@pytest.fixture(scope="module")
def folder(small, made, tmp_path_factory):
    place = tmp_path_factory.mktemp("export") / "small"
    save_compressed(small, place, tokenizer=byte_tokenizer(), plan=made[0])
    return place


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "llama4"])
@torch.no_grad()
def test_factors_of_full_rank_give_the_dense_logits(family, sequences, tmp_path):
    subject = subject_of(sequences, family, include=["*.experts.*gate_proj", "*.experts.*up_proj"])
    plan, factors = allocate_ranks(
        subject, keep=0.5, allocator="uniform", decomposition=Decomposition("whitened"), store=tmp_path / "factors"
    )
    whole = {name: replace(one, rank=min(one.shape), indices=None) for name, one in plan.modules.items()}
    wanted = subject.model(sequences[:2]).logits
    with compressed(subject.model, replace(plan, modules=whole), factors) as model:
        torch.testing.assert_close(model(sequences[:2]).logits, wanted, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_a_stack_keeps_what_the_most_of_its_experts_needs(made, sequences):
    """Singular values are the errors of the stack: a basis for all experts, not the mean of theirs."""
    plan, factors = made
    base, entry = load_base("random:mixtral"), plan.modules[GATES]
    weights = torch.cat([base.get_submodule(layer).weight for layer in entry.layers])
    all_of_it = factors.factors(GATES)
    torch.testing.assert_close(all_of_it.left @ all_of_it.right, weights, rtol=1e-3, atol=1e-5)
    assert all_of_it.left.shape[0] == sum(base.get_submodule(layer).out_features for layer in entry.layers)
    assert all_of_it.right.shape[0] == min(weights.shape)


def test_the_file_holds_what_the_plan_counts_and_each_right_factor_once(made, folder):
    plan, _ = made
    tensors = load_file(folder / "model.safetensors")
    assert sum(tensor.numel() for tensor in tensors.values()) == plan.kept_model_parameters
    # Under the names of the family: one for all gates, one for all ups, and those of four downs.
    rights = [name for name in tensors if "layers.0." in name and "experts" in name and name.endswith("right")]
    assert len(rights) == 2 + 4
    stored = json.loads((folder / "config.json").read_text())["quantization_config"]
    rank = plan.modules[GATES].rank
    assert stored["schema"] == 6
    assert stored["modules"][OWNER] == rank
    assert stored["modules"][OTHER] == {"rank": rank, "storage": "shared", "right": OWNER}


@torch.no_grad()
def test_an_export_is_the_model_in_memory_and_healthy(small, folder, sequences):
    wanted = small(sequences[:2]).logits
    loaded = load_compressed(folder)
    assert torch.equal(loaded(sequences[:2]).logits, wanted)
    remote = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert torch.equal(remote(sequences[:2]).logits, wanted)
    found = {one.name: one.health for one in doctor(folder, sequences=1, length=32, max_new_tokens=2).findings}
    assert {found[name] for name in ("plan", "counts", "factors", "weights")} == {"healthy"}


@torch.no_grad()
def test_a_loaded_export_can_be_saved_copied_and_pickled(folder, sequences, tmp_path):
    loaded = load_compressed(folder)
    wanted = loaded(sequences[:2]).logits
    loaded.save_pretrained(tmp_path / "again")
    others = [load_compressed(tmp_path / "again"), copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))]
    for other in others:
        assert torch.equal(other(sequences[:2]).logits, wanted)
        layer = other.get_submodule(OTHER)
        assert layer.right is other.get_submodule(OWNER).right
        assert layer.right is not loaded.get_submodule(OWNER).right


@torch.no_grad()
def test_other_types_move_the_shared_factor_with_its_owner(folder, sequences):
    half = load_compressed(folder).to(torch.bfloat16)
    assert half.get_submodule(OTHER).right.dtype == torch.bfloat16
    assert half(sequences[:1]).logits.isfinite().all()


@torch.no_grad()
def test_merged_experts_have_the_format_of_their_family(small, made, sequences, tmp_path):
    report = save_compressed(small, tmp_path / "merged", tokenizer=byte_tokenizer(), plan=made[0], merge=True)
    assert report.verified
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(plain(sequences[:2]).logits, small(sequences[:2]).logits, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_smaller_sizes_are_cut_from_the_export(made, folder, sequences):
    plan, factors = made
    smaller = nested(plan, [0.3])[0.3]
    wanted = compress(load_base("random:mixtral"), smaller, factors)(sequences[:2]).logits
    cut = load_compressed(folder, keep=0.3)
    torch.testing.assert_close(cut(sequences[:2]).logits, wanted, rtol=1e-4, atol=1e-5)
    assert cut.get_submodule(OTHER).right is cut.get_submodule(OWNER).right
    assert cut.get_submodule(OTHER).rank == smaller.modules[GATES].rank < plan.modules[GATES].rank


@torch.no_grad()
def test_an_export_of_dense_experts_serves_sizes_in_which_they_share(made, sequences, tmp_path):
    plan, factors = made
    large = nested(plan, [1.0])[1.0]
    assert large.modules[GATES].rank is None
    model = compress(load_base("random:mixtral"), large, factors)
    tokenizer = byte_tokenizer()
    save_compressed(model, tmp_path / "large", tokenizer=tokenizer, plan=AnySize(large, factors), verify=False)
    cut = load_compressed(tmp_path / "large", keep=0.5)
    wanted = compress(load_base("random:mixtral"), plan, factors)(sequences[:2]).logits
    torch.testing.assert_close(cut(sequences[:2]).logits, wanted, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_optimized_experts_that_share_compute_the_same(folder, sequences):
    model = load_compressed(folder)
    wanted = model(sequences[:1]).logits
    with optimized(model):
        torch.testing.assert_close(model(sequences[:1]).logits, wanted, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_a_sharing_layer_compiles_without_a_break(folder):
    layer, rows = load_compressed(folder).get_submodule(OTHER), torch.randn(3, 32)
    assert torch.equal(torch.compile(layer, backend="eager", fullgraph=True)(rows), layer(rows))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft itself asks for it
def test_adapters_train_beside_shared_factors(folder, sequences):
    from peft import LoraConfig, get_peft_model

    adapters = LoraConfig(target_modules=["q_proj", "gate_proj"])
    model = get_peft_model(load_compressed(folder), adapters)
    model(input_ids=sequences[:1], labels=sequences[:1]).loss.backward()
    gradients = {name: one.grad for name, one in model.named_parameters() if one.requires_grad and "lora_B" in name}
    assert any(OTHER in name for name in gradients)
    assert all(one is None or one.isfinite().all() for one in gradients.values())
    assert any(one is not None for name, one in gradients.items() if OTHER in name)


def test_excluded_experts_share_nothing(sequences):
    targets = subject_of(sequences, exclude=["*experts.1.*"]).targets
    assert len(targets.stacks[GATES]) == 3
    assert targets.shapes[GATES][0] == 3 * targets.modules[0].shape[0]
    two = subject_of(sequences, include=["*experts.2.gate_proj", "*experts.3.gate_proj", "*experts.3.up_proj"]).targets
    assert {len(layers) for layers in two.stacks.values()} == {2}
    assert "model.layers.0.mlp.experts.3.up_proj" in two.shapes


def test_factors_of_some_experts_are_no_factors_of_all(sequences, made, tmp_path, monkeypatch):
    monkeypatch.setenv("LOWRANK_HOME", str(tmp_path))
    some = subject_of(sequences, exclude=["*experts.1.*"])
    _, factors = allocate_ranks(some, keep=0.5, allocator="uniform", decomposition=Decomposition("svd"))
    _, others = allocate_ranks(subject_of(sequences), keep=0.5, allocator="uniform", decomposition=Decomposition("svd"))
    assert factors.directory != others.directory
    assert len(factors.factors(GATES).left) < len(others.factors(GATES).left)


@pytest.mark.parametrize(
    ("modules", "text"),
    [
        ({"a": {"rank": 2, "storage": "shared"}}, 'rank, storage "shared" and right'),
        ({"a": {"rank": 2, "storage": "shared", "right": "b"}}, "share the right factor of 'b', whose entry is None"),
        ({"a": {"rank": 2, "storage": "shared", "right": "b"}, "b": 3}, "whose entry is 3"),
    ],
)
def test_a_configuration_without_the_owner_is_refused(modules, text):
    with pytest.raises(ValueError, match=text):
        LowRankConfig(modules)


def test_folders_without_shared_factors_keep_their_schema():
    assert [LowRankConfig({"a": 2}, experts=experts).schema for experts in (False, True)] == [1, 5]


def test_a_layer_shares_only_with_an_owner_of_its_sizes():
    layer = SharedLowRankLinear(8, 6, 2)
    with pytest.raises(RuntimeError, match="call share"):
        layer(torch.ones(8))
    with pytest.raises(ValueError, match=r"rank 2 and 8 inputs can't share .* of rank 3"):
        layer.share(LowRankLinear(8, 6, 3))
    layer.share(owner := LowRankLinear(8, 5, 2))
    with pytest.raises(ValueError, match="can't share the right factor of a SharedLowRankLinear"):
        SharedLowRankLinear(8, 6, 2).share(layer)
    assert layer.right is owner.right


def test_an_export_needs_the_layer_that_owns_the_factor(small, tmp_path):
    alone = copy.deepcopy(small)
    alone.get_submodule(OWNER.rpartition(".")[0]).gate_proj = copy.deepcopy(small.get_submodule(OWNER))
    with pytest.raises(ValueError, match="the model no longer has: compress its experts together"):
        save_compressed(alone, tmp_path / "no", tokenizer=byte_tokenizer(), verify=False)


def test_a_model_without_experts_that_share_an_input_is_refused(sequences):
    for family in ("llama", "jetmoe"):
        subject = subject_of(sequences, family, include=["*"])
        with pytest.raises(ValueError, match=r"no two targets are gates or ups .* leave it out"):
            _ = subject.targets


@pytest.mark.parametrize("settings", [Decomposition("asvd"), Decomposition("two_sided", at_keep=0.5)])
def test_decompositions_that_make_no_shared_factors_are_refused(sequences, settings):
    with pytest.raises(ValueError, match=r"shared_experts is true, .* take two_sided or whitened or svd"):
        allocate_ranks(subject_of(sequences), allocator="uniform", decomposition=settings)


@pytest.mark.parametrize("allocator", ["zs_svd", "svdllm_v2", "drank", "strs"])
def test_allocators_that_know_single_layers_are_refused(sequences, allocator):
    with pytest.raises(ValueError, match=f"{allocator} knows every layer by itself: allocate by fisher"):
        allocate_ranks(subject_of(sequences), allocator=allocator)


@pytest.mark.parametrize("name", ["ara+shared", "zs_svd+shared", "fisher+shared+int4", "bytes+shared"])
def test_recipes_that_share_nothing_are_refused(name):
    with pytest.raises(ValueError, match="leave out the others, or shared_experts"):
        recipe(name)


def test_what_fits_single_layers_refuses_a_plan_with_shared_factors(made, sequences, tmp_path):
    plan, factors = made
    file = plan.save(tmp_path / "plan.json")
    # Neither base nor factors are there yet.
    with pytest.raises(ValueError, match=r"share right factors, but .*round a plan without shared_experts"):
        quantize_plan(file, settings=Rounding(bits=4))
    with pytest.raises(ValueError, match=r"share right factors, but .*round a plan without shared_experts"):
        quantize(plan, factors, subject_of(sequences), settings=Rounding(bits=4))
    with pytest.raises(ValueError, match=r"share right factors, but .*heal a plan without shared_experts"):
        HealStart.find(file, teacher=None, store=None, trust_remote_code=False)


@torch.no_grad()
def test_a_refit_keeps_the_shared_factor_and_fits_each_left_one(made, sequences):
    plan, factors = made
    refitted, new = refit(plan, factors, subject_of(sequences), sequences=sequences, settings=Refit(sequences=16))
    # The first block's gates read what they read in the dense model.
    gates = GATES.replace(".0.", ".1.")
    before, after = (store.kept(gates, plan.modules[gates]) for store in (factors, new))
    assert torch.equal(after.right, before.right)
    assert not torch.equal(after.left, before.left)
    assert refitted.layers == plan.layers
    assert new.notes(GATES)["refit"] == UNCHANGED
    base = load_base("random:mixtral")
    wanted = base(sequences).logits.log_softmax(-1)

    def divergence(plan, store):
        with compressed(base, plan, store):
            found = base(sequences).logits.log_softmax(-1)
        return (wanted.exp() * (wanted - found)).sum(-1).mean()

    assert divergence(refitted, new) < divergence(plan, factors)


def test_a_joint_refit_of_shared_factors_is_refused(made, sequences):
    with pytest.raises(ValueError, match=r"share right factors, but .*leave the joint refit out"):
        refit(*made, subject_of(sequences), sequences=sequences, settings=Refit(sequences=16, joint=Joint()))


def test_a_plan_of_other_layers_than_the_model_s_is_refused(made):
    plan, factors = made
    name = GATES.replace(".0.", ".1.")
    wrong = ModulePlan(plan.modules[GATES].shape, 3, layers=("model.layers.9.a", "model.layers.9.b"))
    with pytest.raises(ValueError, match=r"names model\.layers\.9\.a, which the model lacks"):
        compress(load_base("random:mixtral"), replace(plan, modules={**plan.modules, name: wrong}), factors)


def test_tables_and_maps_show_one_module_for_the_experts_of_a_block(made):
    plan, _ = made
    assert "mlp.experts.gate_proj" in rank_table(plan)
    shown = {cell.name: cell for cell in cells(plan, {})}
    assert not any(cell.fell_back for cell in shown.values())
    assert "the right one shared by 4 experts" in shown[GATES].description
    assert shown[GATES].expert is None
    figure = rank_map(plan)
    assert figure.axes[0].get_yticklabels()[0].get_text() == "mlp.experts.gate_proj"
