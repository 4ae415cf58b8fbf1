"""A mixture of experts made from a dense model."""

from __future__ import annotations

import pytest
import torch

from lowrank_pl.models.tiny import tiny_model
from lowrank_pl.models.upcycling import UpcyclingError, upcycled
from tests.helpers.unchanged import assert_untouched, state


@pytest.mark.parametrize("tied", [False, True])
def test_the_copy_computes_what_the_dense_model_computes(tied, sequences):
    dense = tiny_model("llama")
    if tied:
        dense.config.tie_word_embeddings = True
        dense.tie_weights()
    before = state(dense)
    mixture = upcycled(dense, experts=3, chosen=2)
    assert mixture.config.num_local_experts == 3
    assert (mixture.lm_head.weight is mixture.model.embed_tokens.weight) == tied
    with torch.no_grad():
        torch.testing.assert_close(mixture(sequences).logits, dense(sequences).logits, rtol=1e-4, atol=1e-4)
    assert_untouched(dense, before)


@pytest.mark.parametrize(
    ("family", "message"),
    [("gpt2", "a gated MLP expected"), ("qwen2", "k_proj.bias is not as in Mixtral"), ("qwen3", "norm.* is not as in")],
)
def test_other_shapes_are_refused(family, message):
    with pytest.raises(UpcyclingError, match=message):
        upcycled(tiny_model(family))


def test_all_experts_for_each_token_are_refused():
    with pytest.raises(ValueError, match="2 of 2 experts are to serve each token: expected at least 1 and fewer than"):
        upcycled(tiny_model("llama"), experts=2)
