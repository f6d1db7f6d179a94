"""Copy, reverse and associative retrieval (arXiv 2207.06881, section 4.1), over symbols."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from rmt_kernels.training.tasks import ASK, Chance, Flags, Numbers, Recall, best_guess

__all__ = ["Associative", "Copy", "Reverse"]

_FIRST = 2  # after the placeholder and ASK


@dataclass(frozen=True)
class Copy(Recall):
    """A sequence, noise, and the sequence again.

    Args:
        length: of the sequence.
        alphabet: number of symbols in it, each equally likely.
        noise: number of symbols that the noise is made of, none of them in the alphabet.
    """

    length: int = 8
    alphabet: int = 16
    noise: int = 4
    name: ClassVar[str] = "copy"

    def __post_init__(self) -> None:
        self._at_least(length=1, alphabet=2, noise=1)

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """See :class:`Task`."""
        return (
            "_", "?", *(f"s{i}" for i in range(self.alphabet)), *(f"n{i}" for i in range(self.noise))
        )  # fmt: skip

    @property
    def information(self) -> int:
        """See :class:`Recall`."""
        return self.length

    @property
    def answer(self) -> int:
        """See :class:`Recall`."""
        return 1 + self.length

    def samples(self, random: np.random.Generator, batch: int, held_out: bool) -> tuple[Numbers, Numbers, Flags]:
        """See :class:`Recall`."""
        sequence = _FIRST + random.integers(self.alphabet, size=(batch, self.length))
        ask = np.full((batch, 1), ASK)
        ending = np.concatenate([ask, self.expected(sequence)], axis=1)
        return sequence, ending, ending != ASK

    def expected(self, sequence: Numbers) -> Numbers:
        """The answer to a sequence, (batch, length)."""
        return sequence

    def between(self, random: np.random.Generator, batch: int, length: int, held_out: bool) -> Numbers:
        """See :class:`Recall`."""
        return _FIRST + self.alphabet + random.integers(self.noise, size=(batch, length))

    def chance(self, causal: bool = True) -> Chance:
        """See :class:`Task`."""
        # Symbols are independent of one another, so one of them tells all.
        one = best_guess((((), (symbol,)) for symbol in range(self.alphabet)), causal)
        return Chance(one.token, one.answer**self.length)


@dataclass(frozen=True)
class Reverse(Copy):
    """A sequence, noise, and the sequence from its end to its start. Options as of :class:`Copy`."""

    name: ClassVar[str] = "reverse"

    def expected(self, sequence: Numbers) -> Numbers:
        """See :class:`Copy`."""
        return sequence[:, ::-1]


@dataclass(frozen=True)
class Associative(Recall):
    """Pairs of key and value, noise, and keys after each of which its value is to be told.

    Args:
        pairs: of key and value; their keys differ.
        queries: how many of the keys are asked for, in any order. 0: all.
        keys, values: number of symbols for each; values are equally likely.
        noise: number of symbols that the noise is made of.
    """

    pairs: int = 4
    queries: int = 0
    keys: int = 16
    values: int = 16
    noise: int = 4
    name: ClassVar[str] = "associative"

    def __post_init__(self) -> None:
        self._at_least(pairs=1, queries=0, keys=1, values=2, noise=1)
        if self.pairs > self.keys:
            raise ValueError(f"keys must be at least pairs, {self.pairs}, since they differ, got {self.keys}")
        if self.queries > self.pairs:
            raise ValueError(f"queries must be at most pairs, {self.pairs}, got {self.queries}")

    @property
    def asked(self) -> int:
        """How many keys are asked for."""
        return self.queries or self.pairs

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """See :class:`Task`."""
        return (
            "_", "?", *(f"k{i}" for i in range(self.keys)), *(f"v{i}" for i in range(self.values)),
            *(f"n{i}" for i in range(self.noise)),
        )  # fmt: skip

    @property
    def information(self) -> int:
        """See :class:`Recall`."""
        return 2 * self.pairs

    @property
    def answer(self) -> int:
        """See :class:`Recall`."""
        return 3 * self.asked

    def samples(self, random: np.random.Generator, batch: int, held_out: bool) -> tuple[Numbers, Numbers, Flags]:
        """See :class:`Recall`."""
        keys = _FIRST + random.random((batch, self.keys)).argsort(axis=1, kind="stable")[:, : self.pairs]
        values = _FIRST + self.keys + random.integers(self.values, size=(batch, self.pairs))
        order = random.random((batch, self.pairs)).argsort(axis=1, kind="stable")[:, : self.asked]
        asked = [np.take_along_axis(numbers, order, axis=1) for numbers in (keys, values)]
        ending = np.stack([np.full_like(asked[0], ASK), *asked], axis=2).reshape(batch, -1)
        is_value = np.broadcast_to(np.arange(ending.shape[1]) % 3 == 2, ending.shape)
        return np.stack([keys, values], axis=2).reshape(batch, -1), ending, is_value

    def between(self, random: np.random.Generator, batch: int, length: int, held_out: bool) -> Numbers:
        """See :class:`Recall`."""
        return _FIRST + self.keys + self.values + random.integers(self.noise, size=(batch, length))

    def chance(self, causal: bool = True) -> Chance:
        """See :class:`Task`."""
        one = best_guess((((), (value,)) for value in range(self.values)), causal)
        return Chance(one.token, one.answer**self.asked)
