"""The check that a folder reloads as exactly the model in memory: the part that runs in the exporting process.

The other part is reload_probe.py, in a fresh process. Logits are compared by the hash of their bytes, so that no
tolerance hides a lost bias, a cast buffer or a transposed square matrix. Only on a GPU is there a tolerance, because
its libraries may compute differently in another process; there, every tensor has to be the same.
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

from lowrank_pl.export import reload_probe
from lowrank_pl.export.health.tokenizer import check_tokenizer
from lowrank_pl.export.health.weights import check_plan, check_weights, tensors_of
from lowrank_pl.models import hf_format
from lowrank_pl.models.digests import unchecked
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

_HOOKS = "look for hooks or patched methods on the model"


class ExportError(RuntimeError):
    """An export failed, or did not reload as the model in memory; its folder was removed."""


class ReloadError(RuntimeError):
    """A fresh process did not load the model in memory from a folder."""


def logits_of(model: PreTrainedModel) -> Tensor:
    """Return the logits of the probes in eval mode, and restore every module's mode.

    Raises:
        ExportError: The logits hold NaN, which would compare equal to those of any other broken model.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        logits = reload_probe.probe(model)
    finally:
        for module, mode in modes:
            module.training = mode
    if logits.isnan().any():
        raise ExportError("nothing was exported: the logits of the model in memory are NaN; check its factors")
    return logits


