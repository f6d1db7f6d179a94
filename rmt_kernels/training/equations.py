"""Quadratic equations and their solution, character by character (arXiv 2207.06881, section 4.1)."""

from __future__ import annotations

import functools
import zlib
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from rmt_kernels.training.tasks import ASK, PLACEHOLDER, Chance, Flags, Numbers, Recall, best_guess

__all__ = ["Quadratic", "equation", "solution"]

_CHARACTERS = "0123456789+-*/^=(),xD;"
_NOISE = "abcd"
_VOCABULARY = ("_", "?", *_CHARACTERS, *_NOISE)
_NUMBER = {name: number for number, name in enumerate(_VOCABULARY)}


def equation(a: int, high: int, low: int) -> str:
    """The equation with leading coefficient ``a`` and these roots, such as ``2*x^2-2*x-12=0``."""
    return f"{a}*x^2{-a * (high + low):+d}*x{a * high * low:+d}=0"


def solution(a: int, high: int, low: int, working: bool) -> str:
    """The roots, the higher first, such as ``x=3,x=-2;``, with ``working`` after the discriminant and the formula."""
    if not working:
        return f"x={high},x={low};"
    b, c, root = -a * (high + low), a * high * low, abs(a) * (high - low)
    first, second = (root, -root) if a > 0 else (-root, root)
    formulas = ",".join(f"x=({-b}{part:+d})/(2*{a})={x}" for part, x in ((first, high), (second, low)))
    return f"D={abs(b)}^2-4*{a}*{c}={root**2}={root}^2,{formulas};"


@dataclass(frozen=True)
class Quadratic(Recall):
    """An equation with whole roots, noise, and its solution.

    A tenth of all equations is held out: it comes in no batch for training.

    Args:
        roots: the largest absolute value of a root.
        leading: the largest absolute value of the leading coefficient, which isn't 0.
        working: the solution has the discriminant and the formula; otherwise the roots alone.
    """

    roots: int = 5
    leading: int = 1
    working: bool = False
    name: ClassVar[str] = "quadratic"

    def __post_init__(self) -> None:
        self._at_least(roots=2, leading=1)
        if not isinstance(self.working, bool):
            raise TypeError(f"working must be True or False, got {self.working!r}")

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """See :class:`Task`."""
        return _VOCABULARY

    @property
    def information(self) -> int:
        """See :class:`Recall`."""
        return int(self._tables(False)[0].shape[1])

    @property
    def answer(self) -> int:
        """See :class:`Recall`."""
        return 1 + int(self._tables(False)[1].shape[1])

    def samples(self, random: np.random.Generator, batch: int, held_out: bool) -> tuple[Numbers, Numbers, Flags]:
        """See :class:`Recall`."""
        equations, solutions = self._tables(held_out)
        chosen = random.integers(len(equations), size=batch)
        ending = np.concatenate([np.full((batch, 1), ASK), solutions[chosen]], axis=1)
        return equations[chosen], ending, (ending != ASK) & (ending != PLACEHOLDER)

    def between(self, random: np.random.Generator, batch: int, length: int, held_out: bool) -> Numbers:
        """See :class:`Recall`."""
        return len(_VOCABULARY) - len(_NOISE) + random.integers(len(_NOISE), size=(batch, length))

    def chance(self, causal: bool = True) -> Chance:
        """See :class:`Task`."""
        return best_guess((((), row[row != PLACEHOLDER].tolist()) for row in self._tables(True)[1]), causal)

    def _tables(self, held_out: bool) -> tuple[Numbers, Numbers]:
        return _tables(self.roots, self.leading, self.working)[held_out]


@functools.lru_cache(maxsize=4)
def _tables(roots: int, leading: int, working: bool) -> tuple[tuple[Numbers, Numbers], tuple[Numbers, Numbers]]:
    """For training and held out: equations and solutions as token numbers, (number, longest), placeholders behind."""
    found: tuple[list[tuple[str, str]], list[tuple[str, str]]] = ([], [])
    for a in (a for a in range(-leading, leading + 1) if a):
        for high in range(-roots, roots + 1):
            for low in range(-roots, high + 1):
                asked = equation(a, high, low)
                found[zlib.crc32(asked.encode()) % 10 == 0].append((asked, solution(a, high, low, working)))
    widths = [max(len(pair[i]) for part in found for pair in part) for i in (0, 1)]
    train, held_out = (
        (_matrix([pair[0] for pair in part], widths[0]), _matrix([pair[1] for pair in part], widths[1]))
        for part in found
    )
    return train, held_out


def _matrix(texts: list[str], width: int) -> Numbers:
    rows = [[_NUMBER[c] for c in text] + [PLACEHOLDER] * (width - len(text)) for text in texts]
    return np.array(rows, dtype=np.int64)
