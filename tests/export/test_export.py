from __future__ import annotations

import copy
import errno
import importlib
import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3Config
from transformers.pytorch_utils import Conv1D

from lowrank_pl.cli.evaluate import evaluate
from lowrank_pl.evaluate.likelihood import perplexity
from lowrank_pl.export import reload, reload_probe
from lowrank_pl.export.export import ExportReport, check_destination, load_compressed, save_compressed
from lowrank_pl.export.reload import ExportError, ReloadError
from lowrank_pl.factors.pivoting import pivot
from lowrank_pl.models import digests, hf_experts, hf_format, hf_layers, hf_quantized
from lowrank_pl.models.base import load_base
from lowrank_pl.models.digests import DIGESTS
from lowrank_pl.models.hf_layers import LowRankLinear, PivotedLinear
from lowrank_pl.models.lazy import open_skeleton
from lowrank_pl.models.tiny import FAMILIES, byte_tokenizer, tiny_model
from lowrank_pl.report import finish
from lowrank_pl.report.finish import Protocol, score_in_fresh_process
from lowrank_pl.utils.files import write_json
from lowrank_pl.utils.json_files import sealed
from tests.helpers import fork_server as forked
from tests.helpers.rounded_models import round_model

ROUNDED = {"rounded-llama": "llama", "rounded-qwen3": "qwen3", "rounded-gemma3": "gemma3", "rounded-gpt2": "gpt2"}
"""Names of exports whose layers and embeddings are rounded too, with their families."""

TOKENS = torch.arange(24)[None]


@torch.no_grad()
def compressed(family, dtype=torch.float32):
    """A tiny model with block layers of half their full rank, with their biases; two of three are pivoted."""
    model = tiny_model(family)
    if dtype != torch.float32:
        dense = model.state_dict()
        model = AutoModelForCausalLM.from_config(model.config, dtype=dtype).eval()
        model.load_state_dict(dense)
    modules = model.base_model.named_modules(prefix=model.base_model_prefix)
    linear = [(name, module) for name, module in modules if isinstance(module, (nn.Linear, Conv1D))]
    for number, (name, module) in enumerate(linear):
        weight = module.weight.T if isinstance(module, Conv1D) else module.weight
        rank = min(weight.shape) // 2
        left, sigma, right = torch.linalg.svd(weight.float(), full_matrices=False)
        left, right = left[:, :rank] * sigma[:rank], right[:rank]
        if number % 3 == 0:
            new = LowRankLinear.from_factors(left.to(dtype), right.to(dtype), module.bias)
        else:
            found = pivot(left, right, dtype=dtype)
            new = PivotedLinear.from_parts(found.weight, found.right, found.pivots, side=found.side, bias=module.bias)
        model.set_submodule(name, new)
    return model


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def generated(model):
    return model.generate(TOKENS[:, :5], max_new_tokens=12, do_sample=False, pad_token_id=256)


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """Every family, and rounded ones, exported as factors and merged, unverified, with the models they came from."""
    home = tmp_path_factory.mktemp("exports")
    models = {}
    for family in (*FAMILIES, *ROUNDED):
        model = round_model(compressed(ROUNDED[family])) if family in ROUNDED else compressed(family)
        models[family] = model
        tokenizer = byte_tokenizer(bos="gemma" in family)
        save_compressed(model, home / family, tokenizer=tokenizer, verify=False)
        save_compressed(model, home / "merged" / family, tokenizer=tokenizer, merge=True, verify=False)
        save_file({"logits": logits(model), "generated": generated(model)}, home / f"{family}.expected")
    return home, models


