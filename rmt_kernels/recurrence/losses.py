"""Losses computed inside a segment.

A segment's loss is its share of the sample's: ``factor * sum of the losses of its rows``, with a factor that is known
before the first segment runs. So the segments' losses only have to be added.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rmt_kernels.recurrence.chunks import chunked
from rmt_kernels.recurrence.segments import Segments

__all__ = ["SampleLoss", "SegmentLoss", "TokenLoss", "Weighed"]

Function = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Weighed:
    """What a loss makes of a batch's labels before the first segment."""

    labels: Tensor
    factors: Tensor  # (segments,)
    last: Tensor | None = None  # int64 (batch or 1,): of each sample only this segment counts; None: all do
    silent: frozenset[int] = frozenset()  # segments known to have no loss
    even: bool = False  # one factor for all rows, so that several segments may be given as one, of more samples


class SegmentLoss(Protocol):
    """What ``RecurrentMemory(loss=...)`` takes; see :class:`TokenLoss` and :class:`SampleLoss`."""

    def weigh(self, labels: Tensor, mask: Tensor | None, segments: Segments, dtype: torch.dtype) -> Weighed:
        """Check labels and mask, and find each segment's factor."""

    def targets(self, weighed: Weighed, segments: Segments, s: int) -> tuple[Tensor, ...]:
        """What :meth:`of_segment` needs of segment ``s``: tensors whose shapes are the same for every segment."""

    def of_segment(
        self,
        hidden: Tensor,
        targets: tuple[Tensor, ...],
        counts: Tensor | None,
        head: Callable[[Tensor], Tensor] | None,
        factor: Tensor,
    ) -> Tensor:
        """The segment's share of the loss, 0-dim, of its TOKENS rows (batch, tokens, width).

        ``counts``: int (batch,), how many of the rows are tokens; None: all.
        """


def _check_function(function: object) -> None:
    if function is not None and (not callable(function) or isinstance(function, type)):
        raise TypeError(f"function must be a function (logits, labels) -> losses or None, got {function!r}")


def _check_weights(weights: Any) -> str | tuple[float, ...]:
    names = ("tokens", "segments", "last")
    if isinstance(weights, str):
        if weights not in names:
            raise ValueError(f"weights must be one of {list(names)} or a number for each segment, got {weights!r}")
        return weights
    if not isinstance(weights, Sequence) or any(
        isinstance(weight, bool) or not isinstance(weight, (int, float)) for weight in weights
    ):
        raise TypeError(f"weights must be one of {list(names)} or a number for each segment, got {weights!r}")
    if not all(math.isfinite(weight) for weight in weights):
        raise ValueError(f"weights must be finite, got {weights!r}")
    return tuple(float(weight) for weight in weights)


