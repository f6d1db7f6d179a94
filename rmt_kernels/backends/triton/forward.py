"""Forward: one program owns a tile of packed query rows and walks the keys its rows see, with an online softmax.

Tiles that every row sees in full come first and need no mask; edge tiles follow. Where few rows meet many keys
(decoding) the keys are split over programs, each stores what it has summed, and ``combine`` puts that together.
"""

import triton
import triton.language as tl

from rmt_kernels.backends.triton.tiles import (
    fence_of,
    head_of,
    kept,
    keys_of,
    load_keys,
    load_or,
    load_rows,
    row_pointers,
    rows_of,
    sample_of,
    sees,
    store_rows,
    tile_rows,
)
from rmt_kernels.backends.triton.walk import edge_count, edge_tile, key_walk, open_count, open_tile, own_run

# Sizes that change from call to call: no kernel is compiled anew for them.
LAYOUT = (
    "cache", "read", "tokens", "write", "token_rows", "window", "skip", "rows0", "lo0", "hi0", "step0", "own0",
    "rows1", "lo1", "hi1", "step1", "own1", "rows2", "lo2", "hi2", "step2", "own2",
)  # fmt: skip
SIZES = (*LAYOUT, "kv_heads", "queries", "tiles", "heads", "together", "chunk", "threshold")
STRIDES = tuple(f"{tensor}_{step}" for tensor in ("q", "k", "v", "ck", "cv", "o") for step in "bhn")
# Whatever the alignment of these addresses, the kernel is the same; those of all others are multiples of 16.
SAMPLES = ("token_lengths_ptr", "token_starts_ptr", "cache_starts_ptr", "query_start_ptr", "seed_ptr")
LN2 = tl.constexpr(0.6931471805599453)
# Beyond 2^28 float32 scores are 32 apart: a softmax over them is all or nothing, at any temperature.
HUGE = tl.constexpr(268435456.0)


@triton.jit
def _unit(highest, factor, coarse):
    """(rows,) what a score is multiplied by to be an exponent of 2.

    ``score * unit - highest * unit`` is one fused multiply-add, whose second product is rounded and whose first is
    not. Where that rounding could matter the unit is a power of two, which makes both exact.
    """
    return tl.where(tl.abs(highest) * factor < HUGE, factor, coarse)


@triton.jit
def _weights(s, highest, higher, factor, coarse, MASKED: tl.constexpr, EXACT: tl.constexpr):
    """2 to the power of ``(s - higher) * factor``, and of ``(highest - higher) * factor``.

    EXACT subtracts first, which costs float32 kernels nothing beside their products.
    """
    finite = higher
    if MASKED:
        finite = tl.where(higher == float("-inf"), 0.0, higher)  # a row that has seen nothing yet
    if EXACT:
        return tl.math.exp2((s - finite[:, None]) * factor), tl.math.exp2((highest - finite) * factor)
    else:
        unit = _unit(finite, factor, coarse)
        pivot = finite * unit
        return tl.math.exp2(s * unit[:, None] - pivot[:, None]), tl.math.exp2(highest * unit - pivot)


@triton.jit
def _lse(highest, total, factor, coarse, scale, EXACT: tl.constexpr):
    """(rows,) natural logarithm of the summed exponentials of scores times ``scale``; -inf where highest is."""
    total = tl.log(tl.where(total == 0.0, 1.0, total))
    if not EXACT:
        unit = _unit(highest, factor, coarse)
        seen = tl.where(highest == float("-inf"), 0.0, highest)
        # What the exponents were too large by, because ``highest * unit`` was rounded.
        total -= tl.where(unit == factor, tl.fma(seen, unit, -(seen * unit)), 0.0) * LN2
    return highest * scale + total


@triton.jit
def visible(rows, key, MASK: tl.constexpr, GAPS: tl.constexpr):
    """(rows, keys) which rows see which keys: of their intervals, or their own."""
    lo, hi, gap_lo, gap_hi, own = rows
    if MASK == "own":
        return own[:, None] == key[None, :]
    else:
        return sees(lo[:, None], hi[:, None], gap_lo[:, None], gap_hi[:, None], key[None, :], GAPS)


