"""The result of ``lowrank doctor``: all findings on a folder, and samples of the model's text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from lowrank_pl.utils.formatting import table

__all__ = ["Diagnosis", "Finding", "Health", "Sample", "first_few"]

Health = Literal["healthy", "warning", "broken"]
"""From good to bad: a broken model must not be used; a person decides on warnings."""

NAMED = 3
"""Number of modules or tensors named in a sentence; the figures have all of them."""


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Args:
        name: Name of the check.
        health: How bad the result is.
        message: What was found.
        figures: Measurements and complete lists of names, as JSON values.
        advice: What to do; empty if healthy.
    """

    name: str
    health: Health
    message: str
    figures: Mapping[str, Any] = field(default_factory=dict)
    advice: str = ""

    @property
    def sentence(self) -> str:
        """The message and the advice."""
        return f"{self.message}; {self.advice}" if self.advice else self.message


def first_few(names: Sequence[str]) -> str:
    """Return the first few names and the number of the others, for a sentence.

    >>> first_few(["a", "b", "c", "d", "e"])
    'a, b, c and 2 more'
    """
    rest = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {rest} more" if rest > 0 else "")


@dataclass(frozen=True)
class Sample:
    """A prompt with its greedy continuations by both models.

    Args:
        prompt: The prompt.
        model: Continuation by the examined model.
        dense: Continuation by the dense model; None if there is no dense model.
    """

    prompt: str
    model: str
    dense: str | None = None

    def text(self) -> str:
        """Return the prompt and its continuations, each in a line."""
        dense = [] if self.dense is None else [f"  before  {self.dense!r}"]
        return "\n".join([f"prompt    {self.prompt!r}", *dense, f"  {'after' if dense else 'model'}   {self.model!r}"])


@dataclass(frozen=True)
class Diagnosis:
    """All findings on one folder.

    Args:
        directory: The folder.
        findings: One finding a check, in the order of the checks.
        samples: Continuations of prompts by the examined and by the dense model.
        protocol: Text, number of sequences and length that the model was scored on; empty if it was not scored.

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
        """The worst health of all findings; ``healthy`` without findings."""
        order = get_args(Health)
        return max((finding.health for finding in self.findings), key=order.index, default="healthy")

    def named(self, health: Health) -> list[Finding]:
        """Return the findings with this health."""
        return [finding for finding in self.findings if finding.health == health]

    def text(self) -> str:
        """Return the samples and the table of findings, for a terminal."""
        body = [(finding.name, finding.health, finding.sentence) for finding in self.findings]
        shown = table(("check", "health", "found"), body, "simple", align=("left",) * 3)
        return "\n\n".join([*(sample.text() for sample in self.samples), shown])

    def sentence(self) -> str:
        """Return the verdict: healthy, with or without warnings, or broken, with the first defect."""
        broken, warnings = self.named("broken"), self.named("warning")
        if broken:
            more = "" if len(broken) == 1 else f" (and {', '.join(finding.name for finding in broken[1:])})"
            return f"{self.directory} is broken: {broken[0].name}{more}: {broken[0].sentence}"
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
        """Return the diagnosis that ``to_dict`` wrote, with each finding's advice in its message.

        Raises:
            ValueError: A health is unknown.
            KeyError: An entry is missing.
        """
        findings = []
        for name, found in values["findings"].items():
            # Older files call a broken model "sick".
            health: Any = "broken" if found["health"] == "sick" else found["health"]
            if health not in get_args(Health):
                raise ValueError(f"{name} has the health {health!r}: expected one of {', '.join(get_args(Health))}")
            figures = {key: value for key, value in found.items() if key not in ("health", "said")}
            findings.append(Finding(name, health, found["said"], figures))
        samples = [Sample(**sample) for sample in values.get("samples", ())]
        return cls(values["directory"], findings, samples, values.get("protocol", {}))
