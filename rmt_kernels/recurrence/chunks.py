"""A sum of losses over rows, computed a chunk of rows at a time: the logits of all rows never exist.

Forward keeps nothing but its inputs; backward computes each chunk's logits again and goes back through them at once. So
nobody has to run the forward pass for the sake of the backward one, and a pass that recomputes a segment leaves it out.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rmt_kernels.recurrence.randomness import RandomState

__all__ = ["chunked", "without_value"]

Head = Callable[[Tensor], Tensor] | None
Total = Callable[[Tensor, Tensor], Tensor]
_ENTRIES = {"cpu": 2**22}  # logits of a chunk, in float32 16 MiB; elsewhere larger ones are faster
_local = threading.local()


@contextmanager
def without_value(report: Tensor | None = None) -> Iterator[None]:
    """In this thread, chunked losses are zeros, right in their gradients alone.

    For passes whose value nobody reads. Backward adds the true value to ``report``, 0-dim, where it is given.
    """
    before = getattr(_local, "pass_", (True, None))
    _local.pass_ = (False, report)
    try:
        yield
    finally:
        _local.pass_ = before


def chunked(
    total: Total, head: Head, hidden: Tensor, labels: Tensor, factor: Tensor, rows: int | None = None
) -> Tensor:
    """``factor * total(head(hidden), labels)``, 0-dim, where total sums over rows.

    Args:
        total: ``(logits (n, ...), labels (n, ...))`` to their summed loss, 0-dim.
        head: ``(n, width)`` to ``(n, ...)``; None: hidden rows are logits. Gradients flow to its parameters.
        hidden, labels: (n, width) and (n, ...).
        factor: 0-dim; no gradient flows to it.
        rows: of a chunk. None: as many as make 4 Mi logits (16 Mi away from the CPU), at least 16.
    """
    if rows is None:
        limit = _ENTRIES.get(hidden.device.type, 2**24)
        rows = max(16, limit // _width(head, hidden) // 16 * 16)
    if len(hidden) <= rows:
        return _loss(total, head, hidden, labels) * factor
    weights = [p for p in head.parameters() if p.requires_grad] if isinstance(head, nn.Module) else []
    if any(hasattr(weight, "placements") for weight in weights):
        raise ValueError(
            "head: its parameters are sharded here; call fully_shard on the RecurrentMemory and on the backbone's "
            "blocks, but not on the head, whose parameters then belong to the root"
        )
    return _Chunked.apply(total, head, rows, hidden, labels, factor, *weights)  # type: ignore[no-any-return]


def _width(head: Head, hidden: Tensor) -> int:
    """Logits a row, as far as that can be seen without running the head."""
    if isinstance(head, nn.Module):
        wide = [m.out_features for m in head.modules() if isinstance(m, nn.Linear)]
        if wide:
            return max(wide)
    return hidden.shape[-1]


def _loss(total: Total, head: Head, hidden: Tensor, labels: Tensor) -> Tensor:
    return total(hidden if head is None else head(hidden), labels)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, total: Total, head: Head, rows: int, hidden: Tensor, labels: Tensor, factor: Tensor, *weights: Tensor
    ) -> Tensor:
        device = hidden.device
        wanted, ctx.report = getattr(_local, "pass_", (True, None))
        # A head may draw random numbers. Where the value is left out there is one draw, backward's own.
        state = RandomState.now(device).tensors() if ctx.report is None else ()
        ctx.total, ctx.head, ctx.rows, ctx.weights = total, head, rows, weights
        kind = device.type
        ctx.autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        ctx.save_for_backward(hidden, labels, factor, *state)
        value = factor.new_zeros(())
        if wanted:
            for first in range(0, len(hidden), rows):
                part = slice(first, first + rows)
                value = value + _loss(total, head, hidden[part], labels[part])
        return value * factor

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, labels, factor, *state = ctx.saved_tensors
        if not state:
            return _Chunked._sweep(ctx, grad, hidden, labels, factor)
        with RandomState.of(tuple(state), hidden.device).again():
            return _Chunked._sweep(ctx, grad, hidden, labels, factor)

    @staticmethod
    def _sweep(ctx: Any, grad: Tensor, hidden: Tensor, labels: Tensor, factor: Tensor) -> tuple[Tensor | None, ...]:
        kind, dtype, enabled = ctx.autocast
        asked = ctx.needs_input_grad[3]
        grad_hidden = torch.empty_like(hidden) if asked else None
        grad_weights: list[Tensor | None] = [None] * len(ctx.weights)
        seed, value = grad * factor, None
        for first in range(0, len(hidden), ctx.rows):
            part = slice(first, first + ctx.rows)
            piece = hidden[part].detach().requires_grad_(asked)
            with torch.enable_grad(), torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False):
                loss = _loss(ctx.total, ctx.head, piece, labels[part])
            inputs = ([piece] if asked else []) + list(ctx.weights)
            found = list(torch.autograd.grad(loss, inputs, seed.to(loss.dtype), allow_unused=True))
            if grad_hidden is not None:
                grad_hidden[part] = 0 if found[0] is None else found[0]
                found = found[1:]
            for i, new in enumerate(found):
                old = grad_weights[i]
                grad_weights[i] = new if old is None else old if new is None else old.add_(new)
            if ctx.report is not None:
                value = loss.detach() if value is None else value + loss.detach()
        if value is not None:
            ctx.report.add_(value * factor)
        return (None, None, None, grad_hidden, None, None, *grad_weights)
