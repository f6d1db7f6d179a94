"""Backward without atomics: what each row needs, then the gradients of keys and values by key tiles, and of queries by
row tiles. Probabilities are recomputed from lse. Both parts can share one launch, which fills the chip with few heads.
"""

import triton
import triton.language as tl

from rmt_kernels.backends.triton.forward import LAYOUT, place
from rmt_kernels.backends.triton.tiles import (
    kept,
    kept_one,
    key_pointers,
    load_or,
    load_rows,
    pointers_at,
    rows_of,
    sample_of,
    sees,
    store_rows,
)
from rmt_kernels.backends.triton.walk import edge_count, edge_tile, key_walk, open_count, open_tile, row_walk

SIZES = (*LAYOUT, "kv_heads", "queries", "row_tiles", "key_tiles", "heads", "together", "threshold", "key_programs")
LOG2E = tl.constexpr(1.4426950408889634)
LARGE = tl.constexpr(16777216.0)  # 2^24


@triton.jit(do_not_specialize=["q_heads", "queries"])
def prepare_kernel(
    out_ptr, grad_out_ptr, lse_ptr, grad_lse_ptr, rows_ptr, o_b, o_h, o_n, do_b, do_h, do_n, q_heads, queries, count,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """For each row of lse: its pivot (lse as an exponent of 2, +inf where the row sees nothing), then in the second half
    of ``rows_ptr`` delta = out . grad_out - grad_lse."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    stays = row < count
    query, head, b = row % queries, row // queries % q_heads, row // queries // q_heads
    out = load_rows(out_ptr + b * o_b + head * o_h + query * o_n, stays, BLOCK_D, D, True).to(tl.float32)
    grad = load_rows(grad_out_ptr + b * do_b + head * do_h + query * do_n, stays, BLOCK_D, D, True).to(tl.float32)
    lse = tl.load(lse_ptr + row, mask=stays, other=0.0)
    blind = lse == float("-inf")
    pivot = lse * LOG2E
    # So large an lse is off by whole exponents: raised by its own rounding, no probability exceeds 1.
    pivot = tl.where(tl.abs(pivot) > LARGE, pivot + tl.abs(pivot) * 2.4e-7, pivot)
    delta = tl.sum(out * grad, 1)
    if grad_lse_ptr is not None:
        delta -= tl.load(grad_lse_ptr + row, mask=stays, other=0.0)
    tl.store(rows_ptr + row, tl.where(blind, float("inf"), pivot), mask=stays)
    tl.store(rows_ptr + count + row, tl.where(blind, 0.0, delta), mask=stays)


@triton.jit
def _key_step(
    dk, dv, k, v, key, row_tile, query_side, layout, sample, queries, g, b, kv_heads, seed, threshold, scale,
    keep_scale, ROWS: tl.constexpr, KEYS: tl.constexpr, BLOCK_D: tl.constexpr, D: tl.constexpr, GROUP: tl.constexpr,
    GAPS: tl.constexpr, DROPOUT: tl.constexpr, SIGN: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """A tile of rows adds to the gradients of a tile of keys. Scores are (KEYS, ROWS), so that probabilities are the
    left operands of the products that follow, and can stay in registers."""
    query_ptr, grad_ptr, rows_ptr, q_n, q_h, do_n, do_h, count = query_side
    i = row_tile * ROWS + tl.arange(0, ROWS)
    query, head = i // GROUP, g * GROUP + i % GROUP
    stays = query < queries
    if MASKED:
        lo, hi, gap_lo, gap_hi, own = rows_of(query, queries, layout, sample, GAPS, False)
        stays = lo < hi
    q64, h64 = query.to(tl.int64), head.to(tl.int64)
    row = (b.to(tl.int64) * kv_heads * GROUP + head) * queries + query
    q = load_rows(query_ptr + q64 * q_n + h64 * q_h, stays, BLOCK_D, D, True)  # (ROWS, BLOCK_D)
    if SIGN != 1:
        q = (q.to(tl.float32) * SIGN).to(q.dtype)
    pivot = tl.load(rows_ptr + row, mask=stays, other=float("inf"))
    s = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # (KEYS, ROWS)
    p = tl.math.exp2(s * scale - pivot[None, :])
    if MASKED:
        visible = sees(lo[None, :], hi[None, :], gap_lo[None, :], gap_hi[None, :], key[:, None], GAPS)
        p = tl.where(visible, p, 0.0)
    grad = load_rows(grad_ptr + q64 * do_n + h64 * do_h, stays, BLOCK_D, D, True)  # (ROWS, BLOCK_D)
    delta = tl.load(rows_ptr + count + row, mask=stays, other=0.0)
    dp = tl.dot(v, tl.trans(grad), input_precision=PRECISION)  # (KEYS, ROWS)
    if DROPOUT:
        draw = (seed, threshold, query + sample[3], head, b)
        keep = tl.trans(kept(draw, tl.min(key, 0), KEYS))
        dv = tl.dot(tl.where(keep, p, 0.0).to(grad.dtype), grad, dv, input_precision=PRECISION)
        dp = tl.where(keep, dp * keep_scale, 0.0)
    else:
        dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision=PRECISION)
    ds = p * (dp - delta[None, :])
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def _own_rows(key, queries, layout, sample):
    """(KEYS,) the query row whose SELF key each key is, -1 where there is none."""
    first = sample[3]
    p0, p1, p2 = key - layout[11], key - layout[16], key - layout[21]
    in0 = (layout[11] >= 0) & (p0 >= 0) & (p0 < layout[7])
    in1 = (layout[16] >= 0) & (p1 >= sample[0]) & (p1 < sample[1]) & (p1 < layout[12])
    in2 = (layout[21] >= 0) & (p2 >= 0) & (p2 < layout[17])
    row = tl.where(in0, p0, tl.where(in1, p1 + layout[7], p2 + layout[7] + layout[12])) - first
    return tl.where((in0 | in1 | in2) & (row >= 0) & (row < queries), row, -1)


@triton.jit
def _key_gradients(
    tile, b, g, key_side, query_side, out_side, layout, sample, ok, queries, kv_heads, seed, threshold, scale,
    grad_scale, keep_scale, num_keys,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    GAPS: tl.constexpr, OWN: tl.constexpr, APART: tl.constexpr, DROPOUT: tl.constexpr, SIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile of keys and values, from every row that sees it."""
    keys, values = key_side
    start = tile * KEYS
    key = start + tl.arange(0, KEYS)
    exists = key < num_keys
    k = load_rows(key_pointers(keys, start, KEYS, APART), exists, BLOCK_D, D, True)  # (KEYS, BLOCK_D)
    v = load_rows(key_pointers(values, start, KEYS, APART), exists, BLOCK_D, D, True)  # (KEYS, BLOCK_D)
    dk = tl.zeros([KEYS, BLOCK_D], tl.float32)
    dv = tl.zeros([KEYS, BLOCK_D], tl.float32)
    if OWN:
        query_ptr, grad_ptr, rows_ptr, q_n, q_h, do_n, do_h, count = query_side
        query = _own_rows(key, queries, layout, sample)
        has = query >= 0
        q64 = query.to(tl.int64)
        for j in range(GROUP):
            head = g * GROUP + j
            row = (b.to(tl.int64) * kv_heads * GROUP + head) * queries + q64
            q = load_rows(query_ptr + q64 * q_n + head.to(tl.int64) * q_h, has, BLOCK_D, D, True).to(tl.float32) * SIGN
            grad = load_rows(grad_ptr + q64 * do_n + head.to(tl.int64) * do_h, has, BLOCK_D, D, True).to(tl.float32)
            pivot = tl.load(rows_ptr + row, mask=has, other=float("inf"))
            p = tl.math.exp2(tl.sum(q * k.to(tl.float32), 1) * scale - pivot)
            dp = tl.sum(grad * v.to(tl.float32), 1)
            weight = p
            if DROPOUT:
                keep = kept_one((seed, threshold, query + sample[3], tl.zeros_like(query) + head, b), key)
                weight, dp = tl.where(keep, p, 0.0), tl.where(keep, dp * keep_scale, 0.0)
            delta = tl.load(rows_ptr + count + row, mask=has, other=0.0)
            dv += weight[:, None] * grad
            dk += (p * (dp - delta))[:, None] * q
    end = tl.minimum(start + KEYS, num_keys)
    walk = row_walk(start, end, queries, layout, sample, ROWS, GROUP, GAPS)
    for i in range(0, open_count(walk)):
        dk, dv = _key_step(
            dk, dv, k, v, key, open_tile(i, walk), query_side, layout, sample, queries, g, b, kv_heads, seed, threshold,
            scale, keep_scale, ROWS, KEYS, BLOCK_D, D, GROUP, GAPS, DROPOUT, SIGN, PRECISION, False,
        )  # fmt: skip
    for i in range(0, edge_count(walk)):
        dk, dv = _key_step(
            dk, dv, k, v, key, edge_tile(i, walk), query_side, layout, sample, queries, g, b, kv_heads, seed, threshold,
            scale, keep_scale, ROWS, KEYS, BLOCK_D, D, GROUP, GAPS, DROPOUT, SIGN, PRECISION, True,
        )  # fmt: skip
    dk, dv = dk * (grad_scale * SIGN), dv * keep_scale
    if not ok:
        dk += float("nan")
        dv += float("nan")
    grad_keys, grad_values = out_side
    store_rows(key_pointers(grad_keys, start, KEYS, APART), dk, exists, BLOCK_D, D)
    store_rows(key_pointers(grad_values, start, KEYS, APART), dv, exists, BLOCK_D, D)


@triton.jit
def _query_step(
    dq, q, grad, pivot, delta, keys, values, tile, limit, rows, draw, scale, keep_scale, KEYS: tl.constexpr,
    BLOCK_D: tl.constexpr, D: tl.constexpr, GAPS: tl.constexpr, APART: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """A tile of keys adds to the gradients of a tile of queries."""
    start = tile * KEYS
    key = start + tl.arange(0, KEYS)
    k = load_rows(key_pointers(keys, start, KEYS, APART), key < limit, BLOCK_D, D, MASKED)  # (KEYS, BLOCK_D)
    v = load_rows(key_pointers(values, start, KEYS, APART), key < limit, BLOCK_D, D, MASKED)  # (KEYS, BLOCK_D)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # (ROWS, KEYS)
    p = tl.math.exp2(s * scale - pivot[:, None])
    if MASKED:
        lo, hi, gap_lo, gap_hi = rows
        visible = sees(lo[:, None], hi[:, None], gap_lo[:, None], gap_hi[:, None], key[None, :], GAPS)
        p = tl.where(visible, p, 0.0)
    dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)  # (ROWS, KEYS)
    if DROPOUT:
        dp = tl.where(kept(draw, start, KEYS), dp * keep_scale, 0.0)
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit
def _query_gradients(
    tile, b, g, key_side, query_side, grad_query_ptr, dq_n, dq_h, layout, sample, ok, queries, kv_heads, seed,
    threshold, scale, grad_scale, keep_scale,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    GAPS: tl.constexpr, OWN: tl.constexpr, APART: tl.constexpr, DROPOUT: tl.constexpr, SIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile of packed query rows, from every key they see."""
    keys, values = key_side
    query_ptr, grad_ptr, rows_ptr, q_n, q_h, do_n, do_h, count = query_side
    i = tile * ROWS + tl.arange(0, ROWS)
    query, head = i // GROUP, g * GROUP + i % GROUP
    lo, hi, gap_lo, gap_hi, own = rows_of(query, queries, layout, sample, GAPS, OWN)
    limit, walk = key_walk(lo, hi, gap_lo, gap_hi, KEYS, GAPS)
    stays = query < queries
    seeing = stays & ((lo < hi) | (own >= 0))
    q64, h64 = query.to(tl.int64), head.to(tl.int64)
    row = (b.to(tl.int64) * kv_heads * GROUP + head) * queries + query
    q = load_rows(query_ptr + q64 * q_n + h64 * q_h, seeing, BLOCK_D, D, True)  # (ROWS, BLOCK_D)
    if SIGN != 1:
        q = (q.to(tl.float32) * SIGN).to(q.dtype)
    grad = load_rows(grad_ptr + q64 * do_n + h64 * do_h, seeing, BLOCK_D, D, True)  # (ROWS, BLOCK_D)
    pivot = tl.load(rows_ptr + row, mask=seeing, other=float("inf"))
    delta = tl.load(rows_ptr + count + row, mask=seeing, other=0.0)
    draw = (seed, threshold, query + sample[3], head, b)
    dq = tl.zeros([ROWS, BLOCK_D], tl.float32)
    if OWN:
        has = own >= 0
        k = load_rows(pointers_at(keys, own, APART), has, BLOCK_D, D, True).to(tl.float32)
        v = load_rows(pointers_at(values, own, APART), has, BLOCK_D, D, True).to(tl.float32)
        p = tl.where(has, tl.math.exp2(tl.sum(q.to(tl.float32) * k, 1) * scale - pivot), 0.0)
        dp = tl.sum(grad.to(tl.float32) * v, 1)
        if DROPOUT:
            dp = tl.where(kept_one(draw, own), dp * keep_scale, 0.0)
        dq = (p * (dp - delta))[:, None] * k
    for j in range(0, open_count(walk)):
        dq = _query_step(
            dq, q, grad, pivot, delta, keys, values, open_tile(j, walk), limit, (lo, hi, gap_lo, gap_hi), draw, scale,
            keep_scale, KEYS, BLOCK_D, D, GAPS, APART, DROPOUT, PRECISION, False,
        )  # fmt: skip
    for j in range(0, edge_count(walk)):
        dq = _query_step(
            dq, q, grad, pivot, delta, keys, values, edge_tile(j, walk), limit, (lo, hi, gap_lo, gap_hi), draw, scale,
            keep_scale, KEYS, BLOCK_D, D, GAPS, APART, DROPOUT, PRECISION, True,
        )  # fmt: skip
    dq = tl.where((seeing | (ok == 0))[:, None], dq * grad_scale, 0.0)
    if not ok:
        dq += float("nan")
    store_rows(grad_query_ptr + q64 * dq_n + h64 * dq_h, dq, stays, BLOCK_D, D)


@triton.jit(do_not_specialize=SIZES)
def backward_kernel(
    query_ptr, key_ptr, value_ptr, cache_key_ptr, cache_value_ptr, grad_out_ptr, rows_ptr, grad_query_ptr, grad_key_ptr,
    grad_value_ptr, grad_cache_key_ptr, grad_cache_value_ptr, token_lengths_ptr, token_starts_ptr, cache_starts_ptr,
    query_start_ptr, seed_ptr,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, ck_b, ck_h, ck_n, cv_b, cv_h, cv_n, do_b, do_h, do_n,
    dq_b, dq_h, dq_n, dk_b, dk_h, dk_n, dv_b, dv_h, dv_n, dck_b, dck_h, dck_n, dcv_b, dcv_h, dcv_n,
    kv_heads, queries, row_tiles, key_tiles, heads, together, key_programs, threshold, scale, grad_scale, keep_scale,
    cache, read, tokens, write, token_rows, window, skip, rows0, lo0, hi0, step0, own0, rows1, lo1, hi1, step1, own1,
    rows2, lo2, hi2, step2, own2,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, KEY_ROWS: tl.constexpr, KEY_KEYS: tl.constexpr,
    QUERY_ROWS: tl.constexpr, QUERY_KEYS: tl.constexpr, GAPS: tl.constexpr, OWN: tl.constexpr, APART: tl.constexpr,
    DROPOUT: tl.constexpr, SIGN: tl.constexpr, PRECISION: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Gradients of keys and values (PART "keys"), of queries ("queries"), or of both in one launch ("both"), in which
    the first ``key_programs`` programs own tiles of keys."""
    layout = (
        cache, read, tokens, write, token_rows, window, skip, rows0, lo0, hi0, step0, own0, rows1, lo1, hi1, step1,
        own1, rows2, lo2, hi2, step2, own2,
    )  # fmt: skip
    pid = tl.program_id(0)
    of_keys = PART == "keys"
    if PART == "both":
        of_keys = pid < key_programs
    if of_keys:
        tile, unit_head = place(pid, key_tiles, heads, together, False)
        b, g = unit_head // kv_heads, unit_head % kv_heads
        b64, g64 = b.to(tl.int64), g.to(tl.int64)
        sample, ok = sample_of(b, queries, layout, token_lengths_ptr, token_starts_ptr, cache_starts_ptr, query_start_ptr)
        keys = (key_ptr + b64 * k_b + g64 * k_h, cache_key_ptr + b64 * ck_b + g64 * ck_h, k_n, ck_n, cache)
        values = (value_ptr + b64 * v_b + g64 * v_h, cache_value_ptr + b64 * cv_b + g64 * cv_h, v_n, cv_n, cache)
        grad_keys = (
            grad_key_ptr + b64 * dk_b + g64 * dk_h, grad_cache_key_ptr + b64 * dck_b + g64 * dck_h, dk_n, dck_n, cache
        )  # fmt: skip
        grad_values = (
            grad_value_ptr + b64 * dv_b + g64 * dv_h, grad_cache_value_ptr + b64 * dcv_b + g64 * dcv_h, dv_n, dcv_n,
            cache,
        )  # fmt: skip
        count = heads.to(tl.int64) * GROUP * queries
        query_side = (query_ptr + b64 * q_b, grad_out_ptr + b64 * do_b, rows_ptr, q_n, q_h, do_n, do_h, count)
        _key_gradients(
            tile, b, g, (keys, values), query_side, (grad_keys, grad_values), layout, sample, ok, queries, kv_heads,
            load_or(seed_ptr, 0, 0), threshold, scale, grad_scale, keep_scale, cache + read + tokens + write, GROUP, D,
            BLOCK_D, KEY_ROWS, KEY_KEYS, GAPS, OWN, APART, DROPOUT, SIGN, PRECISION,
        )  # fmt: skip
    else:
        if PART == "both":
            pid -= key_programs
        tile, unit_head = place(pid, row_tiles, heads, together, True)
        b, g = unit_head // kv_heads, unit_head % kv_heads
        b64, g64 = b.to(tl.int64), g.to(tl.int64)
        sample, ok = sample_of(b, queries, layout, token_lengths_ptr, token_starts_ptr, cache_starts_ptr, query_start_ptr)
        keys = (key_ptr + b64 * k_b + g64 * k_h, cache_key_ptr + b64 * ck_b + g64 * ck_h, k_n, ck_n, cache)
        values = (value_ptr + b64 * v_b + g64 * v_h, cache_value_ptr + b64 * cv_b + g64 * cv_h, v_n, cv_n, cache)
        count = heads.to(tl.int64) * GROUP * queries
        query_side = (query_ptr + b64 * q_b, grad_out_ptr + b64 * do_b, rows_ptr, q_n, q_h, do_n, do_h, count)
        _query_gradients(
            tile, b, g, (keys, values), query_side, grad_query_ptr + b64 * dq_b, dq_n, dq_h, layout, sample, ok,
            queries, kv_heads, load_or(seed_ptr, 0, 0), threshold, scale, grad_scale, keep_scale, GROUP, D, BLOCK_D,
            QUERY_ROWS, QUERY_KEYS, GAPS, OWN, APART, DROPOUT, SIGN, PRECISION,
        )  # fmt: skip
