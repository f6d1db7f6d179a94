"""Attention that is computed once: a recorded forward pass gives its results to the pass that recomputes it.

Activation recomputation runs a segment's forward pass again. The attention's output and log-sum-exp are what its
backward pass keeps anyway, so a tape of them spares the second attention. It works below autograd, in the operator
itself, so it serves eager and compiled segments alike, and costs nothing per operator where nothing is recorded.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

__all__ = ["Tape", "current"]

Pair = tuple[Tensor, Tensor]


class Tape:
    """The (output, log-sum-exp) of each attention call of one segment, in the order of the calls."""

    def __init__(self) -> None:
        self._calls: list[tuple[Tensor, Tensor, int]] = []
        self._next: int | None = None  # None while recording

    def __len__(self) -> int:
        return len(self._calls)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Attention calls of this thread are computed and recorded."""
        self._calls.clear()
        self._next = None
        with _use(self):
            yield

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Attention calls of this thread are not computed: they get the recorded results, in order.

        Raises:
            RuntimeError: in a call that was not recorded, has another shape, or whose output was changed in place; at
            the end, where fewer calls came than were recorded.
        """
        self._next = 0
        with _use(self):
            yield
        if self._next < len(self._calls):  # an error, or a checkpoint that has all it needs, does not come here
            raise RuntimeError(
                f"the recomputed segment calls attention {self._next}x, its forward pass did {len(self._calls)}x"
            )

    def run(self, query: Tensor, compute: Callable[[], Pair]) -> Pair:
        """What one attention call returns."""
        if self._next is None:
            out, lse = compute()
            # Aliases: the results themselves will belong to a graph, which would then keep itself alive.
            alias = out.detach()
            self._calls.append((alias, lse.detach(), alias._version))
            return out, lse
        if self._next == len(self._calls):
            raise RuntimeError(
                f"the recomputed segment calls attention more often than its forward pass, {self._next}x"
            )
        out, lse, version = self._calls[self._next]
        if out.shape != query.shape or out.dtype != query.dtype:
            raise RuntimeError(
                f"the recomputed segment's attention call {self._next} has a query of {tuple(query.shape)} "
                f"{query.dtype}, its forward pass had {tuple(out.shape)} {out.dtype}"
            )
        if out._version != version:
            raise RuntimeError(
                "the output of attention was changed in place after the forward pass: not allowed with "
                "recompute='except_attention', use recompute='all'"
            )
        self._next += 1
        return out.data, lse.data  # not views: autograd takes them for fresh results


_local = threading.local()


def current() -> Tape | None:
    """The tape of this thread."""
    return getattr(_local, "tape", None)


@contextmanager
def _use(tape: Tape) -> Iterator[None]:
    before = current()
    _local.tape = tape
    try:
        yield
    finally:
        _local.tape = before