@triton.jit
def _step(
    acc, total, highest, q, keys, values, tile, fence, rows, draw, factor, coarse, KEYS: tl.constexpr,
    BLOCK_D: tl.constexpr, D: tl.constexpr, GAPS: tl.constexpr, APART: tl.constexpr,
    DESCRIBED: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """One tile of keys: scores, softmax against the highest score so far, weighted sum of values. MASK: the rows see
    all of its keys ("none"), those of their intervals ("interval"), or their own ("own")."""
    EXACT: tl.constexpr = q.dtype == tl.float32
    MASKED: tl.constexpr = MASK != "none"
    start = tile * KEYS
    key = start + tl.arange(0, KEYS)
    k = load_keys(keys, start, fence, KEYS, BLOCK_D, D, APART, GAPS, DESCRIBED, MASKED)  # (KEYS, BLOCK_D)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # (ROWS, KEYS)
    if MASKED:
        s = tl.where(visible(rows, key, MASK, GAPS), s, float("-inf"))
    higher = tl.maximum(highest, tl.max(s, 1))
    p, fade = _weights(s, highest, higher, factor, coarse, MASKED, EXACT)
    total = total * fade + tl.sum(p, 1)
    if DROPOUT:
        p = tl.where(kept(draw, start, KEYS), p, 0.0)
    v = load_keys(values, start, fence, KEYS, BLOCK_D, D, APART, GAPS, DESCRIBED, MASKED)  # (KEYS, BLOCK_D)
    acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION)
    return acc, total, higher


@triton.jit
def _attend(
    q, keys, values, rows, walk, fence, draw, factor, coarse, ROWS: tl.constexpr, KEYS: tl.constexpr,
    BLOCK_D: tl.constexpr, D: tl.constexpr, GAPS: tl.constexpr, OWN: tl.constexpr, APART: tl.constexpr,
    DESCRIBED: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    SPECIALIZE: tl.constexpr,
):  # fmt: skip
    """``(acc, total, highest)``: values summed with weights 2^((score - highest) * unit), and the weights' sum."""
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    if SPECIALIZE:  # the compiler splits loads and products over warps in a single loop only
        for i in tl.range(0, walk[1] - walk[0], warp_specialize=True):
            acc, total, highest = _step(
                acc, total, highest, q, keys, values, walk[0] + i, fence, rows, draw, factor, coarse, KEYS, BLOCK_D, D,
                GAPS, APART, DESCRIBED, DROPOUT, PRECISION, "interval",
            )  # fmt: skip
    else:
        for i in range(0, open_count(walk)):
            acc, total, highest = _step(
                acc, total, highest, q, keys, values, open_tile(i, walk), fence, rows, draw, factor, coarse, KEYS,
                BLOCK_D, D, GAPS, APART, DESCRIBED, DROPOUT, PRECISION, "none",
            )  # fmt: skip
        for i in range(0, edge_count(walk)):
            acc, total, highest = _step(
                acc, total, highest, q, keys, values, edge_tile(i, walk), fence, rows, draw, factor, coarse, KEYS,
                BLOCK_D, D, GAPS, APART, DESCRIBED, DROPOUT, PRECISION, "interval",
            )  # fmt: skip
        if OWN:
            last, start, end = own_run(rows[4], KEYS)
            own_fence = (last, fence[1], fence[2], fence[3])
            for tile in range(start, end):
                acc, total, highest = _step(
                    acc, total, highest, q, keys, values, tile, own_fence, rows, draw, factor, coarse, KEYS, BLOCK_D, D,
                    GAPS, APART, DESCRIBED, DROPOUT, PRECISION, "own",
                )  # fmt: skip
    return acc, total, highest


@triton.jit
def place(pid, tiles, heads, together, HEAVY_LAST: tl.constexpr):
    """``(tile, head)`` of a program: heads in groups of ``together``, whose keys fit the L2 cache at once; within a
    group all heads' heaviest tiles first, so that no long program starts last."""
    group = pid // (tiles * together)
    rest = pid - group * tiles * together
    size = tl.minimum(together, heads - group * together)
    tile = rest // size
    if HEAVY_LAST:
        tile = tiles - 1 - tile
    return tile, group * together + rest % size


