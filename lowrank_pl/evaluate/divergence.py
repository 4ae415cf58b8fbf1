"""Divergence of a compressed model from the dense one: in total, by block, and by position in the sequence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from lowrank_pl.evaluate.likelihood import Divergence, compared, perplexity
from lowrank_pl.models.eval_mode import evaluating
from lowrank_pl.models.sequences import check_sequences
from lowrank_pl.models.targets import decoder_blocks
from lowrank_pl.utils.checks import check_counts
from lowrank_pl.utils.formatting import percent, table

__all__ = ["PositionBin", "WhereDiverged", "profile_table", "score_texts", "show_texts", "where_diverged"]

SHOWN_BLOCKS = 8
"""Rows of the table of blocks."""


@dataclass(frozen=True)
class PositionBin:
    """Divergence on a range of positions.

    Args:
        first: First position; position 1 is the second token of a sequence.
        last: Last position.
        kl: KL(dense || model) in nats, mean over the positions.
        agreement: Fraction of tokens on which both models have the same most likely token.
        excess_nats: Negative log-likelihood above the dense model's, in nats per token.
    """

    first: int
    last: int
    kl: float
    agreement: float
    excess_nats: float


@dataclass(frozen=True)
class WhereDiverged:
    """Divergence of a model from the dense one, in total and in parts.

    Args:
        whole: Over all predicted tokens.
        positions: By bins of positions, of about equal width.
        blocks: Relative error of the hidden state after each decoder block: ``|model - dense| / |dense|``, mean over
            tokens. It is taken per token, since the first token's norm is often a thousand times the others'.
    """

    whole: Divergence
    positions: tuple[PositionBin, ...]
    blocks: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON values."""
        whole = self.whole
        return {
            "kl": whole.kl,
            "agreement": whole.agreement,
            "excess_nats": whole.excess_nats,
            "dense_nats": whole.dense_nats,
            "dense_perplexity": whole.dense_perplexity,
            "positions": [asdict(one) for one in self.positions],
            "blocks": list(self.blocks),
        }


def where_diverged(
    model: PreTrainedModel, dense: PreTrainedModel, sequences: Tensor, *, bins: int = 8, progress: str | None = None
) -> WhereDiverged:
    """Return the divergence of ``model`` from ``dense`` on ``sequences``, by position and after each block.

    The models run on one sequence at a time, so logits and hidden states of one sequence are in memory.

    Args:
        model: The compressed model.
        dense: The model that it was made from.
        sequences: Token ids ``[sequences, length]``, with BOS where the tokenizer adds it.
        bins: Number of bins of positions; fewer if sequences are shorter.
        progress: Label of a progress bar; ``None`` shows none.

    Raises:
        ValueError: A model can't score the sequences, the models differ in size, or ``bins`` is below 1.
        LogitsError: Logits of either model are NaN or infinite; the message names the sequence.

    Example:
        >>> from lowrank_pl.models.tiny import tiny_model
        >>> found = where_diverged(tiny_model("llama"), tiny_model("llama"), torch.arange(64).view(4, 16), bins=2)
        >>> found.blocks, [(part.first, part.last) for part in found.positions]
        ((0.0, 0.0), [(1, 7), (8, 15)])
    """
    check_counts({"position_bins": bins})
    for one in (dense, model):
        check_sequences(one, sequences)
    counts = [len(decoder_blocks(one)[1]) for one in (model, dense)]
    if counts[0] != counts[1]:
        raise ValueError(
            f"the model has {counts[0]} decoder blocks, the dense model {counts[1]}: compare a model with the base "
            "that it was made from"
        )
    sums = torch.zeros(4, sequences.shape[1] - 1, dtype=torch.float64)
    errors = torch.zeros(counts[0], dtype=torch.float64)
    bar = tqdm(sequences, desc=progress, unit="sequence", disable=progress is None)
    with evaluating(model), evaluating(dense), bar:
        for place, sequence in enumerate(bar):
            with _hidden_states(model) as ours, _hidden_states(dense) as theirs:
                sums += compared(model, dense, sequence[None], first=place)
            errors += torch.stack([_relative_error(a, b) for a, b in zip(ours, theirs, strict=True)])
    count = len(sequences)
    kl, agreement, nats, dense_nats = (sums.mean(1) / count).tolist()
    return WhereDiverged(
        Divergence(kl, agreement, nats, dense_nats, count * sums.shape[1]),
        tuple(_bins(sums / count, bins)),
        tuple((errors / count).tolist()),
    )


