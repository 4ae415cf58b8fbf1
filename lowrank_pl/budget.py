"""What a rank costs, and how wished-for ranks become whole ones that meet a budget."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from lowrank_pl.plan import ModulePlan, RankPlan

__all__ = ["Budget", "break_even", "factored_cost", "parameter_ratio"]

_log = logging.getLogger(__name__)
_BOUNDLESS = 1e6
Shape = tuple[int, int]


def factored_cost(shape: Shape, rank: int) -> int:
    """Return the parameters of ``rank`` components of a map of ``shape`` ``(out, in)``.

    >>> factored_cost((10, 20), 3)
    90
    """
    return rank * sum(shape)


def break_even(shape: Shape) -> int:
    """Return the largest rank whose factors are smaller than the dense weight; 0 if there is none.

    >>> break_even((10, 20)), break_even((1, 5))
    (6, 0)
    """
    out_features, in_features = shape
    return (out_features * in_features - 1) // (out_features + in_features)


def parameter_ratio(shape: Shape, rank: float) -> float:
    """Return the parameters of ``rank`` components as a fraction of the dense weight's."""
    return rank * sum(shape) / (shape[0] * shape[1])


@dataclass(frozen=True)
class Budget:
    """How many parameters a model's targeted modules may keep, and which ranks each may take.

    Args:
        keep: Fraction of the targeted parameters to keep, in (0, 1].
        shapes: ``(out, in)`` of every targeted module by name, in the model's order.
        model_parameters: Parameters of the whole dense model.
        bytes_per_parameter: Bytes of one stored number.
        multiple_of: Every rank is a multiple of this; modules too small for one multiple stay dense.
        floors: Least kept fraction by glob on the module's name; 1.0 keeps the matching modules dense.

    Raises:
        ValueError: ``keep`` outside (0, 1], a floor outside [0, 1] or matching nothing, or floors above ``keep``.

    Example:
        >>> budget = Budget(keep=0.5, shapes={"a": (8, 8), "b": (8, 8)}, model_parameters=128)
        >>> plan = budget.fit({"a": 3.0, "b": 1.0}, method="hand")
        >>> [module.rank for module in plan.modules.values()], plan.keep_targeted
        ([3, 1], 0.5)
    """

    keep: float
    shapes: Mapping[str, Shape]
    model_parameters: int
    bytes_per_parameter: int = 4
    multiple_of: int = 1
    floors: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_keep(self.keep)
        if self.multiple_of < 1:
            raise ValueError(f"multiple_of is {self.multiple_of}: expected a whole number of at least 1")
        for pattern, floor in self.floors.items():
            if not 0 <= floor <= 1:
                raise ValueError(f"the floor of {pattern!r} is {floor}: expected a fraction in [0, 1]")
            if not any(fnmatchcase(name, pattern) for name in self.shapes):
                raise ValueError(f"the floor pattern {pattern!r} matches none of the {len(self.shapes)} modules")
        least = sum(self.cost(name, self.least_rank(name)) for name in self.shapes)
        if least > self.limit:
            raise ValueError(
                f"keep {self.keep} allows {self.limit:,} parameters, but the floors and multiple_of "
                f"{self.multiple_of} need at least {least:,} (keep {least / self.total:.4f}): raise keep or lower them"
            )

    @property
    def total(self) -> int:
        """Parameters of the targeted modules before."""
        return sum(m * n for m, n in self.shapes.values())

    @property
    def limit(self) -> int:
        """Parameters that the targeted modules may keep."""
        # The small addend undoes the rounding of products such as 0.7 * 10 == 7.000000000000001 or 6.999...
        return min(self.total, math.floor(self.keep * self.total + 1e-6))

    def cost(self, name: str, rank: int | None) -> int:
        """Return the parameters of module ``name`` at ``rank``; ``None`` is dense."""
        shape = self.shapes[name]
        return shape[0] * shape[1] if rank is None else factored_cost(shape, rank)

    def top_rank(self, name: str) -> int:
        """Return the largest allowed rank of ``name`` below dense; 0 where only dense is left."""
        return break_even(self.shapes[name]) // self.multiple_of * self.multiple_of

    def least_rank(self, name: str) -> int | None:
        """Return the smallest allowed rank of ``name``; ``None`` where it must stay dense."""
        floor = max((f for pattern, f in self.floors.items() if fnmatchcase(name, pattern)), default=0.0)
        m, n = self.shapes[name]
        wanted = max(1, math.ceil(floor * m * n / (m + n) - 1e-9))
        rank = math.ceil(wanted / self.multiple_of) * self.multiple_of
        return rank if floor < 1 and rank <= self.top_rank(name) else None

    def next_rank(self, name: str, rank: int) -> int | None:
        """Return the allowed size one step above ``rank``; ``None`` is dense."""
        return rank + self.multiple_of if rank + self.multiple_of <= self.top_rank(name) else None

    def snap(self, name: str, rank: float) -> int | None:
        """Return the largest allowed size not above ``rank``; at or above break-even that is dense (``None``)."""
        least, (m, n) = self.least_rank(name), self.shapes[name]
        if least is None or rank * (m + n) >= m * n:
            return None
        return min(max(least, int(rank) // self.multiple_of * self.multiple_of), self.top_rank(name))

    def fit(self, wishes: Mapping[str, float], *, method: str, scale_up: bool = True) -> RankPlan:
        """Return the plan nearest to the wished ranks that meets the budget to within one rank step.

        Finite wishes are scaled by one common factor (ARA's rule) and rounded down to allowed ranks; what is left is
        given out step by step, largest rounding loss first, until no further step of any module fits.

        Args:
            wishes: A real rank for every module; ``math.inf`` asks for dense and is not scaled.
            method: Name of whoever made the wishes.
            scale_up: Whether the factor may exceed 1, so that the budget is spent in full.

        Raises:
            ValueError: A module without a wish, a wish for no module, or one that is negative or NaN.
        """
        self._check_wishes(wishes)
        notes = [f"{name}: too small for a rank of {self.multiple_of}, left dense" for name in self._too_small()]
        wishes = dict(wishes)
        if self._spent(self._scaled(wishes, 0.0)) > self.limit:
            wishes, dropped = self._without_dense_wishes(wishes)
            notes.append(f"{dropped} modules were wished dense, which the budget does not allow: scaled like the rest")
        factor = self._largest_factor(wishes, most=math.inf if scale_up else 1.0)
        ranks = self._scaled(wishes, factor)
        if scale_up:
            self._spend_rest(ranks, {name: factor * wish for name, wish in wishes.items()})
        # Where even boundless scaling meets the budget everything has come out dense, and the factor says nothing.
        if factor < _BOUNDLESS:
            notes.append(f"wished ranks scaled by {factor:.4f} to meet keep {self.keep}")
        for note in notes:
            _log.info("%s: %s", method, note)
        return RankPlan(
            method=method,
            keep=self.keep,
            modules={name: ModulePlan(self.shapes[name], ranks[name]) for name in self.shapes},
            model_parameters=self.model_parameters,
            bytes_per_parameter=self.bytes_per_parameter,
            notes=tuple(notes),
        )

    def _check_wishes(self, wishes: Mapping[str, float]) -> None:
        missing = [name for name in self.shapes if name not in wishes]
        if missing:
            raise ValueError(f"no rank is wished for {missing[0]} and {len(missing) - 1} more: expected one a module")
        for name, wish in wishes.items():
            if name not in self.shapes:
                raise ValueError(f"a rank is wished for {name}, which is none of the {len(self.shapes)} modules")
            if math.isnan(wish) or wish < 0:
                raise ValueError(f"the rank wished for {name} is {wish}: expected a number of at least 0")

    def _too_small(self) -> Iterator[str]:
        return (name for name in self.shapes if self.top_rank(name) == 0)

    def _scaled(self, wishes: Mapping[str, float], factor: float) -> dict[str, int | None]:
        # inf * 0 is NaN, so dense wishes are kept out of the product.
        return {name: self.snap(name, w if math.isinf(w) else w * factor) for name, w in wishes.items()}

    def _spent(self, ranks: Mapping[str, int | None]) -> int:
        return sum(self.cost(name, rank) for name, rank in ranks.items())

    def _without_dense_wishes(self, wishes: Mapping[str, float]) -> tuple[dict[str, float], int]:
        even = {n: m * k / (m + k) for n, (m, k) in self.shapes.items()}
        dropped = sum(math.isinf(wish) for wish in wishes.values())
        return {name: even[name] if math.isinf(wish) else wish for name, wish in wishes.items()}, dropped

    def _largest_factor(self, wishes: Mapping[str, float], *, most: float) -> float:
        """Return the largest common factor at which the wishes, rounded down, still meet the budget."""
        low, high = 0.0, min(1.0, most)
        while high < min(most, _BOUNDLESS) and self._spent(self._scaled(wishes, high)) <= self.limit:
            low, high = high, high * 2
        if self._spent(self._scaled(wishes, high)) <= self.limit:
            return high
        for _ in range(60):
            middle = (low + high) / 2
            fits = self._spent(self._scaled(wishes, middle)) <= self.limit
            low, high = (middle, high) if fits else (low, middle)
        return low

    def _spend_rest(self, ranks: dict[str, int | None], exact: Mapping[str, float]) -> None:
        """Raise ranks in place, largest distance below the exact wish first, while a step fits."""
        rest = self.limit - self._spent(ranks)
        while True:
            steps = [
                (exact[name] - rank, name, self.cost(name, self.next_rank(name, rank)) - self.cost(name, rank))
                for name, rank in ranks.items()
                if rank is not None
            ]
            steps = [step for step in steps if step[2] <= rest]
            if not steps:
                return
            for _, name, price in sorted(steps, key=lambda step: -step[0]):
                rank = ranks[name]
                if price <= rest and rank is not None:
                    ranks[name] = self.next_rank(name, rank)
                    rest -= price


def check_keep(keep: float) -> None:
    """Check that ``keep`` is a fraction of parameters kept.

    Raises:
        ValueError: ``keep`` lies outside (0, 1].
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep is {keep}: expected the fraction of parameters to keep, above 0 and at most 1")
