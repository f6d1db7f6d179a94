"""What is particular to the Triton backend's distance-dependent scores; the shared suite runs on them too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rmt_kernels import Relative, SegmentLayout, explain, ops, segment_attention
from rmt_kernels.backends import plans
from rmt_kernels.backends.triton import launch, relative_launch
from rmt_kernels.backends.triton.configs import KINDS, WIDTHS, Tile
from rmt_kernels.backends.triton.relative_entries import entry_walk
from rmt_kernels.backends.triton.relative_launch import RelativeShape, Tiles, relative_config
from rmt_kernels.backends.triton.relative_tiles import along_window, picked
from rmt_kernels.backends.triton.shapes import shape_of
from rmt_kernels.backends.triton.tiles import sample_of
from rmt_kernels.backends.triton.walk import edge_count, edge_tile
from rmt_kernels.reference import segment_mask
from tests.interpreter import INTERPRETED
from tests.suite import F16, RELATIVE, Case, Problem, check, make, on_backend, results

DEVICE = "cpu" if INTERPRETED else "cuda"
interpreter = pytest.mark.skipif(not INTERPRETED, reason="about the interpreter")

if DEVICE == "cuda" and not torch.cuda.is_available():
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)

DECODER = SegmentLayout.rmt_decoder(40, 5, cache=20)
ENCODER = SegmentLayout.rmt_encoder(40, 5)
# Rows of READ and WRITE, whose own keys lie apart: those of TOKENS between them are nobody's.
APART = SegmentLayout(
    cache=10, read=9, tokens=30, write=7, queries=("read", "write"),
    rules={("read", "read"): "full", ("read", "tokens"): "full", ("write", "read"): "full",
           ("write", "tokens"): "full", ("write", "write"): "causal"},
)  # fmt: skip
OWN_KEYS = SegmentLayout(
    read=6, tokens=20, write=40, queries=("tokens", "write"),
    rules={("tokens", "read"): "full", ("write", "tokens"): "full", ("tokens", "tokens"): "causal",
           ("write", "write"): "self"},
)  # fmt: skip
WINDOW = SegmentLayout.rmt_decoder(50, 4, cache=30, window=13)


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Sets the rows and keys of every kernel's tiles."""

    def given(rows: int, keys: int) -> None:
        tile = Tile(rows, keys, 4, 1)
        row = Tiles(0, 256, "half", tile, tile, tile, tile)
        monkeypatch.setattr(relative_launch, "relative_config", lambda *_: row)
        monkeypatch.setattr(plans, "_plans", {})

    return given


def case(layout: SegmentLayout, kind: str, **options: Any) -> Case:
    return Case(layout, **{"batch": 1, "kv_heads": 1, "head_dim": 16, **options}, relative=kind)


CASES = {
    "rows apart": (case(APART, "all", dropout_p=0.3), 16, 16),
    "rows apart, some skipped": (case(APART.last(9), "all", dtype=F16), 16, 16),
    "rows apart, one region skipped": (case(APART.last(5), "all"), 16, 16),
    "own keys": (case(OWN_KEYS, "all", head_dim=24), 16, 32),
    "own keys, dropout": (case(OWN_KEYS, "transformer-xl", dropout_p=0.3, padding="right", batch=2), 32, 64),
    "shifted": (case(ENCODER, "all shifted", group=2), 32, 16),
    "shifted, no whole vectors": (case(ENCODER, "shifted", head_dim=9, dtype=F16), 16, 32),
    "window": (case(WINDOW, "transformer-xl", dtype=F16), 16, 16),
    "window, gaps": (case(WINDOW, "bias", padding="left", stale=True, batch=3), 64, 16),
    "decoding, dropout": (case(DECODER.decoding(3), "all", start=True, dropout_p=0.3, batch=3), 16, 16),
    "cache apart": (case(DECODER, "key", apart=True, strides="sliced", dtype=F16), 16, 64),
}


@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize("name", CASES)
def test_small_tiles(tiles: Callable[[int, int], None], name: str) -> None:
    given, rows, keys = CASES[name]
    tiles(rows, keys)
    check(given, results(make(given, DEVICE), on_backend("triton")))


