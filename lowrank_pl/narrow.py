"""What ``lowrank narrow`` does: the same model with narrower MLPs, as a checkpoint like any other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lowrank_pl.base_model import load_base, load_tokenizer
from lowrank_pl.commands import DType, pick_device
from lowrank_pl.decompose import SquareRoot
from lowrank_pl.decomposition import Decomposition, Roots
from lowrank_pl.export import check_destination, save_compressed
from lowrank_pl.files import write_json
from lowrank_pl.narrowing import Origin, find_hidden, narrow_model, narrowed_config
from lowrank_pl.plan_report import percent
from lowrank_pl.prepare import check_finite, model_parameters, statistics_of, targeted_parameters
from lowrank_pl.targets import Target, find_targets
from lowrank_pl.width import predicted_losses
from lowrank_pl.windows import token_windows

__all__ = ["narrow"]

_STEPS = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.4, 0.3)
"""Shares of the hidden features that are tried."""


def narrow(
    base: str,
    *,
    keep: float | None = None,
    share: float | None = None,
    output: Path = Path("narrow"),
    text: str = "python-docs",
    length: int = 512,
    windows: int = 256,
    dtype: DType = "float32",
    multiple_of: int = 8,
    damping: float = 0.01,
    device: str = "auto",
    trust_remote_code: bool = False,
    json: Path | None = None,
) -> Path:
    """Leave out the hidden features of every MLP that the others can stand for; the result is an ordinary checkpoint.

    Which ones go, and how the MLP's last map makes up for them, is worked out in closed form from one pass over some
    text, forward and backward. All MLPs get the same width, so that plain transformers loads the folder without any
    code of ours. It is a base like any other: ranks can be learned or allocated on it.

    Args:
        base: Hub id, folder, .gguf file, package:NAME or random:FAMILY.
        keep: Fraction of the targeted parameters that ranks drawn on the result are to leave of the base; the width is
            the one that is predicted to lose least then. The result itself keeps more.
        share: Fraction of the hidden features to keep instead.
        output: Folder of the narrowed model, checked by a reload in a fresh process.
        text: Calibration text: file, glob, hub dataset or python-docs.
        length: Tokens of a calibration window.
        windows: How many windows.
        dtype: Type to load the base in; the result has it too.
        multiple_of: The width is a multiple of this.
        damping: Ridge of the change that makes up for what is left out; more trusts the text less.
        device: cpu, cuda, ...; auto takes cuda where there is one.
        trust_remote_code: Run Python code that comes with the base.
        json: Write the figures there.

    Returns:
        The folder.
    """
    if (keep is None) == (share is None):
        raise ValueError("give one of keep, the size that is wanted in the end, and share, of the hidden features")
    for name, part in (("keep", keep), ("share", share)):
        if part is not None and not 0 < part < 1:
            raise ValueError(f"{name} is {part}: expected a fraction above 0 and below 1")
    if multiple_of < 1:
        raise ValueError(f"multiple_of is {multiple_of}: expected a whole number of at least 1")
    model = load_base(base, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code).to(pick_device(device))
    tokenizer = load_tokenizer(base, trust_remote_code=trust_remote_code)
    targets = find_targets(model)
    hidden = find_hidden(model, targets)
    present = hidden[0].width
    origin = Origin.of(model) or Origin(base, targeted_parameters(targets), model_parameters(model), present)
    widths = _widths(present, _STEPS if share is None else (share,), multiple_of)
    # Before anything is measured.
    narrowed_config(model, hidden, widths[0])
    check_destination(output)
    # What the width is chosen by are the spectra of all maps.
    measured = tuple(mlp.reader for mlp in hidden) if keep is None else targets.modules
    check_finite(model, measured)
    tokens = token_windows(text, tokenizer, length=length, windows=windows)
    roots = Roots(Decomposition("two_sided"), statistics_of(model, tokens, tokenizer), measured, model.device)
    tried: dict[int, float] = {}
    if keep is not None:
        limit = int(keep * origin.targeted)
        tried = predicted_losses(model, targets, hidden, roots, limit, [present, *widths], damping=damping)
        for one, loss in sorted(tried.items()):
            print(f"{one} hidden features, ranks to keep {keep}: predicted loss {loss:.4f} nats a token")
    # Of equals the widest.
    width = min(sorted(tried, reverse=True), key=tried.__getitem__) if tried else widths[0]
    if width == present:
        raise ValueError(f"at keep {keep} no narrower MLPs are predicted to lose less: draw ranks on {base!r} itself")

    def weights(reader: Target) -> tuple[Tensor, SquareRoot]:
        moment, outputs = roots.moment_of_inputs(reader), roots.of_outputs(reader.name)
        assert moment is not None
        assert outputs is not None
        return moment, outputs

    nats = narrow_model(model, hidden, width, weights, damping=damping)
    origin.write(model)
    report = save_compressed(model, output, tokenizer=tokenizer, merge=True, card=_card(origin, width))
    targeted, parameters = targeted_parameters(find_targets(model)), model_parameters(model)
    figures = {
        "base": base,
        "width": {"before": present, "after": width},
        "predicted_nats": nats,
        "predicted_nats_with_ranks": {str(one): loss for one, loss in sorted(tried.items())},
        "parameters": {
            "targeted": {"dense": origin.targeted, "kept": targeted},
            "model": {"dense": origin.parameters, "kept": parameters},
        },
        "bytes": report.bytes,
    }
    print(
        f"narrowed MLPs from {present} to {width} hidden features: {origin.left(targeted, parameters)} are left\n"
        f"predicted loss {nats:.4f} nats a token\n"
        f"plans on it count what is left: {_keeps(keep, targeted / origin.targeted)}\n"
        f"model  {report.directory}"
    )
    if json is not None:
        write_json(json, figures)
    return report.directory


def _widths(present: int, shares: Sequence[float], multiple_of: int) -> list[int]:
    """Return the widths below ``present`` that ``shares`` of it come to, at least one."""
    widths = {max(1, int(share * present / multiple_of + 0.5)) * multiple_of for share in shares}
    narrower = sorted(width for width in widths if width < present)
    if not narrower:
        raise ValueError(
            f"of {present} hidden features none would be left out at a share of {', '.join(map(str, shares))}, in "
            f"multiples of {multiple_of}: lower one of both"
        )
    return narrower


def _keeps(keep: float | None, left: float) -> str:
    """Return what to ask for of the result to keep ``keep`` of its base."""
    if keep is None:
        return f"--keep 0.9 keeps {percent(0.9 * left)} of the base's"
    return f"--keep {math.floor(1e4 * keep / left) / 1e4} keeps {percent(keep)} of the base's"


def _card(origin: Origin, width: int) -> str:
    return (
        f"---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- lowrank_pl\n---\n\n"
        f"# {origin.base.rstrip('/').rsplit('/', 1)[-1]} with narrower MLPs\n\n"
        f"`{origin.base}` narrowed with `lowrank narrow`: of {origin.width} hidden features {width} are left in every "
        "MLP, whose last map makes up for the others in closed form. Nothing was fine-tuned. It loads like its base.\n"
    )
