"""Greedy generation: cached across segments, against recomputing the running segment for each token.

A segment's worth of tokens is generated, which crosses one border. It is done in turns, so that states with few and
with many segments behind them share whatever else the machine does. Recomputation is sampled: in each turn a few of its
places are timed, and the border once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from benchmarks.huggingface.check import check_rows
from benchmarks.huggingface.models import EXACT, OURS, Shape, Subject
from benchmarks.measure import Check
from rmt_kernels.integrations.transformers import RMTState

__all__ = ["Recomputed", "check_cached", "check_tokens", "continued", "generate", "measure"]

Generate = Callable[[Subject, Tensor, int], Tensor]


class Recomputed:
    """The running segment of a text, run again for each token by stock code with the dense mask."""

    def __init__(self, subject: Subject, ids: Tensor) -> None:
        self.subject, self.memory, self.running = subject, subject.memory.detach()[None], ids[:, :0]
        for piece in ids.split(subject.shape.segment, dim=1):
            self.read(piece)

    def read(self, ids: Tensor) -> None:
        """Tokens that fit into the running segment, or, where it is full, into the next."""
        if self.running.shape[1] == self.subject.shape.segment:
            self.memory = self.close()
            self.running = self.running[:, :0]
        self.running = torch.cat([self.running, ids], dim=1)

    @torch.no_grad()
    def close(self) -> Tensor:
        """The memory that a full segment writes."""
        rows = torch.cat([self.memory, self.subject.embed(self.running), self.memory], dim=1)
        return self.subject.rows(rows)[:, -self.subject.shape.memory :]

    @torch.no_grad()
    def logits(self, tokens: int | None = None) -> Tensor:
        """What follows the running segment's first ``tokens`` (None: all), (batch, vocabulary)."""
        rows = torch.cat([self.memory, self.subject.embed(self.running[:, :tokens])], dim=1)
        return self.subject.logits(self.subject.rows(rows)[:, -1])

    def generate(self, count: int) -> Tensor:
        """The tokens that follow, (batch, count)."""
        found = []
        for _ in range(count):
            found.append(self.logits().argmax(-1, keepdim=True))
            self.read(found[-1])
        return torch.cat(found, dim=1)


def generate(subject: Subject, prompt: Tensor, count: int) -> Tensor:
    """What ours generates after a prompt, (batch, count)."""
    return continued(subject, RMTState(), prompt, count)


def continued(subject: Subject, state: RMTState, ids: Tensor, count: int) -> Tensor:
    """What ours generates after ``ids``, which a state has not read yet, (batch, count)."""
    assert subject.rmt is not None
    found: Tensor = subject.rmt.generate(ids, past_key_values=state, max_new_tokens=count, do_sample=False)
    return found[:, ids.shape[1] :]


# -- correctness -------------------------------------------------------------------------------------------------------


def check_tokens(shape: Shape, device: torch.device, run: Generate = generate) -> Check:
    """In little and in float32: the tokens that follow a prompt over two borders are those of recomputation in float64.

    Prompts end before, at and behind a border.
    """
    small = shape.small()
    exact = Subject(small, EXACT, torch.float64, device, weights=torch.float32)
    ours = Subject(small, OURS, torch.float32, device)
    ours.train(False)
    text, size = exact.inputs(2), small.segment
    for length, count in ((size // 2, 2 * size), (size, 2), (size + 1, 2)):
        prompt = text[:, :length]
        want, found = Recomputed(exact, prompt).generate(count), run(ours, prompt, count)
        if not torch.equal(want, found):
            first = int((want != found).flatten().nonzero()[0])
            return Check(False, f"tokens: the {first + 1}. of {count} after {length} differs from recomputation's")
    return Check(True)


@torch.no_grad()
def check_cached(ours: Subject, stock: Subject) -> Check:
    """The model that is measured: logits of a step, with a segment behind, against a float32 recomputation's."""
    assert ours.rmt is not None
    exact = Subject(ours.shape, EXACT, torch.float32, ours.device, weights=ours.dtype)
    text = exact.inputs(2)[:, : ours.shape.segment + ours.shape.segment // 2]
    state = RMTState()
    ours.train(False)
    ours.rmt(text[:, :-1], past_key_values=state)
    found = ours.rmt(text[:, -1:], past_key_values=state).logits[:, -1]
    return check_rows("logits", found, Recomputed(exact, text).logits(), Recomputed(stock, text).logits())


# -- time --------------------------------------------------------------------------------------------------------------


def measure(
    ours: Subject,
    stock: Subject,
    behind: Sequence[int],
    *,
    turns: int,
    samples: int,
    synchronize: Callable[[], None] = lambda: None,
    tick: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Seconds: ``cached``, of each turn, by the number of segments behind; and what recomputation takes, ``places`` a
    turn's samples, ``border`` of writing the memory."""
    shape = ours.shape
    if shape.segment % turns:
        raise ValueError(f"turns must divide the segment, {shape.segment} tokens, got {turns}")
    count = shape.segment // turns

    def timed(function: Callable[[], Any]) -> tuple[Any, float]:
        synchronize()
        start = time.perf_counter()
        found = function()
        synchronize()
        return found, time.perf_counter() - start

    ours.train(False)
    stock.train(False)
    states: dict[int, tuple[RMTState, Tensor]] = {}
    for number in behind:
        text, state = ours.inputs(number + 1)[:, : number * shape.segment + 1], RMTState()
        states[number] = state, continued(ours, state, text, 2)[:, -1:]
        tick()
    full = Recomputed(stock, stock.inputs(1))
    full.logits(count)  # libraries prepare themselves on their first call
    seconds: dict[int, list[float]] = {number: [] for number in behind}
    places: list[list[float]] = []
    for turn in range(turns):
        first = turn % len(behind)
        for number in [*behind[first:], *behind[:first]]:
            state, last = states[number]
            found, taken = timed(lambda state=state, last=last: continued(ours, state, last, count))  # type: ignore[misc]
            seconds[number].append(taken)
            states[number] = state, found[:, -1:]
        sampled = [turn * count + (2 * i + 1) * count // (2 * samples) for i in range(samples)]
        places.append([timed(lambda n=n: full.logits(n + 1))[1] for n in sampled])  # type: ignore[misc]
        tick()
    border = timed(full.close)[1]
    return {
        "cached": {str(number): values for number, values in seconds.items()}, "places": places, "border": border,
        "tokens": shape.segment, "tokens_a_turn": count,
        "recompute_seconds": border + sum(count * fmean(values) for values in places),
    }  # fmt: skip
