"""Checks of a model's tokenizer: its ids, its BOS rule with and without the chat template, and its origin."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from lowrank_pl.export.health.diagnosis import Finding
from lowrank_pl.export.reload_probe import PROBE_TEXT
from lowrank_pl.text.sequences import tokenizer_fingerprint, uses_bos

__all__ = ["check_tokenizer"]

SPECIAL = ("bos", "eos", "pad", "unk")
CHAT = [{"role": "user", "content": PROBE_TEXT}]


def check_tokenizer(
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
    vocabulary: int,
    *,
    fingerprint: str | None = None,
    base: PreTrainedTokenizerBase | None = None,
) -> list[Finding]:
    """Return the findings on the tokenizer of a model.

    Args:
        tokenizer: The tokenizer.
        config: The configuration of the model.
        vocabulary: Number of rows of the model's embedding.
        fingerprint: Fingerprint of the tokenizer that the model was calibrated with, if known.
        base: The tokenizer of the base, if available; if fingerprints differ, its behaviour decides.
    """
    findings = [_ids(tokenizer, config, vocabulary), _bos(tokenizer, config)]
    if fingerprint is not None or base is not None:
        findings.append(_same(tokenizer, fingerprint, base))
    return findings


def _ids(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, vocabulary: int) -> Finding:
    """Return whether all ids are rows of the embedding; the ids of a plain text must be, all others should be."""
    special = dict(_special_ids(tokenizer, config))
    outside = {name: token for name, token in special.items() if not 0 <= token < vocabulary}
    highest = max(tokenizer.get_vocab().values(), default=0)
    figures = {"vocabulary": vocabulary, "highest_id": highest, "special": special, "outside": outside}
    used = max(tokenizer(PROBE_TEXT)["input_ids"], default=0)
    if used >= vocabulary:
        message = f"a plain text has the token {used}, but the model knows 0 to {vocabulary - 1}"
        return Finding("token ids", "broken", message, figures, "the tokenizer is another model's: put back the base's")
    if outside or highest >= vocabulary:
        problems = [f"{name} is {token}" for name, token in outside.items()]
        problems += [f"the highest id is {highest}"] if highest >= vocabulary else []
        message = f"the model knows the tokens 0 to {vocabulary - 1}, but {', '.join(problems)}"
        return Finding("token ids", "warning", message, figures, "check whether the base has the same ids")
    return Finding("token ids", "healthy", f"all are below the model's {vocabulary:,}", figures)


def _special_ids(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> Iterator[tuple[str, int]]:
    """Yield the special ids of the tokenizer and of the config by name; several ids of a kind are numbered."""
    text = config.get_text_config()
    for owner, named in (("tokenizer", tokenizer), ("config", text)):
        for kind in SPECIAL:
            ids = getattr(named, f"{kind}_token_id", None)
            for number, token in enumerate(ids if isinstance(ids, list) else [ids]):
                if token is not None:
                    yield f"{owner} {kind}{number or ''}", token


def _bos(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> Finding:
    """Return whether texts and chats begin with the right number of BOS tokens."""
    own, expected = tokenizer.bos_token_id, getattr(config.get_text_config(), "bos_token_id", None)
    adds = uses_bos(tokenizer)
    figures: dict[str, Any] = {"bos": own, "config_bos": expected, "added_to_text": adds}
    if own is not None and expected is not None and own != expected:
        message = f"the tokenizer's BOS is {own}, the config's {expected}"
        return Finding("BOS", "warning", message, figures, "set both to the base's")
    rule = f"BOS ({own}) is put before every text" if adds else "no BOS is put before texts"
    if not tokenizer.chat_template:
        return Finding("BOS", "healthy", f"{rule}; there is no chat template", figures)
    try:
        chat = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
        text = str(tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False))
    # A template runs code of its own, which may fail in its own way; without a default one there is none to run.
    except (TemplateError, ValueError, TypeError) as error:
        message = f"the chat template rejects a single user message: {error}"
        return Finding("BOS", "warning", message, figures, "compare it with the base's template")
    figures |= {"in_chats": _leading(chat, own), "in_chats_as_text": _leading(tokenizer(text)["input_ids"], own)}
    if figures["in_chats"] > 1:
        advice = "remove it from the template: models are trained with one"
        return Finding("BOS", "warning", f"a chat begins with {figures['in_chats']} BOS", figures, advice)
    if adds and not figures["in_chats"]:
        message = f"{rule}, but not before chats"
        return Finding("BOS", "warning", message, figures, "check whether the base's template has none either")
    advice = "; tokenize chats that are written as text with add_special_tokens=False, to avoid two BOS"
    two = advice if figures["in_chats_as_text"] > 1 else ""
    return Finding("BOS", "healthy", f"{rule}, {figures['in_chats'] or 'none'} before chats{two}", figures)


def _leading(tokens: list[int], bos: int | None) -> int:
    """Return the number of BOS tokens at the head of ``tokens``."""
    if bos is None:
        return 0
    return next((place for place, token in enumerate(tokens) if token != bos), len(tokens))


def _same(tokenizer: PreTrainedTokenizerBase, fingerprint: str | None, base: PreTrainedTokenizerBase | None) -> Finding:
    """Return whether the tokenizer is the one that the model was calibrated with, or behaves like the base's."""
    own = tokenizer_fingerprint(tokenizer)
    figures: dict[str, Any] = {"fingerprint": own, "calibrated_with": fingerprint}
    if own == fingerprint:
        return Finding("tokenizer", "healthy", "it is the one that the model was calibrated with", figures)
    if base is None:
        message = "it is not, byte for byte, the one that the model was calibrated with"
        return Finding("tokenizer", "warning", message, figures, "compare it with the base's: give --base")
    ours, theirs = _behaviour(tokenizer), _behaviour(base)
    differing = [name for name in ours if ours[name] != theirs[name]]
    figures["differ"] = differing
    if differing:
        message = f"it is not the base's: they differ in {', '.join(differing)}"
        advice = "put the base's tokenizer into the folder, or export again"
        return Finding("tokenizer", "broken", message, figures, advice)
    return Finding("tokenizer", "healthy", "it makes the same tokens as the base's", figures)


def _behaviour(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the tokenizer's vocabulary, its output for a text, and its special tokens, by name for a message."""
    return {
        "vocabulary": tokenizer.get_vocab(),
        "tokens of a text": tokenizer(PROBE_TEXT, add_special_tokens=False)["input_ids"],
        "special tokens around a text": tokenizer(PROBE_TEXT)["input_ids"],
        "special ids": {kind: getattr(tokenizer, f"{kind}_token_id") for kind in SPECIAL},
        "chat template": tokenizer.chat_template,
    }
