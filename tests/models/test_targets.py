"""The targets of each family; replacing all of them by exact factors changes nothing."""

import logging

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from lowrank_pl.models.hf_layers import LowRankLinear
from lowrank_pl.models.targets import decoder_blocks, dense_weight, find_targets, replace_module
from lowrank_pl.models.tiny import FAMILIES, tiny_model

TOKENS = torch.arange(3, 19).view(2, 8)
LLAMA = [
    "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj mlp.up_proj",
    "mlp.down_proj",
]
GROUPS = dict.fromkeys(["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3"], LLAMA) | {
    "phi3": ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"],
    "opt": ["self_attn.q_proj self_attn.k_proj self_attn.v_proj", "self_attn.out_proj", "fc1", "fc2"],
    "gpt2": ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"],
    "gpt_neox": ["attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"],
}
BLOCKS = {"opt": "model.decoder.layers", "gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers"}


class ExactFactors(nn.Module):
    """All singular triplets of a linear layer, and its bias."""

    def __init__(self, module):
        super().__init__()
        u, s, v = torch.linalg.svd(dense_weight(module).detach(), full_matrices=False)
        self.left, self.right, self.bias = u * s, v, module.bias

    def forward(self, x):
        y = x @ self.right.T @ self.left.T
        return y if self.bias is None else y + self.bias


def kinds(targets):
    return sorted({target.kind for target in targets.modules})


@pytest.mark.parametrize("family", FAMILIES)
def test_targets_and_groups_of_each_family(family):
    model = tiny_model(family)
    found = find_targets(model)
    assert found.skipped == ()
    prefix, blocks = decoder_blocks(model)
    assert prefix == BLOCKS.get(family, "model.layers")
    assert model.get_submodule(prefix) is blocks
    assert len(blocks) == 2
    # In the order of the forward pass, both blocks alike.
    expected = [(block, kind) for block in (0, 1) for group in GROUPS[family] for kind in group.split()]
    assert [(target.block, target.kind) for target in found.modules] == expected
    for target in found.modules:
        module = model.get_submodule(target.name)
        assert target.name == f"{prefix}.{target.block}.{target.kind}"
        assert target.shape == tuple(dense_weight(module).shape)
        assert target.transposed == isinstance(module, Conv1D) == (family == "gpt2")
        mates = next(group for group in GROUPS[family] if target.kind in group.split())
        assert target.group == f"{prefix}.{target.block}.{mates.split()[0]}"


@pytest.mark.parametrize("family", FAMILIES)
def test_exact_factors_in_every_place_leave_the_logits(family):
    model = tiny_model(family).double()
    dense = model(TOKENS).logits
    targets = find_targets(model).modules
    for target in targets:
        replace_module(model, target.name, ExactFactors(model.get_submodule(target.name)))
    assert sum(isinstance(module, ExactFactors) for module in model.modules()) == len(targets)
    torch.testing.assert_close(model(TOKENS).logits, dense, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", ["qwen2", "opt", "gpt2", "gpt_neox"])
def test_biases_of_targets_matter(family):
    model = tiny_model(family)
    dense = model(TOKENS).logits
    for target in find_targets(model).modules:
        bias = model.get_submodule(target.name).bias
        if bias is not None:
            bias.data.zero_()
    assert not torch.allclose(model(TOKENS).logits, dense, atol=0.05)


def test_model_is_left_as_it_was(llama):
    llama.train()
    llama.model.layers[0].eval()
    state = torch.random.get_rng_state()
    find_targets(llama)
    assert llama.training
    assert not llama.model.layers[0].mlp.training
    assert llama.model.layers[1].mlp.training
    assert not any(module._forward_pre_hooks for module in llama.modules())
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in llama.parameters())


