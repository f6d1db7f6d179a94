"""The operators ``rmt_kernels::forward`` and ``rmt_kernels::backward``: from tensors to launches of csrc/cuda."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from rmt_kernels.backends import cuda
from rmt_kernels.backends.plans import Strides, caches, dense, finish, on, planned
from rmt_kernels.ops import Gradients, like

__all__ = ["backward", "forward"]

_UNIT = 8  # elements of 16 bits in a plan's unit of strides


@lru_cache(maxsize=16)
def _l2_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return 1 << 25
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


def _stream(device: torch.device) -> int:
    return int(torch.cuda.current_stream(device).cuda_stream) if device.type == "cuda" else 0


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _arguments(query: Tensor, key: Tensor, options: tuple[Any, ...], strides: Strides) -> tuple[Any, ...]:
    """Those of ``_cuda.Forward`` and ``_cuda.Backward``."""
    layout, scale, dropout_p, cache_rows = options
    batch, heads, queries, head_dim = query.shape
    if layout[5] >= layout[0] + layout[4]:  # a window that hides nothing
        layout = (*layout[:5], 0, *layout[6:])
    sizes = (batch, heads, key.shape[1], queries, key.shape[2] + cache_rows, head_dim, cache_rows)
    numbers = [stride * _UNIT for stride in strides]
    return cuda.TYPES[query.dtype], layout, sizes, scale, dropout_p, numbers, _l2_bytes(query.device)


def _plan_forward(query: Tensor, key: Tensor, options: tuple[Any, ...], strides: Strides) -> Any:
    return cuda.module.Forward(*_arguments(query, key, options, strides))


def _plan_backward(query: Tensor, key: Tensor, options: tuple[Any, ...], strides: Strides) -> Any:
    return cuda.module.Backward(*_arguments(query, key, options, strides))


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
        # Without a cache of its own the keys stand in for it: the kernel then does not look there.
        launch, tensors, results = planned(
            _plan_forward, (query, key, value, *(apart or (key, value))), (out,),
            (tuple(layout), scale, dropout_p, apart[0].shape[2] if apart else 0),
        )  # fmt: skip
        samples = dense(token_lengths, token_starts, cache_starts, query_start)
        workspace = query.new_empty(launch.workspace, dtype=torch.uint8) if launch.workspace else None
        launch(
            *[tensor.data_ptr() for tensor in tensors], lse.data_ptr(), _address(workspace),
            *[_address(sample) for sample in samples], _address(seed), _stream(query.device),
        )  # fmt: skip
        finish(results)
        return out, lse


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
        launch, tensors, results = planned(
            _plan_backward, (query, key, value, *(apart or (key, value)), grad_out, out),
            (dq, dk, dv, *((dck, dcv) if apart else (dk, dv))),
            (tuple(layout), scale, dropout_p, apart[0].shape[2] if apart else 0),
        )  # fmt: skip
        samples = dense(token_lengths, token_starts, cache_starts, query_start)
        workspace = query.new_empty(max(1, launch.workspace), dtype=torch.uint8)
        lse = lse.contiguous()
        grad_lse = None if grad_lse is None else grad_lse.contiguous()
        launch(
            *[tensor.data_ptr() for tensor in tensors], lse.data_ptr(), _address(grad_lse), workspace.data_ptr(),
            *[_address(sample) for sample in samples], _address(seed), _stream(query.device),
        )  # fmt: skip
        finish(results)
        return dq, dk, dv, dck, dcv
