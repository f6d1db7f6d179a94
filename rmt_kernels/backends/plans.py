"""From tensors to launches, for backends on GPUs: what follows from shapes, strides and options is worked out once and
kept; a later call of the same shape looks it up.

The kernels read and write rows of whole vectors of UNIT bytes: tensors whose rows are not get stand-ins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

__all__ = ["UNIT", "Strides", "caches", "dense", "finish", "on", "planned"]

UNIT = 16  # bytes: what a thread loads at once, and what the copy engine asks addresses and strides to be multiples of
Strides = tuple[int, ...]  # three of each tensor: batch, head, row; in units of UNIT bytes, 0 along a size of 1
_PLANS = 4096  # kept, then all are dropped

_FAR = 2**31 - 1
_SAME_DEVICE: AbstractContextManager[None] = nullcontext()


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Kernels are launched on the current device, which need not be the tensors'."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _SAME_DEVICE
    return torch.cuda.device(device)


_plans: dict[tuple[Any, ...], Any] = {}


def planned(
    make: Callable[[Tensor, Tensor, tuple[Any, ...], Strides], Any],
    read: Sequence[Tensor],
    written: Sequence[Tensor],
    options: tuple[Any, ...],
) -> tuple[Any, Sequence[Tensor], list[tuple[Tensor, Tensor]]]:
    """What ``make(query, key, options, strides)`` gives, the tensors to launch it with, and pairs of results and what
    to copy them from.

    ``read`` begins with query and key; ``options`` are whatever else the launches follow from.
    """
    tensors = (*read, *written)
    addresses = 0
    for tensor in tensors:
        addresses |= tensor.data_ptr()
    query, key = tensors[0], tensors[1]
    strides = tuple([tensor.stride() for tensor in tensors])
    identity = (make, addresses % UNIT, query.shape, key.shape[1], query.dtype, query.device, strides, *options)
    found = _plans.get(identity)
    if found is not None:
        return found, tensors, []
    stand_ins = {id(tensor): _room(tensor) for tensor in tensors if _strides(tensor) is None}  # one may be given twice
    if stand_ins:
        for tensor in read:
            if id(tensor) in stand_ins:
                stand_ins[id(tensor)][..., : tensor.shape[3]].copy_(tensor)
        used = [stand_ins.get(id(tensor), tensor) for tensor in tensors]
        found, _, _ = planned(make, used[: len(read)], used[len(read) :], options)
        results = {id(tensor): tensor for tensor in written if id(tensor) in stand_ins}
        return found, used, [(tensor, stand_ins[name]) for name, tensor in results.items()]
    if len(_plans) >= _PLANS:
        _plans.clear()
    numbers = tuple([number for tensor in tensors for number in _strides(tensor) or ()])
    found = _plans[identity] = make(query, key, options, numbers)
    return found, tensors, []


def _strides(tensor: Tensor) -> Strides | None:
    """The tensor's strides as the kernels take them; None where its rows are not all whole vectors of UNIT bytes."""
    size, shape, strides = tensor.element_size(), tensor.shape, tensor.stride()
    if (tensor.data_ptr() | shape[3] * size) % UNIT or (strides[3] != 1 and shape[3] > 1):
        return None
    steps = [step * size if length > 1 else 0 for length, step in zip(shape[:3], strides, strict=False)]
    # A row's number is multiplied with a stride of 32 bits, in elements.
    if any(step % UNIT for step in steps) or steps[2] // size > _FAR:
        return None
    return tuple(step // UNIT for step in steps)


def _room(tensor: Tensor) -> Tensor:
    """As the tensor, with zeros, and zeros added to each row that make it whole vectors: they change no result."""
    unit = UNIT // tensor.element_size()
    return tensor.new_zeros(*tensor.shape[:3], -(-tensor.shape[3] // unit) * unit)


def finish(results: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Copy results from their stand-ins."""
    for tensor, stand_in in results:
        tensor.copy_(stand_in[..., : tensor.shape[3]])


def dense(*values: Tensor | None) -> list[Tensor | None]:
    """A number for each sample, side by side."""
    return [value if value is None or value.is_contiguous() else value.contiguous() for value in values]


def caches(cache_key: Tensor | None, cache_value: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """CACHE's tensors, where they are given and not empty."""
    if cache_key is None or cache_value is None or cache_key.shape[2] == 0:
        return None
    return cache_key, cache_value
