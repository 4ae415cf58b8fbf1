"""How perplexity rises when one module alone is truncated, measured once and kept on disk."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import groupby
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from lowrank_pl.compress import factored_layer
from lowrank_pl.decompose import Factors, truncate
from lowrank_pl.evaluate import perplexity
from lowrank_pl.factor_store import FactorStore
from lowrank_pl.files import atomic_write, canonical_json, sha256_of
from lowrank_pl.resume_forward import block_outputs, can_resume, resumed
from lowrank_pl.targets import Target, decoder_blocks, replaced
from lowrank_pl.windows import windows_fingerprint

__all__ = ["DENSE", "Measured", "measure", "truncated"]

_log = logging.getLogger(__name__)
DENSE = ("", 0)
"""Where the loss of the dense model stands among those of truncated ones."""
Measured = dict[tuple[str, int], float]
"""Nats a token by module and rank."""


def measure(
    model: PreTrainedModel,
    factors: FactorStore,
    windows: Tensor,
    todo: Sequence[tuple[Target, Sequence[int]]],
    *,
    batch_size: int,
) -> Measured:
    """Return the mean loss of ``model`` on ``windows`` with one module truncated at a time, and of the dense model.

    Each figure goes to a file beside the factors at once, and what stands there is not measured again. Only the blocks
    from the truncated module on are run where the family allows it.

    Args:
        model: The dense base.
        factors: The components of its modules.
        windows: ``[windows, length]`` token ids.
        todo: Which modules, in the model's order, and at which ranks.
        batch_size: Windows per forward.

    Raises:
        ValueError: Logits that are not finite.
    """
    record = _Record(factors, windows)
    if DENSE not in record.known:
        record.add(DENSE, perplexity(model, windows, batch_size=batch_size).nats)
    missing = [(target, [r for r in ranks if (target.name, r) not in record.known]) for target, ranks in todo]
    missing = [(target, ranks) for target, ranks in missing if ranks]
    _log.info("sensitivity: %d of %d losses to measure, in %s", *_counts(missing, todo), record.path)
    if missing:
        _measure(model, factors, windows, missing, record, batch_size)
    return record.known


def _counts(missing: Sequence[tuple[Target, Sequence[int]]], todo: Sequence[tuple[Target, Sequence[int]]]) -> list[int]:
    return [sum(len(ranks) for _, ranks in entries) for entries in (missing, todo)]


def _measure(
    model: PreTrainedModel,
    factors: FactorStore,
    windows: Tensor,
    missing: Sequence[tuple[Target, Sequence[int]]],
    record: _Record,
    batch_size: int,
) -> None:
    resuming = can_resume(model, windows[:1, :32])
    if not resuming:
        _log.warning(
            "the blocks of %s share more than the hidden state: every loss takes a whole forward pass",
            type(model).__name__,
        )
    depth = len(decoder_blocks(model)[1])
    # What a loss costs: the blocks that run, and the head for about as much as one.
    prices = {target.name: depth - (target.block if resuming else 0) + 1 for target, _ in missing}
    total = sum(prices[target.name] * len(ranks) for target, ranks in missing)
    start = 0
    outputs: list[Any] = []
    clock = _Clock(total)
    with tqdm(total=total, desc="sensitivity", unit="block") as bar:
        for block, members in groupby(missing, key=lambda entry: entry[0].block):
            if resuming and block > 0:
                outputs = block_outputs(model, windows, block - 1, batch_size=batch_size, start=start, outputs=outputs)
                start = block
            for target, ranks in members:
                whole = factors.factors(target.name, max(ranks))
                for rank in ranks:
                    begin = resumed(model, block, outputs) if resuming else nullcontext()
                    with begin, truncated(model, target.name, truncate(whole, rank)):
                        record.add((target.name, rank), perplexity(model, windows, batch_size=batch_size).nats)
                    bar.update(prices[target.name])
                    clock.tick(prices[target.name])


@contextmanager
def truncated(model: PreTrainedModel, name: str, factors: Factors) -> Iterator[None]:
    """Put a layer of ``factors`` in the place of module ``name`` for a while."""
    with replaced(model, {name: factored_layer(model.get_submodule(name), factors)}):
        yield


class _Clock:
    """Says once, after the first few measurements, how long all will take."""

    def __init__(self, total: int, *, after: int = 5) -> None:
        self.total, self.done, self.count, self.after, self.start = total, 0, 0, after, time.perf_counter()

    def tick(self, price: int) -> None:
        self.done += price
        self.count += 1
        if self.count == self.after:
            minutes = (time.perf_counter() - self.start) / self.done * (self.total - self.done) / 60
            _log.info("sensitivity: about %.1f minutes to go; a killed run goes on where it was", minutes)


class _Record:
    """Measured losses in a file of JSON lines, under the fingerprint of factors and windows."""

    def __init__(self, factors: FactorStore, windows: Tensor) -> None:
        made_from = {"factors": factors.digest, "windows": windows_fingerprint(windows)}
        digest = sha256_of(canonical_json(made_from))[:20]
        self.path: Path = factors.directory / "sensitivity" / f"{digest}.jsonl"
        self.known: Measured = {}
        if self.path.exists():
            self._read()
        else:
            atomic_write(self.path, canonical_json(made_from) + "\n")

    def _read(self) -> None:
        text = self.path.read_text(encoding="utf-8")
        # What a killed run was writing has no end of line.
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            atomic_write(self.path, whole)
        try:
            entries: list[Mapping[str, Any]] = [json.loads(line) for line in whole.splitlines()[1:]]
            self.known = {(entry["module"], entry["rank"]): entry["nats"] for entry in entries}
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path} is damaged ({error}): delete it and run again") from None

    def add(self, key: tuple[str, int], nats: float) -> None:
        """Remember the loss, on disk first."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(canonical_json({"module": key[0], "rank": key[1], "nats": nats}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.known[key] = nats
