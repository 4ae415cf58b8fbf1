"""A model that is never whole in memory: the same factors in the same store as of one that is."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.core_model_loading import Concatenate

from lowrank_pl.calibration import blockwise, build_by_block
from lowrank_pl.calibration import build as prepare
from lowrank_pl.calibration.build import build_factors
from lowrank_pl.calibration.build_by_block import build_factors_by_block
from lowrank_pl.calibration.subject import Subject
from lowrank_pl.cli.allocate import allocate
from lowrank_pl.cli.app import main
from lowrank_pl.cli.decompose import decompose
from lowrank_pl.factors.settings import Decomposition
from lowrank_pl.models.base import Base, load_base
from lowrank_pl.models.identity import model_fingerprint
from lowrank_pl.models.lazy import NotBlockwiseError, Shards, Skeleton, open_skeleton
from lowrank_pl.models.targets import decoder_blocks, find_targets
from lowrank_pl.models.tiny import FAMILIES, byte_tokenizer, tiny_model
from lowrank_pl.text.sequences import Calibration

TEXT = "python-docs::part=0%-10%"


@pytest.fixture(autouse=True)
def _fresh_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LOWRANK_HOME", str(tmp_path / "home"))


@pytest.fixture
def saved(tmp_path):
    """Save a tiny model with its tokenizer in many files."""

    def save(family="llama", **sizes):
        folder = tmp_path / f"saved-{family}"
        tiny_model(family, **{"layers": 3, **sizes}).save_pretrained(folder, max_shard_size="20KB")
        byte_tokenizer(bos=family.startswith("gemma")).save_pretrained(folder)
        return str(folder)

    return save


def assert_equal_factors(one, other, targets):
    assert one.fingerprint == other.fingerprint
    for target in targets:
        for key in ("left", "sigma", "right"):
            assert torch.equal(one.read(target.name, key), other.read(target.name, key)), (target.name, key)
        assert {**one.notes(target.name), "seconds": ""} == {**other.notes(target.name), "seconds": ""}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_are_those_of_the_model_loaded_whole_to_the_bit(family, dtype, saved, sequences, tokenizer, tmp_path):
    base = saved(family)
    skeleton = open_skeleton(base, dtype=dtype)
    targets = skeleton.find_targets()
    cache = "disk" if dtype == torch.bfloat16 else "ram"
    made = build_factors_by_block(
        skeleton,
        Subject(skeleton.model, tokenizer, sequences[:5], known_targets=targets),
        directory=tmp_path / "by_block",
        batch_size=2,
        cache=cache,
    )
    model = load_base(base, dtype=dtype)
    assert targets == find_targets(model)
    assert model_fingerprint(skeleton.model, skeleton.parameters()) == model_fingerprint(model)
    whole = build_factors(
        Subject(model, tokenizer, sequences[:5], known_targets=targets), directory=tmp_path / "whole", batch_size=2
    )
    assert_equal_factors(made, whole, targets.modules)
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in skeleton.model.modules())
    assert not list((tmp_path / "home").rglob(".hidden*"))


MIXED = [
    # Stored apart, as w1, w3 and w2, or as gate, up and down, here with a buffer in the files.
    ("mixtral", torch.float32),
    ("qwen3_moe", torch.bfloat16),
    ("deepseek_v3", torch.bfloat16),
    # Fused: transposed, interleaved and with biases; under other names; one matrix an expert.
    ("gpt_oss", torch.bfloat16),
    ("granitemoe", torch.float32),
    ("jetmoe", torch.float32),
    # Its model without images has no name for all but the head.
    ("llama4", torch.float32),
]


@pytest.mark.parametrize(("family", "dtype"), MIXED, ids=[family for family, _ in MIXED])
def test_experts_are_read_one_by_one(family, dtype, saved, sequences, tokenizer, tmp_path):
    base, settings = saved(family, layers=2), Decomposition("two_sided")
    skeleton, model = open_skeleton(base, dtype=dtype), load_base(base, dtype=dtype)
    targets = skeleton.find_targets()
    assert targets == find_targets(model)
    assert model_fingerprint(skeleton.model, skeleton.parameters()) == model_fingerprint(model)
    for one, other in zip(skeleton.model.buffers(), model.buffers(), strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    made, whole = (
        build(
            *given, Subject(of, tokenizer, sequences[:3], known_targets=targets), settings=settings,
            directory=tmp_path / build.__name__,
        )
        for build, given, of in ((build_factors_by_block, [skeleton], skeleton.model), (build_factors, [], model))
    )  # fmt: skip
    assert_equal_factors(made, whole, targets.modules)
    assert any("rows" in made.notes(target.name) for target in targets.modules)
    name = next(target.name for target in targets.modules if target.experts)
    assert torch.equal(skeleton.rows(f"{name}.weight", slice(2, 5)), model.get_submodule(name).weight[2:5])


def test_experts_that_are_fused_in_an_unknown_way_are_not_read_one_by_one(saved, monkeypatch):
    monkeypatch.setattr(
        Concatenate, "convert", lambda self, made, **_: {"both": sum(t.double() for t in made.values())}
    )
    with pytest.raises(
        NotBlockwiseError, match=r"makes model\.layers\.0\.mlp\.experts\.gate_up_proj of its files in a way"
    ):
        open_skeleton(saved("mixtral"))


KINDS = [
    Decomposition("svd"),
    Decomposition("asvd"),
    Decomposition("fwsvd"),
    Decomposition("two_sided", token_weights=False),
    Decomposition("two_sided", labels="text"),
]


@pytest.mark.parametrize("settings", KINDS, ids=lambda settings: f"{settings.kind}-{settings.labels}")
def test_other_kinds_are_made_by_block_too(settings, saved, sequences, tokenizer, tmp_path):
    base = saved()
    skeleton = open_skeleton(base)
    targets = skeleton.find_targets(exclude=["*down_proj"])
    made = build_factors_by_block(
        skeleton,
        Subject(skeleton.model, tokenizer, sequences[:2], known_targets=targets),
        settings=settings,
        directory=tmp_path / "by_block",
    )
    whole = build_factors(
        Subject(load_base(base), tokenizer, sequences[:2], known_targets=targets),
        settings=settings,
        directory=tmp_path / "whole",
    )
    assert_equal_factors(made, whole, targets.modules)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_block_by_block_are_those_of_the_whole_model_to_the_bit(
    family, dtype, saved, sequences, tokenizer, tmp_path
):
    base, settings = saved(family), Decomposition("two_sided")
    skeleton = open_skeleton(base, dtype=dtype)
    targets = skeleton.find_targets()
    how = {"settings": settings, "batch_size": 2}
    cache = "disk" if dtype == torch.bfloat16 else "ram"
    # The last of three batches is a smaller one.
    made = build_factors_by_block(
        skeleton,
        Subject(skeleton.model, tokenizer, sequences[:5], known_targets=targets),
        directory=tmp_path / "by_block",
        cache=cache,
        **how,
    )
    model = load_base(base, dtype=dtype)
    whole = build_factors(
        Subject(model, tokenizer, sequences[:5], known_targets=targets), directory=tmp_path / "whole", **how
    )
    assert_equal_factors(made, whole, targets.modules)
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in skeleton.model.modules())
    assert not list((tmp_path / "home").rglob(".hidden*"))


def test_passes_back_hold_one_block_and_go_no_further_than_what_is_missing(
    saved, sequences, tokenizer, tmp_path, monkeypatch
):
    """Killed in the second of three blocks on the way back: the third is measured, and the first is not run again."""
    skeleton, settings = open_skeleton(saved()), Decomposition("two_sided")
    targets = skeleton.find_targets()
    real, there, back, forward = prepare.decompose, [], [], []

    def look(*args, **kwargs):
        there.append([name for name, parameter in skeleton.model.named_parameters() if not parameter.is_meta])
        if len(there) == 10:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(prepare, "decompose", look)
    with pytest.raises(KeyboardInterrupt):
        build_factors_by_block(
            skeleton, Subject(skeleton.model, tokenizer, sequences[:2], known_targets=targets), settings=settings
        )
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())
    blocks = [{name.split(".")[2] for name in names if ".layers." in name} for names in there]
    assert blocks == [{"2"}] * 7 + [{"1"}] * 3
    monkeypatch.setattr(prepare, "decompose", real)
    back_at, forward_at = blockwise.BlockwiseBackward.at, blockwise.BlockwiseForward.at
    monkeypatch.setattr(
        blockwise.BlockwiseBackward, "at", lambda self, block: (back.append(block), back_at(self, block))[1]
    )
    monkeypatch.setattr(
        blockwise.BlockwiseForward, "at", lambda self, block: (forward.append(block), forward_at(self, block))[1]
    )
    store = build_factors_by_block(
        skeleton, Subject(skeleton.model, tokenizer, sequences[:2], known_targets=targets), settings=settings
    )
    # The second block was measured, and not decomposed to its end.
    assert (forward, back) == ([0, 1, 2], [2, 1, 0])
    again = build_factors_by_block(
        skeleton, Subject(skeleton.model, tokenizer, sequences[:2], known_targets=targets), settings=settings
    )
    assert (len(forward), len(back)) == (3, 3)
    whole = build_factors(
        Subject(load_base(saved()), tokenizer, sequences[:2], known_targets=targets),
        settings=settings,
        directory=tmp_path / "whole",
    )
    assert_equal_factors(again, whole, targets.modules)
    assert store.directory == again.directory


def test_gradients_of_later_blocks_alone_leave_the_first_ones_out(saved, sequences, tokenizer, tmp_path, monkeypatch):
    skeleton, settings = open_skeleton(saved()), Decomposition("two_sided")
    targets = skeleton.find_targets(include=["*layers.1.*", "*layers.2.mlp.*"])
    back, at, kept = [], blockwise.BlockwiseBackward.at, []

    def remember(self, block):
        back.append(block)
        kept.append(sorted(self.forward.states))
        return at(self, block)

    monkeypatch.setattr(blockwise.BlockwiseBackward, "at", remember)
    store = build_factors_by_block(
        skeleton, Subject(skeleton.model, tokenizer, sequences[:2], known_targets=targets), settings=settings
    )
    assert back == [2, 1]
    # What the first block returned is what the second is fed; nothing before that is kept, nothing behind it stays.
    assert kept == [[0, 1, 2], [0, 1]]
    whole = build_factors(
        Subject(load_base(saved()), tokenizer, sequences[:2], known_targets=targets),
        settings=settings,
        directory=tmp_path / "whole",
    )
    assert_equal_factors(store, whole, targets.modules)


def test_a_window_without_a_next_token_is_refused(saved, sequences, tokenizer):
    skeleton = open_skeleton(saved())
    targets = skeleton.find_targets()
    with pytest.raises(ValueError, match=r"shape \(.+, 1\) .* at least one sequence of 2 tokens"):
        build_factors_by_block(
            skeleton,
            Subject(skeleton.model, tokenizer, sequences[:2, :1], known_targets=targets),
            settings=Decomposition("two_sided"),
        )


def test_one_block_is_loaded_at_a_time(saved, sequences, tokenizer, monkeypatch):
    skeleton = open_skeleton(saved())
    targets = skeleton.find_targets()
    real, there = prepare.decompose, []

    def look(*args, **kwargs):
        there.append([name for name, parameter in skeleton.model.named_parameters() if not parameter.is_meta])
        return real(*args, **kwargs)

    monkeypatch.setattr(prepare, "decompose", look)
    build_factors_by_block(skeleton, Subject(skeleton.model, tokenizer, sequences[:1], known_targets=targets))
    assert len(there) == len(targets.modules)
    for target, names in zip(targets.modules, there, strict=True):
        outside = {"model.norm.weight"} | ({"model.embed_tokens.weight"} if target.block == 0 else set())
        assert {name for name in names if f"layers.{target.block}." not in name} == outside


@pytest.mark.parametrize(("step", "runs"), [("check_finite", 3), ("decompose_all", 0)])
def test_killed_build_goes_on_and_runs_only_what_is_not_measured(step, runs, saved, sequences, tokenizer, monkeypatch):
    """Killed in the last block before or after its inputs are measured, and only that block is made again."""
    skeleton = open_skeleton(saved())
    targets = skeleton.find_targets()
    real, calls = getattr(build_by_block, step), []

    def interrupt(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        real(*args)

    monkeypatch.setattr(build_by_block, step, interrupt)
    with pytest.raises(KeyboardInterrupt):
        build_factors_by_block(skeleton, Subject(skeleton.model, tokenizer, sequences[:2], known_targets=targets))
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())
    made, passes, decompose_all, at = [], [], prepare.decompose_all, blockwise.BlockwiseForward.at
    monkeypatch.setattr(build_by_block, step, real)
    monkeypatch.setattr(build_by_block, "decompose_all", lambda *args: (made.extend(args[1]), decompose_all(*args)))
    monkeypatch.setattr(
        blockwise.BlockwiseForward, "at", lambda self, block: (passes.append(block), at(self, block))[1]
    )
    store = build_factors_by_block(skeleton, Subject(skeleton.model, tokenizer, sequences[:2], known_targets=targets))
    assert {target.block for target in made} == {2}
    assert len(passes) == runs
    whole = build_factors(
        Subject(load_base(saved()), tokenizer, sequences[:2], known_targets=targets),
        directory=store.directory / "whole",
    )
    assert_equal_factors(store, whole, targets.modules)


def test_blocks_that_share_more_than_the_hidden_state_are_told(saved, sequences, tokenizer):
    skeleton = open_skeleton(saved())
    targets = skeleton.find_targets()
    kept = {}
    first, second = decoder_blocks(skeleton.model)[1][:2]
    first.register_forward_hook(lambda _, __, output: kept.update(shared=output * 2))
    second.register_forward_hook(lambda _, __, output: output + kept.pop("shared", 0))
    with pytest.raises(NotBlockwiseError, match="its blocks share more than the hidden state"):
        build_factors_by_block(skeleton, Subject(skeleton.model, tokenizer, sequences[:1], known_targets=targets))


def test_a_block_that_is_run_twice_is_told(saved, sequences, tokenizer):
    base = saved()
    model = open_skeleton(base).model
    model.model.layers[2] = model.model.layers[1]
    skeleton = Skeleton(model, Shards(base, model), torch.device("cpu"))
    targets = skeleton.find_targets()
    with pytest.raises(NotBlockwiseError, match="its blocks are not run once each"):
        build_factors_by_block(skeleton, Subject(skeleton.model, tokenizer, sequences[:1], known_targets=targets))


@pytest.mark.parametrize(
    ("base", "reason"),
    [
        ("random:llama", "its random weights are made all at once"),
        ("layers:llama-3.2-1b", "its random weights are made all at once"),
    ],
)
def test_bases_that_are_no_checkpoint_are_not_opened_without_weights(base, reason):
    with pytest.raises(NotBlockwiseError, match=reason):
        open_skeleton(base)


def test_files_that_need_a_conversion_are_not_opened_without_weights(saved, tmp_path):
    base = tmp_path / "other"
    tiny_model("llama").save_pretrained(base)
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.scale"] = tensors.pop("model.norm.weight")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NotBlockwiseError, match=r"model.norm.weight of shape \(32,\)"):
        open_skeleton(str(base))
    (base / "model.safetensors").unlink()
    with pytest.raises(NotBlockwiseError, match=r"model\.safetensors"):
        open_skeleton(str(base))


def test_a_damaged_weight_names_its_module(tmp_path, sequences, tokenizer):
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_submodule("model.layers.1.self_attn.k_proj").weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "bad")
    skeleton = open_skeleton(str(tmp_path / "bad"))
    targets = skeleton.find_targets()
    with pytest.raises(ValueError, match=r"the weight of model.layers.1.self_attn.k_proj holds NaN or infinity"):
        build_factors_by_block(
            skeleton,
            Subject(skeleton.model, tokenizer, sequences[:1], known_targets=targets),
            settings=Decomposition(kind="svd"),
        )


def test_the_command_line_takes_lists_and_sizes(saved, tmp_path, capsys):
    main([
        "decompose", "--base", saved(), "--decomposition.kind", "asvd", "--include", "*k_proj", "*v_proj",
        "--text", TEXT, "--length", "32", "--sequences", "2", "--cache", "disk", "--memory", "1MB",
        "--store", str(tmp_path / "store"),
    ])  # fmt: skip
    assert "asvd: factors of 6 modules, block by block" in capsys.readouterr().out
    assert len(list((tmp_path / "store").glob("*.safetensors"))) == 6


def test_a_dry_run_makes_nothing(saved, tmp_path, capsys):
    assert decompose(Base(saved()), store=tmp_path / "store", dry_run=True, calibration=Calibration(TEXT)) is None
    assert "21 targets" in capsys.readouterr().out
    assert not (tmp_path / "store").exists()


def test_allocate_finds_the_factors_made(saved, tmp_path, monkeypatch, capsys):
    base, calibration = Base(saved()), Calibration(TEXT, length=32, sequences=4)
    made = decompose(base, calibration=calibration, json=tmp_path / "figures.json")
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert (figures["block_by_block"], figures["modules"], figures["store"]) == (True, 21, str(made.directory))
    assert "whitened: factors of 21 modules, block by block, in " in capsys.readouterr().out
    monkeypatch.setattr(prepare, "decompose", lambda *_, **__: pytest.fail("decomposed again"))
    plan = allocate(base, method="uniform", calibration=calibration, output=tmp_path / "plan.json")
    assert plan.origin["store"] == str(made.directory.resolve())


@pytest.mark.parametrize(
    ("settings", "base", "reason"),
    [
        (
            Decomposition("two_sided", at_keep=0.5),
            None,
            "at_keep measures in the compressed model as well",
        ),
        (Decomposition("svd"), "random:llama", "its random weights are made all at once"),
    ],
)
def test_what_cannot_be_made_by_block_is_loaded_whole_and_said(settings, base, reason, saved, tmp_path, caplog):
    base = base or saved()
    made = decompose(
        Base(base),
        decomposition=settings,
        memory="20KB",
        gradient_checkpointing=True,
        json=tmp_path / "figures.json",
        calibration=Calibration(TEXT, 32, 2),
    )
    assert f"{base} is loaded whole: {reason}" in caplog.text
    assert json.loads((tmp_path / "figures.json").read_text())["block_by_block"] is False
    targets = find_targets(load_base(base)).modules
    assert made.missing(target.name for target in targets) == []
