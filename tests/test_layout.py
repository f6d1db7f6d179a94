"""SegmentLayout: the closed form of every row against the table of rules, entry by entry."""

from __future__ import annotations

import copy
import pickle
import random
from dataclasses import FrozenInstanceError, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rmt_kernels import Region, Rule, SegmentLayout
from rmt_kernels.backends import cpu
from rmt_kernels.reference import segment_mask
from tests.draws import PRESETS, free_layout, free_table, preset_layout, tile_straddling

NONE, FULL, CAUSAL, SELF = Rule.NONE, Rule.FULL, Rule.CAUSAL, Rule.SELF
MEMORY_SIZES = (0, 1, 2, 7)


def from_table(table: dict[str, Any], with_own: bool = True) -> dict[str, np.ndarray[Any, Any]]:
    """Each query region's mask (rows, keys) by the definition of the rules, one entry at a time."""
    masks = {}
    for query in table["queries"]:
        mask = np.zeros((table[query], sum(table[key] for key in table["keys"])), dtype=bool)
        for i in range(table[query]):
            column = 0
            for key in ("cache", "read", "tokens", "write"):
                if key not in table["keys"]:
                    continue
                rule = table["rules"].get((query, key), NONE)
                for j in range(table[key]):
                    seen = rule is FULL or (rule is CAUSAL and j <= i) or (rule is SELF and j == i and with_own)
                    if table["window"] is not None and query == "tokens" and key in ("cache", "tokens"):
                        cache = table["cache"] if "cache" in table["keys"] else 0
                        position = j if key == "cache" else cache + j
                        seen = seen and cache + i - position < table["window"]
                    mask[i, column] = seen
                    column += 1
        masks[query] = mask
    return masks


def runs(row: np.ndarray[Any, Any]) -> int:
    """Number of runs of True."""
    return int(np.count_nonzero(np.diff(np.concatenate([[0], row.astype(np.int8)])) == 1))


def closed_form(layout: SegmentLayout) -> Tensor:
    """The mask that intervals, gaps and own keys describe."""
    keys = torch.arange(layout.num_keys)
    intervals, gaps, own = layout.intervals(), layout.gaps(), layout.own_keys()
    seen = (keys >= intervals[:, :1]) & (keys < intervals[:, 1:])
    return seen & ~((keys >= gaps[:, :1]) & (keys < gaps[:, 1:])) | (keys == own[:, None])


def assert_closed_form_is_the_table(layout: SegmentLayout) -> None:
    mask = layout.dense_mask()
    assert mask.shape == (layout.num_queries, layout.num_keys)
    assert torch.equal(closed_form(layout), mask)
    assert layout.visible() == int(mask.sum())
    lo, hi = layout.intervals().unbind(1)
    gap_lo, gap_hi = layout.gaps().unbind(1)
    own = layout.own_keys()
    assert ((lo >= 0) & (lo <= hi) & (hi <= layout.num_keys)).all()
    inside = (lo < gap_lo) & (gap_lo < gap_hi) & (gap_hi < hi)
    assert (inside | (gap_lo == gap_hi)).all(), "a gap lies strictly inside its interval or is empty"
    assert not ((own >= lo) & (own < hi)).any(), "a row's own key is not counted twice"


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name: str) -> None:
    for memory in MEMORY_SIZES:
        for tokens in (0, 1, 2, 9):
            sizes = iter((tokens, memory, 3, 2, 5))
            assert_closed_form_is_the_table(PRESETS[name](lambda most, sizes=sizes: next(sizes)))  # type: ignore[misc]
    for number in range(10):
        assert_closed_form_is_the_table(PRESETS[name](tile_straddling(random.Random(number))))


