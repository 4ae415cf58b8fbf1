"""Statistics of experts: what a rare one is predicted to cost, and what stands in where few tokens reach one."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from lowrank_pl.calibration.build import build_factors, statistics_of
from lowrank_pl.calibration.build_by_block import build_factors_by_block
from lowrank_pl.calibration.experts import own_weight
from lowrank_pl.calibration.provenance import preparation_notes
from lowrank_pl.calibration.roots import Roots
from lowrank_pl.calibration.subject import Subject
from lowrank_pl.factors.decomposition import decompose, square_root, truncate
from lowrank_pl.factors.settings import Decomposition
from lowrank_pl.factors.store import FactorStore
from lowrank_pl.models.base import load_base
from lowrank_pl.models.lazy import open_skeleton
from lowrank_pl.models.tiny import byte_tokenizer, tiny_model
from lowrank_pl.plans.constraints import Constraints
from lowrank_pl.utils.distributed import cooperating
from tests.helpers.two_processes import in_two_processes

EXPERTS = "model.layers.1.mlp.experts"


@pytest.fixture(autouse=True)
def _fresh_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LOWRANK_HOME", str(tmp_path / "home"))


class Router(nn.Module):
    """Sends each token to the expert that ``choose`` names for its place in the batch, with one weight."""

    def __init__(self, choose, weight=1.0):
        super().__init__()
        self.choose, self.weight = choose, weight

    def forward(self, hidden):
        index = self.choose(torch.arange(hidden.shape[:-1].numel()))[:, None]
        return None, torch.full(index.shape, self.weight), index


def mixture(choose, weight=1.0):
    """A tiny Mixtral whose second block routes by place, and whose other experts are never asked."""
    model = load_base("random:mixtral")
    model.model.layers[1].mlp.gate = Router(choose, weight)
    return model


def subject_of(model, tokenizer, sequences, include="*.1.*experts*"):
    return Subject(model, tokenizer, sequences, Constraints(include=[include]))


def loss(store, name, rank):
    return store.sigma(name)[rank:].square().sum().item() / 2


def every(number):
    """Let every so many-th token go to expert 1, all others to expert 0."""
    return lambda places: (places % number == 0).long()


KINDS = [
    Decomposition("whitened"),
    Decomposition("two_sided", labels="text"),
    Decomposition("two_sided", labels="text", token_weights=False),
]


@pytest.mark.parametrize("settings", KINDS, ids=["whitened", "two_sided", "kfac"])
def test_an_expert_with_half_of_the_traffic_costs_half(tokenizer, sequences, settings):
    twice = torch.cat([sequences[:2], sequences[:2]])
    whole = build_factors(subject_of(mixture(torch.zeros_like), tokenizer, twice), settings=settings, batch_size=4)
    model = mixture(lambda places: (places >= len(places) // 2).long())
    experts = model.get_submodule(EXPERTS)
    experts[1].load_state_dict(experts[0].state_dict())
    halved = build_factors(subject_of(model, tokenizer, twice), settings=settings, batch_size=4)
    for layer in ("gate_proj", "up_proj", "down_proj"):
        expected = loss(whole, f"{EXPERTS}.0.{layer}", 4) / 2
        for number in (0, 1):
            assert loss(halved, f"{EXPERTS}.{number}.{layer}", 4) == pytest.approx(expected, rel=1e-4)


@torch.no_grad()
def test_what_a_rare_expert_is_predicted_to_cost_is_what_it_costs(tokenizer):
    text = torch.randint(0, 256, (32, 64), generator=torch.Generator().manual_seed(0))
    model = mixture(every(8))
    store = build_factors(subject_of(model, tokenizer, text), settings=Decomposition("two_sided"), batch_size=32)
    before = model(text).logits[:, :-1].log_softmax(-1)
    for expert in (0, 1):
        name = f"{EXPERTS}.{expert}.down_proj"
        weight = model.get_submodule(name).weight
        whole, factors = weight.clone(), truncate(store.factors(name), 20)
        weight.copy_(factors.left @ factors.right)
        after = model(text).logits[:, :-1].log_softmax(-1)
        weight.copy_(whole)
        divergence = (before.exp() * (before - after)).sum(-1).mean().item()
        # Twice the fraction of its tokens, 1/8, would make the prediction of expert 1 an eighth.
        assert 0.7 < loss(store, name, 20) / divergence < 1.4


def test_without_gradients_the_squared_weight_of_the_router_counts(tokenizer, sequences, tmp_path):
    full, half = (
        build_factors(subject_of(mixture(every(4), weight), tokenizer, sequences), directory=tmp_path / str(weight))
        for weight in (1.0, 0.5)
    )
    name = f"{EXPERTS}.1.up_proj"
    assert loss(half, name, 4) == pytest.approx(loss(full, name, 4) / 4, rel=1e-4)


@pytest.mark.parametrize("kind", ["whitened", "two_sided", "asvd", "fwsvd"])
def test_an_expert_without_tokens_has_the_mean_of_its_block_and_half_a_token(tokenizer, sequences, kind, caplog):
    model, settings = mixture(every(4)), Decomposition(kind)
    subject = subject_of(model, tokenizer, sequences)
    with caplog.at_level(logging.WARNING):
        store = build_factors(subject, settings=settings)
    statistics = statistics_of(subject)
    roots = Roots(settings, statistics, subject.targets.modules, model.device)
    target = next(t for t in subject.targets.modules if t.name == f"{EXPERTS}.3.up_proj")
    ((inputs, _),) = roots.by_inputs([target])
    outputs = roots.of_outputs(target.name)
    found = store.notes(target.name)
    assert found["rows"] == "0"
    assert torch.isfinite(store.sigma(target.name)).all()
    assert store.sigma(target.name)[0] > 0
    if kind == "two_sided":
        entries = statistics.collect("weighted_moments", [target], settings.labels)
        names = [f"{EXPERTS}.{number}.up_proj" for number in (0, 1)]
        rows = sum(int(entries.notes(name)["rows"]) for name in names)
        tokens = int(found["tokens"])
        for root, side, share in ((inputs, "inputs", 1.0), (outputs, "outputs", 0.5 / tokens)):
            moment = sum(entries.read(name, side).double() for name in names) * tokens / rows * share
            damping = settings.damping if side == "inputs" else settings.output_damping
            torch.testing.assert_close(root.moment(), square_root(moment, damping=damping).moment())
    sentence = "experts: 2 of 4 saw fewer calibration tokens than half of their inputs, 2 of these none"
    assert sentence in caplog.text
    assert any(sentence in note for note in preparation_notes(subject.targets, store))


def test_factors_of_an_expert_do_not_depend_on_which_others_are_compressed(tokenizer, sequences, tmp_path):
    settings = Decomposition("two_sided")
    name = f"{EXPERTS}.1.gate_proj"
    every_one = build_factors(subject_of(mixture(every(8)), tokenizer, sequences), settings=settings)
    alone = build_factors(
        subject_of(mixture(every(8)), tokenizer, sequences, include=name), settings=settings, directory=tmp_path / "a"
    )
    torch.testing.assert_close(alone.sigma(name), every_one.sigma(name), rtol=0, atol=0)


def test_block_by_block_and_with_statistics_of_the_compressed_model(tokenizer, sequences, tmp_path):
    """With memory for one layer's sums, each layer of a block has a pass of its own."""
    model = load_base("random:qwen3_moe")
    subject = Subject(model, tokenizer, sequences)
    settings = Decomposition("two_sided", at_keep=0.7)
    store = build_factors(subject, settings=settings, directory=tmp_path / "whole")
    by_block = build_factors(subject, settings=settings, directory=tmp_path / "blocks", memory=1)
    for target in subject.targets.modules:
        assert torch.equal(by_block.sigma(target.name), store.sigma(target.name))


