"""lm-eval on a model in memory: tasks are loaded once and run on one model after the other.

This is the only module that needs lm-eval (``pip install ".[eval]"`` in a clone), and ``zero_shot`` imports it when a
task is requested.
"""

from __future__ import annotations

import difflib
import json
import logging
import random
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import torch
import transformers
from datasets import Dataset
from lm_eval import evaluator
from lm_eval import tasks as lm_eval_tasks
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowrank_pl.evaluate.local_tasks import YAML, LocalTask, Task
from lowrank_pl.evaluate.public_tasks import PublicTask
from lowrank_pl.models.targets import model_parameters

__all__ = ["MemoryLM", "load_tasks", "run_tasks"]

CPU_TOKENS = 1024
"""Tokens per batch on a CPU: more are not faster. Their logits over a vocabulary of 256k take 1 GB in fp32."""

CPU_SEQUENCES = 8
"""Sequences per batch on a CPU for generation, whose lengths are not known in advance."""

MMLU = "mmlu/default"
"""lm-eval's folder of MMLU, whose subjects are tasks that share one file."""

_log = logging.getLogger(__name__)

CHATTER = (
    "`pretrained` model kwarg is not of type",  # on purpose
    "Passed an already-initialized model",
    "Overwriting default num_fewshot",  # as asked
    "[Task: ",  # few-shot examples from the split that is scored, as documented
    "Combined length of context",  # counted by task instead of one message per choice
    "Left truncation applied",
)
"""Beginnings of lm-eval's warnings about settings that are intended here."""


