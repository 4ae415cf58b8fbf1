"""Perplexity against size: one plan's sizes, scored in memory one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from lowrank_pl.evaluate.likelihood import Score, check_sequences, excess_nats, perplexity
from lowrank_pl.factors.compression import compressed
from lowrank_pl.factors.store import FactorStore
from lowrank_pl.plans.plan import RankPlan
from lowrank_pl.utils.formatting import table

__all__ = ["KEEPS", "Curve", "CurvePoint", "curve_plot", "curve_table", "score_curve"]

KEEPS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
"""Sizes of a curve for which none were named."""


@dataclass(frozen=True)
class CurvePoint:
    """What one size scored.

    Args:
        plan: The plan of this size.
        score: Its score.
        excess: Nats a token more than the dense model's.
        own: Whether it is the plan that the curve is of, in its own size.
    """

    plan: RankPlan
    score: Score
    excess: float
    own: bool

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as they go into JSON."""
        return {
            "keep": {"asked": self.plan.keep, "targeted": self.plan.keep_targeted, "model": self.plan.keep_model},
            "bytes": self.plan.bytes,
            "own": self.own,
            "excess": self.excess,
            **self.score.to_dict(),
        }


@dataclass(frozen=True)
class Curve:
    """The scores of one plan's sizes.

    Args:
        method: Who drew the plan.
        dense: Score of the dense model.
        points: Those of the sizes, largest first.
    """

    method: str
    dense: Score
    points: Sequence[CurvePoint]


def score_curve(
    model: PreTrainedModel,
    plan: RankPlan,
    sizes: Sequence[RankPlan],
    store: FactorStore,
    sequences: Tensor,
    *,
    batch_size: int = 1,
    dense: Score | None = None,
) -> Curve:
    """Return the scores of the dense ``model`` and of it at each of ``sizes``; it is dense again afterwards.

    Args:
        model: The dense base.
        plan: The plan that the sizes are of; scored at its own size where none of them is that.
        sizes: Other sizes of it (``lowrank_pl.plans.resize.nested``).
        store: The factors.
        sequences: ``[sequences, length]`` token ids.
        batch_size: Sequences in one forward pass.
        dense: Score of what ``model`` was before it was narrowed, where it was; by default it is scored itself.

    Raises:
        ValueError: Plan, store and model don't belong together, or logits are not finite; the size is named.
    """
    check_sequences(model, sequences, batch_size)
    if dense is None:
        dense = perplexity(model, sequences, batch_size=batch_size, progress="score dense")
    todo = [*sizes] if any(size.modules == plan.modules for size in sizes) else [*sizes, plan]
    points = []
    for size in tqdm(sorted(todo, key=lambda size: -size.kept_parameters), desc="sizes", unit="size"):
        score = dense
        if plan.left_out or len(size.dense_modules) < len(size.modules):
            with compressed(model, size, store):
                try:
                    score = perplexity(model, sequences, batch_size=batch_size, progress=f"score {size.keep:g}")
                except ValueError as error:
                    raise ValueError(f"at keep {size.keep:g}: {error}") from error
        points.append(CurvePoint(size, score, excess_nats(score, dense), size.modules == plan.modules))
    return Curve(plan.method, dense, points)


def curve_table(curve: Curve, *, fmt: str = "simple") -> str:
    """Return the curve as a table, the dense model first; a star marks the plan's own size.

    Args:
        curve: What was scored.
        fmt: A format of ``tabulate``.
    """
    head = ("keep asked", "kept targeted", "kept model", "MB", "perplexity", "excess nats")
    first = curve.points[0].plan
    body = [("dense", "100.00 %", "100.00 %", f"{first.dense_bytes / 1e6:,.1f}", _perplexity(curve.dense), "0.0000")]
    body += [
        (
            f"{point.plan.keep:g}{' *' if point.own else ''}",
            f"{100 * point.plan.keep_targeted:.2f} %",
            f"{100 * point.plan.keep_model:.2f} %",
            f"{point.plan.bytes / 1e6:,.1f}",
            _perplexity(point.score),
            f"{point.excess:.4f}",
        )
        for point in curve.points
    ]
    mark = "\n* the plan's own size" if any(point.own for point in curve.points) else ""
    return table(head, body, fmt) + mark


def curve_plot(curve: Curve, *, title: str | None = None) -> Figure:
    """Return a plot of the excess in nats against the kept fraction, perplexities beside the points.

    The figure belongs to no ``pyplot`` state. Sizes without a low-rank module are left out: the dense model's
    perplexity stands in the heading. The scale is logarithmic where all that is drawn lies above the dense model.

    Args:
        curve: What was scored.
        title: Heading; by default the method and the dense model's perplexity.
    """
    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    axes = figure.add_subplot()
    drawn = [point for point in curve.points if point.plan.keep_targeted < 1]
    kept = [100 * point.plan.keep_targeted for point in drawn]
    excess = [point.excess for point in drawn]
    axes.plot(kept, excess, marker="o", markersize=7, linewidth=2, color="C0")
    own = [(x, point) for x, point in zip(kept, drawn, strict=True) if point.own]
    for x, point in own:
        axes.plot([x], [point.excess], "o", markersize=13, color="none", markeredgecolor="C3", markeredgewidth=2)
        axes.plot([], [], "o", markersize=10, color="none", markeredgecolor="C3", label="the plan's own size")
    for x, point in zip(kept, drawn, strict=True):
        # To the right and above: the curve falls from left to right.
        axes.annotate(
            _perplexity(point.score), (x, point.excess), xytext=(7, 7), textcoords="offset points", fontsize=11
        )
    if drawn and min(excess) > 0:
        axes.set_yscale("log")
        # A label at every digit would overlap.
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
    axes.margins(x=0.18, y=0.15)
    axes.grid(visible=True, alpha=0.25)
    axes.set_xlabel("kept share of the targeted parameters, %", fontsize=12)
    axes.set_ylabel("nats a token above the dense model", fontsize=12)
    axes.tick_params(labelsize=11)
    heading = f"{curve.method} by size; the numbers are perplexities, dense {_perplexity(curve.dense)}"
    axes.set_title(title or heading, fontsize=12)
    if own:
        axes.legend(frameon=False, fontsize=11)
    return figure


def _perplexity(score: Score) -> str:
    return f"{score.perplexity:.2f}" if score.perplexity < 1e4 else f"{score.perplexity:.1e}".replace("e+0", "e")
