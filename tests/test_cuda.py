"""What is particular to the CUDA backend; the shared suite runs on it too."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from rmt_kernels import Rule, SegmentLayout, explain, ops, reference_attention, segment_attention
from rmt_kernels.backends import cpu, cuda, plans, triton
from rmt_kernels.backends.cuda import operators
from rmt_kernels.philox import dropout_keep
from rmt_kernels.reference import segment_mask
from tests.emulation import EMULATED, counters, emulated, needs_module
from tests.suite import BF16, CUDA_DTYPES, F16, F32, KERNELS, Case, Problem, Results, check, make, on_backend, results

pytestmark = [needs_module, pytest.mark.usefixtures("nan_memory")]
CUDA = next(backend for backend in KERNELS if backend.name == "cuda")
DEVICE = CUDA.device
HALF = CUDA_DTYPES[0] if CUDA_DTYPES else BF16
DECODER = SegmentLayout.rmt_decoder(70, 5, cache=20)
gpu = pytest.mark.skipif(EMULATED, reason="needs a GPU")
slow = pytest.mark.slow
each_dtype = pytest.mark.parametrize("dtype", CUDA_DTYPES, ids=str)

if DEVICE == "cuda" and not torch.cuda.is_available():
    pytest.skip("needs a GPU, or RMT_KERNELS_EMULATE=1", allow_module_level=True)


def tensors(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    inputs = make(case, DEVICE).inputs
    return inputs["query"], inputs["key"], inputs["value"]


def run(case: Case) -> Results:
    return results(make(case, DEVICE), on_backend("cuda"))


def same(a: Results, b: Results) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# -- which calls it serves ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, torch.float64])
def test_other_types_are_refused(dtype: torch.dtype) -> None:
    query, key, value = (tensor.to(dtype) for tensor in tensors(Case(DECODER)))
    served = " and ".join(map(str, CUDA_DTYPES))
    with pytest.raises(ValueError, match=f"it was built for {served}, got {dtype}; use backend='triton'"):
        segment_attention(query, key, value, DECODER, backend="cuda")


@pytest.mark.parametrize("head_dim", [129, 256])
def test_wide_heads_are_refused(head_dim: int) -> None:
    query, key, value = tensors(Case(DECODER, head_dim=head_dim, dtype=HALF))
    with pytest.raises(ValueError, match=f"its largest head_dim is 128, got {head_dim}; use backend='triton'"):
        segment_attention(query, key, value, DECODER, backend="cuda")


def test_the_cpu_is_told_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "EMULATED", False)
    query, key, value = (tensor.cpu() for tensor in tensors(Case(DECODER, dtype=HALF)))
    with pytest.raises(ValueError, match="it runs on CUDA tensors, got cpu"):
        segment_attention(query, key, value, DECODER, backend="cuda")


def test_a_module_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each way of being without a module, and that a call says it."""
    for name in ("_cuda", "_emulated"):
        monkeypatch.setitem(sys.modules, f"rmt_kernels.{name}", None)  # as if it were not found
    for emulate, said in ((True, "emulated module was not built; build it with"), (False, "build it")):
        monkeypatch.setattr(cuda, "EMULATED", emulate)
        module, why_missing = cuda._load()
        assert module is None
        assert said in why_missing
    monkeypatch.setattr(cuda, "why_missing", why_missing)
    query, key, value = tensors(Case(DECODER, dtype=HALF))
    with pytest.raises(ValueError, match=r"backend='cuda' does not serve this call: .*build it"):
        segment_attention(query, key, value, DECODER, backend="cuda")


def test_a_module_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def import_module(name: str) -> Any:
        raise ImportError(f"{name}: undefined symbol")

    monkeypatch.setattr(importlib, "import_module", import_module)
    module, why_missing = cuda._load()
    assert module is None
    assert "does not load" in why_missing
    assert "undefined symbol" in why_missing
    assert "rebuild it" in why_missing


