"""Moments in which tokens count by the size of their gradient, against slow sums, and where they are better."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from lowrank_pl.calibration.build import build_factors, statistics_of
from lowrank_pl.calibration.gradients import measure_gradients
from lowrank_pl.calibration.statistics import Statistics
from lowrank_pl.calibration.subject import Subject
from lowrank_pl.calibration.weighted_moments import TokenNorms, WeightedMoments
from lowrank_pl.factors.decomposition import decompose, square_root, truncate
from lowrank_pl.factors.settings import Decomposition
from lowrank_pl.models.targets import find_targets


@pytest.fixture(autouse=True)
def _fresh_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LOWRANK_HOME", str(tmp_path / "home"))


def calls(model, targets, sequence):
    """Inputs and gradients of the summed loss of the text's next tokens, ``[length, features]``, float64, by module."""
    found = {}
    handles = [
        model.get_submodule(t.name).register_forward_hook(
            lambda _, args, output, t=t: found.update({t.name: (args[0], output.requires_grad_())})
        )
        for t in targets.modules
    ]
    with torch.enable_grad():
        logits = model(input_ids=sequence[None]).logits[0]
        loss = functional.cross_entropy(logits[:-1], sequence[1:], reduction="sum")
        gradients = torch.autograd.grad(loss, [output for _, output in found.values()])
    for handle in handles:
        handle.remove()
    pairs = zip(found.items(), gradients, strict=True)
    return {name: (inputs[0].detach().double(), gradient[0].double()) for (name, (inputs, _)), gradient in pairs}


@pytest.mark.parametrize("batch_size", [1, 2])
def test_moments_and_norms_are_those_of_slow_sums(llama, sequences, tokenizer, batch_size):
    targets, text = find_targets(llama), sequences[:3]
    statistics = statistics_of(Subject(llama, tokenizer, text), batch_size=batch_size)
    moments = statistics.weighted_moments(targets.modules, "text")
    norms = statistics.gradient_norms(targets.modules, "text")
    slow = [calls(llama, targets, sequence) for sequence in text]
    for target in targets.modules:
        x, g = (torch.cat([sequence[target.name][side] for sequence in slow]) for side in (0, 1))
        size = g.norm(dim=1)
        torch.testing.assert_close(
            norms.read(target.name, "norms").double(), size.view(text.shape), rtol=1e-3, atol=1e-4 * size.max().item()
        )
        count = len(text) * (text.shape[1] - 1)
        assert int(moments.notes(target.name)["tokens"]) == count
        inputs, outputs = x.T @ (size[:, None] * x) / count, g.T @ (g / size.clamp_min(1e-30)[:, None]) / count
        for found, expected in (("inputs", inputs), ("outputs", outputs)):
            torch.testing.assert_close(
                moments.read(target.name, found).double(), expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item()
            )


