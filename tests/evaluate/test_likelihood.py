"""Perplexity against a slow reference, refusals, and greedy samples."""

from __future__ import annotations

import logging
import math

import pytest
import torch

from lowrank_pl.evaluate import likelihood
from lowrank_pl.evaluate.generation import continuations, generate_samples, repetition_rate
from lowrank_pl.evaluate.likelihood import Score, divergence, excess_nats, perplexity
from lowrank_pl.models.tiny import byte_tokenizer, tiny_model


def slow_nats(model, sequences):
    """Predict every token from its own prefix alone, in Python floats."""
    losses = []
    for sequence in sequences.tolist():
        for end in range(1, len(sequence)):
            with torch.no_grad():
                logits = model(torch.tensor([sequence[:end]])).logits[0, -1].tolist()
            top = max(logits)
            losses.append(top + math.log(math.fsum(math.exp(x - top) for x in logits)) - logits[sequence[end]])
    return math.fsum(losses) / len(losses)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_perplexity_is_that_of_a_slow_reference(family, sequences):
    model = tiny_model(family)
    score = perplexity(model, sequences[:3, :12])
    reference = slow_nats(model, sequences[:3, :12])
    assert score.nats == pytest.approx(reference, abs=2e-6)
    assert score.perplexity == pytest.approx(math.exp(reference), rel=3e-6)
    assert score.tokens == 3 * 11
    assert score.seconds > 0


@pytest.mark.parametrize("batch_size", [2, 5, 64])
def test_batch_size_does_not_show(llama, sequences, batch_size):
    one = perplexity(llama, sequences)
    assert perplexity(llama, sequences, batch_size=batch_size).nats == pytest.approx(one.nats, abs=1e-6)


@pytest.mark.parametrize("numbers", [1, 261 * 4, 261 * 7 * 4 + 1])
def test_chunks_do_not_show(llama, sequences, monkeypatch, numbers):
    whole = perplexity(llama, sequences, batch_size=4)
    monkeypatch.setattr(likelihood, "CHUNK_NUMBERS", numbers)
    assert perplexity(llama, sequences, batch_size=4).nats == pytest.approx(whole.nats, abs=1e-9)


def test_bfloat16_logits_are_taken_to_fp32(sequences):
    model = tiny_model("llama")
    exact = perplexity(model, sequences)
    rounded = perplexity(model.to(torch.bfloat16), sequences)
    with torch.no_grad():
        logits = torch.cat([model(sequence[None]).logits for sequence in sequences]).double()[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), sequences[:, 1:].flatten()).item()
    assert rounded.nats == pytest.approx(expected, abs=1e-6)
    assert rounded.nats == pytest.approx(exact.nats, abs=0.05)


def test_modes_are_restored_and_dropout_is_off(sequences):
    model = tiny_model("gpt2")
    plain = perplexity(model, sequences)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    model.train()
    model.transformer.h[0].mlp.eval()
    before = [module.training for module in model.modules()]
    assert perplexity(model, sequences).nats == plain.nats
    assert [module.training for module in model.modules()] == before


def test_no_gradient_graph_and_no_cache(llama, sequences):
    seen = []
    handle = llama.register_forward_hook(
        lambda module, args, kwargs, out: seen.append(
            (kwargs["use_cache"], out.past_key_values, torch.is_grad_enabled())
        ),
        with_kwargs=True,
    )
    perplexity(llama, sequences[:1])
    handle.remove()
    assert seen == [(False, None, False)]


def test_progress_bar_is_labelled(llama, sequences, capfd):
    perplexity(llama, sequences, progress="scoring dense")
    shown = capfd.readouterr().err
    assert "scoring dense: 100%" in shown
    assert "16/16" in shown
    perplexity(llama, sequences)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_logits_name_the_sequence(llama, sequences, bad):
    token = 7
    sequences = sequences.clone()
    sequences[sequences == token] = 8
    sequences[3, 20] = sequences[5, 1] = token
    with torch.no_grad():
        llama.get_input_embeddings().weight[token] = bad
        llama.lm_head.weight = torch.nn.Parameter(torch.randn_like(llama.lm_head.weight))
    llama.train()
    with pytest.raises(ValueError, match=r"the logits of sequence 3 .*: expected finite numbers"):
        perplexity(llama, sequences, batch_size=2)
    assert all(module.training for module in llama.modules())


@pytest.mark.parametrize(
    ("sequences", "message"),
    [
        (torch.zeros(4, dtype=torch.long), r"shape \(4,\) and type torch.int64 .*: expected .* \[sequences, length\]"),
        (torch.zeros(0, 8, dtype=torch.long), r"shape \(0, 8\).*at least one sequence of 2 tokens"),
        (torch.zeros(4, 1, dtype=torch.long), r"shape \(4, 1\).*at least one sequence of 2 tokens"),
        (torch.zeros(4, 8), r"type torch.float32 .*: expected integer"),
        (torch.full((1, 4), 261), r"261 to 261, .* 0 to 260: use the model's own tokenizer"),
        (torch.full((1, 4), -1), r"-1 to -1, .*: use the model's own tokenizer"),
        (torch.zeros(1, 2049, dtype=torch.long), r"2049 tokens .* 2048 positions: use shorter sequences"),
    ],
)
def test_bad_sequences_are_refused(llama, sequences, message):
    with pytest.raises(ValueError, match=message):
        perplexity(llama, sequences)


def test_bad_batch_size_is_refused(llama, sequences):
    with pytest.raises(ValueError, match=r"batch_size is 0: expected .* at least 1"):
        perplexity(llama, sequences, batch_size=0)