class MemoryLM(HFLM):  # type: ignore[misc]
    """lm-eval's Hugging Face model with batches that fit main memory.

    On a CPU, lm-eval's own search for a batch size keeps its first guess, since too large a batch raises no error: the
    operating system kills the process.
    """

    _begin = 0
    _size = 1

    def __init__(self, *args: Any, **settings: Any) -> None:
        self.truncated: set[Any] = set()
        """Pairs of context and continuation, and contexts to generate from, that were cut to the model's length."""
        super().__init__(*args, **settings)

    def _loglikelihood_tokens(self, requests: Sequence[Any], *args: Any, **settings: Any) -> list[Any]:
        for pair, context, continuation in requests:
            if len(continuation) > self.max_length:
                raise ValueError(
                    f"a choice has {len(continuation)} tokens, more than the model's {self.max_length}: the task can't "
                    f"be scored on this model; it begins {str(pair[1])[:60]!r}"
                )
            if len(context) + len(continuation) > self.max_length + 1:
                self.truncated.add(pair)
        found: list[Any] = super()._loglikelihood_tokens(requests, *args, **settings)
        return found

    def generate_until(self, requests: Sequence[Any], *args: Any, **settings: Any) -> list[str]:
        """Return generated texts as lm-eval does.

        Raises:
            ValueError: The model's length leaves no room for a prompt.
        """
        for request in requests:
            tokens = request.args[1].get("max_gen_toks", self.max_gen_toks)
            if tokens >= self.max_length:
                raise ValueError(
                    f"task {request.task_name!r} generates up to {tokens} tokens, which leaves no room for a prompt in "
                    f"the model's length of {self.max_length}: leave the task out, or take a model of longer context"
                )
        found: list[str] = super().generate_until(requests, *args, **settings)
        return found

    def tok_batch_encode(
        self, strings: list[str], *args: Any, left_truncate_len: int | None = None, **settings: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return tokens and mask as lm-eval does, and note which contexts were cut."""
        if left_truncate_len:
            self.truncated.update(text for text in strings if len(self.tok_encode(text)) > left_truncate_len)
        found: tuple[torch.Tensor, torch.Tensor] = super().tok_batch_encode(
            strings, *args, left_truncate_len=left_truncate_len, **settings
        )
        return found

    def _batch_scheduler(self, pos: int, n_reordered_requests: Sequence[Any]) -> int:
        if self.device.type != "cpu":
            found: int = super()._batch_scheduler(pos, n_reordered_requests)
            return found
        # Requests come longest first, so the first request of a batch determines its size.
        if pos == 0 or pos == self._begin + self._size:
            _, context, continuation = n_reordered_requests[pos]
            self._begin = pos
            self._size = max(1, min(self.max_batch_size, CPU_TOKENS // (len(context) + len(continuation))))
        return self._size

    def _detect_batch_size(self, requests: Sequence[Any] | None = None, pos: int = 0) -> int:
        if self.device.type != "cpu":
            found: int = super()._detect_batch_size(requests, pos)
            return found
        return CPU_SEQUENCES


def load_tasks(
    tasks: Sequence[Task], *, include_path: Sequence[Path] = (), fewshot: int | None = None, seed: int = 1234
) -> dict[str, Any]:
    """Return the tasks and their groups as lm-eval's ``TaskManager`` loads them; lm-eval's own data come from the hub.

    Args:
        tasks: Tasks from ``named_tasks``.
        include_path: Folders with more task files.
        fewshot: Examples before every question, unless the task forbids them; by default the task's own number.
        seed: Seed of everything random in a task, such as the choice of examples.

    Raises:
        ValueError: A task is unknown or given twice, or its data can't be read.
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    managers = _Managers(include_path)
    with _quiet():
        for task in tasks:
            if isinstance(task, LocalTask):
                found = {"tasks": {task.name: _local(task, fewshot)}}
            elif isinstance(task, PublicTask):
                if fewshot:
                    task.require_examples(fewshot)
                found = _public(task)
            else:
                found = managers.load(task)
            twice = sorted(loaded["tasks"].keys() & found["tasks"].keys())
            if twice:
                raise ValueError(f"task {twice[0]!r} was given twice, the second time by {_shown(task)}: give it once")
            for kind, entries in found.items():
                loaded[kind].update(entries)
    closed = []
    for name, task in loaded["tasks"].items():
        own = task.get_config("num_fewshot")
        if fewshot and own == 0:
            closed.append(name)
        elif own is None or fewshot is not None:
            task.set_config(key="num_fewshot", value=fewshot or 0)
        task.set_fewshot_seed(seed=seed)
    if closed:
        _log.warning("these tasks allow no examples, and are asked without: %s", ", ".join(closed))
    return loaded


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    loaded: dict[str, Any],
    *,
    batch_size: str = "auto",
    limit: int | None = None,
) -> dict[str, Any]:
    """Return lm-eval's results of ``model`` as JSON values, ``samples`` included.

    Args:
        model: A causal language model, on any device.
        tokenizer: Its tokenizer, which decides about BOS.
        loaded: Tasks from ``load_tasks``; they may be run on several models.
        batch_size: Sequences per forward pass, or ``auto``.
        limit: Number of rows of every task, from the first; by default all.
    """
    started = time.time()
    with _quiet(), redirect_stdout(sys.stderr):
        lm = MemoryLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        results = evaluator.evaluate(lm, loaded, limit=limit)
    for name, task in loaded["tasks"].items():
        if getattr(task, "source", None) is not None:
            config = results["configs"][name]
            config.pop("custom_dataset", None)
            if isinstance(task.source, PublicTask):
                config["local_file"] = str(task.source.path)
            else:
                # The equivalent setting in a task file of lm-eval.
                config |= {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(task.source)}}}
    cut = _count_truncated(results["samples"], lm)
    results["config"] = {
        "model_num_parameters": model_parameters(model),
        "model_dtype": str(model.dtype),
        "batch_size": batch_size,
        "limit": limit,
    }
    results |= {
        "date": started,
        "lm_eval_version": lm_eval.__version__,
        "transformers_version": transformers.__version__,
        "max_length": lm.max_length,
        "n-truncated": cut,
        "total_evaluation_time_seconds": str(time.time() - started),
    }
    plain: dict[str, Any] = json.loads(json.dumps(results, default=handle_non_serializable))
    return plain


class _Managers:
    """lm-eval's index of tasks; lm-eval's own tasks, which take seconds to list, are added when one is requested."""

    def __init__(self, include_path: Sequence[Path]) -> None:
        for folder in include_path:
            if not folder.is_dir():
                raise ValueError(f"include_path: there is no folder {folder.absolute()}")
        self.include_path = [str(folder) for folder in include_path]
        self.manager = TaskManager(include_path=self.include_path or None, include_defaults=False)
        self.complete = False

    def load(self, task: str) -> dict[str, Any]:
        """Return the tasks of a name or of a YAML file."""
        known = task in self.manager.all_tasks or (task.endswith(YAML) and Path(task).is_file())
        if not known and self.complete:
            raise ValueError(self._unknown(task))
        try:
            if known:
                found: dict[str, Any] = self.manager.load([task])
                return found
        # lm-eval and datasets raise errors of many types if data are missing.
        except Exception as error:
            # A file may refer to lm-eval's own tasks.
            if self.complete:
                raise ValueError(_unreadable(task, error)) from error
        self.manager = TaskManager(include_path=self.include_path or None)
        self.complete = True
        return self.load(task)

    def _unknown(self, task: str) -> str:
        near = difflib.get_close_matches(task, self.manager.all_tasks, n=5)
        advice = f"did you mean {', '.join(near)}?" if near else "`lm_eval ls tasks` lists them"
        return f"lm-eval {lm_eval.__version__} has no task {task!r}: {advice}"


