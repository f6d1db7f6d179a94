"""The strongest compositions of stock PyTorch that compute segment attention: fallback, and honest baseline.

``split`` is exact for layouts without window, padding or SELF rules: one call of scaled_dot_product_attention (SDPA)
per query region, none with a mask. ``dense`` gives SDPA the mask as a matrix. ``flex`` compiles FlexAttention.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rmt_kernels.backends.call import Call, check_values
from rmt_kernels.layout import SegmentLayout
from rmt_kernels.reference import segment_mask

__all__ = ["Composition", "best", "dense", "dense_bias", "flex", "split"]


@dataclass(frozen=True)
class Composition:
    """A way of computing the op from stock parts; ``compute`` returns out alone."""

    compute: Callable[[Call], Tensor]
    objection: Callable[[Call], str | None]

    def supports(self, call: Call) -> str | None:
        """None where the composition serves the call, otherwise the reason why not."""
        if call.relative is not None:
            return "stock attention has no distance-dependent scores that are not (queries x keys) matrices"
        if call.return_lse:
            return "stock attention does not return a differentiable lse"
        if call.dropout_p > 0.0:
            return "stock attention draws its own dropout mask, not the one that `seed` decides"
        return self.objection(call)

    def run(self, call: Call) -> tuple[Tensor, Tensor]:
        """``(out, empty)``; stock attention keeps its lse to itself."""
        check_values(call)
        return self.compute(call), call.query.new_empty(0)


def _joined(call: Call) -> tuple[Tensor, Tensor]:
    if call.cache is None:
        return call.key, call.value
    return torch.cat([call.cache[0], call.key], dim=2), torch.cat([call.cache[1], call.value], dim=2)


def _sdpa(call: Call, query: Tensor, key: Tensor, value: Tensor, **how: Any) -> Tensor:
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, scale=call.scale, enable_gqa=grouped, **how)


def _plain(call: Call) -> bool:
    per_batch = (call.token_lengths, call.token_starts, call.cache_starts, call.query_start)
    return all(values is None for values in per_batch)


@lru_cache(maxsize=32)
def _layout_mask(layout: SegmentLayout, device: torch.device) -> tuple[Tensor, Tensor]:
    """(queries, keys) mask in which rows that see nothing see all, and (queries, 1) which rows those are."""
    mask = layout.dense_mask(device)
    blind = ~mask.any(dim=-1, keepdim=True)
    return mask | blind, blind


# torch.compile cannot trace the making of a mask, so these two are run, not traced.
@torch.compiler.assume_constant_result
def _blind(layout: SegmentLayout, device: torch.device) -> Tensor:
    """(queries, 1): rows that see nothing."""
    return _layout_mask(layout, device)[1]


@torch.compiler.assume_constant_result
def dense_bias(layout: SegmentLayout, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The mask as an additive bias (queries, keys), 0 or -inf: the fastest form of a dense mask for SDPA."""
    return _cached_bias(layout, dtype, device)


@lru_cache(maxsize=32)
def _cached_bias(layout: SegmentLayout, dtype: torch.dtype, device: torch.device) -> Tensor:
    mask, _ = _layout_mask(layout, device)
    return torch.zeros(mask.shape, dtype=dtype, device=device).masked_fill_(~mask, float("-inf"))


def _dense(call: Call) -> Tensor:
    key, value = _joined(call)
    if _plain(call):
        blind = _blind(call.layout, call.query.device)
        bias = dense_bias(call.layout, call.query.dtype, call.query.device)
    else:
        mask, _ = segment_mask(
            call.layout, call.query.shape[0], call.query.device, call.token_lengths, call.token_starts,
            call.cache_starts, call.query_start,
        )  # fmt: skip
        blind = ~mask.any(dim=-1, keepdim=True)[:, None]
        bias = mask[:, None] | blind
    return _sdpa(call, call.query, key, value, attn_mask=bias).masked_fill(blind, 0.0)


def _nothing_to_do(call: Call) -> str | None:
    return "it needs at least one query and one key row" if 0 in (*call.query.shape, call.layout.num_keys) else None


def _split(call: Call) -> Tensor:
    key, value = _joined(call)
    parts, row = [], 0
    for form in call.layout.forms:
        if form.rows == 0:
            continue
        if form.hi == form.lo:
            parts.append(torch.zeros_like(call.query[:, :, row : row + form.rows]))
        else:
            end = form.hi + form.step * (form.rows - 1)
            keys, values = key[:, :, form.lo : end], value[:, :, form.lo : end]
            # is_causal aligns the first query with the first key; rows put in front align the last with the last.
            front = (end - form.lo) - form.rows if form.step else 0
            if front <= row:
                query = call.query[:, :, row - front : row + form.rows]
            else:
                query = F.pad(call.query[:, :, row : row + form.rows], (0, 0, front, 0))
            out = _sdpa(call, query, keys, values, is_causal=bool(form.step))
            parts.append(out[:, :, front:])
        row += form.rows
    return torch.cat(parts, dim=2) if len(parts) != 1 else parts[0]


def _split_objection(call: Call) -> str | None:
    layout = call.layout
    if not _plain(call):
        return "a call per region cannot express padding or query_start"
    if layout.window is not None or layout.skip or any(form.own >= 0 and form.rows for form in layout.forms):
        return "a call per region cannot express a window, SELF rules or skipped rows"
    if call.scale <= 0.0:
        return "SDPA's own causal mask is multiplied by the scale, which must be positive"
    if all(form.rows == 0 or form.hi == form.lo for form in layout.forms):
        return "no query row sees a key"
    return _nothing_to_do(call)


def _best(call: Call) -> Tensor:
    return _split(call) if _split_objection(call) is None else _dense(call)


@lru_cache(maxsize=32)
def _block_mask(layout: SegmentLayout, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    mask, _ = _layout_mask(layout, device)

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return mask[q, k]

    return create_block_mask(visible, None, None, layout.num_queries, layout.num_keys, device=str(device))


@lru_cache(maxsize=1)
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)  # type: ignore[return-value]


def _flex(call: Call) -> Tensor:
    key, value = _joined(call)
    _, blind = _layout_mask(call.layout, call.query.device)
    out = _compiled_flex()(
        call.query, key, value, scale=call.scale, block_mask=_block_mask(call.layout, call.query.device),
        enable_gqa=call.query.shape[1] != key.shape[1],
    )  # fmt: skip
    return out.masked_fill(blind, 0.0)


def _flex_objection(call: Call) -> str | None:
    if not _plain(call):
        return "its block mask is built per layout, not per batch row"
    if call.query.device.type == "cpu":
        tensors = (call.query, call.key, call.value, *(call.cache or ()))
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            return "FlexAttention has no backward on the CPU"
        if call.query.dtype is torch.float64:
            return "FlexAttention does not compute in float64 on the CPU"
    return _nothing_to_do(call)


split = Composition(_split, _split_objection)
dense = Composition(_dense, _nothing_to_do)
flex = Composition(_flex, _flex_objection)
best = Composition(_best, _nothing_to_do)
