"""The examination behind ``lowrank doctor``: is the model in a folder healthy?"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lowrank_pl.evaluate.generation import check_prompts
from lowrank_pl.export.export import OTHER_SHAPES, is_compressed, load_compressed
from lowrank_pl.export.health.diagnosis import Diagnosis, Finding, Sample
from lowrank_pl.export.health.files import check_code, check_components, check_digests
from lowrank_pl.export.health.quality import Prompts, check_generation, check_text
from lowrank_pl.export.health.tokenizer import check_tokenizer
from lowrank_pl.export.health.weights import check_merged_ranks, check_plan, check_weights, tensors_in, tensors_of
from lowrank_pl.export.reload import ReloadError, compare_reload
from lowrank_pl.export.reload_probe import probe
from lowrank_pl.models.base import load_base, load_tokenizer, resolve_base, stored_dtype
from lowrank_pl.models.digests import unchecked
from lowrank_pl.models.hf_experts import experts_fused
from lowrank_pl.models.hf_format import METHOD, LowRankConfig, align
from lowrank_pl.models.sequences import check_sequences
from lowrank_pl.plans.plan import RankPlan
from lowrank_pl.text.sequences import Calibration, warn_of_overlap
from lowrank_pl.text.sources import parse_mixture
from lowrank_pl.utils.environment import pick_device
from lowrank_pl.utils.files import at_home

__all__ = ["diagnose"]

_log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class _Contents:
    """The contents of a folder; what could not be loaded is None and has a finding."""

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
    text: Calibration = Calibration(sequences=8),
    prompts: Prompts = Prompts(),
    device: str = "auto",
    trust_remote_code: bool = False,
) -> Diagnosis:
    """Return whether the model in a folder is healthy, with one finding for each check.

    Args:
        directory: Folder of an export, as factors or merged, or of a plain checkpoint.
        base: The dense model to compare with; by default the one that the folder's plan names.
        text: Text to score both models on.
        prompts: Prompts that both models continue.
        device: Device to compute on, as ``lowrank_pl.utils.environment.pick_device`` takes it.
        trust_remote_code: Whether to run Python code that comes with the model or its base.

    Raises:
        ValueError: There is no such folder, or the base, the text, a prompt or the device can't be used.
    """
    # `lowrank report` knows its model by the folder, wherever it is run.
    folder = at_home(directory).resolve()
    if not folder.is_dir():
        raise ValueError(f"no folder {str(folder)!r}: give the folder of an export or of a checkpoint")
    computing = pick_device(device)
    # Mistakes in names are found before anything is loaded.
    parse_mixture(text.text)
    if base is not None:
        resolve_base(base)
    findings: list[Finding] = []
    contents = _load(folder, computing, findings, trust=trust_remote_code)
    if contents is None:
        return Diagnosis(str(folder), findings)
    name = base
    if name is None and contents.plan is not None:
        name = contents.plan.named_base or None
    options = {"required": base is not None, "trust_remote_code": trust_remote_code}
    original = _load_base(load_tokenizer, name, **options)
    about_contents = _check_contents(contents, original)
    components = None if contents.plan is None else check_components(folder, contents.plan)
    about_contents += [] if components is None else [components]
    model, tokenizer, tokens = contents.model, contents.tokenizer, None
    if model is not None and tokenizer is not None:
        if not any(finding.health == "broken" for finding in findings + about_contents):
            tokens = text.tokens(tokenizer)
            check_sequences(model, tokens)
            check_prompts(tokenizer, prompts.prompts, model, max_new_tokens=prompts.max_new_tokens)
            if contents.plan is not None:
                _warn_of_known_text(tokens, text.text, contents.plan, tokenizer)
        # After the text, in which a mistake is found sooner.
        findings.append(_check_reload(folder, model, tokenizer))
    findings += about_contents
    broken = any(finding.health == "broken" for finding in findings)
    if model is None or tokenizer is None or tokens is None or broken:
        _log.info("text and prompts are left out, because the model is already known to be broken")
        return Diagnosis(str(folder), findings)
    dense = None if original is None else _load_base(load_base, name, dtype=model.dtype, **options)
    if dense is not None:
        dense.to(computing)
    findings.append(check_text(model, dense, tokens))
    samples: list[Sample] = []
    if prompts.prompts and findings[-1].health != "broken":
        finding, samples = check_generation(model, dense, tokenizer, prompts)
        findings.append(finding)
    protocol = {"text": text.text, "windows": tokens.shape[0], "length": tokens.shape[1]}
    return Diagnosis(str(folder), findings, samples, protocol)


def _warn_of_known_text(tokens: Tensor, scored: str, plan: RankPlan, tokenizer: PreTrainedTokenizerBase) -> None:
    """Warn of sequences to score that the plan was calibrated on; another source than the scored one is not read."""
    known = plan.origin.get("calibration")
    if known is None:
        return
    try:
        calibration = Calibration(known["text"], known["length"], known["windows"])
        places = [{(one.kind, one.name) for one in parse_mixture(text)} for text in (scored, calibration.text)]
        if places[0] & places[1]:
            warn_of_overlap(tokens, [calibration.tokens(tokenizer)], tokenizer, "sequences to score")
    except (OSError, ValueError) as error:
        _log.info("whether the plan was calibrated on this text is unknown (%s)", error)


def _load(folder: Path, device: torch.device, findings: list[Finding], *, trust: bool) -> _Contents | None:
    """Return what can be loaded from ``folder``, and add findings on it; None if the folder holds no model."""
    if not (folder / "config.json").is_file():
        files = ", ".join(sorted(file.name for file in folder.iterdir())[:8]) or "nothing"
        inside = (folder / "model" / "config.json").is_file()
        advice = f"give {folder / 'model'}" if inside else "give the folder of a model"
        findings.append(Finding("loads", "broken", f"the folder holds no config.json but {files}", {}, advice))
        return None
    config = _attempt("loads", lambda: AutoConfig.from_pretrained(folder, trust_remote_code=trust), findings)
    entries = None if config is None else _attempt("loads", lambda: _entries(config), findings)
    if config is None or entries is None:
        return None
    exported = bool(entries) or (folder / "plan.json").is_file()
    about_files = check_code(folder, trusted=trust), check_digests(folder, expected=exported)
    findings += [finding for finding in about_files if finding is not None]
    with unchecked():
        model = _attempt("loads", lambda: _load_model(folder, trust=trust), findings)
    tokenizer = _attempt("tokenizer", lambda: load_tokenizer(str(folder), trust_remote_code=trust), findings)
    if model is not None:
        # Outside of _attempt: a full device is not a defect of the model.
        model.to(device)
    plan = None
    if (folder / "plan.json").is_file():
        plan = _attempt("plan", lambda: RankPlan.load(folder / "plan.json"), findings)
    elif entries:
        missing = "there is no plan.json to compare ranks with"
        findings.append(Finding("plan", "warning", missing, {}, "export with the plan, or copy it into the folder"))
    tensors = _stored_tensors(folder) if model is None else tensors_of(model)
    return _Contents(config, entries, model, tokenizer, plan, tensors)


def _attempt(name: str, load: Callable[[], T], findings: list[Finding]) -> T | None:
    """Return the result of ``load``; if it fails, return None and add a finding on why."""
    try:
        return load()
    # The exceptions of transformers depend on the defect: an index without its map is a KeyError.
    except Exception as error:
        message = " ".join(str(error).split())
        if not isinstance(error, (ValueError, OSError, RuntimeError)):
            message = f"{type(error).__name__}: {message}"
        if "ignore_mismatched_sizes" in message:
            message = f"it holds {OTHER_SHAPES}"
        findings.append(Finding(name, "broken", message, {}, "copy the folder again or export it again"))
        return None


def _entries(config: PretrainedConfig) -> Mapping[str, Any]:
    """Return the config's entry of each low-rank module; empty for a plain model."""
    stored = getattr(config, "quantization_config", None) or {}
    if stored.get("quant_method") != METHOD:
        return {}
    entries: Mapping[str, Any] = LowRankConfig(**stored).modules
    return entries


