"""The check that a folder reloads as exactly the model in memory: the half that runs beside that model.

The other half is reload_check.py, in a fresh process. What is special: logits are compared by the hash of their
bytes, so a lost bias, a cast buffer or a transposed square matrix can't hide in a tolerance. Only on a GPU, whose
libraries promise no such thing from process to process, is there one, and there every tensor has to be the same.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from lowrank_pl.export import reload_probe as reload_check
from lowrank_pl.export.health.tokenizer import check_tokenizer
from lowrank_pl.export.health.weights import check_plan, check_weights, tensors_of
from lowrank_pl.models.identity import base_class
from lowrank_pl.plans.plan import RankPlan

__all__ = [
    "ExportError",
    "ReloadError",
    "check_contents",
    "check_merged",
    "check_reload",
    "compare_reload",
    "logits_of",
]

_log = logging.getLogger(__name__)

_HOOKS = "are there hooks or patched methods on the model?"


class ExportError(RuntimeError):
    """An export that could not be written or did not reload as the model in memory; its folder is gone."""


class ReloadError(RuntimeError):
    """A folder that a fresh process does not load as the model in memory."""


def logits_of(model: PreTrainedModel) -> Tensor:
    """Return the probes' logits in eval mode, every module's mode as before afterwards.

    Raises:
        ExportError: They hold NaN, which would compare equal to any other broken model's.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        logits = reload_check.probe(model)
    finally:
        for module, mode in modes:
            module.training = mode
    if logits.isnan().any():
        raise ExportError("nothing was exported: the model here gives logits that are NaN; look at its factors")
    return logits


