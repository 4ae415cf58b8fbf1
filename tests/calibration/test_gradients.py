"""Gradients against autograd on the weights themselves and loops over tokens; the decompositions that use them."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from lowrank_pl.calibration import backward
from lowrank_pl.calibration.build import build_factors, build_gradients
from lowrank_pl.calibration.gradients import GradientMoments, WeightFisher, WeightGradients, collect_gradients
from lowrank_pl.calibration.measures import Batch, Passes
from lowrank_pl.calibration.statistics import statistics_of_factors
from lowrank_pl.calibration.subject import Subject
from lowrank_pl.calibration.weighted_moments import TokenNorms, WeightedMoments
from lowrank_pl.factors.decomposition import decompose, diagonal_root, square_root, truncate
from lowrank_pl.factors.settings import Decomposition
from lowrank_pl.models.targets import Target, dense_weight, find_targets
from lowrank_pl.models.tiny import tiny_model


@pytest.fixture(autouse=True)
def _fresh_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LOWRANK_HOME", str(tmp_path / "home"))


def by_autograd(model, targets, batches):
    """Gradient [out, in] of the mean loss of each batch by each weight."""
    weights = [model.get_submodule(target.name).weight.requires_grad_() for target in targets]
    found = []
    for batch in batches:
        logits = model(input_ids=batch).logits[:, :-1]
        loss = functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        grads = torch.autograd.grad(loss, weights)
        found.append({t.name: g.T if t.transposed else g for t, g in zip(targets, grads, strict=True)})
    for weight in weights:
        weight.requires_grad_(False)
    return found


def per_token(model, targets, sequence, labels):
    """Second moment of output gradients, one token's loss at a time: only the sum over tokens reaches an output."""
    outputs = {}
    handles = [
        model.get_submodule(t.name).register_forward_hook(
            lambda _, __, output, n=t.name: outputs.__setitem__(n, output)
        )
        for t in targets
    ]
    embedded = model.get_input_embeddings().register_forward_hook(lambda _, __, output: output.requires_grad_())
    logits = model(input_ids=sequence[None]).logits[0, :-1]
    losses = functional.cross_entropy(logits, labels, reduction="none")
    sums = {t.name: torch.zeros(len(sequence), t.shape[0], dtype=torch.float64) for t in targets}
    for loss in losses:
        grads = torch.autograd.grad(loss, [outputs[t.name] for t in targets], retain_graph=True, allow_unused=True)
        for target, grad in zip(targets, grads, strict=True):
            sums[target.name] += grad[0].double()
    for handle in [*handles, embedded]:
        handle.remove()
    return {name: sum(torch.outer(g, g) for g in rows) for name, rows in sums.items()}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_weight_gradients_are_those_of_autograd(family, batch_size, sequences):
    model = tiny_model(family)
    targets = find_targets(model).modules
    passes = Passes(sequences[:4], batch_size)
    found, fisher = (collect_gradients(kind, model, targets, passes) for kind in (WeightGradients, WeightFisher))
    expected = by_autograd(model, targets, torch.split(sequences[:4], batch_size))
    for target in targets:
        grads = [grad[target.name] for grad in expected]
        torch.testing.assert_close(found[target.name].mean, sum(grads) / len(grads), rtol=1e-4, atol=1e-6)
        squares = sum(grad.double().square() for grad in grads) / len(grads)
        for side, dim in (("outputs", 1), ("inputs", 0)):
            torch.testing.assert_close(fisher[target.name].tensors()[side], squares.sum(dim), rtol=1e-4, atol=1e-9)
        assert found[target.name].batches == fisher[target.name].batches == len(grads)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_moments_are_those_of_a_loop_over_tokens(family, sequences):
    model = tiny_model(family)
    targets = [find_targets(model).modules[i] for i in (0, 3, -1)]
    short = sequences[:2, :12]
    found = collect_gradients(GradientMoments, model, targets, Passes(short))
    expected = [per_token(model, targets, sequence, sequence[1:]) for sequence in short]
    for target in targets:
        total = sum(moment[target.name] for moment in expected)
        torch.testing.assert_close(found[target.name].second_moment, total / 22, rtol=1e-4, atol=1e-6)
        assert found[target.name].tokens == 22