def test_a_text_that_reaches_no_expert_is_refused(tokenizer, sequences):
    model = mixture(every(4))
    subject = subject_of(model, tokenizer, sequences)
    with torch.no_grad():
        # Behind a head of zeros no gradient reaches them.
        model.lm_head.weight.zero_()
    with pytest.raises(ValueError, match=f"reached an expert of {EXPERTS}"):
        build_factors(subject, settings=Decomposition("two_sided"))


def test_the_mean_of_all_experts_fills_what_few_tokens_leave_open():
    """An expert of 64 inputs that saw 16 tokens, beside 8 that saw many; all moments are known."""
    generator = torch.Generator().manual_seed(0)
    size, rows = 64, 16

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    spectrum = torch.arange(1, size + 1, dtype=torch.float64) ** -1
    common = torch.linalg.qr(normal(size, size)).Q * spectrum.sqrt()
    roots = [(torch.eye(size) + 0.7 * normal(size, size) / size**0.5) @ common for _ in range(9)]
    moments = [root @ root.T for root in roots]
    seen = roots[0] @ normal(size, rows)
    own, everyone = seen @ seen.T / rows, torch.stack(moments).mean(0)
    weight = normal(48, size)

    def lost(share):
        factors = truncate(decompose(weight, inputs=square_root(torch.lerp(everyone, own, share))), 16)
        error = weight - factors.left @ factors.right
        return (error @ moments[0] @ error.T).trace().item()

    assert lost(own_weight(rows, size)) < 0.97 * min(lost(0.0), lost(1.0))


