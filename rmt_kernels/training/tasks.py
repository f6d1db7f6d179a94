"""What tasks share. A task draws batches that are pure functions of the task, a seed and a step.

A sample is ``segments * tokens`` token numbers: the information at the start, noise, and the answer at the very end,
after an ``ASK`` where something is asked. With two segments or more no segment holds both, so only a memory can carry
the one to the other; more segments mean more noise between, and ask for no larger memory.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rmt_kernels.recurrence.checks import at_least

__all__ = ["ASK", "IGNORE", "PLACEHOLDER", "Batch", "Chance", "Flags", "Numbers", "Recall", "Task", "best_guess"]

PLACEHOLDER, ASK = 0, 1  # token numbers in every task's vocabulary
IGNORE = -100

Numbers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Batch:
    """Samples of a task.

    ids: int64 (batch, length).
    labels: int64 (batch, length), those of the inputs' own positions, -100 where none counts.
    """

    ids: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        return Batch(self.ids.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Chance:
    """The accuracy, 0 to 1, of the best guess that sees the question and no information."""

    token: float  # of single labels
    answer: float  # of all labels of a sample together


@dataclass(frozen=True)
class Task(ABC):
    """A kind of sample. The fields of a subclass are its options: ints and bools, plain JSON values."""

    name: ClassVar[str]
    unit: ClassVar[str] = "answer"  # what is told of it: whole answers, or "token", of which none makes a whole

    @property
    @abstractmethod
    def vocabulary(self) -> tuple[str, ...]:
        """What each token number stands for, for people. The first two are the placeholder and ASK."""

    @abstractmethod
    def check(self, segments: int, tokens: int) -> None:
        """Raise ValueError where so many segments of so many tokens can't hold a sample."""

    @abstractmethod
    def draw(
        self, random: np.random.Generator, batch: int, segments: int, tokens: int, held_out: bool
    ) -> tuple[Numbers, Flags]:
        """Token numbers and where they are to be predicted, (batch, segments * tokens) each."""

    def hidden(self, random: np.random.Generator, counts: Flags) -> Flags:
        """Which of the places that count are hidden from a model that is not causal, and then predicted by it."""
        return counts

    @abstractmethod
    def chance(self, causal: bool = True) -> Chance:
        """What a model without memory can reach; ``causal``: with the answer so far before it."""

    def batch(
        self, batch: int, segments: int, tokens: int, *, seed: int, step: int, causal: bool = True,
        held_out: bool = False,
    ) -> Batch:  # fmt: skip
        """The samples of a step, on the CPU.

        Args:
            batch: number of samples.
            segments, tokens: a sample has ``segments`` segments of ``tokens`` tokens.
            seed, step: whole numbers from 0. The same ones give the same batch in every process.
            causal: True: what is to be predicted is in ``ids`` too, one place after the row that predicts it. False:
                ``ids`` hold a placeholder there.
            held_out: samples for evaluation, drawn apart from those for training.

        Raises:
            TypeError, ValueError: an argument that is not accepted, or sizes that can't hold a sample.
        """
        for name, value, least in (
            ("batch", batch, 1), ("segments", segments, 1), ("tokens", tokens, 1), ("seed", seed, 0), ("step", step, 0),
        ):  # fmt: skip
            at_least(name, value, least)
        self.check(segments, tokens)
        # Not the number of segments: the same questions, with more noise.
        drawn_from = json.dumps([self.name, asdict(self), seed, step, held_out], sort_keys=True)
        random = np.random.default_rng(int.from_bytes(hashlib.sha256(drawn_from.encode()).digest()))
        ids, counts = self.draw(random, batch, segments, tokens, held_out)
        if not causal:
            counts = self.hidden(random, counts)
        labels = np.where(counts, ids, IGNORE)
        if not causal:
            ids = np.where(counts, PLACEHOLDER, ids)
        return Batch(torch.from_numpy(ids), torch.from_numpy(labels))

    def decode(self, ids: Tensor | Sequence[int]) -> list[str]:
        """What token numbers (n,) stand for."""
        return [self.vocabulary[int(i)] for i in ids]

    def to_dict(self) -> dict[str, Any]:
        """The task as plain JSON values: its name, its options, and a fingerprint of the data it draws from."""
        return {"name": self.name, **asdict(self), **({"data": self.fingerprint()} if self.fingerprint() else {})}

    def fingerprint(self) -> str:
        """Of the data that come with Python and differ from version to version; ``""``: there are none."""
        return ""

    def _at_least(self, **least: int) -> None:
        for field in fields(self):
            if field.name in least:
                at_least(field.name, getattr(self, field.name), least[field.name])