def test_sampled_labels_are_drawn_from_the_model_and_reproducible(llama, sequences):
    targets = find_targets(llama).modules[-2:]
    name, short = targets[-1].name, sequences[:2, :10]

    def moment(labels="sampled"):
        found = collect_gradients(GradientMoments, llama, targets, Passes(short), labels=labels)
        return found[name].second_moment

    first = moment()
    torch.manual_seed(5)
    assert torch.equal(first, moment())
    assert not torch.allclose(first, moment(labels="text"))
    # By hand, with the labels drawn as the docstring says.
    total = 0
    for number, sequence in enumerate(short):
        with torch.no_grad():
            chances = llama(input_ids=sequence[None]).logits[0, :-1].softmax(-1)
        lots = torch.rand(len(chances), 1, generator=torch.Generator().manual_seed(number))
        labels = (chances.cumsum(-1) <= lots).sum(-1)
        total = total + per_token(llama, targets, sequence, labels)[name]
    torch.testing.assert_close(first, total / 18, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_gradient_of_sampled_labels_is_that_of_their_cross_entropy(llama, sequences, batch_size):
    batch = Batch(4, sequences[:batch_size, :10])
    logits = llama(input_ids=batch.tokens).logits.detach().requires_grad_()
    end, gradient = backward.loss_gradient(logits, batch, "sampled")
    (found,) = torch.autograd.grad(end, logits, gradient)
    chances = logits[:, :-1].softmax(-1)
    labels, _ = backward._sample(chances, torch.Generator().manual_seed(4))
    loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), reduction="sum")
    torch.testing.assert_close(found, torch.autograd.grad(loss, logits)[0])


@pytest.mark.parametrize("labels", ["sampled", "text"])
def test_weight_gradients_are_those_of_the_text(llama, sequences, labels):
    targets = find_targets(llama).modules[-1:]
    asked, text = (
        collect_gradients(WeightGradients, llama, targets, Passes(sequences[:2]), labels=each)[targets[0].name].mean
        for each in (labels, "text")
    )
    assert torch.equal(asked, text)


def test_labels_are_drawn_as_often_as_their_probability_says():
    chances = torch.tensor([0.0, 0.1, 0.0, 0.6, 0.3, 0.0])
    drawn, _ = backward._sample(chances.expand(20_000, -1), torch.Generator().manual_seed(0))
    assert drawn.shape == (20_000, 1)
    counts = torch.bincount(drawn.flatten(), minlength=6) / 20_000
    assert (counts[chances == 0] == 0).all()
    torch.testing.assert_close(counts, chances, rtol=0, atol=0.015)


def test_mean_of_sampled_gradients_is_the_fisher_of_the_head(llama):
    """At the last linear layer the expectation is known: with one position, E[g g'] is J' (diag(p) - p p') J."""
    targets = [t for t in find_targets(llama).modules if t.kind == "mlp.down_proj"][-1:]
    sequence = torch.tensor([[7, 8]])
    # Every batch samples labels of its own.
    passes = Passes(sequence.expand(400, -1))
    moments = collect_gradients(GradientMoments, llama, targets, passes, labels="sampled")[targets[0].name]
    assert moments.tokens == 400
    kept = {}
    handle = llama.get_submodule(targets[0].name).register_forward_hook(
        lambda _, __, output: kept.__setitem__("y", output.requires_grad_())
    )
    embedded = llama.get_input_embeddings().register_forward_hook(lambda _, __, output: output.requires_grad_())
    with torch.enable_grad():
        logits = llama(input_ids=sequence).logits[0, 0]
        rows = [torch.autograd.grad(z, kept["y"], retain_graph=True)[0][0, 0] for z in logits]
    handle.remove()
    embedded.remove()
    jacobian, p = torch.stack(rows).double(), logits.detach().softmax(-1).double()
    fisher = jacobian.T @ (torch.diag(p) - torch.outer(p, p)) @ jacobian
    assert (moments.second_moment - fisher).norm() < 0.25 * fisher.norm()


def test_model_is_left_as_it_was(sequences):
    model = tiny_model("llama").train()
    asking = [parameter.requires_grad for parameter in model.parameters()]
    targets = find_targets(model).modules
    collect_gradients(GradientMoments, model, targets, Passes(sequences[:1]))
    assert [parameter.requires_grad for parameter in model.parameters()] == asking
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


def test_merged_sums_are_those_of_all(llama, sequences):
    targets = find_targets(llama).modules[:1]
    name = targets[0].name
    for kind, mean in ((GradientMoments, "second_moment"), (WeightGradients, "mean")):
        parts = [collect_gradients(kind, llama, targets, Passes(part))[name] for part in sequences[:2, None]]
        whole = collect_gradients(kind, llama, targets, Passes(sequences[:2]))[name]
        torch.testing.assert_close(sum(getattr(part, mean) for part in parts) / 2, getattr(whole, mean))
        assert sum(int(*part.notes().values()) for part in parts) == int(*whole.notes().values())


def test_sequences_of_one_token_are_refused(llama, sequences):
    with pytest.raises(ValueError, match=r"shape \(.+, 1\) .* at least one sequence of 2 tokens"):
        collect_gradients(WeightGradients, llama, find_targets(llama).modules, Passes(sequences[:, :1]))