def decompose_files(_, folder):
    with cooperating():
        skeleton = open_skeleton(str(folder / "base"))
        text = torch.arange(4 * 32).view(4, 32) % 200
        subject = Subject(skeleton.model, byte_tokenizer(), text, known_targets=skeleton.find_targets())
        build_factors_by_block(
            skeleton, subject, settings=Decomposition("two_sided", labels="text"), directory=folder / "two"
        )


def test_two_processes_make_the_factors_of_one(tmp_path):
    tiny_model("qwen3_moe").save_pretrained(tmp_path / "base")
    in_two_processes(decompose_files, tmp_path)
    model = load_base(str(tmp_path / "base"))
    subject = Subject(model, byte_tokenizer(), torch.arange(4 * 32).view(4, 32) % 200)
    one = build_factors(subject, settings=Decomposition("two_sided", labels="text"), directory=tmp_path / "one")
    two = FactorStore.existing(tmp_path / "two")
    for target in subject.targets.modules:
        torch.testing.assert_close(two.sigma(target.name), one.sigma(target.name), rtol=1e-4, atol=1e-8)
        assert two.notes(target.name).get("rows") == one.notes(target.name).get("rows")


def test_the_stack_s_input_is_the_mean_over_what_its_experts_see(tokenizer, sequences):
    subject = Subject(
        load_base("random:mixtral"), tokenizer, sequences, Constraints(include=["*.1.*experts*"], shared_experts=True)
    )
    gates = subject.targets.among([f"{EXPERTS}.gate_proj"])
    roots = Roots(Decomposition("whitened"), statistics_of(subject), gates, torch.device("cpu"))
    found = roots.of_stack(gates)
    own = [roots.moment_of_inputs(target) for target in gates]
    torch.testing.assert_close(found.inputs.moment(), sum(own) / len(own), rtol=1e-4, atol=1e-6)
    traces = [scale**2 * found.inputs.moment().trace() for scale in found.outputs.scales]
    torch.testing.assert_close(torch.stack(traces), torch.stack([moment.trace() for moment in own]), rtol=1e-4, atol=0)


def test_factors_of_a_stack_are_the_same_block_by_block(tokenizer, sequences, tmp_path):
    constraints = Constraints(include=["*.1.*experts*"], shared_experts=True)
    whole = Subject(load_base("random:mixtral"), tokenizer, sequences[:4], constraints)
    wanted = build_factors(whole, settings=Decomposition("whitened"), directory=tmp_path / "whole")
    tiny_model("mixtral").save_pretrained(tmp_path / "base")
    skeleton = open_skeleton(str(tmp_path / "base"))
    targets = constraints.stacked(skeleton.find_targets(include=constraints.include))
    parts = Subject(skeleton.model, tokenizer, sequences[:4], constraints, known_targets=targets)
    found = build_factors_by_block(skeleton, parts, settings=Decomposition("whitened"), directory=tmp_path / "parts")
    name = f"{EXPERTS}.up_proj"
    torch.testing.assert_close(found.sigma(name), wanted.sigma(name))
    assert found.notes(name)["rows_of_layers"] == wanted.notes(name)["rows_of_layers"]
    assert preparation_notes(whole.targets, wanted) == preparation_notes(targets, found)
