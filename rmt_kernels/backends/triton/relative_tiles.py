"""Distance-dependent scores in tiles: what the relative kernels share.

The key j of a row whose own key is o lies at entry ``j - o + reach`` of the tables. Rows are counted so that own keys
follow one another: ``own = row + first + shift``, whatever regions a tile straddles (see ``placed``). So row r and key
c of a tile are at entry ``c - r + ROWS - 1`` of the tile's *window*: WIDTH entries, of which ROWS + KEYS - 1 are used.
The products of the tile's rows with the window are one matrix product; ``picked`` then takes each score from it.

That goes through shared memory: 4 * ROWS * WIDTH bytes are written once and 4 * ROWS * KEYS read once. A scratch buffer
in global memory would move as much through L2, behind the back of a compiler that may issue loads before stores, and
shuffles between registers take several for an element and two changes of layout more.
"""

import triton
import triton.language as tl

from rmt_kernels.backends.triton.tiles import head_of, load_rows

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def placed(tile, rows, layout, sample, hole, ROWS: tl.constexpr):
    """``(row, query, stays)`` of each row of a tile. READ and WRITE may hold queries where TOKENS between them holds
    keys only: rows count those as a ``hole`` of rows that are not there, so that own keys follow one another."""
    row = tile * ROWS + tl.arange(0, ROWS)
    behind = row + sample[3] >= layout[7] + hole
    query = row - tl.where(behind, hole, 0)
    return row, query, (row < rows) & (behind | (row + sample[3] < layout[7]) | (hole == 0))


@triton.jit
def rows_at(base, query, stride_n):
    """(ROWS,) pointers to rows of a head, whose stride counts units of 16 bytes."""
    UNIT: tl.constexpr = 128 // base.dtype.element_ty.primitive_bitwidth
    return base + query.to(tl.int64) * (stride_n * UNIT)


@triton.jit
def draw_of(chance, query, sample):
    """What ``tiles.kept`` needs of the rows of a head. ``chance`` is ``(seed, threshold, head, batch)``."""
    seed, threshold, head, b = chance
    return seed, threshold, query + sample[3], head + tl.zeros_like(query), b


@triton.jit
def table_of(tables, head):
    """A head's ``table``, as the functions below take it: the address of its ``relative_key`` and the stride of that,
    the address of its ``relative_bias``, the number of entries, ``reach`` and ``origin``. ``tables`` has each tensor's
    pointer and strides in place of an address."""
    entries_ptr, rk_h, rk_n, bias_ptr, bias_h, offsets, reach, origin = tables
    entries = head_of(entries_ptr, head, head, 0, rk_h)
    return entries, rk_n, bias_ptr + head.to(tl.int64) * bias_h, offsets, reach, origin


@triton.jit
def window_start(table, start, first_row, ROWS: tl.constexpr):
    """The first entry of the window of a tile, given its first key and its first row's place in the layout."""
    return start - first_row - (ROWS - 1) + table[5]


@triton.jit
def biased(q, bias_ptr, head, bias_h, BLOCK_D: tl.constexpr, D: tl.constexpr, GIVEN: tl.constexpr):
    """Queries with their head's bias added, where one is given."""
    if GIVEN:
        UNIT: tl.constexpr = 128 // bias_ptr.dtype.element_ty.primitive_bitwidth
        o_d = tl.arange(0, BLOCK_D)
        bias = tl.load(bias_ptr + head.to(tl.int64) * (bias_h * UNIT) + o_d, mask=o_d < D, other=0.0)
        return (q.to(tl.float32) + bias.to(tl.float32)[None, :]).to(q.dtype)
    else:
        return q


