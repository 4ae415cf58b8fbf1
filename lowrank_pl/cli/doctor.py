"""What ``lowrank doctor`` does: says of a folder whether the model in it is healthy; a plain typed function."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lowrank_pl.export.health.diagnosis import Diagnosis
from lowrank_pl.export.health.examine import diagnose
from lowrank_pl.export.health.quality import PROMPTS
from lowrank_pl.utils.files import write_json

__all__ = ["BrokenModelError", "doctor"]


class BrokenModelError(RuntimeError):
    """A model that must not be used, as ``lowrank doctor`` found; the message says of what it is sick."""


def doctor(
    directory: Path,
    *,
    base: str | None = None,
    text: str = "python-docs",
    sequences: int = 8,
    length: int = 512,
    prompts: Sequence[str] = PROMPTS,
    max_new_tokens: int = 64,
    device: str = "auto",
    trust_remote_code: bool = False,
    json: Path | None = None,
) -> Diagnosis:
    """Say whether an exported model is healthy; the exit status is 0 if so, warnings or not, and 1 if it is sick.

    It reloads in a fresh process without missing weights; all tensors are finite; ranks, shapes, storage and counts
    are those of its plan; tokenizer and BOS are the base's; on a text it is compared with the base: perplexity, KL
    divergence, agreement; and it continues prompts, through the chat template where there is one. A plain checkpoint
    is examined as far as that goes.

    Args:
        directory: Folder of an export, as factors or merged, or of a plain checkpoint.
        base: The dense model to compare with; by default the one that the folder's plan names.
        text: Text to score on: file, glob, hub dataset or python-docs.
        sequences: How many sequences of it.
        length: Tokens of a sequence.
        prompts: Texts to continue, or questions where there is a chat template; none leaves this out.
        max_new_tokens: How far.
        device: cpu, cuda, ...; auto takes cuda where there is one.
        trust_remote_code: Run Python code that comes with the model or its base.
        json: Write the figures there.

    Returns:
        The findings.

    Raises:
        BrokenModelError: The model is sick; the findings have been shown.
    """
    found = diagnose(
        directory, base=base, text=text, sequences=sequences, length=length, prompts=prompts,
        max_new_tokens=max_new_tokens, device=device, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    if json is not None:
        write_json(json, found.to_dict())
    print(found.text())
    if found.health == "sick":
        raise BrokenModelError(found.sentence())
    print(f"\n{found.sentence()}")
    return found
