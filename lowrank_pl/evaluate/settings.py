"""How tasks are run: what users choose, importable without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["TaskSettings"]


@dataclass(frozen=True)
class TaskSettings:
    """How tasks are run.

    Args:
        include_path: Folders of lm-eval's YAML task files, whose tasks may be named too.
        limit: Rows of every task, its first ones; by default all.
        fewshot: Examples before every question; by default as many as the task says, mostly none.
        seed: Of the choice of these examples.
        task_batch_size: Sequences per forward, or auto: on a GPU as many as fit, on a CPU as many as help.
    """

    include_path: Sequence[Path] = ()
    limit: int | None = None
    fewshot: int | None = None
    seed: int = 1234
    task_batch_size: str = "auto"

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit is {self.limit}: expected the rows of a task, 1 or more; all without it")
        if self.fewshot is not None and self.fewshot < 0:
            raise ValueError(f"fewshot is {self.fewshot}: expected a number of examples, 0 or more")
        if self.task_batch_size != "auto" and not (self.task_batch_size.isdecimal() and int(self.task_batch_size)):
            raise ValueError(
                f"task_batch_size is {self.task_batch_size!r}: expected auto or a whole number of at least 1"
            )
