"""A sum of losses over rows, computed a chunk of rows at a time: the logits of all rows never exist.

Forward keeps nothing but its inputs; backward computes each chunk's logits again and goes back through them at once. So
nobody has to run the forward pass for the sake of the backward one, and a pass that recomputes a segment leaves it out.
Where a backward pass is sure to follow, forward goes back at once (:func:`gradients_at_once`), and logits are computed
once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rmt_kernels.recurrence.randomness import RandomState

__all__ = ["chunked", "gradients_at_once", "is_plain", "rows_of_a_chunk", "without_value"]

Head = Callable[[Tensor], Tensor] | None
Total = Callable[[Tensor, Tensor], Tensor]
_ENTRIES = {"cpu": 2**22}  # logits of a chunk, in float32 16 MiB; elsewhere larger ones are faster
_GROUP = 8  # chunks whose gradients are added up in a narrow weight's dtype; groups are added up in float32
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


@contextmanager
def gradients_at_once(period: int | None = None) -> Iterator[None]:
    """In this thread, the forward pass of chunked losses computes their gradients, and holds them for backward.

    Spares a quarter of the head's products, those that compute the logits again in backward, and holds a gradient of
    the head's weight for each loss: for one loss a step. Without effect where the head is more than an ``nn.Linear``,
    where the loss learns, and in float16, whose gradients need the factor that backward brings.

    ``period``: rows of a segment, whose border no chunk crosses, so that chunks are those of a segment on its own.
    """
    before = getattr(_local, "at_once", (False, None))
    _local.at_once = (True, period)
    try:
        yield
    finally:
        _local.at_once = before


def chunked(
    total: Total,
    head: Head,
    hidden: Tensor,
    labels: Tensor,
    factor: Tensor,
    rows: int | None = None,
    learned: nn.Module | None = None,
) -> Tensor:
    """``factor * total(head(hidden), labels)``, 0-dim, where total sums over rows.

    Args:
        total: ``(logits (n, ...), labels (n, ...))`` to their summed loss, 0-dim.
        head: ``(n, width)`` to ``(n, ...)``; None: hidden rows are logits. Gradients flow to its parameters.
        hidden, labels: (n, width) and (n, ...).
        factor: 0-dim; no gradient flows to it.
        learned: to whose parameters gradients flow too: what ``total`` learns.
        rows: of a chunk. None: as many as make 4 Mi logits (16 Mi away from the CPU), at least 16.
    """
    rows = rows_of_a_chunk(head, hidden, rows)
    if len(hidden) <= rows:
        return total(hidden if head is None else head(hidden), labels) * factor
    modules = [module for module in (head, learned) if isinstance(module, nn.Module)]
    weights = list(dict.fromkeys(p for module in modules for p in module.parameters() if p.requires_grad))
    if any(hasattr(weight, "placements") for weight in weights):
        raise ValueError(
            "head: its parameters are sharded here; call fully_shard on the RecurrentMemory and on the backbone's "
            "blocks, but not on the head, whose parameters then belong to the root"
        )
    wanted, report = getattr(_local, "pass_", (True, None))
    at_once, period = getattr(_local, "at_once", (False, None))
    at_once = at_once and wanted
    if not torch.is_grad_enabled() or not (hidden.requires_grad or weights):
        wanted, report, at_once = True, None, False  # no backward pass will follow that could report the value
    plan = _Plan(total, head, learned, rows, tuple(weights), _autocast(hidden), wanted, report, at_once, period)
    return _Chunked.apply(plan, hidden, labels, factor, *weights)  # type: ignore[no-any-return]


def rows_of_a_chunk(head: Head, hidden: Tensor, rows: int | None) -> int:
    """``rows``, or how many :func:`chunked` takes where it is None."""
    if rows is not None:
        return rows
    limit = _ENTRIES.get(hidden.device.type, 2**24)
    return max(16, limit // _width(head, hidden) // 16 * 16)


def _width(head: Head, hidden: Tensor) -> int:
    """Logits a row, as far as that can be seen without running the head."""
    if isinstance(head, nn.Module):
        wide = [m.out_features for m in head.modules() if isinstance(m, nn.Linear)]
        if wide:
            return max(wide)
    return hidden.shape[-1]


Autocast = tuple[str, torch.dtype, bool]  # device type, dtype, whether it is on


def _autocast(hidden: Tensor) -> Autocast:
    kind = hidden.device.type
    return kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)


@dataclass(frozen=True)
class _Plan:
    """What is computed, and how."""

    total: Total
    head: Head
    learned: nn.Module | None
    rows: int
    weights: tuple[Tensor, ...]
    autocast: Autocast
    wanted: bool  # the value
    report: Tensor | None
    at_once: bool  # gradients, in the forward pass
    period: int | None  # rows after which a chunk begins anew

    def parts(self, rows: int) -> Iterator[slice]:
        """The chunks of so many rows."""
        period = self.period or rows
        for begin in range(0, rows, period):
            end = min(begin + period, rows)
            for first in range(begin, end, self.rows):
                yield slice(first, min(first + self.rows, end))


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: _Plan, hidden: Tensor, labels: Tensor, factor: Tensor, *weights: Tensor) -> Tensor:
        # A head may draw random numbers. Where the value is left out there is one draw, backward's own.
        state = RandomState.now(hidden.device).tensors() if plan.report is None else ()
        ctx.plan, ctx.versions = plan, [weight._version for weight in weights]
        ctx.save_for_backward(hidden, labels, factor, *state)
        linear = _plain_linear(plan.head, hidden, plan.autocast)
        ctx.found = None
        alone = linear is not None and linear.weight.dtype is not torch.float16 and plan.learned is None
        if plan.at_once and alone:
            sweep = _Sweep(plan, factor, ctx.needs_input_grad[1])
            value, grad_hidden = sweep.through_all(linear, hidden, labels)
            ctx.found = grad_hidden, sweep.grads
            return value * factor
        value = factor.new_zeros(())
        if plan.wanted:
            logits = linear or _callable(plan.head)
            for part in plan.parts(len(hidden)):
                value = value + plan.total(logits(hidden[part]), labels[part])
        return value * factor

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "losses in chunks are differentiable once; for second derivatives give TokenLoss(rows=...) as many "
                "rows as a batch's segment has"
            )
        plan, (hidden, labels, factor, *state) = ctx.plan, ctx.saved_tensors
        if [weight._version for weight in plan.weights] != ctx.versions:
            raise RuntimeError(
                "one of the head's weights has been modified by an inplace operation since the forward pass"
            )
        if ctx.found is not None:
            # Handed out, and no longer there for a second traversal, which computes its own.
            (grad_hidden, grads), ctx.found = ctx.found, None
            _scale([grad_hidden, *grads], grad)
            return (None, grad_hidden, None, None, *grads)
        again = RandomState.of(tuple(state), hidden.device).again() if state else nullcontext()
        with again:
            sweep = _Sweep(plan, grad * factor, ctx.needs_input_grad[1])
            linear = _plain_linear(plan.head, hidden, plan.autocast)
            value, grad_hidden = sweep.through_all(linear, hidden, labels)
            if plan.report is not None:
                plan.report.add_(value * factor)
        return (None, grad_hidden, None, None, *sweep.grads)


def _scale(found: list[Tensor | None], grad: Tensor) -> None:
    """In place, and not at all where it can be seen that ``grad`` is 1."""
    if grad.device.type == "cpu" and grad.item() == 1:
        return
    for tensor in found:
        if tensor is not None:
            tensor.mul_(grad)


def is_plain(head: Head) -> bool:
    """Whether a head is nothing but an ``nn.Linear``."""
    if type(head) is not nn.Linear or "forward" in vars(head):
        return False
    return not (head._forward_hooks or head._forward_pre_hooks or head._backward_hooks or head._backward_pre_hooks)


def _callable(head: Head) -> Callable[[Tensor], Tensor]:
    return (lambda hidden: hidden) if head is None else head


@dataclass(frozen=True)
class _Linear:
    """The weights of an ``nn.Linear`` in the dtype of its product."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden.to(self.weight.dtype), self.weight, self.bias)