class Recall(Task):
    """A task with information first and an answer last."""

    @property
    @abstractmethod
    def information(self) -> int:
        """Tokens that the information takes up."""

    @property
    @abstractmethod
    def answer(self) -> int:
        """Tokens from ASK to the end."""

    @abstractmethod
    def samples(self, random: np.random.Generator, batch: int, held_out: bool) -> tuple[Numbers, Numbers, Flags]:
        """Information (batch, information), ending (batch, answer), and what of the ending is to be predicted.

        A placeholder in the information leaves its place to the noise.
        """

    @abstractmethod
    def between(self, random: np.random.Generator, batch: int, length: int, held_out: bool) -> Numbers:
        """Noise: what stands where nothing else does, (batch, length)."""

    def check(self, segments: int, tokens: int) -> None:
        """See :class:`Task`. Information and answer may each take several segments, and never share one of several."""
        first, last = -(-self.information // tokens), -(-self.answer // tokens)
        both = self.information + self.answer
        if first + last <= segments or (segments == 1 and both <= tokens):
            return
        raise ValueError(
            f"segments, tokens: {segments} segment{'s' * (segments > 1)} of {tokens} tokens can't hold {self.name} "
            f"({self.information} tokens of information, {self.answer} from the question to the end); "
            + (f"use at least {both} tokens" if segments == 1 else f"use segments of {max(both // 2 + 1, 2)} tokens")
            + f", or at least {first + last} segments"
        )

    def draw(
        self, random: np.random.Generator, batch: int, segments: int, tokens: int, held_out: bool
    ) -> tuple[Numbers, Flags]:
        """See :class:`Task`."""
        information, ending, asked = self.samples(random, batch, held_out)
        length = segments * tokens
        ids = self.between(random, batch, length - ending.shape[1], held_out)
        # Until where information may stand: no segment that has a part of the answer.
        free = (segments - -(-self.answer // tokens)) * tokens if segments > 1 else ids.shape[1]
        self.place(random, ids, information, free)
        counts = np.zeros((batch, length), dtype=np.bool_)
        counts[:, ids.shape[1] :] = asked
        return np.concatenate([ids, ending], axis=1), counts

    def place(self, random: np.random.Generator, ids: Numbers, information: Numbers, free: int) -> None:
        """Put the information into the first ``free`` columns of the noise."""
        start = ids[:, : information.shape[1]]
        np.copyto(start, information, where=information != PLACEHOLDER)


def best_guess(answers: Iterable[tuple[Any, Sequence[Any]]], causal: bool) -> Chance:
    """The accuracy of always giving the likeliest answer, from all equally likely ``(question, answer)``.

    causal: each token is guessed after the true ones before it; otherwise from the question and its place alone.
    """
    wholes: dict[Any, dict[Any, int]] = defaultdict(lambda: defaultdict(int))
    for question, answer in answers:
        wholes[question][tuple(answer)] += 1
    right = count = whole = samples = 0
    for found in wholes.values():
        tokens: dict[Any, dict[Any, int]] = defaultdict(lambda: defaultdict(int))
        for answer, times in found.items():
            for place, token in enumerate(answer):
                tokens[answer[:place] if causal else place][token] += times
            count += times * len(answer)
        right += sum(max(choices.values()) for choices in tokens.values())
        whole += max(found.values())
        samples += sum(found.values())
    return Chance(right / count, whole / samples)
