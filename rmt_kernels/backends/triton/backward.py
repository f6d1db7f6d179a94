"""Backward without atomics: what each row needs, then the gradients of keys and values by key tiles, and of queries by
row tiles. Probabilities are recomputed from lse. Both parts can share one launch, which fills the chip with few heads.
"""

import triton
import triton.language as tl

from rmt_kernels.backends.triton.forward import LAYOUT, SAMPLES, place, visible
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
    row_numbers,
    row_pointers,
    rows_of,
    sample_of,
    sees,
    store_rows,
    tile_rows,
)
from rmt_kernels.backends.triton.walk import (
    edge_count,
    edge_tile,
    key_walk,
    open_count,
    open_tile,
    own_run,
    row_walk,
)

STRIDES = tuple(
    f"{tensor}_{step}"
    for tensor in ("q", "k", "v", "ck", "cv", "do", "dq", "dk", "dv", "dck", "dcv")
    for step in "bhn"
)  # fmt: skip
SIZES = (*LAYOUT, "kv_heads", "queries", "row_tiles", "key_tiles", "heads", "together", "threshold", "key_programs")
LOG2E = tl.constexpr(1.4426950408889634)
LARGE = tl.constexpr(16777216.0)  # 2^24


@triton.jit(
    do_not_specialize=(*LAYOUT, "q_heads", "queries", "count", "batch", "o_b", "o_h", "o_n", "do_b", "do_h", "do_n"),
    do_not_specialize_on_alignment=(*SAMPLES[:4], "lse_ptr", "grad_lse_ptr"),
)
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
    UNIT: tl.constexpr = 128 // out_ptr.dtype.element_ty.primitive_bitwidth
    outs = head_of(out_ptr, b, head, o_b, o_h) + query * o_n * UNIT
    grads = head_of(grad_out_ptr, b, head, do_b, do_h) + query * do_n * UNIT
    out = load_rows(outs, stays, BLOCK_D, D, True).to(tl.float32)  # (ROWS, BLOCK_D)
    grad = load_rows(grads, stays, BLOCK_D, D, True).to(tl.float32)  # (ROWS, BLOCK_D)
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
    dk, dv, k, v, key, own, tile, side, padding, first, queries, first_head, b, seed, threshold, scale, keep_scale,
    ROWS: tl.constexpr, KEYS: tl.constexpr, BLOCK_D: tl.constexpr, D: tl.constexpr, PACK: tl.constexpr,
    GAPS: tl.constexpr, DESCRIBED: tl.constexpr, DROPOUT: tl.constexpr, SIGN: tl.constexpr,
    PRECISION: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """A tile of rows adds to the gradients of a tile of keys; MASK as in the forward kernel's. Scores are (KEYS, ROWS):
    so probabilities are the left operands of the products that follow, and can stay in registers."""
    query_ptr, grad_ptr, pivot_ptr, delta_ptr, span_ptr, span_size, q_n, q_h, do_n, do_h = side
    query, stays = tile_rows(tile, queries, ROWS, PACK)
    if GAPS and MASK != "none":  # rows of padding may hold anything
        stays = stays & ((query < padding[0]) | (query >= padding[1]))
    if DESCRIBED:
        q = query_ptr.load([b, first_head, tile * ROWS, 0]).reshape(ROWS, BLOCK_D)
    else:
        q = load_rows(row_pointers(query_ptr, tile, q_n, q_h, ROWS, PACK), stays, BLOCK_D, D, True)
    if SIGN != 1:
        q = (q.to(tl.float32) * SIGN).to(q.dtype)
    pivot = tl.load(row_numbers(pivot_ptr, tile, queries, ROWS, PACK), mask=stays, other=float("inf"))
    s = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # (KEYS, ROWS)
    p = tl.math.exp2(s * scale - pivot[None, :])
    if MASK == "own":
        p = tl.where(own[:, None] == query[None, :], p, 0.0)
    if MASK == "interval":
        span = row_numbers(span_ptr, tile, 0, ROWS, PACK)
        lo = tl.load(span, mask=stays, other=0)
        hi = tl.load(span + span_size, mask=stays, other=0)
        gap_lo, gap_hi = lo, lo
        if GAPS:
            gap_lo = tl.load(span + 2 * span_size, mask=stays, other=0)
            gap_hi = tl.load(span + 3 * span_size, mask=stays, other=0)
        seen = sees(lo[None, :], hi[None, :], gap_lo[None, :], gap_hi[None, :], key[:, None], GAPS)
        p = tl.where(seen, p, 0.0)
    if DESCRIBED:
        grad = grad_ptr.load([b, first_head, tile * ROWS, 0]).reshape(ROWS, BLOCK_D)
    else:
        grad = load_rows(row_pointers(grad_ptr, tile, do_n, do_h, ROWS, PACK), stays, BLOCK_D, D, True)
    delta = tl.load(row_numbers(delta_ptr, tile, queries, ROWS, PACK), mask=stays, other=0.0)
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
def own_rows(key, queries, layout, sample):
    """(KEYS,) the query row whose SELF key each key is, -1 where there is none."""
    p0, p1, p2 = key - layout[11], key - layout[16], key - layout[21]
    in0 = (layout[11] >= 0) & (p0 >= 0) & (p0 < layout[7])
    in1 = (layout[16] >= 0) & (p1 >= sample[0]) & (p1 < sample[1]) & (p1 < layout[12])
    in2 = (layout[21] >= 0) & (p2 >= 0) & (p2 < layout[17])
    row = tl.where(in0, p0, tl.where(in1, p1 + layout[7], p2 + layout[7] + layout[12])) - sample[3]
    return tl.where((in0 | in1 | in2) & (row >= 0) & (row < queries), row, -1)


