"""Facts in noise, to be remembered: the three tasks of arXiv 2304.11062, section 3, in words.

Facts and questions are bAbI's (its first task, and the fourth for two facts); noise is Python's documentation.
"""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from rmt_kernels.training.corpora import common_words, documentation, fingerprint
from rmt_kernels.training.tasks import Chance, Flags, Numbers, Recall, best_guess

__all__ = ["Detect", "Reasoning", "Remember"]

_NAMES = ("daniel", "john", "mary", "sandra")
_PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
_DIRECTIONS = ("north", "south", "east", "west")
_WORDS = ("went", "moved", "walked", "ran", "to", "the", "where", "is", "what", "of")
_OWN = ("_", "?", *_NAMES, *_PLACES, *_DIRECTIONS, *_WORDS)
_NUMBER = {word: number for number, word in enumerate(_OWN)}
_RESERVED = frozenset(_OWN)  # never in the noise, so that each word has one number


@dataclass(frozen=True)
class Facts(Recall):
    """Facts and a question; one word answers it.

    Args:
        words: how many of the documentation's most frequent words the noise keeps; others are one and the same.
    """

    words: int = 100

    def __post_init__(self) -> None:
        self._at_least(words=1)

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """See :class:`Task`."""
        known, _ = common_words(self.words, _RESERVED, False)
        return (*_OWN, *known, *(f"<word {i}>" for i in range(self.words - len(known))), "<other>")

    @property
    @abstractmethod
    def stories(self) -> Sequence[tuple[tuple[str, ...], str, str]]:
        """Every ``(facts, question, answer)``, each equally likely; all facts have the same length."""

    @property
    def facts(self) -> int:
        """How many facts a sample has."""
        return len(self.stories[0][0])

    @property
    def information(self) -> int:
        """See :class:`Recall`."""
        return sum(len(fact.split()) for fact in self.stories[0][0])

    @property
    def answer(self) -> int:
        """See :class:`Recall`."""
        return len(self.stories[0][1].split()) + 1

    def samples(self, random: np.random.Generator, batch: int, held_out: bool) -> tuple[Numbers, Numbers, Flags]:
        """See :class:`Recall`."""
        chosen = [self.stories[i] for i in random.integers(len(self.stories), size=batch)]
        information = np.array([[_NUMBER[word] for fact in facts for word in fact.split()] for facts, _, _ in chosen])
        ending = np.array([[_NUMBER[word] for word in (*asked.split(), answer)] for _, asked, answer in chosen])
        return information, ending, np.broadcast_to(np.arange(ending.shape[1]) == ending.shape[1] - 1, ending.shape)

    def between(self, random: np.random.Generator, batch: int, length: int, held_out: bool) -> Numbers:
        """See :class:`Recall`."""
        _, text = common_words(self.words, _RESERVED, held_out)
        starts = random.integers(len(text), size=(batch, 1))
        return len(_OWN) + np.take(text, starts + np.arange(length), mode="wrap")

    def chance(self, causal: bool = True) -> Chance:
        """See :class:`Task`."""
        return best_guess(((asked, (answer,)) for _, asked, answer in self.stories), causal)

    def fingerprint(self) -> str:
        """See :class:`Task`."""
        return fingerprint(documentation(False), documentation(True))


@dataclass(frozen=True)
class Remember(Facts):
    """A fact at the start. Options as of :class:`Facts`."""

    name: ClassVar[str] = "remember"

    @property
    def stories(self) -> Sequence[tuple[tuple[str, ...], str, str]]:
        """See :class:`Facts`."""
        return _WHERE


@dataclass(frozen=True)
class Detect(Remember):
    """A fact anywhere before the segment with the question. Options as of :class:`Facts`."""

    name: ClassVar[str] = "detect"

    def place(self, random: np.random.Generator, ids: Numbers, information: Numbers, free: int) -> None:
        """See :class:`Recall`."""
        _scatter(random, ids, information[:, None], free)


@dataclass(frozen=True)
class Reasoning(Facts):
    """Two facts anywhere before the segment with the question, which needs one of them.

    Options as of :class:`Facts`.
    """

    name: ClassVar[str] = "reasoning"

    @property
    def stories(self) -> Sequence[tuple[tuple[str, ...], str, str]]:
        """See :class:`Facts`."""
        return _BESIDE

    def place(self, random: np.random.Generator, ids: Numbers, information: Numbers, free: int) -> None:
        """See :class:`Recall`."""
        facts = information.reshape(len(ids), 2, -1)
        swapped = random.random(len(ids)) < 0.5
        facts[swapped] = facts[swapped, ::-1]
        _scatter(random, ids, facts, free)


def _scatter(random: np.random.Generator, ids: Numbers, facts: Numbers, free: int) -> None:
    """Put facts (batch, number, length) into the first ``free`` columns, in order, anywhere without overlap."""
    batch, number, length = facts.shape
    # Places among what is left when every fact takes up no room, evenly; each then moves on by the facts before it.
    gaps = np.sort(random.integers(free - number * length + 1, size=(batch, number)), axis=1)
    starts = gaps + length * np.arange(number)
    columns = (starts[:, :, None] + np.arange(length)).reshape(batch, -1)
    np.put_along_axis(ids, columns, facts.reshape(batch, -1), axis=1)


_WHERE = tuple(
    ((f"{name} {went} to the {place}",), f"? where is {name}", place)
    for name, went, place in itertools.product(_NAMES, ("went", "moved", "walked", "ran"), _PLACES)
)
_BESIDE = tuple(
    ((f"{first} is {way} of {middle}", f"{middle} is {way} of {last}"), *asked)
    for (first, middle, last), way in itertools.product(itertools.permutations(_PLACES, 3), _DIRECTIONS)
    for asked in ((f"? what is {way} of {middle}", first), (f"? what is {middle} {way} of", last))
)
