"""What ``lowrank prune`` does: the same model with narrower MLPs, as a checkpoint like any other."""

from __future__ import annotations

from pathlib import Path

from lowrank_pl.calibration.build import statistics_of
from lowrank_pl.calibration.subject import Subject
from lowrank_pl.export.export import check_destination, save_compressed
from lowrank_pl.methods.prune.base import WidthPruning, apply_pruning, pruned_card
from lowrank_pl.models.base import Base, DType
from lowrank_pl.models.identity import Origin
from lowrank_pl.models.targets import find_targets, model_parameters, targeted_parameters
from lowrank_pl.text.sequences import Calibration
from lowrank_pl.utils.environment import pick_device
from lowrank_pl.utils.files import write_json

__all__ = ["prune"]


def prune(
    base: str,
    *,
    keep: float | None = None,
    share: float | None = None,
    output: Path = Path("prune"),
    text: str = "python-docs",
    length: int = 512,
    sequences: int = 256,
    dtype: DType = "float32",
    by_block: bool = False,
    multiple_of: int = 8,
    damping: float = 0.1,
    device: str = "auto",
    trust_remote_code: bool = False,
    json: Path | None = None,
) -> Path:
    """Leave out the hidden features of every MLP that the others can stand for; the result is an ordinary checkpoint.

    Which ones go, and how the MLP's last map makes up for them, is worked out in closed form from one pass over some
    text, forward and backward. All MLPs get the same width, so that plain transformers loads the folder without any
    code of ours. It is a base like any other: ranks can be learned or allocated on it, and ``--keep`` then counts the
    parameters that the first base had. ``lowrank fit --model.prune`` and ``lowrank compare`` do both in one.

    Args:
        base: Hub id, folder, .gguf file, package:NAME or random:FAMILY.
        keep: Fraction of the targeted parameters that ranks drawn on the result are to leave of the base; the width is
            the one that is predicted to lose least then. The result itself keeps more.
        share: Fraction of the hidden features to keep instead.
        output: Folder of the narrowed model, checked by a reload in a fresh process.
        text: Calibration text: file, glob, hub dataset or python-docs.
        length: Tokens of a calibration sequence.
        sequences: How many sequences.
        dtype: Type to load the base in; the result has it too.
        by_block: Let each MLP have the width that is best for it; the folder is no plain checkpoint then: it loads like
            exports of factors, and ranks can be drawn on it likewise.
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
    if keep is not None and not 0 < keep < 1:
        raise ValueError(f"keep is {keep}: expected a fraction above 0 and below 1")
    settings = WidthPruning(by_block, share, multiple_of, damping)
    check_destination(output)
    subject = Subject.load(
        Base(base, dtype, trust_remote_code), Calibration(text, length, sequences), device=pick_device(device)
    )
    model, tokenizer = subject.model, subject.tokenizer
    found = apply_pruning(model, subject.targets, statistics_of(subject), settings, base=base, keep=keep)
    for width, loss in sorted(found.tried.items()):
        print(f"{width} hidden features, ranks to keep {keep}: predicted loss {loss:.4f} nats a token")
    origin = Origin.of(model)
    if found.by_block is not None:
        print(f"widths by block, ranks to keep {keep}: predicted loss {found.by_block:.4f} nats a token")
    if origin is None or not found.any_pruned:
        raise ValueError(
            f"at keep {keep} no narrower MLPs are predicted to lose less: allocate ranks on {base!r} itself"
        )
    report = save_compressed(model, output, tokenizer=tokenizer, merge=found.one_width, card=pruned_card(origin))
    targets, parameters = find_targets(model), model_parameters(model)
    figures = {
        "base": base,
        "width": {"before": found.before, "after": found.widths[0] if found.one_width else list(found.widths)},
        "predicted_nats": found.nats,
        "predicted_nats_with_ranks": {str(width): loss for width, loss in sorted(found.tried.items())},
        "predicted_nats_by_block": found.by_block,
        "parameters": {
            "targeted": {"dense": origin.targeted, "kept": targeted_parameters(targets)},
            "model": {"dense": origin.parameters, "kept": parameters},
        },
        "bytes": report.bytes,
    }
    print(
        f"pruned MLPs from {found.before:,} to {origin.widths} hidden neurons: "
        f"{origin.remaining(targets, parameters)} are left\npredicted loss {found.nats:.4f} nats a token\n"
        f"keep of plans on it counts what {origin.base} had\nmodel  {report.directory}"
    )
    if json is not None:
        write_json(json, figures)
    return report.directory
