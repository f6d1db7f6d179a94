"""The operators ``rmt_kernels::forward`` and ``rmt_kernels::backward``: from tensors to launches.

Launches follow from shapes, strides and options, so they are worked out once and kept; a later call of the same shape
looks them up. The kernels read and write rows of whole vectors of UNIT bytes: tensors whose rows are not get stand-ins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from rmt_kernels.backends.triton.launch import UNIT, Launch, Shape, Strides, backward_launches, forward_launches
from rmt_kernels.ops import Gradients, like

__all__ = ["backward", "forward"]

_PLANS = 4096  # kept, then all are dropped

_FAR = 2**31 - 1
_SAME_DEVICE: AbstractContextManager[None] = nullcontext()


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensors'."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _SAME_DEVICE
    return torch.cuda.device(device)


@lru_cache(maxsize=16)
def _chip(device: torch.device) -> tuple[int, int]:
    """Architecture and bytes of L2 cache."""
    if device.type != "cuda":
        return 0, 1 << 40
    properties = torch.cuda.get_device_properties(device)
    return 10 * properties.major + properties.minor, int(properties.L2_cache_size)


def _precision(dtype: torch.dtype) -> str:
    if dtype is torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "ieee"


_plans: dict[tuple[Any, ...], Any] = {}


def _planned(
    make: Callable[[Shape, Strides], Any], read: Sequence[Tensor], written: Sequence[Tensor], options: tuple[Any, ...]
) -> tuple[Any, Sequence[Tensor], list[tuple[Tensor, Tensor]]]:
    """``make``'s launches, the tensors to launch them with, and pairs of results and what to copy them from.

    ``read`` begins with query and key; ``options`` are of ``_options``.
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
        found, _, _ = _planned(make, used[: len(read)], used[len(read) :], options)
        results = {id(tensor): tensor for tensor in written if id(tensor) in stand_ins}
        return found, used, [(tensor, stand_ins[name]) for name, tensor in results.items()]
    if len(_plans) >= _PLANS:
        _plans.clear()
    numbers = tuple([number for tensor in tensors for number in _strides(tensor) or ()])
    found = _plans[identity] = make(_shape(query, key, *options), numbers)
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