def run(script, *arguments, start=subprocess.run):
    """Run ``script`` in a process of its own, started by ``start``, and return what it printed as JSON."""
    command = [sys.executable, "-B", "-c", script, *map(str, arguments)]
    done = start(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


STRANGER = """
import json, sys, importlib.abc, os
home, families = sys.argv[1], sys.argv[2].split(",")
os.environ["HF_MODULES_CACHE"] = home + "/modules"
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "lowrank_pl":
            raise ImportError("blocked")
sys.meta_path.insert(0, Absent())
import torch
torch.set_num_threads(1)
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM
tokens = torch.arange(24)[None]
answer = {}
def attempt(load, use=False):
    try:
        model = load()
        if use:
            model(tokens)
    except Exception as error:
        return type(error).__name__ + ": " + str(error)
    return "no error"
for family in families:
    folder, expected = f"{home}/{family}", load_file(f"{home}/{family}.expected")
    answer[family] = found = {}
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(f"{home}/merged/{family}")(tokens).logits
        found["merged"] = float((merged - expected["logits"]).norm() / expected["logits"].norm())
        found["unaware"] = [
            attempt(lambda: AutoModelForCausalLM.from_pretrained(folder)),
            attempt(lambda: AutoModelForCausalLM.from_pretrained(folder, device_map="auto")),
            attempt(lambda: AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)),
            attempt(lambda: AutoModel.from_pretrained(folder)),
        ]
        disk = dict(device_map={"": "disk"}, offload_folder=f"{home}/offload-{family}")
        found["unaware_disk"] = attempt(lambda: AutoModelForCausalLM.from_pretrained(folder, **disk), use=True)
for family in families:
    folder, expected, found = f"{home}/{family}", load_file(f"{home}/{family}.expected"), answer[family]
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        found["logits"] = torch.equal(model(tokens).logits, expected["logits"])
        out = model.generate(tokens[:, :5], max_new_tokens=12, do_sample=False, pad_token_id=256)
        found["generated"] = torch.equal(out, expected["generated"])
        body = AutoModel.from_pretrained(folder, trust_remote_code=True)
        here = model.base_model(tokens).last_hidden_state
        found["body"] = torch.equal(body(tokens).last_hidden_state, here)
        model.save_pretrained(folder + "-again")
        again = AutoModelForCausalLM.from_pretrained(folder + "-again", trust_remote_code=True)
        found["again"] = torch.equal(again(tokens).logits, expected["logits"])
        found["class"] = type(again).__module__.split(".")[0] + " " + again.config.architectures[0]
print(json.dumps(answer))
"""


def test_every_family_in_a_process_without_the_package(exports):
    home, models = exports
    answer = run(STRANGER, home, ",".join((*FAMILIES, *ROUNDED)))
    for family, found in answer.items():
        assert found["merged"] < 1e-5, family
        for message in found["unaware"]:
            assert message.startswith("RuntimeError: You set `ignore_mismatched_sizes` to `False`"), (family, message)
        assert "shape" in found["unaware_disk"] or "size" in found["unaware_disk"], (family, found["unaware_disk"])
        assert found["logits"], family
        assert found["generated"], family
        assert found["body"], family
        assert found["again"], family
        assert found["class"] == f"transformers_modules {type(models[family]).__name__}"


IMPORTER = """
import json, sys
home, families = sys.argv[1], sys.argv[2].split(",")
import torch
torch.set_num_threads(1)
import lowrank_pl.models.hf_format
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
tokens = torch.arange(24)[None]
answer = {}
for family in families:
    model, info = AutoModelForCausalLM.from_pretrained(f"{home}/{family}", output_loading_info=True)
    expected = load_file(f"{home}/{family}.expected")
    with torch.no_grad():
        same = torch.equal(model(tokens).logits, expected["logits"])
    out = model.generate(tokens[:, :5], max_new_tokens=12, do_sample=False, pad_token_id=256)
    answer[family] = [same, torch.equal(out, expected["generated"]), *map(len, info.values())]
print(json.dumps(answer))
"""


def test_every_family_in_a_process_that_imports_the_format(exports):
    home, _ = exports
    answer = run(IMPORTER, home, ",".join((*FAMILIES, *ROUNDED)), start=forked.STRANGER.run)
    assert answer == {family: [True, True, 0, 0, 0, 0] for family in (*FAMILIES, *ROUNDED)}


@pytest.mark.parametrize("family", FAMILIES)
def test_here_reload_generate_and_tokenizer_equal(exports, family):
    home, models = exports
    loaded = load_compressed(home / family)
    assert torch.equal(logits(loaded), logits(models[family]))
    assert torch.equal(generated(loaded), generated(models[family]))
    assert not loaded.training
    tokenizer = AutoTokenizer.from_pretrained(home / family)
    expected = byte_tokenizer(bos=family.startswith("gemma"))
    assert tokenizer("hé")["input_ids"] == expected("hé")["input_ids"]
    assert tokenizer.chat_template == expected.chat_template


@pytest.mark.parametrize("family", FAMILIES)
def test_contents_of_the_folders(exports, family):
    home, models = exports
    config = json.loads((home / family / "config.json").read_text())
    modules = {}
    for name, module in models[family].named_modules():
        if isinstance(module, LowRankLinear):
            modules[name] = module.rank
        elif isinstance(module, PivotedLinear):
            modules[name] = {"rank": module.rank, "storage": "pivoted", "side": module.side}
    assert {type(entry) for entry in modules.values()} == {int, dict}
    assert config["quantization_config"] == {"modules": modules, "quant_method": "lowrank", "schema": 2}
    assert config["auto_map"]["AutoModelForCausalLM"] == f"hf_format.{type(models[family]).__name__}"
    plain = json.loads((home / "merged" / family / "config.json").read_text())
    assert not {"quantization_config", "auto_map"} & set(plain)
    expected = tiny_model(family)
    expected.save_pretrained(home / "dense" / family)
    dense = load_file(home / "dense" / family / "model.safetensors")
    merged = load_file(home / "merged" / family / "model.safetensors")
    assert {key: value.shape for key, value in merged.items()} == {key: value.shape for key, value in dense.items()}
    assert not [file.name for file in (home / "merged" / family).glob("*.py")]
    code = ["digests.py", "hf_experts.py", "hf_format.py", "hf_layers.py", "hf_quantized.py"]
    assert sorted(file.name for file in (home / family).glob("*.py")) == code


def test_the_model_in_memory_is_left_unchanged(tmp_path):
    model = compressed("gpt2").train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    modules = dict(model.named_modules())
    config, state = copy.deepcopy(model.config.to_dict()), {k: v.clone() for k, v in model.state_dict().items()}
    attributes = set(model.__dict__)
    for merge in (False, True):
        save_compressed(model, tmp_path / str(merge), tokenizer=byte_tokenizer(), merge=merge, verify=False)
    assert dict(model.named_modules()) == modules
    assert list(dict(model.named_modules())) == list(modules)
    assert [module.training for module in model.modules()] == modes
    assert model.config.to_dict() == config
    assert set(model.__dict__) == attributes
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


class FakePlan:
    def to_json(self):
        return '{"schema": 1}'


def test_the_check_passes_and_the_report_counts(tmp_path):
    model = compressed("gpt2", torch.bfloat16)
    out = tmp_path / "out"
    with forked.new_processes():
        report = save_compressed(model, out, tokenizer=byte_tokenizer(), plan=FakePlan(), card="# A card\n")
    weights = (out / "model.safetensors").stat().st_size
    assert report == ExportReport(directory=out, bytes=weights, merged=False, modules=8, verified=True)
    assert (out / "plan.json").read_text() == '{"schema": 1}'
    assert (out / "README.md").read_text() == "# A card\n"
    names = {"README.md", "chat_template.jinja", "config.json", "generation_config.json", "hf_format.py"}
    names |= {"hf_layers.py", "model.safetensors", "plan.json", "tokenizer.json", "tokenizer_config.json"}
    names |= {"digests.py", "hf_experts.py", "hf_quantized.py", "lowrank.sha256"}
    assert {file.name for file in out.iterdir()} == names
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    loaded = load_compressed(out)
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(logits(loaded), logits(model))


def test_a_loaded_model_is_merged_and_checked(exports, tmp_path):
    home, models = exports
    loaded = load_compressed(home / "gpt2")
    report = save_compressed(loaded, tmp_path / "merged", tokenizer=byte_tokenizer(), merge=True)
    assert report.merged
    assert report.modules == 8
    assert torch.equal(logits(loaded), logits(models["gpt2"]))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert type(plain.transformer.h[0].mlp.c_fc) is Conv1D
    torch.testing.assert_close(logits(plain), logits(loaded), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"a plain model, .*: load it with transformers"):
        load_compressed(tmp_path / "merged")


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules:UserWarning")
def test_a_model_that_is_partly_on_disk_is_merged(exports, tmp_path):
    home, models = exports
    here = ("lm_head", *(f"model.{part}" for part in ("embed_tokens", "layers.1", "norm", "rotary_emb")))
    places = {"model.layers.0": "disk", **dict.fromkeys(here, "cpu")}
    loaded = load_compressed(home / "qwen2", device_map=places, offload_folder=str(tmp_path / "offload"))
    save_compressed(loaded, tmp_path / "merged", tokenizer=byte_tokenizer(), merge=True, verify=False)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(plain), logits(models["qwen2"]), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules:UserWarning")
def test_embeddings_on_disk_and_a_tokenizer_with_code_of_its_own_are_checked(exports, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    (tmp_path / "letters.py").write_text(LETTERS)
    monkeypatch.syspath_prepend(tmp_path)
    tokenizer = importlib.import_module("letters").LetterTokenizer()
    tokenizer.register_for_auto_class()
    places = {"model.embed_tokens": "disk", **dict.fromkeys(("model.layers", "model.norm", "lm_head"), "cpu")}
    places["model.rotary_emb"] = "cpu"
    loaded = load_compressed(exports[0] / "llama", device_map=places, offload_folder=str(tmp_path / "offload"))
    assert loaded.get_input_embeddings().weight.is_meta
    assert save_compressed(loaded, tmp_path / "out", tokenizer=tokenizer).verified


LETTERS = """
from transformers import PreTrainedTokenizer


class LetterTokenizer(PreTrainedTokenizer):
    vocab_size = 256
    get_vocab = lambda self: {chr(byte): byte for byte in range(256)}
    _tokenize = lambda self, text: [chr(byte) for byte in text.encode()]
    _convert_token_to_id = lambda self, token: ord(token)
    _convert_id_to_token = lambda self, number: chr(number)
    save_vocabulary = lambda self, folder, filename_prefix=None: ()
"""


def test_a_model_with_images_loads_with_the_code_in_its_folder(tmp_path):
    text = tiny_model("gemma3").config
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    images = {**sizes, "image_size": 8, "patch_size": 4}
    config = Gemma3Config(text_config=text.to_dict(), vision_config=images, mm_tokens_per_image=4)
    model = AutoModelForCausalLM.from_config(config).eval()
    assert not type(model).__name__.endswith("ForCausalLM")
    name = "model.language_model.layers.0.mlp.up_proj"
    old = model.get_submodule(name)
    model.set_submodule(name, LowRankLinear(old.in_features, old.out_features, 4, bias=False))
    save_compressed(model, tmp_path / "out", tokenizer=byte_tokenizer(bos=True), verify=False)
    there = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert torch.equal(logits(there), logits(model))


@pytest.mark.parametrize("kind", ["LowRankLinear", "PivotedLinear"])
def test_layers_of_a_folders_copy_of_the_code_are_low_rank_too(tmp_path, kind):
    names = {"__name__": "copy_of_hf_layers"}
    exec(Path(hf_layers.__file__).read_text(encoding="utf-8"), names)
    model = compressed("gpt2")
    theirs = [module for module in model.modules() if type(module).__name__ == kind]
    for module in theirs:
        module.__class__ = names[kind]
        assert not isinstance(module, (LowRankLinear, PivotedLinear))
    assert len(theirs) == {"LowRankLinear": 3, "PivotedLinear": 5}[kind]
    report = save_compressed(model, tmp_path / "out", tokenizer=byte_tokenizer(), verify=False)
    assert report.modules == 8
    assert torch.equal(logits(load_compressed(tmp_path / "out")), logits(model))
    save_compressed(model, tmp_path / "merged", tokenizer=byte_tokenizer(), merge=True, verify=False)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-4, atol=1e-5)


def test_a_linear_layer_where_gpt2_has_conv1d_is_written_in_gpt2s_layout(tmp_path):
    model = compressed("gpt2")
    dense = tiny_model("gpt2").transformer.h[0].attn.c_proj  # square: a lost transposition would go unseen
    linear = nn.Linear(32, 32)
    linear.weight, linear.bias = nn.Parameter(dense.weight.T.contiguous()), dense.bias
    model.transformer.h[0].attn.c_proj = linear
    save_compressed(model, tmp_path / "out", tokenizer=byte_tokenizer(), verify=False)
    loaded = load_compressed(tmp_path / "out")
    assert torch.equal(loaded.transformer.h[0].attn.c_proj.weight, dense.weight)
    torch.testing.assert_close(logits(loaded), logits(model))
    assert model.transformer.h[0].attn.c_proj is linear


def test_a_failed_check_names_what_differs_and_keeps_the_older_export(tmp_path):
    out = tmp_path / "out"
    model = compressed("llama")
    save_compressed(model, out, tokenizer=byte_tokenizer(), verify=False)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    rotary = model.model.rotary_emb
    rotary.inv_freq = rotary.inv_freq.to(torch.bfloat16)  # as model.to(torch.bfloat16) would
    with pytest.raises(
        ExportError, match=r"inv_freq is torch.bfloat16 in memory and torch.float32 reloaded; load the base with dtype="
    ):
        save_compressed(model, out, tokenizer=byte_tokenizer())
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"logits": "0"}, "all weights are equal, .*: look for hooks"),
        ({"missing": ["a.weight"]}, "missing weights: a.weight"),
        ({"unexpected": ["b.weight"]}, "unexpected weights: b.weight"),
        ({"token_ids": [1]}, "other token ids"),
        ({"chat_template": None}, "another chat template"),
    ],
)
def test_every_answer_of_the_fresh_process_counts(tmp_path, monkeypatch, change, text):
    model, tokenizer = compressed("llama"), byte_tokenizer()
    answer = {
        "logits": reload_probe.digest(reload_probe.probe(model)),
        "missing": [],
        "unexpected": [],
        "token_ids": tokenizer(reload_probe.PROBE_TEXT)["input_ids"],
        "chat_template": tokenizer.chat_template,
    }
    monkeypatch.setattr(reload, "_ask_fresh_process", lambda *_, **__: answer)
    save_compressed(model, tmp_path / "good", tokenizer=tokenizer)
    answer.update(change)
    with pytest.raises(ExportError, match=text):
        save_compressed(model, tmp_path / "bad", tokenizer=tokenizer)
    assert not (tmp_path / "bad").exists()


