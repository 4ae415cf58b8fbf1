"""Token sequences: exact packing whatever the pieces, BOS, the cache, and too little text."""

from __future__ import annotations

import json
import logging
import os
import re

import pytest
import torch
from safetensors.torch import save
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from lowrank_pl.models.tiny import byte_tokenizer
from lowrank_pl.text import sequences
from lowrank_pl.text.sequences import (
    count_overlapping,
    sequences_fingerprint,
    token_windows,
    tokenizer_fingerprint,
    uses_bos,
)
from lowrank_pl.utils.files import cache_root
from tests.helpers.novel import LINES


@pytest.fixture
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LOWRANK_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


def trained(kind):
    """A real BPE tokenizer, with the splitting of GPT-2 or the single word and prefix space of Llama 2."""
    tokenizer = Tokenizer(models.BPE())
    if kind == "gpt2":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([line + "\n\n" for line in LINES.split("\n\n")[:20]], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("kind", ["gpt2", "llama2"])
@pytest.mark.parametrize("piece", [37, 1000, 10**6])
def test_the_stream_equals_tokenising_at_once(kind, piece, monkeypatch):
    monkeypatch.setattr(sequences, "SEGMENT", 700)
    monkeypatch.setattr(sequences, "CONTEXT", 200)
    tokenizer = trained(kind)
    pieces = [LINES[begin : begin + piece] for begin in range(0, len(LINES), piece)]
    segments = list(sequences._token_stream(pieces, tokenizer))
    assert len(segments) > 10
    assert [token for segment in segments for token in segment] == tokenizer(LINES, add_special_tokens=False)[
        "input_ids"
    ]


def test_sequences_are_consecutive_and_without_special_tokens(novel):
    tokenizer = trained("gpt2")
    ids = tokenizer(LINES, add_special_tokens=False)["input_ids"]
    found = token_windows(str(novel), tokenizer, length=64, sequences=5)
    assert (found.dtype, found.shape) == (torch.int64, (5, 64))
    assert found.flatten().tolist() == ids[: 5 * 64]
    assert token_windows(str(novel), tokenizer, length=64).flatten().tolist() == ids[: len(ids) // 64 * 64]


def test_every_sequence_begins_with_bos_where_the_tokenizer_adds_it(novel):
    tokenizer = byte_tokenizer(bos=True)
    assert uses_bos(tokenizer)
    found = token_windows(str(novel), tokenizer, length=16, sequences=3)
    assert found[:, 0].tolist() == [257] * 3
    assert bytes(found[:, 1:].flatten().tolist()) == LINES.encode()[:45]


def test_no_more_is_read_than_needed(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "x" * 200_000}) + "\nnot json\n")
    assert len(token_windows(str(path), byte_tokenizer(), length=100, sequences=10)) == 10


@pytest.mark.parametrize("count", [None, 1, 4, 1000])
@pytest.mark.parametrize("bos", [False, True])
def test_every_takes_every_nth_sequence(novel, count, bos, caplog):
    tokenizer = byte_tokenizer(bos=bos)
    whole = token_windows(str(novel), tokenizer, length=16)
    found = token_windows(f"{novel}::every=7", tokenizer, length=16, sequences=count)
    assert torch.equal(found, whole[::7][:count])
    assert bool(caplog.text) == (count == 1000)


def test_tokenizers_without_offsets(novel, monkeypatch):
    class Letters(PreTrainedTokenizer):
        """A tokenizer in Python: one token for each letter."""

        vocab_size = 1 << 16

        def get_vocab(self):
            return {"a": 0}

        def _tokenize(self, text):
            return list(text)

        def _convert_token_to_id(self, token):
            return ord(token)

    monkeypatch.setattr(sequences, "SEGMENT", 700)
    monkeypatch.setattr(sequences, "CONTEXT", 200)
    tokenizer = Letters()
    assert not tokenizer.is_fast
    found = token_windows(str(novel), tokenizer, length=50)
    plain = [ord(letter) for letter in LINES]
    assert found.flatten().tolist() == plain[: len(plain) // 50 * 50]
    assert tokenizer_fingerprint(tokenizer) != tokenizer_fingerprint(byte_tokenizer())


def test_fewer_sequences_than_requested_give_a_warning_also_from_the_cache(tmp_path, caplog):
    path = tmp_path / "short.txt"
    path.write_text("x" * 95)
    for _ in range(2):
        caplog.clear()
        assert token_windows(str(path), byte_tokenizer(), length=10, sequences=12).shape == (9, 10)
        assert re.search(r"12 sequences of 10 tokens .* '.*short.txt' has 9", caplog.text)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "short.txt' is empty"),
        ("12345", "short.txt' has 5 tokens, .* needs 10: give a longer text or a smaller length"),
    ],
)
def test_too_little_text(tmp_path, content, message):
    path = tmp_path / "short.txt"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        token_windows(str(path), byte_tokenizer(), length=10)


