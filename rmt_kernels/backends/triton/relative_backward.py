"""Backward with distance-dependent scores, without atomics: the gradients of keys and values by tiles of keys, of
queries by tiles of rows, and (``relative_entries``) of the tables by tiles of their entries. Each recomputes
probabilities from lse.

A score costs 3 products of head_dim more than ``backward``'s in each of the first two, since a window has twice as many
entries as a tile has keys: 6 and 7 for 4 and 3. The third takes 6. Queries with the vectors added, which are read once
for each tile of keys, are made beforehand.
"""

import triton
import triton.language as tl

from rmt_kernels.backends.triton.backward import own_rows
from rmt_kernels.backends.triton.forward import LAYOUT, SAMPLES, place, visible
from rmt_kernels.backends.triton.relative_entries import entry_gradients
from rmt_kernels.backends.triton.relative_tiles import (
    along_window,
    draw_of,
    head_rows,
    placed,
    query_rows,
    rows_at,
    scores,
    seeing_rows,
    source_of,
    spans_read,
    table_of,
    walked_rows,
    window_start,
)
from rmt_kernels.backends.triton.tiles import (
    alive,
    fence_of,
    head_of,
    kept,
    key_limit,
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
    dk, dv, slopes, k, v, key, own, tile, start, source, table, side, chance, factor, keep_scale,
    ROWS: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, D: tl.constexpr,
    GAPS: tl.constexpr, DROPOUT: tl.constexpr, HAS_KEY: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_CONTENT: tl.constexpr, HAS_POSITION: tl.constexpr, SHIFTED: tl.constexpr, PRECISION: tl.constexpr,
    MASK: tl.constexpr,
):  # fmt: skip
    """A tile of rows adds to the gradients of a tile of keys, and to the sums of the slopes of its scores. Scores are
    (KEYS, ROWS), as in ``backward``."""
    _, _, grads, pivot_ptr, delta_ptr, _, _ = source
    sample = side[1]
    row, query, stays = walked_rows(side, tile, GAPS, ROWS)
    first = window_start(table, start, tile * ROWS + sample[3], ROWS)
    q = query_rows(source, query, stays, BLOCK_D, D, HAS_KEY and (HAS_CONTENT or HAS_POSITION), SHIFTED)
    content = q[0]  # (ROWS, BLOCK_D)
    s, _ = scores(
        q, k, table, first, factor, ROWS, KEYS, WIDTH, BLOCK_D, D, HAS_KEY, HAS_BIAS, SHIFTED, PRECISION, True
    )  # (KEYS, ROWS)
    pivot = tl.load(pivot_ptr + query, mask=stays, other=float("inf"))
    p = tl.math.exp2(s - pivot[None, :])
    if MASK == "own":
        p = tl.where(own[:, None] == row[None, :], p, 0.0)
    else:
        lo, hi, gap_lo, gap_hi = spans_read(source, query, stays, GAPS)
        p = tl.where(sees(lo[None, :], hi[None, :], gap_lo[None, :], gap_hi[None, :], key[:, None], GAPS), p, 0.0)
    grad = head_rows(grads, query, stays, BLOCK_D, D)  # (ROWS, BLOCK_D)
    delta = tl.load(delta_ptr + query, mask=stays, other=0.0)
    dp = tl.dot(v, tl.trans(grad), input_precision=PRECISION)  # (KEYS, ROWS)
    if DROPOUT:
        keep = tl.trans(kept(draw_of(chance, query, sample), start, KEYS))
        dv = tl.dot(tl.where(keep, p, 0.0).to(grad.dtype), grad, dv, input_precision=PRECISION)
        dp = tl.where(keep, dp * keep_scale, 0.0)
    else:
        dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision=PRECISION)
    ds = p * (dp - delta[None, :])
    dk = tl.dot(ds.to(content.dtype), content, dk, input_precision=PRECISION)
    if HAS_CONTENT:
        slopes += tl.sum(ds, 1)
    return dk, dv, slopes


