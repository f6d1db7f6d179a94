"""Which tiles a program visits: closed forms over the layout, never a list in memory.

A walk is a run of tiles with up to five stretches cut out of it, in ascending order: tiles that need no mask (visited
by a loop of their own) and holes that nobody sees. ``open_tile`` and ``edge_tile`` turn a loop's index into a tile by
arithmetic alone, so that the loads of a tile can be issued while an earlier one is still computed.
"""

import triton
import triton.language as tl

from rmt_kernels.backends.triton.tiles import FAR


@triton.jit
def _clip(x, low, high):
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit
def _past(tile, start, end):
    """The tile, moved behind the stretch [start, end) if it does not lie before it."""
    return tl.where(tile >= start, tile + (end - start), tile)


@triton.jit
def key_walk(lo, hi, gap_lo, gap_hi, KEYS: tl.constexpr, GAPS: tl.constexpr):
    """The key tiles of a tile of query rows, given what each row sees (see ``tiles.rows_of``).

    Returns ``(last, walk)``: no row sees a key from ``last`` on; ``walk`` is for ``open_tile`` and ``edge_tile``.
    Rows that see nothing are left out, their results are replaced anyway.
    """
    seeing = lo < hi
    least = tl.min(tl.where(seeing, lo, FAR), 0)
    last = tl.max(tl.where(seeing, hi, 0), 0)
    # Every row sees [all_lo, all_hi), gaps aside.
    all_lo = tl.max(tl.where(seeing, lo, 0), 0)
    all_hi = tl.min(tl.where(seeing, hi, FAR), 0)
    end = tl.cdiv(last, KEYS)
    begin = tl.minimum(least // KEYS, end)
    hole_a, hole_b, open2_a, open2_b = end, end, end, end
    first_hi = all_hi
    if GAPS:
        gapped = gap_lo < gap_hi
        # Keys that some row hides in the middle.
        some_lo = tl.min(tl.where(gapped, gap_lo, FAR), 0)
        some_hi = tl.max(tl.where(gapped, gap_hi, 0), 0)
        # Keys that every row hides there. A row without a gap hides what precedes its interval and what follows it.
        later = lo > some_lo
        hole_lo = tl.max(tl.where(seeing, tl.where(gapped, gap_lo, tl.where(later, 0, hi)), 0), 0)
        hole_hi = tl.min(tl.where(gapped, gap_hi, tl.where(seeing & later, lo, FAR)), 0)
        first_hi = tl.minimum(all_hi, some_lo)
        hole_a = tl.cdiv(hole_lo, KEYS)
        hole_b = hole_hi // KEYS
        open2_a = tl.where(some_lo < some_hi, tl.cdiv(tl.maximum(all_lo, some_hi), KEYS), end)
        open2_b = all_hi // KEYS
    open1_a, open1_b = tl.cdiv(all_lo, KEYS), first_hi // KEYS
    some = open1_a < open1_b  # an empty run comes first
    open1_a = _clip(tl.where(some, open1_a, begin), begin, end)
    open1_b = _clip(tl.where(some, open1_b, begin), open1_a, end)
    hole_a = _clip(hole_a, open1_b, end)
    hole_b = _clip(hole_b, hole_a, end)
    open2_a = _clip(open2_a, hole_b, end)
    open2_b = _clip(open2_b, open2_a, end)
    return last, (begin, end, open1_a, open1_b, hole_a, hole_b, open2_a, open2_b, open2_b, open2_b, open2_b, open2_b)


@triton.jit
def open_count(walk):
    """Tiles that need no mask."""
    return (walk[3] - walk[2]) + (walk[7] - walk[6]) + (walk[11] - walk[10])


@triton.jit
def edge_count(walk):
    """Tiles that need one."""
    return (walk[1] - walk[0]) - open_count(walk) - (walk[5] - walk[4]) - (walk[9] - walk[8])


@triton.jit
def open_tile(i, walk):
    """The i-th tile that needs no mask."""
    return _past(_past(walk[2] + i, walk[3], walk[6]), walk[7], walk[10])


@triton.jit
def edge_tile(i, walk):
    """The i-th tile that needs a mask."""
    tile = _past(_past(walk[0] + i, walk[2], walk[3]), walk[4], walk[5])
    return _past(_past(_past(tile, walk[6], walk[7]), walk[8], walk[9]), walk[10], walk[11])


@triton.jit
def own_run(own, TILE: tl.constexpr):
    """``(last, start, end)``: the run of tiles that hold the keys, or rows, of ``own`` that are not -1, and the place
    behind the last of these."""
    last = tl.max(own, 0) + 1
    start = tl.min(tl.where(own >= 0, own, FAR), 0) // TILE
    end = tl.cdiv(last, TILE)
    return last, tl.minimum(start, end), end


@triton.jit
def _region_rows(n0, n1, layout, sample, FORM: tl.constexpr, TOKENS: tl.constexpr, GAPS: tl.constexpr):
    """``(a, b, open_a, open_b)``: of a region's rows, [a, b) may see keys of [n0, n1), and [open_a, open_b) see all."""
    cache, read, tokens, window = layout[0], layout[1], layout[2], layout[5]
    rows, lo, hi, step = layout[FORM], layout[FORM + 1], layout[FORM + 2], layout[FORM + 3]
    token_begin, token_end, stale, _ = sample
    a = tl.where(step > 0, tl.maximum(n0 - hi + 1, 0), tl.where(hi > n0, 0, rows))
    a = tl.where(n1 <= lo, rows, a)
    open_a = tl.where(step > 0, tl.maximum(n1 - hi, 0), tl.where(hi >= n1, 0, rows))
    open_a = tl.where((n0 < lo) | ((n0 < cache) & (n0 < stale)), rows, open_a)
    b, open_b = rows, rows
    if GAPS:
        head = cache + read  # the first token key
        # Positions of the tile's token keys; t1 <= t0 where it has none.
        t0, t1 = tl.maximum(n0 - head, 0), tl.minimum(n1 - head, tokens)
        padded = (t0 < t1) & ((t0 < token_begin) | (t1 > token_end))
        open_a = tl.where(padded, rows, open_a)
        all_padded = (n0 >= head) & (n1 <= head + tokens) & ((t1 <= token_begin) | (t0 >= token_end))
        a = tl.where(all_padded, rows, a)
        if TOKENS:
            a, open_a = tl.maximum(a, token_begin), tl.maximum(open_a, token_begin)
            b, open_b = tl.minimum(b, token_end), tl.minimum(open_b, token_end)
            # Row p of a window sees the keys of [CACHE | TOKENS] from p + cache + 1 - window on.
            others = ((n0 < head) & (n1 > cache) & (read > 0)) | (n1 > head + tokens)
            newest = tl.where(n1 > head, cache + t1, n1) - 1
            oldest = tl.where(n0 < cache, n0, cache + t0)
            counted = (n0 < cache) | (t0 < t1)
            b = tl.where((window > 0) & (others == 0), tl.minimum(b, newest - cache + window), b)
            open_b = tl.where((window > 0) & counted, tl.minimum(open_b, oldest - cache + window), open_b)
    return a, b, open_a, open_b


@triton.jit
def _region_queries(
    n0, n1, queries, layout, sample, offset, FORM: tl.constexpr, TOKENS: tl.constexpr, GAPS: tl.constexpr
):
    """As ``_region_rows``, in query rows of the call; empty runs have a >= b."""
    a, b, open_a, open_b = _region_rows(n0, n1, layout, sample, FORM, TOKENS, GAPS)
    shift = offset - sample[3]
    end = tl.maximum(tl.minimum(shift + layout[FORM], queries), 0)
    return (
        _clip(a + shift, 0, end), _clip(b + shift, 0, end), _clip(open_a + shift, 0, end), _clip(open_b + shift, 0, end)
    )  # fmt: skip


@triton.jit
def _tiles(a, b, least, QUERIES: tl.constexpr):
    """The tiles that rows [a, b) touch, from ``least`` on; (least, least) where there are none."""
    start = tl.where(a < b, tl.maximum(a // QUERIES, least), least)
    return start, tl.where(a < b, tl.maximum(tl.cdiv(b, QUERIES), start), least)


@triton.jit
def _whole_tiles(a, b, count, QUERIES: tl.constexpr):
    """The tiles that lie in rows [a, b), where rows from ``count`` on do not matter."""
    start = tl.cdiv(a, QUERIES)
    end = tl.where(b >= count, tl.cdiv(b, QUERIES), b // QUERIES)
    return start, tl.where(a < b, tl.maximum(end, start), start)


@triton.jit
def row_walk(n0, n1, queries, layout, sample, QUERIES: tl.constexpr, GAPS: tl.constexpr):
    """The tiles of QUERIES query rows each that see keys of [n0, n1), as a walk."""
    a1, b1, oa1, ob1 = _region_queries(n0, n1, queries, layout, sample, 0, 7, False, GAPS)
    a2, b2, oa2, ob2 = _region_queries(n0, n1, queries, layout, sample, layout[7], 12, True, GAPS)
    a3, b3, oa3, ob3 = _region_queries(n0, n1, queries, layout, sample, layout[7] + layout[12], 17, False, GAPS)
    # Open runs that touch become one, so that a tile across the border of two regions may be open.
    join = (oa1 < ob1) & (oa2 < ob2) & (ob1 == oa2)
    oa2, ob1 = tl.where(join, oa1, oa2), tl.where(join, oa1, ob1)
    join = (oa2 < ob2) & (oa3 < ob3) & (ob2 == oa3)
    oa3, ob2 = tl.where(join, oa2, oa3), tl.where(join, oa2, ob2)

    begin = tl.where(a1 < b1, a1, tl.where(a2 < b2, a2, tl.where(a3 < b3, a3, 0))) // QUERIES
    _, e1 = _tiles(a1, b1, begin, QUERIES)
    s2, e2 = _tiles(a2, b2, e1, QUERIES)
    s3, e3 = _tiles(a3, b3, e2, QUERIES)
    open1_a, open1_b = _whole_tiles(oa1, ob1, queries, QUERIES)
    open2_a, open2_b = _whole_tiles(oa2, ob2, queries, QUERIES)
    open3_a, open3_b = _whole_tiles(oa3, ob3, queries, QUERIES)
    # An empty open run must not stand out of order, where it would stop later tiles from moving past it.
    open1_a, open1_b = _clip(open1_a, begin, e3), _clip(open1_b, begin, e3)
    open2_a, open2_b = _clip(open2_a, open1_b, e3), _clip(open2_b, open1_b, e3)
    open3_a, open3_b = _clip(open3_a, open2_b, e3), _clip(open3_b, open2_b, e3)
    return (begin, e3, open1_a, open1_b, e1, s2, open2_a, open2_b, e2, s3, open3_a, open3_b)
