"""On a GPU: what the CPU computes, and every command. They run where there is one: `pytest -m gpu`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lowrank_pl import FinishRun
from lowrank_pl.calibration.build import build_factors, statistics_of
from lowrank_pl.calibration.build_by_block import build_factors_by_block
from lowrank_pl.calibration.subject import Subject
from lowrank_pl.cli.bench import bench
from lowrank_pl.costs import speed
from lowrank_pl.costs.speed import Variant, random_tokens, uniform_modules
from lowrank_pl.evaluate.likelihood import perplexity
from lowrank_pl.export.export import load_compressed, save_compressed
from lowrank_pl.factors.compression import compress, compressed
from lowrank_pl.factors.decomposition import DRIVERS, thin_svd
from lowrank_pl.factors.settings import Decomposition
from lowrank_pl.methods.masks.ara import ARA
from lowrank_pl.methods.masks.ars import ARS
from lowrank_pl.methods.masks.dobi_svd import DobiSVD
from lowrank_pl.methods.masks.fermi import Fermi
from lowrank_pl.methods.masks.gated_product import ActiveComponents, gated_product
from lowrank_pl.methods.masks.llrc import LLRC
from lowrank_pl.methods.masks.objectives import DataTerms
from lowrank_pl.methods.masks.rescaled import Rescaled
from lowrank_pl.methods.refit.refitting import Refit, refit
from lowrank_pl.models.base import load_base
from lowrank_pl.models.eval_mode import input_device
from lowrank_pl.models.hf_quantized import Grid
from lowrank_pl.models.lazy import open_skeleton
from lowrank_pl.models.offload import streamed
from lowrank_pl.models.targets import find_targets, replace_module, replaced
from lowrank_pl.models.tiny import byte_tokenizer, tiny_model
from lowrank_pl.plans.constraints import Constraints
from lowrank_pl.plans.convex_hull import predicted_scores
from lowrank_pl.serving import integer_layers
from lowrank_pl.serving.fused_layers import SharedGroup
from lowrank_pl.serving.fused_linear import FusedLinear
from lowrank_pl.serving.integer_layers import PackedMatrix
from lowrank_pl.serving.kernels import TILES, FusedGroup
from lowrank_pl.serving.optimize import optimize_for_inference
from tests.helpers import SMOKE
from tests.helpers.low_rank_models import STORAGES, compress_at_random
from tests.helpers.rounded_models import nearest, round_model
from tests.helpers.tiny_training import fit, logits_of, make_learner, validated
from tests.serving.test_fused_linear import INPUTS
from tests.serving.test_fused_linear import layer as server_layer
from tests.serving.test_fused_linear import member as server_member
from tests.serving.test_fused_linear import product as server_product
from tests.serving.test_kernels import align
from tests.serving.test_kernels import layers as kernel_layers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
    # What only machines with a GPU warn of: that one isn't used, or that products could be less exact.
    pytest.mark.filterwarnings("ignore:GPU available but not used"),
    pytest.mark.filterwarnings("ignore:The CUDA Graph is empty"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS, but there was no current CUDA context"),
]
SIDES = ("inputs", "outputs")
METHODS = {
    "staircase": (ARA, {}),
    "rescaled": (lambda: Rescaled(warmup=1), {"decomposition": Decomposition("two_sided")}),
    "per_value": (lambda: LLRC(patience=None), {"data_terms": DataTerms(cross_entropy=0.0, divergence=0.5)}),
    "ars": (ARS, {}),
    "fermi": (lambda: Fermi(anneal_steps=4), {}),
    "dobi_svd": (DobiSVD, {}),
}


@pytest.fixture(autouse=True)
def _fresh_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LOWRANK_HOME", str(tmp_path / "home"))


def made_on(device, sequences, kind="two_sided", keep=0.5, dtype=torch.float32):
    model = load_base("random:llama", dtype=dtype).to(device)
    targets = find_targets(model)
    subject = Subject(model, byte_tokenizer(), sequences, known_targets=targets)
    directory = None if device == "cpu" else Path(f"{device}-{kind}").resolve()
    store = build_factors(subject, settings=Decomposition(kind), directory=directory)
    budget = Constraints().budget(model, targets, keep)
    return model, targets, store, budget.select(predicted_scores(budget, store.sigma), method="fisher")


@pytest.mark.parametrize("driver", ["polar", "gesvd", "lapack"])
@pytest.mark.parametrize("shape", [(96, 96), (64, 160), (160, 64)])
def test_decompositions_are_those_of_the_cpu(shape, driver):
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(shape, generator=generator, dtype=torch.float64) * torch.logspace(0, -6, shape[1]).double()
    left, sigma, right = DRIVERS[driver](matrix.cuda())
    assert left.is_cuda
    assert torch.allclose((left * sigma @ right).cpu(), matrix, rtol=0, atol=1e-13 * sigma[0].item())
    assert torch.allclose(sigma.cpu(), thin_svd(matrix)[1], rtol=0, atol=1e-13 * sigma[0].item())


def test_the_same_ranks_and_the_same_model_as_on_the_cpu(sequences, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    here, there = made_on("cpu", sequences), made_on("cuda", sequences)
    for target in here[1].modules:
        one, two = here[2].sigma(target.name), there[2].sigma(target.name).cpu()
        assert torch.allclose(one, two, rtol=1e-3, atol=1e-5 * one[0].item())
    ranks = [{name: entry.rank for name, entry in made[3].modules.items()} for made in (here, there)]
    assert ranks[0] == ranks[1]
    scores = []
    for model, _, store, plan in (here, there):
        with compressed(model, plan, store):
            scores.append(perplexity(model, sequences).nats)
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)


def test_a_refit_is_that_of_the_cpu(sequences, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scores = []
    for device in ("cpu", "cuda"):
        model, targets, store, plan = made_on(device, sequences)
        plan, store = refit(
            plan,
            store,
            Subject(model, byte_tokenizer(), sequences, known_targets=targets),
            sequences=sequences,
            settings=Refit(margin=0.0),
        )
        with compressed(model, plan, store):
            scores.append(perplexity(model, sequences).nats)
    assert scores[0] == pytest.approx(scores[1], abs=1e-3)


def moments(store, targets):
    return {(target.name, key): store.read(target.name, key) for target in targets.modules for key in SIDES}


@pytest.mark.parametrize("way", ["loaded", "walked"])
def test_moments_block_by_block_are_those_of_one_pass(way, sequences, tmp_path):
    load_base("random:llama").save_pretrained(tmp_path / "base", max_shard_size="20KB")
    base, tokenizer = str(tmp_path / "base"), byte_tokenizer()
    model = load_base(base).cuda()
    targets = find_targets(model)
    whole = statistics_of(Subject(model, tokenizer, sequences), directory=tmp_path / "whole")
    expected = moments(whole.collect("weighted_moments", targets.modules, "sampled"), targets)
    if way == "loaded":
        parts = statistics_of(Subject(model, tokenizer, sequences), directory=tmp_path / "parts", memory=1)
    else:
        skeleton = open_skeleton(base, device="cuda")
        how = {"settings": Decomposition("two_sided"), "directory": tmp_path / "parts"}
        build_factors_by_block(skeleton, Subject(skeleton.model, tokenizer, sequences, known_targets=targets), **how)
        parts = statistics_of(Subject(model, tokenizer, sequences), directory=tmp_path / "parts")
    for key, value in moments(parts.collect("weighted_moments", targets.modules, "sampled"), targets).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-6 * expected[key].abs().max().item())


def test_a_model_in_main_memory_computes_on_the_gpu_a_layer_at_a_time(sequences, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, _, store, plan = made_on("cpu", sequences)
    gpu = torch.device("cuda", 0)
    with compressed(model, plan, store, device=gpu):
        expected = perplexity(model, sequences).nats
        with streamed(model, gpu):
            assert input_device(model) == gpu
            assert perplexity(model, sequences, batch_size=2).nats == pytest.approx(expected, abs=1e-4)
        assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
        assert {buffer.device.type for buffer in model.buffers()} == {"cpu"}


def test_a_run_ends_with_models_in_main_memory(tmp_path):
    finish = FinishRun(streamed=True, baselines=["uniform"])
    fit(make_learner(), max_steps=2, accelerator="gpu", default_root_dir=tmp_path, callbacks=[finish])
    assert finish.finished.report.verified
    rows = {row.name: row for row in finish.finished.rows}
    assert perplexity(load_compressed(tmp_path / "model"), validated()).perplexity == pytest.approx(
        rows["learned"].perplexity, rel=1e-3
    )


@pytest.mark.parametrize("active", [0, 5, 12, torch.tensor([0, 3, 7])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gated_products_and_their_gradients(active, dtype):
    torch.manual_seed(0)
    x, left, right = torch.randn(2, 9, 8), torch.randn(10, 12), torch.randn(12, 8)
    gate = torch.zeros(12)
    gate[slice(active) if isinstance(active, int) else active] = 0.7
    found = []
    for device in ("cpu", "cuda"):
        inputs = x.to(device, dtype, copy=True).requires_grad_()
        gates = gate.to(device, copy=True).requires_grad_()
        there = active.to(device) if isinstance(active, torch.Tensor) else active
        y = gated_product(inputs, left.to(device, dtype), right.to(device, dtype), gates, ActiveComponents(there))
        y.square().sum().backward()
        found.append([part.detach().float().cpu() for part in (y, inputs.grad, gates.grad)])
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.05, "atol": 1.0}
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, **close)


@pytest.mark.parametrize("name", METHODS)
def test_masks_learn_what_they_learn_on_the_cpu(name):
    method, settings = METHODS[name]
    found = []
    for accelerator in ("cpu", "gpu"):
        # Not Adam, whose steps are as large where a gradient is nothing but rounding.
        learner = make_learner(mask=method(), optimizer=lambda p: torch.optim.SGD(p, lr=0.5), **settings)
        fit(learner, accelerator=accelerator, max_steps=4)
        found.append((learner.plan(), [part.detach().cpu() for part in learner.mask_parameters()]))
    for one, two in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-3)
    ranks = [[entry.rank or 0 for entry in plan.modules.values()] for plan, _ in found]
    assert max(abs(one - two) for one, two in zip(*ranks, strict=True)) <= 1


@pytest.mark.parametrize(("dtype", "precision"), [("float32", "bf16-mixed"), ("bfloat16", "32-true")])
@pytest.mark.parametrize("name", METHODS)
def test_masks_learn_in_half_precision(name, dtype, precision):
    method, settings = METHODS[name]
    learner = make_learner(mask=method(), dtype=dtype, **settings)
    fit(learner, accelerator="gpu", max_steps=4, precision=precision)
    assert all(torch.isfinite(part).all() for part in learner.mask_parameters())
    assert learner.plan().keep_targeted <= 0.5


def test_two_runs_learn_the_same_bits():
    ends = []
    for _ in range(2):
        learner = make_learner()
        fit(learner, accelerator="gpu", max_steps=5)
        ends.append(logits_of(learner))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_export_from_the_gpu_loads_anywhere(sequences, tmp_path, monkeypatch, dtype):
    monkeypatch.chdir(tmp_path)
    model, _, store, plan = made_on("cuda", sequences, dtype=dtype)
    compress(model, plan, store)
    save_compressed(model, tmp_path / "small", tokenizer=byte_tokenizer(), plan=plan)
    on_gpu = load_compressed(tmp_path / "small", device_map="cuda")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "small", device_map="auto")
    on_cpu = load_compressed(tmp_path / "small")
    tokens = sequences[:2]
    with torch.no_grad():
        expected = model(tokens.cuda()).logits
        assert torch.equal(on_gpu(tokens.cuda()).logits, expected)
        assert torch.equal(plain(tokens.cuda()).logits, expected)
        torch.testing.assert_close(on_cpu(tokens).logits, expected.cpu(), rtol=0.05, atol=0.05)
    made = on_gpu.generate(tokens[:1, :8].cuda(), max_new_tokens=5, do_sample=False)
    assert made.shape[1] <= 13


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_pivoted_layers(sequences, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, _, store, plan = made_on("cuda", sequences)
    compress(model, plan, store)
    model.eval()
    with torch.no_grad():
        plain = model(sequences[:1].cuda(), use_cache=False).logits
        whole = torch.compile(model, fullgraph=True)(input_ids=sequences[:1].cuda(), use_cache=False).logits
    torch.testing.assert_close(plain, whole, rtol=1e-3, atol=1e-3)


def test_the_road_of_the_command_line(tmp_path):
    words = [sys.executable, "-m", "lowrank_pl", "fit", "-c", SMOKE, "--run", str(tmp_path / "run")]
    words += ["--trainer.accelerator", "gpu", "--trainer.max_steps", "6", "--finish.refit.sequences", "8"]
    words += ["--model.decomposition.kind", "two_sided", "--json", str(tmp_path / "figures.json")]
    ended = subprocess.run(words, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-3000:]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert set(summary) >= {"dense", "learned"}
    model = load_compressed(tmp_path / "run" / "model", device_map="cuda")
    assert next(model.parameters()).is_cuda


@pytest.mark.parametrize("case", ["decode", "prefill", "step"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_speeds_are_measured(case, dtype, capsys):
    figures = bench(case, base="random:llama", length=16, repeats=1, dtype=dtype, device="cuda")
    machine = figures["machine"] if case != "step" else figures["random:llama"]["machine"]
    assert machine["accelerator"] == torch.cuda.get_device_name()


@pytest.mark.parametrize("case", ["decode", "prefill"])
@pytest.mark.parametrize("storage", ["factored", "pivoted"])
def test_a_recorded_step_computes_what_the_model_does(case, storage):
    model = load_base("random:llama", dtype=torch.float32).cuda()
    targets, tokens = find_targets(model), random_tokens(model, 17).cuda()
    with torch.inference_mode(), replaced(model, uniform_modules(model, targets, Variant(storage, 0.5))):
        inputs = speed._step_inputs(model, tokens, case)
        expected = model(**inputs).logits.clone()
        replay = speed._recorded(model, inputs, model.device)
        for _ in range(2):
            torch.testing.assert_close(replay(), expected, rtol=1e-5, atol=1e-5)


@pytest.fixture
def always(monkeypatch):
    """Kernels are timed, and taken where they are slower as well: tiny layers say nothing of speed."""
    choose = FusedGroup.choose

    def taken(self, *given):
        choose(self, *given)
        for count, tiles in TILES.items():
            self.tiles[count] = self.tiles[count] or tiles[: len(self.stages)]

    monkeypatch.setattr(FusedGroup, "choose", taken)


@pytest.mark.parametrize("tokens", [1, 5, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_kernels_compute_what_the_layers_compute(always, dtype, tokens):
    for members in (kernel_layers(bias=True), kernel_layers(bias=False)):
        members = align([layer.to("cuda", dtype) for layer in members])
        kernels = SharedGroup(members).kernels
        x = torch.randn(tokens, 21, device="cuda", dtype=dtype)
        found, expected = kernels(x), torch.cat([layer(x) for layer in members], 1)
        close = 1e-5 if dtype == torch.float32 else 0.03
        torch.testing.assert_close(found, expected, rtol=close, atol=close)
        for count in TILES:
            for tile in TILES[count] if (count == "one") == (tokens == 1) else []:
                launched = kernels.launch(x, [tile] * len(kernels.stages))
                torch.testing.assert_close(launched, found, rtol=close, atol=close)


@pytest.mark.parametrize("tokens", [1, 5, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grid", [Grid(8), Grid(4, 32), Grid(7, 64), Grid(3, 32)], ids=str)
@torch.no_grad()
def test_the_kernel_of_rounded_matrices_computes_the_product(grid, dtype, tokens):
    rounded = nearest(torch.randn(130, 333), grid).to(torch.device("cuda"))
    x = torch.randn(tokens, 333, device="cuda", dtype=dtype)
    expected = (x.float() @ rounded.dense().mT).to(dtype)
    for tile in integer_layers.TILES["one" if tokens == 1 else "few"]:
        tiles = {"one": tile, "few": tile}
        matrix = PackedMatrix(grid, 333, rounded.packed, rounded.scales.to(dtype), rounded.zeros, tiles)
        torch.testing.assert_close(matrix.product(x), expected, rtol=0.03, atol=0.03 * expected.abs().max().item())


@torch.no_grad()
def test_a_rounded_model_is_optimised(monkeypatch):
    monkeypatch.setattr(integer_layers, "_FASTER", 1e9)
    model = compress_at_random(tiny_model("llama", hidden=128))
    model = round_model(model, grids=(Grid(8), Grid(4, 32))).to("cuda", torch.bfloat16)
    tokens = torch.arange(12, device="cuda").view(1, -1) * 7
    before = model(tokens).logits.float()
    assert optimize_for_inference(model).few_tokens > 10
    after = model(tokens).logits.float()
    assert (after - before).norm() < 0.03 * before.norm()


@pytest.mark.parametrize("storage", ["factored", "pivoted"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_optimised_model_generates_the_same_and_compiles(always, storage):
    model = load_base("random:llama", dtype=torch.float32).cuda().eval()
    for name, layer in uniform_modules(model, find_targets(model), Variant(storage, 0.5)).items():
        replace_module(model, name, layer)
    tokens = random_tokens(model, 9).cuda()
    greedy = {"max_new_tokens": 8, "do_sample": False}
    with torch.no_grad():
        expected, made = model(tokens, use_cache=False).logits, model.generate(tokens, **greedy)
        chosen = optimize_for_inference(model)
        assert chosen.timed == 4 * len(model.model.layers)
        assert torch.equal(model.generate(tokens, **greedy), made)
        torch.testing.assert_close(model(tokens, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)
        compiled = torch.compile(model, fullgraph=True, dynamic=False)
        replay = speed._recorded(compiled, {"input_ids": tokens, "use_cache": False}, model.device)
        torch.testing.assert_close(replay(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [1, 16, 40])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@torch.no_grad()
def test_layers_of_a_server_are_those_of_the_cpu(always, tokens):
    gpu = torch.device("cuda", 0)
    members = [
        [server_member(server_layer(storage, 12 + 4 * place), storage) for place, storage in enumerate(STORAGES)]
        for _ in range(2)
    ]
    here = FusedLinear(members[0], device=torch.device("cpu"), make_product=server_product)
    for member in members[1]:
        member.loaded = {k: v if k == "pivots" else v.float() for k, v in member.loaded.items()}
    there = FusedLinear(members[1], device=gpu, make_product=server_product)
    x = torch.randn(tokens, INPUTS, dtype=torch.float64)
    assert there.kernels is not None
    for run in (there, torch.compile(there, fullgraph=True)):
        torch.testing.assert_close(run(x.float().cuda()).cpu().double(), here(x), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_models_that_were_moved_can_be_compiled_with_recorded_kernels(sequences, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, _, store, plan = made_on("cpu", sequences)
    compress(model, plan, store)
    model.cuda().eval()
    tokens = sequences[:1].cuda()
    with torch.no_grad():
        plain = model(tokens, use_cache=False).logits
        fast = torch.compile(model, mode="reduce-overhead")
        for _ in range(4):
            torch.compiler.cudagraph_mark_step_begin()
            found = fast(input_ids=tokens, use_cache=False).logits.clone()
            torch.testing.assert_close(plain, found, rtol=1e-3, atol=1e-3)
