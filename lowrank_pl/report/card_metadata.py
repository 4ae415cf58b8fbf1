"""The metadata of a model card: the YAML in front of it, by which the Hugging Face hub files a model."""

from __future__ import annotations

import logging
import math
import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData, metadata_load, try_to_load_from_cache
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results

from lowrank_pl.report.evidence import ScoredText
from lowrank_pl.report.rank_map import bits_in_words
from lowrank_pl.report.run_record import RunRecord
from lowrank_pl.utils.files import at_home
from lowrank_pl.utils.formatting import percent

__all__ = ["front_matter", "refreshed_front_matter", "split_front_matter", "title"]

_log = logging.getLogger(__name__)

RELATION = "quantized"
"""How the model relates to its base, of the values that the hub knows: adapter, finetune, merge, quantized.

The weights approximate the base's after training, without a step of training, as those of a quantised model do. The hub
then lists the model among the base's quantizations, where people look for smaller forms of it.
"""

TASK = "text-generation"
_FENCE = "---\n"


def title(record: RunRecord) -> str:
    """Return the name of a model in words, for the head of its card and for its results."""
    name = record.base.rstrip("/").rsplit("/", 1)[-1]
    bits = f" in {bits_in_words(record.plan)}" if record.plan.is_rounded else ""
    whose = "linear layers' and embeddings'" if record.plan.embedded else "linear layers'"
    return f"{name} with {percent(record.plan.keep_targeted)} of its {whose} parameters{bits}"


def front_matter(record: RunRecord, license: str | None = None) -> str:
    """Return the metadata of a run's model between its fences.

    Args:
        record: The run, or an export with its plan.
        license: The base model's licence, as the hub names it; by default what the base's card says, if it lies on this
            machine.
    """
    base = record.plan.named_base
    known: dict[str, Any] = _license(base) if license is None else {"license": license}
    if _is_hub_id(base):
        known |= {"base_model": base, "base_model_relation": RELATION}
    results = _results(record)
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=TASK,
        tags=["low-rank", "compression", "lowrank_pl", *(f"{width}-bit" for width in record.plan.widths)],
        eval_results=results or None,
        model_name=title(record) if results else None,
        **known,
    )
    return f"{_FENCE}{data.to_yaml()}\n{_FENCE}"


def _is_hub_id(base: str) -> bool:
    shape = re.fullmatch(r"[A-Za-z0-9][\w.-]{0,95}(/[\w.-]{1,96})?", base, flags=re.ASCII)
    return shape is not None and not base.endswith(".gguf") and not Path(base).exists()


def _license(base: str) -> dict[str, str]:
    """Return what the card of ``base`` says of its licence; nothing if this machine has no such card."""
    on_hub = _is_hub_id(base)
    try:
        found = try_to_load_from_cache(base, "README.md") if on_hub else at_home(base) / "README.md"
        if not base or not isinstance(found, str | Path) or not Path(found).is_file():
            return {}
        data = metadata_load(found) or {}
    # A plan may name anything as its base: what is no path on this machine has no card.
    except (OSError, RuntimeError, ValueError, yaml.YAMLError) as error:
        _log.warning("the licence of %s is left out of the card, since the base's card can't be read (%s)", base, error)
        return {}
    said = {key: data[key] for key in ("license", "license_name", "license_link") if isinstance(data.get(key), str)}
    link = said.get("license_link", "")
    if link and "://" not in link:
        # A file of the base's repository, which this one lacks.
        del said["license_link"]
        if on_hub:
            said["license_link"] = f"https://huggingface.co/{base}/blob/main/{link}"
    return said if "license" in said else {}