@triton.jit
def _key_gradients(
    tile, b, g, limit, keys, values, grad_keys, grad_values, query_ptr, grad_ptr, rows_ptr, spans_ptr, span_size, q_b,
    q_h, q_n, do_b, do_h, do_n, layout, sample, ok, queries, kv_heads, row_count, seed, threshold, scale, grad_scale,
    keep_scale, PACK: tl.constexpr, BLOCKS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, GAPS: tl.constexpr, OWN: tl.constexpr, APART: tl.constexpr,
    DESCRIBED: tl.constexpr, DROPOUT: tl.constexpr, SIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of one tile of keys and values, from every row that sees it; from ``limit`` on none does.
    Where DESCRIBED, ``query_ptr`` and ``grad_ptr`` are descriptors."""
    num_keys = layout[0] + layout[1] + layout[2] + layout[3]
    start = tile * KEYS
    key = start + tl.arange(0, KEYS)
    exists = key < num_keys
    held = alive(key, fence_of(layout, sample, limit), GAPS)
    k = load_rows(pointers_at(keys, key, APART), held, BLOCK_D, D, True)  # (KEYS, BLOCK_D)
    v = load_rows(pointers_at(values, key, APART), held, BLOCK_D, D, True)  # (KEYS, BLOCK_D)
    dk = tl.zeros([KEYS, BLOCK_D], tl.float32)
    dv = tl.zeros([KEYS, BLOCK_D], tl.float32)
    end = tl.minimum(start + KEYS, num_keys)
    walk = row_walk(start, end, queries, layout, sample, ROWS // PACK, GAPS)
    first_token = layout[7] - sample[3]
    left, right = tl.minimum(sample[0], layout[12]), tl.minimum(sample[1], layout[12])
    padding = first_token + tl.where(left > 0, 0, right), first_token + tl.where(left > 0, left, layout[12])
    own = key
    if OWN:
        own = own_rows(key, queries, layout, sample)
    for block in range(BLOCKS):
        first_head = (g * BLOCKS + block) * PACK
        pivot_ptr = rows_ptr + (b.to(tl.int64) * kv_heads * BLOCKS * PACK + first_head) * queries
        if DESCRIBED:
            head_query, head_grad = query_ptr, grad_ptr
        else:
            head_query, head_grad = (
                head_of(query_ptr, b, first_head, q_b, q_h),
                head_of(grad_ptr, b, first_head, do_b, do_h),
            )
        side = (
            head_query, head_grad, pivot_ptr, pivot_ptr + row_count, spans_ptr + b.to(tl.int64) * queries, span_size,
            q_n, q_h, do_n, do_h,
        )  # fmt: skip
        for i in range(0, open_count(walk)):
            dk, dv = _key_step(
                dk, dv, k, v, key, own, open_tile(i, walk), side, padding, sample[3], queries, first_head, b, seed,
                threshold, scale, keep_scale, ROWS, KEYS, BLOCK_D, D, PACK, GAPS, DESCRIBED, DROPOUT, SIGN, PRECISION,
                "none",
            )  # fmt: skip
        for i in range(0, edge_count(walk)):
            dk, dv = _key_step(
                dk, dv, k, v, key, own, edge_tile(i, walk), side, padding, sample[3], queries, first_head, b, seed,
                threshold, scale, keep_scale, ROWS, KEYS, BLOCK_D, D, PACK, GAPS, DESCRIBED, DROPOUT, SIGN, PRECISION,
                "interval",
            )  # fmt: skip
        if OWN:
            _, own_start, own_end = own_run(own, ROWS // PACK)
            for row_tile in range(own_start, own_end):
                dk, dv = _key_step(
                    dk, dv, k, v, key, own, row_tile, side, padding, sample[3], queries, first_head, b, seed, threshold,
                    scale, keep_scale, ROWS, KEYS, BLOCK_D, D, PACK, GAPS, DESCRIBED, DROPOUT, SIGN, PRECISION, "own",
                )  # fmt: skip
    bad = tl.where(ok, 0.0, float("nan"))  # a sample out of range shows
    dk, dv = dk * (grad_scale * SIGN) + bad, dv * keep_scale + bad
    store_rows(pointers_at(grad_keys, key, APART), dk, exists, BLOCK_D, D)
    store_rows(pointers_at(grad_values, key, APART), dv, exists, BLOCK_D, D)


@triton.jit
def _query_step(
    dq, q, grad, pivot, delta, keys, values, tile, fence, rows, draw, scale, keep_scale, KEYS: tl.constexpr,
    BLOCK_D: tl.constexpr, D: tl.constexpr, GAPS: tl.constexpr, APART: tl.constexpr,
    DESCRIBED: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """A tile of keys adds to the gradients of a tile of queries; MASK as in the forward kernel's."""
    MASKED: tl.constexpr = MASK != "none"
    start = tile * KEYS
    key = start + tl.arange(0, KEYS)
    k = load_keys(keys, start, fence, KEYS, BLOCK_D, D, APART, GAPS, DESCRIBED, MASKED)  # (KEYS, BLOCK_D)
    v = load_keys(values, start, fence, KEYS, BLOCK_D, D, APART, GAPS, DESCRIBED, MASKED)  # (KEYS, BLOCK_D)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # (ROWS, KEYS)
    p = tl.math.exp2(s * scale - pivot[:, None])
    if MASKED:
        p = tl.where(visible(rows, key, MASK, GAPS), p, 0.0)
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
    """Gradients of one tile of packed query rows, from every key they see. The pointers are of the tile's first
    head."""
    query, stays = tile_rows(tile, queries, ROWS, PACK)
    lo, hi, gap_lo, gap_hi, own = rows_of(query, stays, layout, sample, GAPS, OWN)
    limit, walk = key_walk(lo, hi, gap_lo, gap_hi, KEYS, GAPS)
    fence = fence_of(layout, sample, limit)
    seeing = (lo < hi) | (own >= 0)
    q = load_rows(row_pointers(query_ptr, tile, q_n, q_h, ROWS, PACK), seeing, BLOCK_D, D, True)
    if SIGN != 1:
        q = (q.to(tl.float32) * SIGN).to(q.dtype)
    grad = load_rows(row_pointers(grad_ptr, tile, do_n, do_h, ROWS, PACK), seeing, BLOCK_D, D, True)
    first_row = (b.to(tl.int64) * q_heads + first_head) * queries
    pivot_ptr = row_numbers(rows_ptr + first_row, tile, queries, ROWS, PACK)
    pivot = tl.load(pivot_ptr, mask=seeing, other=float("inf"))
    delta = tl.load(pivot_ptr + row_count, mask=seeing, other=0.0)
    draw = (seed, threshold, query + sample[3], first_head + tl.arange(0, ROWS) % PACK, b)
    dq = tl.zeros([ROWS, BLOCK_D], tl.float32)
    rows = (lo, hi, gap_lo, gap_hi, own)
    for i in range(0, open_count(walk)):
        dq = _query_step(
            dq, q, grad, pivot, delta, keys, values, open_tile(i, walk), fence, rows, draw, scale, keep_scale, KEYS,
            BLOCK_D, D, GAPS, APART, DESCRIBED, DROPOUT, PRECISION, "none",
        )  # fmt: skip
    for i in range(0, edge_count(walk)):
        dq = _query_step(
            dq, q, grad, pivot, delta, keys, values, edge_tile(i, walk), fence, rows, draw, scale, keep_scale, KEYS,
            BLOCK_D, D, GAPS, APART, DESCRIBED, DROPOUT, PRECISION, "interval",
        )  # fmt: skip
    if OWN:
        last, own_start, own_end = own_run(own, KEYS)
        fence = fence_of(layout, sample, last)
        for key_tile in range(own_start, own_end):
            dq = _query_step(
                dq, q, grad, pivot, delta, keys, values, key_tile, fence, rows, draw, scale, keep_scale, KEYS, BLOCK_D,
                D, GAPS, APART, DESCRIBED, DROPOUT, PRECISION, "own",
            )  # fmt: skip
    dq = tl.where(seeing[:, None], dq * grad_scale, 0.0) + tl.where(ok, 0.0, float("nan"))
    store_rows(row_pointers(grad_query_ptr, tile, dq_n, dq_h, ROWS, PACK), dq, stays, BLOCK_D, D)


@triton.jit(do_not_specialize=(*SIZES, *STRIDES), do_not_specialize_on_alignment=SAMPLES)
def backward_kernel(
    query_ptr, key_ptr, value_ptr, cache_key_ptr, cache_value_ptr, grad_out_ptr, rows_ptr, spans_ptr, grad_query_ptr,
    grad_key_ptr, grad_value_ptr, grad_cache_key_ptr, grad_cache_value_ptr, token_lengths_ptr, token_starts_ptr,
    cache_starts_ptr, query_start_ptr, seed_ptr, query_blocks, grad_out_blocks, key_blocks, value_blocks,
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
        keys = keys_of(key_ptr, cache_key_ptr, b, g, k_b, k_h, k_n, ck_b, ck_h, ck_n, cache)
        values = keys_of(value_ptr, cache_value_ptr, b, g, v_b, v_h, v_n, cv_b, cv_h, cv_n, cache)
        grad_keys = keys_of(grad_key_ptr, grad_cache_key_ptr, b, g, dk_b, dk_h, dk_n, dck_b, dck_h, dck_n, cache)
        grad_values = keys_of(grad_value_ptr, grad_cache_value_ptr, b, g, dv_b, dv_h, dv_n, dcv_b, dcv_h, dcv_n, cache)
        sample, ok = sample_of(
            b, queries, layout, token_lengths_ptr, token_starts_ptr, cache_starts_ptr, query_start_ptr
        )  # fmt: skip
        limit = key_limit(queries, layout, sample, query_start_ptr)
        if DESCRIBED:
            walked_query, walked_grad = query_blocks, grad_out_blocks
        else:
            walked_query, walked_grad = query_ptr, grad_out_ptr
        _key_gradients(
            tile, b, g, limit, keys, values, grad_keys, grad_values, walked_query, walked_grad, rows_ptr, spans_ptr,
            heads // kv_heads * queries.to(tl.int64), q_b, q_h, q_n, do_b, do_h, do_n, layout, sample, ok, queries,
            kv_heads, row_count, seed, threshold, scale, grad_scale, keep_scale, PACK, BLOCKS, D, BLOCK_D, KEY_ROWS,
            KEY_KEYS, GAPS, OWN, APART, DESCRIBED, DROPOUT, SIGN, PRECISION,
        )  # fmt: skip
    else:
        if PART == "both":
            pid -= key_programs
        tile, unit = place(pid, row_tiles, heads * BLOCKS, together, True)
        b, g, first_head = unit // (kv_heads * BLOCKS), unit // BLOCKS % kv_heads, unit % (kv_heads * BLOCKS) * PACK
        if DESCRIBED:
            walked_keys, walked_values = (key_blocks, b, g), (value_blocks, b, g)
        else:
            walked_keys = keys_of(key_ptr, cache_key_ptr, b, g, k_b, k_h, k_n, ck_b, ck_h, ck_n, cache)
            walked_values = keys_of(value_ptr, cache_value_ptr, b, g, v_b, v_h, v_n, cv_b, cv_h, cv_n, cache)
        sample, ok = sample_of(
            b, queries, layout, token_lengths_ptr, token_starts_ptr, cache_starts_ptr, query_start_ptr
        )  # fmt: skip
        _query_gradients(
            tile, b, first_head, walked_keys, walked_values, head_of(query_ptr, b, first_head, q_b, q_h),
            head_of(grad_out_ptr, b, first_head, do_b, do_h), rows_ptr,
            head_of(grad_query_ptr, b, first_head, dq_b, dq_h), q_h, q_n, do_h, do_n, dq_h, dq_n, layout, sample, ok,
            queries, kv_heads * BLOCKS * PACK, row_count, seed, threshold, scale, grad_scale, keep_scale, PACK, D,
            BLOCK_D, QUERY_ROWS, QUERY_KEYS, GAPS, OWN, APART, DESCRIBED, DROPOUT, SIGN, PRECISION,
        )  # fmt: skip
