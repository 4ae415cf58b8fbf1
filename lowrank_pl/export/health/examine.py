"""What ``lowrank doctor`` does: says of a folder whether the model in it is healthy; a plain typed function."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lowrank_pl.evaluate.likelihood import check_sequences
from lowrank_pl.export.export import is_compressed, load_compressed
from lowrank_pl.export.health.diagnosis import Diagnosis, Finding, Sample
from lowrank_pl.export.health.quality import PROMPTS, check_generation, check_text
from lowrank_pl.export.health.tokenizer import check_tokenizer
from lowrank_pl.export.health.weights import check_merged_ranks, check_plan, check_weights, tensors_in, tensors_of
from lowrank_pl.export.reload import ReloadError, compare_reload
from lowrank_pl.export.reload_probe import probe
from lowrank_pl.models.base import DTYPES, load_base, load_tokenizer
from lowrank_pl.models.hf_format import METHOD, LowRankConfig, align
from lowrank_pl.plans.plan import RankPlan
from lowrank_pl.text.sequences import token_windows
from lowrank_pl.utils.environment import pick_device

__all__ = ["diagnose"]

_log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class _Patient:
    """What could be loaded of a folder; the rest is None and has a finding."""

    config: PretrainedConfig
    entries: Mapping[str, Any]
    model: PreTrainedModel | None
    tokenizer: PreTrainedTokenizerBase | None
    plan: RankPlan | None
    tensors: Mapping[str, Tensor]


def diagnose(
    directory: str | Path,
    *,
    base: str | None = None,
    text: str = "python-docs",
    sequences: int = 8,
    length: int = 512,
    prompts: Sequence[str] = PROMPTS,
    max_new_tokens: int = 64,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> Diagnosis:
    """Return what ``doctor`` finds, without showing it; arguments as there.

    Raises:
        ValueError: No such folder, or a base, a text, a prompt or a device that can't be used.
    """
    folder, place = _folder(directory), pick_device(device)
    findings: list[Finding] = []
    patient = _admitted(folder, place, findings, trust=trust_remote_code)
    if patient is None:
        return Diagnosis(str(folder), findings)
    named = base if base is not None or patient.plan is None else patient.plan.named_base or None

    def of_base(load: Callable[..., T], **settings: Any) -> T | None:
        return _of_base(load, named, asked=base is not None, trust_remote_code=trust_remote_code, **settings)

    original = of_base(load_tokenizer)
    findings += _contents(patient, original)
    model, tokenizer = patient.model, patient.tokenizer
    if model is None or tokenizer is None or any(finding.health == "sick" for finding in findings):
        _log.info("text and prompts are left out, for the model is sick already")
        return Diagnosis(str(folder), findings)
    tokens = token_windows(text, tokenizer, length=length, sequences=sequences)
    check_sequences(model, tokens)
    dense = None if original is None else of_base(load_base, dtype=model.dtype)
    if dense is not None:
        dense.to(place)
    findings.append(check_text(model, dense, tokens))
    samples: list[Sample] = []
    if prompts and findings[-1].health != "sick":
        said, samples = check_generation(model, dense, tokenizer, prompts, max_new_tokens=max_new_tokens)
        findings.append(said)
    protocol = {"text": text, "windows": tokens.shape[0], "length": tokens.shape[1]}
    return Diagnosis(str(folder), findings, samples, protocol)


def _folder(directory: str | Path) -> Path:
    folder = Path(directory)
    if not folder.is_dir():
        raise ValueError(f"no folder {str(folder)!r}: give that of an export or of a checkpoint")
    return folder


def _admitted(folder: Path, place: torch.device, findings: list[Finding], *, trust: bool) -> _Patient | None:
    """Return what can be loaded of ``folder``, with findings on how that went; None of what is no model."""
    if not (folder / "config.json").is_file():
        there = ", ".join(sorted(file.name for file in folder.iterdir())[:8]) or "nothing"
        inside = (folder / "model" / "config.json").is_file()
        advice = f"give {folder / 'model'}" if inside else "give the folder of a model"
        findings.append(Finding("loads", "sick", f"the folder holds no config.json but {there}", {}, advice))
        return None
    config = _attempted("loads", lambda: AutoConfig.from_pretrained(folder, trust_remote_code=trust), findings)
    entries = None if config is None else _attempted("loads", lambda: _entries(config), findings)
    if config is None or entries is None:
        return None
    model = _attempted("loads", lambda: _model(folder, config, trust=trust), findings)
    tokenizer = _attempted("tokenizer", lambda: load_tokenizer(str(folder), trust_remote_code=trust), findings)
    if model is not None:
        # Not where errors are findings: a device that is full says nothing of the model.
        model.to(place)
    if model is not None and tokenizer is not None:
        findings.append(_reload(folder, model, tokenizer))
    plan = None
    if (folder / "plan.json").is_file():
        plan = _attempted("plan", lambda: RankPlan.load(folder / "plan.json"), findings)
    elif entries:
        said = "there is no plan.json to compare ranks with"
        findings.append(Finding("plan", "warning", said, {}, "export with the plan, or copy it into the folder"))
    tensors = _stored(folder) if model is None else tensors_of(model)
    return _Patient(config, entries, model, tokenizer, plan, tensors)


def _attempted(name: str, load: Callable[[], T], findings: list[Finding]) -> T | None:
    """Return what ``load`` does, or None and a finding on why it can't."""
    try:
        return load()
    # What transformers raises depends on what is wrong: weights of another shape are a RuntimeError.
    except (ValueError, OSError, RuntimeError) as error:
        said = " ".join(str(error).split())
        if "ignore_mismatched_sizes" in said:
            said = "transformers finds weights of other shapes than the config says"
        findings.append(Finding(name, "sick", said, {}, "copy the folder again or export it again"))
        return None