@emulated
def test_auto_never_chooses_the_emulation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Not even where nothing faster is there, and whatever is proven."""
    proven = tmp_path / "proven.json"
    proven.write_text(json.dumps({"sm_80": "a file", "sm_90": "a file"}))
    monkeypatch.setattr(cuda, "_PROVEN", proven)
    monkeypatch.setattr(cpu, "why_missing", "it is not here")
    query, key, value = tensors(Case(DECODER, dtype=HALF))
    found = explain(query, key, value, DECODER)
    assert found.backend not in ("cpu", "cuda")
    assert found.refused["cuda"] == "the emulated GPU is for tests: it is chosen by name only"


# -- which GPUs it serves ----------------------------------------------------------------------------------------------

GPUS = {"sm_75": (7, 5, 65536), "sm_80": (8, 0, 166912), "sm_89": (8, 9, 101376), "sm_90": (9, 0, 232448)}


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Tensors on a GPU that need not be there: only questions can be asked about them. The fixture is a function that
    says which GPU it is, for which ones was compiled, and on which the checks are proven."""

    def choose(name: str = "sm_90", built: str = "80, 90a", proven: tuple[str, ...] = (), shared: int = 0) -> None:
        major, minor, most = GPUS[name]
        monkeypatch.setattr(cuda, "_device_properties", lambda device: (major, minor, shared or most))
        monkeypatch.setattr(cuda, "_architectures", lambda: tuple(built.split(", ")))
        monkeypatch.setattr(cuda, "_proven", lambda architecture: architecture in proven)

    monkeypatch.setattr(cuda, "EMULATED", False)
    monkeypatch.setattr(triton, "why_missing", "it is not here")
    with FakeTensorMode():
        yield choose


def asked(
    layout: SegmentLayout = DECODER, head_dim: int = 64, batch: int = 1, heads: int = 1, grad: bool = False
) -> tuple[str, str]:
    """The backend that "auto" chooses for a call on a GPU, and why not this one."""
    rows = (layout.num_queries, layout.num_keys, layout.num_keys)
    query, key, value = (torch.empty(batch, n, m, head_dim, dtype=HALF, device="cuda") for n, m in zip(
        (heads, 1, 1), rows, strict=True))  # fmt: skip
    found = explain(query.requires_grad_(grad), key, value, layout)
    return found.backend, found.refused.get("cuda", "")


@pytest.mark.parametrize("name", ["sm_80", "sm_89", "sm_90"])
def test_auto_chooses_it_on_proven_gpus_only(gpus: Any, name: str) -> None:
    gpus(name, proven=tuple({*GPUS} - {name}))
    chosen, reason = asked()
    assert chosen != "cuda"
    assert reason == f"no result file shows yet that its checks passed on {name}: it is chosen by name only"
    gpus(name, proven=(name,))
    assert asked() == ("cuda", "")


def test_what_is_proven_stands_in_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    proven = tmp_path / "proven.json"
    monkeypatch.setattr(cuda, "_PROVEN", proven)
    try:
        for content, expected in (({"sm_90": "a result file"}, True), ({"sm_80": "a result file"}, False), ({}, False)):
            proven.write_text(json.dumps(content))
            cuda._read_proven.cache_clear()
            assert cuda._proven("sm_90") is expected
    finally:
        cuda._read_proven.cache_clear()


@pytest.mark.parametrize(
    ("built", "served", "refused"),
    [
        ("80, 90a", ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)), ()),
        ("80", ((8, 0), (8, 9), (9, 0), (10, 0)), ()),
        ("86", ((8, 6), (8, 9), (9, 0)), ((8, 0),)),
        ("90a", ((9, 0),), ((8, 0), (8, 9), (10, 0), (12, 0))),
        ("90a, 100", ((9, 0), (10, 0), (10, 3), (12, 0)), ((8, 0), (8, 9))),
    ],
)
def test_gpus_that_run_what_was_compiled(
    gpus: Any, monkeypatch: pytest.MonkeyPatch, built: str, served: Any, refused: Any
) -> None:
    """Code of the same generation, or PTX of an earlier one; an "a" is for one architecture alone."""
    for capability in (*served, *refused):
        gpus("sm_90", built=built, proven=("sm_{}{}".format(*capability),))
        monkeypatch.setattr(cuda, "_device_properties", lambda device, found=capability: (*found, 232448))
        chosen, reason = asked()
        assert (chosen == "cuda") is (capability in served), capability
        if capability in refused:
            assert (
                reason
                == f"it was built for {built}, and this GPU has {'.'.join(map(str, capability))}: build it "
                + ("for that too")
            )


