"""A sum of losses over rows, computed a chunk of rows at a time: the logits of all rows never exist.

Forward keeps nothing but its inputs; backward computes each chunk's logits again and goes back through them at once. So
nobody has to run the forward pass for the sake of the backward one, and a pass that recomputes a segment leaves it out.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
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
        return total(hidden if head is None else head(hidden), labels) * factor
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
            logits = _plain_linear(head, hidden, ctx.autocast) or _callable(head)
            for first in range(0, len(hidden), rows):
                part = slice(first, first + rows)
                value = value + total(logits(hidden[part]), labels[part])
        return value * factor

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, labels, factor, *state = ctx.saved_tensors
        again = RandomState.of(tuple(state), hidden.device).again() if state else nullcontext()
        with again:
            sweep = _Sweep(ctx.total, ctx.weights, ctx.autocast, grad * factor, ctx.needs_input_grad[3])
            linear = _plain_linear(ctx.head, hidden, ctx.autocast)
            grad_hidden = torch.empty_like(hidden) if sweep.hidden_asked else None
            value: Tensor | None = None
            for first in range(0, len(hidden), ctx.rows):
                part = slice(first, first + ctx.rows)
                if linear is None:
                    loss, found = sweep.through(_callable(ctx.head), hidden[part], labels[part])
                else:
                    loss, found = sweep.through_linear(linear, ctx.head, hidden[part], labels[part])
                if grad_hidden is not None:
                    grad_hidden[part] = 0 if found is None else found
                value = loss if value is None else value + loss
            if ctx.report is not None and value is not None:
                ctx.report.add_(value * factor)
        return (None, None, None, grad_hidden, None, None, *sweep.grads)


def _callable(head: Head) -> Callable[[Tensor], Tensor]:
    return (lambda hidden: hidden) if head is None else head


Autocast = tuple[str, torch.dtype, bool]  # device type, dtype, whether it is on


@dataclass(frozen=True)
class _Linear:
    """The weights of an ``nn.Linear`` in the dtype of its product."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden.to(self.weight.dtype), self.weight, self.bias)


def _plain_linear(head: Head, hidden: Tensor, autocast: Autocast) -> _Linear | None:
    """The head as one product, where it is nothing but that: its weights are cast once for all chunks."""
    if type(head) is not nn.Linear or head._forward_hooks or head._forward_pre_hooks:
        return None
    dtype = autocast[1] if autocast[2] and hidden.dtype is not torch.float64 else head.weight.dtype
    return _Linear(head.weight.detach().to(dtype), None if head.bias is None else head.bias.detach().to(dtype))


class _Sweep:
    """Back through one chunk after the other, adding up the gradients of the head's weights."""

    def __init__(
        self, total: Total, weights: Sequence[Tensor], autocast: Autocast, seed: Tensor, hidden_asked: bool
    ) -> None:
        self.total, self.weights, self.autocast, self.seed = total, weights, autocast, seed
        self.hidden_asked = hidden_asked
        self.grads: list[Tensor | None] = [None] * len(weights)

    def _loss(self, logits: Callable[[], Tensor], labels: Tensor) -> Tensor:
        kind, dtype, enabled = self.autocast
        with torch.enable_grad(), torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False):
            return self.total(logits(), labels)

    def through(self, head: Callable[[Tensor], Tensor], hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        """The chunk's loss and the gradient of its hidden rows, for any head."""
        piece = hidden.detach().requires_grad_(self.hidden_asked)
        loss = self._loss(lambda: head(piece), labels)
        inputs = ([piece] if self.hidden_asked else []) + list(self.weights)
        found = list(torch.autograd.grad(loss, inputs, self.seed.to(loss.dtype), allow_unused=True))
        grad_hidden = found.pop(0) if self.hidden_asked else None
        for i, new in enumerate(found):
            old = self.grads[i]
            self.grads[i] = new if old is None else old if new is None else old.add_(new)
        return loss.detach(), grad_hidden

    def through_linear(
        self, linear: _Linear, head: nn.Linear, hidden: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The same where the head is one product: the weight's gradient is added up in place."""
        piece = hidden.detach().to(linear.weight.dtype)
        logits = linear(piece).requires_grad_()
        loss = self._loss(lambda: logits, labels)
        (grad,) = torch.autograd.grad(loss, logits, self.seed.to(loss.dtype))
        for i, weight in enumerate(self.weights):
            old = self.grads[i]
            if weight is head.bias:
                new = grad.sum(0, dtype=weight.dtype)
                self.grads[i] = new if old is None else old.add_(new)
            elif old is None:
                self.grads[i] = (grad.t() @ piece).to(weight.dtype)
            elif old.dtype == grad.dtype:
                old.addmm_(grad.t(), piece)
            else:
                old.add_(grad.t() @ piece)
        return loss.detach(), (grad @ linear.weight).to(hidden.dtype) if self.hidden_asked else None