def test_hooks_go_even_when_the_forward_fails(llama, monkeypatch):
    monkeypatch.setattr(llama.model.norm, "forward", lambda x: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        find_targets(llama.train())
    assert llama.model.layers[0].training
    assert not any(module._forward_pre_hooks for module in llama.modules())


def test_globs_match_the_full_name_or_the_name_in_the_block(llama, caplog):
    with caplog.at_level(logging.INFO):
        found = find_targets(llama, include=["self_attn.*", "model.layers.1.mlp.*"], exclude=["*.q_proj"])
    assert [target.name for target in found.modules if target.block == 0] == [
        f"model.layers.0.self_attn.{name}_proj" for name in "kvo"
    ]
    # With q out, k is the first of its group.
    assert found.modules[1].group == "model.layers.0.self_attn.k_proj"
    assert len([target for target in found.modules if target.block == 1]) == 6
    assert {entry.name: entry.reason for entry in found.skipped} == {
        "model.layers.0.self_attn.q_proj": "excluded by pattern '*.q_proj'",
        "model.layers.1.self_attn.q_proj": "excluded by pattern '*.q_proj'",
        **{
            f"model.layers.0.mlp.{name}_proj": "excluded by pattern: in none of ['self_attn.*', 'model.layers.1.mlp.*']"
            for name in ("gate", "up", "down")
        },
    }
    assert [record.levelname for record in caplog.records] == ["INFO", "INFO"]
    assert "left dense: 2 matrices, 2048 parameters (model.layers.0.self_attn.q_proj, ...)" in caplog.text


def test_names_are_looked_up_and_not_matched_one_by_one(llama, monkeypatch):
    every = [target.name for target in find_targets(llama).modules]
    monkeypatch.setattr("lowrank_pl.models.targets.fnmatchcase", lambda *_: pytest.fail("a name was matched as a glob"))
    found = find_targets(llama, include=every, exclude=["mlp.up_proj", every[0]])
    assert [target.name for target in found.modules] == [n for n in every[1:] if not n.endswith("mlp.up_proj")]
    assert {skipped.reason for skipped in found.skipped} == {
        "excluded by pattern 'mlp.up_proj'", f"excluded by pattern {every[0]!r}",
    }  # fmt: skip


def test_nothing_to_include_is_refused(llama):
    with pytest.raises(ValueError, match="include is empty"):
        find_targets(llama, include=())


@pytest.mark.parametrize("where", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_is_refused(llama, where):
    text = (
        r"pattern '\*\.queries' matches no matrix .*\(self_attn.q_proj, self_attn.k_proj, .*full name \(model.layers.0"
    )
    with pytest.raises(ValueError, match=text):
        find_targets(llama, **{where: ["*.queries"]})


def test_nothing_left_is_refused(llama):
    with pytest.raises(ValueError, match=r"LlamaForCausalLM: excluded by pattern '\*'"):
        find_targets(llama, exclude=["*"])


def skipped_reasons(model, caplog):
    """Return the reasons by name after checking that each is logged once, as a warning."""
    found = find_targets(model)
    reasons = {entry.name: entry.reason for entry in found.skipped}
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == len(set(reasons.values()))
    assert all(any(text.endswith(reason) for text in warnings) for reason in reasons.values())
    assert not {target.name for target in found.modules} & set(reasons)
    return reasons


def test_tied_weights_stay_dense_with_a_warning(llama, caplog):
    blocks = llama.model.layers
    blocks[1].mlp.up_proj.weight = blocks[0].mlp.up_proj.weight
    llama.proj_out = nn.Linear(32, 32, bias=False)
    blocks[0].self_attn.o_proj.weight = llama.proj_out.weight
    names = [f"model.layers.{inner}" for inner in ("0.self_attn.o_proj", "0.mlp.up_proj", "1.mlp.up_proj")]
    assert skipped_reasons(llama, caplog) == dict.fromkeys(names, "weight tied to another module")
    assert "left dense: 3 matrices, 7168 parameters" in caplog.text


def test_a_block_used_twice_is_tied(llama, caplog):
    llama.model.layers[1] = llama.model.layers[0]
    with pytest.raises(ValueError, match="weight tied to another module"):
        find_targets(llama)


def test_other_modules_stay_dense_with_a_warning(llama, caplog):
    blocks = llama.model.layers
    blocks[0].mlp.gate_matrix = nn.Parameter(torch.zeros(3, 5))
    blocks[0].unused = nn.Linear(2, 3)
    blocks[0].convolution = nn.Conv1d(2, 3, 4)
    blocks[1].mlp.up_proj = nn.utils.parametrizations.weight_norm(blocks[1].mlp.up_proj)
    reasons = skipped_reasons(llama, caplog)
    assert reasons["model.layers.0.mlp.gate_matrix"] == "2-D parameter of LlamaMLP, which is no known linear layer"
    assert reasons["model.layers.0.unused"] == "never called in a forward pass"
    assert reasons["model.layers.0.convolution.weight"] == "3-D parameter of Conv1d, which is no known linear layer"
    assert sum(name.startswith("model.layers.1.mlp.up_proj.parametrizations") for name in reasons) == 2
    assert len(reasons) == 5


def test_integer_weights_stay_dense_with_a_warning(llama, caplog):
    linear = llama.model.layers[0].mlp.up_proj
    linear.weight = nn.Parameter(linear.weight.to(torch.int8), requires_grad=False)
    linear.forward = lambda x: nn.functional.linear(x, linear.weight.float())
    assert skipped_reasons(llama, caplog) == {"model.layers.0.mlp.up_proj": "weights of type torch.int8"}


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_fused_experts_and_routers_stay_dense_with_a_warning(family, caplog):
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2}
    experts = {"num_local_experts": 4} if family == "mixtral" else {"num_experts": 4, "moe_intermediate_size": 48}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes, **heads, **experts, **ids)).eval()
    reasons = skipped_reasons(model, caplog)
    assert len(reasons) == 6
    for name in ("gate_up_proj", "down_proj"):
        assert reasons[f"model.layers.1.mlp.experts.{name}"].startswith("fused experts of ")
    assert "2-D parameter of" in reasons["model.layers.0.mlp.gate.weight"]
    found = find_targets(model, exclude=["mlp.*"])
    assert kinds(found) == [f"self_attn.{name}_proj" for name in "koqv"]
    assert sum(entry.parameters for entry in found.skipped) == 2 * (4 * 96 * 32 + 4 * 32 * 48 + 4 * 32)


