"""``lowrank prune``."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

from lowrank_pl.cli.parameters import Flat
from lowrank_pl.methods.prune.settings import LLMPruner, WidthPruning
from lowrank_pl.models.settings import EMBEDDINGS, Base
from lowrank_pl.plans.constraints import Constraints
from lowrank_pl.text.settings import Calibration
from lowrank_pl.utils.files import check_output_files
from lowrank_pl.utils.json_files import write_figures

__all__ = ["prune"]


def prune(
    base: Flat[Base],
    *,
    method: Literal["width", "llm_pruner"] = "width",
    keep: float | None = None,
    pruning: Flat[WidthPruning] = WidthPruning(),
    llm_pruner: LLMPruner = LLMPruner(),
    output: Path = Path("prune"),
    calibration: Flat[Calibration] = Calibration(),
    constraints: Constraints = Constraints(),
    device: str = "auto",
    json: Path | None = None,
) -> Path:
    """Prune redundant hidden neurons from every MLP, or heads and neurons as LLM-Pruner does.

    ``--method width``: which neurons go, and how the MLP's down-projection compensates, follows in closed form from one
    forward and one backward pass over some text. All MLPs get the same width, so that plain transformers loads the
    folder without any code of ours.

    ``--method llm_pruner`` (arXiv 2305.11627): key/value heads and hidden neurons with the least first-order Taylor
    importance are removed from the middle blocks until ``--keep`` is left. No plain config describes blocks of unequal
    size, so the result loads as exports of factors do.

    The result is a base like any other: ranks can be learned or allocated on it, and ``--keep`` then counts the
    parameters that the first base had. ``lowrank fit --model.prune`` and ``lowrank compare`` do both in one.

    Args:
        base: The model; the result has its type too.
        method: width prunes MLPs before ranks are allocated; llm_pruner prunes to a size.
        keep: Fraction of the targeted parameters. With width, what later ranks on the result are to leave of the base:
            the width is the one that is predicted to lose least then, and the result itself keeps more. With
            llm_pruner, what the result keeps.
        pruning: How the width is chosen; give keep or share.
        llm_pruner: What llm_pruner prunes.
        output: Folder of the pruned model, checked by a reload in a fresh process.
        calibration: Text that the statistics are measured on.
        constraints: Which layers keep counts, and what the ranks must respect that are allocated later.
        device: cpu, cuda, ...; auto takes cuda where there is one.
        json: Write the figures there.

    Returns:
        The folder.
    """
    from lowrank_pl.calibration.build import statistics_of
    from lowrank_pl.calibration.subject import Subject
    from lowrank_pl.export.export import check_destination, save_compressed
    from lowrank_pl.methods.prune.base import apply_pruning, pruned_card
    from lowrank_pl.methods.prune.llm_pruner import apply_llm_pruner
    from lowrank_pl.models.base import model_files
    from lowrank_pl.models.identity import Origin
    from lowrank_pl.models.targets import model_parameters, targeted_parameters
    from lowrank_pl.text.sources import text_files
    from lowrank_pl.utils.environment import pick_device

    _check(method, keep, pruning, llm_pruner)
    _check_constraints(constraints, chooses_width=method == "width" and pruning.share is None)
    check_destination(output, sources=[base.name])
    check_output_files(json, inputs=[*model_files(base.name), *text_files(calibration.text)])
    subject = Subject.load(base, calibration, constraints, device=pick_device(device))
    model, tokenizer = subject.model, subject.tokenizer
    figures: dict[str, Any] = {"base": base.name}
    if method == "llm_pruner":
        assert keep is not None
        origin = apply_llm_pruner(model, subject.targets, statistics_of(subject), llm_pruner, base=base.name, keep=keep)
        figures |= {
            "method": method,
            "width": {"before": origin.width, "after": list(origin.left.values())},
            "heads": {"before": origin.heads, "after": list(origin.heads_left.values())},
        }
        said = "pruned by llm_pruner"
    else:
        found = apply_pruning(
            model, subject.targets, statistics_of(subject), pruning, base=base.name, keep=keep, constraints=constraints
        )
        for width, loss in sorted(found.tried.items()):
            print(f"{width} hidden neurons, ranks to keep {keep}: predicted loss {loss:.4f} nats a token")
        if found.by_block is not None:
            print(f"widths by block, ranks to keep {keep}: predicted loss {found.by_block:.4f} nats a token")
        written = Origin.of(model)
        if written is None or not found.any_pruned:
            raise ValueError(
                f"at keep {keep} no narrower MLPs are predicted to lose less: allocate ranks on {base.name!r} itself"
            )
        origin = written
        figures |= {
            "width": {"before": found.before, "after": found.widths[0] if found.one_width else list(found.widths)},
            "predicted_nats": found.nats,
            "predicted_nats_with_ranks": {str(width): loss for width, loss in sorted(found.tried.items())},
            "predicted_nats_by_block": found.by_block,
        }
        said = "pruned"
    report = save_compressed(model, output, tokenizer=tokenizer, merge=origin.one_width, card=pruned_card(origin))
    targets, parameters = constraints.targets(model), model_parameters(model)
    figures |= {
        "parameters": {
            "targeted": {"dense": origin.targeted, "kept": targeted_parameters(targets)},
            "model": {"dense": origin.parameters, "kept": parameters},
        },
        "bytes": report.bytes,
    }
    print(f"{said} to {origin.described}: {origin.remaining(targets, parameters)} are left")
    if method == "width":
        print(f"predicted loss {figures['predicted_nats']:.4f} nats a token")
    print(f"keep of plans on it counts what {origin.base} had\nmodel  {report.directory}")
    if json is not None:
        write_figures(json, figures)
    return report.directory


def _check(method: str, keep: float | None, pruning: WidthPruning, llm_pruner: LLMPruner) -> None:
    if keep is not None and not 0 < keep < 1:
        raise ValueError(f"keep is {keep}: expected a fraction above 0 and below 1")
    if method == "llm_pruner":
        if keep is None or llm_pruner.keep is not None:
            raise ValueError("llm_pruner prunes to the size that keep says: give --keep, and no --llm_pruner.keep")
        if pruning != WidthPruning():
            raise ValueError(
                "share, by_block, multiple_of and damping are settings of --method width: leave them out, or give "
                "those of --llm_pruner"
            )
        return
    if llm_pruner != LLMPruner():
        raise ValueError("settings of llm_pruner were given for --method width: add --method llm_pruner")
    if (keep is None) == (pruning.share is None):
        raise ValueError("give one of keep, the size that is wanted in the end, and share, of the hidden neurons")


def _check_constraints(constraints: Constraints, *, chooses_width: bool) -> None:
    if EMBEDDINGS in constraints.include:
        raise ValueError(f"include has {EMBEDDINGS}, which pruning does not touch: leave them out here")
    # The ranks that are allocated later are predicted only to choose a width.
    read = {"include", "exclude", *(("storage", "multiple_of", "floors") if chooses_width else ())}
    given = [
        part.name for part in fields(Constraints)
        if part.name not in read and getattr(constraints, part.name) != getattr(Constraints(), part.name)
    ]  # fmt: skip
    if given:
        raise ValueError(
            f"constraints.{given[0]} was given, which nothing here depends on: expected "
            f"{', '.join(sorted(read))}; give it to the command that allocates or learns ranks on the result"
        )
