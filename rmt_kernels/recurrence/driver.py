"""``replay_step``: the replay without a graph over segments, each gone back through as soon as it is recomputed."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rmt_kernels.recurrence.chunks import without_value
from rmt_kernels.recurrence.parallel import Alone, unwrap
from rmt_kernels.recurrence.policies import Replay, ReplayError
from rmt_kernels.recurrence.randomness import RandomState
from rmt_kernels.recurrence.replay import go_back, no_attention
from rmt_kernels.recurrence.wrapper import Batch, RecurrentMemory, RecurrentOutput, SegmentCall, Stretch, bar
from rmt_kernels.tape import Tape

__all__ = ["Bodies", "replay_step"]


class Bodies(Protocol):
    """Another way to run a segment's two bodies; see :class:`ReplayGraphs`. None: that segment it can't serve."""

    def begin(self, model: nn.Module, batch: Batch, policy: Replay) -> bool:
        """Called first in each step, before anything has run; whether it can serve the step at all."""

    def roll(self, call: SegmentCall, memory: Tensor) -> Tensor | None:
        """The next memory, without a graph."""

    def back(
        self, call: SegmentCall, memory: Tensor, seed: Tensor, grad: Tensor | None, total: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        """Recompute and go back: the next memory and the gradient of ``memory``; the loss is added to ``total``."""


def replay_step(
    model: nn.Module,
    inputs: Tensor,
    *,
    labels: Tensor,
    lengths: Tensor | None = None,
    label_mask: Tensor | None = None,
    memory: Tensor | None = None,
    segment: int | None = None,
    policy: Replay | None = None,
    scaler: torch.amp.GradScaler | None = None,
    loss_scale: float = 1.0,
    sync: bool = True,
    gathered: bool = False,
    graphs: Bodies | None = None,
    progress: bool = False,
    **extra: Any,
) -> RecurrentOutput:
    """Forward and backward of one batch, exact, in the activation memory of one segment: gradients are in ``.grad``.

    All segments are run once without a graph, keeping what enters each. Then, from the last to the first, a segment is
    run again and gone back through at once, from its loss and from the gradient of the memory that it handed on: one
    traversal (arXiv 2010.06891, algorithm 1, which makes two). Call it in place of the forward pass and
    ``loss.backward()``, inside ``torch.autocast`` where that is used.

    It differs from ``bptt=Replay()`` in that gradients of parameters are added up in ``.grad``, in the parameter's
    dtype, segment by segment; that no graph spans the segments; and that the head runs once less.

    Args:
        model: a RecurrentMemory, or one inside DistributedDataParallel, or one that ``fully_shard`` was called on (it
            must be the root).
        inputs, labels, lengths, label_mask, memory, segment, extra: as :meth:`RecurrentMemory.forward`.
        policy: None: the model's ``bptt``, which must be Replay then.
        scaler: scales the gradients, as ``scaler.scale(loss).backward()``.
        loss_scale: gradients are multiplied by it, 1/n for n accumulated batches; the returned loss is not.
        sync: whether gradients are averaged over processes, once, in the last traversal. False: while accumulating.
        gathered: FSDP2 only: parameters stay gathered from the first segment to the last, for the fewest all-gathers,
            at the price of unsharded parameters in memory. It leaves ``set_reshard_after_forward(False)`` behind.
        graphs: :class:`ReplayGraphs`, to replay CUDA graphs.
        progress: show a progress bar.

    Returns:
        RecurrentOutput: the loss, detached; the final memory, detached; no outputs.

    Raises:
        TypeError, ValueError: an argument that is not accepted; gradients and random state are unchanged.
        ReplayError: the backward sweep failed: ``.grad`` is partial and must be zeroed; the random state is as before
            the call. Any other error leaves gradients and random state as they were.
    """
    inner, parallel = unwrap(model, gathered)
    inner.refuse_wrapped_parts()
    if not torch.is_grad_enabled():
        raise ValueError("replay_step computes gradients: call it outside torch.no_grad()")
    if policy is None:
        if not isinstance(inner.bptt, Replay):
            raise ValueError(f"policy: the model's bptt is {inner.bptt}; give policy=Replay(...)")
        policy = inner.bptt
    if not isinstance(policy, Replay):
        raise TypeError(f"policy must be Replay(...), got {policy!r}")
    if not isinstance(labels, Tensor):
        raise TypeError(
            f"labels must be a torch.Tensor, got {type(labels).__name__}; replay_step goes back from a loss"
        )
    if scaler is not None and not isinstance(scaler, torch.amp.GradScaler):
        raise TypeError(f"scaler must be a torch.amp.GradScaler or None, got {type(scaler).__name__}")
    if isinstance(loss_scale, bool) or not isinstance(loss_scale, (int, float)):
        raise TypeError(f"loss_scale must be a float, got {type(loss_scale).__name__}")
    if graphs is not None and not all(hasattr(graphs, name) for name in ("begin", "roll", "back")):
        raise TypeError(f"graphs must be ReplayGraphs() or None, got {type(graphs).__name__}")
    if "outputs" in extra:
        raise TypeError("outputs: replay_step returns none; call the model under torch.no_grad() for them")
    for name, value in {"inputs": inputs, **extra}.items():
        if isinstance(value, Tensor) and value.grad_fn is not None:
            raise ValueError(
                f"{name} has a graph of its own, which every segment would go back through; give replay_step its "
                "detach(), or use bptt=Replay() and loss.backward()"
            )
    if parallel.sharded and isinstance(memory, Tensor):  # mixed precision of FSDP2 returns it in its own dtype
        memory = memory.to(inner.initial_memory.dtype)
    batch = inner.batch(
        inputs, labels=labels, lengths=lengths, label_mask=label_mask, memory=memory, segment=segment, **extra
    )
    with RandomState.unless_it_fails(inputs.device) as before:
        step = _Step(model, inner, parallel, batch, policy, memory, graphs, sync)
        with parallel:
            step.forward(bar(batch.count, progress, "segment forward"))
            after = RandomState.now(inputs.device)
            try:
                seed = step.seed(scaler, loss_scale)
                step.backward(seed, bar(step.first_kept + 1, progress, "segment back"))
            except Exception as error:
                before.restore()
                raise ReplayError(
                    f"the backward sweep failed ({type(error).__name__}: {error}); .grad is partial: call "
                    "zero_grad() before the next step"
                ) from error
        after.restore()
    # Mixed precision of FSDP2 computes in another dtype than the parameters have outside.
    return RecurrentOutput(step.total, step.last.to(inner.initial_memory.dtype), None)


@dataclass
class _Step:
    """One call of :func:`replay_step`."""

    model: nn.Module
    inner: RecurrentMemory
    parallel: Alone
    batch: Batch
    policy: Replay
    start: Tensor | None
    graphs: Bodies | None
    sync: bool

    def __post_init__(self) -> None:
        self.count, self.device = self.batch.count, self.batch.inputs.device
        dtype = self.inner.initial_memory.dtype
        if self.graphs is not None and not self.graphs.begin(self.model, self.batch, self.policy):
            self.graphs = None
        kept = self.inner.kept(self.batch, self.policy, self._once)
        # A graph replays a segment faster than the loop keeps one.
        self.first_kept = self.count - (0 if self.graphs is not None else kept)
        self.total = torch.zeros((), dtype=torch.promote_types(dtype, torch.float32), device=self.device)
        # What the head draws comes between what two segments draw.
        self.head_draws = self.inner.head_draws()
        # A compiled backbone may draw other random numbers without gradients; there, a graph is made and dropped.
        self.roll_with_graph = self.inner.compiled()
        self.memories: list[Tensor | None] = []  # entering each segment that is run again
        self.states: list[RandomState] = []
        self.tapes: list[Tape | None] = []

    def _once(self, call: SegmentCall) -> Any:
        with self.parallel.segment(False):
            return self.model(Stretch((call,), (False,)), memory=self.start)

    # -- forward -------------------------------------------------------------------------------------------------------

    def forward(self, order: Iterable[int]) -> None:
        """Roll over the segments that are not kept; then the kept ones, with a graph."""
        memory, turns = self.start, iter(order)
        for s in range(self.first_kept):
            next(turns)
            self.memories.append(self._put_away(memory) if s else memory)
            self.states.append(RandomState.now(self.device))
            memory = self._roll(s, memory)
        # What enters the first segment of all is the parameter, or belongs to the caller: no leaf of ours.
        self.entering = memory if self.first_kept == 0 else _leaf(memory)
        self.loss: Tensor | None = None
        if self.first_kept < self.count:
            numbers = range(self.first_kept, self.count)
            cuts = (False, *(self.policy.cuts(s, self.count) for s in numbers[1:]))
            with self.parallel.segment(self.sync and self.first_kept == 0), self._value():
                window = Stretch(tuple(self._call(s) for s in numbers), cuts)
                self.loss, memory, _ = self.model(window, memory=self.entering)
        for _ in turns:
            pass
        assert memory is not None
        self.last = memory.detach()

    def _value(self) -> AbstractContextManager[None]:
        """Around a forward pass with a graph: the loss is added to the total by its backward pass."""
        return nullcontext() if self.head_draws else without_value(self.total)

    def _call(self, s: int, loss: bool = True) -> SegmentCall:
        # The traversal that synchronises must reach every parameter, so the first segment's loss is not left out there.
        return self.batch.call(s, loss=loss, silent=s > 0 or not self.parallel.synchronises)

    def _roll(self, s: int, memory: Tensor | None) -> Tensor:
        if self.graphs is not None:
            rolled = self.graphs.roll(self._call(s), self.inner.entering(self.batch, memory).detach())
            if rolled is not None:
                self.tapes.append(None)
                return rolled
        call = self._call(s, loss=self.head_draws)
        tape = Tape() if self.policy.recompute == "except_attention" else None
        self.tapes.append(tape)
        with nullcontext() if tape is None else tape.recording(), torch.set_grad_enabled(self.roll_with_graph):
            found = self.parallel.roller(self.model, self.inner)(Stretch((call,), (False,)), memory=memory)
        if tape is not None and not len(tape):
            raise no_attention()
        new: Tensor = found.memory.detach()
        return new

    def _put_away(self, memory: Tensor | None) -> Tensor | None:
        if memory is None or not self.policy.offload or memory.device.type == "cpu":
            return memory
        host = torch.empty(memory.shape, dtype=memory.dtype, pin_memory=True)
        return host.copy_(memory, non_blocking=True)

    # -- backward ------------------------------------------------------------------------------------------------------

    def seed(self, scaler: torch.amp.GradScaler | None, loss_scale: float) -> Tensor:
        """The gradient of the loss itself."""
        seed = torch.full_like(self.total, loss_scale)
        return seed if scaler is None else scaler.scale(seed)

    def backward(self, seed: Tensor, order: Iterable[int]) -> None:
        """The kept segments' traversal, then the others, last to first."""
        turns = iter(order)
        next(turns)
        grad: Tensor | None = None
        handed_on = self.last
        if self.first_kept < self.count:
            with self.parallel.segment(self.sync and self.first_kept == 0):
                go_back(self.loss, seed, None, None, self.total)
            if self.first_kept:
                assert self.entering is not None
                handed_on, grad = self.entering.detach(), self.entering.grad
        self.loss = self.entering = None
        for s in reversed(range(self.first_kept)):
            next(turns)
            if self.policy.cuts(s + 1, self.count):
                grad = None
            handed_on, grad = self._back(s, seed, grad, handed_on)
        for _ in turns:
            pass

    def _back(self, s: int, seed: Tensor, grad: Tensor | None, handed_on: Tensor) -> tuple[Tensor, Tensor | None]:
        """Run segment ``s`` again and go back through it; returns the memory that entered it, and its gradient."""
        memory, state, tape = self.memories.pop(), self.states.pop(), self.tapes.pop()
        if memory is not None:
            memory = memory.to(self.device, non_blocking=True)
        call = self._call(s)
        state.restore()
        if self.graphs is not None:
            source = self.inner.entering(self.batch, memory)
            found = self.graphs.back(call, source.detach(), seed, grad, self.total)
            if found is not None:
                new, grad_in = found
                self._compare(s, new, handed_on)
                if s == 0 and source.requires_grad:
                    source.backward(grad_in)
                return source.detach(), grad_in
        entering = memory if s == 0 else _leaf(memory)
        with self.parallel.segment(self.sync and s == 0):
            with self._value(), nullcontext() if tape is None else tape.replaying():
                loss, new, _ = self.model(Stretch((call,), (False,)), memory=entering)
            self._compare(s, new, handed_on)
            go_back(loss, seed, new, grad, self.total)
        if s == 0:
            return handed_on, None
        assert entering is not None
        return entering.detach(), entering.grad

    def _compare(self, s: int, new: Tensor, handed_on: Tensor) -> None:
        if not self.policy.check:
            return
        again = new.detach()
        if not bool(((again == handed_on) | (again.isnan() & handed_on.isnan())).all()):
            apart = (again - handed_on).abs().max().item()
            raise RuntimeError(
                f"segment {s} was recomputed with a memory that differs by up to {apart:.1e} from that of the forward "
                "pass; the backbone must depend on its inputs and PyTorch's random numbers alone, and compute "
                "deterministically"
            )


def _leaf(memory: Tensor | None) -> Tensor:
    assert memory is not None
    return memory.detach().requires_grad_()
