"""The loop over segments under autograd, and its default engine: a checkpoint around each segment.

``torch.utils.checkpoint`` (non-reentrant) drops a segment's activations, keeps the memory that entered it and the
random state, and runs it again in the backward pass. Under DistributedDataParallel and FSDP2 it needs no arrangements.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rmt_kernels.recurrence.chunks import without_value
from rmt_kernels.recurrence.policies import Policy, Replay
from rmt_kernels.tape import Tape

__all__ = ["Cell", "activation_bytes", "add", "go_back", "no_attention", "run"]

# (segment number, the memory entering it) to (its share of the loss, the next memory, what to put out of it)
Cell = Callable[[int, Tensor], tuple[Tensor | None, Tensor, Any]]


def run(
    cell: Cell,
    memory: Tensor,
    count: int,
    policy: Policy,
    kept: int,
    order: Iterable[int],
    cut: Callable[[Tensor], Tensor],
) -> tuple[Tensor | None, Tensor, list[Any]]:
    """All segments in turn: their summed loss (None: no segment has one), the last memory, what each put out.

    Args:
        cell: one segment.
        memory: entering the first one.
        count: number of segments.
        policy: what is cut off and recomputed.
        kept: under Replay, how many of the last segments are not recomputed.
        order: ``range(count)``, perhaps showing progress.
        cut: detaches a memory.
    """
    total: Tensor | None = None
    outputs = []
    replay = policy if isinstance(policy, Replay) and torch.is_grad_enabled() else None
    for s in order:
        if policy.cuts(s, count):
            memory = cut(memory)
        if replay is not None and s < count - kept:
            loss, memory, output = _replayed(cell, s, memory, replay)
        else:
            loss, memory, output = cell(s, memory)
        total = add(total, loss)
        outputs.append(output)
    return total, memory, outputs


def add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Their sum, None standing for no loss at all."""
    return b if a is None else a if b is None else a + b


def _replayed(cell: Cell, s: int, memory: Tensor, replay: Replay) -> tuple[Tensor | None, Tensor, Any]:
    """One segment in a checkpoint. Only the memory is its argument: whatever else it reads is not kept for it."""
    tape = Tape() if replay.recompute == "except_attention" else None

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext() if tape is None else _counted(tape), _Recomputing(tape)

    elsewhere = nullcontext() if not replay.offload else torch.autograd.graph.save_on_cpu(_pin())
    with elsewhere:
        found: tuple[Tensor | None, Tensor, Any] = checkpoint(
            lambda entering: cell(s, entering), memory, use_reentrant=False, context_fn=contexts
        )
    return found


def _pin() -> bool:
    return torch.cuda.is_available()


class _Recomputing(AbstractContextManager[None]):
    """Around a recomputation, and again around each further one, where a graph is gone back through twice."""

    def __init__(self, tape: Tape | None) -> None:
        self._tape, self._open = tape, ExitStack()

    def __enter__(self) -> None:
        self._open = ExitStack()
        self._open.enter_context(without_value())
        if self._tape is not None:
            self._open.enter_context(self._tape.replaying())

    def __exit__(self, *error: Any) -> bool | None:
        return self._open.__exit__(*error)


@contextmanager
def _counted(tape: Tape) -> Iterator[None]:
    with tape.recording():
        yield
    if not len(tape):
        raise no_attention()


def no_attention() -> ValueError:
    """What is wrong where there is no attention to be kept."""
    return ValueError(
        "recompute='except_attention' keeps the attention of rmt_kernels' own kernels, and the segment calls none; use "
        "rmt_kernels.segment_attention with a backend other than 'stock' and 'reference', or recompute='all'"
    )


def go_back(loss: Tensor | None, seed: Tensor, new: Tensor | None, grad: Tensor | None, total: Tensor) -> None:
    """One backward traversal, from a loss and from the memory that was handed on with its gradient, as far as they are.

    The loss, which ``seed`` is the gradient of, is added to ``total``, on whose device everything lies.
    """
    roots, grads = [], []
    if loss is not None:
        total += loss.detach()  # zero where its backward pass adds it
        if loss.requires_grad:
            roots.append(loss)
            grads.append(seed.to(loss.dtype))
    if new is not None and new.requires_grad and grad is not None:
        roots.append(new)
        grads.append(grad)
    if roots:
        with torch.autocast(total.device.type, enabled=False):
            torch.autograd.backward(roots, grads)


def activation_bytes(run_segment: Callable[[], Any], known: Iterable[Tensor]) -> int:
    """Bytes that the graph of one segment keeps beyond what is ``known``, parameters and inputs: one forward pass."""
    known_storages = {_address(tensor) for tensor in known}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        of_parameter = isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)  # gathered by FSDP2
        if not of_parameter and storage.data_ptr() not in known_storages:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        found = run_segment()  # while its graph lives, no two of its tensors share an address
    del found
    return sum(kept.values())


def _address(tensor: Tensor) -> int:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[operator]
    return int(local.untyped_storage().data_ptr())
