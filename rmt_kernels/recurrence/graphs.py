"""The driver's two bodies as CUDA graphs: captured for a segment's shape once, replayed for every segment.

At batch 1 a segment of 512 tokens is over sooner than Python has launched its kernels. A graph launches them at once.
The unit is one segment with fixed addresses: its inputs are copied in, the memory and its gradient are copied out, and
gradients of parameters are added to ``.grad`` where they lie. Random numbers repeat because a graph takes the
generator's state when it is replayed: both bodies begin with the same forward pass, from the same state.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from rmt_kernels.recurrence.checks import at_least
from rmt_kernels.recurrence.chunks import without_value
from rmt_kernels.recurrence.policies import Replay
from rmt_kernels.recurrence.randomness import RandomState
from rmt_kernels.recurrence.replay import go_back
from rmt_kernels.recurrence.wrapper import Batch, RecurrentMemory, SegmentCall, Stretch

__all__ = ["ReplayGraphs"]

Found = TypeVar("Found")
Run = Callable[[], None]
Capture = Callable[[Run, Callable[[], None]], Run]


class _CaptureError(RuntimeError):
    """A segment does something that a graph can't hold."""


class ReplayGraphs:
    """Captured segments of one model, for ``replay_step(graphs=...)``. Keep it from step to step.

    What it can't serve runs eagerly, with a RuntimeWarning that says why, once; :attr:`reasons` keeps them. Segments of
    another shape, such as a short one, are captured on their own, up to ``shapes`` of them. Captured graphs are dropped
    where a parameter has moved. ``.grad`` of every parameter is held by it, so ``zero_grad(set_to_none=True)`` frees
    nothing.

    Args:
        shapes: how many shapes of segments are captured.
        warmup: runs before a capture, on a stream of their own.

    Raises:
        ValueError: used with another model than the first one.
    """

    def __init__(self, *, shapes: int = 4, warmup: int = 3) -> None:
        for name, value in (("shapes", shapes), ("warmup", warmup)):
            at_least(name, value, 1)
        self.shapes, self.warmup = shapes, warmup
        self.reasons: list[str] = []
        self._model: RecurrentMemory | None = None
        self._bodies: dict[Any, _Bodies | None] = {}
        self._gradients: dict[nn.Parameter, Tensor] = {}
        self._places: Any = None
        self._held: Any = None
        self._modes: tuple[bool, ...] = ()
        self._attached = False
        self._pool: Any = None

    # -- what replay_step calls ----------------------------------------------------------------------------------------

    def begin(self, model: nn.Module, batch: Batch, policy: Replay) -> bool:
        """Whether this step can be served."""
        reason = self._objection(model, batch, policy)
        if reason is not None:
            self._explain(reason)
            return False
        assert isinstance(model, RecurrentMemory)
        if self._model is not None and self._model is not model:
            raise ValueError("graphs: these were captured for another model; make a ReplayGraphs for each")
        self._model = model
        tensors = (*model.parameters(), *model.buffers())
        places = ([(id(t), t.data_ptr(), t.requires_grad) for t in tensors], id(model.loss))
        if places != self._places:
            self._places, self._held = places, (tensors, model.loss)  # held, so that no other takes their id
            self._bodies.clear()
            self._gradients.clear()
        self._modes = tuple(module.training for module in model.modules())
        self._attached = False
        return True

    def roll(self, call: SegmentCall, memory: Tensor) -> Tensor | None:
        """The next memory, or None where the segment can't be served."""
        return self._served(call, memory, lambda bodies, call: bodies.roll(call, memory))

    def back(
        self, call: SegmentCall, memory: Tensor, seed: Tensor, grad: Tensor | None, total: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        """The next memory and the gradient of ``memory``; the loss is added to ``total``. None: can't be served."""
        if not self._attached:  # not in begin: until the sweep, gradients stay as they were
            assert self._model is not None
            for parameter in self._model.parameters():
                if parameter.requires_grad:
                    self._attach(parameter)
            self._attached = True
        return self._served(call, memory, lambda bodies, call: bodies.back(call, memory, seed, grad, total))

    # -- how -----------------------------------------------------------------------------------------------------------

    def _objection(self, model: nn.Module, batch: Batch, policy: Replay) -> str | None:
        if not self._on_gpu(batch.inputs.device):
            return f"CUDA graphs need a CUDA device, the model is on {batch.inputs.device}"
        if not isinstance(model, RecurrentMemory) or model.sharded():
            return "a data-parallel model is not captured: its gradients are averaged by hooks outside of a graph"
        if model.check_memory:
            return "check_memory=True looks at values, which a graph can't"
        if policy.recompute != "all":
            return f"recompute={policy.recompute!r} records attention call by call, and a replayed graph makes no calls"
        if model.head_draws():
            return "the head draws random numbers, and its loss is computed twice from one state, which a graph can't"
        if any(isinstance(t, Tensor) and t.requires_grad for t in (batch.inputs, *batch.extra.values())):
            return "inputs or extra arguments need a gradient, which would lie where the captured ones' was"
        return None

    @staticmethod
    def _on_gpu(device: torch.device) -> bool:
        return device.type == "cuda"

    def _explain(self, reason: str) -> None:
        if reason not in self.reasons:
            self.reasons.append(reason)
            warnings.warn(f"replay_step runs without CUDA graphs: {reason}", RuntimeWarning, stacklevel=6)

    def _attach(self, parameter: nn.Parameter) -> None:
        lasting = self._gradients.get(parameter)
        if lasting is None:
            lasting = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            self._gradients[parameter] = lasting
        if parameter.grad is None:
            lasting.zero_()
        elif parameter.grad is not lasting:
            lasting.copy_(parameter.grad)
        parameter.grad = lasting

    def _served(self, call: SegmentCall, memory: Tensor, use: Callable[[_Bodies, SegmentCall], Found]) -> Found | None:
        assert self._model is not None
        call = replace(call, output=None)
        try:
            key = (_shape(call, memory), self._modes, _autocast(memory.device.type))
            hash(key)
        except TypeError:
            self._explain("the backbone's extra arguments hold something other than tensors and hashable values")
            return None
        if key not in self._bodies:
            if len(self._bodies) >= self.shapes:
                self._explain(f"{self.shapes} shapes of segments are captured already; see ReplayGraphs(shapes=...)")
                return None
            self._bodies[key] = _Bodies(self._model, call, memory, self._capture)
        bodies = self._bodies[key]
        if bodies is None:
            return None
        try:
            return use(bodies, call)
        except _CaptureError as error:
            self._bodies[key] = None
            self._explain(f"a segment could not be captured: {error}")
            return None

    def _capture(self, run: Run, reset: Run) -> Run:
        """``run`` as a graph: warmed up, captured; gradients and random state are as before."""
        assert self._model is not None
        device = self._model.initial_memory.device
        before, held = RandomState.now(device), {p: p.grad for p in self._model.parameters()}
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        try:
            for parameter in held:
                parameter.grad = None
            with torch.cuda.stream(stream):
                for _ in range(self.warmup):
                    run()
            torch.cuda.current_stream(device).wait_stream(stream)
            for parameter, grad in held.items():
                parameter.grad = grad
            reset()
            graph = torch.cuda.CUDAGraph()
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            try:
                with torch.cuda.graph(graph, pool=self._pool, stream=stream):
                    run()
            except RuntimeError as error:
                raise _CaptureError(str(error)) from error
        finally:
            for parameter, grad in held.items():
                parameter.grad = grad
            before.restore()
        replayed: Run = graph.replay
        return replayed


class _Bodies:
    """Both bodies for segments of one shape, and the tensors at their fixed addresses."""

    def __init__(self, model: RecurrentMemory, call: SegmentCall, memory: Tensor, capture: Capture) -> None:
        self._model, self._grad_to_roll = model, model.compiled()
        self._call = _map(call, torch.clone)
        self._memory = memory.clone()
        self._grad = torch.zeros_like(self._memory)
        self._total = torch.zeros((), dtype=torch.promote_types(memory.dtype, torch.float32), device=memory.device)
        self._seed = torch.ones_like(self._total)
        self._new, self._grad_in = torch.empty_like(self._memory), torch.empty_like(self._memory)
        self._leaf = self._memory.detach().requires_grad_()
        self._make = capture
        self._rolled: Run | None = None
        self._backed: Run | None = None

    def roll(self, call: SegmentCall, memory: Tensor) -> Tensor:
        self._load(call, memory)
        if self._rolled is None:
            self._rolled = self._make(self._roll, self._reset)
        self._rolled()
        return self._new.clone()

    def back(
        self, call: SegmentCall, memory: Tensor, seed: Tensor, grad: Tensor | None, total: Tensor
    ) -> tuple[Tensor, Tensor]:
        self._load(call, memory)
        if self._backed is None:
            self._backed = self._make(self._back, self._reset)
        self._seed.copy_(seed)
        if grad is None:
            self._grad.zero_()
        else:
            self._grad.copy_(grad)
        self._total.zero_()
        self._backed()
        total += self._total
        return self._new.clone(), self._grad_in.clone()

    def _load(self, call: SegmentCall, memory: Tensor) -> None:
        for mine, given in zip(_tensors(self._call), _tensors(call), strict=True):
            mine.copy_(given)
        self._memory.copy_(memory)

    def _reset(self) -> None:
        self._leaf.grad = None
        self._total.zero_()

    def _roll(self) -> None:
        call = replace(self._call, targets=None, factor=None)
        with torch.set_grad_enabled(self._grad_to_roll):
            found = self._model(Stretch((call,), (False,)), memory=self._memory)  # type: ignore[arg-type]
        self._new.copy_(found.memory.detach())

    def _back(self) -> None:
        self._leaf.grad = None
        with torch.enable_grad(), without_value(self._total):
            loss, new, _ = self._model(Stretch((self._call,), (False,)), memory=self._leaf)  # type: ignore[arg-type]
        go_back(loss, self._seed, new, self._grad, self._total)
        self._new.copy_(new.detach())
        if self._leaf.grad is None:
            self._grad_in.zero_()
        else:
            self._grad_in.copy_(self._leaf.grad)
        self._leaf.grad = None


def _tensors(call: SegmentCall) -> list[Tensor]:
    """The tensors of a call."""
    extra = [value for value in call.extra.values() if isinstance(value, Tensor)]
    loss = [tensor for tensor in (*(call.targets or ()), call.factor) if tensor is not None]
    return [tensor for tensor in (call.inputs, call.counts, *extra, *loss) if tensor is not None]


def _map(call: SegmentCall, function: Callable[[Tensor], Tensor]) -> SegmentCall:
    return replace(
        call,
        inputs=function(call.inputs),
        counts=None if call.counts is None else function(call.counts),
        targets=None if call.targets is None else tuple(function(target) for target in call.targets),
        factor=None if call.factor is None else function(call.factor),
        extra={k: function(v) if isinstance(v, Tensor) else v for k, v in call.extra.items()},
    )


def _shape(call: SegmentCall, memory: Tensor) -> tuple[Any, ...]:
    """What has to be equal for a captured segment to serve this one."""
    tensors = tuple((tuple(t.shape), t.dtype) for t in (*_tensors(call), memory))
    fixed = tuple((name, None if isinstance(value, Tensor) else value) for name, value in sorted(call.extra.items()))
    return tensors, call.counts is None, call.targets is None, call.layout, fixed


def _autocast(kind: str) -> torch.dtype | None:
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