def test_last_tokens_count_nothing_and_scales_cancel():
    x, g = torch.randn(6, 4), torch.randn(6, 3)
    one, two = WeightedMoments.empty((3, 4)), WeightedMoments.empty((3, 4))
    one.add(x, g, tokens=6, batch=0)
    two.add(torch.cat([x, 7 * x]), torch.cat([1e-25 * g, 0 * g]), tokens=6, batch=0)
    # The product of both sides is of the size of the gradients' squares, whatever the scale.
    torch.testing.assert_close(two.mean_inputs * 1e25, one.mean_inputs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(two.mean_outputs * 1e25, one.mean_outputs, rtol=1e-4, atol=1e-4)


def test_inputs_that_overflow_a_float32_square_are_summed_and_infinite_ones_refused():
    moments = WeightedMoments.empty((1, 2))
    moments.add(torch.tensor([[1e25, 1.0]]), torch.ones(1, 1), tokens=1, batch=0)
    assert moments.mean_inputs[0, 0].item() == pytest.approx(1e50)
    with pytest.raises(ValueError, match="the inputs hold NaN or infinity"):
        moments.add(torch.tensor([[torch.inf, 1.0]]), torch.ones(1, 1), tokens=1, batch=0)


def test_infinite_inputs_name_their_module_and_batch(llama, sequences):
    target = find_targets(llama).modules[0]

    class Refusing(TokenNorms):
        def add(self, *args, **kwargs):
            raise ValueError("the inputs hold NaN or infinity")

    with pytest.raises(
        ValueError,
        match=r"the inputs hold NaN or infinity: at module model.layers.0.self_attn.q_proj in .* batch 0; check",
    ):
        measure_gradients(llama, sequences[:1], {target: Refusing(torch.zeros(1, 1))})


def test_norms_need_every_token():
    norms = TokenNorms.empty(2, 4)
    with pytest.raises(ValueError, match="a map was called for 3 tokens of the 4 that there are"):
        norms.add(torch.zeros(3, 2), torch.zeros(3, 2), tokens=3, batch=1)


def test_other_windows_have_statistics_of_their_own(llama, sequences, tokenizer, tmp_path):
    targets = find_targets(llama).modules[:2]
    for directory in (None, tmp_path / "store"):
        statistics = statistics_of(Subject(llama, tokenizer, sequences[:2]), directory=directory)
        here, there = (each.gradient_norms(targets, "text") for each in (statistics, statistics.on(sequences[2:5])))
        assert here.directory != there.directory
        assert [store.read(targets[0].name, "norms").shape[0] for store in (here, there)] == [2, 3]
        again = Statistics.on(statistics, sequences[2:5]).gradient_norms(targets, "text")
        assert again.directory == there.directory
        assert directory is None or there.directory.is_relative_to(directory)


def test_factors_are_weighted_by_both_sides(llama, sequences, tokenizer):
    targets = find_targets(llama)
    settings = Decomposition("two_sided", labels="text")
    store = build_factors(Subject(llama, tokenizer, sequences[:3], known_targets=targets), settings=settings)
    moments = statistics_of(Subject(llama, tokenizer, sequences[:3])).weighted_moments(targets.modules, "text")
    for target in targets.modules:
        # Maps that share an input each have a root of their own.
        expected = decompose(
            llama.get_submodule(target.name).weight.detach(),
            inputs=square_root(moments.read(target.name, "inputs"), damping=settings.damping),
            outputs=square_root(moments.read(target.name, "outputs"), damping=settings.output_damping),
        )
        torch.testing.assert_close(store.sigma(target.name).double(), expected.sigma, rtol=1e-4, atol=0)
        assert store.notes(target.name)["tokens"] == str(3 * (sequences.shape[1] - 1))


def test_a_few_tokens_with_large_gradients_do_not_stand_for_all():
    """Ten of a thousand tokens share one input and have gradients a hundred times as large, as attention sinks have."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1000, 12, generator=generator) * torch.linspace(2, 0.2, 12)
    g = torch.randn(1000, 10, generator=generator) * torch.linspace(1, 0.1, 10)
    x[:10] = torch.randn(12, generator=generator)
    g[:10] = 100 * torch.randn(10, 10, generator=generator) * torch.linspace(0.1, 1, 10)
    weight = torch.randn(10, 12, generator=generator)

    def lost(inputs, outputs):
        """What the loss's curvature, token by token, makes of cutting the weight to half its rank."""
        cut = truncate(decompose(weight, inputs=square_root(inputs), outputs=square_root(outputs)), 5)
        change = (weight - (cut.left @ cut.right).float()).T
        return ((x @ change) * g).sum(1).square().mean().item()

    moments = WeightedMoments.empty((10, 12))
    moments.add(x, g, tokens=1000, batch=0)
    alike = lost(x.T @ x / 1000, g.T @ g / 1000)
    assert lost(moments.mean_inputs, moments.mean_outputs) < 0.5 * alike
