"""Forward with distance-dependent scores: one program owns a tile of query rows of one head and walks the keys its
rows see, as in ``forward``. Scores are exponents of 2, ``(content . k + position . key[d]) * factor + bias[d] log2 e``.

With a window of twice as many entries as keys that is 4 products of head_dim for a score, where ``forward`` has 2.
"""

import triton
import triton.language as tl

from rmt_kernels.backends.triton.forward import LAYOUT, SAMPLES, place, visible
from rmt_kernels.backends.triton.relative_tiles import (
    biased,
    draw_of,
    head_rows,
    placed,
    rows_at,
    scores,
    table_of,
    window_start,
)
from rmt_kernels.backends.triton.tiles import (
    fence_of,
    head_of,
    kept,
    keys_of,
    load_keys,
    load_or,
    rows_of,
    sample_of,
    store_rows,
)
from rmt_kernels.backends.triton.walk import edge_count, edge_tile, key_walk, open_count, open_tile, own_run

SIZES = (*LAYOUT, "heads", "group", "queries", "rows", "hole", "tiles", "units", "together", "offsets", "reach",
         "origin", "bias_h", "threshold")  # fmt: skip
STRIDES = (*(f"{tensor}_{step}" for tensor in ("q", "k", "v", "ck", "cv", "o") for step in "bhn"),
           "rk_h", "rk_n", "cb_h", "pb_h")  # fmt: skip
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _step(
    acc, total, highest, q, table, first_row, keys, values, tile, fence, rows, draw, factor,
    ROWS: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, D: tl.constexpr,
    GAPS: tl.constexpr, APART: tl.constexpr, DROPOUT: tl.constexpr, HAS_KEY: tl.constexpr, HAS_BIAS: tl.constexpr,
    SHIFTED: tl.constexpr, PRECISION: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """One tile of keys, as in ``forward``; ``q`` is (content, position, following)."""
    MASKED: tl.constexpr = MASK != "none"
    start = tile * KEYS
    key = start + tl.arange(0, KEYS)
    first = window_start(table, start, first_row, ROWS)
    k = load_keys(keys, start, fence, KEYS, BLOCK_D, D, APART, GAPS, False, MASKED)  # (KEYS, BLOCK_D)
    s, _ = scores(
        q, k, table, first, factor, ROWS, KEYS, WIDTH, BLOCK_D, D, HAS_KEY, HAS_BIAS, SHIFTED, PRECISION, False
    )  # (ROWS, KEYS)
    if MASKED:
        s = tl.where(visible(rows, key, MASK, GAPS), s, float("-inf"))
    higher = tl.maximum(highest, tl.max(s, 1))
    finite = tl.where(higher == float("-inf"), 0.0, higher)  # a row that has seen nothing yet
    p, fade = tl.math.exp2(s - finite[:, None]), tl.math.exp2(highest - finite)
    total = total * fade + tl.sum(p, 1)
    if DROPOUT:
        p = tl.where(kept(draw, start, KEYS), p, 0.0)
    v = load_keys(values, start, fence, KEYS, BLOCK_D, D, APART, GAPS, False, MASKED)  # (KEYS, BLOCK_D)
    acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION)
    return acc, total, higher


