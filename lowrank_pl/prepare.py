"""From a base model and calibration windows to a factor store; nothing that a matching store holds is made again."""

from __future__ import annotations

import json
import logging
import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowrank_pl.budget import Budget
from lowrank_pl.decompose import SquareRoot, decompose, square_root
from lowrank_pl.factor_store import FactorStore, TensorStore, tensor_digest, weight_digest
from lowrank_pl.files import sha256_of
from lowrank_pl.statistics import InputMoments, collect_input_moments
from lowrank_pl.targets import Target, Targets, dense_weight
from lowrank_pl.windows import tokenizer_fingerprint, windows_fingerprint

__all__ = [
    "Decomposition",
    "budget_for",
    "build_factors",
    "describe_origin",
    "model_fingerprint",
    "model_parameters",
    "preparation_notes",
]

_log = logging.getLogger(__name__)
_NOT_COMPUTED_WITH = {"_name_or_path", "transformers_version", "architectures", "dtype", "use_cache", "auto_map"}


@dataclass(frozen=True)
class Decomposition:
    """How weights are decomposed.

    Args:
        kind: ``whitened`` weighs errors by the inputs' second moment (SVD-LLM, arXiv 2403.07378), ``svd`` does not.
        damping: Added to the diagonal of the second moment, relative to its mean.

    Raises:
        ValueError: Another kind, or a damping that is negative or not finite.
    """

    kind: Literal["whitened", "svd"] = "whitened"
    damping: float = 1e-6

    def __post_init__(self) -> None:
        if self.kind not in ("whitened", "svd"):
            raise ValueError(f"the kind of decomposition is {self.kind!r}: expected whitened or svd")
        if not 0 <= self.damping < math.inf:
            raise ValueError(f"damping is {self.damping}: expected a finite number of at least 0")

    @property
    def needs_text(self) -> bool:
        """Whether calibration text changes the result."""
        return self.kind == "whitened"


def model_fingerprint(model: PreTrainedModel) -> dict[str, str]:
    """Return SHA-256 digests of all that a model computes with.

    ``model`` covers the names, types, shapes and values of all parameters, ``config`` what else decides on the outputs
    (rotary base, norm epsilon, ...).
    """
    config = {key: value for key, value in model.config.to_dict().items() if key not in _NOT_COMPUTED_WITH}
    return {
        "model": tensor_digest(model.named_parameters()),
        "config": sha256_of(json.dumps(config, sort_keys=True, default=str)),
    }