def test_a_fresh_process_that_fails_is_quoted(tmp_path, monkeypatch):
    broken = tmp_path / "broken.py"
    broken.write_text("import sys\nprint('x' * 5000 + ' no such kernel', file=sys.stderr)\nsys.exit(3)\n")
    monkeypatch.setattr(reload_probe, "__file__", str(broken))
    with pytest.raises(ExportError, match=r"exit status 3\):\nx{500,2000} no such kernel"):
        save_compressed(compressed("llama"), tmp_path / "out", tokenizer=byte_tokenizer())
    assert not (tmp_path / "out").exists()


def test_a_changed_weight_is_named(exports):
    home, models = exports
    model = copy.deepcopy(models["llama"])
    model.model.norm.weight.data += 1
    assert reload._first_difference(model, home / "llama") == "model.norm.weight differs"


def test_on_a_gpu_rounding_is_no_difference_and_more_is(exports, monkeypatch):
    home, models = exports
    model, tokenizer = models["llama"], byte_tokenizer()
    reference = reload_probe.probe(model)
    other = reference.clone()

    def answer(_, __, logits, **___):
        torch.save(other, logits)
        told = {"token_ids": tokenizer(reload_probe.PROBE_TEXT)["input_ids"], "chat_template": tokenizer.chat_template}
        return {"logits": reload_probe.digest(other), "missing": [], "unexpected": [], **told}

    monkeypatch.setattr(reload, "_ask_fresh_process", answer)
    check = partial(reload.check_reload, model, home / "llama", reference, tokenizer, merged=False)
    other[0, 0] += 1e-5
    with pytest.raises(ExportError, match=r"all weights are equal, .*: look for hooks"):
        check()
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    check()
    other[0] += 1.0
    with pytest.raises(ExportError, match=r"weights are equal, but the logits differ by 0\.\d+"):
        check()