def _check_int(name: str, value: Any, least: int, otherwise: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, {otherwise}, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {otherwise}, got {value}")


def _factors(weights: str | Sequence[float], counts: Tensor, dtype: torch.dtype) -> Tensor:
    """What the sum of each segment's losses is multiplied by, from the number of losses in each: (segments,)."""
    counts = counts.to(dtype)
    if weights in ("tokens", "last"):
        return (1 / counts.sum().clamp(min=1)).expand_as(counts)
    means = torch.where(counts > 0, 1 / counts.clamp(min=1), 0)
    if weights == "segments":
        return means / (counts > 0).sum().clamp(min=1)
    assert not isinstance(weights, str)
    if len(weights) != len(counts):
        raise ValueError(f"weights must hold one number for each of the {len(counts)} segments, got {len(weights)}")
    return means * torch.tensor(weights, dtype=dtype, device=counts.device)


@dataclass(frozen=True)
class TokenLoss:
    """A loss for every token, such as language modelling's cross entropy.

    Args:
        function: ``(logits (n, ...), labels (n,)) -> losses (n,)``. None: cross entropy, labels of class numbers. What
            it learns must be the parameters of a ``nn.Module`` that it is.
        shift: whether a row predicts the label of the next position (over the borders of segments too). None: where
            the layout's tokens see one another causally.
        weights: ``"tokens"``: the mean over all labels that count. ``"segments"``: the mean over segments of each
            one's mean. ``"last"``: the mean over the labels in each sample's last segment. A sequence of numbers, one
            a segment: the sum of each segment's mean times its number.
        ignore: label that does not count.
        rows: rows of a chunk. None: as many as make 4 Mi logits, at least 16.

    Raises:
        ValueError: an argument that is not accepted.
    """

    function: Function | None = None
    shift: bool | None = None
    weights: str | Sequence[float] = "tokens"
    ignore: int = -100
    rows: int | None = None

    def __post_init__(self) -> None:
        _check_function(self.function)
        object.__setattr__(self, "weights", _check_weights(self.weights))
        if self.rows is not None:
            _check_int("rows", self.rows, 1, "1 or None")

    def weigh(self, labels: Tensor, mask: Tensor | None, segments: Segments, dtype: torch.dtype) -> Weighed:
        """See :class:`SegmentLoss`."""
        shape = (segments.batch, segments.length)
        if labels.shape != shape:
            raise ValueError(f"labels must have the inputs' shape {shape}, (batch, length), got {tuple(labels.shape)}")
        if self.function is None and labels.dtype is not torch.int64:
            raise TypeError(f"labels must be int64 class numbers, got {labels.dtype}")
        if mask is not None:
            if not isinstance(mask, Tensor):
                raise TypeError(f"label_mask must be a bool tensor of shape {shape}, got {type(mask).__name__}")
            if mask.shape != shape or mask.dtype is not torch.bool or mask.device != labels.device:
                raise ValueError(
                    f"label_mask must be bool of shape {shape} on {labels.device}, True where a label counts, got "
                    f"{mask.dtype} {tuple(mask.shape)} on {mask.device}"
                )
            labels = labels.masked_fill(~mask, self.ignore)
        counted = labels != self.ignore
        if segments.lengths is not None:
            counted &= torch.arange(segments.length, device=labels.device) < segments.lengths[:, None]
        if self.shift:  # the label at t + 1 is predicted, and counts, at t
            counted = F.pad(counted[:, 1:], (0, 1))
        where = segments.segment_of().expand(shape)
        last = None
        if self.weights == "last":
            last = segments.last()
            counted = counted & (where == last[:, None])
        counts = torch.zeros(segments.count, dtype=torch.int64, device=labels.device)
        counts.scatter_add_(0, where.clamp(0, segments.count - 1).reshape(-1), counted.reshape(-1).long())
        silent: frozenset[int] = frozenset()
        if last is not None and segments.end_together:
            silent = frozenset(range(segments.count - 1))
        elif isinstance(self.weights, tuple):
            silent = frozenset(s for s, weight in enumerate(self.weights) if weight == 0)
        even = self.weights in ("tokens", "last")
        return Weighed(labels, _factors(self.weights, counts, dtype), last, silent, even)

    def targets(self, weighed: Weighed, segments: Segments, s: int) -> tuple[Tensor, ...]:
        """See :class:`SegmentLoss`."""
        labels = segments.take(weighed.labels, s, ahead=int(bool(self.shift)), fill=self.ignore)
        if weighed.last is not None:
            labels = labels.masked_fill((weighed.last != s)[:, None], self.ignore)
        return (labels,)

    def of_segment(
        self,
        hidden: Tensor,
        targets: tuple[Tensor, ...],
        counts: Tensor | None,
        head: Callable[[Tensor], Tensor] | None,
        factor: Tensor,
    ) -> Tensor:
        """See :class:`SegmentLoss`."""
        (labels,) = targets
        hidden = hidden[:, hidden.shape[1] - labels.shape[1] :]  # a prefix has no labels
        learned = self.function if isinstance(self.function, nn.Module) else None
        return chunked(self._sum, head, hidden.flatten(0, 1), labels.flatten(0, 1), factor, self.rows, learned)

    def _sum(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.function is None:
            return F.cross_entropy(_wide(logits), labels, ignore_index=self.ignore, reduction="sum")
        losses = self.function(logits, labels)
        if losses.shape != labels.shape:
            raise ValueError(f"loss must return one number a row, {tuple(labels.shape)}, got {tuple(losses.shape)}")
        # Not a product: what an ignored row gives may be NaN.
        return _wide(losses).masked_fill(labels == self.ignore, 0).sum()


@dataclass(frozen=True)
class SampleLoss:
    """One label a sample, predicted from one row of a segment: classification, as in arXiv 2304.11062.

    Args:
        function: ``(logits (batch, ...), labels (batch, ...)) -> losses (batch,)``. None: cross entropy.
        row: which of the TOKENS rows: 0 is the first (CLS, where ``prefix`` begins with it), -1 the sample's last
            token in the segment. Where a sample has fewer tokens, it is its last one.
        weights: ``"last"``: the mean over samples of the loss in each one's last segment. ``"segments"``: the mean
            over all segments of all samples.

    Raises:
        ValueError: an argument that is not accepted.
    """

    function: Function | None = None
    row: int = 0
    weights: str = "last"

    def __post_init__(self) -> None:
        if self.weights not in ("last", "segments"):
            raise ValueError(f"weights must be 'last' or 'segments', got {self.weights!r}")
        _check_function(self.function)
        _check_int("row", self.row, -1, "0, or -1 for the last token")

    def weigh(self, labels: Tensor, mask: Tensor | None, segments: Segments, dtype: torch.dtype) -> Weighed:
        """See :class:`SegmentLoss`."""
        if labels.dim() < 1 or labels.shape[0] != segments.batch:
            raise ValueError(
                f"labels must be (batch, ...), one for each of the {segments.batch} samples, got {tuple(labels.shape)}"
            )
        if self.function is None and labels.dtype is not torch.int64:
            raise TypeError(f"labels must be int64 class numbers, got {labels.dtype}")
        if mask is not None:
            raise ValueError("label_mask is for losses of every token, SampleLoss has none; leave it out")
        last, silent, lengths = None, frozenset[int](), segments.lengths
        if lengths is None:
            lengths = torch.full((segments.batch,), segments.length, device=labels.device)
        if self.weights == "last":
            last, number = segments.last(), (lengths > 0).sum()
            if segments.end_together:
                silent = frozenset(range(segments.count - 1))
        else:
            number = torch.div(lengths + segments.size - 1, segments.size, rounding_mode="floor").sum()
        factor = 1 / number.clamp(min=1).to(dtype)
        return Weighed(labels, factor.expand(segments.count), last, silent)

    def targets(self, weighed: Weighed, segments: Segments, s: int) -> tuple[Tensor, ...]:
        """The labels, and which samples count: bool (batch,)."""
        tokens = segments.token_counts(s)
        counted = torch.ones(segments.batch, dtype=torch.bool, device=segments.device) if tokens is None else tokens > 0
        if weighed.last is not None:
            counted = counted & (weighed.last == s)
        return weighed.labels, counted

    def of_segment(
        self,
        hidden: Tensor,
        targets: tuple[Tensor, ...],
        counts: Tensor | None,
        head: Callable[[Tensor], Tensor] | None,
        factor: Tensor,
    ) -> Tensor:
        """See :class:`SegmentLoss`."""
        labels, counted = targets
        chosen = self.chosen(hidden, counts)
        logits = chosen if head is None else head(chosen)
        if self.function is None:
            losses = F.cross_entropy(_wide(logits), labels, reduction="none")
        else:
            losses = self.function(logits, labels)
        if losses.shape != counted.shape:
            raise ValueError(f"loss must return one number a sample, {tuple(counted.shape)}, got {tuple(losses.shape)}")
        return _wide(losses).masked_fill(~counted, 0).sum() * factor

    def chosen(self, hidden: Tensor, counts: Tensor | None) -> Tensor:
        """The row of each sample that predicts, (batch, width), of TOKENS rows (batch, T, width)."""
        if self.row >= hidden.shape[1]:
            raise ValueError(f"row must be below {hidden.shape[1]}, the TOKENS rows of a segment, got {self.row}")
        if counts is None:
            return hidden[:, self.row]
        last = (counts.long() - 1).clamp(min=0)
        index = last if self.row < 0 else last.clamp(max=self.row)
        return hidden[torch.arange(len(hidden), device=hidden.device), index]


def _wide(x: Tensor) -> Tensor:
    """In float32 where it is narrower."""
    return x.to(torch.promote_types(x.dtype, torch.float32)) if x.is_floating_point() else x