def _entries(config: PretrainedConfig) -> Mapping[str, Any]:
    """Return what the config says of each low-rank module; nothing in a plain model's."""
    said = getattr(config, "quantization_config", None) or {}
    if said.get("quant_method") != METHOD:
        return {}
    entries: Mapping[str, Any] = LowRankConfig(**said).modules
    return entries


def _model(folder: Path, config: PretrainedConfig, *, trust: bool) -> PreTrainedModel:
    """Return the model in ``folder`` in the type that it was saved in."""
    if is_compressed(folder):
        return load_compressed(folder, trust_remote_code=trust)
    dtype = config.dtype if config.dtype in DTYPES else torch.float32
    model = load_base(str(folder), dtype=dtype, trust_remote_code=trust)
    # As the fresh process does: addresses decide the last bit of a matrix-vector product.
    align(model)
    return model


def _reload(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Finding:
    """Return whether a fresh process, with transformers alone, gets the same model out of the folder."""
    try:
        compare_reload(model, folder, probe(model), tokenizer, merged=not is_compressed(folder))
    except ReloadError as error:
        # Of what the process said, the last line is its error.
        lines = str(error).strip().splitlines()
        if len(lines) > 1:
            advice = "--json has all that it said"
            return Finding("loads", "sick", f"{lines[0]} {lines[-1]}", {"told": str(error)}, advice)
        return Finding("loads", "sick", lines[0], {}, "export it again")
    said = "a fresh process loads it with transformers alone, to the same logits and without missing weights"
    return Finding("loads", "healthy", said)


def _stored(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of a folder that does not load; none where the files can't be read."""
    try:
        return tensors_in(folder)
    except SafetensorError as error:
        _log.info("the weight files can't be read: %s", error)
        return {}


def _contents(patient: _Patient, original: PreTrainedTokenizerBase | None) -> list[Finding]:
    """Return what tensors, plan and tokenizer say without a text."""
    findings: list[Finding] = []
    if patient.tensors:
        findings += check_weights(patient.tensors, patient.entries)
    if patient.tensors and patient.plan is not None:
        findings += check_plan(patient.plan, patient.tensors, patient.entries)
        if not patient.entries and findings[-1].health != "sick":
            findings.append(check_merged_ranks(patient.plan, patient.tensors))
    if patient.tokenizer is not None:
        model, config = patient.model, patient.config.get_text_config()
        vocabulary = config.vocab_size if model is None else model.get_input_embeddings().num_embeddings
        known = None if patient.plan is None else patient.plan.fingerprint.get("tokenizer")
        findings += check_tokenizer(patient.tokenizer, config, vocabulary, fingerprint=known, base=original)
    return findings


def _of_base(load: Callable[..., T], named: str | None, *, asked: bool, **settings: Any) -> T | None:
    """Return what ``load`` makes of the base ``named``; None, with a warning, where only the plan knows of it."""
    if named is None:
        return None
    try:
        return load(named, **settings)
    except ValueError as error:
        if asked:
            raise
        _log.warning("nothing is compared with the base, name it with --base: %s", error)
        return None