@pytest.mark.parametrize("labels", ["sampled", "text"])
def test_a_loss_that_is_not_finite_is_named(llama, sequences, labels):
    with torch.no_grad():
        llama.get_submodule("model.layers.1.mlp.up_proj").weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"loss of calibration batch 0 is nan: .* load it in float32"):
        collect_gradients(GradientMoments, llama, find_targets(llama).modules, Passes(sequences[:2]), labels=labels)


@pytest.mark.parametrize("kind", [GradientMoments, WeightedMoments, TokenNorms, WeightGradients])
def test_a_gradient_that_is_not_finite_names_its_module(llama, sequences, kind):
    name = "model.layers.1.self_attn.o_proj"

    class Breaks(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * float("inf")

    llama.get_submodule("model.layers.1").post_attention_layernorm.register_forward_pre_hook(
        lambda _, args: Breaks.apply(args[0])
    )
    targets = [target for target in find_targets(llama).modules if target.name == name]
    with pytest.raises(
        ValueError, match=rf"NaN or infinity: at module {name} in calibration batch 0; .*load it in float32"
    ):
        collect_gradients(kind, llama, targets, Passes(sequences[:1]))


def spd(size, seed):
    factor = torch.randn(size, size + 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return factor @ factor.T / size


@pytest.mark.parametrize("shape", [(7, 5), (5, 9)])
def test_two_sided_identity(shape):
    moment, gradients = spd(shape[1], 1), spd(shape[0], 2)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    inputs, outputs = square_root(moment, damping=0.0), square_root(gradients, damping=0.0)
    factors = decompose(weight, inputs=inputs, outputs=outputs)
    for rank in range(min(shape) + 1):
        part = truncate(factors, rank)
        lost = weight - part.left @ part.right
        predicted = factors.sigma[rank:].square().sum().item()
        norm = (outputs.root.T @ lost @ inputs.root).square().sum().item()
        trace = torch.trace(gradients @ lost @ moment @ lost.T).item()
        assert norm == pytest.approx(predicted, rel=1e-8, abs=1e-9)
        assert trace == pytest.approx(predicted, rel=1e-8, abs=1e-9)


def test_asvd_factors_are_those_of_its_formula(llama, sequences, tokenizer):
    store = build_factors(
        Subject(llama, tokenizer, sequences[:3], known_targets=find_targets(llama)),
        settings=Decomposition(kind="asvd", damping=0.0),
    )
    for target in find_targets(llama).modules:
        seen = []
        module = llama.get_submodule(target.name)
        handle = module.register_forward_hook(lambda _, args, __, seen=seen: seen.append(args[0].flatten(0, -2)))
        with torch.no_grad():
            llama(input_ids=sequences[:3])
        handle.remove()
        scale = torch.cat(seen).double().abs().mean(0) ** 0.5
        left, sigma, right = torch.linalg.svd(dense_weight(module).double() * scale, full_matrices=False)
        torch.testing.assert_close(store.sigma(target.name), sigma, rtol=1e-4, atol=1e-6)
        part = store.factors(target.name, 5)
        expected = left[:, :5] * sigma[:5] @ right[:5] / scale
        torch.testing.assert_close((part.left @ part.right).double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("side", ["inputs", "outputs"])
def test_fwsvd_factors_are_those_of_its_formula(llama, sequences, tokenizer, side):
    targets = find_targets(llama)
    settings = Decomposition(kind="fwsvd", fisher_side=side, damping=0.0, output_damping=0.0)
    store = build_factors(Subject(llama, tokenizer, sequences[:3], known_targets=targets), settings=settings)
    batches = by_autograd(llama, targets.modules, torch.split(sequences[:3], 1))
    for target in targets.modules:
        squares = sum(grads[target.name].double().square() for grads in batches) / 3
        scale = squares.sum(0).sqrt() if side == "inputs" else squares.sum(1).sqrt()[:, None]
        weight = dense_weight(llama.get_submodule(target.name)).detach().double()
        left, sigma, right = torch.linalg.svd(scale * weight, full_matrices=False)
        torch.testing.assert_close(store.sigma(target.name), sigma, rtol=1e-4, atol=1e-9)
        part = store.factors(target.name, 5)
        expected = (left[:, :5] * sigma[:5] @ right[:5]) / scale
        torch.testing.assert_close((part.left @ part.right).double(), expected, rtol=1e-3, atol=1e-4)


def test_fwsvd_factors_from_before_there_was_a_side_are_known_to_weight_outputs():
    before = {"kind": "fwsvd", "output_damping": 1e-2}
    assert Decomposition.of_fingerprint(before) == Decomposition("fwsvd", fisher_side="outputs")
    assert Decomposition.of_fingerprint(before).identity() == before
    assert Decomposition.of_fingerprint(Decomposition("fwsvd").identity()) == Decomposition("fwsvd")


def test_features_that_are_always_zero_can_be_divided_by():
    weight = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    factors = decompose(weight, inputs=diagonal_root(torch.tensor([1.0, 0.0, 2.0])))
    torch.testing.assert_close(factors.left @ factors.right, weight, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="the scales hold NaN, infinity or negative numbers"):
        diagonal_root(torch.tensor([1.0, -1.0]))


@pytest.mark.parametrize("settings", [Decomposition("fwsvd"), Decomposition("two_sided")])
def test_what_depends_on_batches_is_made_for_these_batches(llama, sequences, tokenizer, settings):
    targets = find_targets(llama)
    one, two, again = (
        build_factors(
            Subject(llama, tokenizer, sequences[:4], known_targets=targets), settings=settings, batch_size=size
        )
        for size in (1, 2, 1)
    )
    assert again.directory == one.directory != two.directory
    name = targets.modules[4].name
    assert not torch.equal(one.sigma(name), two.sigma(name))
    # And not where it does not.
    plain = [
        build_factors(Subject(llama, tokenizer, sequences[:4], known_targets=targets), batch_size=size).directory
        for size in (1, 2)
    ]
    assert plain[0] == plain[1]
    assert statistics_of_factors(two, llama, sequences[:4]).passes.batch_size == 2


def test_layers_that_are_fed_by_name_are_measured_alike(llama, sequences, tokenizer):
    class Named(type(llama.model.layers[0].mlp)):
        def forward(self, x):
            return self.down_proj(input=self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    targets = find_targets(llama)
    expected = collect_gradients(GradientMoments, llama, targets.modules, Passes(sequences[:2]))
    for layer in llama.model.layers:
        layer.mlp.__class__ = Named
    found = collect_gradients(GradientMoments, llama, targets.modules, Passes(sequences[:2]))
    for name, moments in expected.items():
        assert torch.equal(found[name].second_moment, moments.second_moment)


def test_gradients_are_collected_once(llama, sequences, tokenizer, monkeypatch):
    from lowrank_pl.calibration import statistics as collected

    targets = find_targets(llama)
    store = build_gradients(Subject(llama, tokenizer, sequences[:2], known_targets=targets))
    monkeypatch.setattr(collected, "collect_gradients", lambda *_, **__: pytest.fail("collected again"))
    again = build_gradients(Subject(llama, tokenizer, sequences[:2], known_targets=targets))
    assert again.directory == store.directory
    expected = by_autograd(llama, targets.modules, torch.split(sequences[:2], 1))
    name = targets.modules[4].name
    torch.testing.assert_close(
        again.read(name, "mean"), (expected[0][name] + expected[1][name]) / 2, rtol=1e-4, atol=1e-6
    )
    assert again.notes(name)["batches"] == "2"


def test_a_layer_that_is_called_twice_adds_up_its_calls(tokenizer):
    """Two blocks that share one linear layer: gradients add up, and every token and batch counts once."""
    model = tiny_model("llama")
    model.model.layers[1].mlp.down_proj = model.model.layers[0].mlp.down_proj
    name = "model.layers.0.mlp.down_proj"
    m, n = model.get_submodule(name).weight.shape
    target = Target(name=name, block=0, kind="mlp.down_proj", shape=(m, n), group=name)
    sequences = torch.arange(96).view(3, 32)
    moments = collect_gradients(GradientMoments, model, [target], Passes(sequences))
    weights = collect_gradients(WeightGradients, model, [target], Passes(sequences))
    expected = torch.zeros(m, n)
    for sequence in sequences:
        model.zero_grad()
        model.get_submodule(name).weight.requires_grad_(True)
        logits = model(input_ids=sequence[None]).logits
        torch.nn.functional.cross_entropy(logits[0, :-1], sequence[1:]).backward()
        expected += model.get_submodule(name).weight.grad / len(sequences)
    torch.testing.assert_close(weights[name].mean, expected, rtol=1e-4, atol=1e-7)
    assert (weights[name].batches, moments[name].tokens) == (3, 3 * 31)


def test_only_layers_of_experts_may_be_left_uncalled(llama, sequences):
    llama.model.layers[1].mlp.unused = torch.nn.Linear(4, 4)
    name = "model.layers.1.mlp.unused"
    target = Target(name=name, block=1, kind="mlp.unused", shape=(4, 4), group=name)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.unused on batch 0: exclude it"):
        collect_gradients(WeightGradients, llama, [target], Passes(sequences[:1]))