@triton.jit(do_not_specialize=(*SIZES, *STRIDES), do_not_specialize_on_alignment=SAMPLES)
def forward_kernel(
    query_ptr, key_ptr, value_ptr, cache_key_ptr, cache_value_ptr, out_ptr, lse_ptr, part_ptr, token_lengths_ptr,
    token_starts_ptr, cache_starts_ptr, query_start_ptr, seed_ptr,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, ck_b, ck_h, ck_n, cv_b, cv_h, cv_n, o_b, o_h, o_n,
    kv_heads, queries, tiles, heads, together, chunk, threshold, factor, coarse, scale, keep_scale,
    cache, read, tokens, write, token_rows, window, skip, rows0, lo0, hi0, step0, own0, rows1, lo1, hi1, step1, own1,
    rows2, lo2, hi2, step2, own2,
    PACK: tl.constexpr, BLOCKS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, GAPS: tl.constexpr, OWN: tl.constexpr, APART: tl.constexpr,
    DESCRIBED: tl.constexpr, DROPOUT: tl.constexpr, SIGN: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr,
    SPECIALIZE: tl.constexpr,
):  # fmt: skip
    """out (batch, heads, queries, D) and lse (batch, heads, queries); where SPLIT, their parts instead, for every row
    of lse and every chunk of keys: all sums of D values, then all highest scores, which they are relative to, then all
    sums of weights. Where DESCRIBED, keys and values are descriptors."""
    layout = (
        cache, read, tokens, write, token_rows, window, skip, rows0, lo0, hi0, step0, own0, rows1, lo1, hi1, step1,
        own1, rows2, lo2, hi2, step2, own2,
    )  # fmt: skip
    tile, unit = place(tl.program_id(0), tiles, heads, together, True)
    b, g, first_head = unit // (kv_heads * BLOCKS), unit // BLOCKS % kv_heads, unit % (kv_heads * BLOCKS) * PACK
    sample, ok = sample_of(b, queries, layout, token_lengths_ptr, token_starts_ptr, cache_starts_ptr, query_start_ptr)

    query, stays = tile_rows(tile, queries, ROWS, PACK)
    head = first_head + tl.arange(0, ROWS) % PACK
    lo, hi, gap_lo, gap_hi, own = rows_of(query, stays, layout, sample, GAPS, OWN)
    if SPLIT:
        first_key = tl.program_id(1) * chunk
        lo, hi = tl.maximum(lo, first_key), tl.minimum(hi, first_key + chunk)
        lo, hi = tl.where(lo < hi, lo, 0), tl.where(lo < hi, hi, 0)
        own = tl.where((own >= first_key) & (own < first_key + chunk), own, -1)
    limit, walk = key_walk(lo, hi, gap_lo, gap_hi, KEYS, GAPS)
    fence = fence_of(layout, sample, limit)

    if SPECIALIZE:
        # The compiler halves the rows between two groups of warps, which only a descriptor made here can follow.
        UNIT: tl.constexpr = 128 // query_ptr.dtype.element_ty.primitive_bitwidth
        first = head_of(query_ptr, b, first_head, q_b, q_h)
        rows = tl.make_tensor_descriptor(first, [queries, D], [q_n.to(tl.int64) * UNIT, 1], [ROWS, BLOCK_D])
        q = rows.load([tile * ROWS, 0])
    else:
        pointers = row_pointers(head_of(query_ptr, b, first_head, q_b, q_h), tile, q_n, q_h, ROWS, PACK)
        q = load_rows(pointers, stays, BLOCK_D, D, True)  # (ROWS, BLOCK_D)
    if SIGN != 1:
        q = (q.to(tl.float32) * SIGN).to(q.dtype)
    if DESCRIBED:
        keys, values = (key_ptr, b, g), (value_ptr, b, g)
    else:
        keys = keys_of(key_ptr, cache_key_ptr, b, g, k_b, k_h, k_n, ck_b, ck_h, ck_n, cache)
        values = keys_of(value_ptr, cache_value_ptr, b, g, v_b, v_h, v_n, cv_b, cv_h, cv_n, cache)
    seed = load_or(seed_ptr, 0, 0)
    draw = (seed, threshold, query + sample[3], head, b)
    acc, total, highest = _attend(
        q, keys, values, (lo, hi, gap_lo, gap_hi, own), walk, fence, draw, factor, coarse, ROWS, KEYS, BLOCK_D, D, GAPS,
        OWN, APART, DESCRIBED, DROPOUT, PRECISION, SPECIALIZE,
    )  # fmt: skip

    blind = (lo >= hi) & (own < 0)
    acc, total = tl.where(blind[:, None], 0.0, acc), tl.where(blind, 0.0, total)
    total = tl.where(ok, total, float("nan"))  # a sample out of range shows
    highest = tl.where(blind, float("-inf"), highest)
    first_row = (b.to(tl.int64) * kv_heads * BLOCKS * PACK + first_head) * queries  # of lse
    row = first_row + (tl.arange(0, ROWS) % PACK) * queries + query
    if SPLIT:
        chunks = tl.num_programs(1)
        part = row * chunks + tl.program_id(1)
        parts = heads.to(tl.int64) * PACK * queries * chunks
        store_rows(part_ptr + part * D, acc, stays, BLOCK_D, D)
        tl.store(part_ptr + parts * D + part, highest, mask=stays)
        tl.store(part_ptr + parts * (D + 1) + part, total, mask=stays)
    else:
        acc = acc * (keep_scale / tl.where(total == 0.0, 1.0, total))[:, None]
        lse = _lse(highest, total, factor, coarse, scale, out_ptr.dtype.element_ty == tl.float32)
        pointers = row_pointers(head_of(out_ptr, b, first_head, o_b, o_h), tile, o_n, o_h, ROWS, PACK)
        store_rows(pointers, acc, stays, BLOCK_D, D)
        tl.store(lse_ptr + row, lse, mask=stays)


