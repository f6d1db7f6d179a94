"""Pieces that every kernel shares: what a sample hides, which keys a row sees, how tiles are loaded.

Rows are *packed*: PACK query heads that share a key/value head lie side by side in a tile of ROWS rows, so that grouped
heads fill one tile and read their keys once. Row o of a tile is query ``o // PACK`` of the tile's ``ROWS // PACK``, in
head ``o % PACK``; rows left over are idle. BLOCKS such packs make up a group.

A layout arrives as the integers of ``SegmentLayout.ints`` and travels between functions as the tuple ``layout``:
``(cache, read, tokens, write, token_rows, window, skip, *READ form, *TOKENS form, *WRITE form)``, a form being
``(rows, lo, hi, step, own)``; a sample as ``(token_begin, token_end, cache_begin, first)``, ``first`` being the layout
row of the call's first query. The arithmetic is that of csrc/layout.h.
"""

import triton
import triton.language as tl

FAR = tl.constexpr(1 << 30)


@triton.jit
def load_or(pointer, index, default):
    """``pointer[index]``, or the default where there is no such argument."""
    if pointer is None:
        return default
    else:
        return tl.load(pointer + index)


@triton.jit
def sample_of(b, queries, layout, token_lengths, token_starts, cache_starts, query_start):
    """``(sample, ok)``: values out of range are clamped, and the sample is not ok."""
    token_rows, cache = layout[4], layout[0]
    end = load_or(token_lengths, b, token_rows)
    begin = load_or(token_starts, b, 0)
    stale = load_or(cache_starts, b, 0)
    start = load_or(query_start, b, 0)
    ok = (end >= 0) & (end <= token_rows) & (begin >= 0) & (begin <= token_rows)
    ok = (
        ok
        & (stale >= 0)
        & (stale <= cache)
        & (start >= 0)
        & (start <= token_rows - queries * (query_start is not None))
    )
    end = tl.minimum(tl.maximum(end, 0), token_rows)
    begin = tl.minimum(tl.maximum(begin, 0), token_rows)
    stale = tl.minimum(tl.maximum(stale, 0), cache)
    first = layout[6]
    if query_start is not None:
        first = layout[7] + tl.minimum(tl.maximum(start, 0), token_rows - queries)
    return (begin, end, stale, first), ok


@triton.jit
def key_limit(queries, layout, sample, query_start):
    """The number of keys, or where ``query_start`` is given the place behind those that the call's last row may see:
    keys of the future may hold anything."""
    limit = layout[0] + layout[1] + layout[2] + layout[3]
    if query_start is not None:
        last = sample[3] - layout[7] + queries - 1
        own = tl.where(layout[16] >= 0, layout[16] + last + 1, 0)
        limit = tl.minimum(limit, tl.maximum(layout[14] + layout[15] * last, own))
    return limit