@pytest.mark.parametrize(("length", "count"), [(1, 1), (8, 0)])
def test_bad_sizes(length, count):
    with pytest.raises(ValueError, match=f"length={length}, sequences={count} .* length >= 2 and sequences >= 1"):
        token_windows("python-docs", byte_tokenizer(), length=length, sequences=count)


# -- cache --------------------------------------------------------------------------------------------------------


def test_cache_of_a_changed_file_of_the_same_size_and_time_is_not_used(novel, private_cache):
    first, state = token_windows(str(novel), byte_tokenizer(), length=32, sequences=4), novel.stat()
    novel.write_bytes(novel.read_bytes().swapcase())
    os.utime(novel, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert not torch.equal(token_windows(str(novel), byte_tokenizer(), length=32, sequences=4), first)


def test_cache_is_used_until_the_file_changes(novel, private_cache, monkeypatch):
    first = token_windows(str(novel), byte_tokenizer(), length=32, sequences=4)
    with monkeypatch.context() as patch:
        patch.setattr(sequences, "_packed", None)
        assert torch.equal(token_windows(str(novel), byte_tokenizer(), length=32, sequences=4), first)
    novel.write_text("Another text. " * 100)
    assert not torch.equal(token_windows(str(novel), byte_tokenizer(), length=32, sequences=4), first)
    assert len(list(private_cache.glob("*.safetensors"))) == 2


def test_fingerprints_tell_tokenizers_apart():
    tokenizers = [byte_tokenizer(), byte_tokenizer(bos=True), trained("gpt2")]
    assert len({tokenizer_fingerprint(tokenizer) for tokenizer in tokenizers}) == 3
    assert tokenizer_fingerprint(byte_tokenizer()) == tokenizer_fingerprint(byte_tokenizer())


def test_fingerprint_depends_on_the_chat_template():
    other = byte_tokenizer()
    other.chat_template = "{{ messages[0].content }}"
    assert tokenizer_fingerprint(other) != tokenizer_fingerprint(byte_tokenizer())


class Letters(PreTrainedTokenizer):
    """A slow tokenizer with an option that changes tokens; one letter is one token."""

    def __init__(self, upper=False, **options):
        self.upper = upper
        super().__init__(upper=upper, **options)

    vocab_size = 256
    get_vocab = lambda self: {chr(byte): byte for byte in range(256)}  # noqa: E731
    _tokenize = lambda self, text: list(text.replace("assert", "ASSERT") if self.upper else text)  # noqa: E731
    _convert_token_to_id = lambda self, token: ord(token)  # noqa: E731


def test_the_fingerprint_of_a_slow_tokenizer_depends_on_its_options_but_not_on_its_place():
    plain = tokenizer_fingerprint(Letters())
    assert tokenizer_fingerprint(Letters(upper=True)) != plain
    assert tokenizer_fingerprint(Letters(name_or_path="elsewhere", is_local=True)) == plain


def test_fingerprint_does_not_depend_on_earlier_calls():
    padded = byte_tokenizer()
    padded(["a", "abc"], padding=True, truncation=True, max_length=2)
    assert tokenizer_fingerprint(padded) == tokenizer_fingerprint(byte_tokenizer())


@pytest.mark.parametrize("damage", [b"", b"nonsense", "cut", "shape", "bit"])
def test_a_damaged_cache_is_built_again(novel, private_cache, caplog, damage):
    first = token_windows(str(novel), byte_tokenizer(), length=32, sequences=4)
    (path,) = private_cache.glob("*.safetensors")
    whole = path.read_bytes()
    if damage == "cut":
        damage = whole[:-10]
    if damage == "bit":
        damage = whole[:-1] + bytes([whole[-1] ^ 1])
    if damage == "shape":
        damage = save({"windows": torch.zeros(2, 5, dtype=torch.int32)})
    path.write_bytes(damage)
    assert torch.equal(token_windows(str(novel), byte_tokenizer(), length=32, sequences=4), first)
    assert "is built again" in caplog.text
    assert path.read_bytes() == whole


def test_a_cache_that_cannot_be_written_is_no_error(novel, private_cache, caplog):
    private_cache.parent.mkdir(parents=True)
    private_cache.write_text("a file where the folder should be")
    assert len(token_windows(str(novel), byte_tokenizer(), length=32, sequences=4)) == 4
    assert "can't be cached" in caplog.text


def test_fingerprint_of_sequences():
    one = torch.arange(6).view(2, 3)
    assert sequences_fingerprint(one) == sequences_fingerprint(one.clone().int())
    assert sequences_fingerprint(one) != sequences_fingerprint(one + 1)
    assert len(sequences_fingerprint(one)) == 64


def test_sequences_overlap_when_their_middle_is_in_others():
    stream = torch.arange(400).view(4, 100)
    assert count_overlapping(stream[1:3], [stream]) == 2
    assert count_overlapping(stream[1:3] + 1000, [stream]) == 0
    assert count_overlapping(stream[:, :8], [torch.arange(4)[None]]) == 0


def test_cache_lies_in_the_cache_root(private_cache, caplog):
    caplog.set_level(logging.WARNING)
    token_windows("python-docs", byte_tokenizer(), length=32, sequences=2)
    assert private_cache == cache_root() / "tokens"
    assert len(list(private_cache.iterdir())) == 1
    assert not caplog.records


def test_a_mixture_takes_its_texts_in_turn_by_their_shares(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("a" * 800)
    (tmp_path / "b.txt").write_text("b" * 800)
    found = token_windows(f"{tmp_path}/a.txt::share=2 + {tmp_path}/b.txt", tokenizer, length=8, sequences=6)
    assert [chr(row[0]) for row in found.tolist()] == list("aabaab")


def test_a_mixture_goes_on_with_the_others_when_a_text_ends(tmp_path, tokenizer, caplog):
    (tmp_path / "a.txt").write_text("a" * 16)
    (tmp_path / "b.txt").write_text("b" * 800)
    text = f"{tmp_path}/a.txt + {tmp_path}/b.txt"
    found = token_windows(text, tokenizer, length=8, sequences=6)
    assert [chr(row[0]) for row in found.tolist()] == list("ababbb")
    assert "3 sequences of 8 tokens were asked for" in caplog.text
    assert len(token_windows(text, tokenizer, length=8)) == 102


def test_fewer_sequences_of_a_mixture_are_the_first_of_more(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("".join(map(str, range(900))))
    (tmp_path / "b.txt").write_text("".join(map(chr, range(65, 91))) * 40)
    text = f"{tmp_path}/a.txt::share=3 + {tmp_path}/b.txt"
    few, more = (token_windows(text, tokenizer, length=8, sequences=count) for count in (5, 50))
    assert torch.equal(few, more[:5])


def test_a_plus_sign_in_a_file_name_is_no_mixture(tmp_path, tokenizer):
    (tmp_path / "a + b.txt").write_text("c" * 80)
    assert len(token_windows(f"{tmp_path}/a + b.txt", tokenizer, length=8)) == 10


@pytest.mark.parametrize(
    ("text", "given"), [("python-docs::share=2", "share=2"), ("python-docs::share=0 + a.txt", "share=0")]
)
def test_a_share_needs_a_mixture_and_a_number(text, given, tokenizer):
    with pytest.raises(ValueError, match=given):
        token_windows(text, tokenizer, length=8)