def _plain_linear(head: Head, hidden: Tensor, autocast: Autocast) -> _Linear | None:
    """The head as one product, where it is nothing but that: its weights are cast once for all chunks."""
    if not is_plain(head):
        return None
    assert isinstance(head, nn.Linear)
    dtype = autocast[1] if autocast[2] and hidden.dtype is not torch.float64 else head.weight.dtype
    return _Linear(head.weight.detach().to(dtype), None if head.bias is None else head.bias.detach().to(dtype))


class _Sweep:
    """Back through one chunk after the other, adding up the gradients of the weights."""

    def __init__(self, plan: _Plan, seed: Tensor, hidden_asked: bool) -> None:
        self.plan, self.seed, self.hidden_asked = plan, seed, hidden_asked
        self.grads: list[Tensor | None] = [None] * len(plan.weights)
        self._groups: list[Tensor | None] = [None] * len(plan.weights)
        self._checked = False

    def through_all(self, linear: _Linear | None, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        """The sum over all chunks, and the gradient of the hidden rows; ``linear``: the head as one product."""
        if self.plan.learned is not None:
            linear = None  # a loss that learns may use the head's weights too
        grad_hidden = torch.empty_like(hidden) if self.hidden_asked else None
        value = self.seed.new_zeros(())
        # The hooks of a checkpoint around all of this are not for what begins and ends in here.
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
            for chunk, part in enumerate(self.plan.parts(len(hidden))):
                if chunk and chunk % _GROUP == 0:
                    self._close_group()
                if linear is None:
                    loss, found = self.through(hidden[part], labels[part])
                else:
                    loss, found = self.through_linear(linear, hidden[part], labels[part])
                if grad_hidden is not None:
                    grad_hidden[part] = 0 if found is None else found
                value = value + loss
        if any(group is not None for group in self._groups):
            self._close_group()
            for i, group in enumerate(self._groups):
                if group is not None:
                    self.grads[i] = group.to(self.plan.weights[i].dtype)
                    self._groups[i] = None
        return value, grad_hidden

    def _close_group(self) -> None:
        """Add the gradients of narrow weights, so far, to sums in float32, in which small ones are not lost."""
        for i, grad in enumerate(self.grads):
            if grad is not None and grad.dtype in (torch.bfloat16, torch.float16):
                group = self._groups[i]
                if group is None:
                    self._groups[i] = grad.float()
                else:  # in parts, each of which the processor casts
                    rows = max(1, _ENTRIES["cpu"] // grad[0].numel())
                    for total, part in zip(group.split(rows), grad.split(rows), strict=True):
                        total.add_(part)
                self.grads[i] = None

    def _loss(self, logits: Callable[[], Tensor], labels: Tensor) -> Tensor:
        kind, dtype, enabled = self.plan.autocast
        with torch.enable_grad(), torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False):
            return self.plan.total(logits(), labels)

    def _add(self, weight: int, new: Tensor | None) -> None:
        """Not in place: autograd may give two weights one tensor."""
        old = self.grads[weight]
        self.grads[weight] = new if old is None else old if new is None else old + new

    def through(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        """The chunk's loss and the gradient of its hidden rows, for any head."""
        piece = hidden.detach().requires_grad_(self.hidden_asked)
        loss = self._loss(lambda: _callable(self.plan.head)(piece), labels)
        self._check_leaves(loss, piece)
        inputs = ([piece] if self.hidden_asked else []) + list(self.plan.weights)
        found = list(torch.autograd.grad(loss, inputs, self.seed.to(loss.dtype), allow_unused=True))
        grad_hidden = found.pop(0) if self.hidden_asked else None
        for i, new in enumerate(found):
            self._add(i, new)
        return loss.detach(), grad_hidden

    def through_linear(self, linear: _Linear, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        """The same where the head is one product: its weight's gradient is added up in place."""
        piece = hidden.detach().to(linear.weight.dtype)
        logits = linear(piece).requires_grad_()
        loss = self._loss(lambda: logits, labels)
        self._check_leaves(loss, logits)
        (grad,) = torch.autograd.grad(loss, logits, self.seed.to(loss.dtype))
        head: Any = self.plan.head
        for i, weight in enumerate(self.plan.weights):
            old = self.grads[i]
            if weight is head.bias:
                self._add(i, grad.sum(0, dtype=weight.dtype))
            elif old is None:
                self.grads[i] = (grad.t() @ piece).to(weight.dtype)
            elif old.dtype == grad.dtype:
                old.addmm_(grad.t(), piece)
            else:
                old.add_(grad.t() @ piece)
        return loss.detach(), (grad @ linear.weight).to(hidden.dtype) if self.hidden_asked else None

    def _check_leaves(self, loss: Tensor, *inputs: Tensor) -> None:
        """Once: what else the loss depends on would get no gradient."""
        if self._checked:
            return
        self._checked = True
        known = {id(tensor) for tensor in (*inputs, *self.plan.weights)}
        nodes, seen = [loss.grad_fn], set()
        while nodes:
            node = nodes.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            leaf = getattr(node, "variable", None)
            if leaf is not None and id(leaf) not in known:
                raise ValueError(
                    f"function: the loss learns a tensor of shape {tuple(leaf.shape)} that is neither the head's nor "
                    "its own parameter; make the loss function a torch.nn.Module that has it"
                )
            nodes += [parent for parent, _ in node.next_functions]