@pytest.mark.parametrize(("device", "written"), [("cpu", False), ("cuda", True)])
def test_only_logits_of_a_gpu_take_space_in_the_temporary_folder(exports, monkeypatch, device, written):
    home, models = exports
    asked = []

    def run(command, **_):
        asked.append(json.loads(command[-1]))
        return subprocess.CompletedProcess(command, -9, "", "")

    monkeypatch.setattr(reload, "subprocess", SimpleNamespace(run=run))
    monkeypatch.setattr(type(models["llama"]), "device", torch.device(device))
    with pytest.raises(ReloadError, match="signal 9 ended it, as when memory runs out"):
        reload.compare_reload(models["llama"], home / "llama", None, byte_tokenizer(), merged=False)
    assert (asked[0]["logits"] is not None) == written


def test_merged_weights_that_overflow_are_refused():
    with pytest.raises(ExportError, match=r"by nan .* 0.03[0-9]* allowed in torch.float16.* export in float32"):
        reload.check_merged(torch.ones(2).half(), torch.tensor([1.0, float("inf")]).half() * 0)
    reload.check_merged(torch.ones(2), torch.ones(2) + 1e-6)


def test_logits_that_are_nan_are_never_exported(tmp_path):
    model = compressed("llama")
    model.model.layers[0].mlp.up_proj.right.data[0, 0] = float("nan")
    with pytest.raises(ExportError, match="NaN; check its factors"):
        save_compressed(model, tmp_path / "out", tokenizer=byte_tokenizer())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full .*free some space"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "the disk is full .*free some space"),
        (SafetensorError("I/O error: File too large (os error 27)"), "a file may not become so large .*ulimit -f"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "memory ran out .*smaller batches"),
        (KeyboardInterrupt(), None),
    ],
    ids=["disk", "safetensors", "file size", "memory", "ctrl-c"],
)
def test_nothing_is_left_of_an_interrupted_export(tmp_path, monkeypatch, error, text):
    def fail(*_, **__):
        raise error

    model = compressed("llama")
    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", fail)
    with pytest.raises(KeyboardInterrupt if text is None else ExportError, match=text):
        save_compressed(model, tmp_path / "out", tokenizer=byte_tokenizer(), merge=True)
    assert not list(tmp_path.iterdir())
    assert isinstance(model.model.layers[0].mlp.up_proj, PivotedLinear)


