"""What a measurement must reach, and whether it did."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.tables import Table

__all__ = ["Goal", "goal_table"]


@dataclass(frozen=True)
class Goal:
    """A sentence with a bound, and what was measured for each case that it speaks of: ``{case: value or None}``."""

    what: str
    bound: float
    values: dict[str, float | None]
    at_most: bool = False
    unit: str = "x"
    optional: bool = False

    def met(self, value: float) -> bool:
        """Whether one value reaches the bound."""
        return value <= self.bound if self.at_most else value >= self.bound

    @property
    def worst(self) -> tuple[str, float] | None:
        """The case farthest from the bound, None where nothing was measured."""
        known = [(value, case) for case, value in self.values.items() if value is not None]
        if not known:
            return None
        value, case = max(known) if self.at_most else min(known)
        return case, value

    @property
    def verdict(self) -> str:
        """ "reached", "missed", "not measured", or "partly measured" where all that was measured reaches it."""
        known = [value for value in self.values.values() if value is not None]
        if not known:
            return "not measured"
        if not all(self.met(value) for value in known):
            return "missed"
        return "reached" if len(known) == len(self.values) else "partly measured"

    @property
    def counts(self) -> tuple[int, int, int]:
        """Cases that reach it, cases that were measured, cases."""
        known = [value for value in self.values.values() if value is not None]
        return sum(map(self.met, known)), len(known), len(self.values)


def goal_table(title: str, goals: Iterable[Goal], beyond: str) -> Table:
    """Each goal, what was measured, and whether it is reached; ``beyond``: what an optional one is that is not."""
    rows = []
    for goal in goals:
        for case, value in goal.values.items():
            verdict = "not measured" if value is None else "reached" if goal.met(value) else "missed"
            rows.append([
                goal.what, case, "-" if value is None else _value(goal, value),
                f"{'≤' if goal.at_most else '≥'} {_value(goal, goal.bound)}",
                beyond if goal.optional and verdict == "missed" else verdict,
            ])  # fmt: skip
    return Table(title, ["what", "of", "measured", "wanted", ""], rows)


def _value(goal: Goal, value: float) -> str:
    if goal.unit == "x":
        return f"{value:.2f}x" if value < 10 else f"{value:.1f}x"
    return f"{value:.2f}{goal.unit}" if goal.bound < 10 else f"{value:.1f}{goal.unit}"
