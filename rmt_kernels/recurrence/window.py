"""The loss of the segments whose activations are kept, taken at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rmt_kernels.recurrence.chunks import gradients_at_once, is_plain, rows_of_a_chunk
from rmt_kernels.recurrence.losses import TokenLoss

if TYPE_CHECKING:
    from rmt_kernels.recurrence.wrapper import Batch, RecurrentMemory, SegmentCall

__all__ = ["Window"]


class Window:
    """Hidden rows of segments, whose loss is one.

    So the gradient of an output layer, as large as a vocabulary, is computed once a step and not once a segment, and
    each logit once. For cross entropy with one factor for all segments, through a plain ``nn.Linear``, of segments that
    are too large for one chunk: of a loss that nothing can be different in. All others are taken segment by segment.
    """

    def __init__(self, model: RecurrentMemory, batch: Batch) -> None:
        self._model = model
        loss, head = model.loss, model.head
        even = batch.weighed is not None and batch.weighed.even
        self._open = even and type(loss) is TokenLoss and loss.function is None and is_plain(head)
        self._rows: list[Tensor] = []  # (batch, segment, width) each
        self._calls: list[SegmentCall] = []

    def take(self, call: SegmentCall, rows: Tensor) -> bool:
        """Whether the loss of these hidden TOKENS rows, (batch, rows, width), will be part of :meth:`loss`."""
        loss = self._model.loss
        if not self._open or not rows.requires_grad or not isinstance(loss, TokenLoss):
            return False
        rows = rows[:, rows.shape[1] - call.inputs.shape[1] :]
        flat = rows.flatten(0, 1)
        if len(flat) <= rows_of_a_chunk(self._model.head, flat, loss.rows):
            return False
        self._rows.append(rows)
        self._calls.append(call)
        return True

    def loss(self) -> Tensor | None:
        """That of all rows taken; None: there is none."""
        if not self._calls:
            return None
        loss, head, (first, *others) = self._model.loss, self._model.head, self._calls
        assert first.factor is not None
        if not others:  # several steps may be pending, each of which would hold a gradient of the head
            return loss.of_segment(self._rows.pop(), first.targets or (), first.counts, head, first.factor)
        targets = tuple(torch.cat(parts) for parts in zip(*(call.targets or () for call in self._calls), strict=True))
        hidden, period = torch.cat(self._rows), self._rows[0].shape[:2].numel()
        self._rows.clear()
        with gradients_at_once(period):
            return loss.of_segment(hidden, targets, None, head, first.factor)
