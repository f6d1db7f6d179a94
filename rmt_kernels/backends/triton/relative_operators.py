"""The operators' calls with distance-dependent scores: from tensors to launches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rmt_kernels.backends.plans import Strides, finish, planned
from rmt_kernels.backends.triton.launch import Launch
from rmt_kernels.backends.triton.relative_launch import (
    RelativeShape,
    relative_backward_launches,
    relative_forward_launch,
)
from rmt_kernels.backends.triton.shapes import shape_of

__all__ = ["Tables", "relative_backward", "relative_forward"]


@dataclass(frozen=True)
class Tables:
    """The tensors and integers of ``relative.Terms``, as the operators are given them."""

    key: Tensor | None
    bias: Tensor | None
    content_bias: Tensor | None
    position_bias: Tensor | None
    reach: int
    shifted: int

    @property
    def offsets(self) -> int:
        """Entries of a table."""
        table = self.bias if self.key is None else self.key
        return self.reach + 1 if table is None else table.shape[1]

    def read(self, query: Tensor) -> tuple[Tensor, ...]:
        """``key`` and the vectors, with four dimensions; ``query`` stands in for what there is none of."""
        vectors = (self.content_bias, self.position_bias)
        return self.entries(query), *(query if vector is None else vector[None, :, None] for vector in vectors)

    def entries(self, query: Tensor) -> Tensor:
        """``key`` with four dimensions; ``query`` stands in."""
        return query if self.key is None else self.key[None]

    def scores(self, other: Tensor) -> tuple[Tensor, int]:
        """``bias`` with each head's numbers side by side, and its stride from head to head; ``other`` stands in."""
        if self.bias is None:
            return other, 0
        bias = self.bias if self.bias.stride(1) == 1 else self.bias.contiguous()
        return bias, bias.stride(0)

    def options(self, bias_stride: int) -> tuple[Any, ...]:
        """The fields of ``RelativeShape``."""
        tensors = (self.key, self.bias, self.content_bias, self.position_bias)
        given = tuple(tensor is not None for tensor in tensors)
        return (self.offsets, self.reach, bool(self.shifted), *given, bias_stride)

    def zeros(self, query: Tensor) -> list[Tensor]:
        """The gradients where nothing is seen."""
        tensors = (self.key, self.bias, self.content_bias, self.position_bias)
        return [query.new_empty(0) if tensor is None else torch.zeros_like(tensor) for tensor in tensors]

    def summed(self, parts: Sequence[Tensor], query: Tensor) -> list[Tensor]:
        """The gradients, from those of each sample (and tile, of the vectors)."""
        found = self.zeros(query)
        for gradient, part in zip(found, parts, strict=True):
            if part.dim() > 1:
                total = part.sum((0,) if gradient.dim() == part.dim() - 1 else (0, 2))
                gradient.copy_(total[..., : gradient.shape[-1]])
        return found


def _relative_shape(query: Tensor, key: Tensor, options: tuple[Any, ...]) -> RelativeShape:
    call, relative = options
    return RelativeShape(shape_of(query, key, *call), *relative)


def _forward_plan(query: Tensor, key: Tensor, options: tuple[Any, ...], strides: Strides) -> Launch:
    return relative_forward_launch(_relative_shape(query, key, options), strides)


def _backward_plan(query: Tensor, key: Tensor, options: tuple[Any, ...], strides: Strides) -> Any:
    return relative_backward_launches(_relative_shape(query, key, options), strides)


def relative_forward(
    tables: Tables, read: tuple[Tensor, ...], written: tuple[Tensor], lse: Tensor, samples: list[Tensor | None],
    seed: Tensor | None, options: tuple[Any, ...],
) -> None:  # fmt: skip
    """Fill out (``written``) and lse. ``read`` are query, key, value and those of the cache, ``options`` of the call's
    shape."""
    bias, stride = tables.scores(lse)
    launch, tensors, results = planned(
        _forward_plan, (*read, *tables.read(read[0])), written, (options, tables.options(stride))
    )
    launch(*tensors, lse, bias, *samples, seed)
    finish(results)


def relative_backward(
    tables: Tables, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, read: tuple[Tensor, ...],
    dq: Tensor, written: tuple[Tensor, ...], samples: list[Tensor | None], seed: Tensor | None,
    options: tuple[Any, ...],
) -> list[Tensor]:  # fmt: skip
    """Fill the gradients of query (``dq``), key, value and those of the cache (``written``); returns those of the
    tables. These are made for each sample in float32 and summed in a fixed order."""
    query = read[0]
    # Many programs read each query: the vectors are added once.
    content, position = (
        query if vector is None else query + vector[:, None] for vector in (tables.content_bias, tables.position_bias)
    )
    bias, stride = tables.scores(lse)
    # A query meets the keys of its own row and, where products are shifted, those ahead of the row before it.
    head_dim = query.shape[3]
    wide = (*query.shape[:3], -(-head_dim // 8) * 8)  # whole vectors, as the stand-ins of other tensors have
    own = query.new_empty(wide, dtype=torch.float32) if tables.shifted else dq
    following = torch.empty_like(own) if tables.shifted else dq
    (prepare, launches, (key_tiles, entry_tiles)), tensors, results = planned(
        _backward_plan, (content, *read[1:], tables.entries(query), position, grad_out, out),
        (own, following, *written), (options, tables.options(stride)),
    )  # fmt: skip
    given, out, gradients = tensors[:8], tensors[8], tensors[9:]
    batch, heads, queries, _ = query.shape
    width = given[0].shape[3]

    def room(wanted: Tensor | None, *sizes: int) -> Tensor:
        return query.new_empty(0 if wanted is None else (batch, heads, *sizes), dtype=torch.float32)

    rows = query.new_empty(2 * lse.numel(), dtype=torch.float32)
    spans = query.new_empty(4 * batch * queries, dtype=torch.int32)
    parts = (
        room(tables.key, tables.offsets, width), room(tables.bias, tables.offsets),
        room(tables.content_bias, key_tiles, width), room(tables.position_bias, entry_tiles, width),
    )  # fmt: skip
    if prepare is not None:
        prepare(
            out, given[7], lse.contiguous(), None if grad_lse is None else grad_lse.contiguous(), rows, spans, *samples
        )
    for launch in launches:
        launch(*given, *gradients, bias, rows, spans, *parts, *samples, seed)
    finish(results)
    if tables.shifted:
        own[:, :, 1:] += following[:, :, :-1]
        dq.copy_(own[..., :head_dim])
    return tables.summed(parts, query)
