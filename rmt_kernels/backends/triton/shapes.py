"""What the launches of a call follow from, read off its arguments."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from rmt_kernels.backends.triton.launch import Shape

__all__ = ["options_of", "shape_of"]


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


def shape_of(
    query: Tensor, key: Tensor, layout: tuple[int, ...], scale: float, dropout_p: float, precision: str, padded: bool,
    apart: bool, started: bool, stale: bool,
) -> Shape:  # fmt: skip
    """The shape of a call; the last arguments are ``options_of`` it."""
    batch, heads, queries, head_dim = query.shape
    if layout[5] >= layout[0] + layout[4]:  # a window that hides nothing
        layout = (*layout[:5], 0, *layout[6:])
    return Shape(
        layout, batch, heads, key.shape[1], queries, head_dim, query.dtype, precision, scale, dropout_p, padded, apart,
        started, stale, *_chip(query.device),
    )  # fmt: skip


def options_of(
    query: Tensor, layout: list[int], scale: float, dropout_p: float, caches: tuple[Tensor, Tensor] | None,
    token_lengths: Tensor | None, token_starts: Tensor | None, cache_starts: Tensor | None, query_start: Tensor | None,
) -> tuple[Any, ...]:  # fmt: skip
    """What launches follow from besides shapes and strides: the last arguments of ``shape_of``."""
    return (
        tuple(layout), scale, dropout_p, _precision(query.dtype), token_lengths is not None or token_starts is not None,
        caches is not None, query_start is not None, cache_starts is not None,
    )  # fmt: skip