def model_parameters(model: nn.Module) -> int:
    """Return the number of parameters, tied ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def budget_for(
    model: PreTrainedModel,
    targets: Targets,
    keep: float,
    *,
    multiple_of: int = 1,
    floors: dict[str, float] | None = None,
) -> Budget:
    """Return the budget of ``keep`` of the targeted parameters of a dense ``model``; arguments as in ``Budget``."""
    return Budget(
        keep=keep,
        shapes={target.name: target.shape for target in targets.modules},
        model_parameters=model_parameters(model),
        bytes_per_parameter=model.dtype.itemsize,
        multiple_of=multiple_of,
        floors=floors or {},
    )


def describe_origin(
    *, base: str, dtype: str, text: str, windows: Tensor, settings: Decomposition, store: FactorStore
) -> dict[str, Any]:
    """Return what a plan must remember so that its factors can be found, or made again.

    Args:
        base: The base model's name.
        dtype: Type that it was loaded in.
        text: The calibration text's name.
        windows: ``[windows, length]`` that were used of it.
        settings: How weights were decomposed.
        store: Where the factors lie.
    """
    count, length = windows.shape
    calibration = {"text": text, "length": length, "windows": count}
    return {
        "base": base,
        "dtype": dtype,
        "calibration": calibration,
        "decomposition": asdict(settings),
        "store": str(store.directory.resolve()),
    }


def preparation_notes(targets: Targets, store: FactorStore) -> list[str]:
    """Return in sentences what was not targeted, and why, and which square roots needed the fallback."""
    notes = []
    for reason in dict.fromkeys(skipped.reason for skipped in targets.skipped):
        those = [skipped for skipped in targets.skipped if skipped.reason == reason]
        count = sum(skipped.parameters for skipped in those)
        notes.append(f"not targeted, {reason}: {len(those)} ({count:,} parameters), e.g. {those[0].name}")
    made = {target: store.notes(target.name) for target in targets.modules}
    eigen = [target.name for target, how in made.items() if how.get("square_root") == "eigen"]
    if eigen:
        notes.append(f"square root by eigen-decomposition for {len(eigen)} modules, e.g. {eigen[0]}")
    short = [target.name for target, how in made.items() if int(how.get("tokens", sys.maxsize)) < target.shape[1]]
    if short:
        notes.append(f"fewer calibration tokens than inputs for {len(short)} modules, e.g. {short[0]}")
    return notes


def build_factors(
    model: PreTrainedModel,
    targets: Targets,
    windows: Tensor,
    tokenizer: PreTrainedTokenizerBase,
    *,
    settings: Decomposition | None = None,
    directory: str | Path | None = None,
    batch_size: int = 1,
) -> FactorStore:
    """Return a store that holds the factors of every target, making only those that are missing.

    Statistics are kept beside the factors, in a store of their own, so that another decomposition of the same model
    and text starts from them.

    Args:
        model: The dense base, on the device that is to do the work.
        targets: What ``find_targets`` found in it.
        windows: ``[windows, length]`` calibration token ids.
        tokenizer: The one that made them; part of the fingerprint.
        settings: How to decompose.
        directory: Folder of the store; by default one named by the fingerprint in the cache.
        batch_size: Windows per forward.

    Raises:
        ValueError: ``directory`` holds a store of something else, or a weight or an input is not finite.
    """
    settings = settings or Decomposition()
    source = model_fingerprint(model)
    if settings.needs_text:
        source |= {"tokenizer": tokenizer_fingerprint(tokenizer), "text": windows_fingerprint(windows)}
    store = FactorStore({**source, **asdict(settings)}, directory)
    missing = set(store.missing(target.name for target in targets.modules))
    todo = [target for target in targets.modules if target.name in missing]
    _log.info("factors: %d of %d modules to decompose, in %s", len(todo), len(targets.modules), store.directory)
    _check_finite(model, todo)
    if todo and settings.needs_text:
        statistics = _statistics(model, todo, windows, source, store, explicit=directory is not None, batch=batch_size)
        _decompose_all(model, todo, store, settings, statistics)
    elif todo:
        _decompose_all(model, todo, store, settings, None)
    return store


def _check_finite(model: PreTrainedModel, todo: Sequence[Target]) -> None:
    # Before the statistics, which would blame the modules that come after the damaged one.
    for target in todo:
        if not torch.isfinite(dense_weight(model.get_submodule(target.name))).all():
            raise ValueError(f"the weight of {target.name} holds NaN or infinity: the checkpoint is damaged")


def _statistics(
    model: PreTrainedModel,
    todo: Sequence[Target],
    windows: Tensor,
    source: dict[str, str],
    store: FactorStore,
    *,
    explicit: bool,
    batch: int,
) -> TensorStore:
    """Return the store of input moments, with those that ``todo`` needs collected."""
    statistics = TensorStore("statistics", source, store.directory / "statistics" if explicit else None)
    groups = set(statistics.missing(target.group for target in todo))
    if groups:
        moments = collect_input_moments(model, [t for t in todo if t.group in groups], windows, batch_size=batch)
        for group in tqdm(list(moments), desc="saving statistics", unit="input"):
            # Popped, so that memory shrinks as the disk fills.
            _save_moments(statistics, group, moments.pop(group))
    return statistics


def _save_moments(statistics: TensorStore, group: str, moments: InputMoments) -> None:
    # float32 on disk: the batch products were summed from float32 products, more digits would only be noise. But the
    # squares of massive activations may lie beyond its range.
    second = moments.second_moment
    narrow = second.float()
    tensors = {
        "second_moment": narrow if torch.isfinite(narrow).all() else second,
        "mean_absolute": moments.mean_absolute.float(),
    }
    statistics.write(group, tensors, notes={"tokens": str(moments.tokens)})


def _decompose_all(
    model: PreTrainedModel,
    todo: Sequence[Target],
    store: FactorStore,
    settings: Decomposition,
    statistics: TensorStore | None,
) -> None:
    kinds: Counter[str] = Counter()
    bar = tqdm(total=len(todo), desc="decompose", unit="module")
    # Members of a group follow each other in the model's order, so each square root is computed once and dropped.
    for group, members in groupby(todo, key=lambda target: target.group):
        root = None if statistics is None else _root(statistics, group, settings, model.device)
        if root is not None:
            kinds[root.kind] += 1
        for target in members:
            weight = dense_weight(model.get_submodule(target.name)).detach()
            notes = {"weight": weight_digest(weight)}
            if root is not None and statistics is not None:
                notes |= {"square_root": root.kind, "tokens": statistics.notes(group)["tokens"]}
            store.add(target.name, decompose(weight, whitening=root), notes=notes)
            bar.update()
    bar.close()
    if kinds["eigen"]:
        _log.warning(
            "%d of %d second moments were not positive definite after damping %g: their square root was taken by "
            "eigen-decomposition",
            kinds["eigen"],
            kinds.total(),
            settings.damping,
        )


def _root(statistics: TensorStore, group: str, settings: Decomposition, device: torch.device) -> SquareRoot:
    moment = statistics.read(group, "second_moment").to(device)
    try:
        return square_root(moment, damping=settings.damping)
    except ValueError as error:
        raise ValueError(f"{error}: at the input of {group}") from None
