"""The operators ``rmt_kernels::forward`` and ``rmt_kernels::backward``: from tensors to launches.

Launches follow from shapes, strides and options: ``plans`` keeps them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rmt_kernels.backends.plans import Strides, caches, dense, finish, on, planned
from rmt_kernels.backends.triton.launch import Launch, backward_launches, forward_launches
from rmt_kernels.backends.triton.relative_operators import Tables, relative_backward, relative_forward
from rmt_kernels.backends.triton.shapes import options_of, shape_of
from rmt_kernels.ops import Gradients, like

__all__ = ["backward", "forward"]


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
        if relative:
            relative_forward(
                Tables(relative_key, relative_bias, content_bias, position_bias, *relative),
                (query, key, value, *(apart or (key, value))), (out,), lse, samples,
                seed if dropout_p > 0.0 else None, options_of(query, layout, scale, dropout_p, apart, *samples),
            )  # fmt: skip
            return out, lse
        # Without a cache of its own the keys stand in for it: the kernel then does not look there.
        (main, combine, chunks), tensors, results = planned(
            _forward_plan, (query, key, value, *(apart or (key, value))), (out,),
            options_of(query, layout, scale, dropout_p, apart, *samples),
        )  # fmt: skip
        parts = None
        if combine is not None:
            parts = query.new_empty(lse.numel() * chunks * (tensors[0].shape[3] + 2), dtype=torch.float32)
        main(*tensors, lse, parts, *samples, seed if dropout_p > 0.0 else None)
        if combine is not None:
            combine(parts, tensors[5], lse)
        finish(results)
        return out, lse


def _forward_plan(query: Tensor, key: Tensor, options: tuple[Any, ...], strides: Strides) -> Any:
    return forward_launches(shape_of(query, key, *options), strides)


def _backward_plan(
    query: Tensor, key: Tensor, options: tuple[Any, ...], strides: Strides
) -> tuple[Launch | None, list[Launch]]:
    """``strides`` are those of query, key, value, cache key, cache value, grad_out, out, and five gradients."""
    return backward_launches(
        shape_of(query, key, *options), (*strides[:18], *strides[21:]), (*strides[18:21], *strides[15:18])
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
        tables = Tables(relative_key, relative_bias, content_bias, position_bias, *relative) if relative else None
        if key.shape[0] * key.shape[1] * key.shape[3] == 0:
            return dq, dk, dv, dck, dcv, *(tables.zeros(query) if tables else ())
        if tables and query.numel() == 0:
            return *(gradient.zero_() for gradient in (dq, dk, dv, dck, dcv)), *tables.zeros(query)
        apart = caches(cache_key, cache_value)
        samples = dense(token_lengths, token_starts, cache_starts, query_start)
        if tables is not None:
            found = relative_backward(
                tables, grad_out, grad_lse, out, lse, (query, key, value, *(apart or (key, value))), dq,
                (dk, dv, *((dck, dcv) if apart else (dk, dv))), samples, seed if dropout_p > 0.0 else None,
                options_of(query, layout, scale, dropout_p, apart, *samples),
            )  # fmt: skip
            return dq, dk, dv, dck, dcv, *found
        (prepare, parts), tensors, results = planned(
            _backward_plan, (query, key, value, *(apart or (key, value)), grad_out, out),
            (dq, dk, dv, *((dck, dcv) if apart else (dk, dv))),
            options_of(query, layout, scale, dropout_p, apart, *samples),
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
