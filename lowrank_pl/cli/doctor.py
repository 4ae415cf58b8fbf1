"""``lowrank doctor``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lowrank_pl.text.settings import Calibration
from lowrank_pl.utils.files import check_output_files
from lowrank_pl.utils.json_files import write_figures

if TYPE_CHECKING:
    from lowrank_pl.export.health.diagnosis import Diagnosis

__all__ = ["BrokenModelError", "doctor"]


class BrokenModelError(RuntimeError):
    """A model that must not be used, as ``lowrank doctor`` found; the message names the first defect."""


def doctor(
    directory: Path,
    *,
    base: str | None = None,
    text: str = "python-docs::part=50%-100%",
    sequences: int = 8,
    length: int = 512,
    prompts: Sequence[str] | None = None,
    max_new_tokens: int = 64,
    device: str = "auto",
    trust_remote_code: bool = False,
    json: Path | None = None,
) -> Diagnosis:
    """Examine an exported model; the exit status is 0 if it is healthy, with or without warnings, and 1 if broken.

    A healthy model reloads in a fresh process without missing weights. All tensors are finite. Ranks, shapes, storage
    and counts are those of its plan, tokenizer and BOS are the base's. On a text, it is compared with the base by
    perplexity, KL divergence and agreement. It continues prompts, through the chat template if there is one. For a
    plain checkpoint, checks that need a plan are left out.

    Args:
        directory: Folder of an export, as factors or merged, or of a plain checkpoint.
        base: The dense model to compare with; by default the one that the folder's plan names.
        text: Text to score on: file, folder, glob, hub dataset or python-docs.
        sequences: How many sequences of the text.
        length: Tokens of a sequence.
        prompts: Texts to continue, or questions where there is a chat template; by default three. Without a text behind
            it, --prompts continues none.
        max_new_tokens: How many tokens each prompt is continued by.
        device: cpu, cuda, ...; auto takes cuda where there is one.
        trust_remote_code: Run Python code that comes with the model or its base.
        json: Write the figures there.

    Returns:
        The findings.

    Raises:
        BrokenModelError: The model is broken; the findings have been shown.
    """
    from lowrank_pl.export.health.examine import diagnose
    from lowrank_pl.export.health.quality import PROMPTS, Prompts
    from lowrank_pl.models.base import model_files
    from lowrank_pl.text.sources import text_files

    check_output_files(json, inputs=[*model_files(directory), *text_files(text)])
    found = diagnose(
        directory,
        base=base,
        text=Calibration(text, length, sequences),
        prompts=Prompts(PROMPTS if prompts is None else prompts, max_new_tokens),
        device=device,
        trust_remote_code=trust_remote_code,
    )
    if json is not None:
        write_figures(json, found.to_dict())
    print(found.text())
    if found.health == "broken":
        raise BrokenModelError(found.sentence())
    print(f"\n{found.sentence()}")
    return found