class Packed(nn.Linear):
    """Stands for a quantisation library's layer."""


def test_quantised_models_are_refused(llama):
    text = r"\(module model.layers.0.mlp.up_proj\) .*: load the unquantised checkpoint"
    packed = Packed(32, 96)
    packed.weight = nn.Parameter(torch.zeros(96, 16, dtype=torch.uint8), requires_grad=False)
    replace_module(llama, "model.layers.0.mlp.up_proj", packed)
    with pytest.raises(ValueError, match=text):
        find_targets(llama)
    replace_module(llama, "model.layers.0.mlp.up_proj", nn.Linear(32, 96))
    llama.model.layers[0].mlp.up_proj.qweight = torch.zeros(2)
    with pytest.raises(ValueError, match=text):
        find_targets(llama)


def test_models_that_are_partly_compressed_are_refused(llama):
    replace_module(llama, "model.layers.0.mlp.up_proj", LowRankLinear(32, 96, 8, bias=False))
    with pytest.raises(ValueError, match=r"already compressed by lowrank_pl \(module model.layers.0.mlp.up_proj\)"):
        find_targets(llama)


def test_models_marked_as_quantised_are_refused_unless_dense_or_ours(llama):
    llama.config.quantization_config = {"quant_method": "gguf"}
    assert len(find_targets(llama).modules) == 14
    llama.is_quantized = True
    with pytest.raises(ValueError, match=r"quantised \(gguf\).*load the unquantised"):
        find_targets(llama)
    llama.config.quantization_config = {"quant_method": "lowrank"}
    assert len(find_targets(llama).modules) == 14


class Factored(nn.Linear):
    """A linear layer whose ``weight`` is only its left factor, as in our own exports."""

    def __init__(self):
        super().__init__(32, 96, bias=False)
        self.right = nn.Parameter(torch.eye(32))

    def forward(self, x):
        return super().forward(x @ self.right.T)


def test_already_factored_layers_stay_as_they_are(llama, caplog):
    replace_module(llama, "model.layers.1.mlp.up_proj", Factored())
    reason = "2-D parameter of Factored, which is no known linear layer"
    names = [f"model.layers.1.mlp.up_proj.{name}" for name in ("weight", "right")]
    assert skipped_reasons(llama, caplog) == dict.fromkeys(names, reason)


class Router(nn.Module):
    """Gives its layers equal but distinct tensors, one of them by keyword, and an overwritten one."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d, self.e = (nn.Linear(32, 32) for _ in range(5))

    def forward(self, x):
        copy = x.clone()
        out = self.a(x) + self.b(copy) + self.c(input=x) + self.d(copy)
        copy.mul_(2)
        return out + self.e(copy)


def test_groups_are_of_the_very_same_tensor(llama):
    llama.model.layers[0].mlp = Router()
    groups = {target.kind: target.group for target in find_targets(llama, include=["model.layers.0.mlp.*"]).modules}
    prefix = "model.layers.0.mlp"
    assert groups == {
        "mlp.a": f"{prefix}.a",
        "mlp.b": f"{prefix}.b",
        "mlp.c": f"{prefix}.a",
        "mlp.d": f"{prefix}.b",
        "mlp.e": f"{prefix}.e",
    }


def test_decoder_blocks_are_the_largest_list_inside_the_decoder(llama):
    llama.vision = nn.ModuleList([nn.Linear(999, 999), nn.Linear(999, 999)])
    llama.model.layers[0].experts = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    assert decoder_blocks(llama)[0] == "model.layers"


def test_a_model_without_blocks_is_refused(llama):
    llama.config.num_hidden_layers = 7
    with pytest.raises(ValueError, match=r"7 decoder blocks \(config.num_hidden_layers\)"):
        decoder_blocks(llama)


def test_dense_weight_is_a_view():
    linear, conv = nn.Linear(3, 2), Conv1D(2, 3)
    assert dense_weight(linear) is linear.weight
    assert dense_weight(conv).data_ptr() == conv.weight.data_ptr()
    x = torch.randn(4, 3)
    torch.testing.assert_close(x @ dense_weight(conv).T + conv.bias, conv(x))
    for module in (nn.Embedding(3, 2), Factored(), nn.LayerNorm(3)):
        with pytest.raises(ValueError, match=f"{type(module).__name__} .* expected nn.Linear"):
            dense_weight(module)


def test_replace_module(llama):
    new = nn.Identity()
    replace_module(llama, "model.layers.1.mlp", new)
    assert llama.model.layers[1].mlp is new
    replace_module(llama, "model.layers.0", new)
    assert llama.model.layers[0] is new
    with pytest.raises(ValueError, match=r"'model.layers.0.nothing'"):
        replace_module(llama, "model.layers.0.nothing", new)
    with pytest.raises(ValueError, match="give the name of one of its submodules"):
        replace_module(llama, "", new)