def test_the_same_bits_again_and_in_any_batch(tiles: Callable[[int, int], None]) -> None:
    """But for the tables' gradients, which are sums over the batch."""
    tiles(32, 32)
    problem = make(case(SegmentLayout.rmt_decoder(20, 3, cache=9), "all shifted", batch=3, padding="right"), DEVICE)
    first, again = (results(problem, on_backend("triton")) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    alone = Problem(
        problem.case,
        {name: tensor if "relative" in name else tensor[1:2] for name, tensor in problem.inputs.items()},
        {**problem.options, "token_lengths": problem.options["token_lengths"][1:2]},
        None if problem.grad_out is None else problem.grad_out[1:2],
        None if problem.grad_lse is None else problem.grad_lse[1:2],
    )
    for name, tensor in results(alone, on_backend("triton")).items():
        assert "relative" in name or torch.equal(tensor, first[name][1:2]), name


def operator_arguments(problem: Problem, **changes: Any) -> list[Any]:
    """The operators' arguments for a problem."""
    layout = problem.case.layout
    tensors = {name: tensor.detach() for name, tensor in problem.inputs.items()}
    terms = problem.relative(tensors).terms(layout, tensors["query"])
    names = ("relative_key", "relative_bias", "content_bias", "position_bias")
    given = dict(zip(names, terms, strict=False)) | {
        **{name: tensors[name] for name in ("query", "key", "value")}, "layout": layout.ints, "scale": 0.2,
        "dropout_p": 0.0, "relative": terms.ints, "backend": "triton", **changes,
    }  # fmt: skip
    return [given.get(argument.name) for argument in ops.forward._schema.arguments]


def test_a_sample_out_of_range_shows_and_others_do_not_suffer() -> None:
    problem = make(case(ENCODER, "all shifted", batch=2), DEVICE)
    lengths = torch.tensor([41, 30], dtype=torch.int32, device=DEVICE)
    arguments = operator_arguments(problem, token_lengths=lengths)
    out, lse = ops.forward(*arguments)
    gradients = ops.backward(torch.ones_like(out), None, out, lse, *arguments)
    for tensor in (out, lse, *gradients[:3]):
        assert tensor[0].isnan().all()
        assert not tensor[1].isnan().any()
    for name, gradient in zip(("key", "bias", "content", "position"), gradients[5:], strict=True):
        assert (gradient.numel() == 0) == (name == "content")
        assert gradient.isnan().any() == (name != "content")


class Sizes(TorchDispatchMode):
    """Counts the numbers in new tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.total: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if isinstance(found, Tensor) and func._schema.returns[0].alias_info is None:
            self.total += found.numel()
        return found


@interpreter
def test_memory_is_linear_in_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted without running a kernel: four times the rows and keys take four times the numbers."""
    monkeypatch.setattr(launch.Launch, "__call__", lambda *_: None)

    def taken(times: int) -> int:
        layout = SegmentLayout.rmt_encoder(480 * times, 16 * times)
        arguments = operator_arguments(make(case(layout, "all shifted"), DEVICE))
        out, lse = ops._FORWARD["triton"](*arguments[:-1])
        with Sizes() as sizes:
            ops._BACKWARD["triton"](torch.ones_like(out), None, out, lse, *arguments[:-1])
        return int(sizes.total)

    assert taken(4) < 4.1 * taken(1)


# -- pieces ------------------------------------------------------------------------------------------------------------


@triton.jit
def _pieces(x_ptr, found_ptr, back_ptr, ROWS: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr):
    row, key, place = tl.arange(0, ROWS)[:, None], tl.arange(0, KEYS)[None, :], tl.arange(0, WIDTH)[None, :]
    x = tl.load(x_ptr + row * WIDTH + place)
    found = picked(x, row + 0 * key, key - row + (ROWS - 1), ROWS, WIDTH, ROWS, KEYS)
    tl.store(found_ptr + row * KEYS + key, found)
    tl.store(back_ptr + row * WIDTH + place, along_window(found, ROWS, KEYS, WIDTH))


@pytest.mark.parametrize(("rows", "keys"), [(16, 16), (32, 16), (16, 64)])
def test_windows_to_tiles_and_back(rows: int, keys: int) -> None:
    width = 1 << (rows + keys - 2).bit_length()
    x = torch.randn(rows, width, device=DEVICE)
    found, back = torch.empty(rows, keys, device=DEVICE), torch.empty_like(x)
    _pieces[(1,)](x, found, back, rows, keys, width)
    place = torch.arange(keys, device=DEVICE) - torch.arange(rows, device=DEVICE)[:, None] + rows - 1
    assert torch.equal(found, x.gather(1, place))
    assert torch.equal(back, torch.zeros_like(x).scatter(1, place, found))


@triton.jit
def _walk(
    ints_ptr, seen_ptr, lengths_ptr, rows, queries, reach, origin, tiles, ROWS: tl.constexpr, ENTRIES: tl.constexpr,
    GAPS: tl.constexpr,
):  # fmt: skip
    layout = (
        tl.load(ints_ptr), tl.load(ints_ptr + 1), tl.load(ints_ptr + 2), tl.load(ints_ptr + 3), tl.load(ints_ptr + 4),
        tl.load(ints_ptr + 5), tl.load(ints_ptr + 6), tl.load(ints_ptr + 7), tl.load(ints_ptr + 8),
        tl.load(ints_ptr + 9), tl.load(ints_ptr + 10), tl.load(ints_ptr + 11), tl.load(ints_ptr + 12),
        tl.load(ints_ptr + 13), tl.load(ints_ptr + 14), tl.load(ints_ptr + 15), tl.load(ints_ptr + 16),
        tl.load(ints_ptr + 17), tl.load(ints_ptr + 18), tl.load(ints_ptr + 19), tl.load(ints_ptr + 20),
        tl.load(ints_ptr + 21),
    )  # fmt: skip
    tile = tl.program_id(0)
    sample, _ = sample_of(0, queries, layout, lengths_ptr, None, None, None)
    walk = entry_walk(tile * ENTRIES, tile * ENTRIES + ENTRIES, rows, layout, sample, reach, origin, ROWS, GAPS)
    for i in range(0, edge_count(walk)):
        place = seen_ptr + tile * tiles + edge_tile(i, walk)
        tl.store(place, tl.load(place) + 1)


def described(layout: SegmentLayout) -> RelativeShape:
    query = torch.empty(1, 1, layout.num_queries, 16, device=DEVICE)
    shape = shape_of(query, query, layout.ints, 1.0, 0.0, "ieee", False, False, False, False)
    reach, ahead = layout.offsets()
    return RelativeShape(shape, reach + 1 + ahead, reach, False, True, False, False, False, 0)


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize(
    "layout",
    [DECODER, ENCODER, SegmentLayout.causal(60, 4, cache=30), WINDOW, OWN_KEYS, APART, DECODER.last(17), APART.last(5),
     SegmentLayout.transformer_xl(60, 60, memory=8, window=60)],
    ids=lambda layout: layout.name,
)  # fmt: skip
def test_tiles_of_rows_are_visited_once_where_they_meet_an_entry(layout: SegmentLayout, padded: bool) -> None:
    rows, entries = 16, 16
    relative = described(layout)
    lengths = torch.tensor([layout.tokens // 3], dtype=torch.int32, device=DEVICE) if padded else None
    mask, row = segment_mask(layout, 1, torch.device("cpu"), None if lengths is None else lengths.cpu())
    row = row[0] + torch.where(row[0] >= relative.layout[7], relative.hole, 0)
    entry = torch.arange(layout.num_keys) - row[:, None] + relative.origin
    assert not mask[0][(entry < 0) | (entry >= relative.offsets)].any()
    meets = torch.zeros(-(-relative.offsets // entries), relative.row_tiles(Tile(rows, entries, 4, 1)), dtype=torch.int)
    place = (row - layout.skip)[:, None].expand_as(entry) // rows
    meets[entry[mask[0]] // entries, place[mask[0]]] = 1
    seen = torch.zeros_like(meets, device=DEVICE)
    ints = torch.tensor(relative.layout, dtype=torch.int32, device=DEVICE)
    count = layout.num_queries + relative.hole
    _walk[(len(meets),)](
        ints, seen, lengths, count, layout.num_queries, relative.reach, relative.origin, meets.shape[1], rows, entries,
        layout.window is not None or padded,
    )  # fmt: skip
    assert seen.max() == 1
    assert (seen.cpu() >= meets).all()
    assert padded or torch.equal(seen.cpu(), meets)  # which keys are padding is not asked


# -- which calls, which tiles ------------------------------------------------------------------------------------------


def test_it_serves_every_kind() -> None:
    query, key = (torch.zeros(1, 2, n, 16, device=DEVICE) for n in (DECODER.num_queries, DECODER.num_keys))
    for names, mode in RELATIVE.values():
        problem = make(Case(DECODER, batch=1, head_dim=16, relative="all"), DEVICE)
        given = {name: problem.inputs[f"relative_{name}"] for name in names if f"relative_{name}" in problem.inputs}
        relative = Relative(**given, mode=mode)
        assert "triton" not in explain(query, key, key, DECODER, relative=relative).refused or INTERPRETED
        out = segment_attention(query, key, key, DECODER, relative=relative, backend="triton")
        assert (out == 0).all()


@pytest.mark.parametrize("arch", [0, 80, 90, 100])
def test_every_call_has_tiles_of_whole_eights(arch: int) -> None:
    for kind in KINDS:
        for width in WIDTHS:
            for lean in (False, True):
                row = relative_config(arch, width, kind, lean)
                for tile in (row.forward, row.keys, row.queries, row.entries):
                    assert tile.rows % 16 == 0
                    assert tile.keys % 16 == 0
