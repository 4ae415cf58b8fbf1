"""A model and the sequences that it is calibrated on fit each other."""

from __future__ import annotations

import pytest
import torch

from lowrank_pl import Base, Calibration
from lowrank_pl.calibration.subject import Subject
from lowrank_pl.models.tiny import byte_tokenizer, tiny_model


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
def test_sequences_beyond_the_positions_are_refused(family):
    with pytest.raises(ValueError, match=r"2049 tokens .* 2048 positions: use shorter sequences"):
        Subject(tiny_model(family), byte_tokenizer(), torch.zeros(1, 2049, dtype=torch.long))


def test_tokens_without_an_embedding_are_refused(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["the"])
    tiny_model("llama").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"to 261, .* 0 to 260: use the model's own tokenizer.*resize_token_embeddings"
    ):
        Subject.load(Base(str(tmp_path)), Calibration(length=64, sequences=32))


def test_other_sequences_are_checked_too(llama, tokenizer, sequences):
    with pytest.raises(ValueError, match="0 to 260"):
        Subject(llama, tokenizer, sequences).on(sequences + 200)
