"""What ``lowrank doctor`` shows: all findings on a folder, and what the model says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from lowrank_pl.utils.formatting import table

__all__ = ["Diagnosis", "Finding", "Health", "Sample", "first_few"]

Health = Literal["healthy", "warning", "sick"]
"""From good to bad; a sick model must not be used, a warning is for a person to weigh."""

NAMED = 3
"""Modules or tensors named in a sentence; the figures have all."""


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Args:
        name: The check.
        health: How bad it is.
        said: What was found.
        figures: What was measured or is named in full, as JSON values.
        advice: What to do, unless it is healthy.
    """

    name: str
    health: Health
    said: str
    figures: Mapping[str, Any] = field(default_factory=dict)
    advice: str = ""

    @property
    def sentence(self) -> str:
        """What was found and what to do."""
        return f"{self.said}; {self.advice}" if self.advice else self.said


def first_few(names: Sequence[str]) -> str:
    """Return the first few names, and how many more there are, for a sentence.

    >>> first_few(["a", "b", "c", "d", "e"])
    'a, b, c and 2 more'
    """
    rest = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {rest} more" if rest > 0 else "")


@dataclass(frozen=True)
class Sample:
    """A prompt and its greedy continuations side by side.

    Args:
        prompt: What was given.
        model: What the examined model added.
        dense: What the dense one added; None where there is none.
    """

    prompt: str
    model: str
    dense: str | None = None

    def text(self) -> str:
        """Return the three in lines under each other."""
        dense = [] if self.dense is None else [f"  before  {self.dense!r}"]
        return "\n".join([f"prompt    {self.prompt!r}", *dense, f"  {'after' if dense else 'model'}   {self.model!r}"])


@dataclass(frozen=True)
class Diagnosis:
    """All findings on one folder.

    Args:
        directory: The folder.
        findings: One a check, in the order in which they were made.
        samples: What the model says, beside the dense one.
        protocol: Text, sequences and length that it was scored on, if it came to that.

    Example:
        >>> found = Diagnosis("small", [Finding("weights", "healthy", "all 9 tensors are finite")])
        >>> found.health, found.sentence()
        ('healthy', 'small is healthy: 1 check passed')
    """

    directory: str
    findings: Sequence[Finding]
    samples: Sequence[Sample] = ()
    protocol: Mapping[str, Any] = field(default_factory=dict)

    @property
    def health(self) -> Health:
        """The worst of the findings; ``healthy`` where there is none."""
        order = get_args(Health)
        return max((finding.health for finding in self.findings), key=order.index, default="healthy")

    def named(self, health: Health) -> list[Finding]:
        """Return the findings that are just so bad."""
        return [finding for finding in self.findings if finding.health == health]

    def text(self) -> str:
        """Return the samples and the table of findings, for a terminal."""
        body = [(finding.name, finding.health, finding.sentence) for finding in self.findings]
        shown = table(("check", "health", "found"), body, "simple", align=("left",) * 3)
        return "\n\n".join([*(sample.text() for sample in self.samples), shown])

    def sentence(self) -> str:
        """Return the verdict: healthy, with or without warnings, or sick and of what."""
        sick, warnings = self.named("sick"), self.named("warning")
        if sick:
            more = "" if len(sick) == 1 else f" (and {', '.join(finding.name for finding in sick[1:])})"
            return f"{self.directory} is sick: {sick[0].name}{more}: {sick[0].sentence}"
        count = len(self.findings)
        passed = f"{count} check{'s' if count != 1 else ''} passed"
        with_warnings = f", with warnings on {', '.join(finding.name for finding in warnings)}" if warnings else ""
        return f"{self.directory} is healthy: {passed}{with_warnings}"

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {
            "directory": self.directory,
            "health": self.health,
            "findings": {
                finding.name: {"health": finding.health, "said": finding.sentence, **finding.figures}
                for finding in self.findings
            },
            "samples": [asdict(sample) for sample in self.samples],
            "protocol": dict(self.protocol),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Diagnosis:
        """Return the diagnosis that ``to_dict`` gave, each finding's advice in its sentence.

        Raises:
            ValueError: A health that there is not.
            KeyError: Something is missing.
        """
        findings = []
        for name, found in values["findings"].items():
            if found["health"] not in get_args(Health):
                raise ValueError(f"{name} has the health {found['health']!r}: expected one of {get_args(Health)}")
            figures = {key: value for key, value in found.items() if key not in ("health", "said")}
            findings.append(Finding(name, found["health"], found["said"], figures))
        samples = [Sample(**sample) for sample in values.get("samples", ())]
        return cls(values["directory"], findings, samples, values.get("protocol", {}))