def profile_table(found: WhereDiverged, *, fmt: str = "simple") -> str:
    """Return the divergence by position and by block as two tables; of many blocks, a selection with both ends.

    Args:
        found: The divergence.
        fmt: A format of ``tabulate``.
    """
    along = [
        [f"{part.first}-{part.last}", f"{part.kl:.4f}", percent(part.agreement), f"{part.excess_nats:.4f}"]
        for part in found.positions
    ]
    last = len(found.blocks) - 1
    shown = sorted({round(last * step / (SHOWN_BLOCKS - 1)) for step in range(SHOWN_BLOCKS)})
    behind = [[str(block), percent(found.blocks[block])] for block in shown]
    return "\n\n".join([
        table(("positions", "KL", "same top-1", "excess nats"), along, fmt),
        table(("block", "relative error"), behind, fmt),
    ])  # fmt: skip


@contextmanager
def _hidden_states(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Collect the output ``[1, length, width]`` of each block in a list, within the context."""
    seen: list[Tensor] = []

    def hook(_: Any, __: Any, output: Any) -> None:
        hidden = output if isinstance(output, Tensor) else output[0]
        # A copy, since some blocks add to their input in place.
        seen.append(hidden.clone())

    with ExitStack() as stack:
        for block in decoder_blocks(model)[1]:
            stack.callback(block.register_forward_hook(hook).remove)
        yield seen


def _relative_error(ours: Tensor, theirs: Tensor) -> Tensor:
    """Return the relative distance, mean over the tokens, in fp64 on the CPU."""
    theirs = theirs.to(ours.device).double()
    distance = (ours.double() - theirs).norm(dim=-1)
    mean: Tensor = (distance / theirs.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)).mean()
    return mean.cpu()


def _bins(means: Tensor, bins: int) -> Iterator[PositionBin]:
    """Yield the bins of ``means``, which is ``[4, positions]``."""
    positions = means.shape[1]
    edges = [positions * step // min(bins, positions) for step in range(min(bins, positions) + 1)]
    for begin, end in pairwise(edges):
        kl, agreement, nats, dense_nats = means[:, begin:end].mean(1).tolist()
        yield PositionBin(begin + 1, end, kl, agreement, nats - dense_nats)


def score_texts(
    model: PreTrainedModel,
    texts: Mapping[str, Tensor],
    *,
    reference: PreTrainedModel | None = None,
    batch_size: int = 1,
    bins: int = 8,
) -> tuple[dict[str, dict[str, Any]], dict[str, WhereDiverged]]:
    """Return the figures of each text as JSON values, and the divergence from the reference by text.

    Args:
        model: A causal language model.
        texts: Token ids ``[sequences, length]`` by name of the text.
        reference: The dense model. With it, sequences are scored one by one and nothing is timed.
        batch_size: Sequences per forward pass without a reference.
        bins: Number of bins of positions, as in ``where_diverged``.
    """
    figures: dict[str, dict[str, Any]] = {}
    found: dict[str, WhereDiverged] = {}
    for name, sequences in texts.items():
        label = "score" if len(texts) == 1 else f"score {name}"
        if reference is None:
            scores: dict[str, Any] = perplexity(model, sequences, batch_size=batch_size, progress=label).to_dict()
        else:
            found[name] = where_diverged(model, reference, sequences, bins=bins, progress=f"{label}, both models")
            whole = found[name].whole
            scores = {"perplexity": whole.perplexity, "nats": whole.nats, "tokens": whole.tokens}
            scores["divergence"] = found[name].to_dict()
        figures[name] = {"windows": len(sequences), "length": sequences.shape[1], **scores}
    return figures, found


def show_texts(figures: Mapping[str, Mapping[str, Any]], found: Mapping[str, WhereDiverged]) -> str:
    """Return a table with one row per text, followed by the divergence of each text.

    Args:
        figures: Figures by text, from ``score_texts``.
        found: Divergences by text, from ``score_texts``.
    """
    if not found:
        return table(("text", "perplexity", "nats/token", "tokens", "tokens/s"), [
            (name, f"{one['perplexity']:.4f}", f"{one['nats']:.5f}", f"{one['tokens']:,}",
             f"{one['tokens_per_second']:,.0f}")
            for name, one in figures.items()
        ], "simple")  # fmt: skip
    head = ("text", "perplexity", "dense", "excess nats", "KL", "same top-1", "tokens")
    body = [
        (name, f"{one.whole.perplexity:.4f}", f"{one.whole.dense_perplexity:.4f}", f"{one.whole.excess_nats:.4f}",
         f"{one.whole.kl:.4f}", percent(one.whole.agreement), f"{one.whole.tokens:,}")
        for name, one in found.items()
    ]  # fmt: skip
    parts = [table(head, body, "simple"), *(f"{name}\n\n{profile_table(one)}" for name, one in found.items())]
    return "\n\n".join(parts)
