"""The operators ``rmt_kernels::forward`` and ``rmt_kernels::backward``: from tensors to launches.

Launches follow from shapes, strides and options: ``plans`` keeps them.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from rmt_kernels.backends.plans import Strides, caches, dense, finish, on, planned
from rmt_kernels.backends.triton.launch import Launch, Shape, backward_launches, forward_launches
from rmt_kernels.ops import Gradients, like

__all__ = ["backward", "forward"]


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
    seed: Tensor | None, relative_key: Tensor | None, relative_bias: Tensor | None, content_bias: Tensor | None,
    position_bias: Tensor | None, layout: list[int], scale: float, dropout_p: float, relative: tuple[int, ...],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The operator ``rmt_kernels::forward``."""
    with on(query.device):
        out = like(query)
        lse = query.new_empty(query.shape[:3], dtype=torch.float32)
        if out.numel() == 0:
            return out, lse.fill_(float("-inf"))
        apart = caches(cache_key, cache_value)
        samples = dense(token_lengths, token_starts, cache_starts, query_start)
        # Without a cache of its own the keys stand in for it: the kernel then does not look there.
        (main, combine, chunks), tensors, results = planned(
            _forward_plan, (query, key, value, *(apart or (key, value))), (out,),
            _options(query, layout, scale, dropout_p, apart, *samples),
        )  # fmt: skip
        parts = None
        if combine is not None:
            parts = query.new_empty(lse.numel() * chunks * (tensors[0].shape[3] + 2), dtype=torch.float32)
        main(*tensors, lse, parts, *samples, seed if dropout_p > 0.0 else None)
        if combine is not None:
            combine(parts, tensors[5], lse)
        finish(results)
        return out, lse


def _options(
    query: Tensor, layout: list[int], scale: float, dropout_p: float, caches: tuple[Tensor, Tensor] | None,
    token_lengths: Tensor | None, token_starts: Tensor | None, cache_starts: Tensor | None, query_start: Tensor | None,
) -> tuple[Any, ...]:  # fmt: skip
    """What launches follow from besides shapes and strides: the last arguments of ``_shape``."""
    return (
        tuple(layout), scale, dropout_p, _precision(query.dtype), token_lengths is not None or token_starts is not None,
        caches is not None, query_start is not None, cache_starts is not None,
    )  # fmt: skip


def _forward_plan(query: Tensor, key: Tensor, options: tuple[Any, ...], strides: Strides) -> Any:
    return forward_launches(_shape(query, key, *options), strides)


def _backward_plan(
    query: Tensor, key: Tensor, options: tuple[Any, ...], strides: Strides
) -> tuple[Launch | None, list[Launch]]:
    """``strides`` are those of query, key, value, cache key, cache value, grad_out, out, and five gradients."""
    return backward_launches(
        _shape(query, key, *options), (*strides[:18], *strides[21:]), (*strides[18:21], *strides[15:18])
    )


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor,
    cache_key: Tensor | None, cache_value: Tensor | None, token_lengths: Tensor | None, token_starts: Tensor | None,
    cache_starts: Tensor | None, query_start: Tensor | None, seed: Tensor | None, relative_key: Tensor | None,
    relative_bias: Tensor | None, content_bias: Tensor | None, position_bias: Tensor | None, layout: list[int],
    scale: float, dropout_p: float, relative: tuple[int, ...],
) -> Gradients:  # fmt: skip
    """The operator ``rmt_kernels::backward``."""
    with on(query.device):
        dq, dk, dv = like(query), like(key), like(value)
        dck = query.new_empty(0) if cache_key is None else like(cache_key)
        dcv = query.new_empty(0) if cache_value is None else like(cache_value)
        if key.shape[0] * key.shape[1] * key.shape[3] == 0:
            return dq, dk, dv, dck, dcv
        apart = caches(cache_key, cache_value)
        samples = dense(token_lengths, token_starts, cache_starts, query_start)
        (prepare, parts), tensors, results = planned(
            _backward_plan, (query, key, value, *(apart or (key, value)), grad_out, out),
            (dq, dk, dv, *((dck, dcv) if apart else (dk, dv))),
            _options(query, layout, scale, dropout_p, apart, *samples),
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
        finish(results)
        return dq, dk, dv, dck, dcv