def test_gpus_that_are_too_old(gpus: Any) -> None:
    gpus("sm_75", built="75, 80", proven=("sm_75",))
    assert asked()[1] == "it needs a GPU of compute capability 8.0 or later, this one has 7.5"


@pytest.mark.parametrize("head_dim", [64, 128])
def test_gpus_with_too_little_shared_memory(gpus: Any, head_dim: int) -> None:
    """What the backward pass takes is asked of calls that will be differentiated."""
    forward, backward = cuda.module.shared_memory(cuda.TYPES[HALF], head_dim)
    assert forward < backward
    for there, grad, chosen in (
        (forward, False, True), (forward - 1, False, False), (backward, True, True), (backward - 1, True, False),
        (backward - 1, False, True),
    ):  # fmt: skip
        gpus("sm_90", proven=("sm_90",), shared=there)
        found, reason = asked(head_dim=head_dim, grad=grad)
        assert (found == "cuda") is chosen, (there, grad)
        if not chosen:
            assert f"of shared memory for head_dim {head_dim}" in reason
            assert f"this GPU has {there >> 10}; use backend='triton'" in reason


def test_calls_that_are_too_large(gpus: Any) -> None:
    gpus()
    most = 1 << 24
    assert f"it serves up to {most} keys, got {most + 1}" in asked(SegmentLayout.rmt_encoder(most + 1, 0))[1]
    assert "blocks: split the batch" in asked(SegmentLayout.rmt_encoder(4096, 0), batch=1 << 16, heads=64)[1]
    assert (
        "query rows of a group of heads, got 2147483648" in asked(SegmentLayout.rmt_encoder(1 << 20, 0), heads=2048)[1]
    )


@pytest.mark.parametrize("dtype", CUDA_DTYPES, ids=str)
def test_a_set_for_every_width(dtype: torch.dtype) -> None:
    """The narrowest set of kernels serves a head; what was compiled stands in built()."""
    name = cuda.TYPES[dtype]
    widths = sorted(width for kind, width in cuda.module.built()["instances"] if kind == name)
    shared = {width: cuda.module.shared_memory(name, width) for width in widths}
    for head_dim in range(1, widths[-1] + 1):
        assert cuda.module.shared_memory(name, head_dim) == shared[min(w for w in widths if w >= head_dim)]
    assert cuda.module.shared_memory(name, widths[-1] + 1) is None