@pytest.mark.parametrize("block", range(8))
def test_free_tables(block: int) -> None:
    """Accepted: the closed form is the table. Refused: some row really sees two runs of keys."""
    accepted = 0
    for number in range(100 * block, 100 * (block + 1)):
        rng = random.Random(number)
        table = free_table(rng, lambda most, rng=rng: rng.choice((0, 1, 1, 2, 3, 6)))  # type: ignore[misc]
        masks = from_table(table)
        unwindowed = {**table, "window": None}
        broken = [
            query
            for query, without_own in from_table(unwindowed, with_own=False).items()
            if any(runs(row) > 1 for row in without_own)
            # One SELF row may be read as FULL.
            and not (table[query] == 1 and all(runs(row) <= 1 for row in from_table(unwindowed)[query]))
        ]
        if broken:
            with pytest.raises(ValueError, match=f"({'|'.join(broken).upper()}) row 0"):
                SegmentLayout(**table)
            continue
        layout = SegmentLayout(**table)
        accepted += 1
        assert np.array_equal(layout.dense_mask().numpy(), np.concatenate(list(masks.values()))), number
        assert_closed_form_is_the_table(layout)
    assert 10 < accepted < 90


@pytest.mark.skipif(bool(cpu.why_missing), reason=cpu.why_missing)
@pytest.mark.parametrize("block", range(4))
def test_rows_of_the_compiled_kernels(block: int) -> None:
    """csrc/layout.h computes each row of each sample as the reference does, padding and decoding included."""
    for number in range(100 * block, 100 * (block + 1)):
        rng = random.Random(number)
        layout = free_layout(rng) if number % 2 else preset_layout(rng)
        start = -1
        if number % 3 == 0 and layout.tokens and Region.TOKENS in layout.queries:
            layout = layout.decoding(rng.randint(1, layout.tokens))
            start = rng.randint(0, layout.tokens - layout.num_queries)
        elif number % 3 == 1:
            layout = layout.last(rng.randint(0, layout.num_queries))
        begin, end = rng.choice(((0, layout.tokens), (rng.randint(0, layout.tokens), layout.tokens),
                                 (0, rng.randint(0, layout.tokens))))  # fmt: skip
        stale = rng.randint(0, layout.cache)

        def sample(value: int) -> Tensor:
            return torch.tensor([value])

        mask, _ = segment_mask(
            layout, 1, torch.device("cpu"), sample(end), sample(begin), sample(stale),
            sample(start) if start >= 0 else None,
        )  # fmt: skip
        from rmt_kernels import _cpu

        found = torch.tensor(_cpu.rows(list(layout.ints), begin, end, stale, start)).reshape(-1, 5)
        lo, hi, gap_lo, gap_hi, own = found[:, :, None].unbind(1)
        keys = torch.arange(layout.num_keys)
        seen = ((keys >= lo) & (keys < hi) & ~((keys >= gap_lo) & (keys < gap_hi))) | (keys == own)
        assert torch.equal(seen, mask[0]), f"{number}: {layout!r} {begin} {end} {stale} {start}"


# -- published intervals (RMT, arXiv 2207.06881) -----------------------------------------------------------------------


@pytest.mark.parametrize("read_cache", [False, True])
@pytest.mark.parametrize(("tokens", "memory", "cache"), [(5, 3, 4), (150, 10, 150), (1, 1, 1), (6, 0, 2), (4, 2, 0)])
def test_rmt_decoder_intervals(tokens: int, memory: int, cache: int, read_cache: bool) -> None:
    layout = SegmentLayout.rmt_decoder(tokens, memory, cache=cache, read_cache=read_cache)
    front = 0 if read_cache else cache
    expected = (
        [(front, cache + memory)] * memory
        + [(0, cache + memory + t + 1) for t in range(tokens)]
        + [(front, cache + memory + tokens + memory)] * memory
    )
    assert layout.intervals().tolist() == [list(pair) for pair in expected]
    assert not layout.gaps().any()
    assert (layout.own_keys() == -1).all()


def test_causal_is_plain_causal() -> None:
    layout = SegmentLayout.causal(6, 2, cache=3)
    assert torch.equal(layout.dense_mask(), torch.ones(10, 13, dtype=torch.bool).tril(diagonal=3))