@triton.jit(
    do_not_specialize=(*SIZES, *STRIDES),
    do_not_specialize_on_alignment=(*SAMPLES, "bias_ptr"),
)
def relative_forward_kernel(
    query_ptr, key_ptr, value_ptr, cache_key_ptr, cache_value_ptr, entries_ptr, content_ptr, position_ptr, out_ptr,
    lse_ptr, bias_ptr, token_lengths_ptr, token_starts_ptr, cache_starts_ptr, query_start_ptr, seed_ptr,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, ck_b, ck_h, ck_n, cv_b, cv_h, cv_n, o_b, o_h, o_n,
    rk_h, rk_n, cb_h, pb_h,
    heads, group, queries, rows, hole, tiles, units, together, offsets, reach, origin, bias_h, threshold, factor,
    keep_scale,
    cache, read, tokens, write, token_rows, window, skip, rows0, lo0, hi0, step0, own0, rows1, lo1, hi1, step1, own1,
    rows2, lo2, hi2, step2, own2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr,
    GAPS: tl.constexpr, OWN: tl.constexpr, APART: tl.constexpr, DROPOUT: tl.constexpr, HAS_KEY: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_CONTENT: tl.constexpr, HAS_POSITION: tl.constexpr, SHIFTED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out (batch, heads, queries, D) and lse (batch, heads, queries). ``units`` counts (sample, head) pairs; ``rows``
    are ``queries`` and the ``hole`` between them; the entry of key j and row i is ``j - (i + first) + origin``."""
    layout = (
        cache, read, tokens, write, token_rows, window, skip, rows0, lo0, hi0, step0, own0, rows1, lo1, hi1, step1,
        own1, rows2, lo2, hi2, step2, own2,
    )  # fmt: skip
    tile, unit = place(tl.program_id(0), tiles, units, together, True)
    b, head = unit // heads, unit % heads
    g = head // group
    sample, ok = sample_of(b, queries, layout, token_lengths_ptr, token_starts_ptr, cache_starts_ptr, query_start_ptr)
    row, query, stays = placed(tile, rows, layout, sample, hole, ROWS)
    lo, hi, gap_lo, gap_hi, own = rows_of(row, stays, layout, sample, GAPS, OWN)
    limit, walk = key_walk(lo, hi, gap_lo, gap_hi, KEYS, GAPS)
    fence = fence_of(layout, sample, limit)

    base = (head_of(query_ptr, b, head, q_b, q_h), q_n)
    q = head_rows(base, query, stays, BLOCK_D, D)  # (ROWS, BLOCK_D)
    content = biased(q, content_ptr, head, cb_h, BLOCK_D, D, HAS_CONTENT)
    position = biased(q, position_ptr, head, pb_h, BLOCK_D, D, HAS_POSITION)
    following = position
    if SHIFTED:  # which has no hole; rows that see nothing count as zeros
        next_lo, next_hi, _, _, next_own = rows_of(query + 1, query + 1 < queries, layout, sample, GAPS, OWN)
        seeing = (next_lo < next_hi) | (next_own >= 0)
        q = head_rows(base, query + 1, seeing, BLOCK_D, D)
        following = biased(q, position_ptr, head, pb_h, BLOCK_D, D, HAS_POSITION)
        following = tl.where(seeing[:, None], following, 0.0).to(q.dtype)
    parts = (content, position, following)
    table = table_of((entries_ptr, rk_h, rk_n, bias_ptr, bias_h, offsets, reach, origin), head)
    first_row = tile * ROWS + sample[3]
    keys = keys_of(key_ptr, cache_key_ptr, b, g, k_b, k_h, k_n, ck_b, ck_h, ck_n, cache)
    values = keys_of(value_ptr, cache_value_ptr, b, g, v_b, v_h, v_n, cv_b, cv_h, cv_n, cache)
    draw = draw_of((load_or(seed_ptr, 0, 0), threshold, head, b), query, sample)
    sees = (lo, hi, gap_lo, gap_hi, own)

    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    for i in range(0, open_count(walk)):
        acc, total, highest = _step(
            acc, total, highest, parts, table, first_row, keys, values, open_tile(i, walk), fence, sees, draw,
            factor, ROWS, KEYS, WIDTH, BLOCK_D, D, GAPS, APART, DROPOUT, HAS_KEY, HAS_BIAS, SHIFTED, PRECISION, "none",
        )  # fmt: skip
    for i in range(0, edge_count(walk)):
        acc, total, highest = _step(
            acc, total, highest, parts, table, first_row, keys, values, edge_tile(i, walk), fence, sees, draw,
            factor, ROWS, KEYS, WIDTH, BLOCK_D, D, GAPS, APART, DROPOUT, HAS_KEY, HAS_BIAS, SHIFTED, PRECISION,
            "interval",
        )  # fmt: skip
    if OWN:
        last, own_start, own_end = own_run(own, KEYS)
        fence = fence_of(layout, sample, last)
        for own_tile in range(own_start, own_end):
            acc, total, highest = _step(
                acc, total, highest, parts, table, first_row, keys, values, own_tile, fence, sees, draw, factor,
                ROWS, KEYS, WIDTH, BLOCK_D, D, GAPS, APART, DROPOUT, HAS_KEY, HAS_BIAS, SHIFTED, PRECISION, "own",
            )  # fmt: skip

    blind = (lo >= hi) & (own < 0)
    acc, total = tl.where(blind[:, None], 0.0, acc), tl.where(blind, 0.0, total)
    total = tl.where(ok, total, float("nan"))  # a sample out of range shows
    highest = tl.where(blind, float("-inf"), highest)
    total = tl.where(total == 0.0, 1.0, total)
    acc = acc * (keep_scale / total)[:, None]
    store_rows(rows_at(head_of(out_ptr, b, head, o_b, o_h), query, o_n), acc, stays, BLOCK_D, D)
    lse = highest * LN2 + tl.log(total)
    tl.store(lse_ptr + (b.to(tl.int64) * heads + head) * queries + query, lse, mask=stays)