@triton.jit
def tile_rows(tile, queries, ROWS: tl.constexpr, PACK: tl.constexpr):
    """``(query, stays)`` of each row of a tile of packed rows: its query, and whether there is such a row."""
    o = tl.arange(0, ROWS)
    query = tile * (ROWS // PACK) + o // PACK
    stays = query < queries
    if ROWS % PACK != 0:
        stays = stays & (o < ROWS // PACK * PACK)
    return query, stays


@triton.jit
def head_of(base, b, h, stride_b, stride_h):
    """The address of a sample's head. Strides count units of 16 bytes here and below: the compiler then knows that rows
    can be loaded in vectors, whatever their strides."""
    UNIT: tl.constexpr = 128 // base.dtype.element_ty.primitive_bitwidth
    return base + (b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h) * UNIT


@triton.jit
def row_pointers(base, tile, stride_n, stride_h, ROWS: tl.constexpr, PACK: tl.constexpr):
    """(ROWS,) pointers of a tile of packed rows, given their first head's address. Worked out anew for every tile: kept
    ones would take registers that the products need."""
    UNIT: tl.constexpr = 128 // base.dtype.element_ty.primitive_bitwidth
    o = tl.arange(0, ROWS)
    query = tile * (ROWS // PACK) + o // PACK
    if PACK == 1:
        return base + query.to(tl.int64) * (stride_n * UNIT)
    else:
        return base + query.to(tl.int64) * (stride_n * UNIT) + (o % PACK).to(tl.int64) * stride_h * UNIT


@triton.jit
def row_numbers(base, tile, size, ROWS: tl.constexpr, PACK: tl.constexpr):
    """(ROWS,) pointers to one number for each of a tile of packed rows, in (heads, size), from the first head's on."""
    o = tl.arange(0, ROWS)
    query = tile * (ROWS // PACK) + o // PACK
    if PACK == 1:
        return base + query.to(tl.int64)
    else:
        return base + query.to(tl.int64) + (o % PACK).to(tl.int64) * size


@triton.jit
def rows_of(query, stays, layout, sample, GAPS: tl.constexpr, OWN: tl.constexpr):
    """Which keys each query row sees: ``[lo, hi)`` outside ``[gap_lo, gap_hi)``, and ``own`` where it is not -1.

    A row that sees no interval, or does not stay, has lo = hi = 0.
    """
    cache, read, tokens, window = layout[0], layout[1], layout[2], layout[5]
    begin, end, stale, first = sample
    row = query + first  # in the layout
    is_read = row < layout[7]
    is_token = (row >= layout[7]) & (row < layout[7] + layout[12])
    p = row - tl.where(is_read, 0, layout[7] + tl.where(is_token, 0, layout[12]))
    lo = tl.where(is_read, layout[8], tl.where(is_token, layout[13], layout[18]))
    step = tl.where(is_read, layout[10], tl.where(is_token, layout[15], layout[20]))
    hi = tl.where(is_read, layout[9], tl.where(is_token, layout[14], layout[19])) + step * p
    live = stays & ((is_token == 0) | ((p >= begin) & (p < end)))

    old = cache + p + 1 - window
    slides = is_token & (window > 0)
    oldest = tl.maximum(stale, tl.where(slides, tl.minimum(old, cache), 0))
    lo = tl.where(lo < cache, tl.maximum(lo, oldest), lo)
    gap_lo, gap_hi = tl.zeros_like(lo), tl.zeros_like(lo)
    if GAPS:
        head = cache + read  # the first token key
        hidden = tl.maximum(begin, tl.where(slides, old - cache, 0))  # token keys hidden at the front
        front = (tokens > 0) & (hidden > 0)
        back = (tokens > 0) & (hidden <= 0) & (end < tokens)
        gap_lo = tl.where(front, head, tl.where(back, head + end, 0))
        gap_hi = tl.where(front, head + hidden, tl.where(back, head + tokens, 0))
        # A gap that touches an end of the interval shortens it.
        lo = tl.where((gap_lo <= lo) & (gap_hi > lo), gap_hi, lo)
        hi = tl.where((gap_hi >= hi) & (gap_lo < hi), tl.maximum(gap_lo, lo), hi)
    empty = (lo >= hi) | (live == 0)
    lo, hi = tl.where(empty, 0, lo), tl.where(empty, 0, hi)
    if GAPS:
        none = (gap_lo <= lo) | (gap_hi >= hi)
        gap_lo, gap_hi = tl.where(none, 0, gap_lo), tl.where(none, 0, gap_hi)
    own = tl.full(lo.shape, -1, tl.int32)
    if OWN:
        base = tl.where(is_read, layout[11], tl.where(is_token, layout[16], layout[21]))
        own = tl.where(live & (base >= 0), base + p, -1)
    return lo, hi, gap_lo, gap_hi, own


@triton.jit
def sees(lo, hi, gap_lo, gap_hi, key, GAPS: tl.constexpr):
    """Whether a row sees a key; the arguments broadcast."""
    visible = (key >= lo) & (key < hi)
    if GAPS:
        visible = visible & ((key < gap_lo) | (key >= gap_hi))
    return visible


@triton.jit
def load_rows(pointers, stays, BLOCK_D: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr):
    """(rows, BLOCK_D) from row pointers; zeros beyond the head's width and, where MASKED, in rows that do not stay."""
    o_d = tl.arange(0, BLOCK_D)
    if MASKED:
        if D == BLOCK_D:
            return tl.load(pointers[:, None] + o_d[None, :], mask=stays[:, None], other=0.0)
        else:
            return tl.load(pointers[:, None] + o_d[None, :], mask=stays[:, None] & (o_d[None, :] < D), other=0.0)
    else:
        if D == BLOCK_D:
            return tl.load(pointers[:, None] + o_d[None, :])
        else:
            return tl.load(pointers[:, None] + o_d[None, :], mask=o_d[None, :] < D, other=0.0)


@triton.jit
def store_rows(pointers, block, stays, BLOCK_D: tl.constexpr, D: tl.constexpr):
    """Store (rows, BLOCK_D) through row pointers, where rows stay, in the pointers' type."""
    o_d = tl.arange(0, BLOCK_D)
    value = block.to(pointers.dtype.element_ty)
    if D == BLOCK_D:
        tl.store(pointers[:, None] + o_d[None, :], value, mask=stays[:, None])
    else:
        tl.store(pointers[:, None] + o_d[None, :], value, mask=stays[:, None] & (o_d[None, :] < D))


@triton.jit
def fence_of(layout, sample, limit):
    """What ``load_keys`` needs to know of a sample's keys in ``[0, limit)`` that hold nothing: CACHE before ``stale``,
    and the run of TOKENS that is padding, at one end of them."""
    begin, end, stale, _ = sample
    head = layout[0] + layout[1]  # the first token key
    left = begin > 0
    start = head + tl.where(left, 0, tl.minimum(end, layout[2]))
    return limit, stale, start, head + tl.where(left, tl.minimum(begin, layout[2]), layout[2])


@triton.jit
def alive(key, fence, GAPS: tl.constexpr):
    """Which keys are there and hold something: neither stale nor padding, which may be NaN."""
    limit, stale, start, end = fence
    found = key < limit
    if GAPS:
        found = found & (key >= stale) & ((key < start) | (key >= end))
    return found


@triton.jit
def keys_of(base, cache_base, b, g, stride_b, stride_h, stride_n, cache_b, cache_h, cache_n, cache):
    """One head's keys, values or their gradients, as ``load_keys`` and ``pointers_at`` take them: the first ``cache``
    of them may lie in a tensor of their own."""
    return (
        head_of(base, b, g, stride_b, stride_h), head_of(cache_base, b, g, cache_b, cache_h), stride_n, cache_n, cache
    )  # fmt: skip


@triton.jit
def load_keys(
    source, start, fence, KEYS: tl.constexpr, BLOCK_D: tl.constexpr, D: tl.constexpr, APART: tl.constexpr,
    GAPS: tl.constexpr, DESCRIBED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """(KEYS, BLOCK_D) keys or values from ``start`` on; where MASKED, zeros in place of what ``fence`` keeps out.

    ``source`` is of ``keys_of`` or, where DESCRIBED, ``(descriptor, batch, head)``: the copy engine fetches the tile,
    and only rows beyond the tensor are zeros.
    """
    if DESCRIBED:
        descriptor, b, g = source
        return descriptor.load([b, g, start, 0]).reshape(KEYS, BLOCK_D)
    else:
        key = start + tl.arange(0, KEYS)
        return load_rows(pointers_at(source, key, APART), alive(key, fence, GAPS), BLOCK_D, D, MASKED)


@triton.jit
def pointers_at(source, key, APART: tl.constexpr):
    """Row pointers of any keys. Where APART, the cache's lie in a tensor of their own."""
    base, cache_base, stride, cache_stride, cache = source
    UNIT: tl.constexpr = 128 // base.dtype.element_ty.primitive_bitwidth
    if APART:
        cached = key < cache
        first = tl.where(cached, cache_base, base - cache.to(tl.int64) * (stride * UNIT))
        return first + key.to(tl.int64) * tl.where(cached, cache_stride * UNIT, stride * UNIT)
    else:
        return base + key.to(tl.int64) * (stride * UNIT)


@triton.jit
def kept(draw, start, KEYS: tl.constexpr):
    """(rows, KEYS) which probabilities survive dropout. ``draw`` is ``(seed, threshold, row, head, batch)``: the rows'
    places in the layout and their heads, (rows,) each."""
    seed, threshold, row, head, b = draw
    quad = start // 4 + tl.arange(0, KEYS // 4)
    c0 = quad[None, :] + tl.zeros_like(row)[:, None]
    c1 = row[:, None] + tl.zeros_like(quad)[None, :]
    c2 = head[:, None] + tl.zeros_like(quad)[None, :]
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, c2, tl.zeros_like(c0) + b)
    least = threshold.to(tl.uint32, bitcast=True)
    even = tl.interleave((w0 >= least).to(tl.int8), (w2 >= least).to(tl.int8))
    odd = tl.interleave((w1 >= least).to(tl.int8), (w3 >= least).to(tl.int8))
    return tl.interleave(even, odd) != 0