def test_other_os_errors_stay_what_they_are(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", fail)
    with pytest.raises(PermissionError):
        save_compressed(compressed("llama"), tmp_path / "out", tokenizer=byte_tokenizer())


def test_a_folder_that_is_no_export_is_not_replaced(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(ValueError, match=r"other files .*: name a new folder or empty this one"):
        save_compressed(compressed("llama"), tmp_path, tokenizer=byte_tokenizer())
    with pytest.raises(ValueError, match=r"thesis.tex.* is a file: name a folder"):
        save_compressed(compressed("llama"), tmp_path / "thesis.tex", tokenizer=byte_tokenizer())
    (tmp_path / "empty").mkdir()
    # The second export of each kind replaces the first.
    for merge in (True, True, False, False):
        target = tmp_path / "empty" if not merge else tmp_path / "new" / "deep"
        save_compressed(compressed("llama"), target, tokenizer=byte_tokenizer(), merge=merge, verify=False)


def test_files_of_others_in_an_export_are_not_deleted(tmp_path, monkeypatch):
    folder = tmp_path / "small"
    save_compressed(compressed("llama"), folder, tokenizer=byte_tokenizer(), verify=False)
    # What commands write into an export goes with it, and so does a part of it that is damaged.
    write_json(folder / "doctor.json", sealed({"health": "healthy"}))
    (folder / "report.html").touch()
    (folder / "config.json").write_bytes(b"\xff")
    check_destination(folder)
    (folder / "adapter").mkdir()
    (folder / "notes.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"would be deleted: adapter, notes\.json; name a new folder"):
        check_destination(folder)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ValueError, match="is the model that this is made from"):
        check_destination(folder, sources=["~/small"])
    monkeypatch.chdir(folder / "adapter")
    with pytest.raises(ValueError, match="is the current folder, or holds it"):
        check_destination(folder)


def test_a_mount_point_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("os.path.ismount", lambda path: path == tmp_path)
    with pytest.raises(ValueError, match="name a folder in it"):
        save_compressed(compressed("llama"), tmp_path, tokenizer=byte_tokenizer())


def test_layers_that_cannot_be_stored_are_refused(tmp_path):
    def export(name, module):
        model = compressed("llama")
        model.set_submodule(name, module)
        save_compressed(model, tmp_path / "out", tokenizer=byte_tokenizer())

    name = "model.layers.0.self_attn.o_proj"
    with pytest.raises(ValueError, match=f"{name} has rank 32, .*: leave it dense"):
        export(name, LowRankLinear(32, 32, 32, bias=False))
    with pytest.raises(ValueError, match=f"{name} has a bias, unlike"):
        export(name, LowRankLinear(32, 32, 3))
    with pytest.raises(ValueError, match=f"{name} has a bias, unlike"):
        export(name, PivotedLinear(32, 32, 3, side="in"))
    with pytest.raises(ValueError, match=f"{name} has a bias, unlike"):
        export(name, nn.Linear(32, 32))
    with pytest.raises(
        ValueError, match=f"{name} is a Identity, .* a Linear there: .*compress the model, or merge adapters"
    ):
        export(name, nn.Identity())
    with pytest.raises(
        ValueError, match=r"model\.extra is a Linear, .* none there: .*compress the model, or merge adapters"
    ):
        export("model.extra", nn.Linear(2, 2))


def test_what_is_no_model_of_transformers_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"a Sequential was given: expected a model of transformers; merge an adapter"):
        save_compressed(nn.Sequential(tiny_model("llama")), tmp_path / "out", tokenizer=byte_tokenizer())
    monkeypatch.setenv("HOME", str(tmp_path))
    save_compressed(compressed("llama"), "~/out", tokenizer=byte_tokenizer(), verify=False)
    assert load_compressed(tmp_path / "out").num_parameters()


def damaged(source, target, change):
    """Copy an export and change the copy; without its digests, as an earlier version would have written it."""
    target.mkdir()
    for file in source.iterdir():
        if file.is_file() and file.name != DIGESTS:
            (target / file.name).write_bytes(file.read_bytes())
    change(target)
    return target


def truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def drop(key):
    def change(folder):
        weights = load_file(folder / "model.safetensors")
        del weights[key]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def in_config(old, new):
    def change(folder):
        text = (folder / "config.json").read_text()
        assert old in text
        (folder / "config.json").write_text(text.replace(old, new))

    return change


def index(text):
    """Damage the index of sharded weights."""

    def change(folder):
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(text)

    return change


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (in_config('"hidden_size": 32', '"hidden_size": "32"'), "JSON files in .*copy or export it again"),
        (in_config('"quantization_config": {', '"quantization_config": [1], "x": {'), "has the quantization_config"),
        (
            in_config('"modules": {', '"modules": 5, "shapes": {'),
            "has the modules 5: expected an entry for each module",
        ),
        (index("{}"), "JSON files in .*KeyError: 'weight_map'.*copy or export it again"),
        (index('{"metadata": {'), "JSON files in .*JSONDecodeError: .*copy or export it again"),
        (
            lambda folder: (folder / "model.safetensors").unlink(),
            "weights in .*: Error no file.*copy or export it again",
        ),
        (truncate, "weights in .*copy or export it again"),
        (drop("model.layers.0.mlp.up_proj.right"), "no model.layers.0.mlp.up_proj.right: .*copy or export it again"),
        (drop("model.layers.0.mlp.up_proj.pivots"), "no model.layers.0.mlp.up_proj.pivots: .*copy or export it again"),
        (drop("model.norm.weight"), "no model.norm.weight: .*copy or export it again"),
        (lambda folder: (folder / "config.json").unlink(), "no readable config.json: expected a compressed model"),
        (
            lambda folder: (folder / "config.json").write_text("{"),
            "no readable config.json: expected a compressed model",
        ),
        (
            lambda folder: (folder / "config.json").write_text("[]"),
            "no readable config.json: expected a compressed model",
        ),
        (in_config('"vocab_size": 261', '"vocab_size": 262'), "other shapes than the config says: copy or export it"),
        (in_config('"schema": 2', '"schema": "2"'), "schema '2': expected a whole number"),
    ],
)
def test_a_damaged_folder_is_an_error(exports, tmp_path, change, text):
    folder = damaged(exports[0] / "llama", tmp_path / "copy", change)
    with pytest.raises(ValueError, match=text):
        load_compressed(folder)


