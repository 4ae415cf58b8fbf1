"""STRS, sensitivity-based truncation rank search: the perplexity that each module's truncation alone costs."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from lowrank_pl.evaluate.likelihood import perplexity
from lowrank_pl.factors.compression import factored_layer
from lowrank_pl.factors.decomposition import Factors, truncate
from lowrank_pl.factors.settings import Kind
from lowrank_pl.factors.store import FactorStore
from lowrank_pl.methods.allocate.base import Allocator, Problem
from lowrank_pl.models.forward import block_outputs, forward_from, forward_from_is_exact
from lowrank_pl.models.targets import Target, decoder_blocks, replaced
from lowrank_pl.text.sequences import sequences_fingerprint
from lowrank_pl.utils.files import atomic_write, canonical_json, sha256_of
from lowrank_pl.utils.json_files import sealed, unsealed

__all__ = ["DENSE", "STRS", "Losses", "grid_scores", "measure", "truncated"]

_log = logging.getLogger(__name__)


DENSE = ("", 0)
"""The key of the dense model's loss."""

Losses = dict[tuple[str, int], float]
"""Nats a token, by the module that is truncated and its rank."""


def measure(
    model: PreTrainedModel,
    factors: FactorStore,
    sequences: Tensor,
    todo: Sequence[tuple[Target, Sequence[int]]],
    *,
    batch_size: int,
) -> Losses:
    """Return the mean loss of ``model`` on ``sequences`` with one module truncated at a time, and of the dense model.

    Each loss is written at once to a file beside the factors, and losses in this file are not measured again. Only the
    blocks from the truncated module on are run, where the model family allows it.

    Args:
        model: The dense base.
        factors: The components of its modules.
        sequences: ``[sequences, length]`` token ids.
        todo: The modules to truncate, in the model's order, and the ranks of each.
        batch_size: Sequences in a forward pass.

    Raises:
        ValueError: Logits that are not finite.
    """
    record = _Record(factors, sequences)
    if DENSE not in record.known:
        dense = perplexity(model, sequences, batch_size=batch_size, progress="sensitivity: the dense model")
        record.add(DENSE, dense.nats)
    missing = [(target, [r for r in ranks if (target.name, r) not in record.known]) for target, ranks in todo]
    missing = [(target, ranks) for target, ranks in missing if ranks]
    _log.info("sensitivity: %d of %d losses to measure, in %s", *_counts(missing, todo), record.path)
    if missing:
        _measure(model, factors, sequences, missing, record, batch_size)
    return record.known


def _counts(missing: Sequence[tuple[Target, Sequence[int]]], todo: Sequence[tuple[Target, Sequence[int]]]) -> list[int]:
    return [sum(len(ranks) for _, ranks in entries) for entries in (missing, todo)]


def _measure(
    model: PreTrainedModel,
    factors: FactorStore,
    sequences: Tensor,
    missing: Sequence[tuple[Target, Sequence[int]]],
    record: _Record,
    batch_size: int,
) -> None:
    resuming = forward_from_is_exact(model, sequences[:1, :32])
    if not resuming:
        _log.warning(
            "the blocks of %s share more than the hidden state: every loss takes a whole forward pass",
            type(model).__name__,
        )
    depth = len(decoder_blocks(model)[1])
    # The cost of a loss is the blocks that run; the head costs about as much as one.
    costs = {target.name: depth - (target.block if resuming else 0) + 1 for target, _ in missing}
    total = sum(costs[target.name] * len(ranks) for target, ranks in missing)
    start = 0
    outputs: list[Any] = []
    clock = _Clock(total)
    with tqdm(total=total, desc="sensitivity", unit="block") as bar:
        for block, members in groupby(missing, key=lambda entry: entry[0].block):
            if resuming and block > 0:
                outputs = block_outputs(
                    model, sequences, block - 1, batch_size=batch_size, start=start, outputs=outputs
                )
                start = block
            for target, ranks in members:
                whole = factors.factors(target.name, max(ranks))
                for rank in ranks:
                    begin = forward_from(model, block, outputs) if resuming else nullcontext()
                    with begin, truncated(model, target.name, truncate(whole, rank)):
                        record.add((target.name, rank), perplexity(model, sequences, batch_size=batch_size).nats)
                    bar.update(costs[target.name])
                    clock.tick(costs[target.name])


@contextmanager
def truncated(model: PreTrainedModel, name: str, factors: Factors) -> Iterator[None]:
    """Replace module ``name`` by a layer of ``factors`` inside the block."""
    with replaced(model, {name: factored_layer(model.get_submodule(name), factors)}):
        yield


class _Clock:
    """Logs once, after the first few measurements, how long the rest will take."""

    def __init__(self, total: int, *, after: int = 5) -> None:
        self.total, self.done, self.count, self.after, self.start = total, 0, 0, after, time.perf_counter()

    def tick(self, cost: int) -> None:
        self.done += cost
        self.count += 1
        if self.count == self.after:
            minutes = (time.perf_counter() - self.start) / self.done * (self.total - self.done) / 60
            _log.info("sensitivity: about %.1f minutes to go; a killed run resumes where it stopped", minutes)


