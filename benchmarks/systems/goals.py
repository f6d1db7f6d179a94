"""What the tables must show, and whether they do."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks.tables import Table

__all__ = ["Goal", "differences", "goal_table", "interval"]

# Student's t at 97.5 %, by degrees of freedom; beyond the last the next smaller one is taken: a little too wide.
_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 14: 2.145, 19: 2.093}


def interval(values: Iterable[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % t-interval (NaN for one value)."""
    found = list(values)
    if len(found) < 2:
        return statistics.mean(found), math.nan
    t = _T[max(degrees for degrees in _T if degrees < len(found))]
    return statistics.mean(found), t * statistics.stdev(found) / math.sqrt(len(found))


def differences(first: Iterable[float | None], second: Iterable[float | None]) -> tuple[float | None, ...]:
    """First less second, seed by seed: what the seeds have in common cancels."""
    return tuple(None if a is None or b is None else a - b for a, b in zip(first, second, strict=True))


@dataclass(frozen=True)
class Goal:
    """A sentence with a bound, and a value for each seed; None: not measured.

    by: ``"each"``: every seed's value must reach the bound; ``"mean"``: their mean.
    """

    what: str
    values: tuple[float | None, ...]
    bound: float
    at_most: bool = False
    by: str = "each"
    strict: bool = False  # the bound itself is not enough
    paired: bool = False  # values are differences: the mean is told with its interval
    digits: int = 3

    @property
    def judged(self) -> float | None:
        """The value held against the bound: the worst seed's, or the mean."""
        known = [value for value in self.values if value is not None]
        if not known or len(known) < len(self.values):
            return None
        return statistics.mean(known) if self.by == "mean" else max(known) if self.at_most else min(known)

    @property
    def verdict(self) -> str:
        """ "reached", "missed", or "not measured" where a seed's value is missing."""
        value = self.judged
        if value is None:
            return "not measured"
        met = value <= self.bound if self.at_most else value >= self.bound
        return "reached" if met and not (self.strict and value == self.bound) else "missed"

    @property
    def measured(self) -> str:
        """The values in words."""
        known = [value for value in self.values if value is not None]
        if not known:
            return "-"
        mean, half = interval(known)
        low, high = (f"{bound:.{self.digits}f}" for bound in (min(known), max(known)))
        if len(known) == 1:
            return low
        if self.paired:
            return f"{mean:.{self.digits}f} ± {half:.{self.digits}f} ({low} … {high})"
        return f"{mean:.{self.digits}f} ({low} … {high})"

    @property
    def wanted(self) -> str:
        """The bound in words."""
        sign = ("<" if self.strict else "≤") if self.at_most else (">" if self.strict else "≥")
        bound = f"{self.bound:.{self.digits}f}" if self.bound else "0"
        return f"{sign} {bound}, {'mean' if self.by == 'mean' else 'each seed'}"


def goal_table(goals: Sequence[Goal]) -> Table:
    """Each goal, what was measured, and whether it is reached."""
    rows = [[goal.what, goal.measured, goal.wanted, goal.verdict] for goal in goals]
    return Table(
        "Goals", ["what", "measured: mean (lowest … highest seed)", "wanted", ""], rows,
        "± is half the width of a 95 % t-interval over seeds of paired differences." if any(g.paired for g in goals)
        else "",
    )  # fmt: skip
