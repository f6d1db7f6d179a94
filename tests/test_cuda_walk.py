"""The tiles of keys that a tile of rows visits in the CUDA kernels (csrc/layout.h), against the dense mask."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from rmt_kernels import Region, Rule, SegmentLayout
from rmt_kernels.backends import cuda
from rmt_kernels.reference import segment_mask
from tests.draws import PRESETS, free_layout, preset_layout, tile_straddling
from tests.emulation import needs_module

pytestmark = needs_module
SIZES = (16, 64, 128)


@dataclass
class Sample:
    """One sample's padding and place; None: not given."""

    token_lengths: int | None = None
    token_starts: int | None = None
    cache_starts: int | None = None
    query_start: int | None = None

    def numbers(self, layout: SegmentLayout) -> tuple[int, int, int, int]:
        """As csrc/layout.h has them: token_begin, token_end, cache_begin, query_start."""
        given = self.token_starts, self.token_lengths, self.cache_starts, self.query_start
        otherwise = 0, layout.tokens, 0, -1
        begin, end, cache, start = (o if n is None else n for n, o in zip(given, otherwise, strict=True))
        return begin, end, cache, start

    def mask(self, layout: SegmentLayout) -> tuple[Tensor, Tensor]:
        """What is seen, (queries, keys), and each query's row among all rows of the layout."""
        given: dict[str, Any] = {n: None if v is None else torch.tensor([v]) for n, v in vars(self).items()}
        mask, rows = segment_mask(layout, 1, torch.device("cpu"), **given)
        return mask[0], rows[0]


def sampled(rng: random.Random, layout: SegmentLayout) -> tuple[SegmentLayout, Sample]:
    """The layout, some of its rows, or one that decodes; and a sample of it."""
    sample = Sample()
    if layout.forms[1].rows and rng.random() < 0.2:
        layout = layout.decoding(rng.randint(1, layout.tokens))
        sample.query_start = rng.randint(0, layout.tokens - layout.num_queries)
    elif layout.num_queries and rng.random() < 0.2:
        layout = layout.last(rng.randint(1, layout.num_queries))
    padding = rng.choice(("", "token_lengths", "token_starts"))
    if padding:
        setattr(sample, padding, rng.randint(0, layout.tokens))
    if rng.random() < 0.4:
        sample.cache_starts = rng.randint(0, layout.key_size("cache"))
    return layout, sample


def check_walk(layout: SegmentLayout, sample: Sample, rows: int, keys: int) -> int:
    """Compare every tile; returns how many were visited though no row sees a key of theirs."""
    mask, layout_rows = sample.mask(layout)
    sizes = torch.tensor([form.rows for form in layout.forms])
    regions = torch.bucketize(layout_rows, sizes.cumsum(0), right=True)
    own = torch.tensor([form.own for form in layout.forms])[regions]
    own = torch.where(own < 0, -1, own + layout_rows - (sizes.cumsum(0) - sizes)[regions])
    slides = layout.window is not None
    vain = 0
    for first in range(0, layout.num_queries, rows):
        found = cuda.module.walk(layout.ints, sample.numbers(layout), first, rows, keys)
        visits = dict(found)
        assert [tile for tile, _ in found] == sorted(visits), "each tile once, in order"
        assert not visits or max(visits) * keys < layout.num_keys
        block = mask[first : first + rows]
        seeing = block.any(dim=1)  # the results of rows that see nothing are replaced
        live = block[seeing]
        of_live = regions[first : first + rows][seeing]
        seen = live.any(dim=0)
        for tile in range(-(-layout.num_keys // keys)):
            begin, end = tile * keys, (tile + 1) * keys
            at = f"{layout!r}, {sample}, rows from {first}, tiles of {rows} x {keys}, tile {tile}"
            any_seen = bool(seen[begin:end].any())
            all_seen = bool(live[:, begin:end].all()) and any_seen and end <= layout.num_keys
            if tile not in visits:
                assert not any_seen, f"left out: {at}"
                continue
            if not any_seen:
                vain += 1
                assert seen[:begin].any(), f"nothing before it is seen: {at}"
                assert seen[end:].any(), f"nothing behind it is seen: {at}"
                # Of one region, rows' keys follow on from each other; but a window may have left the cache behind for
                # some rows, which then have no gap where padded tokens are.
                assert len(of_live.unique()) > 1 or (slides and sample.token_starts), f"in vain: {at}"
            if visits[tile]:
                assert all_seen, f"without a mask: {at}"
            elif all_seen:
                # A row's own key is taken to be apart from the others, and gaps of different rows for one.
                own_here = ((own[first : first + rows] >= begin) & (own[first : first + rows] < end)).any()
                gaps_differ = slides and sample.token_lengths is not None
                assert own_here or gaps_differ, f"masked needlessly: {at}"
    return vain


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name: str) -> None:
    rng = random.Random(f"walk {name}")
    for rows, keys in product(SIZES, SIZES):
        for _ in range(5):
            layout, sample = sampled(rng, PRESETS[name](tile_straddling(rng)))
            check_walk(layout, sample, rows, keys)


def check_drawn(numbers: range) -> None:
    for number in numbers:
        rng = random.Random(f"walk {number}")
        layout, sample = sampled(rng, free_layout(rng) if rng.random() < 0.7 else preset_layout(rng))
        check_walk(layout, sample, rng.choice(SIZES), rng.choice(SIZES))


@pytest.mark.parametrize("block", range(10))
def test_drawn(block: int) -> None:
    check_drawn(range(100 * block, 100 * (block + 1)))


@pytest.mark.slow
def test_drawn_many() -> None:
    check_drawn(range(1000, 20_000))


@pytest.mark.parametrize("sample", [Sample(), Sample(token_lengths=70), Sample(token_starts=130)], ids=str)
def test_nothing_is_visited_in_vain_in_the_papers_layouts(sample: Sample) -> None:
    """Hidden tiles cost as much as seen ones: none is visited in the published masks, padded or not."""
    for layout in (
        SegmentLayout.rmt_decoder(200, 16), SegmentLayout.causal(200, 16), SegmentLayout.rmt_encoder(200, 16),
        SegmentLayout.transformer_xl(150, 150, window=150), SegmentLayout.rmt_decoder(200, 16, cache=100),
        SegmentLayout.memory_bottleneck(200, 16, step="read"), SegmentLayout.memformer_write(200, 70),
        SegmentLayout.membart(200, 64),
    ):  # fmt: skip
        for rows, keys in product(SIZES, SIZES):
            vain = check_walk(layout, sample, rows, keys)
            assert vain == 0 or (layout.window and sample.token_starts), layout  # see check_walk


def test_of_own_keys_only_those_between_two_rows() -> None:
    """Rows that see themselves alone visit the tiles of their own keys, with a mask."""
    layout = SegmentLayout(
        cache=100, tokens=300, rules={("tokens", "tokens"): Rule.SELF}, queries=(Region.TOKENS,)
    )  # fmt: skip
    for first in range(0, 300, 64):
        found = cuda.module.walk(layout.ints, Sample().numbers(layout), first, 64, 16)
        last = min(300, first + 64) - 1
        assert found == [(tile, False) for tile in range((100 + first) // 16, (100 + last) // 16 + 1)]
