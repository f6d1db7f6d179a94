"""How gradients go back through the segments: which memories are cut off, which activations are kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rmt_kernels.recurrence.checks import at_least

__all__ = ["Policy", "Replay", "ReplayError", "Truncate", "from_plain", "resolve", "to_plain"]


class ReplayError(RuntimeError):
    """The backward sweep of a replay failed part of the way: ``.grad`` is partial and must be zeroed."""


@dataclass(frozen=True)
class Truncate:
    """Truncated back-propagation: some memories are passed on without their gradient.

    Every segment's own loss counts, and the trained initial memory is never cut off. The activations of all segments
    are still kept; ``Replay(truncate=...)`` recomputes them too.

    Args:
        segments: k. The last k segments are connected: the memory entering segment s, from 0, is detached where
            ``1 <= s <= N - k``. k >= N is full back-propagation.
        every: instead in groups of k: the memory is detached where ``s > 0 and s % k == 0``.

    Raises:
        TypeError, ValueError: an argument that is not accepted.
    """

    segments: int
    every: bool = False

    def __post_init__(self) -> None:
        at_least("segments", self.segments, 1)
        if not isinstance(self.every, bool):
            raise TypeError(f"every must be True or False, got {type(self.every).__name__}")

    def cuts(self, s: int, count: int) -> bool:
        """Whether the memory entering segment ``s`` of ``count`` is detached."""
        if self.every:
            return s > 0 and s % self.segments == 0
        return 1 <= s <= count - self.segments


@dataclass(frozen=True)
class Replay:
    """Exact gradients, in the activation memory of one segment: memory replay back-propagation (arXiv 2010.06891).

    The forward pass keeps what enters each segment (its memory and PyTorch's random state); the backward pass runs each
    segment again before it goes back through it.

    Args:
        keep: that many of the last segments keep their activations and are not run again. 1 costs no memory, for one
            segment's activations exist in the backward pass anyway; 0 keeps none until it begins.
        budget_bytes: instead of ``keep``: as many as fit in this many bytes. A segment's activations are measured in
            one more forward pass whenever its shape or dtype is new to the model.
        recompute: ``"all"``, or ``"except_attention"``, which keeps the output and log-sum-exp of every attention of
            this package, (rows * (width + 4 * heads)) bytes or more a layer and segment, and spares its second forward.
        truncate: also cut gradients off, as :class:`Truncate`; an int is ``Truncate(k)``.
        offload: keep the memories between segments on the host, in pinned memory where there is a GPU.
        check: let :func:`replay_step` compare each recomputed memory with the one of the forward pass, bit for bit, and
            raise ReplayError where they differ. Synchronises a GPU once a segment.

    Raises:
        TypeError, ValueError: an argument that is not accepted.
    """

    keep: int = 1
    budget_bytes: int | None = None
    recompute: str = "all"
    truncate: int | Truncate | None = None
    offload: bool = False
    check: bool = False

    def __post_init__(self) -> None:
        at_least("keep", self.keep, 0)
        if self.budget_bytes is not None:
            at_least("budget_bytes", self.budget_bytes, 1)
            if self.keep != 1:
                raise ValueError(f"keep={self.keep} and budget_bytes={self.budget_bytes}: give one of them")
        if self.recompute not in ("all", "except_attention"):
            raise ValueError(f"recompute must be 'all' or 'except_attention', got {self.recompute!r}")
        if self.truncate is not None and not isinstance(self.truncate, Truncate):
            at_least("truncate", self.truncate, 1)
            object.__setattr__(self, "truncate", Truncate(self.truncate))
        for name in ("offload", "check"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {type(getattr(self, name)).__name__}")

    def cuts(self, s: int, count: int) -> bool:
        """Whether the memory entering segment ``s`` of ``count`` is detached."""
        return isinstance(self.truncate, Truncate) and self.truncate.cuts(s, count)

    def kept(self, count: int, measure: Any) -> int:
        """How many of the last segments of ``count`` keep their activations; ``measure()`` gives one segment's bytes.

        Raises:
            ValueError: ``budget_bytes`` is less than one segment takes, which no policy can do with.
        """
        if self.budget_bytes is None:
            return min(self.keep, count)
        needed = measure()
        if self.budget_bytes < needed:
            raise ValueError(
                f"budget_bytes={self.budget_bytes} is less than one segment's activations, {needed} bytes, which every "
                "policy needs; use a shorter segment, a smaller batch, or checkpoints inside the backbone"
            )
        return count if needed == 0 else int(min(count, self.budget_bytes // needed))


@dataclass(frozen=True)
class _Full:
    """Everything kept, nothing cut off."""

    def cuts(self, s: int, count: int) -> bool:
        return False


Policy = _Full | Truncate | Replay


def resolve(bptt: Any) -> Policy:
    """The policy that ``bptt=`` names.

    Raises:
        TypeError, ValueError: not one of ``"full"``, ``"replay"`` (``Replay()``), an int >= 1, Truncate, Replay.
    """
    if isinstance(bptt, (_Full, Truncate, Replay)):
        return bptt
    if isinstance(bptt, str) and bptt in ("full", "replay"):
        return _Full() if bptt == "full" else Replay()
    if isinstance(bptt, int) and not isinstance(bptt, bool):
        if bptt < 1:
            raise ValueError(f"bptt must be at least 1 segment, got {bptt}")
        return Truncate(bptt)
    raise TypeError(
        "bptt must be 'full', 'replay', the number of segments to go back through, Truncate(...) or Replay(...), got "
        f"{bptt!r}"
    )


def to_plain(bptt: Any) -> Any:
    """``bptt=`` as plain JSON values."""
    if isinstance(bptt, (Replay, Truncate)):
        return {type(bptt).__name__.lower(): asdict(bptt)}
    return bptt


def from_plain(bptt: Any) -> Any:
    """The inverse of :func:`to_plain`; ``"replay"`` is ``Replay()``."""
    if isinstance(bptt, str) and bptt == "replay":
        return Replay()
    if isinstance(bptt, Mapping):
        if set(bptt) == {"truncate"}:
            return Truncate(**bptt["truncate"])
        if set(bptt) == {"replay"}:
            inside = dict(bptt["replay"])
            if isinstance(inside.get("truncate"), Mapping):
                inside["truncate"] = Truncate(**inside["truncate"])
            return Replay(**inside)
        raise ValueError(f"bptt: a mapping must be {{'replay': ...}} or {{'truncate': ...}}, got {dict(bptt)}")
    return bptt
