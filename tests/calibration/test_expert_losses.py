"""What it costs to drop experts: the same as by running the mixture without them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional

from lowrank_pl.calibration.build import build_factors, statistics_of
from lowrank_pl.calibration.build_by_block import build_factors_by_block
from lowrank_pl.calibration.expert_losses import DroppedLosses, expert_losses
from lowrank_pl.calibration.gradients import collect_gradients
from lowrank_pl.calibration.measures import Passes
from lowrank_pl.calibration.subject import Subject
from lowrank_pl.factors.settings import Decomposition
from lowrank_pl.models.base import load_base
from lowrank_pl.models.hf_experts import drop_experts
from lowrank_pl.models.lazy import open_skeleton
from lowrank_pl.models.targets import find_targets
from lowrank_pl.models.tiny import byte_tokenizer, tiny_model
from lowrank_pl.plans.constraints import Constraints

EXPERTS = "model.layers.0.mlp.experts"


@pytest.fixture(autouse=True)
def _fresh_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LOWRANK_HOME", str(tmp_path / "home"))


def experts_of(model):
    return [target for target in find_targets(model).modules if target.experts]


def one_call(model, tokens):
    """Arguments, output and gradient by the output of the first block's experts, for the loss of the text."""
    seen = {}

    def hook(_, args, output):
        seen["args"] = [part.detach() for part in args]
        seen["output"] = output
        output.retain_grad()

    handle = model.get_submodule(EXPERTS).register_forward_hook(hook)
    logits = model(input_ids=tokens).logits
    functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum").backward()
    handle.remove()
    return seen["args"], seen["output"].detach(), seen["output"].grad


def loss_without(model, call, dropped, labels):
    args, output, gradient = call
    other = copy.deepcopy(model)
    drop_experts(other, [f"{EXPERTS}.{number}" for number in dropped])
    with torch.no_grad():
        change = other.get_submodule(EXPERTS)(*args) - output
    return float((gradient * change).sum(dim=-1).double().square().sum() / 2 / labels)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_losses_are_those_of_running_the_mixture_without_the_experts(family, sequences):
    model, tokens = load_base(f"random:{family}"), sequences[:2]
    measured = collect_gradients(DroppedLosses, model, experts_of(model), Passes(tokens, batch_size=2))[EXPERTS]
    assert measured.chosen == 2
    found = measured.tensors()
    model.requires_grad_(True)
    call, labels = one_call(model, tokens), tokens[:, 1:].numel()
    for number in range(4):
        expected = loss_without(model, call, [number], labels)
        assert found["single"][number] == pytest.approx(expected, rel=1e-3)
    both = found["single"][0] + found["single"][2] + found["both"][0, 2]
    assert both == pytest.approx(loss_without(model, call, [0, 2], labels), rel=1e-3)
    assert torch.equal(found["both"], found["both"].mT)


def test_factors_by_block_have_the_same_losses_beside_them(tokenizer, sequences, tmp_path):
    tiny_model("mixtral").save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    constraints, settings = Constraints(drop_experts=True), Decomposition("two_sided")
    base = str(tmp_path / "base")
    skeleton, model = open_skeleton(base), load_base(base)
    subjects = [
        Subject(of, tokenizer, sequences[:2], constraints, known_targets=find_targets(model))
        for of in (skeleton.model, model)
    ]
    build_factors_by_block(skeleton, subjects[0], settings=settings, directory=tmp_path / "by_block")
    build_factors(subjects[1], settings=settings, directory=tmp_path / "whole")
    stores = [
        statistics_of(subject, directory=tmp_path / name, parameters=parameters).collect(
            "dropped_losses", experts_of(model), "sampled"
        )
        for subject, name, parameters in zip(
            subjects, ("by_block", "whole"), (skeleton.parameters(), None), strict=True
        )
    ]
    for part in ("single", "both", "rows"):
        one, two = (store.read(EXPERTS, part) for store in stores)
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-9)


def test_an_expert_that_no_token_reaches_costs_half_a_token(sequences):
    model = load_base("random:mixtral")

    def shun(_, __, output):
        logits, weights, index = output
        return logits, weights, torch.where(index == 1, 0, index)

    model.model.layers[0].mlp.gate.register_forward_hook(shun)
    targets = find_targets(model)
    statistics = statistics_of(Subject(model, byte_tokenizer(), sequences[:2]))
    losses = expert_losses(statistics.collect("dropped_losses", experts_of(model), "text"), model, targets)[EXPERTS]
    assert 0 < losses.single[1] < min(losses.single[[0, 2, 3]]) / 10
    assert losses.matrices[1] == tuple(f"{EXPERTS}.1.{kind}_proj" for kind in ("gate", "up", "down"))


def test_experts_with_matrices_that_are_no_targets_are_not_dropped(sequences):
    model = load_base("random:mixtral")
    subject = Subject(model, byte_tokenizer(), sequences[:2], Constraints(exclude=["*experts.3.up_proj"]))
    store = statistics_of(subject).collect("dropped_losses", experts_of(model), "text")
    assert [*expert_losses(store, model, subject.targets)[EXPERTS].matrices] == [0, 1, 2]