@triton.jit
def picked(x, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """(M, N) ``x[row, column]`` of a (ROWS, COLUMNS) tile, for (M, N) indices in range.

    The tile lies in shared memory with 8 rows side by side. A warp holds 8 rows and 8 columns of a product at a time:
    so it stores them, and reads them along a diagonal, with two lanes to a bank. One row after another it would be 8
    and 4.
    """
    eights = tl.permute(tl.reshape(x, [ROWS // 8, 8, COLUMNS]), (0, 2, 1))
    place = (row & -8) * COLUMNS + (row & 7) + 8 * column
    found = tl.gather(tl.reshape(eights, [ROWS * COLUMNS]), tl.reshape(place, [M * N]), 0)
    return tl.reshape(found, [M, N])


@triton.jit
def load_entries(table, first, COUNT: tl.constexpr, BLOCK_D: tl.constexpr, D: tl.constexpr):
    """(COUNT, BLOCK_D) rows of the head's ``relative_key`` from an entry on; zeros where there are none."""
    base, stride, _, size, _, _ = table
    entry = first + tl.arange(0, COUNT)
    return load_rows(rows_at(base, entry, stride), (entry >= 0) & (entry < size), BLOCK_D, D, True)


@triton.jit
def load_biases(table, first, COUNT: tl.constexpr):
    """(COUNT,) the head's ``relative_bias`` from an entry on, as exponents of 2; zeros where there is none."""
    _, _, base, size, _, _ = table
    entry = first + tl.arange(0, COUNT)
    return tl.load(base + entry, mask=(entry >= 0) & (entry < size), other=0.0) * LOG2E


@triton.jit
def biases(table, first, ROWS: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, TURNED: tl.constexpr):
    """(ROWS, KEYS) ``relative_bias`` of a tile whose window starts at an entry, as exponents of 2; (KEYS, ROWS) where
    TURNED."""
    window = load_biases(table, first, WIDTH)
    row, key = tl.arange(0, ROWS), tl.arange(0, KEYS)
    if TURNED:
        place = key[:, None] - row[None, :] + (ROWS - 1)
        return tl.reshape(tl.gather(window, tl.reshape(place, [KEYS * ROWS]), 0), [KEYS, ROWS])
    else:
        place = key[None, :] - row[:, None] + (ROWS - 1)
        return tl.reshape(tl.gather(window, tl.reshape(place, [ROWS * KEYS]), 0), [ROWS, KEYS])


@triton.jit
def products(
    position, following, entries, first, reach, ROWS: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr,
    SHIFTED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(ROWS, KEYS) products of the rows with the tile's entries of the window; where SHIFTED those of keys ahead are
    the next rows', ``following``."""
    p = tl.dot(position, tl.trans(entries), input_precision=PRECISION)  # (ROWS, WIDTH)
    if SHIFTED:
        ahead = first + tl.arange(0, WIDTH) > reach
        p = tl.where(ahead[None, :], tl.dot(following, tl.trans(entries), input_precision=PRECISION), p)
    row, key = tl.arange(0, ROWS)[:, None], tl.arange(0, KEYS)[None, :]
    return picked(p, row + 0 * key, key - row + (ROWS - 1), ROWS, WIDTH, ROWS, KEYS)


@triton.jit
def turned_products(
    position, following, entries, first, reach, ROWS: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr,
    SHIFTED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """As ``products``, (KEYS, ROWS)."""
    p = tl.dot(entries, tl.trans(position), input_precision=PRECISION)  # (WIDTH, ROWS)
    if SHIFTED:
        ahead = first + tl.arange(0, WIDTH) > reach
        p = tl.where(ahead[:, None], tl.dot(entries, tl.trans(following), input_precision=PRECISION), p)
    row, key = tl.arange(0, ROWS)[None, :], tl.arange(0, KEYS)[:, None]
    return picked(p, key - row + (ROWS - 1), row + 0 * key, WIDTH, ROWS, KEYS, ROWS)


@triton.jit
def scores(
    q, k, table, first, factor, ROWS: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
    D: tl.constexpr, HAS_KEY: tl.constexpr, HAS_BIAS: tl.constexpr, SHIFTED: tl.constexpr, PRECISION: tl.constexpr,
    TURNED: tl.constexpr,
):  # fmt: skip
    """``(s, entries)`` of a tile: its scores as exponents of 2, (ROWS, KEYS) or where TURNED (KEYS, ROWS), and its
    window's rows of ``relative_key``, (WIDTH, BLOCK_D), for which ``k`` stands in where there is none. ``q`` is of
    ``query_rows``, and the window starts at ``first``."""
    content, position, following = q
    left, right = content, k
    if TURNED:
        left, right = k, content
    entries = k
    if HAS_KEY:
        entries = load_entries(table, first, WIDTH, BLOCK_D, D)
        if TURNED:
            s = turned_products(position, following, entries, first, table[4], ROWS, KEYS, WIDTH, SHIFTED, PRECISION)
        else:
            s = products(position, following, entries, first, table[4], ROWS, KEYS, WIDTH, SHIFTED, PRECISION)
        s = tl.dot(left, tl.trans(right), s, input_precision=PRECISION)
    else:
        s = tl.dot(left, tl.trans(right), input_precision=PRECISION)
    s = s * factor
    if HAS_BIAS:
        s += biases(table, first, ROWS, KEYS, WIDTH, TURNED)
    return s, entries


@triton.jit
def along_window(ds, ROWS: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr):
    """(ROWS, WIDTH) a tile's (ROWS, KEYS) values, each at its entry of the window; zeros between them."""
    row, place = tl.arange(0, ROWS)[:, None], tl.arange(0, WIDTH)[None, :]
    key = place + row - (ROWS - 1)
    inside = (key >= 0) & (key < KEYS)
    return tl.where(inside, picked(ds, row + 0 * key, tl.where(inside, key, 0), ROWS, KEYS, ROWS, WIDTH), 0.0)


@triton.jit
def walked_rows(side, tile, GAPS: tl.constexpr, ROWS: tl.constexpr):
    """``(row, query, stays)`` of a tile of rows that a program walks; those of padding, which may hold anything, do not
    stay where it may have any."""
    layout, sample, rows, hole = side
    row, query, stays = placed(tile, rows, layout, sample, hole, ROWS)
    if GAPS:
        position = row + sample[3] - layout[7]
        token = (position >= 0) & (position < layout[12])
        stays = stays & ((token == 0) | ((position >= sample[0]) & (position < sample[1])))
    return row, query, stays


@triton.jit
def source_of(given, b, head):
    """A head's ``source``, as the functions below take it: ``(content, position, grads, pivot_ptr, delta_ptr, spans,
    queries)``. The first three are ``(address, stride)`` of its queries with ``content_bias``, of those with
    ``position_bias``, and of its rows of grad_out; ``spans`` is the address of its sample's and how far apart its four
    numbers lie."""
    content, position, grads, rows_ptr, row_count, spans_ptr, span_size, heads, queries = given
    pivot_ptr = rows_ptr + (b.to(tl.int64) * heads + head) * queries
    spans = (spans_ptr + b.to(tl.int64) * queries, span_size)
    return (
        _of_head(content, b, head), _of_head(position, b, head), _of_head(grads, b, head), pivot_ptr,
        pivot_ptr + row_count, spans, queries,
    )  # fmt: skip


@triton.jit
def _of_head(tensor, b, head):
    """``(address, stride)`` of a head's rows in ``(pointer, *strides)``."""
    base, stride_b, stride_h, stride_n = tensor
    return head_of(base, b, head, stride_b, stride_h), stride_n


@triton.jit
def head_rows(head, query, stays, BLOCK_D: tl.constexpr, D: tl.constexpr):
    """(ROWS, BLOCK_D) rows of a head's ``(address, stride)``; zeros where they do not stay."""
    base, stride = head
    return load_rows(rows_at(base, query, stride), stays, BLOCK_D, D, True)


@triton.jit
def seeing_rows(source, query):
    """Which rows are there and see something. Others, which padding may have filled, count as zeros to the row before
    them."""
    _, _, _, pivot_ptr, _, _, queries = source
    return tl.load(pivot_ptr + query, mask=query < queries, other=float("inf")) != float("inf")


@triton.jit
def query_rows(
    source, query, stays, BLOCK_D: tl.constexpr, D: tl.constexpr, BIASED: tl.constexpr, SHIFTED: tl.constexpr
):
    """``(content, position, following)`` of a tile of rows, (ROWS, BLOCK_D) each: queries as they meet the keys, as
    they meet ``relative_key``, which differs where BIASED, and the next rows' where SHIFTED."""
    content_rows, position_rows, _, _, _, _, _ = source
    content = head_rows(content_rows, query, stays, BLOCK_D, D)
    position = content
    if BIASED:
        position = head_rows(position_rows, query, stays, BLOCK_D, D)
    following = position
    if SHIFTED:  # which has no hole
        following = head_rows(position_rows, query + 1, seeing_rows(source, query + 1), BLOCK_D, D)
    return content, position, following


@triton.jit
def spans_read(source, query, stays, GAPS: tl.constexpr):
    """``(lo, hi, gap_lo, gap_hi)`` of rows, as ``prepare_kernel`` stored them."""
    span_ptr, span_size = source[5]
    lo = tl.load(span_ptr + query, mask=stays, other=0)
    hi = tl.load(span_ptr + span_size + query, mask=stays, other=0)
    gap_lo, gap_hi = lo, lo
    if GAPS:
        gap_lo = tl.load(span_ptr + 2 * span_size + query, mask=stays, other=0)
        gap_hi = tl.load(span_ptr + 3 * span_size + query, mask=stays, other=0)
    return lo, hi, gap_lo, gap_hi
