"""Backward with distance-dependent scores, without atomics: the gradients of keys and values by tiles of keys, of
queries by tiles of rows, and (``relative_entries``) of the tables by tiles of their entries. Each recomputes
probabilities from lse.

A score costs 3 products of head_dim more than ``backward``'s in each of the first two, since a window has twice as many
entries as a tile has keys: 6 and 7 for 4 and 3. The third takes 6. Queries with the vectors added, which are read once
for each tile of keys, are made beforehand.
"""

import triton
import triton.language as tl

from rmt_kernels.backends.triton.backward import _own_rows
from rmt_kernels.backends.triton.forward import LAYOUT, SAMPLES, place, visible
from rmt_kernels.backends.triton.relative_tiles import (
    along_window,
    biases,
    load_entries,
    placed,
    products,
    rows_at,
    rows_read,
    spans_read,
    turned_products,
)
from rmt_kernels.backends.triton.tiles import (
    alive,
    fence_of,
    head_of,
    kept,
    keys_of,
    load_keys,
    load_or,
    load_rows,
    pointers_at,
    rows_of,
    sample_of,
    sees,
    store_rows,
)
from rmt_kernels.backends.triton.walk import edge_count, edge_tile, key_walk, own_run, row_walk

SIZES = (*LAYOUT, "heads", "group", "queries", "rows", "hole", "tiles", "units", "together", "offsets", "reach",
         "origin", "bias_h", "threshold", "tiles_behind")  # fmt: skip
STRIDES = (
    *(f"{tensor}_{step}"
      for tensor in ("c", "k", "v", "ck", "cv", "p", "do", "dq", "df", "dk", "dv", "dck", "dcv") for step in "bhn"),
    "rk_h", "rk_n",
)  # fmt: skip


@triton.jit
def masked_walk(walk):
    """The walk's tiles, all with a mask."""
    return (
        walk[0], walk[1], walk[0], walk[0], walk[4], walk[5], walk[5], walk[5], walk[8], walk[9], walk[9], walk[9]
    )  # fmt: skip


@triton.jit
def _key_step(
    dk, dv, slopes, k, v, key, own, tile, start, source, table, origin, side, queries, head, b, seed, threshold, factor,
    keep_scale,
    ROWS: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, D: tl.constexpr,
    GAPS: tl.constexpr, DROPOUT: tl.constexpr, HAS_KEY: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_CONTENT: tl.constexpr, HAS_POSITION: tl.constexpr, SHIFTED: tl.constexpr, PRECISION: tl.constexpr,
    MASK: tl.constexpr,
):  # fmt: skip
    """A tile of rows adds to the gradients of a tile of keys, and to the sums of the slopes of its scores. Scores are
    (KEYS, ROWS), as in ``backward``."""
    content_ptr, c_n, position_ptr, p_n, grad_ptr, do_n, pivot_ptr, row_count, span_ptr, span_size = source
    row, query, stays = rows_read(side, tile, GAPS, ROWS)
    first_row = tile * ROWS + side[1][3]
    first = start - first_row - (ROWS - 1) + origin
    content = load_rows(rows_at(content_ptr, query, c_n), stays, BLOCK_D, D, True)
    if HAS_KEY:
        position = content
        if HAS_CONTENT or HAS_POSITION:
            position = load_rows(rows_at(position_ptr, query, p_n), stays, BLOCK_D, D, True)
        following = position
        if SHIFTED:
            following = load_rows(rows_at(position_ptr, query + 1, p_n), query + 1 < queries, BLOCK_D, D, True)
        entries = load_entries(table, first, WIDTH, BLOCK_D, D)
        s = turned_products(position, following, entries, first, table[4], ROWS, KEYS, WIDTH, SHIFTED, PRECISION)
        s = tl.dot(k, tl.trans(content), s, input_precision=PRECISION)  # (KEYS, ROWS)
    else:
        s = tl.dot(k, tl.trans(content), input_precision=PRECISION)  # (KEYS, ROWS)
    s = s * factor
    if HAS_BIAS:
        s += biases(table, first, ROWS, KEYS, WIDTH, True)
    pivot = tl.load(pivot_ptr + query, mask=stays, other=float("inf"))
    p = tl.math.exp2(s - pivot[None, :])
    if MASK == "own":
        p = tl.where(own[:, None] == row[None, :], p, 0.0)
    else:
        lo, hi, gap_lo, gap_hi = spans_read(span_ptr, span_size, query, stays, GAPS)
        p = tl.where(sees(lo[None, :], hi[None, :], gap_lo[None, :], gap_hi[None, :], key[:, None], GAPS), p, 0.0)
    grad = load_rows(rows_at(grad_ptr, query, do_n), stays, BLOCK_D, D, True)
    delta = tl.load(pivot_ptr + row_count + query, mask=stays, other=0.0)
    dp = tl.dot(v, tl.trans(grad), input_precision=PRECISION)  # (KEYS, ROWS)
    if DROPOUT:
        keep = tl.trans(kept((seed, threshold, query + side[1][3], head + tl.zeros_like(query), b), start, KEYS))
        dv = tl.dot(tl.where(keep, p, 0.0).to(grad.dtype), grad, dv, input_precision=PRECISION)
        dp = tl.where(keep, dp * keep_scale, 0.0)
    else:
        dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision=PRECISION)
    ds = p * (dp - delta[None, :])
    dk = tl.dot(ds.to(content.dtype), content, dk, input_precision=PRECISION)
    if HAS_CONTENT:
        slopes += tl.sum(ds, 1)
    return dk, dv, slopes


