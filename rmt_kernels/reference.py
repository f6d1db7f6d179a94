"""Segment attention, dense and eager: the specification every kernel is checked against."""

from __future__ import annotations

from dataclasses import replace

import torch

from rmt_kernels.layout import Region, SegmentLayout
from rmt_kernels.philox import dropout_keep
from rmt_kernels.relative import Relative, Terms

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


def _offsets(layout: SegmentLayout, rows: torch.Tensor) -> torch.Tensor:
    """Of every key from every row's own key, int64 (batch, queries, keys); ``rows`` (batch, queries) as above."""
    own = [
        layout.key_offset(region) + torch.arange(form.rows, device=rows.device)
        for region, form in zip(tuple(Region)[1:], layout.forms, strict=True)
    ]
    return torch.arange(layout.num_keys, device=rows.device) - torch.cat(own)[rows][..., None]


def _scores(
    query: torch.Tensor, key: torch.Tensor, scale: float, terms: Terms | None, offsets: torch.Tensor | None,
    blind: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """(batch, heads, queries, keys); ``blind``: bool (batch, 1, queries, 1), rows that see nothing."""
    if terms is None or offsets is None:
        return (query @ key.transpose(-1, -2)) * scale
    content = query if terms.content_bias is None else query + terms.content_bias[:, None]
    scores = content @ key.transpose(-1, -2)
    # Offsets outside the table are those of hidden keys: any entry will do.
    if terms.key is not None:
        entry = (offsets + terms.reach).clamp(0, terms.key.shape[1] - 1)[:, None].expand(scores.shape)
        position = query if terms.position_bias is None else query + terms.position_bias[:, None]
        position = position.masked_fill(blind, 0.0)  # padding may hold anything
        products = position @ terms.key.transpose(-1, -2)  # (batch, heads, queries, offsets)
        here = products.gather(-1, entry)
        if terms.shifted:
            following = torch.cat([products[:, :, 1:], torch.zeros_like(products[:, :, :1])], dim=2)
            here = torch.where(offsets[:, None] > 0, following.gather(-1, entry), here)
        scores = scores + here
    scores = scores * scale
    if terms.bias is not None:
        entry = (offsets + terms.reach).clamp(0, terms.bias.shape[1] - 1)
        scores = scores + terms.bias[:, entry].transpose(0, 1).to(scores.dtype)
    return scores


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
    relative: Relative | Terms | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(out, lse)`` of :func:`rmt_kernels.segment_attention`, from a dense mask, in the dtype given (float64 too).

    Twice differentiable. Arguments are as in ``segment_attention`` and are taken as valid; lse has the dtype of the
    scores. A row that sees nothing gives out 0, lse -inf and gradients 0. ``relative`` may be a :class:`Relative`, or
    the :class:`~rmt_kernels.relative.Terms` of one.
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

    terms = relative.terms(layout, query) if isinstance(relative, Relative) else relative
    offsets = None if terms is None else _offsets(layout, rows)
    scores = _scores(query, key, head_dim**-0.5 if scale is None else scale, terms, offsets, blind)
    # A blind row is given finite scores, so that no NaN arises in its gradient, and its results are replaced.
    scores = scores.masked_fill(~mask, float("-inf")).masked_fill(blind, 0.0)
    lse = scores.logsumexp(dim=-1).masked_fill(blind[..., 0], float("-inf"))
    probabilities = scores.softmax(dim=-1).masked_fill(blind, 0.0)
    if dropout_p > 0.0:
        assert seed is not None
        keep = dropout_keep(seed, batch, heads, rows, layout.num_keys, dropout_p)
        probabilities = probabilities * keep.to(probabilities.dtype) / (1.0 - dropout_p)
    return probabilities @ value, lse
