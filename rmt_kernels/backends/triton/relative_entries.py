"""Gradients of the tables of distance-dependent scores: each program owns a tile of entries and walks the rows that
see keys at those distances.

What a row's score gains from its entry is one number for a (row, key) pair. So ``relative_bias``'s gradient is the sum
of such pairs' slopes along a diagonal, ``relative_key``'s that of slopes times queries, and ``position_bias``'s follows
from the slopes' sums. A tile of entries and a tile of rows meet ROWS + ENTRIES - 1 keys: the kernel makes the products
of that window, and picks the diagonals from them. Each (sample, head) has sums of its own: offsets * head_dim numbers
of float32, as many bytes as 2 to 4 times its keys.
"""

import triton
import triton.language as tl

from rmt_kernels.backends.triton.relative_tiles import (
    draw_of,
    head_rows,
    load_biases,
    load_entries,
    picked,
    seeing_rows,
    spans_read,
    walked_rows,
)
from rmt_kernels.backends.triton.tiles import alive, fence_of, kept, load_rows, pointers_at, rows_of, sees, store_rows
from rmt_kernels.backends.triton.walk import _clip, _tiles, edge_count, edge_tile


@triton.jit
def _region_rows(e0, e1, layout, sample, reach, base, FORM: tl.constexpr, TOKENS: tl.constexpr, GAPS: tl.constexpr):
    """``(a, b)``: of a region's rows, those of [a, b) may see a key at one of the entries [e0, e1). ``base`` is the own
    key of its first."""
    size, lo, hi, step = layout[FORM], layout[FORM + 1], layout[FORM + 2], layout[FORM + 3]
    nearest = e1 - 1 - reach + base  # the last key that row 0 meets there
    farthest = e0 - reach + base
    a = tl.maximum(lo - nearest, 0)
    b = tl.where(step > 0, tl.where(farthest < hi, size, 0), tl.where(lo < hi, hi - farthest, 0))
    if TOKENS:
        cache, read, window = layout[0], layout[1], layout[5]
        if GAPS:  # what lies behind the window is READ
            outside = (window > 0) & (e1 - 1 - reach < 1 - window - read)
            a = tl.where(outside, tl.maximum(a, cache - nearest), a)
            b = tl.where(outside, tl.minimum(b, cache + read - farthest), b)
    own = (layout[FORM + 4] >= 0) & (e0 <= reach) & (reach < e1)
    a, b = tl.where(own, 0, a), tl.where(own, size, tl.minimum(b, size))
    if TOKENS and GAPS:
        a, b = tl.maximum(a, sample[0]), tl.minimum(b, sample[1])
    return a, b


@triton.jit
def _region_run(
    e0, e1, rows, layout, sample, reach, origin, offset, FORM: tl.constexpr, TOKENS: tl.constexpr, GAPS: tl.constexpr
):
    """As ``_region_rows``, in rows of the call."""
    a, b = _region_rows(e0, e1, layout, sample, reach, offset + reach - origin, FORM, TOKENS, GAPS)
    shift = offset - sample[3]
    end = tl.maximum(tl.minimum(shift + layout[FORM], rows), 0)
    return _clip(a + shift, 0, end), _clip(b + shift, 0, end)


@triton.jit
def entry_walk(e0, e1, rows, layout, sample, reach, origin, ROWS: tl.constexpr, GAPS: tl.constexpr):
    """The tiles of ROWS rows each that may see keys at the entries [e0, e1), as a walk of masked tiles."""
    a1, b1 = _region_run(e0, e1, rows, layout, sample, reach, origin, 0, 7, False, GAPS)
    a2, b2 = _region_run(e0, e1, rows, layout, sample, reach, origin, layout[7], 12, True, GAPS)
    a3, b3 = _region_run(e0, e1, rows, layout, sample, reach, origin, layout[7] + layout[12], 17, False, GAPS)
    begin = tl.where(a1 < b1, a1, tl.where(a2 < b2, a2, tl.where(a3 < b3, a3, 0))) // ROWS
    _, end1 = _tiles(a1, b1, begin, ROWS)
    start2, end2 = _tiles(a2, b2, end1, ROWS)
    start3, end3 = _tiles(a3, b3, end2, ROWS)
    return (begin, end3, begin, begin, end1, start2, start2, start2, end2, start3, end3, end3)