def check_contents(
    model: PreTrainedModel, entries: Mapping[str, Any], plan: RankPlan | None, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Raise if ``lowrank doctor`` would find what was written sick, and log what it would warn of.

    Nothing is loaded: the reload shows that the folder holds the very same tensors.

    Args:
        model: The model that was written.
        entries: What its config says of each low-rank module; none of a merged one.
        plan: The plan beside it.
        tokenizer: Its tokenizer.
    """
    tensors = tensors_of(model)
    findings = check_weights(tensors, entries)
    if plan is not None:
        findings += check_plan(plan, tensors, entries)
    known = None if plan is None else plan.fingerprint.get("tokenizer")
    vocabulary = model.get_input_embeddings().num_embeddings
    findings += check_tokenizer(tokenizer, model.config, vocabulary, fingerprint=known)
    for finding in findings:
        if finding.health == "sick":
            raise ExportError(f"the export was removed: {finding.name}: {finding.said}")
        if finding.health == "warning":
            _log.warning("%s: %s", finding.name, finding.sentence)


def check_merged(low_rank: Tensor, merged: Tensor) -> None:
    """Raise unless the merged model computes what the low-rank one does, up to rounding."""
    tolerance = torch.finfo(merged.dtype).eps ** 0.5
    error = _relative_error(low_rank, merged)
    if not error <= tolerance:
        raise ExportError(
            f"the merged weights give logits that are off by {error:.2g} (relative root mean square, "
            f"{tolerance:.2g} allowed in {merged.dtype}): the factors' product does not fit the type; export in float32"
        )


def check_reload(
    model: PreTrainedModel, folder: Path, reference: Tensor, tokenizer: PreTrainedTokenizerBase, *, merged: bool
) -> None:
    """Raise ``ExportError`` unless a fresh process gets the very same logits and tokens out of ``folder``."""
    try:
        compare_reload(model, folder, reference, tokenizer, merged=merged)
    except ReloadError as error:
        raise ExportError(f"the export was removed: {error}") from error


def compare_reload(
    model: PreTrainedModel, folder: Path, reference: Tensor, tokenizer: PreTrainedTokenizerBase, *, merged: bool
) -> None:
    """Load ``folder`` in a fresh process, and compare what it computes there with the model here.

    Args:
        model: What the folder should reload as.
        folder: The folder.
        reference: The logits of ``model`` on the probes, ``[33, vocabulary]``.
        tokenizer: What the folder's tokenizer should reload as.
        merged: Whether the folder holds dense weights under a plain config.

    Raises:
        ReloadError: It can't be loaded there, misses weights or has others, or logits or tokens differ.
    """
    with TemporaryDirectory() as aside:
        file = Path(aside) / "logits.pt"
        answer = _ask_fresh_process(model, folder, file, compressed=not merged)
        found = torch.load(file) if file.exists() else None
    for kind in ("missing", "unexpected"):
        if answer[kind]:
            raise ReloadError(f"reloading it finds {kind} weights: {', '.join(answer[kind])}")
    if answer["logits"] != reload_check.digest(reference):
        difference = _first_difference(model, folder)
        if difference is not None or model.device.type == "cpu" or found is None:
            difference = difference or f"all weights are equal, the computation is not: {_HOOKS}"
            raise ReloadError(f"reloaded, it gives other logits than the model here: {difference}")
        _check_rounding(reference, found)
    if answer["token_ids"] != tokenizer(reload_check.PROBE_TEXT)["input_ids"]:
        raise ReloadError("the reloaded tokenizer gives other token ids than the one here")
    if answer["chat_template"] != tokenizer.chat_template:
        raise ReloadError("the reloaded tokenizer has another chat template than the one here")


def _check_rounding(reference: Tensor, found: Tensor) -> None:
    """Raise unless the logits of equal weights differ by no more than other kernels' rounding."""
    error = _relative_error(reference, found)
    if not error <= torch.finfo(reference.dtype).eps ** 0.5:
        raise ReloadError(
            f"reloaded, all weights are equal, and the logits are off by {error:.2g} (relative root mean square): "
            f"{_HOOKS}"
        )
    _log.info("reloaded on the GPU, all weights are equal, and logits are but for rounding (%.2g)", error)


def _relative_error(exact: Tensor, other: Tensor) -> float:
    return float((other.double() - exact.double()).norm() / exact.double().norm())


def _ask_fresh_process(model: PreTrainedModel, folder: Path, logits: Path, *, compressed: bool) -> dict[str, Any]:
    """Return what reload_check.py finds in ``folder``; the logits themselves go into the file ``logits``."""
    device = str(model.device)
    request = {
        "directory": str(folder.resolve()),
        "logits": str(logits),
        "compressed": compressed,
        "trust": base_class(model) is None,
        "attention": model.config._attn_implementation,
        "device_map": getattr(model, "hf_device_map", None) or (None if device == "cpu" else {"": device}),
        "threads": torch.get_num_threads(),
        "precision": torch.get_float32_matmul_precision(),
    }
    # Its text, not the module: `-m` would import lowrank_pl. -B: no __pycache__ in the export.
    source = Path(reload_check.__file__).read_text(encoding="utf-8")
    command = [sys.executable, "-B", "-c", source, json.dumps(request)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    # In the folder, so that no file of the caller's own folder hides a package from the child.
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)
    if done.returncode:
        raise ReloadError(
            f"a fresh process can't load it (exit status {done.returncode}):\n{done.stderr.strip()[-2000:]}"
        )
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


def _first_difference(model: PreTrainedModel, folder: Path) -> str | None:
    """Return the first tensor of the reloaded model that isn't what the model here holds, if there is one."""
    attention = model.config._attn_implementation
    trust = base_class(model) is None
    reloaded = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention, trust_remote_code=trust)
    there = dict(reloaded.named_parameters()) | dict(reloaded.named_buffers())
    for name, here in [*model.named_parameters(), *model.named_buffers()]:
        other = there[name].to(here.device)
        if here.dtype != other.dtype:
            hint = "; load the base with dtype=, never convert a model by .to()" if "inv_freq" in name else ""
            return f"{name} is {here.dtype} here and {other.dtype} reloaded{hint}"
        if not torch.equal(here, other):
            return f"{name} differs"
    return None
