"""The segments whose activations are kept: what can be computed for all of them at once is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rmt_kernels.recurrence.chunks import gradients_at_once

if TYPE_CHECKING:
    from rmt_kernels.recurrence.wrapper import Batch, RecurrentMemory, SegmentCall

__all__ = ["Window"]


class Window:
    """Segments ``first`` and after of a batch, as they are to be run.

    Their tokens are embedded at once, and their losses are one: the gradients of an embedding and of an output layer,
    as large as a vocabulary, are computed once a step and not once a segment.
    """

    def __init__(self, model: RecurrentMemory, batch: Batch, first: int) -> None:
        self._model, self._first = model, first
        self._calls = _embedded(model.embed, [batch.call(s) for s in range(first, batch.count)])
        # What a head draws comes between what two segments draw, so that every policy draws the same.
        self._even = batch.weighed is not None and batch.weighed.even and not model.head_draws()
        self._rows: list[Tensor] = []  # whose loss is still to be taken, (batch, TOKENS rows, width) each
        self._taken: list[SegmentCall] = []

    def call(self, s: int) -> SegmentCall:
        """What segment ``s`` is run with; without a loss where :meth:`loss` will take it."""
        call = self._calls[s - self._first]
        return replace(call, targets=None) if self._even else call

    def take(self, s: int, rows: Tensor) -> None:
        """The hidden TOKENS rows of segment ``s``."""
        call = self._calls[s - self._first]
        if self._even and call.targets is not None:
            self._rows.append(rows)
            self._taken.append(call)

    def loss(self) -> Tensor | None:
        """That of all rows taken; None: there is none."""
        if not self._taken:
            return None
        loss, head = self._model.loss, self._model.head
        targets = tuple(torch.cat(parts) for parts in zip(*(call.targets or () for call in self._taken), strict=True))
        hidden = torch.cat(self._rows)
        self._rows.clear()
        factor = self._taken[0].factor
        assert factor is not None
        with gradients_at_once():
            return loss.of_segment(hidden, targets, None, head, factor)


def _embedded(embed: nn.Module | None, calls: Sequence[SegmentCall]) -> Sequence[SegmentCall]:
    """Calls with rows in place of token numbers, where an embedding is nothing but a table."""
    if len(calls) < 2 or type(embed) is not nn.Embedding or "forward" in vars(embed):
        return calls
    if embed.max_norm is not None or embed.scale_grad_by_freq or embed._forward_hooks or embed._forward_pre_hooks:
        return calls
    rows = embed(torch.stack([call.inputs for call in calls])).unbind()
    return [replace(call, inputs=piece) for call, piece in zip(calls, rows, strict=True)]