def test_encoder_and_memory_transformer_see_everything() -> None:
    assert SegmentLayout.rmt_encoder(502, 10).dense_mask().all()
    assert SegmentLayout.memory_transformer(7, 3).visible() == 100
    assert SegmentLayout.rmt_encoder(502, 10).num_keys == 512


def test_bottleneck() -> None:
    write = SegmentLayout.memory_bottleneck(7, 3, step="write")
    assert (write.num_queries, write.num_keys, write.visible()) == (3, 10, 30)
    read = SegmentLayout.memory_bottleneck(7, 3, step="read")
    assert (read.num_queries, read.num_keys, read.visible()) == (7, 3, 21)


def test_memformer() -> None:
    read = SegmentLayout.memformer_read(7, 3)
    assert (read.num_queries, read.num_keys, read.visible()) == (7, 3, 21)
    write = SegmentLayout.memformer_write(7, 3)
    assert torch.equal(write.dense_mask(), torch.cat([torch.ones(3, 7), torch.eye(3)], dim=1).bool())
    assert write.own_keys().tolist() == [7, 8, 9]


def test_membart() -> None:
    mask = SegmentLayout.membart(4, 3).dense_mask()
    assert torch.equal(mask[:3, :3], torch.eye(3).bool())
    assert mask[:3, 3:].all()
    assert mask[3:].all()


def test_same_length_sees_exactly_the_cache_length() -> None:
    layout = SegmentLayout.transformer_xl(9, 5, window=5)
    assert layout.dense_mask().sum(1).tolist() == [5] * 9


def test_window_does_not_count_memory() -> None:
    layout = SegmentLayout.rmt_decoder(8, 2, cache=4, window=3)
    tokens = layout.dense_mask()[2:10]
    assert tokens[:, 4:6].all()
    assert (tokens[:, :4].sum(1) + tokens[:, 6:].sum(1)).tolist() == [3] * 8
    assert torch.equal(layout.dense_mask()[10:], SegmentLayout.rmt_decoder(8, 2, cache=4).dense_mask()[10:])


# -- derived layouts ---------------------------------------------------------------------------------------------------


def test_last() -> None:
    for number in range(60):
        rng = random.Random(number)
        layout = preset_layout(rng)
        rows = rng.randint(0, layout.num_queries)
        short = layout.last(rows)
        first = layout.num_queries - rows
        assert short.num_queries == rows
        assert short.num_keys == layout.num_keys
        assert torch.equal(short.dense_mask(), layout.dense_mask()[first:])
        assert torch.equal(short.intervals(), layout.intervals()[first:])
        again = rng.randint(0, rows)
        assert short.last(again) == layout.last(again)
        assert_closed_form_is_the_table(short)
    assert layout.last(layout.num_queries) == layout


def test_decoding() -> None:
    layout = SegmentLayout.rmt_decoder(20, 4, cache=6)
    step = layout.decoding(3)
    assert step.num_queries == 3
    assert step.num_keys == layout.num_keys
    tokens = slice(4, 24)
    assert torch.equal(step.dense_mask(), layout.dense_mask()[tokens][-3:])
    assert layout.decoding() == layout.last(2).decoding(1)
    with pytest.raises(ValueError, match="rows"):
        layout.decoding(21)
    with pytest.raises(ValueError, match="rows"):
        SegmentLayout.memformer_write(5, 3).last(2).last(3)


def test_offsets_and_sizes() -> None:
    layout = SegmentLayout(cache=2, read=3, tokens=5, write=7, keys=("read", "write"), queries=("tokens", "write"))
    assert [layout.size(region) for region in Region] == [2, 3, 5, 7]
    assert [layout.key_size(region) for region in Region] == [0, 3, 0, 7]
    assert [layout.key_offset(region) for region in Region] == [0, 0, 3, 3]
    assert [layout.query_offset(region) for region in ("read", "tokens", "write")] == [0, 0, 5]
    assert layout.rule("write", "tokens") is NONE
    with pytest.raises(ValueError, match="cache"):
        layout.rule("cache", "read")
    with pytest.raises(ValueError, match="region"):
        layout.size("memory")


