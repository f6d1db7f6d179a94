"""What the Triton kernels might have begun as: the lower rungs of docs/triton_kernel.md, beside the real ones.

``forward_rung`` is attention of one head by STEP; ``turned`` and ``spans`` are two decisions of the backward pass,
alone. ``make_triton_pictures.py`` checks and compiles them.
"""

# ruff: noqa: N803

import math

import torch
import triton
import triton.language as tl

from rmt_kernels import SegmentLayout, segment_attention
from rmt_kernels.backends.triton.tiles import rows_of

# A dense mask; intervals, unseen tiles skipped; a loop without a mask first; the exponent as one multiply-add.
STEPS = (1, 2, 3, 4)


@triton.jit
def forward_rung_tile(
    acc, total, highest, q, k_ptr, v_ptr, mask_ptr, row, start, lo, hi, rows, keys, scale,
    KEYS: tl.constexpr, D: tl.constexpr, STEP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One tile of keys, as each rung does it."""
    key, o_d = start + tl.arange(0, KEYS), tl.arange(0, D)
    block = key[:, None] * D + o_d[None, :]
    k = tl.load(k_ptr + block, mask=(key < keys)[:, None], other=0.0) if MASKED else tl.load(k_ptr + block)
    s = tl.dot(q, tl.trans(k), input_precision="ieee")
    if STEP == 1:
        inside = (row < rows)[:, None] & (key < keys)[None, :]
        s = tl.where(tl.load(mask_ptr + row[:, None] * keys + key[None, :], mask=inside, other=0), s, float("-inf"))
    elif MASKED:
        s = tl.where((key[None, :] >= lo[:, None]) & (key[None, :] < hi[:, None]), s, float("-inf"))
    if STEP < 4:
        s = s * scale
    higher = tl.maximum(highest, tl.max(s, 1))
    pivot = tl.where(higher == float("-inf"), 0.0, higher) if MASKED else higher
    if STEP < 4:
        p, fade = tl.exp(s - pivot[:, None]), tl.exp(highest - pivot)
    else:
        power = scale * 1.4426950408889634
        p, fade = tl.exp2(s * power - (pivot * power)[:, None]), tl.exp2(highest * power - pivot * power)
    v = tl.load(v_ptr + block, mask=(key < keys)[:, None], other=0.0) if MASKED else tl.load(v_ptr + block)
    acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
    return acc, total * fade + tl.sum(p, 1), higher


@triton.jit
def forward_rung(
    q_ptr, k_ptr, v_ptr, mask_ptr, lo_ptr, hi_ptr, out_ptr, rows, keys, scale,
    ROWS: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Attention of one head whose rows see keys [lo, hi): ``forward_kernel`` as it might have begun, by STEP."""
    row, o_d = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, D)
    real = row < rows
    q = tl.load(q_ptr + row[:, None] * D + o_d[None, :], mask=real[:, None], other=0.0)
    lo, hi = tl.load(lo_ptr + row, mask=real, other=0), tl.load(hi_ptr + row, mask=real, other=0)
    acc, total = tl.zeros([ROWS, D], tl.float32), tl.zeros([ROWS], tl.float32)
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    begin, end = 0, tl.cdiv(keys, KEYS)
    if STEP > 1:
        begin, end = tl.min(tl.where(real, lo, keys), 0) // KEYS, tl.cdiv(tl.max(hi, 0), KEYS)
    open_begin, open_end = begin, begin
    if STEP > 2:
        open_begin = tl.minimum(tl.cdiv(tl.max(lo, 0), KEYS), end)
        open_end = tl.maximum(tl.min(tl.where(real, hi, keys), 0) // KEYS, open_begin)
        for tile in range(open_begin, open_end):
            acc, total, highest = forward_rung_tile(
                acc, total, highest, q, k_ptr, v_ptr, mask_ptr, row, tile * KEYS, lo, hi, rows, keys, scale,
                KEYS, D, STEP, False,
            )  # fmt: skip
    for i in range(begin, end - (open_end - open_begin)):
        tile = tl.where(i >= open_begin, i + (open_end - open_begin), i) if STEP > 2 else i
        acc, total, highest = forward_rung_tile(
            acc, total, highest, q, k_ptr, v_ptr, mask_ptr, row, tile * KEYS, lo, hi, rows, keys, scale,
            KEYS, D, STEP, True,
        )  # fmt: skip
    out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(out_ptr + row[:, None] * D + o_d[None, :], out.to(out_ptr.dtype.element_ty), mask=real[:, None])


@triton.jit
def turned(k_ptr, q_ptr, grad_ptr, out_ptr, tiles, TILE: tl.constexpr, D: tl.constexpr, TRANSPOSED: tl.constexpr):
    """The part of the backward pass that turns scores: out = sum of exp2(scores)^T grad, in either orientation."""
    o_d = tl.arange(0, D)
    block = tl.arange(0, TILE)[:, None] * D + o_d[None, :]
    k, dv = tl.load(k_ptr + block), tl.zeros([TILE, D], tl.float32)
    for tile in range(tiles):
        q, grad = tl.load(q_ptr + tile * TILE * D + block), tl.load(grad_ptr + tile * TILE * D + block)
        if TRANSPOSED:
            p = tl.exp2(tl.dot(k, tl.trans(q), input_precision="ieee")).to(grad.dtype)
        else:
            p = tl.trans(tl.exp2(tl.dot(q, tl.trans(k), input_precision="ieee")).to(grad.dtype))
        dv = tl.dot(p, grad, dv, input_precision="ieee")
    tl.store(out_ptr + block, dv)


@triton.jit
def spans(spans_ptr, out_ptr, queries, layout, sample, ROWS: tl.constexpr, READ: tl.constexpr):
    """The interval of each row of a tile, read or worked out."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    if READ:
        lo, hi = tl.load(spans_ptr + row, mask=row < queries), tl.load(spans_ptr + queries + row, mask=row < queries)
    else:
        lo, hi, _, _, _ = rows_of(row, row < queries, layout, sample, False, False)
    tl.store(out_ptr + row, hi - lo)


def check() -> None:
    """Every rung gives the attention of the reference, in the interpreter; so do both orientations."""
    layout = SegmentLayout.rmt_decoder(90, 12)
    n, width, tile = layout.num_keys, 16, 32
    query, key, value = torch.randn(3, 1, 1, n, width, generator=torch.Generator().manual_seed(0)).unbind()
    wanted = segment_attention(query, key, value, layout, backend="reference")
    lo, hi = (ends.to(torch.int32).contiguous() for ends in layout.intervals().unbind(1))
    for step in STEPS:
        out = torch.full_like(query, math.nan)
        forward_rung[(-(-n // tile),)](
            query, key, value, layout.dense_mask(), lo, hi, out, n, n, width**-0.5, tile, tile, width, step
        )
        torch.testing.assert_close(out, wanted)
    k, q, grad = key[0, 0, :tile].contiguous(), query[0, 0, : 2 * tile], value[0, 0, : 2 * tile]
    for transposed in (True, False):
        out = torch.full_like(k, math.nan)
        turned[(1,)](k, q, grad, out, 2, tile, width, transposed)
        torch.testing.assert_close(out, torch.exp2(k @ q.T) @ grad, atol=1e-4, rtol=1e-4)