def _finish(results: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Copy results from their stand-ins."""
    for tensor, stand_in in results:
        tensor.copy_(stand_in[..., : tensor.shape[3]])


def _shape(
    query: Tensor, key: Tensor, layout: tuple[int, ...], scale: float, dropout_p: float, precision: str, padded: bool,
    apart: bool, started: bool, stale: bool,
) -> Shape:  # fmt: skip
    batch, heads, queries, head_dim = query.shape
    if layout[5] >= layout[0] + layout[4]:  # a window that hides nothing
        layout = (*layout[:5], 0, *layout[6:])
    return Shape(
        layout, batch, heads, key.shape[1], queries, head_dim, query.dtype, precision, scale, dropout_p, padded, apart,
        started, stale, *_chip(query.device),
    )  # fmt: skip


def forward(
    query: Tensor, key: Tensor, value: Tensor, cache_key: Tensor | None, cache_value: Tensor | None,
    token_lengths: Tensor | None, token_starts: Tensor | None, cache_starts: Tensor | None, query_start: Tensor | None,
    seed: Tensor | None, relative_key: Tensor | None, content_bias: Tensor | None, position_bias: Tensor | None,
    layout: list[int], scale: float, dropout_p: float, relative: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The operator ``rmt_kernels::forward``."""
    with _on(query.device):
        out = like(query)
        lse = query.new_empty(query.shape[:3], dtype=torch.float32)
        if out.numel() == 0:
            return out, lse.fill_(float("-inf"))
        caches = _caches(cache_key, cache_value)
        samples = _dense(token_lengths, token_starts, cache_starts, query_start)
        # Without a cache of its own the keys stand in for it: the kernel then does not look there.
        (main, combine, chunks), tensors, results = _planned(
            forward_launches, (query, key, value, *(caches or (key, value))), (out,),
            _options(query, layout, scale, dropout_p, caches, *samples),
        )  # fmt: skip
        parts = None
        if combine is not None:
            parts = query.new_empty(lse.numel() * chunks * (tensors[0].shape[3] + 2), dtype=torch.float32)
        main(*tensors, lse, parts, *samples, seed if dropout_p > 0.0 else None)
        if combine is not None:
            combine(parts, tensors[5], lse)
        _finish(results)
        return out, lse


def _dense(*values: Tensor | None) -> list[Tensor | None]:
    """A number for each sample, side by side."""
    return [value if value is None or value.is_contiguous() else value.contiguous() for value in values]


def _options(
    query: Tensor, layout: list[int], scale: float, dropout_p: float, caches: tuple[Tensor, Tensor] | None,
    token_lengths: Tensor | None, token_starts: Tensor | None, cache_starts: Tensor | None, query_start: Tensor | None,
) -> tuple[Any, ...]:  # fmt: skip
    """What launches follow from besides shapes and strides: the last arguments of ``_shape``."""
    return (
        tuple(layout), scale, dropout_p, _precision(query.dtype), token_lengths is not None or token_starts is not None,
        caches is not None, query_start is not None, cache_starts is not None,
    )  # fmt: skip


def _caches(cache_key: Tensor | None, cache_value: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """CACHE's tensors, where they are given and not empty."""
    if cache_key is None or cache_value is None or cache_key.shape[2] == 0:
        return None
    return cache_key, cache_value


def _backward_plan(shape: Shape, strides: Strides) -> tuple[Launch | None, list[Launch]]:
    """``strides`` are those of query, key, value, cache key, cache value, grad_out, out, and five gradients."""
    return backward_launches(shape, (*strides[:18], *strides[21:]), (*strides[18:21], *strides[15:18]))


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor,
    cache_key: Tensor | None, cache_value: Tensor | None, token_lengths: Tensor | None, token_starts: Tensor | None,
    cache_starts: Tensor | None, query_start: Tensor | None, seed: Tensor | None, relative_key: Tensor | None,
    content_bias: Tensor | None, position_bias: Tensor | None, layout: list[int], scale: float, dropout_p: float,
    relative: str,
) -> Gradients:  # fmt: skip
    """The operator ``rmt_kernels::backward``."""
    with _on(query.device):
        dq, dk, dv = like(query), like(key), like(value)
        dck = query.new_empty(0) if cache_key is None else like(cache_key)
        dcv = query.new_empty(0) if cache_value is None else like(cache_value)
        if key.shape[0] * key.shape[1] * key.shape[3] == 0:
            return dq, dk, dv, dck, dcv
        caches = _caches(cache_key, cache_value)
        samples = _dense(token_lengths, token_starts, cache_starts, query_start)
        (prepare, parts), tensors, results = _planned(
            _backward_plan, (query, key, value, *(caches or (key, value)), grad_out, out),
            (dq, dk, dv, *((dck, dcv) if caches else (dk, dv))),
            _options(query, layout, scale, dropout_p, caches, *samples),
        )  # fmt: skip
        given, out, gradients = tensors[:6], tensors[6], tensors[7:]
        rows = query.new_empty(2 * lse.numel(), dtype=torch.float32)
        spans = query.new_empty(4 * query.shape[0] * query.shape[2], dtype=torch.int32)
        if prepare is not None:
            grad_lse = None if grad_lse is None else grad_lse.contiguous()
            prepare(out, given[5], lse.contiguous(), grad_lse, rows, spans, *samples)
        for launch in parts:
            launch(
                *given, rows, spans, *gradients, *samples, seed if dropout_p > 0.0 else None, given[0], given[5],
                given[1], given[2],
            )  # fmt: skip
        _finish(results)
        return dq, dk, dv, dck, dcv
