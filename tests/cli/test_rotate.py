"""``lowrank rotate``."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from lowrank_pl.cli.app import main
from lowrank_pl.cli.rotate import rotate
from lowrank_pl.export.export import save_compressed
from lowrank_pl.models.base import Base, load_base
from lowrank_pl.models.digests import changed_files
from lowrank_pl.models.identity import Origin
from lowrank_pl.models.tiny import byte_tokenizer
from tests.helpers.pruned_models import ragged

TOKENS = torch.arange(8)[None]


def test_plain_transformers_loads_the_rotated_model(tmp_path, capsys):
    main(["rotate", "random:qwen3", "--output", str(tmp_path / "turned"), "--json", str(tmp_path / "out.json")])
    model, base = AutoModelForCausalLM.from_pretrained(tmp_path / "turned"), load_base("random:qwen3")
    torch.testing.assert_close(model(TOKENS).logits, base(TOKENS).logits, atol=1e-4, rtol=1e-4)
    assert changed_files(tmp_path / "turned") == []
    assert model.config.lowrank_rotated == {"base": "random:qwen3", "seed": 0, "stream": True}
    figures = json.loads((tmp_path / "out.json").read_text())
    assert figures["relative_logit_difference"] < figures["tolerance"]
    assert "logits differ by at most" in capsys.readouterr().out


def test_a_base_with_mlps_of_several_widths(tmp_path):
    model = ragged("llama")
    left = {"model.layers.0.mlp": 40, "model.layers.1.mlp": 56}
    Origin("random:llama", 30_000, 60_000, 96, left, ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")).write(model)
    save_compressed(model, tmp_path / "pruned", tokenizer=byte_tokenizer(), verify=False)
    turned = load_base(str(rotate(Base(str(tmp_path / "pruned")), output=tmp_path / "turned")))
    torch.testing.assert_close(turned(TOKENS).logits, model(TOKENS).logits, atol=1e-4, rtol=1e-4)
    assert Origin.of(turned) == Origin.of(model)


def test_nothing_is_left_of_a_model_that_cannot_be_rotated(tmp_path, capsys):
    with pytest.raises(SystemExit, match="1"):
        main(["rotate", "random:gpt2", "--output", str(tmp_path / "turned")])
    assert "can't be rotated" in capsys.readouterr().err
    assert not (tmp_path / "turned").exists()


def test_an_earlier_rotated_folder_is_replaced(tmp_path):
    for seed in (0, 1):
        folder = rotate(Base("random:llama"), seed=seed, output=tmp_path / "turned")
    assert AutoModelForCausalLM.from_pretrained(folder).config.lowrank_rotated["seed"] == 1
