"""Perplexity against size: several sizes of one plan, scored in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from lowrank_pl.evaluate.likelihood import Score, excess_nats, perplexity
from lowrank_pl.factors.compression import compressed
from lowrank_pl.factors.store import FactorStore
from lowrank_pl.models.sequences import check_sequences
from lowrank_pl.plans.plan import RankPlan
from lowrank_pl.utils.figures import plain
from lowrank_pl.utils.formatting import rounded_perplexity, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["KEEPS", "Curve", "CurvePoint", "curve_plot", "curve_table", "score_curve"]

KEEPS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
"""Default sizes of a curve."""


@dataclass(frozen=True)
class CurvePoint:
    """Score of one size.

    Args:
        plan: The plan of this size.
        score: Its score.
        excess: Negative log-likelihood above the dense model's, in nats per token.
        own: Whether it is the size that the plan was made for.
    """

    plan: RankPlan
    score: Score
    excess: float
    own: bool

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON values."""
        return {
            "keep": {"asked": self.plan.keep, "targeted": self.plan.keep_targeted, "model": self.plan.keep_model},
            "bytes": self.plan.bytes,
            "own": self.own,
            "excess": self.excess,
            **self.score.to_dict(),
        }


@dataclass(frozen=True)
class Curve:
    """Scores of several sizes of one plan.

    Args:
        method: Method of the plan.
        dense: Score of the dense model.
        points: Scores of the sizes, largest size first.
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
    """Return the scores of ``model`` when dense and at each of ``sizes``; it is dense again afterwards.

    Args:
        model: The dense base.
        plan: The plan; its own size is scored too.
        sizes: Other sizes of the plan (``lowrank_pl.plans.resize.nested``).
        store: The factors.
        sequences: ``[sequences, length]`` token ids.
        batch_size: Sequences per forward pass.
        dense: Score of the dense model, if ``model`` is a pruned base; by default ``model`` itself is scored.

    Raises:
        ValueError: Plan, store and model don't belong together, or logits are not finite; the message names the size.
    """
    check_sequences(model, sequences, batch_size)
    if dense is None:
        dense = perplexity(model, sequences, batch_size=batch_size, progress="score dense")
    todo = [*sizes] if any(size.modules == plan.modules for size in sizes) else [*sizes, plan]
    points = []
    for size in tqdm(sorted(todo, key=lambda size: -size.kept_parameters), desc="sizes", unit="size"):
        score = dense
        if plan.left_out or size.is_rounded or len(size.dense_modules) < len(size.modules):
            with compressed(model, size, store):
                try:
                    score = perplexity(model, sequences, batch_size=batch_size, progress=f"score {size.keep:g}")
                except ValueError as error:
                    raise ValueError(f"at keep {size.keep:g}: {error}") from error
        points.append(CurvePoint(size, score, excess_nats(score, dense), size.modules == plan.modules))
    return Curve(plan.method, dense, points)


def curve_table(curve: Curve, *, fmt: str = "simple") -> str:
    """Return the curve as a table, the dense model first; an asterisk marks the plan's own size.

    Args:
        curve: The scores.
        fmt: A format of ``tabulate``.
    """
    head = ("keep asked", "kept targeted", "kept model", "MB", "perplexity", "excess nats")
    first = curve.points[0].plan
    dense = rounded_perplexity(curve.dense.perplexity)
    body = [("dense", "100.00 %", "100.00 %", f"{first.dense_bytes / 1e6:,.1f}", dense, "0.0000")]
    body += [
        (
            f"{point.plan.keep:g}{' *' if point.own else ''}",
            f"{100 * point.plan.keep_targeted:.2f} %",
            f"{100 * point.plan.keep_model:.2f} %",
            f"{point.plan.bytes / 1e6:,.1f}",
            rounded_perplexity(point.score.perplexity),
            f"{point.excess:.4f}",
        )
        for point in curve.points
    ]
    mark = "\n* the plan's own size" if any(point.own for point in curve.points) else ""
    return table(head, body, fmt) + mark


def curve_plot(curve: Curve) -> Figure:
    """Return a plot of the excess in nats against the kept fraction, with perplexities beside the points.

    Sizes without a low-rank layer are not drawn; the dense model's perplexity is in the heading. The scale is
    logarithmic if every point lies above the dense model. The figure is not registered with ``pyplot``.

    Args:
        curve: The scores.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

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
        # To the upper right, where the falling curve leaves room.
        axes.annotate(
            rounded_perplexity(point.score.perplexity),
            (x, point.excess),
            xytext=(7, 7),
            textcoords="offset points",
            fontsize=11,
        )
    if drawn and min(excess) > 0:
        axes.set_yscale("log")
        # Labels at every digit would overlap.
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
    axes.margins(x=0.18, y=0.15)
    axes.grid(visible=True, alpha=0.25)
    axes.set_xlabel("kept fraction of the targeted parameters, %", fontsize=12)
    axes.set_ylabel("excess over the dense model, nats per token", fontsize=12)
    axes.tick_params(labelsize=11)
    heading = (
        f"{curve.method} by size, labelled with perplexities (dense: {rounded_perplexity(curve.dense.perplexity)})"
    )
    axes.set_title(plain(heading), fontsize=12)
    if own:
        axes.legend(frameon=False, fontsize=11)
    return figure
