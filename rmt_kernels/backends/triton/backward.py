"""Backward without atomics: what each row needs, then the gradients of keys and values by key tiles, and of queries by
row tiles. Probabilities are recomputed from lse. Both parts can share one launch, which fills the chip with few heads.
"""

import triton
import triton.language as tl

from rmt_kernels.backends.triton.forward import LAYOUT, place
from rmt_kernels.backends.triton.tiles import (
    kept,
    kept_one,
    load_keys,
    load_or,
    load_rows,
    pointers_at,
    row_pointers,
    rows_of,
    sample_of,
    sees,
    store_rows,
    tile_rows,
)
from rmt_kernels.backends.triton.walk import edge_count, edge_tile, key_walk, open_count, open_tile, row_walk

SIZES = (*LAYOUT, "kv_heads", "queries", "row_tiles", "key_tiles", "heads", "together", "threshold", "key_programs")
LOG2E = tl.constexpr(1.4426950408889634)
LARGE = tl.constexpr(16777216.0)  # 2^24


@triton.jit(do_not_specialize=(*LAYOUT, "q_heads", "queries", "count", "batch"))
def prepare_kernel(
    out_ptr, grad_out_ptr, lse_ptr, grad_lse_ptr, rows_ptr, spans_ptr, token_lengths_ptr, token_starts_ptr,
    cache_starts_ptr, query_start_ptr, o_b, o_h, o_n, do_b, do_h, do_n, q_heads, queries, count, batch,
    cache, read, tokens, write, token_rows, window, skip, rows0, lo0, hi0, step0, own0, rows1, lo1, hi1, step1, own1,
    rows2, lo2, hi2, step2, own2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, GAPS: tl.constexpr,
):  # fmt: skip
    """What the gradients of keys need of each query row, where computing it again for every tile of keys would cost
    more than reading it.

    ``rows_ptr``, float32 (2, batch, heads, queries): the pivot (lse as an exponent of 2, +inf where the row sees
    nothing), and delta = out . grad_out - grad_lse. ``spans_ptr``, int32 (4, batch, queries): lo, hi, and where GAPS
    gap_lo, gap_hi.
    """
    layout = (
        cache, read, tokens, write, token_rows, window, skip, rows0, lo0, hi0, step0, own0, rows1, lo1, hi1, step1,
        own1, rows2, lo2, hi2, step2, own2,
    )  # fmt: skip
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

    once = stays & (head == 0)
    b32, query32 = tl.where(once, b, 0).to(tl.int32), query.to(tl.int32)
    sample, _ = sample_of(
        b32, queries, layout, token_lengths_ptr, token_starts_ptr, cache_starts_ptr, query_start_ptr
    )  # fmt: skip
    lo, hi, gap_lo, gap_hi, _ = rows_of(query32, once, layout, sample, GAPS, False)
    span, size = spans_ptr + b * queries + query, batch.to(tl.int64) * queries
    tl.store(span, lo, mask=once)
    tl.store(span + size, hi, mask=once)
    if GAPS:
        tl.store(span + 2 * size, gap_lo, mask=once)
        tl.store(span + 3 * size, gap_hi, mask=once)


