"""lm-eval around a model in memory: its tasks, loaded once, and the scores of one model after the other.

What is special: this is the one module that needs lm-eval (``pip install "lowrank_pl[eval]"``), and only ``zero_shot``
imports it, when a task is asked for.
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
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lowrank_pl.evaluate.local_tasks import LocalTask

__all__ = ["MemoryLM", "load_tasks", "run_tasks"]

CPU_TOKENS = 1024
"""Tokens of a batch on a CPU, which more do not make faster; their logits over 256k words are 1 GB in fp32."""


CPU_SEQUENCES = 8
"""Sequences of a batch on a CPU where no lengths are known yet: generation."""


CHATTER = (
    "`pretrained` model kwarg is not of type",  # on purpose
    "Passed an already-initialized model",
    "Overwriting default num_fewshot",  # as asked
    "[Task: ",  # few-shot examples from the split that is scored, as documented
)
"""Warnings of lm-eval, by their beginning, of what is meant to be so."""


class MemoryLM(HFLM):  # type: ignore[misc]
    """lm-eval's Hugging Face model with batches that fit main memory.

    On a CPU, lm-eval's own search for a batch size never fails and takes whatever it begins with, up to the moment
    that the system ends the process.
    """

    _begin = 0
    _size = 1

    def _batch_scheduler(self, pos: int, n_reordered_requests: Sequence[Any]) -> int:
        if self.device.type != "cpu":
            found: int = super()._batch_scheduler(pos, n_reordered_requests)
            return found
        # Asked for each request in turn, which come longest first: a batch is as large as its first one allows.
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
    tasks: Sequence[str | LocalTask], *, include_path: Sequence[Path] = (), fewshot: int | None = None, seed: int = 1234
) -> dict[str, Any]:
    """Return the tasks and their groups as lm-eval's ``TaskManager`` loads them; data of its own come from the hub.

    Args:
        tasks: As ``named_tasks`` returns them.
        include_path: Folders of task files that may be named too.
        fewshot: Examples before every question, but where a task forbids them; by default as many as the task says.
        seed: Of everything that is random in a task, such as the choice of these examples.

    Raises:
        ValueError: A task is not known, or its data can't be read.
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    managers = _Managers(include_path)
    with _quiet():
        for task in tasks:
            found = {"tasks": {task.name: _local(task)}} if isinstance(task, LocalTask) else managers.load(task)
            twice = sorted(loaded["tasks"].keys() & found["tasks"].keys())
            if twice:
                raise ValueError(f"task {twice[0]!r} comes twice, from {task} too: give it once")
            for kind, entries in found.items():
                loaded[kind].update(entries)
    for task in loaded["tasks"].values():
        own = task.get_config("num_fewshot")
        if fewshot is not None and own != 0:
            task.set_config(key="num_fewshot", value=fewshot)
        elif own is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=seed)
    return loaded


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    loaded: dict[str, Any],
    *,
    batch_size: str = "auto",
    limit: int | None = None,
) -> dict[str, Any]:
    """Return what lm-eval says of ``model``, in its own form and ready for JSON, ``samples`` included.

    Args:
        model: A causal language model, wherever it lies.
        tokenizer: Its tokenizer, whose own BOS rule is followed.
        loaded: The tasks, from ``load_tasks``; they may be used for several models.
        batch_size: Sequences a forward, or ``auto``.
        limit: Rows of every task, its first ones; by default all.
    """
    started = time.time()
    with _quiet(), redirect_stdout(sys.stderr):
        lm = MemoryLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        results = evaluator.evaluate(lm, loaded, limit=limit)
    for name, task in loaded["tasks"].items():
        if getattr(task, "source", None) is not None:
            config = results["configs"][name]
            config.pop("custom_dataset", None)
            # What a task file of lm-eval says to the same effect.
            config |= {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(task.source)}}}
    results["config"] = {
        "model_num_parameters": model.num_parameters(),
        "model_dtype": str(model.dtype),
        "batch_size": batch_size,
        "limit": limit,
    }
    results |= {
        "date": started,
        "lm_eval_version": lm_eval.__version__,
        "transformers_version": transformers.__version__,
        "max_length": lm.max_length,
        "total_evaluation_time_seconds": str(time.time() - started),
    }
    plain: dict[str, Any] = json.loads(json.dumps(results, default=handle_non_serializable))
    return plain


class _Managers:
    """lm-eval's index of tasks: without its own, which take seconds to list, until one of these is asked for."""

    def __init__(self, include_path: Sequence[Path]) -> None:
        for folder in include_path:
            if not folder.is_dir():
                raise ValueError(f"include_path: there is no folder {folder.absolute()}")
        self.include_path = [str(folder) for folder in include_path]
        self.manager = TaskManager(include_path=self.include_path or None, include_defaults=False)
        self.complete = False

    def load(self, task: str) -> dict[str, Any]:
        """Return what a name or a YAML path stands for."""
        known = task in self.manager.all_tasks or Path(task).is_file()
        if not known and self.complete:
            raise ValueError(self._unknown(task))
        try:
            if known:
                found: dict[str, Any] = self.manager.load([task])
                return found
        # lm-eval and datasets raise what they like of data that are not there.
        except Exception as error:
            # A file may name tasks of lm-eval's own.
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


def _local(task: LocalTask) -> ConfigurableTask:
    """Return lm-eval's task for a file of questions; nothing but the file is read."""
    rows = Dataset.from_list(task.rows())
    made = ConfigurableTask(config={**task.config(), "custom_dataset": lambda **_: {"test": rows}})
    made.source = task.path
    return made


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep lm-eval to what a user should know: warnings, but those of what is meant to be so."""
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