def check_contents(
    model: PreTrainedModel, entries: Mapping[str, Any], plan: RankPlan | None, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Raise ``ExportError`` if ``lowrank doctor`` would find the model broken, and log its warnings.

    The model in memory is checked: the reload shows that the folder holds the same tensors.

    Args:
        model: The exported model.
        entries: The config's entry of each low-rank module; empty for a merged model.
        plan: The exported plan.
        tokenizer: The exported tokenizer.
    """
    tensors = tensors_of(model)
    findings = check_weights(tensors, entries, () if plan is None else plan.zero_modules)
    if plan is not None:
        findings += check_plan(plan, tensors, entries)
    known = None if plan is None else plan.fingerprint.get("tokenizer")
    vocabulary = model.get_input_embeddings().num_embeddings
    findings += check_tokenizer(tokenizer, model.config, vocabulary, fingerprint=known)
    for finding in findings:
        if finding.health == "broken":
            raise ExportError(f"the export was removed: {finding.name}: {finding.message}")
        if finding.health == "warning":
            _log.warning("%s: %s", finding.name, finding.sentence)


def check_merged(low_rank: Tensor, merged: Tensor) -> None:
    """Raise ``ExportError`` unless the logits of the merged model are those of the low-rank one, up to rounding."""
    tolerance = torch.finfo(merged.dtype).eps ** 0.5
    error = _relative_error(low_rank, merged)
    if not error <= tolerance:
        raise ExportError(
            f"the logits of the merged weights differ by {error:.2g} (relative root mean square, {tolerance:.2g} "
            f"allowed in {merged.dtype}): the factors' product does not fit the type; export in float32"
        )


def check_reload(
    model: PreTrainedModel, folder: Path, reference: Tensor, tokenizer: PreTrainedTokenizerBase, *, merged: bool
) -> None:
    """Raise ``ExportError`` unless a fresh process computes the same logits and tokens from ``folder``."""
    try:
        compare_reload(model, folder, reference, tokenizer, merged=merged)
    except ReloadError as error:
        raise ExportError(f"the export was removed: {error}") from error


def compare_reload(
    model: PreTrainedModel, folder: Path, reference: Tensor, tokenizer: PreTrainedTokenizerBase, *, merged: bool
) -> None:
    """Load ``folder`` in a fresh process, and compare the result with the model in memory.

    Args:
        model: The model that the folder should hold.
        folder: The folder.
        reference: Logits of ``model`` on the probes, ``[33, vocabulary]``.
        tokenizer: The tokenizer that the folder should hold.
        merged: Whether the folder holds dense weights with a plain config.

    Raises:
        ReloadError: The folder can't be loaded, weights are missing or unexpected, or logits or tokens differ.
    """
    with TemporaryDirectory() as aside:
        file = Path(aside) / "logits.pt"
        answer = _ask_fresh_process(model, folder, file, tokenizer=tokenizer, compressed=not merged)
        found = torch.load(file, weights_only=True) if file.exists() else None
    for kind in ("missing", "unexpected"):
        if answer[kind]:
            raise ReloadError(f"reloading it finds {kind} weights: {', '.join(answer[kind])}")
    if answer["logits"] != reload_probe.digest(reference):
        difference = _first_difference(model, folder)
        if difference is not None or model.device.type == "cpu" or found is None:
            difference = difference or f"all weights are equal, but the computation differs: {_HOOKS}"
            raise ReloadError(f"the reloaded model has other logits than the model in memory: {difference}")
        _check_rounding(reference, found)
    if answer["token_ids"] != tokenizer(reload_probe.PROBE_TEXT)["input_ids"]:
        raise ReloadError("the reloaded tokenizer gives other token ids than the one in memory")
    if answer["chat_template"] != tokenizer.chat_template:
        raise ReloadError("the reloaded tokenizer has another chat template than the one in memory")


def _check_rounding(reference: Tensor, found: Tensor) -> None:
    """Raise ``ReloadError`` unless the logits of equal weights differ only by the rounding of other kernels."""
    error = _relative_error(reference, found)
    if not error <= torch.finfo(reference.dtype).eps ** 0.5:
        raise ReloadError(
            f"all reloaded weights are equal, but the logits differ by {error:.2g} (relative root mean square): "
            f"{_HOOKS}"
        )
    _log.info("reloaded on the GPU: all weights are equal, and the logits up to rounding (%.2g)", error)


def _relative_error(exact: Tensor, other: Tensor) -> float:
    return float((other.double() - exact.double()).norm() / exact.double().norm())


def _ask_fresh_process(
    model: PreTrainedModel, folder: Path, logits: Path, *, tokenizer: PreTrainedTokenizerBase, compressed: bool
) -> dict[str, Any]:
    """Return the answer of reload_probe.py on ``folder``; the logits themselves go into the file ``logits``."""
    device, own_code = str(model.device), base_class(model) is None
    request = {
        "parent": os.getpid(),
        "directory": str(folder.resolve()),
        # They are needed where they may differ in rounding; elsewhere $TMPDIR may be full.
        "logits": None if device == "cpu" else str(logits),
        # The package's own files, never the copies in the folder, which may come from anybody.
        "code": str(Path(hf_format.__file__).parent) if compressed else None,
        "trust": own_code,
        # Only code that runs here already: what the files name may be code that nobody trusts.
        "trust_tokenizer": own_code or tokenizer._auto_class is not None,
        "attention": model.config._attn_implementation,
        "device_map": getattr(model, "hf_device_map", None) or (None if device == "cpu" else {"": device}),
        "threads": torch.get_num_threads(),
        "precision": torch.get_float32_matmul_precision(),
    }
    # The source, not the module: `-m` would import lowrank_pl. -B: no __pycache__ in the export.
    source = Path(reload_probe.__file__).read_text(encoding="utf-8")
    command = [sys.executable, "-B", "-c", source, json.dumps(request)]
    # What the folder computes is to be known even if its digests are wrong.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "LOWRANK_VERIFY": "0"}
    # With -c, Python looks for modules in the current folder first: the child's is private and empty. -I would also
    # hide packages that are installed per user or found by PYTHONPATH.
    done = subprocess.run(command, capture_output=True, text=True, cwd=logits.parent, env=environment, check=False)
    if done.returncode:
        said = done.stderr.strip()[-2000:]
        if done.returncode < 0:
            said += f"\nsignal {-done.returncode} ended it, as when memory runs out: a check takes as much as the model"
        raise ReloadError(f"a fresh process can't load it (exit status {done.returncode}):\n{said.strip()}")
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


def _first_difference(model: PreTrainedModel, folder: Path) -> str | None:
    """Return in words the first tensor that differs between the model in memory and the reloaded one, or None."""
    attention = model.config._attn_implementation
    trust = base_class(model) is None
    with unchecked():
        reloaded = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention, trust_remote_code=trust)
    there = dict(reloaded.named_parameters()) | dict(reloaded.named_buffers())
    for name, here in [*model.named_parameters(), *model.named_buffers()]:
        other = there[name].to(here.device)
        if here.dtype != other.dtype:
            hint = "; load the base with dtype=, never convert a model by .to()" if "inv_freq" in name else ""
            return f"{name} is {here.dtype} in memory and {other.dtype} reloaded{hint}"
        if not torch.equal(here, other):
            return f"{name} differs"
    return None
