"""Loading the base: every form of name, every refusal; GGUF files are written here, small and random."""

import json
import sys

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, T5Config

from lowrank_pl.models.base import load_base, load_tokenizer, resolve_base, stored_dtype
from lowrank_pl.models.tiny import FAMILIES, byte_tokenizer, tiny_model

TEXT = "héllo  wörld 漢字 \n\t\x00 don't . 🙂 a , b "
TOKENS = torch.arange(3, 15)[None]


@pytest.fixture
def folder(tmp_path, llama):
    llama.save_pretrained(tmp_path / "llama")
    byte_tokenizer().save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def test_a_folder_whose_config_names_no_type_has_that_of_its_weights(folder):
    tiny_model("llama").half().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    assert config.pop("dtype") == "float16"
    (folder / "config.json").write_text(json.dumps(config))
    assert stored_dtype(str(folder)) == torch.float16


def permuted(weight, heads):
    """Return a query or key weight in llama.cpp's order of rotary channels."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def gguf_names(model):
    """Yield the name and array under which llama.cpp stores each weight of a llama."""
    inner = model.model
    yield "token_embd.weight", inner.embed_tokens.weight
    yield "output.weight", model.lm_head.weight
    yield "output_norm.weight", inner.norm.weight
    for index, block in enumerate(inner.layers):
        attention, mlp = block.self_attn, block.mlp
        parts = {
            "attn_q": permuted(attention.q_proj.weight, 4),
            "attn_k": permuted(attention.k_proj.weight, 2),
            "attn_v": attention.v_proj.weight,
            "attn_output": attention.o_proj.weight,
            "ffn_gate": mlp.gate_proj.weight,
            "ffn_up": mlp.up_proj.weight,
            "ffn_down": mlp.down_proj.weight,
            "attn_norm": block.input_layernorm.weight,
            "ffn_norm": block.post_attention_layernorm.weight,
        }
        for name, weight in parts.items():
            yield f"blk.{index}.{name}.weight", weight


def write_gguf(path, model, *, quantise=True):
    """Write ``model`` as a GGUF file whose MLP weights are Q8_0 blocks and put the rounded ones into the model."""
    config, tokenizer = model.config, byte_tokenizer()
    tokens = tokenizer.convert_ids_to_tokens(range(config.vocab_size))
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 256 + [3] * (len(tokens) - 256))
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_bos_token_id(257)
    writer.add_eos_token_id(258)
    writer.add_pad_token_id(256)
    for name, weight in gguf_names(model):
        data = weight.detach().contiguous().numpy()
        if quantise and "ffn_" in name and "norm" not in name:
            packed = gguf.quantize(data, GGMLQuantizationType.Q8_0)
            weight.data.copy_(torch.from_numpy(gguf.dequantize(packed, GGMLQuantizationType.Q8_0)))
            writer.add_tensor(name, packed, raw_dtype=GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def gguf_file(tmp_path, llama):
    (tmp_path / "files").mkdir()
    write_gguf(tmp_path / "files" / "tiny.Q8_0.gguf", llama)
    return tmp_path / "files" / "tiny.Q8_0.gguf"


@pytest.mark.parametrize("family", FAMILIES)
def test_random_model_is_frozen_reproducible_and_alive(family):
    state = torch.random.get_rng_state()
    model, again, other = load_base(f"random:{family}"), tiny_model(family), tiny_model(family, seed=1, layers=3)
    assert torch.equal(state, torch.random.get_rng_state())
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    logits = model(TOKENS).logits
    assert logits.shape[-1] == len(byte_tokenizer()) == len(byte_tokenizer(bos=True))
    assert torch.equal(logits, again(TOKENS).logits)
    assert not torch.allclose(logits, other(TOKENS).logits, atol=0.1)
    assert 0.3 < logits.std() < 3
    biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
    assert all(bias.abs().min() > 0 for bias in biases)
    assert bool(biases) == (family in ("qwen2", "opt", "gpt2", "gpt_neox"))
    assert model.generate(TOKENS, min_new_tokens=2, max_new_tokens=2, do_sample=False).shape == (1, 14)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"family": "bert"}, "family 'bert' is not known: expected one of llama, mistral"),
        ({"family": "llama", "hidden": 24}, "hidden=24: a random model needs .* multiple of 16"),
        ({"family": "llama", "layers": 0}, "layers=0"),
    ],
)
def test_random_model_refuses(arguments, text):
    with pytest.raises(ValueError, match=text):
        tiny_model(**arguments)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("saved", [False, True])
def test_byte_tokenizer(tmp_path, bos, saved):
    tokenizer = byte_tokenizer(bos=bos)
    if saved:
        tokenizer.save_pretrained(tmp_path)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer(TEXT)["input_ids"]
    assert ids == [257] * bos + list(TEXT.encode())
    assert tokenizer.decode(ids, skip_special_tokens=True) == TEXT
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (256, 257, 258)
    chat = [{"role": "user", "content": "hi"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "<|bos|>" * bos + "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    expected = [257] * bos + [259, *b"user\nhi", 260, *b"\n"]
    assert tokenizer.apply_chat_template(chat)["input_ids"] == expected


def test_resolve(folder, gguf_file):
    hub = resolve_base("HuggingFaceTB/SmolLM2-135M")
    assert (hub.name, hub.path, hub.gguf_file) == ("HuggingFaceTB/SmolLM2-135M",) * 2 + (None,)
    assert resolve_base(str(folder)).name == "llama"
    direct, only_file = resolve_base(str(gguf_file)), resolve_base(str(gguf_file.parent))
    assert direct == only_file
    assert (direct.name, direct.path, direct.gguf_file) == ("tiny.Q8_0", str(gguf_file.parent), "tiny.Q8_0.gguf")
    assert resolve_base("random:opt").family == "opt"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_folder_loads_in_the_requested_type(folder, llama, dtype):
    model = load_base(str(folder), dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert not model.training
    assert not model.lm_head.weight.requires_grad
    # Rotary frequencies keep their precision, which .to(bfloat16) would take from them.
    assert torch.equal(model.model.rotary_emb.inv_freq, llama.model.rotary_emb.inv_freq)
    weight = llama.model.layers[1].mlp.up_proj.weight
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, weight.to(dtype))
    assert load_tokenizer(str(folder))(TEXT)["input_ids"] == list(TEXT.encode())


def test_gguf_is_dequantised_and_can_be_saved(gguf_file, llama, tmp_path):
    model = load_base(str(gguf_file))
    logits = model(TOKENS).logits
    assert torch.equal(logits, llama(TOKENS).logits)
    plain = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32)
    assert torch.equal(logits, plain(TOKENS).logits)
    assert all(type(module) is nn.Linear for name, module in model.named_modules() if name.endswith("_proj"))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not hasattr(model.config, "quantization_config")
    assert (model.generation_config.bos_token_id, model.generation_config.eos_token_id) == (257, 258)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(load_base(str(tmp_path / "saved"))(TOKENS).logits, logits)
    tokenizer = load_tokenizer(str(gguf_file))
    assert tokenizer("ab é")["input_ids"] == list("ab é".encode())
    assert tokenizer.eos_token_id == 258


def test_gguf_in_bfloat16_keeps_the_rotary_buffers(gguf_file, llama):
    model = load_base(str(gguf_file), dtype=torch.bfloat16)
    weight = llama.model.layers[0].mlp.down_proj.weight
    assert torch.equal(model.model.layers[0].mlp.down_proj.weight, weight.to(torch.bfloat16))
    assert torch.equal(model.model.rotary_emb.inv_freq, llama.model.rotary_emb.inv_freq)
    assert model.config.dtype == torch.bfloat16


def make_package(tmp_path, monkeypatch, name, files):
    package = tmp_path / "site" / name
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('must never be imported')")
    for file in files:
        (package / file).touch()
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return package


def test_package_is_found_and_not_imported(tmp_path, monkeypatch, llama):
    package = make_package(tmp_path, monkeypatch, "llm_for_this_test", [])
    write_gguf(package / "weights.gguf", llama, quantise=False)
    spec = resolve_base("package:llm-for-this-test")
    assert (spec.path, spec.gguf_file) == (str(package), "weights.gguf")
    assert torch.equal(load_base("package:llm_for_this_test")(TOKENS).logits, llama(TOKENS).logits)
    assert "llm_for_this_test" not in sys.modules


@pytest.mark.parametrize(
    ("files", "found"),
    [(["a.gguf", "b.gguf"], "found a.gguf, b.gguf;"), (["a.bin"], "found none, but __init__.py, a.bin;")],
)
def test_package_needs_one_gguf(tmp_path, monkeypatch, files, found):
    make_package(tmp_path, monkeypatch, "llm_with_files", files)
    with pytest.raises(ValueError, match=f"exactly one .gguf file in .*llm_with_files, {found} give the path"):
        resolve_base("package:llm_with_files")


@pytest.mark.parametrize(
    ("base", "text"),
    [
        ("", "empty: give a hub id, a local folder"),
        ("random:bert", "'random:bert': unknown family; expected one of llama"),
        ("package:no_such_thing", "no_such_thing.*; install it"),
        ("package:os.path", "os.path.*; install it"),
        ("package:json.decoder", "json.decoder.*; install it"),
        ("./nowhere", "'./nowhere': no such file or folder; give a hub id"),
        ("nowhere.gguf", "no such file or folder"),
        ("a/b/c", "no such file or folder"),
        (__file__, "not a .gguf file; give a hub id"),
    ],
)
def test_names_refused(base, text):
    with pytest.raises(ValueError, match=text):
        resolve_base(base)


@pytest.mark.parametrize("load", [load_base, load_tokenizer])
def test_unreachable_hub_id(load):
    with pytest.raises(ValueError, match=r"'nobody/no-such-model'.*check the spelling"):
        load("nobody/no-such-model")


def test_dtype_refused():
    with pytest.raises(ValueError, match=r"torch.int8: give float32, bfloat16 or float16"):
        load_base("random:llama", dtype=torch.int8)


def test_folder_without_model(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"but notes.txt; give the folder"):
        load_base(str(tmp_path))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_folder_without_tokenizer(tmp_path, family):
    # Transformers makes a GPT-2 tokenizer of nothing, without complaint.
    tiny_model(family).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"tokenizer of .*give a folder with the tokenizer's files"):
        load_tokenizer(str(tmp_path))


def test_unreadable_gguf(tmp_path):
    (tmp_path / "bad.gguf").write_text("garbage" * 10)
    with pytest.raises(ValueError, match=r"'bad.gguf'.*check that the file is complete"):
        load_base(str(tmp_path / "bad.gguf"))


def test_truncated_gguf(gguf_file):
    gguf_file.write_bytes(gguf_file.read_bytes()[:-20000])
    with pytest.raises(ValueError, match=r"'tiny.Q8_0.gguf'.*check that the file is complete"):
        load_base(str(gguf_file))


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"\(gptq\).*give the unquantised"),
        (
            {"quantization_config": {"quant_method": "lowrank"}},
            "already compressed .*: give the dense model .* load_compressed",
        ),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification: give a decoder"),
        ({"model_type": "zorro"}, "check its config.json"),
        ({"num_hidden_layers": 3}, "lacks 9 weights .*model.layers.2.input_layernorm.weight.*; give the checkpoint"),
        ({"hidden_size": 64}, "llama.*check that the checkpoint is complete"),
    ],
)
def test_checkpoints_refused(folder, changes, text):
    edit_config(folder, **changes)
    with pytest.raises(ValueError, match=text):
        load_base(str(folder))


@pytest.mark.parametrize(("config", "text"), [(T5Config, "T5"), (BertConfig, "BertForMaskedLM")])
def test_other_kinds_of_models_refused(tmp_path, config, text):
    config(architectures=["BertForMaskedLM"] if config is BertConfig else None).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"but .*{text}.*give a decoder".replace("T5", "t5")):
        load_base(str(tmp_path))


def test_damaged_tokenizer(folder):
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(ValueError, match=r"tokenizer of .*llama'"):
        load_tokenizer(str(folder))


def test_a_cause_of_several_lines_is_not_cut(folder, monkeypatch):
    def fail(*_, **__):
        raise ValueError("Couldn't instantiate the backend tokenizer from one of: \n(1) a file, \n(2) sentencepiece.")

    monkeypatch.setattr("lowrank_pl.models.base.AutoTokenizer.from_pretrained", fail)
    with pytest.raises(ValueError, match=r"from one of: \(1\) a file, \(2\) sentencepiece; give a folder"):
        load_tokenizer(str(folder))


def test_damaged_weights(folder):
    (folder / "model.safetensors").write_bytes(b"garbage, not tensors")
    with pytest.raises(ValueError, match=r"weights of .*llama.*check that the checkpoint is complete"):
        load_base(str(folder))


def test_damaged_configuration(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"not a valid JSON file; check its config.json"):
        load_base(str(folder))


REMOTE = """
from transformers import LlamaConfig, LlamaForCausalLM
class Config(LlamaConfig):
    model_type = "own_llama"
class Model(LlamaForCausalLM):
    config_class = Config
"""


def test_remote_code_runs_only_if_it_is_trusted(folder, llama):
    (folder / "own.py").write_text(REMOTE)
    auto = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    edit_config(folder, model_type="own_llama", architectures=["Model"], auto_map=auto)
    with pytest.raises(ValueError, match="its own Python code; set trust_remote_code to true"):
        load_base(str(folder))
    model = load_base(str(folder), trust_remote_code=True)
    assert torch.equal(model(TOKENS).logits, llama(TOKENS).logits)