@triton.jit
def _key_step(
    dk, dv, k, v, key, tile, side, first, queries, first_head, b, seed, threshold, scale, keep_scale,
    ROWS: tl.constexpr, KEYS: tl.constexpr, BLOCK_D: tl.constexpr, D: tl.constexpr, PACK: tl.constexpr,
    GAPS: tl.constexpr, DESCRIBED: tl.constexpr, DROPOUT: tl.constexpr, SIGN: tl.constexpr,
    PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """A tile of rows adds to the gradients of a tile of keys. Scores are (KEYS, ROWS): so probabilities are the left
    operands of the products that follow, and can stay in registers."""
    query_ptr, grad_ptr, pivot_ptr, delta_ptr, span_ptr, span_size, q_n, q_h, do_n, do_h = side
    query, stays = tile_rows(tile, queries, ROWS, PACK)
    if DESCRIBED:
        q = query_ptr.load([b, first_head, tile * ROWS, 0]).reshape(ROWS, BLOCK_D)
    else:
        q = load_rows(row_pointers(query_ptr, tile, q_n, q_h, ROWS, PACK), stays, BLOCK_D, D, True)
    if SIGN != 1:
        q = (q.to(tl.float32) * SIGN).to(q.dtype)
    pivot = tl.load(row_pointers(pivot_ptr, tile, 1, queries, ROWS, PACK), mask=stays, other=float("inf"))
    s = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # (KEYS, ROWS)
    p = tl.math.exp2(s * scale - pivot[None, :])
    if MASKED:
        span = row_pointers(span_ptr, tile, 1, 0, ROWS, PACK)
        lo = tl.load(span, mask=stays, other=0)
        hi = tl.load(span + span_size, mask=stays, other=0)
        gap_lo, gap_hi = lo, lo
        if GAPS:
            gap_lo = tl.load(span + 2 * span_size, mask=stays, other=0)
            gap_hi = tl.load(span + 3 * span_size, mask=stays, other=0)
        visible = sees(lo[None, :], hi[None, :], gap_lo[None, :], gap_hi[None, :], key[:, None], GAPS)
        p = tl.where(visible, p, 0.0)
    if DESCRIBED:
        grad = grad_ptr.load([b, first_head, tile * ROWS, 0]).reshape(ROWS, BLOCK_D)
    else:
        grad = load_rows(row_pointers(grad_ptr, tile, do_n, do_h, ROWS, PACK), stays, BLOCK_D, D, True)
    delta = tl.load(row_pointers(delta_ptr, tile, 1, queries, ROWS, PACK), mask=stays, other=0.0)
    dp = tl.dot(v, tl.trans(grad), input_precision=PRECISION)  # (KEYS, ROWS)
    if DROPOUT:
        draw = (seed, threshold, query + first, first_head + tl.arange(0, ROWS) % PACK, b)
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
    p0, p1, p2 = key - layout[11], key - layout[16], key - layout[21]
    in0 = (layout[11] >= 0) & (p0 >= 0) & (p0 < layout[7])
    in1 = (layout[16] >= 0) & (p1 >= sample[0]) & (p1 < sample[1]) & (p1 < layout[12])
    in2 = (layout[21] >= 0) & (p2 >= 0) & (p2 < layout[17])
    row = tl.where(in0, p0, tl.where(in1, p1 + layout[7], p2 + layout[7] + layout[12])) - sample[3]
    return tl.where((in0 | in1 | in2) & (row >= 0) & (row < queries), row, -1)


@triton.jit
def _own_step(
    dk, dv, k, v, key, query, side, sample, queries, first_head, b, seed, threshold, scale, keep_scale,
    BLOCK_D: tl.constexpr, D: tl.constexpr, PACK: tl.constexpr, DROPOUT: tl.constexpr, SIGN: tl.constexpr,
):  # fmt: skip
    """The rows whose own keys these are add to their gradients."""
    query_ptr, grad_ptr, pivot_ptr, delta_ptr, _, _, q_n, q_h, do_n, do_h = side
    has = query >= 0
    q64 = query.to(tl.int64)
    for j in range(PACK):
        j64 = tl.zeros_like(q64) + j
        q = load_rows(query_ptr + q64 * q_n + j64 * q_h, has, BLOCK_D, D, True).to(tl.float32) * SIGN
        grad = load_rows(grad_ptr + q64 * do_n + j64 * do_h, has, BLOCK_D, D, True).to(tl.float32)
        pivot = tl.load(pivot_ptr + q64 + j64 * queries, mask=has, other=float("inf"))
        delta = tl.load(delta_ptr + q64 + j64 * queries, mask=has, other=0.0)
        p = tl.math.exp2(tl.sum(q * k.to(tl.float32), 1) * scale - pivot)
        dp = tl.sum(grad * v.to(tl.float32), 1)
        weight = p
        if DROPOUT:
            keep = kept_one((seed, threshold, query + sample[3], tl.zeros_like(query) + first_head + j, b), key)
            weight, dp = tl.where(keep, p, 0.0), tl.where(keep, dp * keep_scale, 0.0)
        dv += weight[:, None] * grad
        dk += (p * (dp - delta))[:, None] * q
    return dk, dv


@triton.jit
def _key_gradients(
    tile, b, g, keys, values, grad_keys, grad_values, query_ptr, grad_ptr, rows_ptr, spans_ptr, span_size, q_h, q_n, do_h, do_n,
    layout, sample, ok, queries, kv_heads, row_count, seed, threshold, scale, grad_scale, keep_scale,
    PACK: tl.constexpr, BLOCKS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, GAPS: tl.constexpr, OWN: tl.constexpr, APART: tl.constexpr,
    DESCRIBED: tl.constexpr, DROPOUT: tl.constexpr, SIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile of keys and values, from every row that sees it. ``query_ptr`` and ``grad_ptr`` are of the
    sample's first head, or where DESCRIBED descriptors of the whole tensors."""
    num_keys = layout[0] + layout[1] + layout[2] + layout[3]
    start = tile * KEYS
    key = start + tl.arange(0, KEYS)
    exists = key < num_keys
    k = load_rows(pointers_at(keys, key, APART), exists, BLOCK_D, D, True)  # (KEYS, BLOCK_D)
    v = load_rows(pointers_at(values, key, APART), exists, BLOCK_D, D, True)  # (KEYS, BLOCK_D)
    dk = tl.zeros([KEYS, BLOCK_D], tl.float32)
    dv = tl.zeros([KEYS, BLOCK_D], tl.float32)
    end = tl.minimum(start + KEYS, num_keys)
    walk = row_walk(start, end, queries, layout, sample, ROWS // PACK, GAPS)
    for block in range(BLOCKS):
        first_head = (g * BLOCKS + block) * PACK
        h64 = first_head.to(tl.int64)
        pivot_ptr = rows_ptr + (b.to(tl.int64) * kv_heads * BLOCKS * PACK + h64) * queries
        head_query, head_grad = query_ptr, grad_ptr
        if not DESCRIBED:
            head_query, head_grad = query_ptr + h64 * q_h, grad_ptr + h64 * do_h
        side = (
            head_query, head_grad, pivot_ptr, pivot_ptr + row_count, spans_ptr + b.to(tl.int64) * queries, span_size,
            q_n, q_h, do_n, do_h,
        )  # fmt: skip
        if OWN:
            dk, dv = _own_step(
                dk, dv, k, v, key, _own_rows(key, queries, layout, sample), side, sample, queries, first_head, b, seed,
                threshold, scale, keep_scale, BLOCK_D, D, PACK, DROPOUT, SIGN,
            )  # fmt: skip
        for i in range(0, open_count(walk)):
            dk, dv = _key_step(
                dk, dv, k, v, key, open_tile(i, walk), side, sample[3], queries, first_head, b, seed, threshold,
                scale, keep_scale, ROWS, KEYS, BLOCK_D, D, PACK, GAPS, DESCRIBED, DROPOUT, SIGN,
                PRECISION, False,
            )  # fmt: skip
        for i in range(0, edge_count(walk)):
            dk, dv = _key_step(
                dk, dv, k, v, key, edge_tile(i, walk), side, sample[3], queries, first_head, b, seed, threshold,
                scale, keep_scale, ROWS, KEYS, BLOCK_D, D, PACK, GAPS, DESCRIBED, DROPOUT, SIGN,
                PRECISION, True,
            )  # fmt: skip
    bad = tl.where(ok, 0.0, float("nan"))  # a sample out of range shows
    dk, dv = dk * (grad_scale * SIGN) + bad, dv * keep_scale + bad
    store_rows(pointers_at(grad_keys, key, APART), dk, exists, BLOCK_D, D)
    store_rows(pointers_at(grad_values, key, APART), dv, exists, BLOCK_D, D)


@triton.jit
def _query_step(
    dq, q, grad, pivot, delta, keys, values, tile, limit, rows, draw, scale, keep_scale, KEYS: tl.constexpr,
    BLOCK_D: tl.constexpr, D: tl.constexpr, GAPS: tl.constexpr, APART: tl.constexpr,
    DESCRIBED: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """A tile of keys adds to the gradients of a tile of queries."""
    start = tile * KEYS
    key = start + tl.arange(0, KEYS)
    k = load_keys(keys, start, limit, KEYS, BLOCK_D, D, APART, DESCRIBED, MASKED)  # (KEYS, BLOCK_D)
    v = load_keys(values, start, limit, KEYS, BLOCK_D, D, APART, DESCRIBED, MASKED)  # (KEYS, BLOCK_D)
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
    tile, b, first_head, keys, values, query_ptr, grad_ptr, rows_ptr, grad_query_ptr, q_h, q_n, do_h, do_n, dq_h, dq_n,
    layout, sample, ok, queries, q_heads, row_count, seed, threshold, scale, grad_scale, keep_scale,
    PACK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    GAPS: tl.constexpr, OWN: tl.constexpr, APART: tl.constexpr, DESCRIBED: tl.constexpr,
    DROPOUT: tl.constexpr, SIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile of packed query rows, from every key they see. The pointers are of the sample's first
    head."""
    query, stays = tile_rows(tile, queries, ROWS, PACK)
    lo, hi, gap_lo, gap_hi, own = rows_of(query, stays, layout, sample, GAPS, OWN)
    limit, walk = key_walk(lo, hi, gap_lo, gap_hi, KEYS, GAPS)
    seeing = (lo < hi) | (own >= 0)
    h64 = first_head.to(tl.int64)
    q = load_rows(row_pointers(query_ptr + h64 * q_h, tile, q_n, q_h, ROWS, PACK), seeing, BLOCK_D, D, True)
    if SIGN != 1:
        q = (q.to(tl.float32) * SIGN).to(q.dtype)
    grad = load_rows(row_pointers(grad_ptr + h64 * do_h, tile, do_n, do_h, ROWS, PACK), seeing, BLOCK_D, D, True)
    pivot_ptr = row_pointers(
        rows_ptr + (b.to(tl.int64) * q_heads + h64) * queries, tile, 1, queries, ROWS, PACK
    )  # fmt: skip
    pivot = tl.load(pivot_ptr, mask=seeing, other=float("inf"))
    delta = tl.load(pivot_ptr + row_count, mask=seeing, other=0.0)
    draw = (seed, threshold, query + sample[3], first_head + tl.arange(0, ROWS) % PACK, b)
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
    for i in range(0, open_count(walk)):
        dq = _query_step(
            dq, q, grad, pivot, delta, keys, values, open_tile(i, walk), limit, (lo, hi, gap_lo, gap_hi), draw, scale,
            keep_scale, KEYS, BLOCK_D, D, GAPS, APART, DESCRIBED, DROPOUT, PRECISION, False,
        )  # fmt: skip
    for i in range(0, edge_count(walk)):
        dq = _query_step(
            dq, q, grad, pivot, delta, keys, values, edge_tile(i, walk), limit, (lo, hi, gap_lo, gap_hi), draw, scale,
            keep_scale, KEYS, BLOCK_D, D, GAPS, APART, DESCRIBED, DROPOUT, PRECISION, True,
        )  # fmt: skip
    dq = tl.where(seeing[:, None], dq * grad_scale, 0.0) + tl.where(ok, 0.0, float("nan"))
    store_rows(row_pointers(grad_query_ptr + h64 * dq_h, tile, dq_n, dq_h, ROWS, PACK), dq, stays, BLOCK_D, D)


@triton.jit(do_not_specialize=SIZES)
def backward_kernel(
    query_ptr, key_ptr, value_ptr, cache_key_ptr, cache_value_ptr, grad_out_ptr, rows_ptr, spans_ptr, grad_query_ptr,
    grad_key_ptr, grad_value_ptr, grad_cache_key_ptr, grad_cache_value_ptr, token_lengths_ptr, token_starts_ptr, cache_starts_ptr,
    query_start_ptr, seed_ptr, query_blocks, grad_out_blocks, key_blocks, value_blocks,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, ck_b, ck_h, ck_n, cv_b, cv_h, cv_n, do_b, do_h, do_n,
    dq_b, dq_h, dq_n, dk_b, dk_h, dk_n, dv_b, dv_h, dv_n, dck_b, dck_h, dck_n, dcv_b, dcv_h, dcv_n,
    kv_heads, queries, row_tiles, key_tiles, heads, together, key_programs, threshold, scale, grad_scale, keep_scale,
    cache, read, tokens, write, token_rows, window, skip, rows0, lo0, hi0, step0, own0, rows1, lo1, hi1, step1, own1,
    rows2, lo2, hi2, step2, own2,
    PACK: tl.constexpr, BLOCKS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, KEY_ROWS: tl.constexpr,
    KEY_KEYS: tl.constexpr, QUERY_ROWS: tl.constexpr, QUERY_KEYS: tl.constexpr, GAPS: tl.constexpr, OWN: tl.constexpr,
    APART: tl.constexpr, DESCRIBED: tl.constexpr, DROPOUT: tl.constexpr, SIGN: tl.constexpr,
    PRECISION: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Gradients of keys and values (PART "keys"), of queries ("queries"), or of both in one launch ("both"), in which
    the first ``key_programs`` programs own tiles of keys. ``heads`` counts (sample, key/value head) pairs. Where
    DESCRIBED, the tiles that a program walks are fetched through the four descriptors."""
    layout = (
        cache, read, tokens, write, token_rows, window, skip, rows0, lo0, hi0, step0, own0, rows1, lo1, hi1, step1,
        own1, rows2, lo2, hi2, step2, own2,
    )  # fmt: skip
    pid = tl.program_id(0)
    of_keys = PART == "keys"
    if PART == "both":
        of_keys = pid < key_programs
    row_count = heads.to(tl.int64) * BLOCKS * PACK * queries
    seed = load_or(seed_ptr, 0, 0)
    if of_keys:
        tile, unit = place(pid, key_tiles, heads, together, False)
        b, g = unit // kv_heads, unit % kv_heads
        b64, g64 = b.to(tl.int64), g.to(tl.int64)
        keys = (key_ptr + b64 * k_b + g64 * k_h, cache_key_ptr + b64 * ck_b + g64 * ck_h, k_n, ck_n, cache)
        values = (value_ptr + b64 * v_b + g64 * v_h, cache_value_ptr + b64 * cv_b + g64 * cv_h, v_n, cv_n, cache)
        grad_keys = (
            grad_key_ptr + b64 * dk_b + g64 * dk_h, grad_cache_key_ptr + b64 * dck_b + g64 * dck_h, dk_n, dck_n, cache
        )  # fmt: skip
        grad_values = (
            grad_value_ptr + b64 * dv_b + g64 * dv_h, grad_cache_value_ptr + b64 * dcv_b + g64 * dcv_h, dv_n, dcv_n,
            cache,
        )  # fmt: skip
        sample, ok = sample_of(
            b, queries, layout, token_lengths_ptr, token_starts_ptr, cache_starts_ptr, query_start_ptr
        )
        if DESCRIBED:
            queries_side, grads_side = query_blocks, grad_out_blocks
        else:
            queries_side, grads_side = query_ptr + b64 * q_b, grad_out_ptr + b64 * do_b
        _key_gradients(
            tile, b, g, keys, values, grad_keys, grad_values, queries_side, grads_side, rows_ptr, spans_ptr, heads // kv_heads * queries.to(tl.int64), q_h, q_n, do_h, do_n, layout, sample, ok,
            queries, kv_heads, row_count, seed, threshold, scale,
            grad_scale, keep_scale, PACK, BLOCKS, D, BLOCK_D, KEY_ROWS, KEY_KEYS, GAPS, OWN, APART, DESCRIBED,
            DROPOUT, SIGN, PRECISION,
        )  # fmt: skip
    else:
        if PART == "both":
            pid -= key_programs
        tile, unit = place(pid, row_tiles, heads * BLOCKS, together, True)
        b, g, first_head = unit // (kv_heads * BLOCKS), unit // BLOCKS % kv_heads, unit % (kv_heads * BLOCKS) * PACK
        b64, g64 = b.to(tl.int64), g.to(tl.int64)
        if DESCRIBED:
            seen_keys, seen_values = (key_blocks, b, g), (value_blocks, b, g)
        else:
            seen_keys = (key_ptr + b64 * k_b + g64 * k_h, cache_key_ptr + b64 * ck_b + g64 * ck_h, k_n, ck_n, cache)
            seen_values = (
                value_ptr + b64 * v_b + g64 * v_h,
                cache_value_ptr + b64 * cv_b + g64 * cv_h,
                v_n,
                cv_n,
                cache,
            )
        sample, ok = sample_of(
            b, queries, layout, token_lengths_ptr, token_starts_ptr, cache_starts_ptr, query_start_ptr
        )
        _query_gradients(
            tile, b, first_head, seen_keys, seen_values, query_ptr + b64 * q_b, grad_out_ptr + b64 * do_b, rows_ptr,
            grad_query_ptr + b64 * dq_b, q_h, q_n, do_h, do_n, dq_h, dq_n, layout, sample, ok, queries,
            kv_heads * BLOCKS * PACK, row_count, seed, threshold, scale, grad_scale, keep_scale, PACK, D, BLOCK_D,
            QUERY_ROWS, QUERY_KEYS, GAPS, OWN, APART, DESCRIBED, DROPOUT, SIGN, PRECISION,
        )  # fmt: skip
