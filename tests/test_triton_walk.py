"""The tiles that a program of the Triton kernels visits, against the dense mask."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from rmt_kernels import SegmentLayout
from rmt_kernels.backends.triton.tiles import rows_of, sample_of, tile_rows
from rmt_kernels.backends.triton.walk import edge_count, edge_tile, key_walk, open_count, open_tile, row_walk
from rmt_kernels.reference import segment_mask
from tests.draws import free_layout, preset_layout
from tests.interpreter import INTERPRETED

DEVICE = "cpu" if INTERPRETED else "cuda"
OPEN, EDGE = 1, 2


@triton.jit
def _mark(walk, seen_ptr):
    """Count the visits of each tile: 1 for one without a mask, 2 for one with."""
    for i in range(0, open_count(walk)):
        tile = open_tile(i, walk)
        tl.store(seen_ptr + tile, tl.load(seen_ptr + tile) + 1)
    for i in range(0, edge_count(walk)):
        tile = edge_tile(i, walk)
        tl.store(seen_ptr + tile, tl.load(seen_ptr + tile) + 2)


@triton.jit
def _walk(
    layout_ptr, seen_ptr, token_lengths_ptr, token_starts_ptr, cache_starts_ptr, query_start_ptr, queries, keys, tiles,
    ROWS: tl.constexpr, KEYS: tl.constexpr, GAPS: tl.constexpr, OF_KEYS: tl.constexpr,
):  # fmt: skip
    layout = (
        tl.load(layout_ptr), tl.load(layout_ptr + 1), tl.load(layout_ptr + 2), tl.load(layout_ptr + 3),
        tl.load(layout_ptr + 4), tl.load(layout_ptr + 5), tl.load(layout_ptr + 6), tl.load(layout_ptr + 7),
        tl.load(layout_ptr + 8), tl.load(layout_ptr + 9), tl.load(layout_ptr + 10), tl.load(layout_ptr + 11),
        tl.load(layout_ptr + 12), tl.load(layout_ptr + 13), tl.load(layout_ptr + 14), tl.load(layout_ptr + 15),
        tl.load(layout_ptr + 16), tl.load(layout_ptr + 17), tl.load(layout_ptr + 18), tl.load(layout_ptr + 19),
        tl.load(layout_ptr + 20), tl.load(layout_ptr + 21),
    )  # fmt: skip
    tile = tl.program_id(0)
    sample, _ = sample_of(
        0, queries, layout, token_lengths_ptr, token_starts_ptr, cache_starts_ptr, query_start_ptr
    )  # fmt: skip
    if OF_KEYS:
        start = tile * KEYS
        _mark(
            row_walk(start, tl.minimum(start + KEYS, keys), queries, layout, sample, ROWS, GAPS),
            seen_ptr + tile * tiles,
        )
    else:
        query, stays = tile_rows(tile, queries, ROWS, 1)
        lo, hi, gap_lo, gap_hi, _ = rows_of(query, stays, layout, sample, GAPS, False)
        _, walk = key_walk(lo, hi, gap_lo, gap_hi, KEYS, GAPS)
        _mark(walk, seen_ptr + tile * tiles)


def walked(layout: SegmentLayout, given: dict[str, Tensor | None], rows: int, keys: int, of_keys: bool) -> Tensor:
    """(row tiles, key tiles): 0 where no program goes, OPEN, EDGE, or more where one goes twice."""
    row_tiles, key_tiles = -(-layout.num_queries // rows), -(-layout.num_keys // keys)
    programs, tiles = (key_tiles, row_tiles) if of_keys else (row_tiles, key_tiles)
    seen = torch.zeros(programs, max(tiles, 1), dtype=torch.int32, device=DEVICE)
    gaps = layout.window is not None or given["token_lengths"] is not None or given["token_starts"] is not None
    ints = torch.tensor(layout.ints, dtype=torch.int32, device=DEVICE)
    if programs:
        _walk[(programs,)](
            ints, seen, *given.values(), layout.num_queries, layout.num_keys, max(tiles, 1), rows, keys, gaps, of_keys
        )
    return (seen.T if of_keys else seen).cpu()


def without_own(layout: SegmentLayout) -> SegmentLayout:
    """Without its SELF rules: own keys are seen outside the walk."""
    from rmt_kernels import Rule

    rules = [Rule.NONE if rule is Rule.SELF else rule for rule in layout.rules]
    return replace(layout, rules=tuple(rules))  # type: ignore[arg-type]


def draw(number: int) -> tuple[SegmentLayout, dict[str, Tensor | None], int, int]:
    rng = random.Random(f"walk {number}")
    layout = without_own(preset_layout(rng) if rng.random() < 0.6 else free_layout(rng))
    start = layout.tokens > 0 and rng.random() < 0.2
    if start:
        layout = layout.decoding(rng.randint(1, layout.tokens))
    elif layout.num_queries and rng.random() < 0.2:
        layout = layout.last(rng.randint(1, layout.num_queries))

    def one(most: int, wanted: bool) -> Tensor | None:
        return torch.tensor([rng.randint(0, most)], dtype=torch.int32, device=DEVICE) if wanted else None

    padding = rng.choice(("", "right", "left"))
    given = {
        "token_lengths": one(layout.tokens, padding == "right"),
        "token_starts": one(layout.tokens, padding == "left"),
        "cache_starts": one(layout.key_size("cache"), rng.random() < 0.3),
        "query_start": one(layout.tokens - layout.num_queries, start),
    }
    return layout, given, rng.choice((16, 32, 64)), rng.choice((16, 32, 64))


@pytest.mark.parametrize("of_keys", [False, True], ids=["rows", "keys"])
@pytest.mark.parametrize("number", range(60))
def test_each_tile_is_visited_once_where_a_row_sees_a_key(number: int, of_keys: bool) -> None:
    layout, given, rows, keys = draw(number)
    if layout.num_queries == 0 or layout.num_keys == 0:
        pytest.skip("no tiles")
    host = {name: None if value is None else value.cpu() for name, value in given.items()}
    mask, _ = segment_mask(layout, 1, torch.device("cpu"), **host)
    seen = walked(layout, given, rows, keys, of_keys)
    for i in range(seen.shape[0]):
        block_rows = mask[0, i * rows : (i + 1) * rows]
        live = block_rows[block_rows.any(dim=1)]  # the results of rows that see nothing are replaced
        for j in range(seen.shape[1]):
            block = (block_rows if of_keys else live)[:, j * keys : (j + 1) * keys]
            visit = int(seen[i, j])
            at = f"{layout.show()}\n{given} rows {rows} keys {keys} tile {i}, {j}: {visit}"
            assert visit in (0, OPEN, EDGE), f"visited twice: {at}"
            if visit == 0:
                assert not block.any(), f"left out: {at}"
            # A tile that reaches beyond the keys needs a mask, too.
            if visit == OPEN:
                assert block.all(), f"without a mask: {at}"
                assert (j + 1) * keys <= layout.num_keys or of_keys, at


def test_nothing_is_visited_in_vain_in_the_papers_layouts() -> None:
    """Hidden tiles cost as much as seen ones: none is visited in the published masks, padded or not."""
    for layout in (
        SegmentLayout.rmt_decoder(200, 16), SegmentLayout.causal(200, 16), SegmentLayout.rmt_encoder(200, 16),
        SegmentLayout.transformer_xl(150, 150, window=150), SegmentLayout.rmt_decoder(200, 16, cache=100),
        SegmentLayout.memory_bottleneck(200, 16, step="read"),
    ):  # fmt: skip
        for name, value in (("token_lengths", None), ("token_lengths", 70), ("token_starts", 130)):
            given: dict[str, Tensor | None] = dict.fromkeys(
                ("token_lengths", "token_starts", "cache_starts", "query_start")
            )
            given[name] = None if value is None else torch.tensor([value], dtype=torch.int32, device=DEVICE)
            host = {n: None if v is None else v.cpu() for n, v in given.items()}
            mask, _ = segment_mask(layout, 1, torch.device("cpu"), **host)
            for of_keys in (False, True):
                seen = walked(layout, given, 16, 16, of_keys)
                vain = 0
                for i in range(seen.shape[0]):
                    for j in range(seen.shape[1]):
                        vain += bool(seen[i, j]) and not mask[0, i * 16 : i * 16 + 16, j * 16 : j * 16 + 16].any()
                assert vain == 0, f"{vain} of {int((seen > 0).sum())} tiles: {layout} {given} {of_keys}"