def _load_model(folder: Path, *, trust: bool) -> PreTrainedModel:
    """Return the model in ``folder``, in the type in which it was saved."""
    if is_compressed(folder):
        return load_compressed(folder, trust_remote_code=trust)
    dtype = stored_dtype(str(folder), trust_remote_code=trust)
    model = load_base(str(folder), dtype=dtype, trust_remote_code=trust)
    # The fresh process aligns tensors too: their addresses affect the last bit of a matrix-vector product.
    align(model)
    return model


def _check_reload(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Finding:
    """Return whether a fresh process, with transformers alone, loads the same model from the folder."""
    try:
        merged = not is_compressed(folder)
        # The fresh process has the experts of a dense mixture as transformers keeps them.
        with experts_fused(model) if merged else nullcontext():
            compare_reload(model, folder, probe(model), tokenizer, merged=merged)
    except ReloadError as error:
        # The last line of a fresh process's output is its error.
        lines = str(error).strip().splitlines()
        if len(lines) > 1:
            advice = "--json has its whole output"
            return Finding("loads", "broken", f"{lines[0]} {lines[-1]}", {"told": str(error)}, advice)
        return Finding("loads", "broken", lines[0], {}, "export it again")
    message = "a fresh process loads it with transformers alone, to the same logits and without missing weights"
    return Finding("loads", "healthy", message)


def _stored_tensors(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of a folder that does not load; none if the files can't be read."""
    try:
        return tensors_in(folder)
    except SafetensorError as error:
        _log.info("the weight files can't be read: %s", error)
        return {}


def _check_contents(contents: _Contents, original: PreTrainedTokenizerBase | None) -> list[Finding]:
    """Return the findings on tensors, plan and tokenizer, which need no text."""
    findings: list[Finding] = []
    if contents.tensors:
        zero = () if contents.plan is None else contents.plan.zero_modules
        findings += check_weights(contents.tensors, contents.entries, zero)
    if contents.tensors and contents.plan is not None:
        findings += check_plan(contents.plan, contents.tensors, contents.entries)
        if not contents.entries and findings[-1].health != "broken":
            findings.append(check_merged_ranks(contents.plan, contents.tensors))
    if contents.tokenizer is not None:
        model, config = contents.model, contents.config.get_text_config()
        vocabulary = config.vocab_size if model is None else model.get_input_embeddings().num_embeddings
        known = None if contents.plan is None else contents.plan.fingerprint.get("tokenizer")
        findings += check_tokenizer(contents.tokenizer, config, vocabulary, fingerprint=known, base=original)
    return findings


def _load_base(load: Callable[..., T], name: str | None, *, required: bool, **options: Any) -> T | None:
    """Return what ``load`` returns for the base ``name``; None, with a warning, if only the plan names the base."""
    if name is None:
        return None
    try:
        return load(name, **options)
    except ValueError as error:
        if required:
            raise
        _log.warning("the model is not compared with its base, name it with --base: %s", error)
        return None
