"""``lowrank compare``."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowrank_pl.cli.parameters import Flat, Settings
from lowrank_pl.models.settings import EMBEDDINGS, Base
from lowrank_pl.plans.constraints import Constraints
from lowrank_pl.text.settings import Calibration
from lowrank_pl.utils.files import check_output_files, check_output_folder
from lowrank_pl.utils.json_files import write_figures

if TYPE_CHECKING:
    from lowrank_pl.methods.recipes import Recipe

__all__ = ["ComparisonText", "compare"]


@dataclass(frozen=True)
class ComparisonText(Calibration):
    """Text that methods are calibrated on; by default the half of Python's documentation that is not scored.

    Args:
        text: Text for statistics and for learning: file, folder, glob, hub dataset or python-docs.
        length: Tokens of a sequence.
        sequences: How many sequences statistics are measured on.
    """

    text: str = "python-docs::part=0%-50%"
    sequences: int = 64


_log = logging.getLogger(__name__)


def compare(
    base: Flat[Base],
    *,
    methods: Sequence[str] = ("uniform", "fisher"),
    keep: Sequence[float] = (0.8,),
    calibration: Flat[ComparisonText] = ComparisonText(),
    scores: Sequence[str] = ("python-docs::part=50%-100%",),
    score_length: int = 1024,
    score_sequences: dict[str, int] | None = None,
    recipes: Settings | None = None,
    run: Path = Path("runs/compare"),
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    multiple_of: int = 1,
    seed: int = 0,
    plotted: Sequence[str] | None = None,
    device: str = "auto",
    json: Path | None = None,
    dry_run: bool = False,
) -> list[dict[str, Any]]:
    """Compare methods on one model: the same statistics and factors, the same budgets, the same texts to score.

    Finished results are kept in the run's folder. A comparison that was killed goes on where it stopped, and one with
    more methods or sizes adds to the results. A method whose settings have changed is made anew.

    Args:
        base: The model.
        methods: Names of recipes, those that ship with lowrank_pl or your own.
        keep: Fractions of the targeted parameters to keep.
        calibration: Text for statistics and for learning.
        scores: Texts to score, each as TEXT or NAME=TEXT; never calibrate on them.
        score_length: Tokens of a sequence to score.
        score_sequences: How many sequences of a text by its name, such as --score_sequences.docs 16; all of it by
            default.
        recipes: Your own recipes by name, from YAML; they win over shipped ones of the same name.
        run: Folder of the results: results.json, results.md, plots, and a folder for each method and size.
        include: Globs of modules to target, on full names or names inside a block; the word embeddings beside them
            targets embeddings and head too, for methods that allocate by fisher, energy or uniform.
        exclude: Globs of modules to leave alone; they are not counted in keep.
        multiple_of: Every rank is a multiple of this.
        seed: Seed of the order of sequences in learning.
        plotted: The methods that the plots show; all that have a result by default.
        device: cpu, cuda, ...; auto takes cuda where there is one.
        json: Write the results there too.
        dry_run: Print what the comparison needs; nothing is loaded, and no file but that of --json is written.

    Returns:
        The results, one for each method and size; none for a dry run.

    Raises:
        ValueError: An unknown method, an impossible size or text, or a folder that holds another comparison.
    """
    from lowrank_pl.calibration.subject import Subject
    from lowrank_pl.cli.comparison import Comparison, warn_of_known_text
    from lowrank_pl.cli.workloads import compare_workload
    from lowrank_pl.costs.forecast import print_forecast
    from lowrank_pl.costs.machine import machine_of
    from lowrank_pl.methods.recipes import recipe
    from lowrank_pl.models.base import model_files
    from lowrank_pl.models.sequences import check_sequences
    from lowrank_pl.report.comparison import comparison_table
    from lowrank_pl.text.sequences import token_windows
    from lowrank_pl.text.sources import named_texts, text_files
    from lowrank_pl.utils.environment import pick_device

    check_output_folder(run)
    own = _read_recipes(recipes or {})
    chosen = {name: recipe(name, own) for name in methods}
    for name in plotted or ():
        recipe(name, own)
    refused = sorted(name for name, one in chosen.items() if EMBEDDINGS in include and not one.takes_embeddings)
    if refused:
        raise ValueError(
            f"{refused[0]} can't give embeddings a rank: include has {EMBEDDINGS}, for methods that allocate by "
            "fisher, energy or uniform on two_sided, whitened or svd factors, without pruning; compare it without"
        )
    texts, limits = named_texts(scores), score_sequences or {}
    # A dry run reads no text.
    read = [] if dry_run else text_files(calibration.text, *texts.values())
    check_output_files(json, inputs=[*model_files(base.name), *read])
    if dry_run:
        for name in (name for name, one in chosen.items() if one.heal is not None):
            _log.warning("the forecast leaves out the training of %s", name)
        work = compare_workload(
            chosen, keeps=keep, calibration=calibration, texts=tuple(texts), score_length=score_length,
            score_sequences=limits,
        )  # fmt: skip
        print_forecast(base, work, machine_of(device), constraints=Constraints(include, exclude), output=json)
        return []
    for one in chosen.values():
        if one.heal is not None:
            # Refuses a budget below one step, before anything is measured.
            one.heal.steps(calibration.length)
    constraints = Constraints(include, exclude, multiple_of)
    subject = Subject.load(base, calibration, constraints, device=pick_device(device))
    for fraction in keep:
        subject.budget(fraction)
        for one in chosen.values():
            if one.drop_experts:
                one.constrained(constraints).budget(subject.model, subject.targets, fraction)
    if any(one.shared_experts for one in chosen.values()):
        # Refuses models without experts, before anything is measured.
        replace(constraints, shared_experts=True).stacked(subject.targets)
    if unknown := sorted(set(limits) - set(texts)):
        raise ValueError(
            f"score_sequences names {unknown[0]!r}, which is none of the texts to score: {', '.join(texts)}"
        )
    sequences = {
        name: token_windows(text, subject.tokenizer, length=score_length, sequences=limits.get(name))
        for name, text in texts.items()
    }
    for scored in sequences.values():
        check_sequences(subject.model, scored)
    warn_of_known_text(sequences, subject, chosen)
    results = Comparison(run, subject, seed, sequences, plotted or []).results(chosen, keep)
    if json is not None:
        write_figures(json, results)
    print(f"\n{comparison_table(results, fmt='simple')}\n\nresults  {run / 'results.json'}")
    return results


def _read_recipes(recipes: Mapping[str, Any]) -> dict[str, Recipe]:
    """Return the recipes; those from YAML name classes as the configuration of ``lowrank fit`` does."""
    from jsonargparse import ArgumentParser

    from lowrank_pl.methods.recipes import Recipe

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--recipes", type=dict[str, Recipe])
    written = {name: one for name, one in recipes.items() if not isinstance(one, Recipe)}
    read = parser.instantiate_classes(parser.parse_object({"recipes": written})).recipes if written else {}
    return {**recipes, **read}