def test_score_arithmetic():
    score, dense = Score(math.exp(3), 3.0, 100, 2.0), Score(math.exp(2.5), 2.5, 100, 1.0)
    assert excess_nats(score, dense) == pytest.approx(math.log(score.perplexity / dense.perplexity))
    assert score.to_dict() == {
        "perplexity": math.exp(3),
        "nats": 3.0,
        "tokens": 100,
        "seconds": 2.0,
        "tokens_per_second": 50.0,
    }


def test_perplexity_beyond_a_double_is_infinite(sequences):
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight * 1e4)
    score = perplexity(model, sequences)
    assert score.nats > 710
    assert score.perplexity == math.inf


def slow_greedy(model, tokenizer, prompt, new):
    ids = tokenizer(prompt)["input_ids"]
    start = len(ids)
    for _ in range(new):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


@pytest.mark.parametrize("bos", [False, True])
def test_samples_are_greedy_continuations_without_the_prompt(llama, bos):
    tokenizer = byte_tokenizer(bos=bos)
    prompts = ["A list is", "The"]
    samples = generate_samples(llama, tokenizer, prompts, max_new_tokens=8)
    assert samples == [slow_greedy(llama, tokenizer, prompt, 8) for prompt in prompts]
    assert not any(sample.startswith(prompt) for sample, prompt in zip(samples, prompts, strict=True))


def test_samples_ignore_the_models_own_sampling_and_warn_of_nothing(llama, tokenizer, caplog):
    plain = generate_samples(llama, tokenizer, ["A list is"], max_new_tokens=8)
    own = llama.generation_config
    own.update(do_sample=True, temperature=5.0, top_k=3, repetition_penalty=9.0, max_length=3, no_repeat_ngram_size=1)
    llama.train()
    library = logging.getLogger("transformers")
    library.addHandler(caplog.handler)
    try:
        assert generate_samples(llama, tokenizer, ["A list is"], max_new_tokens=8) == plain
    finally:
        library.removeHandler(caplog.handler)
    assert caplog.records == []
    assert llama.training
    assert llama.generation_config is own


def test_sample_of_nothing_is_refused(llama, tokenizer):
    with pytest.raises(ValueError, match="'' has no token: expected a text"):
        generate_samples(llama, tokenizer, [""])
    tokenizer.add_tokens(["<added>"])
    with pytest.raises(ValueError, match=r"token ids from 261 to 261, .*resize_token_embeddings"):
        generate_samples(llama, tokenizer, ["<added>"])


def test_samples_through_the_chat_template(llama):
    tokenizer = byte_tokenizer(bos=True)
    [answer] = continuations(llama, tokenizer, ["Hi"], max_new_tokens=8, chat=True)
    written = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert answer.text == slow_greedy(llama, tokenizer, written, 8)
    assert tokenizer.decode(answer.tokens, skip_special_tokens=True) == answer.text
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template: use plain prompts"):
        continuations(llama, tokenizer, ["Hi"], chat=True)


@pytest.mark.parametrize(
    ("texts", "rate"),
    [
        ([], 0.0),
        ([[1, 2, 3]], 0.0),
        ([[1, 2, 3, 4, 5, 6]], 0.0),
        ([[7] * 8], 0.8),
        ([[1, 2, 1, 2, 1, 2, 1]], 0.5),
        ([[1, 2, 3, 4], [7] * 8, [1]], 0.4),
    ],
)
def test_repetition_rate_of_known_sequences(texts, rate):
    assert repetition_rate(texts) == pytest.approx(rate)


# -- divergence ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch_size", "numbers"), [(1, 2**24), (5, 261 * 7 * 4 + 1)])
def test_divergence_is_that_of_the_whole_logits(llama, sequences, monkeypatch, batch_size, numbers):
    other = tiny_model("llama", seed=1)
    with torch.no_grad():
        ours, theirs = (model(sequences).logits[:, :-1].double().log_softmax(-1) for model in (llama, other))
    # torch's own order: what is measured first, then the distribution that the mean is taken over.
    kl = torch.nn.functional.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1).mean().item()
    monkeypatch.setattr(likelihood, "CHUNK_NUMBERS", numbers)
    found = divergence(llama, other, sequences, batch_size=batch_size)
    assert found.kl == pytest.approx(kl, rel=1e-5)
    assert found.agreement == pytest.approx((ours.argmax(-1) == theirs.argmax(-1)).double().mean().item())
    assert found.nats == pytest.approx(perplexity(llama, sequences).nats, rel=1e-6)
    assert found.dense_nats == pytest.approx(perplexity(other, sequences).nats, rel=1e-6)
    assert found.tokens == 16 * 63


def test_kl_is_taken_over_the_dense_models_distribution(llama, sequences):
    """By hand, one token: sum of p (log p - log q) with p the dense model's."""
    other = tiny_model("llama", seed=1)
    sequence = sequences[:1, :2]
    with torch.no_grad():
        q, p = (model(sequence).logits[0, 0].double().softmax(-1) for model in (llama, other))
    assert divergence(llama, other, sequence).kl == pytest.approx(float((p * (p.log() - q.log())).sum()), rel=1e-5)


def test_divergence_refuses_other_vocabularies_and_names_the_broken_model(llama, sequences):
    other = tiny_model("llama")
    other.resize_token_embeddings(300, mean_resizing=False)
    with pytest.raises(ValueError, match=r"261 tokens, .* 300: compare a model with the base"):
        divergence(llama, other, sequences)
    broken = tiny_model("llama")
    broken.lm_head.weight = torch.nn.Parameter(torch.full_like(broken.lm_head.weight, math.nan))
    with pytest.raises(ValueError, match="the dense model's logits of sequence 0"):
        divergence(llama, broken, sequences)
    with pytest.raises(ValueError, match="the logits of sequence 0"):
        divergence(broken, llama, sequences)
