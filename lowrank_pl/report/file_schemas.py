"""Schemas of the files that runs and comparisons read again. Only their readers import them: pydantic is slow."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

__all__ = ["ComparisonFile", "SummaryFile"]

Figure = float | None
# The default of fields that may be absent, but not null.
ABSENT: Any = Field(default=None)


class _Open(BaseModel):
    """A part that may hold more; only what is read again is checked."""

    model_config = ConfigDict(extra="allow")


class _Scored(_Open):
    text: str = ""
    windows: int = 0
    length: int = 0


class _Machine(_Open):
    accelerator: str | None = None
    processor: str | None = None


def _date(value: str) -> str:
    datetime.fromisoformat(value)
    return value


class _Facts(_Open):
    """What a run records besides its scores."""

    command: str = ""
    date: Annotated[str, AfterValidator(_date)] = ABSENT
    machine: _Machine = ABSENT
    protocol: _Scored = ABSENT
    samples: list[Annotated[list[str], Field(min_length=3, max_length=3)]] = ABSENT
    tokens_per_second: dict[str, float] = ABSENT
    verified: bool | None = ABSENT
    versions: dict[str, str] = ABSENT


class _Figures(BaseModel):
    """The figures of one model in ``summary.json``; null marks a figure that was not measured."""

    model_config = ConfigDict(extra="forbid")

    perplexity: Figure = None
    excess_nats: Figure = None
    kept_targeted: Figure = None
    kept_model: Figure = None
    bytes: int | None = None
    seconds: Figure = None
    bits: list[int] | None = None
    memory: int | None = None


class SummaryFile(BaseModel):
    """``summary.json``: ``facts``, and figures by name of the model."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, _Figures]

    facts: _Facts = ABSENT


class _Keep(_Open):
    asked: float
    targeted: float
    model: float


class _Row(_Open):
    method: str
    keep: _Keep
    excess: dict[str, float]
    perplexity: dict[str, float]
    seconds: dict[str, Figure]
    bytes: int
    peak_memory: int
    identity: str = ""
    machine: _Machine = ABSENT


def _of_same_texts(rows: list[_Row]) -> list[_Row]:
    for row in rows:
        if not row.excess.keys() == row.perplexity.keys() == rows[0].excess.keys():
            raise ValueError(f"{row.method} at keep {row.keep.asked:g} is not scored on the texts of the first row")
    return rows


ComparisonFile = Annotated[list[_Row], AfterValidator(_of_same_texts)]
"""``results.json`` of a comparison."""
