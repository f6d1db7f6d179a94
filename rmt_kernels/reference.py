"""Segment attention, dense and eager: the specification every kernel is checked against."""

from __future__ import annotations

from dataclasses import replace

import torch

from rmt_kernels.layout import SegmentLayout
from rmt_kernels.philox import dropout_keep

__all__ = ["reference_attention", "segment_mask"]


# torch.compile cannot trace the making of a mask, so this is run, not traced.
@torch.compiler.assume_constant_result
def _whole_mask(layout: SegmentLayout, device: torch.device) -> torch.Tensor:
    """(query rows of the layout, skipped ones included, keys)."""
    return replace(layout, skip=0).dense_mask(device)


def segment_mask(
    layout: SegmentLayout,
    batch: int,
    device: torch.device,
    token_lengths: torch.Tensor | None = None,
    token_starts: torch.Tensor | None = None,
    cache_starts: torch.Tensor | None = None,
    query_start: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mask of a call, bool (batch, queries, keys), and the layout row of each query, int64 (batch, queries)."""
    rows = torch.arange(layout.num_queries, device=device).expand(batch, -1) + layout.skip
    first, tokens = layout.forms[0].rows, layout.tokens
    cache, read, token_keys, _ = layout.key_sizes
    if query_start is not None:
        rows = first + query_start.long()[:, None] + torch.arange(layout.num_queries, device=device)
    mask = _whole_mask(layout, device)[rows]
    position = rows - first  # TOKENS position of a query row, meaningful where is_token
    is_token = (position >= 0) & (position < layout.forms[1].rows)

    begin = torch.zeros(batch, dtype=torch.int64, device=device) if token_starts is None else token_starts.long()
    end = torch.full((batch,), tokens, device=device) if token_lengths is None else token_lengths.long()
    padded = is_token & ((position < begin[:, None]) | (position >= end[:, None]))
    mask = mask & ~padded[..., None]

    token_key = torch.arange(layout.num_keys, device=device) - (cache + read)
    in_tokens = (token_key >= 0) & (token_key < token_keys)
    mask = mask & ~(in_tokens & ((token_key < begin[:, None]) | (token_key >= end[:, None])))[:, None]
    if cache_starts is not None:
        keys = torch.arange(layout.num_keys, device=device)
        stale = (keys < cache) & (keys < cache_starts.long()[:, None])
        mask = mask & ~stale[:, None]
    return mask, rows


def reference_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: SegmentLayout,
    *,
    cache: tuple[torch.Tensor, torch.Tensor] | None = None,
    scale: float | None = None,
    token_lengths: torch.Tensor | None = None,
    token_starts: torch.Tensor | None = None,
    cache_starts: torch.Tensor | None = None,
    query_start: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(out, lse)`` of :func:`rmt_kernels.segment_attention`, from a dense mask, in the dtype given (float64 too).

    Twice differentiable. Arguments are as in ``segment_attention`` and are taken as valid; lse has the dtype of the
    scores. A row that sees nothing gives out 0, lse -inf and gradients 0.
    """
    if cache is not None:
        key, value = torch.cat([cache[0], key], dim=2), torch.cat([cache[1], value], dim=2)
    batch, heads, _, head_dim = query.shape
    group = heads // key.shape[1]
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    mask, rows = segment_mask(
        layout, batch, query.device, token_lengths, token_starts, cache_starts, query_start
    )  # (batch, queries, keys), (batch, queries)
    mask = mask[:, None]
    blind = ~mask.any(dim=-1, keepdim=True)  # rows that see nothing

    scores = (query @ key.transpose(-1, -2)) * (head_dim**-0.5 if scale is None else scale)
    # A blind row is given finite scores, so that no NaN arises in its gradient, and its results are replaced.
    scores = scores.masked_fill(~mask, float("-inf")).masked_fill(blind, 0.0)
    lse = scores.logsumexp(dim=-1).masked_fill(blind[..., 0], float("-inf"))
    probabilities = scores.softmax(dim=-1).masked_fill(blind, 0.0)
    if dropout_p > 0.0:
        assert seed is not None
        keep = dropout_keep(seed, batch, heads, rows, layout.num_keys, dropout_p)
        probabilities = probabilities * keep.to(probabilities.dtype) / (1.0 - dropout_p)
    return probabilities @ value, lse
