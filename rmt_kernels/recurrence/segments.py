"""How the tokens of a batch of samples lie in segments of one shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rmt_kernels.recurrence.checks import at_least

__all__ = ["Segments", "crop"]


@dataclass(frozen=True)
class Segments:
    """Samples of (batch, length) as ``count`` segments of ``size`` tokens.

    Every segment has the same shape; one that a sample does not fill holds that sample's tokens first and padding
    after them. Aligned left, a sample's last segment is the short one, and samples shorter than the batch's length
    leave the last segments empty. Aligned right, the first is the short one and the first ones are empty, so that all
    samples end together (arXiv 2304.11062).

    Args:
        batch, length: of the inputs; ``count`` is ``ceil(length / size)`` whatever the samples' own lengths are.
        size: tokens of a segment.
        align: ``"left"`` or ``"right"``.
        lengths: int (batch,), tokens of each sample (they come first, padding after them); None: all of them.
        device: of the inputs.

    Raises:
        TypeError, ValueError: an argument that is not accepted.
    """

    batch: int
    length: int
    size: int
    align: str
    lengths: Tensor | None
    device: torch.device

    def __post_init__(self) -> None:
        if isinstance(self.size, bool) or not isinstance(self.size, int):
            raise TypeError(f"segment must be an int, got {type(self.size).__name__}")
        if self.size < 1:
            raise ValueError(f"segment must be at least 1 token, got {self.size}")
        if self.align not in ("left", "right"):
            raise ValueError(f"align must be 'left' or 'right', got {self.align!r}")
        if self.batch < 1 or self.length < 1:
            raise ValueError(f"inputs must hold at least one token, got (batch, length) = {(self.batch, self.length)}")
        lengths = self.lengths
        if lengths is None:
            return
        if not isinstance(lengths, Tensor) or lengths.dtype not in (torch.int32, torch.int64):
            kind = lengths.dtype if isinstance(lengths, Tensor) else type(lengths).__name__
            raise TypeError(f"lengths must be an int32 or int64 tensor of shape ({self.batch},), got {kind}")
        if lengths.shape != (self.batch,) or lengths.device != self.device:
            raise ValueError(
                f"lengths must have shape ({self.batch},) on {self.device}, got {tuple(lengths.shape)} on "
                f"{lengths.device}"
            )
        wrong = (lengths < 0) | (lengths > self.length)
        if self.device.type == "cpu" and bool(wrong.any()):
            raise ValueError(f"lengths must be between 0 and {self.length}, got {lengths.tolist()}")
        object.__setattr__(self, "lengths", lengths.long())

    @property
    def count(self) -> int:
        """Number of segments."""
        return -(-self.length // self.size)

    @property
    def end_together(self) -> bool:
        """Whether every sample has its last tokens in the last segment, whatever the lengths are."""
        return self.align == "right" or self.lengths is None

    def _first(self, s: int) -> Tensor | int:
        """Position of the first token of segment ``s``, negative where a right-aligned sample begins later."""
        if self.align == "left":
            return s * self.size
        ends = self.length if self.lengths is None else self.lengths
        return ends - (self.count - s) * self.size

    def token_counts(self, s: int) -> Tensor | None:
        """Tokens of each sample in segment ``s``, int32 (batch,); None: all samples fill it.

        A length out of range, which away from the CPU can't be seen without synchronising, gives -1, for which
        kernels write NaN.
        """
        first = self._first(s)
        if self.lengths is None:
            assert isinstance(first, int)
            count = min(self.length, first + self.size) - max(first, 0)
            if count == self.size:
                return None
            return torch.full((self.batch,), count, dtype=torch.int32, device=self.device)
        end = torch.minimum(self.lengths, torch.as_tensor(first + self.size, device=self.device))
        start = first.clamp(min=0) if isinstance(first, Tensor) else first
        counts = (end - start).clamp(0, self.size)
        wrong = (self.lengths < 0) | (self.lengths > self.length)
        return torch.where(wrong, -1, counts).to(torch.int32)

    def take(self, tensor: Tensor, s: int, *, ahead: int = 0, fill: Any = None) -> Tensor:
        """Segment ``s`` of a (batch, length, ...) tensor: (batch, size, ...).

        A view where no padding is needed. ``ahead`` shifts to later positions, across the borders of segments. Rows of
        padding hold ``fill``; None: they may hold any of the tensor's values.
        """
        first = self._first(s)
        if isinstance(first, int):
            # A short segment on the right side begins with its first token, padding follows.
            count = min(self.length, first + self.size) - max(first, 0)
            begin = max(first, 0) + ahead
            piece = tensor[:, begin : min(begin + count, self.length)]
            missing = self.size - piece.shape[1]
            if missing:
                trailing = [0, 0] * (tensor.dim() - 2)
                piece = F.pad(piece, [*trailing, 0, missing], value=0 if fill is None else fill)
            if fill is not None and self.lengths is not None:
                at = torch.arange(begin, begin + self.size, device=self.device)
                piece = self._filled(piece, at >= self.lengths[:, None], fill)
            return piece
        at = first.clamp(min=0)[:, None] + torch.arange(ahead, ahead + self.size, device=self.device)  # (batch, size)
        index = at.clamp(max=self.length - 1)
        piece = tensor[torch.arange(self.batch, device=self.device)[:, None], index]
        if fill is None:
            return piece
        assert self.lengths is not None
        # Positions after those of this segment belong to the next one.
        last = torch.minimum(first + self.size + ahead, self.lengths)[:, None]
        return self._filled(piece, at >= last, fill)

    @staticmethod
    def _filled(piece: Tensor, where: Tensor, fill: Any) -> Tensor:
        return piece.masked_fill(where.view(*where.shape, *(1,) * (piece.dim() - 2)), fill)

    def segment_of(self) -> Tensor:
        """Number of the segment in which each position lies: int64 (batch or 1, length); not for padding."""
        at = torch.arange(self.length, device=self.device)
        if self.align == "left":
            return (at // self.size)[None]
        ends = torch.tensor([self.length], device=self.device) if self.lengths is None else self.lengths
        return self.count - 1 - torch.div(ends[:, None] - 1 - at, self.size, rounding_mode="floor")

    def last(self) -> Tensor:
        """Number of the last segment in which each sample has tokens: int64 (batch or 1,)."""
        if self.end_together:
            return torch.tensor([self.count - 1], device=self.device)
        assert self.lengths is not None
        return torch.div(self.lengths - 1, self.size, rounding_mode="floor")


def crop(*tensors: Tensor, segments: int, segment: int, keep: str = "first") -> Tensor | tuple[Tensor, ...]:
    """At most ``segments`` segments of each sample, for a curriculum over their number.

    Args:
        tensors: (batch, length, ...) each, of the same length.
        segments, segment: how many, and of how many tokens.
        keep: ``"first"`` tokens or ``"last"`` ones.

    Returns:
        A view of each tensor, (batch, at most segments * segment, ...); the tensor itself where one is given.

    Raises:
        TypeError, ValueError: an argument that is not accepted.
    """
    for name, number in (("segments", segments), ("segment", segment)):
        at_least(name, number, 1)
    if keep not in ("first", "last"):
        raise ValueError(f"keep must be 'first' or 'last', got {keep!r}")
    if not tensors or any(tensor.dim() < 2 or tensor.shape[:2] != tensors[0].shape[:2] for tensor in tensors):
        raise ValueError(
            f"tensors must share their first two dimensions, (batch, length), got {[tuple(t.shape) for t in tensors]}"
        )
    rows = segments * segment
    found = tuple(tensor[:, :rows] if keep == "first" else tensor[:, -rows:] for tensor in tensors)
    return found[0] if len(found) == 1 else found