@triton.jit(do_not_specialize=(*SIZES, *STRIDES), do_not_specialize_on_alignment=(*SAMPLES, "bias_ptr"))
def relative_key_kernel(
    content_ptr, key_ptr, value_ptr, cache_key_ptr, cache_value_ptr, entries_ptr, position_ptr, grad_out_ptr,
    grad_query_ptr, grad_following_ptr, grad_key_ptr, grad_value_ptr, grad_cache_key_ptr, grad_cache_value_ptr,
    bias_ptr, rows_ptr, spans_ptr, entry_parts_ptr, bias_parts_ptr, content_parts_ptr, position_parts_ptr,
    token_lengths_ptr, token_starts_ptr, cache_starts_ptr, query_start_ptr, seed_ptr,
    c_b, c_h, c_n, k_b, k_h, k_n, v_b, v_h, v_n, ck_b, ck_h, ck_n, cv_b, cv_h, cv_n, p_b, p_h, p_n, do_b, do_h, do_n,
    dq_b, dq_h, dq_n, df_b, df_h, df_n, dk_b, dk_h, dk_n, dv_b, dv_h, dv_n, dck_b, dck_h, dck_n, dcv_b, dcv_h, dcv_n,
    rk_h, rk_n,
    heads, group, queries, rows, hole, tiles, units, together, offsets, reach, origin, bias_h, threshold, tiles_behind,
    factor, scale, keep_scale,
    cache, read, tokens, write, token_rows, window, skip, rows0, lo0, hi0, step0, own0, rows1, lo1, hi1, step1, own1,
    rows2, lo2, hi2, step2, own2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr,
    GAPS: tl.constexpr, OWN: tl.constexpr, APART: tl.constexpr, DROPOUT: tl.constexpr, HAS_KEY: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_CONTENT: tl.constexpr, HAS_POSITION: tl.constexpr, SHIFTED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of keys and values, from every row of the group's heads. Where HAS_CONTENT also its share of
    ``content_bias``'s gradient, float32 (batch, heads, tiles, D): the slopes' sums times the keys."""
    layout = (
        cache, read, tokens, write, token_rows, window, skip, rows0, lo0, hi0, step0, own0, rows1, lo1, hi1, step1,
        own1, rows2, lo2, hi2, step2, own2,
    )  # fmt: skip
    tile, unit = place(tl.program_id(0), tiles, units, together, False)
    kv_heads = heads // group
    b, g = unit // kv_heads, unit % kv_heads
    sample, ok = sample_of(b, queries, layout, token_lengths_ptr, token_starts_ptr, cache_starts_ptr, query_start_ptr)
    num_keys = cache + read + tokens + write
    limit = num_keys
    if query_start_ptr is not None:  # keys of the future may hold anything
        last = sample[3] - rows0 + queries - 1
        limit = tl.minimum(limit, tl.maximum(hi1 + step1 * last, tl.where(own1 >= 0, own1 + last + 1, 0)))
    start = tile * KEYS
    key = start + tl.arange(0, KEYS)
    exists = key < num_keys
    held = alive(key, fence_of(layout, sample, limit), GAPS)
    keys = keys_of(key_ptr, cache_key_ptr, b, g, k_b, k_h, k_n, ck_b, ck_h, ck_n, cache)
    values = keys_of(value_ptr, cache_value_ptr, b, g, v_b, v_h, v_n, cv_b, cv_h, cv_n, cache)
    k = load_rows(pointers_at(keys, key, APART), held, BLOCK_D, D, True)  # (KEYS, BLOCK_D)
    v = load_rows(pointers_at(values, key, APART), held, BLOCK_D, D, True)  # (KEYS, BLOCK_D)
    dk = tl.zeros([KEYS, BLOCK_D], tl.float32)
    dv = tl.zeros([KEYS, BLOCK_D], tl.float32)
    walk = masked_walk(row_walk(start, tl.minimum(start + KEYS, num_keys), rows, layout, sample, ROWS, GAPS))
    own = key
    if OWN:
        own = _own_rows(key, rows, layout, sample)
    bad = tl.where(ok, 0.0, float("nan"))  # a sample out of range shows
    seed = load_or(seed_ptr, 0, 0)
    row_count = units.to(tl.int64) * group * queries
    span_size = units.to(tl.int64) // kv_heads * queries
    side = (layout, sample, rows, hole)
    for member in range(group):
        head = g * group + member
        b_head = b.to(tl.int64) * heads + head
        source = (
            head_of(content_ptr, b, head, c_b, c_h), c_n, head_of(position_ptr, b, head, p_b, p_h), p_n,
            head_of(grad_out_ptr, b, head, do_b, do_h), do_n, rows_ptr + b_head * queries, row_count,
            spans_ptr + b.to(tl.int64) * queries, span_size,
        )  # fmt: skip
        table = (
            head_of(entries_ptr, b, head, 0, rk_h), rk_n, bias_ptr + head.to(tl.int64) * bias_h, offsets, reach,
        )  # fmt: skip
        slopes = tl.zeros([KEYS], tl.float32)
        for i in range(0, edge_count(walk)):
            dk, dv, slopes = _key_step(
                dk, dv, slopes, k, v, key, own, edge_tile(i, walk), start, source, table, origin, side, queries, head,
                b, seed, threshold, factor, keep_scale, ROWS, KEYS, WIDTH, BLOCK_D, D, GAPS, DROPOUT, HAS_KEY, HAS_BIAS,
                HAS_CONTENT, HAS_POSITION, SHIFTED, PRECISION, "interval",
            )  # fmt: skip
        if OWN:
            _, own_start, own_end = own_run(own, ROWS)
            for own_tile in range(own_start, own_end):
                dk, dv, slopes = _key_step(
                    dk, dv, slopes, k, v, key, own, own_tile, start, source, table, origin, side, queries, head, b,
                    seed, threshold, factor, keep_scale, ROWS, KEYS, WIDTH, BLOCK_D, D, GAPS, DROPOUT, HAS_KEY,
                    HAS_BIAS, HAS_CONTENT, HAS_POSITION, SHIFTED, PRECISION, "own",
                )  # fmt: skip
        if HAS_CONTENT:
            o_d = tl.arange(0, BLOCK_D)
            # Loaded anew: kept ones would take registers from the loops.
            again = load_rows(pointers_at(keys, key, APART), held, BLOCK_D, D, True)
            share = tl.sum(slopes[:, None] * again.to(tl.float32), 0) * scale + bad
            tl.store(content_parts_ptr + (b_head * tiles + tile) * D + o_d, share, mask=o_d < D)
    grad_keys = keys_of(grad_key_ptr, grad_cache_key_ptr, b, g, dk_b, dk_h, dk_n, dck_b, dck_h, dck_n, cache)
    grad_values = keys_of(grad_value_ptr, grad_cache_value_ptr, b, g, dv_b, dv_h, dv_n, dcv_b, dcv_h, dcv_n, cache)
    store_rows(pointers_at(grad_keys, key, APART), dk * scale + bad, exists, BLOCK_D, D)
    store_rows(pointers_at(grad_values, key, APART), dv * keep_scale + bad, exists, BLOCK_D, D)


@triton.jit
def _query_step(
    dq, df, q, grad, pivot, delta, table, origin, first_row, keys, values, tile, fence, rows, draw, factor, keep_scale,
    ROWS: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, D: tl.constexpr,
    GAPS: tl.constexpr, APART: tl.constexpr, DROPOUT: tl.constexpr, HAS_KEY: tl.constexpr, HAS_BIAS: tl.constexpr,
    SHIFTED: tl.constexpr, PRECISION: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """A tile of keys adds to the gradients of a tile of queries, and where SHIFTED to ``df``, those of the queries that
    follow them."""
    content, position, following = q
    start = tile * KEYS
    key = start + tl.arange(0, KEYS)
    first = start - first_row - (ROWS - 1) + origin
    k = load_keys(keys, start, fence, KEYS, BLOCK_D, D, APART, GAPS, False, True)  # (KEYS, BLOCK_D)
    v = load_keys(values, start, fence, KEYS, BLOCK_D, D, APART, GAPS, False, True)  # (KEYS, BLOCK_D)
    if HAS_KEY:
        entries = load_entries(table, first, WIDTH, BLOCK_D, D)
        s = products(position, following, entries, first, table[4], ROWS, KEYS, WIDTH, SHIFTED, PRECISION)
        s = tl.dot(content, tl.trans(k), s, input_precision=PRECISION)  # (ROWS, KEYS)
    else:
        s = tl.dot(content, tl.trans(k), input_precision=PRECISION)  # (ROWS, KEYS)
    s = s * factor
    if HAS_BIAS:
        s += biases(table, first, ROWS, KEYS, WIDTH, False)
    p = tl.where(visible(rows, key, MASK, GAPS), tl.math.exp2(s - pivot[:, None]), 0.0)
    dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)  # (ROWS, KEYS)
    if DROPOUT:
        dp = tl.where(kept(draw, start, KEYS), dp * keep_scale, 0.0)
    ds = p * (dp - delta[:, None])
    dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    if HAS_KEY:
        de = along_window(ds, ROWS, KEYS, WIDTH)
        if SHIFTED:
            ahead = (first + tl.arange(0, WIDTH) > table[4])[None, :]
            df = tl.dot(tl.where(ahead, de, 0.0).to(k.dtype), entries, df, input_precision=PRECISION)
            de = tl.where(ahead, 0.0, de)
        dq = tl.dot(de.to(k.dtype), entries, dq, input_precision=PRECISION)
    return dq, df


@triton.jit(do_not_specialize=(*SIZES, *STRIDES), do_not_specialize_on_alignment=(*SAMPLES, "bias_ptr"))
def relative_query_kernel(
    content_ptr, key_ptr, value_ptr, cache_key_ptr, cache_value_ptr, entries_ptr, position_ptr, grad_out_ptr,
    grad_query_ptr, grad_following_ptr, grad_key_ptr, grad_value_ptr, grad_cache_key_ptr, grad_cache_value_ptr,
    bias_ptr, rows_ptr, spans_ptr, entry_parts_ptr, bias_parts_ptr, content_parts_ptr, position_parts_ptr,
    token_lengths_ptr, token_starts_ptr, cache_starts_ptr, query_start_ptr, seed_ptr,
    c_b, c_h, c_n, k_b, k_h, k_n, v_b, v_h, v_n, ck_b, ck_h, ck_n, cv_b, cv_h, cv_n, p_b, p_h, p_n, do_b, do_h, do_n,
    dq_b, dq_h, dq_n, df_b, df_h, df_n, dk_b, dk_h, dk_n, dv_b, dv_h, dv_n, dck_b, dck_h, dck_n, dcv_b, dcv_h, dcv_n,
    rk_h, rk_n,
    heads, group, queries, rows, hole, tiles, units, together, offsets, reach, origin, bias_h, threshold, tiles_behind,
    factor, scale, keep_scale,
    cache, read, tokens, write, token_rows, window, skip, rows0, lo0, hi0, step0, own0, rows1, lo1, hi1, step1, own1,
    rows2, lo2, hi2, step2, own2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr,
    GAPS: tl.constexpr, OWN: tl.constexpr, APART: tl.constexpr, DROPOUT: tl.constexpr, HAS_KEY: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_CONTENT: tl.constexpr, HAS_POSITION: tl.constexpr, SHIFTED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile of a head's query rows, from every key they see; where SHIFTED those of the queries that
    follow them are kept apart, for the next row to add."""
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
    walk = masked_walk(walk)
    fence = fence_of(layout, sample, limit)
    seeing = (lo < hi) | (own >= 0)

    content = load_rows(rows_at(head_of(content_ptr, b, head, c_b, c_h), query, c_n), seeing, BLOCK_D, D, True)
    base = head_of(position_ptr, b, head, p_b, p_h)
    position = content  # (ROWS, BLOCK_D)
    if HAS_CONTENT or HAS_POSITION:
        position = load_rows(rows_at(base, query, p_n), seeing, BLOCK_D, D, True)
    following = position
    if SHIFTED:
        following = load_rows(rows_at(base, query + 1, p_n), query + 1 < queries, BLOCK_D, D, True)
    parts = (content, position, following)
    grad = load_rows(rows_at(head_of(grad_out_ptr, b, head, do_b, do_h), query, do_n), seeing, BLOCK_D, D, True)
    pivot_ptr = rows_ptr + (b.to(tl.int64) * heads + head) * queries + query
    pivot = tl.load(pivot_ptr, mask=seeing, other=float("inf"))
    delta = tl.load(pivot_ptr + units.to(tl.int64) * queries, mask=seeing, other=0.0)
    table = (head_of(entries_ptr, b, head, 0, rk_h), rk_n, bias_ptr + head.to(tl.int64) * bias_h, offsets, reach)
    first_row = tile * ROWS + sample[3]
    keys = keys_of(key_ptr, cache_key_ptr, b, g, k_b, k_h, k_n, ck_b, ck_h, ck_n, cache)
    values = keys_of(value_ptr, cache_value_ptr, b, g, v_b, v_h, v_n, cv_b, cv_h, cv_n, cache)
    draw = (load_or(seed_ptr, 0, 0), threshold, query + sample[3], head + tl.zeros_like(query), b)
    shown = (lo, hi, gap_lo, gap_hi, own)

    dq = tl.zeros([ROWS, BLOCK_D], tl.float32)
    df = dq
    for i in range(0, edge_count(walk)):
        dq, df = _query_step(
            dq, df, parts, grad, pivot, delta, table, origin, first_row, keys, values, edge_tile(i, walk), fence, shown,
            draw, factor, keep_scale, ROWS, KEYS, WIDTH, BLOCK_D, D, GAPS, APART, DROPOUT, HAS_KEY, HAS_BIAS, SHIFTED,
            PRECISION, "interval",
        )  # fmt: skip
    if OWN:
        last, own_start, own_end = own_run(own, KEYS)
        fence = fence_of(layout, sample, last)
        for own_tile in range(own_start, own_end):
            dq, df = _query_step(
                dq, df, parts, grad, pivot, delta, table, origin, first_row, keys, values, own_tile, fence, shown, draw,
                factor, keep_scale, ROWS, KEYS, WIDTH, BLOCK_D, D, GAPS, APART, DROPOUT, HAS_KEY, HAS_BIAS, SHIFTED,
                PRECISION, "own",
            )  # fmt: skip
    bad = tl.where(ok, 0.0, float("nan"))
    dq = tl.where(seeing[:, None], dq * scale, 0.0) + bad
    store_rows(rows_at(head_of(grad_query_ptr, b, head, dq_b, dq_h), query, dq_n), dq, stays, BLOCK_D, D)
    if SHIFTED:
        df = tl.where(seeing[:, None], df * scale, 0.0) + bad
        store_rows(rows_at(head_of(grad_following_ptr, b, head, df_b, df_h), query, df_n), df, stays, BLOCK_D, D)
