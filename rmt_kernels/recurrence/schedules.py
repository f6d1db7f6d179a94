"""Numbers that change while training: of segments, or of the tokens in one. Functions of the step, without state.

Equal on every process and after a restart, because they depend on the step (and a seed) alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rmt_kernels.recurrence.checks import at_least

__all__ = ["Curriculum", "RandomNumber"]

Schedule = Callable[[int], int]


@dataclass(frozen=True)
class Curriculum:
    """A number that grows in stages, as the segments in arXiv 2304.11062, section 4.

    ``Curriculum([(0, 1), (1000, 2), (3000, 4)])(step)`` is 1 before step 1000, then 2, and 4 from step 3000 on.

    Args:
        stages: ``(first step, value)``; the first begins at step 0, steps grow, values are at least 1.

    Raises:
        TypeError, ValueError: stages that are not accepted.
    """

    stages: Sequence[tuple[int, int]]

    def __post_init__(self) -> None:
        stages = tuple((step, value) for step, value in self.stages)
        steps = [step for step, _ in stages]
        if not stages or steps[0] != 0 or steps != sorted(set(steps)):
            raise ValueError(f"stages must begin at step 0 and have growing steps, got {list(self.stages)}")
        for _, value in stages:
            at_least("a stage's value", value, 1)
        object.__setattr__(self, "stages", stages)

    def __call__(self, step: int) -> int:
        """The value at a step, counted from 0."""
        if step < 0:
            raise ValueError(f"step must be at least 0, got {step}")
        return next(value for first, value in reversed(self.stages) if first <= step)


@dataclass(frozen=True)
class RandomNumber:
    """A number drawn evenly from ``low`` to ``high``, both included, anew at each step.

    ``RandomNumber(1, Curriculum(...))`` draws up to a bound that grows. The draw depends on the step and the seed and
    touches no generator, so all processes of a run agree, and a resumed run goes on with the same numbers.

    Raises:
        TypeError, ValueError: an argument that is not accepted.
    """

    low: int | Schedule
    high: int | Schedule
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in (("low", self.low), ("high", self.high)):
            if not callable(value):
                at_least(name, value, 1)
        if isinstance(self.low, int) and isinstance(self.high, int) and self.high < self.low:
            raise ValueError(f"high must be at least low, {self.low}, got {self.high}")

    def __call__(self, step: int) -> int:
        """The value at a step, counted from 0."""
        if step < 0:
            raise ValueError(f"step must be at least 0, got {step}")
        low, high = (bound(step) if callable(bound) else bound for bound in (self.low, self.high))
        if high < low:
            raise ValueError(f"high must be at least low, {low} at step {step}, got {high}")
        return random.Random(f"{self.seed} {step}").randint(low, high)
