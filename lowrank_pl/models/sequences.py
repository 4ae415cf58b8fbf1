"""Whether a model can be run on sequences of tokens."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel

from lowrank_pl.utils.checks import check_counts

__all__ = ["check_sequences"]


def check_sequences(model: PreTrainedModel, sequences: Tensor, batch_size: int = 1, *, least: int = 2) -> None:
    """Check that ``model`` can be run on ``sequences``, without a forward pass.

    Args:
        model: A causal language model.
        sequences: Token ids ``[sequences, length]``.
        batch_size: Sequences per forward pass.
        least: Tokens that a sequence needs; a loss needs two, of which the first predicts the second.

    Raises:
        ValueError: The shape or type is wrong, ids are outside the vocabulary, sequences are longer than the model's
            positions, or the batch size is below 1.
    """
    if sequences.ndim != 2 or sequences.shape[0] < 1 or sequences.shape[1] < least or sequences.is_floating_point():
        raise ValueError(
            f"sequences of shape {tuple(sequences.shape)} and type {sequences.dtype} were given: "
            f"expected integer token ids [sequences, length], at least one sequence of {least} tokens"
        )
    check_counts({"batch_size": batch_size})
    vocabulary = model.get_input_embeddings().num_embeddings
    low, high = int(sequences.min()), int(sequences.max())
    if low < 0 or high >= vocabulary:
        raise ValueError(
            f"the sequences have token ids from {low} to {high}, but the model's vocabulary is 0 to {vocabulary - 1}: "
            "use the model's own tokenizer, or give the model an embedding for each token of this one "
            "(resize_token_embeddings)"
        )
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and sequences.shape[1] > positions:
        raise ValueError(
            f"sequences of {sequences.shape[1]} tokens were given, but the model has {positions} positions: "
            "use shorter sequences"
        )