@triton.jit(do_not_specialize=("queries", "q_heads", "chunks", "o_b", "o_h", "o_n"))
def combine_kernel(
    part_ptr, out_ptr, lse_ptr, o_b, o_h, o_n, q_heads, queries, chunks, factor, scale, keep_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """One row of out and lse from the parts that ``forward_kernel`` stored for it, CHUNKS at a time."""
    row, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    high_ptr = part_ptr + rows * chunks * D
    acc, total, highest = tl.zeros([BLOCK_D], tl.float32), 0.0, float("-inf")
    for start in range(0, chunks, CHUNKS):
        chunk = start + tl.arange(0, CHUNKS)
        stays, part = chunk < chunks, row * chunks + chunk
        sums = load_rows(part_ptr + part * D, stays, BLOCK_D, D, True)  # (CHUNKS, BLOCK_D)
        highs = tl.load(high_ptr + part, mask=stays, other=float("-inf"))
        totals = tl.load(high_ptr + rows * chunks + part, mask=stays, other=0.0)
        higher = tl.maximum(highest, tl.max(highs, 0))
        finite = tl.where(higher == float("-inf"), 0.0, higher)  # nothing is seen yet
        weights, fade = tl.math.exp2((highs - finite) * factor), tl.math.exp2((highest - finite) * factor)
        acc = acc * fade + tl.sum(weights[:, None] * sums, 0)
        total = total * fade + tl.sum(weights * totals, 0)
        highest = higher
    total = tl.where(total == 0.0, 1.0, total)  # a row that sees nothing: highest is -inf
    query, head, b = row % queries, row // queries % q_heads, row // queries // q_heads
    UNIT: tl.constexpr = 128 // out_ptr.dtype.element_ty.primitive_bitwidth
    pointers = head_of(out_ptr, b, head, o_b, o_h) + query * o_n * UNIT + o_d
    tl.store(pointers, (acc * (keep_scale / total)).to(out_ptr.dtype.element_ty), mask=o_d < D)
    tl.store(lse_ptr + row, highest * scale + tl.log(total))