# -- identity ----------------------------------------------------------------------------------------------------------


def test_equality_and_hash() -> None:
    a, b = SegmentLayout.rmt_decoder(5, 2), SegmentLayout.rmt_decoder(tokens=5, memory=2)
    assert a == b
    assert hash(a) == hash(b)
    assert a != SegmentLayout.rmt_decoder(5, 3)
    assert a != a.last(4)
    assert len({a, b, SegmentLayout.causal(5, 2)}) == 2
    by_hand = SegmentLayout(
        read=2, tokens=5, write=2,
        rules={
            ("read", "read"): FULL, (Region.TOKENS, "read"): "full", ("tokens", "tokens"): "causal",
            ("write", "read"): FULL, ("write", "tokens"): FULL, ("write", Region.WRITE): FULL,
            ("tokens", "cache"): FULL,
        },
    )  # fmt: skip
    assert by_hand == a
    assert replace(a) == a


def test_immutable() -> None:
    layout = SegmentLayout.rmt_decoder(5, 2)
    with pytest.raises(FrozenInstanceError):
        layout.tokens = 6  # type: ignore[misc]
    rules: dict[Any, Any] = {("tokens", "tokens"): FULL}
    layout = SegmentLayout(tokens=3, rules=rules)
    rules["tokens", "tokens"] = NONE
    assert layout.visible() == 9


@pytest.mark.parametrize("name", PRESETS)
def test_copies(name: str) -> None:
    layout = PRESETS[name](lambda most: min(most, 11))
    for twin in (pickle.loads(pickle.dumps(layout)), copy.deepcopy(layout), copy.copy(layout)):
        assert twin == layout
        assert hash(twin) == hash(layout)
        assert twin.ints == layout.ints
        assert torch.equal(twin.dense_mask(), layout.dense_mask())


# -- errors ------------------------------------------------------------------------------------------------------------

REFUSED: list[tuple[type[Exception], str, dict[str, Any]]] = [
    *((ValueError, name, {name: -1}) for name in ("cache", "read", "tokens", "write", "skip")),
    *((TypeError, name, {name: 2.0}) for name in ("cache", "read", "tokens", "write", "skip")),
    *((TypeError, name, {name: True}) for name in ("cache", "tokens")),
    *((TypeError, name, {name: None}) for name in ("cache", "tokens")),
    (TypeError, "read", {"read": "3"}),
    (ValueError, "tokens", {"tokens": 2**31}),
    (ValueError, "window", {"tokens": 3, "window": 0, "rules": {("tokens", "tokens"): CAUSAL}}),
    (TypeError, "window", {"tokens": 3, "window": 2.5, "rules": {("tokens", "tokens"): CAUSAL}}),
    (ValueError, "window", {"tokens": 3, "window": 2, "rules": {("tokens", "tokens"): FULL}}),
    (ValueError, "window", {"tokens": 3, "window": 2}),
    (ValueError, "window", {"tokens": 3, "window": 2, "keys": (), "rules": {("tokens", "tokens"): CAUSAL}}),
    (ValueError, "skip", {"tokens": 3, "skip": 4}),
    (ValueError, "rules", {"tokens": 3, "rules": {("tokens", "read"): CAUSAL}}),
    (ValueError, "rules", {"tokens": 3, "rules": {("write", "tokens"): SELF}}),
    (ValueError, "rules", {"tokens": 3, "rules": {("cache", "tokens"): FULL}}),
    (ValueError, "rules", {"tokens": 3, "rules": {("tokens", "memory"): FULL}}),
    (ValueError, "rules", {"tokens": 3, "rules": {("tokens", "tokens"): "some"}}),
    (ValueError, "rules", {"tokens": 3, "rules": {("tokens", "tokens"): 1}}),
    (ValueError, "rules", {"tokens": 3, "rules": {"tokens": FULL}}),
    (ValueError, "rules", {"tokens": 3, "rules": {("tokens",): FULL}}),
    (ValueError, "rules", {"tokens": 3, "rules": (FULL,) * 11}),
    (TypeError, "rules", {"tokens": 3, "rules": [FULL] * 12}),
    (TypeError, "rules", {"tokens": 3, "rules": None}),
    (TypeError, "queries", {"tokens": 3, "queries": "tokens"}),
    (TypeError, "keys", {"tokens": 3, "keys": "tokens"}),
    (ValueError, "queries", {"tokens": 3, "queries": ("cache",)}),
    (ValueError, "queries", {"tokens": 3, "queries": ("memory",)}),
    (ValueError, "keys", {"tokens": 3, "keys": (3,)}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "word", "arguments"), REFUSED, ids=lambda value: str(value)[:40])
