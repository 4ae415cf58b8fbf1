"""Zero-shot accuracy through lm-eval, of one model or of a compressed model and its base."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowrank_pl.evaluate.local_tasks import YAML, Task, named_tasks
from lowrank_pl.evaluate.paired import differences
from lowrank_pl.evaluate.settings import TaskSettings

__all__ = ["ZeroShot", "figures_of", "require_lm_eval"]


class ZeroShot:
    """Tasks, loaded once, for any number of models.

    If all tasks are local files, the hub is not contacted.

    Args:
        tasks: Tasks, as ``lowrank_pl.evaluate.local_tasks`` reads them.
        settings: Settings of the tasks.
        trust_remote_code: Whether to read YAML task files: they name Python functions, and their templates are code.

    Raises:
        ValueError: lm-eval is not installed, a task can't be loaded, or a task file is not trusted.
    """

    def __init__(
        self, tasks: Sequence[str], settings: TaskSettings = TaskSettings(), *, trust_remote_code: bool = False
    ) -> None:
        named: list[Task] = named_tasks(tasks)
        programs = [task for task in named if isinstance(task, str) and task.endswith(YAML)]
        programs += map(str, settings.include_path)
        if programs and not trust_remote_code:
            raise ValueError(
                f"{programs[0]}: a YAML task of lm-eval can run Python code; give --trust_remote_code if you trust it, "
                "or a .jsonl file of questions"
            )
        require_lm_eval()
        from lowrank_pl.evaluate.lm_eval_adapter import load_tasks

        self.settings = settings
        self.files = [task if isinstance(task, str) else task.path for task in named]
        """The files of the tasks; the name of one that lm-eval has stands for none."""
        self.loaded = load_tasks(
            named, include_path=settings.include_path, fewshot=settings.fewshot, seed=settings.seed
        )

    def results(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """Return lm-eval's results of ``model``, with the answer to every row in ``samples``."""
        from lowrank_pl.evaluate.lm_eval_adapter import run_tasks

        settings = self.settings
        found = run_tasks(model, tokenizer, self.loaded, batch_size=settings.task_batch_size, limit=settings.limit)
        found["config"] |= {"seed": settings.seed, "num_fewshot": settings.fewshot}
        return found


def require_lm_eval() -> None:
    """Check that lm-eval is installed.

    Raises:
        ValueError: It is not; the message has the command that installs it.
    """
    if find_spec("lm_eval") is None:
        raise ValueError("tasks need lm-eval, which is not installed: pip install lm-eval")


def figures_of(results: dict[str, Any], reference: dict[str, Any] | None) -> dict[str, Any]:
    """Return the JSON values of results: both models' scores without single rows, and their differences."""
    figures = {"model": _short(results)}
    if reference is not None:
        figures |= {"reference": _short(reference), "difference": differences(results, reference)}
    return figures


def _short(results: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in results.items() if key != "samples"}