@triton.jit
def _entry_step(
    de, slopes, shares, entries, bias, entry, tile, e0, source, table, keys, values, fence, side, next_row, chance,
    factor, keep_scale,
    ROWS: tl.constexpr, ENTRIES: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, D: tl.constexpr,
    GAPS: tl.constexpr, OWN: tl.constexpr, APART: tl.constexpr, DROPOUT: tl.constexpr, HAS_KEY: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_CONTENT: tl.constexpr, HAS_POSITION: tl.constexpr, SHIFTED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of rows adds to the gradients of a tile of entries, to the sums of the slopes of its scores, and where
    SHIFTED to ``shares``, the sums without rows whose next row counts as zeros. Scores are (ENTRIES, ROWS): entry t of
    row r is key t + r of a window of keys."""
    content_rows, position_rows, grads, pivot_ptr, delta_ptr, _, _ = source
    _, _, _, _, reach, origin = table
    layout, sample, _, _ = side
    row, query, stays = walked_rows(side, tile, GAPS, ROWS)
    start = e0 + tile * ROWS + sample[3] - origin
    content = head_rows(content_rows, query, stays, BLOCK_D, D)  # (ROWS, BLOCK_D)
    window = start + tl.arange(0, WIDTH)
    held = (window >= 0) & alive(window, fence, GAPS)
    k = load_rows(pointers_at(keys, window, APART), held, BLOCK_D, D, True)  # (WIDTH, BLOCK_D)
    o_e, o_r = tl.arange(0, ENTRIES)[:, None], tl.arange(0, ROWS)[None, :]
    s = tl.dot(k, tl.trans(content), input_precision=PRECISION)  # (WIDTH, ROWS)
    s = picked(s, o_e + o_r, o_r + 0 * o_e, WIDTH, ROWS, ENTRIES, ROWS)
    if HAS_KEY:
        position = content  # (ROWS, BLOCK_D)
        if SHIFTED:
            there = stays & seeing_rows(source, query + next_row)
            position = head_rows(position_rows, query + next_row, there, BLOCK_D, D)
        elif HAS_CONTENT or HAS_POSITION:
            position = head_rows(position_rows, query, stays, BLOCK_D, D)
        s = tl.dot(entries, tl.trans(position), s, input_precision=PRECISION)  # (ENTRIES, ROWS)
    s = s * factor
    if HAS_BIAS:
        s += bias[:, None]
    pivot = tl.load(pivot_ptr + query, mask=stays, other=float("inf"))
    p = tl.math.exp2(s - pivot[None, :])
    lo, hi, gap_lo, gap_hi = spans_read(source, query, stays, GAPS)
    seen = sees(lo[None, :], hi[None, :], gap_lo[None, :], gap_hi[None, :], start + o_e + o_r, GAPS)
    if OWN:
        _, _, _, _, own = rows_of(row, stays, layout, sample, False, True)
        seen = seen | ((own >= 0)[None, :] & (entry == reach)[:, None])
    p = tl.where(seen & (entry >= 0)[:, None], p, 0.0)
    v = load_rows(pointers_at(values, window, APART), held, BLOCK_D, D, True)  # (WIDTH, BLOCK_D)
    grad = head_rows(grads, query, stays, BLOCK_D, D)  # (ROWS, BLOCK_D)
    delta = tl.load(delta_ptr + query, mask=stays, other=0.0)
    dp = tl.dot(v, tl.trans(grad), input_precision=PRECISION)  # (WIDTH, ROWS)
    if DROPOUT:
        keep = tl.trans(kept(draw_of(chance, query, sample), start, WIDTH))
        dp = tl.where(keep, dp * keep_scale, 0.0)
    dp = picked(dp, o_e + o_r, o_r + 0 * o_e, WIDTH, ROWS, ENTRIES, ROWS)
    ds = p * (dp - delta[None, :])
    if HAS_KEY:
        de = tl.dot(ds.to(position.dtype), position, de, input_precision=PRECISION)
    if SHIFTED:
        shares += tl.sum(tl.where(there[None, :], ds, 0.0), 1)
    return de, slopes + tl.sum(ds, 1), shares


@triton.jit
def entry_gradients(
    tile, tiles, tiles_behind, pair, keys, values, entry_parts_ptr, bias_parts_ptr, position_parts_ptr, source, table,
    side, limit, bad, chance, factor, scale, keep_scale,
    ROWS: tl.constexpr, ENTRIES: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, D: tl.constexpr,
    GAPS: tl.constexpr, OWN: tl.constexpr, APART: tl.constexpr, DROPOUT: tl.constexpr, HAS_KEY: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_CONTENT: tl.constexpr, HAS_POSITION: tl.constexpr, SHIFTED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile of entries from one sample's head, which are number ``pair``, float32: of ``relative_key``
    (batch, heads, offsets, D), of ``relative_bias`` (batch, heads, offsets), and the tile's share of
    ``position_bias``'s (batch, heads, tiles, D), the slopes' sums times the entries. Tiles hold entries up to
    ``reach``, which are ``tiles_behind``, or those beyond: where SHIFTED, these meet the next rows."""
    layout, sample, rows, _ = side
    _, _, _, offsets, reach, origin = table
    fence = fence_of(layout, sample, limit)
    ahead = tile >= tiles_behind
    least = tl.where(ahead, reach + 1, 0)
    most = tl.where(ahead, offsets, reach + 1)
    # A tile meets keys from a multiple of 4 on: random numbers come in fours.
    e0 = least + tl.where(ahead, tile - tiles_behind, tile) * ENTRIES
    e0 -= (least + sample[3] - origin) & 3
    entry = e0 + tl.arange(0, ENTRIES)
    exists = (entry >= least) & (entry < most)
    entry = tl.where(exists, entry, -1)
    walk = entry_walk(
        tl.maximum(e0, least), tl.minimum(e0 + ENTRIES, most), rows, layout, sample, reach, origin, ROWS, GAPS
    )  # fmt: skip
    entries = tl.zeros([ENTRIES, BLOCK_D], keys[0].dtype.element_ty)
    bias = tl.zeros([ENTRIES], tl.float32)
    if HAS_KEY:
        entries = load_entries(table, e0, ENTRIES, BLOCK_D, D)
    if HAS_BIAS:
        bias = load_biases(table, e0, ENTRIES)
    de = tl.zeros([ENTRIES, BLOCK_D], tl.float32)
    slopes = tl.zeros([ENTRIES], tl.float32)
    shares = slopes
    for i in range(0, edge_count(walk)):
        de, slopes, shares = _entry_step(
            de, slopes, shares, entries, bias, entry, edge_tile(i, walk), e0, source, table, keys, values, fence, side,
            ahead.to(tl.int32), chance, factor, keep_scale, ROWS, ENTRIES, WIDTH, BLOCK_D, D, GAPS, OWN, APART, DROPOUT,
            HAS_KEY, HAS_BIAS, HAS_CONTENT, HAS_POSITION, SHIFTED, PRECISION,
        )  # fmt: skip
    if HAS_KEY:
        store_rows(entry_parts_ptr + (pair * offsets + entry) * D, de * scale + bad, exists, BLOCK_D, D)
    if HAS_BIAS:
        tl.store(bias_parts_ptr + pair * offsets + entry, slopes + bad, mask=exists)
    if HAS_POSITION:
        if not SHIFTED:
            shares = slopes
        o_d = tl.arange(0, BLOCK_D)
        again = load_entries(table, e0, ENTRIES, BLOCK_D, D)  # kept ones would take registers from the loop
        share = tl.sum(tl.where(exists, shares, 0.0)[:, None] * again.to(tl.float32), 0) * scale + bad
        tl.store(position_parts_ptr + (pair * tiles + tile) * D + o_d, share, mask=o_d < D)