def test_refused(kind: type[Exception], word: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(kind, match=word):
        SegmentLayout(**arguments)


@pytest.mark.parametrize("argument", ["queries", "keys"])
@pytest.mark.parametrize("value", [None, 3, Region.TOKENS])
def test_regions_must_be_a_tuple(argument: str, value: object) -> None:
    with pytest.raises(TypeError, match=argument):
        SegmentLayout(tokens=3, **{argument: value})  # type: ignore[arg-type]


def test_a_table_with_two_runs_names_the_row() -> None:
    rules: dict[Any, Any] = {("write", "read"): FULL, ("write", "write"): FULL}
    with pytest.raises(ValueError, match=r"WRITE row 0 sees keys \[0, 2\) and again WRITE from 5"):
        SegmentLayout(read=2, tokens=3, write=2, rules=rules)
    with pytest.raises(ValueError, match="TOKENS row 0"):
        SegmentLayout(tokens=3, write=1, rules={("tokens", "tokens"): CAUSAL, ("tokens", "write"): FULL})
    SegmentLayout(read=2, tokens=0, write=2, rules=rules)
    SegmentLayout(read=2, tokens=3, write=2, rules=rules, keys=("read", "write"))


def test_bottleneck_step() -> None:
    with pytest.raises(ValueError, match="step"):
        SegmentLayout.memory_bottleneck(3, 2, step="both")


# -- drawings ----------------------------------------------------------------------------------------------------------


def test_show() -> None:
    assert SegmentLayout.rmt_decoder(4, 2, cache=3).show() == (
        "rmt_decoder: CACHE 3, READ 2, TOKENS 4, WRITE 2\n"
        "        CCC|RR|TTTT|WW\n"
        "READ    ...|##|....|..\n"
        "        ...|##|....|..\n"
        "TOKENS  ###|##|#...|..\n"
        "        ###|##|##..|..\n"
        "        ###|##|###.|..\n"
        "        ###|##|####|..\n"
        "WRITE   ...|##|####|##\n"
        "        ...|##|####|##"
    )


def test_show_of_a_large_and_of_an_empty_layout() -> None:
    lines = SegmentLayout.rmt_decoder(1000, 16).show(width=40).splitlines()
    assert len(lines) <= 2 + 44
    assert all(len(line) <= 8 + 44 for line in lines[1:])
    assert "+" in "".join(lines[2:])
    assert SegmentLayout().show() == "custom: \n(no rows)"


def test_plot() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots()
    assert SegmentLayout.rmt_decoder(12, 3, cache=4).plot(ax) is ax
    figure.canvas.draw()
    texts = " ".join(text.get_text().lower() for text in (*ax.texts, *ax.get_xticklabels(), *ax.get_yticklabels()))
    assert all(region in texts for region in ("cache", "read", "tokens", "write"))
    plt.close(figure)
