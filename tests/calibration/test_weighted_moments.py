"""Moments in which tokens count by the size of their gradient, against slow sums, and where they are better."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from lowrank_pl.calibration.build import build_factors, statistics_of
from lowrank_pl.calibration.gradients import collect_gradients
from lowrank_pl.calibration.measures import Batch, Call, Passes
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
    moments = statistics.collect("weighted_moments", targets.modules, "text")
    norms = statistics.collect("gradient_norms", targets.modules, "text")
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


def batch_of(labels, number=0):
    return Batch(number, torch.zeros(1, labels + 1, dtype=torch.long))


def test_last_tokens_count_nothing_and_scales_cancel():
    x, g = torch.randn(6, 4), torch.randn(6, 3)
    one, two = WeightedMoments((3, 4)), WeightedMoments((3, 4))
    one.add([Call(x, g)], batch_of(6))
    two.add([Call(torch.cat([x, 7 * x]), torch.cat([1e-25 * g, 0 * g]))], batch_of(6))
    # The product of both sides is of the size of the gradients' squares, whatever the scale.
    torch.testing.assert_close(two.inputs * 1e25, one.inputs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(two.outputs * 1e25, one.outputs, rtol=1e-4, atol=1e-4)


def test_a_token_counts_once_however_often_the_layer_is_called():
    moments = WeightedMoments((1, 1))
    moments.add([Call(torch.ones(4, 1), torch.ones(4, 1))] * 2, batch_of(4))
    assert (moments.tokens, moments.inputs.item()) == (4, 2.0)


def test_inputs_that_overflow_a_float32_square_are_summed():
    moments = WeightedMoments((1, 2))
    moments.add([Call(torch.tensor([[1e25, 1.0]]), torch.ones(1, 1))], batch_of(1))
    assert moments.inputs[0, 0].item() == pytest.approx(1e50)


@pytest.mark.parametrize(
    ("inputs", "gradient", "side"), [(torch.inf, 1.0, "inputs"), (1.0, torch.inf, "gradients"), (1.0, torch.nan, "")]
)
def test_numbers_that_are_not_finite_are_refused(inputs, gradient, side):
    moments = WeightedMoments((1, 2))
    with pytest.raises(ValueError, match=f"{side}.* NaN or infinity"):
        moments.add([Call(torch.tensor([[inputs, 1.0]]), torch.tensor([[gradient]]))], batch_of(1))


def test_refusals_name_module_and_batch_and_cure(llama, sequences):
    target = find_targets(llama).modules[0]

    class Refusing(TokenNorms):
        def add(self, calls, batch):
            raise ValueError("the inputs hold NaN or infinity")

    with pytest.raises(ValueError, match=rf"NaN or infinity.*{target.name}.* batch 0; .*float32"):
        collect_gradients(Refusing, llama, [target], Passes(sequences[:1]))


def test_norms_need_every_token():
    norms = TokenNorms(Passes(torch.zeros(2, 4)))
    with pytest.raises(ValueError, match="3 of 4 tokens"):
        norms.add([Call(torch.zeros(3, 2), torch.zeros(3, 2))], batch_of(3, number=1))


def test_other_sequences_have_statistics_of_their_own(llama, sequences, tokenizer, tmp_path):
    targets = find_targets(llama).modules[:2]
    for directory in (None, tmp_path / "store"):
        statistics = statistics_of(Subject(llama, tokenizer, sequences[:2]), directory=directory)
        both = statistics, statistics.on(sequences[2:5])
        here, there = (each.collect("gradient_norms", targets, "text") for each in both)
        assert here.directory != there.directory
        assert [store.read(targets[0].name, "norms").shape[0] for store in (here, there)] == [2, 3]
        again = statistics.on(sequences[2:5]).collect("gradient_norms", targets, "text")
        assert again.directory == there.directory
        assert directory is None or there.directory.is_relative_to(directory)


def test_factors_are_weighted_by_both_sides(llama, sequences, tokenizer):
    targets = find_targets(llama)
    settings = Decomposition("two_sided", labels="text")
    store = build_factors(Subject(llama, tokenizer, sequences[:3], known_targets=targets), settings=settings)
    statistics = statistics_of(Subject(llama, tokenizer, sequences[:3]))
    moments = statistics.collect("weighted_moments", targets.modules, "text")
    for target in targets.modules:
        # Layers that share an input each have a root of their own.
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
        """Rise of the loss when the weight is cut to half its rank, from its curvature token by token."""
        cut = truncate(decompose(weight, inputs=square_root(inputs), outputs=square_root(outputs)), 5)
        change = (weight - (cut.left @ cut.right).float()).T
        return ((x @ change) * g).sum(1).square().mean().item()

    moments = WeightedMoments((10, 12))
    moments.add([Call(x, g)], batch_of(1000))
    alike = lost(x.T @ x / 1000, g.T @ g / 1000)
    assert lost(moments.inputs, moments.outputs) < 0.5 * alike
