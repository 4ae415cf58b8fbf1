"""Divergence by block and position against hidden states and logits by hand; several texts in ``evaluate``."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn import functional as F

from lowrank_pl.cli.app import main
from lowrank_pl.cli.evaluate import evaluate
from lowrank_pl.evaluate.divergence import profile_table, where_diverged
from lowrank_pl.evaluate.likelihood import divergence, perplexity
from lowrank_pl.models.tiny import byte_tokenizer, tiny_model
from lowrank_pl.text.sequences import token_windows
from tests.helpers.commands import failing

TEXTS = {"docs": "python-docs::part=0%-10%", "rest": "python-docs::part=10%-20%"}


@pytest.fixture
def pair():
    dense, model = tiny_model("llama", layers=3), tiny_model("llama", layers=3)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(0.5)
    return model, dense


def states(model, sequences):
    with torch.no_grad():
        out = model(sequences, output_hidden_states=True)
    return out.hidden_states, out.logits[:, :-1].double()


def test_blocks_and_positions_are_those_by_hand(pair, sequences):
    model, dense = pair
    sequences = sequences[:5, :18]
    found = where_diverged(model, dense, sequences, bins=4)
    whole = divergence(model, dense, sequences)
    assert found.whole.kl == pytest.approx(whole.kl, abs=1e-9)
    assert (found.whole.agreement, found.whole.tokens) == (pytest.approx(whole.agreement), whole.tokens)
    assert found.whole.excess_nats == pytest.approx(whole.excess_nats, abs=1e-7)
    (ours, logits), (theirs, others) = states(model, sequences), states(dense, sequences)
    # The last of transformers' hidden states is behind the final norm.
    errors = [
        ((a - b).norm(dim=-1) / b.norm(dim=-1)).mean().item() for a, b in zip(ours[1:-1], theirs[1:-1], strict=True)
    ]
    assert found.blocks[:2] == pytest.approx(errors, abs=1e-6)
    assert found.blocks[0] == 0 < found.blocks[1]
    assert len(found.blocks) == 3
    kl = F.kl_div(logits.log_softmax(-1), others.log_softmax(-1), reduction="none", log_target=True).sum(-1).mean(0)
    same = (logits.argmax(-1) == others.argmax(-1)).double().mean(0)
    edges = [(1, 4), (5, 8), (9, 12), (13, 17)]
    assert [(part.first, part.last) for part in found.positions] == edges
    for part, (first, last) in zip(found.positions, edges, strict=True):
        assert part.kl == pytest.approx(kl[first - 1 : last].mean().item(), abs=1e-6)
        assert part.agreement == pytest.approx(same[first - 1 : last].mean().item())


def test_one_sequence_is_scored_at_a_time(pair, sequences):
    seen = []
    for one in pair:
        one.register_forward_pre_hook(lambda _, __, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True)
    where_diverged(*pair, sequences[:3])
    assert set(seen) == {(1, 64)}
    assert len(seen) == 6


def test_what_can_not_be_compared_is_refused(pair, sequences):
    with pytest.raises(ValueError, match=r"position_bins is 0: expected .* at least 1"):
        where_diverged(*pair, sequences, bins=0)
    with pytest.raises(ValueError, match=r"2 decoder blocks, .* 3: compare a model with the base"):
        where_diverged(tiny_model("llama"), pair[1], sequences)


def test_the_tables_show_the_ends(sequences):
    model, dense = tiny_model("llama", layers=20), tiny_model("llama", layers=20)
    shown = profile_table(where_diverged(model, dense, sequences[:1, :9], bins=100)).splitlines()
    blocks = [line.split()[0] for line in shown[shown.index("") + 3 :]]
    assert (blocks[0], blocks[-1], len(blocks)) == ("0", "19", 8)
    assert [line.split()[0] for line in shown[2:10]] == [f"{place}-{place}" for place in range(1, 9)]


def test_evaluate_scores_several_texts_beside_a_reference(tmp_path, capsys):
    path = tmp_path / "scores.json"
    texts = [word for name, text in TEXTS.items() for word in ("--text", f"{name}={text}")]
    rest = ["--length", "32", "--sequences", "3", "--reference", "random:qwen2", "--position_bins", "2"]
    main(["evaluate", "random:llama", *texts, *rest, "--json", str(path)])
    figures = json.loads(path.read_text())
    shown = capsys.readouterr().out
    assert list(figures["texts"]) == ["docs", "rest"]
    for name, text in TEXTS.items():
        tokens = token_windows(text, byte_tokenizer(), length=32, sequences=3)
        found, one = where_diverged(tiny_model("llama"), tiny_model("qwen2"), tokens, bins=2), figures["texts"][name]
        assert one["perplexity"] == pytest.approx(perplexity(tiny_model("llama"), tokens).perplexity, rel=1e-6)
        assert one["divergence"]["kl"] == pytest.approx(found.whole.kl, rel=1e-6)
        assert one["divergence"]["blocks"] == pytest.approx(found.blocks, rel=1e-6)
        assert (one["text"], one["windows"]) == (text, 3)
        assert f" {one['divergence']['dense_perplexity']:.4f} " in shown
    assert "positions" in shown
    assert "perplexity" not in figures


def test_several_texts_without_a_reference_show_their_speed(capsys):
    figures = evaluate("random:llama", text=[f"{name}={text}" for name, text in TEXTS.items()], length=32, sequences=2)
    assert all(one["tokens_per_second"] > 0 for one in figures["texts"].values())
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[-2:]] == ["docs", "rest"]


def test_what_does_not_go_together_is_refused():
    with pytest.raises(ValueError, match="there is nothing to score: give --text, --tasks or --prompts"):
        evaluate("random:llama")
    with pytest.raises(ValueError, match="two texts to score are called 'python-docs'"):
        evaluate("random:llama", text=["python-docs", "python-docs"])


@pytest.mark.parametrize("words", ["--tasks piqa", "--reference random:llama", "--prompts A"])
def test_what_only_an_export_can_be_scored_by_is_an_option_of_another_command(words, capsys):
    message = failing(capsys, "evaluate-plan", "plan.json", "--text", "python-docs", *words.split(), status=2)
    assert f"{words.split()[0]} of `lowrank evaluate` on an export" in message
