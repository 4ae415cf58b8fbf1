"""Zero-shot accuracy through lm-eval: of a model, or of a compressed one beside the dense one it was made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowrank_pl.evaluate.local_tasks import LocalTask, named_tasks
from lowrank_pl.evaluate.paired import differences

__all__ = ["TaskSettings", "ZeroShot", "figures_of", "require_lm_eval"]


@dataclass(frozen=True)
class TaskSettings:
    """How tasks are run.

    Args:
        include_path: Folders of lm-eval's YAML task files, whose tasks may be named too.
        limit: Rows of every task, its first ones; by default all.
        fewshot: Examples before every question; by default as many as the task says, mostly none.
        seed: Of the choice of these examples.
        batch_size: Sequences per forward, or auto: on a GPU as many as fit, on a CPU as many as help.
    """

    include_path: Sequence[Path] = ()
    limit: int | None = None
    fewshot: int | None = None
    seed: int = 1234
    batch_size: str = "auto"

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit is {self.limit}: expected the rows of a task, 1 or more; all without it")
        if self.fewshot is not None and self.fewshot < 0:
            raise ValueError(f"fewshot is {self.fewshot}: expected a number of examples, 0 or more")
        if self.batch_size != "auto" and not (self.batch_size.isdecimal() and int(self.batch_size)):
            raise ValueError(f"batch_size is {self.batch_size!r}: expected auto or a whole number of at least 1")


class ZeroShot:
    """Tasks, loaded once, for one model or two.

    Nothing of the hub is asked for where all tasks are local files.

    Args:
        tasks: Names, as in ``lowrank_pl.evaluate.local_tasks``.
        settings: How to run them.

    Raises:
        ValueError: lm-eval is not installed, or a task can't be loaded.
    """

    def __init__(self, tasks: Sequence[str], settings: TaskSettings = TaskSettings()) -> None:
        named: list[str | LocalTask] = named_tasks(tasks)
        require_lm_eval()
        from lowrank_pl.evaluate.lm_eval_adapter import load_tasks

        self.settings = settings
        self.loaded = load_tasks(
            named, include_path=settings.include_path, fewshot=settings.fewshot, seed=settings.seed
        )

    def results(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """Return lm-eval's results of ``model``, in its own form, with the answers to every row as ``samples``."""
        from lowrank_pl.evaluate.lm_eval_adapter import run_tasks

        settings = self.settings
        found = run_tasks(model, tokenizer, self.loaded, batch_size=settings.batch_size, limit=settings.limit)
        found["config"] |= {"seed": settings.seed, "num_fewshot": settings.fewshot}
        return found


def require_lm_eval() -> None:
    """Say how to install lm-eval where it is not.

    Raises:
        ValueError: It is not installed.
    """
    if find_spec("lm_eval") is None:
        raise ValueError('tasks are run by lm-eval, which is not installed: pip install "lowrank_pl[eval]"')


def figures_of(results: dict[str, Any], reference: dict[str, Any] | None) -> dict[str, Any]:
    """Return what the JSON file gets: the results of both without single rows, and the differences."""
    figures = {"model": _short(results)}
    if reference is not None:
        figures |= {"reference": _short(reference), "difference": differences(results, reference)}
    return figures


def _short(results: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in results.items() if key != "samples"}
