"""The most memory that a training step holds at a time, its activations told apart from gradients.

What is counted: bytes that the step allocates, as PyTorch's allocator reports them, on the CPU to the profiler, on a
GPU to its history. What is there before the step is not: parameters, tokens, labels. ``.grad`` is None before it, as
after ``optimizer.zero_grad()``, so all gradients are allocated in it.

What is a gradient: ``.grad`` is only the last form of it. Autograd computes a weight's gradient segment by segment and
sums those in a buffer that becomes ``.grad`` when the last one is there; a driver adds them to ``.grad`` itself; while
two are added, there are up to three. All of them have the size of the weight, which no activation has (``apart`` holds
those sizes, and those of the weights' copies in autocast's dtype). So at every moment

    activations = all bytes - bytes of allocations as large as a weight,

and the peak is the largest of these. Gradients of biases, of norms and of the first memory, a few thousand numbers
each, are left among the activations. Where a GPU's history can't be read, ``.grad``'s bytes are subtracted from the
peak instead, which counts a gradient that is yet to be added as an activation.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import allocations

__all__ = ["Peak", "peaks", "weigh"]

Step = Callable[[], object]
_MOST_COPIES = 4  # of all weights: gradients, sums of them, copies in autocast's dtype


@dataclass(frozen=True)
class Peak:
    """Bytes at their largest: of all that the step holds, and of what isn't as large as a weight; and ``.grad``'s."""

    total: int
    activations: int
    gradients: int


def peaks(changes: Iterable[int], apart: frozenset[int]) -> tuple[int, int, int]:
    """The most bytes held at a time: of all, of sizes not in ``apart``, of sizes in it.

    ``changes`` are the allocations in order, those given back negative.
    """
    held, most = [0, 0], [0, 0, 0]
    for change in changes:
        held[abs(change) in apart] += change
        most = [max(most[0], sum(held)), max(most[1], held[0]), max(most[2], held[1])]
    return most[0], most[1], most[2]


def _changes(trace: Iterable[dict[str, Any]]) -> list[int]:
    """Changes from a GPU's history; what was allocated before it began is passed over."""
    found, sizes = [], {}
    for entry in trace:
        if entry["action"] == "alloc":
            sizes[entry["addr"]] = entry["size"]
            found.append(entry["size"])
        elif entry["action"] == "free_completed" and entry["addr"] in sizes:
            found.append(-sizes.pop(entry["addr"]))
    return found


def _requested(device: torch.device, which: str) -> int:
    """Bytes asked of the allocator, which hands out somewhat more."""
    return int(torch.cuda.memory_stats(device).get(f"requested_bytes.all.{which}", 0))


def _on_gpu(step: Step, device: torch.device) -> tuple[int, list[int] | None]:
    """The peak by ``max_memory_allocated``, and the changes by the allocator's history, None where they disagree."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    start, requested = torch.cuda.memory_allocated(device), _requested(device, "current")
    torch.cuda.memory._record_memory_history("all", context=None, stacks="python", max_entries=10_000_000)
    try:
        kept = step()
        torch.cuda.synchronize(device)
        total = torch.cuda.max_memory_allocated(device) - start
        requested = _requested(device, "peak") - requested
        traces = torch.cuda.memory._snapshot(device)["device_traces"]
    finally:
        torch.cuda.memory._record_memory_history(None)
    del kept
    changes = _changes(traces[device.index or 0])
    return total, changes if abs(peaks(changes, frozenset())[0] - requested) <= 0.01 * requested else None


def _gradient_bytes(parameters: Iterable[Tensor]) -> int:
    storages = [p.grad.untyped_storage() for p in parameters if p.grad is not None]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def weigh(step: Step, parameters: Iterable[Tensor], device: torch.device, apart: frozenset[int] = frozenset()) -> Peak:
    """Run ``step`` once, with ``.grad`` None before and after, and weigh it.

    Raises:
        ValueError: more is as large as a weight than gradients can be: an activation has a size in ``apart``.
    """
    parameters = list(parameters)
    for parameter in parameters:
        parameter.grad = None
    gc.collect()
    changes: list[int] | None
    if device.type == "cpu":
        changes = allocations(step)
        total = peaks(changes, apart)[0]
    else:
        total, changes = _on_gpu(step, device)
    if changes is None:
        activations, others = total - _gradient_bytes(parameters), 0
    else:
        _, activations, others = peaks(changes, apart)
    gradients = _gradient_bytes(parameters)
    for parameter in parameters:
        parameter.grad = None
    weights = sum(p.nbytes for p in parameters)
    if others > _MOST_COPIES * weights:
        raise ValueError(f"apart: {others} bytes have the size of a weight, all weights have {weights}")
    return Peak(total, activations, gradients)