class _Record:
    """Measured losses in a file of JSON lines, under the fingerprint of factors and sequences."""

    def __init__(self, factors: FactorStore, sequences: Tensor) -> None:
        made_from = {"factors": factors.digest, "windows": sequences_fingerprint(sequences)}
        digest = sha256_of(canonical_json(made_from))[:20]
        self.path: Path = factors.directory / "sensitivity" / f"{digest}.jsonl"
        self.known: Losses = {}
        if self.path.exists():
            self._read()
        else:
            atomic_write(self.path, canonical_json(made_from) + "\n")

    def _read(self) -> None:
        text = self.path.read_text(encoding="utf-8")
        # A line that a killed run was writing has no end.
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            atomic_write(self.path, whole)
        try:
            entries: list[Mapping[str, Any]] = [unsealed(json.loads(line)) for line in whole.splitlines()[1:]]
            self.known = {(entry["module"], entry["rank"]): entry["nats"] for entry in entries}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{self.path} is damaged ({error}): delete it and run again") from None

    def add(self, key: tuple[str, int], nats: float) -> None:
        """Record the loss, on disk first."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(canonical_json(sealed({"module": key[0], "rank": key[1], "nats": nats})) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.known[key] = nats


@dataclass(frozen=True)
class STRS(Allocator):
    """A threshold on the perplexities of models with one truncated module (STRS of ASVD, arXiv 2312.05821).

    Each module alone is truncated to each ratio of a grid, with all other modules dense. ASVD sorts the triples of
    module, ratio and perplexity, and gives every module its smallest ratio below a threshold. As scores: dropping a
    component leaves the module at the next smaller ratio of the grid, so its score is the least loss that was measured
    at this ratio or a smaller one. Components below the grid are kept before all others and shrink at one rate.

    ASVD scores every model on all the sequences that its factors were made from, 32 of 2,048 tokens by default. This is
    the convention here too. It takes one pass over them for each module and ratio, which is most of the method's cost.
    Fewer or shorter sequences take less time in proportion, and the losses of ratios near 1 then hold more noise.

    Args:
        ratios: The grid, as fractions of the module's parameters.
        sequences: How many calibration sequences are scored, the first ones; all by default.
        length: Tokens of a sequence that are used; all by default.
        batch_size: Sequences in a forward pass.

    Raises:
        ValueError: A setting outside its range.
    """

    ratios: Sequence[float] = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    sequences: int | None = None
    length: int | None = None
    batch_size: int = 4
    name: ClassVar[str] = "strs"
    paper: ClassVar[str | None] = "2312.05821"
    default_kind: ClassVar[Kind] = "asvd"
    needs_model: ClassVar[bool] = True

    def __post_init__(self) -> None:
        rising = sorted(set(self.ratios))
        if not rising or rising[0] <= 0 or rising[-1] >= 1:
            raise ValueError(f"ratios are {list(self.ratios)}: expected one or more fractions between 0 and 1")
        few = self.sequences is not None and self.sequences < 1
        if few or self.batch_size < 1 or (self.length is not None and self.length < 2):
            raise ValueError(
                f"sequences is {self.sequences}, batch_size {self.batch_size}, length {self.length}: expected at least "
                "1 sequence, 1 sequence a batch and 2 tokens, or None for all sequences or tokens"
            )
        object.__setattr__(self, "ratios", tuple(rising))

    def scores(self, problem: Problem) -> dict[str, Tensor]:
        """Return the excess loss in nats a token at the ratio of the grid that is left when a component is dropped."""
        model, _ = self.need_model(problem)
        sequences = self._scored(problem)
        for asked, there, what in zip(
            (self.sequences, self.length), sequences.shape, ("sequences", "tokens a sequence"), strict=True
        ):
            if asked is not None and asked > there:
                _log.warning("sensitivity: %d %s were asked for, and the calibration text has %d", asked, what, there)
        shapes = problem.budget.shapes
        costs = problem.budget.rank_costs
        ranks = {
            name: [max(1, int(costs.rank_at(shape, ratio) + 1e-9)) for ratio in self.ratios]
            for name, shape in shapes.items()
        }
        # A module that must stay dense needs no measurement.
        truncatable = [t for t in problem.targets.modules if t.name in shapes and problem.budget.least_rank(t.name)]
        known = measure(
            model,
            problem.factors,
            sequences,
            [(target, list(dict.fromkeys(ranks[target.name]))) for target in truncatable],
            batch_size=self.batch_size,
        )
        rises = {t.name: [known[t.name, rank] - known[DENSE] for rank in ranks[t.name]] for t in truncatable}
        ceiling = max((rise for found in rises.values() for rise in found), default=0.0)
        return {
            name: grid_scores(costs.ratios(shape), self.ratios, rises[name], ceiling)
            if name in rises
            else torch.zeros(min(shape))
            for name, shape in shapes.items()
        }

    def notes(self, problem: Problem) -> Sequence[str]:
        """Return how many sequences sensitivity was measured on."""
        used = self._scored(problem)
        return (f"sensitivity measured on {used.shape[0]} sequences of {used.shape[1]} tokens",)

    def _scored(self, problem: Problem) -> Tensor:
        """Return the token ids that the losses are measured on."""
        _, sequences = self.need_model(problem)
        return sequences[: self.sequences, : self.length]


def grid_scores(own: Tensor, ratios: Sequence[float], rises: Sequence[float], ceiling: float) -> Tensor:
    """Return scores ``[min(out, in)]`` of a module's components from the losses measured at a grid of its ratios.

    Args:
        own: ``[min(out, in)]`` the module's ratio when it keeps the components up to each one.
        ratios: The grid, ascending.
        rises: The excess loss at each ratio.
        ceiling: The highest excess loss of any module; components below the grid score higher.

    >>> grid_scores(torch.tensor([0.5, 1.0, 1.5, 2.0]), (0.5, 0.9), (3.0, 1.0), 5.0).tolist()
    [6.0, 1.0, 1.0, 1.0]
    """
    # Where a smaller ratio loses less than a larger one, the threshold reaches it first.
    least = torch.tensor(rises, dtype=torch.float64).cummin(0).values
    below = torch.searchsorted(torch.tensor(ratios, dtype=torch.float64), own.double() - 1e-9)
    return torch.where(below == 0, ceiling + ratios[0] / own, least[(below - 1).clamp_min(0)])