# -- samples out of range ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", ["few", "few, split", "short", "long"])
@pytest.mark.parametrize("name", ["token_lengths", "token_starts", "cache_starts", "query_start"])
def test_a_sample_out_of_range_shows_and_others_do_not_suffer(name: str, rows: str) -> None:
    """On a GPU, where looking at a value would synchronise, kernels write NaN for the sample."""
    layout = SegmentLayout.rmt_decoder(600 if rows == "few, split" else 70, 5, cache=20)
    if rows.startswith("few") or name == "query_start":
        layout = layout.decoding(10)
    packed = {"few": 20, "few, split": 20, "short": 320, "long": 1100}[rows]
    group = -(-packed // layout.num_queries)
    most = {"cache_starts": 20, "query_start": layout.tokens - 10}.get(name, layout.tokens)
    values = [most, -1, most + 1, 3]
    given = torch.tensor(values, dtype=torch.int32, device=DEVICE)
    problem = make(Case(layout, batch=4, kv_heads=1, group=group, dtype=HALF, head_dim=16), DEVICE)
    inputs = problem.inputs
    arguments: dict[str, Any] = {
        "layout": layout.ints, "scale": 0.2, "dropout_p": 0.0, "relative": (), "backend": "cuda", name: given,
        **{n: inputs[n].detach() for n in ("query", "key", "value")},
    }  # fmt: skip
    positional = [arguments.get(argument.name) for argument in ops.forward._schema.arguments]
    clamped = positional.copy()
    clamped[[a.name for a in ops.forward._schema.arguments].index(name)] = given.clamp(0, most)

    def computed(arguments: list[Any]) -> list[Tensor]:
        out, lse = ops.forward(*arguments)
        return [out, lse, *ops.backward(torch.ones_like(out), None, out, lse, *arguments)[:3]]

    found, right = computed(positional), computed(clamped)
    for sample, value in enumerate(values):
        for each, expected in zip(found, right, strict=True):
            if 0 <= value <= most:
                assert torch.equal(each[sample], expected[sample])
            else:
                assert each[sample].isnan().all()


# -- launches ----------------------------------------------------------------------------------------------------------


def test_launches_are_planned_once() -> None:
    case = Case(DECODER, dtype=HALF)
    plans._plans.clear()
    first = run(case)
    count = len(plans._plans)
    again = run(replace(case, seed=7))
    assert len(plans._plans) == count == 2  # forward and backward; other numbers, the same shapes
    assert not torch.equal(first["out"], again["out"])
    run(replace(case, scale=0.3))
    assert len(plans._plans) == 2 * count


@pytest.mark.parametrize("heads", [1, 2, 3, 5, 100])
def test_which_heads_run_together_changes_no_bit(heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of as many heads as fill half of the cache run side by side; the last ones may be fewer."""
    case = Case(SegmentLayout.rmt_decoder(150, 8), batch=3, kv_heads=2, group=1, head_dim=64, dtype=HALF)
    expected = run(case)
    keys, rows = 166, 192  # rows of whole tiles
    for bytes_of_a_head in (4 * keys * 64, 8 * rows * 64):  # in the forward and in the backward pass
        monkeypatch.setattr(operators, "_l2_bytes", lambda device, each=bytes_of_a_head: 2 * heads * each)
        monkeypatch.setattr(plans, "_plans", {})
        assert same(expected, run(case))


def workspaces(
    layout: SegmentLayout, head_dim: int, heads: int = 1, kv_heads: int = 1, batch: int = 1
) -> tuple[int, int]:
    """Bytes that a forward and a backward call take beside tensors. Nothing is launched: strides are of no matter."""
    sizes = (batch, heads, kv_heads, layout.num_queries, layout.num_keys, head_dim, 0)
    shared = cuda.TYPES[HALF], layout.ints, sizes, 0.1, 0.0
    forward, backward = cuda.module.Forward, cuda.module.Backward
    return forward(*shared, 18 * [8], 1 << 25).workspace, backward(*shared, 36 * [8], 1 << 25).workspace


@pytest.mark.parametrize(("head_dim", "width"), [(64, 64), (72, 128)])
@pytest.mark.parametrize("rows", [1, 8, 9])
@pytest.mark.parametrize("keys", [512, 513, 1600])
def test_few_rows_split_long_keys(rows: int, keys: int, head_dim: int, width: int) -> None:
    """Up to 32 packed rows keys are in chunks of 512, whatever the batch, each of which leaves sums and two numbers."""
    if (cuda.TYPES[HALF], width) not in cuda.module.built()["instances"]:
        pytest.skip(f"width {width} was not compiled")
    workspace, _ = workspaces(SegmentLayout.causal(keys, 0).last(rows), head_dim, heads=8, kv_heads=2, batch=3)
    parts = 3 * 8 * rows * -(-keys // 512)
    pieces = [4 * width * parts, 4 * parts, 4 * parts]
    expected = sum(-(-size // 256) * 256 for size in pieces)
    assert workspace == (expected if rows <= 8 and keys > 512 else 0)


@pytest.mark.parametrize(("head_dim", "width"), [(64, 64), (128, 128)])
def test_workspace_grows_with_rows_not_with_their_square(head_dim: int, width: int) -> None:
    """Float32 sums of the gradient of queries, and less than 40 bytes a row of a head beside them."""
    for tokens in (1024, 1 << 14, 1 << 18):
        forward, backward = workspaces(SegmentLayout.causal(tokens, 0), head_dim, heads=4, kv_heads=2, batch=2)
        sums = 4 * width * 2 * 4 * tokens
        assert forward == 0
        assert sums < backward < sums + 2 * 4 * tokens * 40 + 4096


# As in csrc/cuda/configs.h: rows and keys of a tile for few packed rows, up to 512, and from 513 on.
FORWARD = {"few": (16, 64), "short": (64, 64), "long": (128, 64)}
BACKWARD = {"few": (64, 64), "short": (64, 64), "long": (64, 128)}


def kind_of(packed_rows: int) -> str:
    return "few" if packed_rows <= 32 else "short" if packed_rows <= 512 else "long"


def tiles_seen(case: Case, problem: Problem, tile: tuple[int, int]) -> int:
    """How many pairs of a tile of packed rows and a tile of keys hold something that is seen, over all heads."""
    given = ("token_lengths", "token_starts", "cache_starts", "query_start")
    padding = {name: problem.options.get(name) for name in given}
    mask, _ = segment_mask(case.layout, case.batch, torch.device("cpu"), **padding)
    mask = mask.repeat_interleave(case.group, dim=1)
    (rows, keys), (batch, all_rows, all_keys) = tile, mask.shape
    mask = torch.nn.functional.pad(mask, (0, -all_keys % keys, 0, -all_rows % rows))
    blocks = mask.reshape(batch, -(-all_rows // rows), rows, -1, keys)
    return case.kv_heads * int(blocks.any(dim=4).any(dim=2).sum())


def products(tile: tuple[int, int], head_dim: int, count: int) -> int:
    """Instructions of 16 x 8 x 16 for so many products of a tile of rows and a tile of keys."""
    width = 64 if head_dim <= 64 else 128
    return count * (tile[0] // 16) * (tile[1] // 8) * (width // 16)


def counted(problem: Problem) -> tuple[dict[str, int], dict[str, int]]:
    """What the last launches of the forward and of the backward pass did."""
    positional, options, leaves = problem.arguments()
    out, _ = on_backend("cuda")(*positional, problem.case.layout, **options)
    forward = counters()
    torch.autograd.grad(out, leaves, torch.ones_like(out))
    return forward, counters()


@emulated
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("tokens", "group"), [(32, 1), (33, 1), (300, 1), (100, 4), (300, 4), (1100, 1)])
def test_a_causal_call_multiplies_what_lies_below_the_diagonal(tokens: int, group: int, head_dim: int) -> None:
    """Two products a pair of tiles forward, five backward; tiles above the diagonal are left out."""
    case = Case(SegmentLayout.causal(tokens, 0), 1, 1, group, head_dim, dtype=HALF)
    kind = kind_of(tokens * group)
    for tile, count, found in zip((FORWARD[kind], BACKWARD[kind]), (2, 5), counted(make(case)), strict=True):
        rows, keys = tile
        row_tiles = -(-tokens * group // rows)
        last_query = [min(tokens * group, (i + 1) * rows) - 1 for i in range(row_tiles)]
        pairs = sum(row // group // keys + 1 for row in last_query)
        assert found["multiplies"] == pairs * products(tile, head_dim, count)


VISITS = {
    "rmt_decoder": Case(SegmentLayout.rmt_decoder(400, 20), batch=1, kv_heads=2),
    "long": Case(SegmentLayout.rmt_decoder(400, 20, cache=150), batch=1, kv_heads=1, group=3, dropout_p=0.1),
    "window": Case(SegmentLayout.rmt_decoder(450, 16, cache=200, window=100), batch=1, kv_heads=1),
    "padded right": Case(SegmentLayout.rmt_decoder(300, 20), batch=3, kv_heads=1, padding="right"),
    "padded left": Case(SegmentLayout.rmt_decoder(300, 20), batch=3, kv_heads=1, padding="left", head_dim=128),
    "stale": Case(SegmentLayout.transformer_xl(150, 300), batch=3, kv_heads=1, stale=True, apart=True),
    "bottleneck": Case(SegmentLayout.memory_bottleneck(500, 40, step="read"), batch=1, kv_heads=1),
    "slots": Case(SegmentLayout.memformer_write(400, 100), batch=1, kv_heads=1, group=2),
    "own rows": Case(SegmentLayout(tokens=200, rules={("tokens", "tokens"): Rule.SELF}), batch=1, kv_heads=1, group=2),
    "few": Case(SegmentLayout.causal(500, 0).decoding(3), batch=3, kv_heads=2, group=4, start=True),
    "few, window": Case(SegmentLayout.rmt_decoder(450, 8, window=130).decoding(), batch=3, kv_heads=1, start=True),
    "few, two tiles of rows": Case(SegmentLayout.causal(500, 0).last(10), batch=1, kv_heads=1, group=3),
    "nothing": Case(SegmentLayout(read=90, tokens=40), batch=1, kv_heads=1),
}


@emulated
@pytest.mark.parametrize("name", VISITS)
def test_no_tile_is_multiplied_in_which_nothing_is_seen(name: str) -> None:
    case = replace(VISITS[name], dtype=HALF)
    problem = make(case)
    kind = kind_of(case.layout.num_queries * case.group)
    for tile, count, found in zip((FORWARD[kind], BACKWARD[kind]), (2, 5), counted(problem), strict=True):
        assert found["multiplies"] == tiles_seen(case, problem, tile) * products(tile, case.head_dim, count)


@emulated
def test_keys_are_combined_by_a_kernel_of_their_own() -> None:
    """The last launch of a split call multiplies nothing, nor waits for anything."""
    case = Case(SegmentLayout.causal(600, 0).last(1), batch=1, kv_heads=1, dtype=HALF)
    problem = make(case)
    forward, _ = counted(problem)
    assert forward["multiplies"] == forward["barriers"] == forward["copied_bytes"] == 0
    check(case, results(problem, on_backend("cuda")))


@emulated
@pytest.mark.parametrize("head_dim", [64, 128])
def test_decoding_reads_each_key_once(head_dim: int) -> None:
    case = Case(SegmentLayout.causal(500, 0).last(1), batch=2, kv_heads=3, group=4, head_dim=head_dim, dtype=HALF)
    forward, _ = counted(make(case))
    assert forward["copied_bytes"] == 2 * 3 * 2 * head_dim * (16 + 2 * 512)


@emulated
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize(
    "layout",
    [SegmentLayout.causal(400, 0).last(4), SegmentLayout.rmt_decoder(140, 8), SegmentLayout.causal(1050, 0)],
    ids=["few", "short", "long"],
)
def test_matrices_are_read_without_bank_conflicts(layout: SegmentLayout, head_dim: int, dropout_p: float) -> None:
    case = Case(layout, batch=1, kv_heads=1, head_dim=head_dim, dtype=HALF, dropout_p=dropout_p)
    for found in counted(make(case)):
        assert found["matrix_loads"] > 0
        assert found["matrix_load_conflicts"] == 0


# -- long calls --------------------------------------------------------------------------------------------------------

# More than 512 packed rows have tiles of their own, which the shared suite's small cases seldom reach.
MANY_ROWS = Case(SegmentLayout.rmt_decoder(97, 8, cache=33), batch=1, kv_heads=1, group=10)
PADDED = replace(MANY_ROWS, batch=3)
LONG = {
    "plain": replace(MANY_ROWS, scale=-0.3),
    "padded right": replace(PADDED, padding="right", stale=True, apart=True, strides="projected"),
    "padded left": replace(PADDED, padding="left", dropout_p=0.2, strides="sliced"),
    "window": replace(PADDED, layout=SegmentLayout.rmt_decoder(120, 8, cache=65, window=40), padding="left", group=8),
    "encoder": replace(MANY_ROWS, layout=SegmentLayout.rmt_encoder(150, 7), dropout_p=0.1, group=7),
    "own rows": replace(PADDED, layout=SegmentLayout.membart(80, 35), padding="right", group=9),
    "slots": replace(PADDED, layout=SegmentLayout.memformer_write(150, 33), group=32, padding="right", grads="lse"),
    "some see nothing": replace(
        MANY_ROWS, layout=SegmentLayout(read=20, tokens=120, rules={("tokens", "read"): Rule.FULL})
    ),
    "decoding": replace(PADDED, layout=SegmentLayout.causal(200, 3).decoding(40), group=27, start=True),
    "one head": replace(MANY_ROWS, layout=SegmentLayout.rmt_decoder(1030, 16), group=1, grads="sum"),
    "large scores": replace(MANY_ROWS, scores="large"),
}


@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    [(56, BF16), (128, F16), pytest.param(128, BF16, marks=slow), pytest.param(72, F16, marks=slow)],
    ids=str,
)
@pytest.mark.parametrize("name", LONG)
def test_long_calls(name: str, head_dim: int, dtype: torch.dtype) -> None:
    case = CUDA.typed(replace(LONG[name], head_dim=head_dim, dtype=dtype))
    assert case.layout.num_queries * case.group > 512
    check(case, run(case))


# -- memory ------------------------------------------------------------------------------------------------------------


def changed(problem: Problem, tensor_change: Any) -> Problem:
    """The same call with its tensors laid out anew."""
    inputs = {name: tensor_change(tensor) for name, tensor in problem.inputs.items()}
    grad_out = None if problem.grad_out is None else tensor_change(problem.grad_out)
    return Problem(problem.case, inputs, problem.options, grad_out, problem.grad_lse)


def unaligned(tensor: Tensor) -> Tensor:
    """Rows of whole vectors that begin one element behind an aligned address."""
    room = tensor.new_full((tensor.numel() + 1,), float("nan"))
    room[1:] = tensor.flatten()
    return room[1:].view(tensor.shape)


def sliced(tensor: Tensor) -> Tensor:
    """Aligned rows with something else between them."""
    room = tensor.new_full((*tensor.shape[:3], tensor.shape[3] + 8), float("nan"))
    room[..., : tensor.shape[3]] = tensor
    return room[..., : tensor.shape[3]]


def projected(tensor: Tensor) -> Tensor:
    """Rows outside heads, as a linear layer leaves them."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def column(tensor: Tensor) -> Tensor:
    return tensor.mT.contiguous().mT


@pytest.mark.parametrize("change", [unaligned, sliced, projected, column])
@pytest.mark.parametrize("head_dim", [40, 41, 128])
@pytest.mark.parametrize(
    "case",
    [
        Case(SegmentLayout.rmt_decoder(90, 8, cache=40), group=2, apart=True, padding="right"),
        Case(SegmentLayout.causal(600, 8).last(2), group=2, dropout_p=0.1),
    ],
    ids=["rows", "few rows"],
)
def test_how_tensors_lie_in_memory_changes_no_bit(case: Case, head_dim: int, change: Any) -> None:
    plain = make(replace(case, head_dim=head_dim, dtype=HALF), DEVICE)
    assert all(tensor.is_contiguous() for tensor in plain.inputs.values())
    other = changed(plain, change)
    assert all(tensor.stride() != dense.stride() or tensor.data_ptr() % 16 for tensor, dense in zip(
        other.inputs.values(), plain.inputs.values(), strict=True))  # fmt: skip
    assert same(results(plain, on_backend("cuda")), results(other, on_backend("cuda")))


@pytest.mark.parametrize(
    "case",
    [
        Case(DECODER, batch=0), Case(DECODER.last(0)), Case(SegmentLayout()), Case(SegmentLayout(tokens=40, keys=())),
        Case(SegmentLayout(tokens=3, keys=())), Case(SegmentLayout.rmt_decoder(40, 4), apart=True),
    ],
    ids=lambda case: case.label,
)  # fmt: skip
@each_dtype
def test_empty_shapes(case: Case, dtype: torch.dtype) -> None:
    check(replace(case, dtype=dtype), run(replace(case, dtype=dtype)))


# -- numbers -----------------------------------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("scale", [2.0**60, -(2.0**60), 2.0**100, -(2.0**100)])
@pytest.mark.parametrize(
    "layout",
    [DECODER, DECODER.last(2), SegmentLayout.causal(600, 2).last(2)],
    ids=["rows", "few rows", "few rows, split"],
)
def test_very_large_scales(layout: SegmentLayout, scale: float, dtype: torch.dtype) -> None:
    """Whatever float32 holds: each row takes the value of its best key."""
    case = Case(layout, kv_heads=1, group=2, dtype=dtype, scale=scale)
    check(case, run(case))


@each_dtype
@pytest.mark.parametrize("rows", [2, 40])
def test_large_scores_that_differ_by_little(rows: int, dtype: torch.dtype) -> None:
    """Exponents near 2^20, which float32 rounds to eighths: what warps and blocks have summed must fit, and lse, to its
    last bit."""
    layout = SegmentLayout(tokens=rows, cache=600, keys=("cache",), rules={("tokens", "cache"): Rule.FULL})
    query, key = torch.zeros(1, 1, rows, 64), torch.zeros(1, 1, 600, 64)
    query[..., 0], query[..., 1] = 1024.0 - 4.0 * torch.arange(rows), 1.0
    key[..., 0], key[..., 1] = 1024.0, (torch.arange(600) // 16 * 7 % 4).float()
    value = (8 * key[..., 1:2] + torch.randn(1, 1, 600, 64)).to(dtype).float()
    out, lse = reference_attention(query.double(), key.double(), value.double(), layout, scale=1.0)
    given = [tensor.to(DEVICE, dtype) for tensor in (query, key, value)]
    found = segment_attention(given[0], given[1], given[2], layout, scale=1.0, return_lse=True, backend="cuda")
    torch.testing.assert_close(found[0].cpu().double(), out, atol=0.0, rtol=torch.finfo(dtype).eps)
    units = (found[1].cpu().double() - lse) / 2.0 ** (lse.log2().floor() - 23)
    assert units.abs().max() <= 0.6


@pytest.mark.parametrize("scale", [1e-46, -1e-300])
def test_a_scale_that_is_none(scale: float) -> None:
    case = Case(DECODER, kv_heads=1, dtype=HALF)
    assert same(run(replace(case, scale=scale)), run(replace(case, scale=0.0)))


@pytest.mark.parametrize("layout", [DECODER, DECODER.last(2)], ids=["rows", "few rows"])
@each_dtype
def test_a_gradient_of_lse_only(layout: SegmentLayout, dtype: torch.dtype) -> None:
    case = Case(layout, group=2, dtype=dtype, grads="lse", dropout_p=0.1)
    found = run(case)
    check(case, found)
    assert not found["grad value"].any()
    assert found["grad query"].any()


@each_dtype
@pytest.mark.parametrize(
    "layout",
    [
        SegmentLayout.rmt_encoder(150, 20),
        SegmentLayout.memformer_read(70, 131),
        SegmentLayout.rmt_encoder(99, 2).last(9),
    ],
    ids=["encoder", "cross", "few rows"],
)
def test_the_mask_of_dropout_is_every_backends(layout: SegmentLayout, dtype: torch.dtype) -> None:
    """With equal scores and one-hot values the result shows which entries were kept."""
    keys, half = layout.num_keys, 128
    query = torch.zeros(2, 4, layout.num_queries, half, dtype=dtype, device=DEVICE)
    key = torch.zeros(2, 2, keys, half, dtype=dtype, device=DEVICE)
    rows = torch.arange(layout.num_queries)[None] + layout.skip
    for number in (0, 12345678901234567, -1):
        seed = torch.tensor([number], device=DEVICE)
        keep = dropout_keep(seed.cpu(), 2, 4, rows, keys, 0.3)
        for first in range(0, keys, half):
            value = torch.eye(keys, dtype=dtype, device=DEVICE)[:, first : first + half]
            value = torch.nn.functional.pad(value, (0, half - value.shape[1])).expand(2, 2, keys, half)
            out = segment_attention(query, key, value, layout, dropout_p=0.3, seed=seed, backend="cuda").cpu()
            kept = keep[..., first : first + half]
            out = out[..., : kept.shape[-1]]
            assert torch.equal(out != 0, kept)
            assert torch.allclose(out.float()[kept], torch.tensor(1 / keys / 0.7), rtol=1e-2)


# -- on a GPU ----------------------------------------------------------------------------------------------------------


@gpu
def test_captured_in_a_graph() -> None:
    """A captured call reads its tensors anew at each replay, the seed of dropout among them."""
    case = Case(DECODER, group=2, dropout_p=0.3, padding="right", dtype=HALF)
    problem = make(case, DEVICE)
    seed = problem.options["seed"]
    results(problem, on_backend("cuda"))  # planned before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(problem, on_backend("cuda"))
    for value in (3, -(2**50)):
        seed.fill_(value)
        graph.replay()
        assert same(captured, results(problem, on_backend("cuda")))


@gpu
def test_the_host_never_waits() -> None:
    problem = make(Case(DECODER, group=2, padding="left", stale=True, dropout_p=0.1, dtype=HALF), DEVICE)
    results(problem, on_backend("cuda"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        results(problem, on_backend("cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu
def test_launches_follow_the_current_stream() -> None:
    """Behind work of another stream a call waits only where it is told to; results are those of the default one."""
    case = Case(SegmentLayout.rmt_decoder(500, 16), dtype=HALF)
    problem = make(case, DEVICE)
    expected = results(problem, on_backend("cuda"))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = results(problem, on_backend("cuda"))
    torch.cuda.current_stream().wait_stream(stream)
    assert same(expected, found)