def _unreadable(task: str, error: Exception) -> str:
    reason = (str(error).strip().splitlines() or [""])[0]
    return (
        f"task {task!r} could not be loaded: {type(error).__name__}: {reason}. The data of lm-eval's own tasks come "
        "from the hub: check the connection, or give a .jsonl file of the questions"
    )


def _shown(task: Task) -> str:
    return task if isinstance(task, str) else str(task.path)


def _count_truncated(samples: dict[str, Any], lm: MemoryLM) -> dict[str, int]:
    """Return how many rows of each task were cut to the model's length, and warn about them."""
    counts = {}
    for name, rows in samples.items():
        cut = {
            row["doc_id"]
            for row in rows
            for words in row["arguments"]
            # The second argument of a generation is its settings.
            if (words[0] if isinstance(words[-1], dict) else tuple(words)) in lm.truncated
        }
        counts[name] = len(cut)
        if cut:
            _log.warning(
                "task %s: %d of %d rows are longer than the model's %d tokens; the beginning of their prompts was cut "
                "off, and scores of a model with a longer context are not comparable",
                name, len(cut), len({row["doc_id"] for row in rows}), lm.max_length,
            )  # fmt: skip
    return counts


def _public(task: PublicTask) -> dict[str, Any]:
    """Return lm-eval's own task, or the group and its tasks, on the rows of a local file."""
    release = task.release
    folder = Path(lm_eval_tasks.__file__).parent / release.folder
    manager = TaskManager(include_path=[str(folder)], include_defaults=False) if folder.is_dir() else TaskManager()
    if task.name not in manager.all_tasks:
        raise ValueError(f"lm-eval {lm_eval.__version__} has no task {task.name!r}, whose local file is {task.path}")
    rows, examples = task.rows(), task.example_rows()

    def splits(config_source: str = "", **_: Any) -> dict[str, Dataset]:
        subject = Path(config_source).stem.removeprefix("mmlu_")
        kept, shown = (
            [row for row in given if row.get("subject", subject) == subject] if release.folder == MMLU else given
            for given in (rows, examples)
        )
        if not kept:
            raise ValueError(f"{task.path} has no row of subject {subject!r}, which task {task.name!r} needs")
        made = Dataset.from_list(kept)
        # Without examples the split is empty, because lm-eval looks at it even if it shows none.
        return {release.split: made, release.examples: Dataset.from_list(shown) if shown else made.select([])}

    # TaskManager.load can't put settings on top of those of a group's tasks.
    built = manager._factory.build(
        manager.task_index[task.name], overrides={"custom_dataset": splits}, registry=manager.task_index
    )
    found: dict[str, Any] = manager.load([built])
    for one in found["tasks"].values():
        one.source = task
    return found


def _local(task: LocalTask, fewshot: int | None) -> ConfigurableTask:
    """Return an lm-eval task for a file of questions; only that file is read, also for examples."""
    rows = Dataset.from_list(task.rows())
    if fewshot and fewshot >= len(rows):
        raise ValueError(
            f"fewshot is {fewshot}, but {task.path} has {len(rows)} rows, from which the examples of each question "
            f"come too: give at most {len(rows) - 1}"
        )
    made = ConfigurableTask(config={**task.config(), "custom_dataset": lambda **_: {"test": rows}})
    made.source = task.path
    return made


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide lm-eval's messages within the context, except for warnings that matter to a user."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.WARNING)
    handlers = logging.getLogger().handlers
    for handler in handlers:
        handler.addFilter(_no_chatter)
    try:
        yield
    finally:
        logger.setLevel(level)
        for handler in handlers:
            handler.removeFilter(_no_chatter)


def _no_chatter(record: logging.LogRecord) -> bool:
    said = record.getMessage()
    of_custom_data = "Custom kwargs can be passed to `--metadata`" in said
    return not (record.name.startswith("lm_eval") and (of_custom_data or said.startswith(CHATTER)))