@pytest.fixture
def flipped(exports, tmp_path):
    """A function that returns a copy of an export of which one bit in one file differs."""

    def copy_with_a_flip(family, name, place=0):
        folder = shutil.copytree(exports[0] / family, tmp_path / "flipped")
        data = bytearray((folder / name).read_bytes())
        data[place if place < 0 else len(data) // 2] ^= 1
        (folder / name).write_bytes(data)
        return folder

    return copy_with_a_flip


def test_a_flipped_bit_in_the_weights_is_refused(flipped):
    folder = flipped("llama", "model.safetensors")
    for load in (load_compressed, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match=r"model.safetensors in .* SHA-256 .*copy the folder again"):
            load(folder)


def test_a_flipped_bit_in_a_merged_export_is_refused(flipped):
    folder = flipped("merged/llama", "model.safetensors")
    for load in (load_base, open_skeleton):
        with pytest.raises(ValueError, match=r"model.safetensors in .*copy the folder again"):
            load(str(folder))


def test_the_check_of_the_files_can_be_left_out(flipped, monkeypatch):
    folder = flipped("llama", "model.safetensors")
    one = load_compressed(folder, verify=False)
    monkeypatch.setenv("LOWRANK_VERIFY", "0")
    assert torch.equal(logits(one), logits(AutoModelForCausalLM.from_pretrained(folder)))


def test_a_changed_config_is_logged(flipped, caplog):
    load_compressed(flipped("llama", "generation_config.json", -3))
    assert "generation_config.json in" in caplog.text


def test_the_fresh_process_starts_in_an_empty_folder(exports, monkeypatch):
    seen = []

    def run(*_, cwd, **__):
        seen.append(list(Path(cwd).iterdir()))
        return subprocess.CompletedProcess([], 1, "", "")

    monkeypatch.setattr(reload.subprocess, "run", run)
    model, tokenizer = exports[1]["llama"], byte_tokenizer()
    with pytest.raises(reload.ReloadError):
        reload.compare_reload(model, exports[0] / "llama", torch.ones(1), tokenizer, merged=False)
    assert seen == [[]]


def test_the_process_that_scores_starts_in_a_folder_of_its_own(tmp_path, monkeypatch):
    seen = []

    def run(words, cwd):
        seen.append((words[1], [file.suffix for file in Path(cwd).iterdir()]))
        return subprocess.CompletedProcess([], 1)

    monkeypatch.setattr(finish.subprocess, "run", run)
    with pytest.raises(ExportError):
        score_in_fresh_process(tmp_path, Protocol("text", torch.ones(1, 2)))
    [(flag, suffixes)] = seen
    assert (flag, set(suffixes)) == ("-c", {".json", ".safetensors"})


def test_a_folder_without_a_compressed_model_is_an_error(exports, tmp_path):
    with pytest.raises(ValueError, match=r"absent': expected one written by save_compressed"):
        load_compressed(tmp_path / "absent")
    config = json.loads((exports[0] / "llama" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"quantised by gptq, .*: load it with transformers"):
        load_compressed(tmp_path)


def test_a_newer_schema_is_an_error(exports, tmp_path):
    def newer(folder):
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] |= {"schema": 7, "pivots": {}}
        (folder / "config.json").write_text(json.dumps(config))

    folder = damaged(exports[0] / "llama", tmp_path / "copy", newer)
    with pytest.raises(ValueError, match=r"schema 7, .* up to 6: upgrade lowrank_pl"):
        load_compressed(folder)


CUSTOM = """
from transformers import LlamaForCausalLM


class Shouting(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = 2 * out.logits
        return out
"""


def test_a_model_with_code_of_its_own_keeps_it(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    source = tmp_path / "source"
    for part in (tiny_model("llama"), byte_tokenizer()):
        part.save_pretrained(source)
    (source / "shouting.py").write_text(CUSTOM)
    config = json.loads((source / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "shouting.Shouting"}
    (source / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True)
    model.model.layers[0].mlp.up_proj = LowRankLinear(32, 96, 8, bias=False)
    save_compressed(model, tmp_path / "out", tokenizer=byte_tokenizer(), verify=False)
    loaded = load_compressed(tmp_path / "out", trust_remote_code=True)
    assert type(loaded).__name__ == "Shouting"
    assert torch.equal(logits(loaded), logits(model))
    # Scored as `fit` does at its end, and by `lowrank evaluate`.
    tokens = torch.arange(64).view(2, 32)
    expected = perplexity(model, tokens).nats
    score, _ = score_in_fresh_process(tmp_path / "out", Protocol("text", tokens), trust=True)
    assert score.nats == pytest.approx(expected)
    text = {"text": "python-docs", "length": 32, "sequences": 1}
    said = evaluate(str(tmp_path / "out"), reference=str(source), trust_remote_code=True, device="cpu", **text)
    assert said["divergence"]["kl"] > 0


def test_the_digest_sees_every_bit():
    one = torch.ones(4)
    assert reload_probe.digest(one) == reload_probe.digest(torch.ones(8)[::2])
    others = [torch.ones(2, 2), torch.ones(4).int(), torch.nextafter(one, 2 * one), torch.ones(4).bfloat16()]
    assert len({reload_probe.digest(tensor) for tensor in [one, *others]}) == 5


def test_files_of_the_package_are_self_contained():
    for module in (digests, hf_experts, hf_format, hf_layers, hf_quantized, reload_probe):
        assert "import lowrank_pl" not in Path(module.__file__).read_text().replace("``import lowrank_pl", "")
        assert "from lowrank_pl" not in Path(module.__file__).read_text()