@triton.jit
def _key_gradients(
    tile, tiles, b, g, heads, group, keys, values, content_parts_ptr, given, tables, side, limit, bad, seed, threshold,
    factor, scale, keep_scale,
    ROWS: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, D: tl.constexpr,
    GAPS: tl.constexpr, OWN: tl.constexpr, APART: tl.constexpr, DROPOUT: tl.constexpr, HAS_KEY: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_CONTENT: tl.constexpr, HAS_POSITION: tl.constexpr, SHIFTED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``(dk, dv)`` of a tile of keys, from every row of the group's heads; from ``limit`` on none sees them. Where
    HAS_CONTENT it stores the tile's share of ``content_bias``'s gradient, float32 (batch, heads, tiles, D): the
    slopes' sums times the keys."""
    layout, sample, rows, _ = side
    num_keys = layout[0] + layout[1] + layout[2] + layout[3]
    start = tile * KEYS
    key = start + tl.arange(0, KEYS)
    held = alive(key, fence_of(layout, sample, limit), GAPS)
    k = load_rows(pointers_at(keys, key, APART), held, BLOCK_D, D, True)  # (KEYS, BLOCK_D)
    v = load_rows(pointers_at(values, key, APART), held, BLOCK_D, D, True)  # (KEYS, BLOCK_D)
    dk = tl.zeros([KEYS, BLOCK_D], tl.float32)
    dv = tl.zeros([KEYS, BLOCK_D], tl.float32)
    walk = masked_walk(row_walk(start, tl.minimum(start + KEYS, num_keys), rows, layout, sample, ROWS, GAPS))
    own = key
    if OWN:
        own = own_rows(key, rows, layout, sample)
    for member in range(group):
        head = g * group + member
        source, table, chance = source_of(given, b, head), table_of(tables, head), (seed, threshold, head, b)
        slopes = tl.zeros([KEYS], tl.float32)
        for i in range(0, edge_count(walk)):
            dk, dv, slopes = _key_step(
                dk, dv, slopes, k, v, key, own, edge_tile(i, walk), start, source, table, side, chance, factor,
                keep_scale, ROWS, KEYS, WIDTH, BLOCK_D, D, GAPS, DROPOUT, HAS_KEY, HAS_BIAS, HAS_CONTENT, HAS_POSITION,
                SHIFTED, PRECISION, "interval",
            )  # fmt: skip
        if OWN:
            _, own_start, own_end = own_run(own, ROWS)
            for own_tile in range(own_start, own_end):
                dk, dv, slopes = _key_step(
                    dk, dv, slopes, k, v, key, own, own_tile, start, source, table, side, chance, factor, keep_scale,
                    ROWS, KEYS, WIDTH, BLOCK_D, D, GAPS, DROPOUT, HAS_KEY, HAS_BIAS, HAS_CONTENT, HAS_POSITION, SHIFTED,
                    PRECISION, "own",
                )  # fmt: skip
        if HAS_CONTENT:
            o_d = tl.arange(0, BLOCK_D)
            # Loaded anew: kept ones would take registers from the loops.
            again = load_rows(pointers_at(keys, key, APART), held, BLOCK_D, D, True)
            share = tl.sum(slopes[:, None] * again.to(tl.float32), 0) * scale + bad
            parts = content_parts_ptr + ((b.to(tl.int64) * heads + head) * tiles + tile) * D
            tl.store(parts + o_d, share, mask=o_d < D)
    return dk * scale + bad, dv * keep_scale + bad


@triton.jit
def _query_step(
    dq, df, q, grad, pivot, delta, table, first_row, keys, values, tile, fence, rows, draw, factor, keep_scale,
    ROWS: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, D: tl.constexpr,
    GAPS: tl.constexpr, APART: tl.constexpr, DROPOUT: tl.constexpr, HAS_KEY: tl.constexpr, HAS_BIAS: tl.constexpr,
    SHIFTED: tl.constexpr, PRECISION: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """A tile of keys adds to the gradients of a tile of queries, and where SHIFTED to ``df``, those of the queries that
    follow them."""
    start = tile * KEYS
    key = start + tl.arange(0, KEYS)
    first = window_start(table, start, first_row, ROWS)
    k = load_keys(keys, start, fence, KEYS, BLOCK_D, D, APART, GAPS, False, True)  # (KEYS, BLOCK_D)
    v = load_keys(values, start, fence, KEYS, BLOCK_D, D, APART, GAPS, False, True)  # (KEYS, BLOCK_D)
    s, entries = scores(
        q, k, table, first, factor, ROWS, KEYS, WIDTH, BLOCK_D, D, HAS_KEY, HAS_BIAS, SHIFTED, PRECISION, False
    )  # (ROWS, KEYS), (WIDTH, BLOCK_D)
    p = tl.where(visible(rows, key, MASK, GAPS), tl.math.exp2(s - pivot[:, None]), 0.0)
    dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)  # (ROWS, KEYS)
    if DROPOUT:
        dp = tl.where(kept(draw, start, KEYS), dp * keep_scale, 0.0)
    ds = p * (dp - delta[:, None])
    dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    if HAS_KEY:
        de = along_window(ds, ROWS, KEYS, WIDTH)  # (ROWS, WIDTH)
        if SHIFTED:
            ahead = (first + tl.arange(0, WIDTH) > table[4])[None, :]
            df = tl.dot(tl.where(ahead, de, 0.0).to(k.dtype), entries, df, input_precision=PRECISION)
            de = tl.where(ahead, 0.0, de)
        dq = tl.dot(de.to(k.dtype), entries, dq, input_precision=PRECISION)
    return dq, df


@triton.jit
def _query_gradients(
    tile, keys, values, grad_query, dq_n, grad_following, df_n, source, table, side, bad, chance, factor, scale,
    keep_scale,
    ROWS: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, D: tl.constexpr,
    GAPS: tl.constexpr, OWN: tl.constexpr, APART: tl.constexpr, DROPOUT: tl.constexpr, HAS_KEY: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_CONTENT: tl.constexpr, HAS_POSITION: tl.constexpr, SHIFTED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of a head's query rows, from every key they see; where SHIFTED those of the queries that
    follow them are kept apart, for the next row to add."""
    layout, sample, rows, hole = side
    _, _, grads, pivot_ptr, delta_ptr, _, _ = source
    row, query, stays = placed(tile, rows, layout, sample, hole, ROWS)
    lo, hi, gap_lo, gap_hi, own = rows_of(row, stays, layout, sample, GAPS, OWN)
    limit, walk = key_walk(lo, hi, gap_lo, gap_hi, KEYS, GAPS)
    walk = masked_walk(walk)
    fence = fence_of(layout, sample, limit)
    seeing = (lo < hi) | (own >= 0)
    q = query_rows(source, query, seeing, BLOCK_D, D, HAS_KEY and (HAS_CONTENT or HAS_POSITION), SHIFTED)
    grad = head_rows(grads, query, seeing, BLOCK_D, D)  # (ROWS, BLOCK_D)
    pivot = tl.load(pivot_ptr + query, mask=seeing, other=float("inf"))
    delta = tl.load(delta_ptr + query, mask=seeing, other=0.0)
    first_row = tile * ROWS + sample[3]
    draw = draw_of(chance, query, sample)
    shown = (lo, hi, gap_lo, gap_hi, own)

    dq = tl.zeros([ROWS, BLOCK_D], tl.float32)
    df = dq
    for i in range(0, edge_count(walk)):
        dq, df = _query_step(
            dq, df, q, grad, pivot, delta, table, first_row, keys, values, edge_tile(i, walk), fence, shown, draw,
            factor, keep_scale, ROWS, KEYS, WIDTH, BLOCK_D, D, GAPS, APART, DROPOUT, HAS_KEY, HAS_BIAS, SHIFTED,
            PRECISION, "interval",
        )  # fmt: skip
    if OWN:
        last, own_start, own_end = own_run(own, KEYS)
        fence = fence_of(layout, sample, last)
        for own_tile in range(own_start, own_end):
            dq, df = _query_step(
                dq, df, q, grad, pivot, delta, table, first_row, keys, values, own_tile, fence, shown, draw, factor,
                keep_scale, ROWS, KEYS, WIDTH, BLOCK_D, D, GAPS, APART, DROPOUT, HAS_KEY, HAS_BIAS, SHIFTED, PRECISION,
                "own",
            )  # fmt: skip
    dq = tl.where(seeing[:, None], dq * scale, 0.0) + bad
    store_rows(rows_at(grad_query, query, dq_n), dq, stays, BLOCK_D, D)
    if SHIFTED:
        df = tl.where((seeing & seeing_rows(source, query + 1))[:, None], df * scale, 0.0) + bad
        store_rows(rows_at(grad_following, query, df_n), df, stays, BLOCK_D, D)


@triton.jit(do_not_specialize=(*SIZES, *STRIDES), do_not_specialize_on_alignment=(*SAMPLES, "bias_ptr"))
def relative_backward_kernel(
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
    PRECISION: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile of keys and values (PART "keys"), of a head's query rows ("queries"), or of the entries of
    its tables ("entries"), whose tiles hold KEYS entries. ``units`` counts (sample, key/value head) pairs for keys, and
    (sample, head) pairs otherwise."""
    layout = (
        cache, read, tokens, write, token_rows, window, skip, rows0, lo0, hi0, step0, own0, rows1, lo1, hi1, step1,
        own1, rows2, lo2, hi2, step2, own2,
    )  # fmt: skip
    tile, unit = place(tl.program_id(0), tiles, units, together, PART != "keys")
    if PART == "keys":
        kv_heads = heads // group
        b, g = unit // kv_heads, unit % kv_heads
        pairs = units.to(tl.int64) * group
    else:
        b, head = unit // heads, unit % heads
        g = head // group
        pairs = units.to(tl.int64)
    sample, ok = sample_of(b, queries, layout, token_lengths_ptr, token_starts_ptr, cache_starts_ptr, query_start_ptr)
    bad = tl.where(ok, 0.0, float("nan"))  # a sample out of range shows
    limit = key_limit(queries, layout, sample, query_start_ptr)
    keys = keys_of(key_ptr, cache_key_ptr, b, g, k_b, k_h, k_n, ck_b, ck_h, ck_n, cache)
    values = keys_of(value_ptr, cache_value_ptr, b, g, v_b, v_h, v_n, cv_b, cv_h, cv_n, cache)
    given = (
        (content_ptr, c_b, c_h, c_n), (position_ptr, p_b, p_h, p_n), (grad_out_ptr, do_b, do_h, do_n), rows_ptr,
        pairs * queries, spans_ptr, pairs // heads * queries, heads, queries,
    )  # fmt: skip
    tables = (entries_ptr, rk_h, rk_n, bias_ptr, bias_h, offsets, reach, origin)
    side = (layout, sample, rows, hole)
    seed = load_or(seed_ptr, 0, 0)
    if PART == "keys":
        dk, dv = _key_gradients(
            tile, tiles, b, g, heads, group, keys, values, content_parts_ptr, given, tables, side, limit, bad, seed,
            threshold, factor, scale, keep_scale, ROWS, KEYS, WIDTH, BLOCK_D, D, GAPS, OWN, APART, DROPOUT, HAS_KEY,
            HAS_BIAS, HAS_CONTENT, HAS_POSITION, SHIFTED, PRECISION,
        )  # fmt: skip
        grad_keys = keys_of(grad_key_ptr, grad_cache_key_ptr, b, g, dk_b, dk_h, dk_n, dck_b, dck_h, dck_n, cache)
        grad_values = keys_of(grad_value_ptr, grad_cache_value_ptr, b, g, dv_b, dv_h, dv_n, dcv_b, dcv_h, dcv_n, cache)
        key = tile * KEYS + tl.arange(0, KEYS)
        exists = key < cache + read + tokens + write
        store_rows(pointers_at(grad_keys, key, APART), dk, exists, BLOCK_D, D)
        store_rows(pointers_at(grad_values, key, APART), dv, exists, BLOCK_D, D)
    elif PART == "queries":
        _query_gradients(
            tile, keys, values, head_of(grad_query_ptr, b, head, dq_b, dq_h), dq_n,
            head_of(grad_following_ptr, b, head, df_b, df_h), df_n, source_of(given, b, head), table_of(tables, head),
            side, bad, (seed, threshold, head, b), factor, scale, keep_scale, ROWS, KEYS, WIDTH, BLOCK_D, D, GAPS, OWN,
            APART, DROPOUT, HAS_KEY, HAS_BIAS, HAS_CONTENT, HAS_POSITION, SHIFTED, PRECISION,
        )  # fmt: skip
    else:
        entry_gradients(
            tile, tiles, tiles_behind, b.to(tl.int64) * heads + head, keys, values, entry_parts_ptr, bias_parts_ptr,
            position_parts_ptr, source_of(given, b, head), table_of(tables, head), side, limit, bad,
            (seed, threshold, head, b), factor, scale, keep_scale, ROWS, KEYS, WIDTH, BLOCK_D, D, GAPS, OWN, APART,
            DROPOUT, HAS_KEY, HAS_BIAS, HAS_CONTENT, HAS_POSITION, SHIFTED, PRECISION,
        )  # fmt: skip