def _results(record: RunRecord) -> list[EvalResult]:
    """Return the measured scores of the model, each followed by the dense model's."""
    results = []
    protocol = record.summary.facts.get("protocol", {})
    if {"text", "windows", "length"} <= protocol.keys():
        text = ScoredText(protocol["text"], protocol["windows"], protocol["length"])
        rows = (record.learned, record.dense)
        results += _perplexities(text, *(None if row is None else row.perplexity for row in rows))
    texts = record.evidence.texts
    for own in record.evidence.own_texts:
        same = (one.perplexity for one in texts if (one.model, one.text) == (record.base, own.text))
        dense = next(same, own.dense_perplexity)
        results += _perplexities(own.text, own.perplexity, dense)
    own_tasks = [one for one in record.evidence.tasks if record.evidence.is_own(one)]
    dense_tasks = next((one.figures for one in record.evidence.tasks if one.source == "dense"), {})
    for tasks in own_tasks:
        for task, metrics in tasks.figures.items():
            for metric, (value, _) in metrics.items():
                beside, _ = dense_tasks.get(task, {}).get(metric, (None, None))
                results += _pair(task, task, None, metric, value, beside)
    return results


def _perplexities(text: ScoredText, own: float | None, dense: float | None) -> list[EvalResult]:
    names, parts, said = [], [], text.name
    for entry in text.name.split(" + "):
        words, _, part = entry.partition("::")
        source = words.rsplit(" ", 1)[-1]
        # The name of a file says enough; its folder is of this machine.
        names.append(Path(source).name if source.startswith(("/", "~")) else source)
        parts += [part] if part else []
        said = said.replace(source, names[-1], 1)
    shown = ScoredText(said, text.sequences, text.length)
    config = ", ".join([*parts, f"{text.sequences} sequences of {text.length} tokens"])
    # The hub groups results by dataset and configuration.
    return _pair(" + ".join(names), str(shown), config, "perplexity", own, dense)


def _pair(
    dataset: str, shown: str, config: str | None, metric: str, own: float | None, dense: float | None
) -> list[EvalResult]:
    """Return the score of the model and that of the dense model, of those that are finite numbers."""
    if own is None:
        return []
    return [
        EvalResult(
            task_type=TASK,
            dataset_type=dataset,
            dataset_name=shown,
            dataset_config=config,
            metric_type=metric,
            metric_value=float(f"{value:.6g}"),
            metric_name=name,
        )
        for name, value in ((metric, own), (f"{metric} of the dense model", dense))
        if value is not None and math.isfinite(value)
    ]


def split_front_matter(card: str) -> tuple[str, str]:
    r"""Return the metadata of a card with its fences, empty if it has none, and the rest.

    >>> split_front_matter("---\nlicense: mit\n---\n\n# A model\n")
    ('---\nlicense: mit\n---\n', '\n# A model\n')
    """
    found = re.match(r"---\n.*?\n---\n", card, re.S)
    return ("", card) if found is None else (found[0], card[found.end() :])


def refreshed_front_matter(old: str, new: str) -> str:
    """Return ``old`` with the results of ``new``; everything else in it is its owner's, and stays letter by letter.

    Results of other texts and tasks stay too. Metadata that can't be read stays as it is, with a warning.

    Args:
        old: Metadata between fences, perhaps edited.
        new: Metadata of the same model, as :func:`front_matter` writes it.
    """
    fresh = _read(new).get("model-index")
    if not fresh:
        return old
    try:
        before = _read(old).get("model-index")
        name, results = model_index_to_eval_results(before or fresh)
    except (ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        _log.warning("the card's metadata can't be read and is left without new results (%s)", error)
        return old
    _, measured = model_index_to_eval_results(fresh)
    others = [one for one in results if not any(one.is_equal_except_value(new) for new in measured)]
    index = eval_results_to_model_index(name, [*measured, *others])
    if index == before:
        return old
    # The lines of a block are indented or begin with a dash.
    kept = re.sub(r"^model-index:.*\n(?:(?:[ -].*)?\n)*?(?=[^ \n-]|---$)", "", old, flags=re.M)
    updated = f"{kept.removesuffix(_FENCE)}{_dumped({'model-index': index})}{_FENCE}"
    whole = {**_read(old), "model-index": index}
    try:
        if _read(updated) == whole:
            return updated
    except (ValueError, yaml.YAMLError):
        pass
    return f"{_FENCE}{_dumped(whole)}{_FENCE}"


def _dumped(data: dict[str, Any]) -> str:
    return str(yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=10**6))


def _read(front: str) -> dict[str, Any]:
    data = yaml.safe_load(front.removeprefix(_FENCE).removesuffix(_FENCE))
    if not isinstance(data, dict):
        raise ValueError("the metadata is no mapping")
    return data
