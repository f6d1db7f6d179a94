"""Byte-level language modelling of what ships with Python."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from rmt_kernels.training.corpora import Bytes, documentation, fingerprint, sources
from rmt_kernels.training.tasks import Chance, Flags, Numbers, Task

__all__ = ["Source", "Text"]

_BYTE = 2  # token number of byte 0, after the placeholder and ASK


@dataclass(frozen=True)
class Language(Task):
    """Passages of a text, every byte to be predicted.

    Args:
        masked: for models that are not causal, the percentage of bytes that are hidden and to be predicted.
    """

    masked: int = 15
    unit: ClassVar[str] = "token"

    def __post_init__(self) -> None:
        self._at_least(masked=1)
        if self.masked > 100:
            raise ValueError(f"masked must be at most 100 percent, got {self.masked}")

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """See :class:`Task`."""
        return ("_", "?", *(chr(byte) if 32 <= byte < 127 else f"\\x{byte:02x}" for byte in range(256)))

    @staticmethod
    @abstractmethod
    def text(held_out: bool) -> Bytes:
        """uint8 (n,)."""

    def check(self, segments: int, tokens: int) -> None:
        """See :class:`Task`."""
        room = min(len(self.text(held_out)) for held_out in (False, True))
        if segments * tokens < 2:
            raise ValueError(
                f"segments, tokens: a passage of {self.name} has at least 2 tokens, got {segments * tokens}"
            )
        if segments * tokens > room:
            raise ValueError(
                f"segments, tokens: {segments} segments of {tokens} tokens are longer than {self.name}'s shorter part, "
                f"{room} bytes; use fewer or shorter segments"
            )

    def draw(
        self, random: np.random.Generator, batch: int, segments: int, tokens: int, held_out: bool
    ) -> tuple[Numbers, Flags]:
        """See :class:`Task`."""
        text, length = self.text(held_out), segments * tokens
        # A share of the text, not a place, so that passages of other lengths begin nearly there too.
        starts = (random.random((batch, 1)) * (len(text) - length + 1)).astype(np.int64)
        ids = _BYTE + text[starts + np.arange(length)].astype(np.int64)
        return ids, np.ones(ids.shape, dtype=np.bool_)

    def hidden(self, random: np.random.Generator, counts: Flags) -> Flags:
        """See :class:`Task`."""
        chosen = random.random(counts.shape) < self.masked / 100
        chosen[~chosen.any(axis=1), -1] = True  # never a sample without a label
        return counts & chosen

    def chance(self, causal: bool = True) -> Chance:
        """Always the most frequent byte. See :class:`Task`."""
        text = self.text(True)
        return Chance(float(np.bincount(text).max() / len(text)), 0.0)

    def fingerprint(self) -> str:
        """See :class:`Task`."""
        return fingerprint(self.text(False), self.text(True))


@dataclass(frozen=True)
class Text(Language):
    """Python's language documentation. Options as of :class:`Language`."""

    name: ClassVar[str] = "text"

    @staticmethod
    def text(held_out: bool) -> Bytes:
        """See :class:`Language`."""
        return documentation(held_out)


@dataclass(frozen=True)
class Source(Language):
    """The standard library's Python sources. Options as of :class:`Language`."""

    name: ClassVar[str] = "source"

    @staticmethod
    def text(held_out: bool) -> Bytes:
        """See :class:`Language`."""
        return sources(held_out)
