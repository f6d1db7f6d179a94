"""What is particular to the Triton backend; the shared suite runs on it too."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rmt_kernels import SegmentLayout, explain, ops, segment_attention
from rmt_kernels.backends import plans, triton
from rmt_kernels.backends.triton import configs, launch
from rmt_kernels.backends.triton.configs import Backward, Tile
from tests.draws import NAMED
from tests.interpreter import INTERPRETED
from tests.suite import BACKENDS, BF16, F16, F32, Case, check, make, on_backend, results

DEVICE = "cpu" if INTERPRETED else "cuda"
TRITON = next(backend for backend in BACKENDS if backend.name == "triton")
DECODER = SegmentLayout.rmt_decoder(70, 5, cache=20)
interpreter = pytest.mark.skipif(not INTERPRETED, reason="about the interpreter")
gpu = pytest.mark.skipif(INTERPRETED, reason="needs a GPU")

if DEVICE == "cuda" and not torch.cuda.is_available():
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)


def tensors(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    inputs = make(case, DEVICE).inputs
    return inputs["query"], inputs["key"], inputs["value"]


# -- which calls it serves ---------------------------------------------------------------------------------------------


@interpreter
def test_auto_never_chooses_the_interpreter() -> None:
    query, key, value = tensors(Case(DECODER))
    found = explain(query.double(), key.double(), value.double(), DECODER, return_lse=True)
    assert "triton" in found.refused
    half = explain(query.half(), key.half(), value.half(), DECODER)
    assert half.backend != "triton"


@interpreter
def test_the_interpreters_wrong_products_are_refused() -> None:
    query, key, value = (tensor.to(BF16) for tensor in tensors(Case(DECODER)))
    with pytest.raises(ValueError, match="bfloat16 products wrongly"):
        segment_attention(query, key, value, DECODER, backend="triton")


def test_wide_heads_are_refused() -> None:
    query, key, value = tensors(Case(DECODER, head_dim=257))
    with pytest.raises(ValueError, match="largest head_dim is 256, got 257"):
        segment_attention(query, key, value, DECODER, backend="triton")


@gpu
def test_auto_chooses_it_on_a_gpu() -> None:
    query, key, value = tensors(Case(DECODER))
    assert explain(query, key, value, DECODER, return_lse=True).backend == "triton"


def test_the_cpu_is_told_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "_INTERPRETED", False)
    query, key, value = (tensor.cpu() for tensor in tensors(Case(DECODER)))
    with pytest.raises(ValueError, match="runs on CUDA tensors, got cpu"):
        segment_attention(query, key, value, DECODER, backend="triton")


# -- samples out of range ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("token_lengths", [70, -1, 71, 3]), ("token_starts", [0, 71, -5, 70]), ("cache_starts", [21, 0, 20, -1]),
        ("query_start", [68, 0, 69, -1]),
    ],
)  # fmt: skip
def test_a_sample_out_of_range_shows_and_others_do_not_suffer(name: str, values: list[int]) -> None:
    """On a GPU, where looking at a value would synchronise, kernels write NaN for the sample."""
    layout = DECODER.decoding(2) if name == "query_start" else DECODER
    most = {"token_lengths": 70, "token_starts": 70, "cache_starts": 20, "query_start": 68}[name]
    given = torch.tensor(values, dtype=torch.int32, device=DEVICE)
    problem = make(Case(layout, batch=4, kv_heads=1), DEVICE)
    inputs = problem.inputs
    arguments: dict[str, Any] = {
        "layout": layout.ints, "scale": 0.2, "dropout_p": 0.0, "relative": (), "backend": "triton", name: given,
        **{n: inputs[n].detach() for n in ("query", "key", "value")},
    }  # fmt: skip
    positional = [arguments.get(argument.name) for argument in ops.forward._schema.arguments]
    out, lse = ops.forward(*positional)
    grads = ops.backward(torch.ones_like(out), None, out, lse, *positional)[:3]
    clamped = positional.copy()
    clamped[[a.name for a in ops.forward._schema.arguments].index(name)] = given.clamp(0, most)
    right, _ = ops.forward(*clamped)
    for sample, value in enumerate(values):
        if 0 <= value <= most:
            assert torch.equal(out[sample], right[sample])
            assert all(grad[sample].isfinite().all() for grad in grads)
        else:
            assert out[sample].isnan().all()
            assert lse[sample].isnan().all()
            assert all(grad[sample].isnan().all() for grad in grads)


# -- configurations ----------------------------------------------------------------------------------------------------

CHANGED = {
    "plain": Case(DECODER, kv_heads=1, dtype=F16),
    "padded": Case(DECODER, kv_heads=1, dtype=F16, padding="right", strides="projected"),
    "narrow": Case(SegmentLayout.causal(90, 3), kv_heads=1, head_dim=48, dtype=F16),
    "window": Case(SegmentLayout.rmt_decoder(130, 5, window=40), kv_heads=1, dtype=F32),
    "dropout": Case(DECODER, kv_heads=1, dropout_p=0.2, dtype=F32),
    "grouped": Case(DECODER, kv_heads=1, group=3, dtype=F16),
}


def configured(
    monkeypatch: pytest.MonkeyPatch, case: Case, tile: Tile, backward: Backward
) -> tuple[dict[str, Tensor], list[launch.Launch]]:
    """The case's results under other tiles, and what was launched."""
    made: list[launch.Launch] = []
    call = launch.Launch.__call__

    def recorded(self: launch.Launch, *given: Any) -> None:
        made.append(self)
        call(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(launch, "forward_config", lambda *_: tile)
        patch.setattr(launch, "backward_config", lambda *_: backward)
        patch.setattr(plans, "_plans", {})
        patch.setattr(launch.Launch, "__call__", recorded)
        return results(make(case, DEVICE), on_backend("triton")), made


@pytest.mark.parametrize("name", CHANGED)
def test_copy_engine_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Tiles through descriptors or through pointers: the same numbers in the same order."""
    small = Tile(32, 32, 4, 2)
    pointers, _ = configured(monkeypatch, CHANGED[name], small, Backward(small, small))
    described, made = configured(
        monkeypatch, CHANGED[name], replace(small, descriptors=True), Backward(small, small, descriptors=True)
    )
    # Not where keys may hold nothing, and in the backward pass not with grouped heads.
    assert sum(bool(each.blocks) for each in made) == {"padded": 0, "grouped": 1}.get(name, 3)
    for result in pointers:
        assert torch.equal(pointers[result], described[result]), result


@pytest.mark.parametrize("name", ["plain", "window"])
def test_warps_apart_for_loads(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """One loop in which every tile is masked, and queries through a descriptor as well."""
    if not INTERPRETED and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("chosen on sm_90 only")
    rows, keys = (32, 32) if INTERPRETED else (128, 64)
    tile = Tile(rows, keys, 4, 2, descriptors=True, specialize=True)
    found, made = configured(monkeypatch, CHANGED[name], tile, Backward(tile, tile))
    assert made[0].scratch
    check(CHANGED[name], found)


@pytest.mark.parametrize("name", ["padded", "window", "grouped"])
@pytest.mark.parametrize("tile", [(16, 64), (64, 16), (32, 128)], ids=str)
def test_other_tiles_are_right_too(monkeypatch: pytest.MonkeyPatch, name: str, tile: tuple[int, int]) -> None:
    """Both parts of the backward pass, in one launch and in two."""
    shape = Tile(*tile, warps=4, stages=2)
    for joint in (False, True):
        found, made = configured(monkeypatch, CHANGED[name], shape, Backward(shape, shape, joint))
        assert len(made) == (3 if joint else 4)
        check(CHANGED[name], found)


def test_launches_are_planned_once() -> None:
    case = CHANGED["plain"]
    plans._plans.clear()
    first = results(make(case, DEVICE), on_backend("triton"))
    count = len(plans._plans)
    again = results(make(replace(case, seed=7), DEVICE), on_backend("triton"))
    assert len(plans._plans) == count == 2  # forward and backward; other numbers, the same shapes
    assert not torch.equal(first["out"], again["out"])
    results(make(replace(case, scale=0.3), DEVICE), on_backend("triton"))
    assert len(plans._plans) == 2 * count


def test_split_keys_are_combined(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding against many keys runs in two kernels, whatever the batch."""
    case = TRITON.version(NAMED["split, decoding f16"])
    tile = configs.forward_config(0, 64, "half", "few", "plain")
    _, made = configured(monkeypatch, case, tile, Backward(tile, tile, True))
    assert made[0].grid == (case.batch * case.kv_heads, 3)
    assert made[1].grid == (case.batch * case.kv_heads * case.group * 2, 1)


def test_more_chunks_than_are_combined_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    case = TRITON.version(NAMED["split, decoding f16"])
    tile = Tile(16, 64, 4, 2)
    whole, _ = configured(monkeypatch, case, tile, Backward(tile, tile, True))
    monkeypatch.setattr(launch, "COMBINED", 2)
    halves, made = configured(monkeypatch, case, tile, Backward(tile, tile, True))
    assert made[1].numbers[-1] == 2
    check(case, halves)
    torch.testing.assert_close(halves["lse"], whole["lse"])


@pytest.mark.parametrize(
    "layout", [SegmentLayout(tokens=40, keys=()), SegmentLayout.rmt_decoder(40, 4).last(0)], ids=str
)
def test_descriptors_of_nothing(monkeypatch: pytest.MonkeyPatch, layout: SegmentLayout) -> None:
    tile = Tile(32, 32, 4, 2, descriptors=True)
    case = Case(layout, kv_heads=1, dtype=F16)
    found, made = configured(monkeypatch, case, tile, Backward(tile, tile, descriptors=True))
    assert not any(each.blocks for each in made)
    assert (found["out"] == 0).all()


def test_large_tensors_need_no_copies() -> None:
    """Strides beyond 32 bits may be of samples and heads only."""
    for shape in ((1, 32, 2**19, 128), (4, 2**10, 2**14, 128)):
        assert plans._strides(torch.empty(shape, dtype=BF16, device="meta")) is not None
    far = torch.empty((2, 2, 2**29, 8), dtype=BF16, device="meta").transpose(0, 2)  # rows far apart
    assert plans._strides(far) is None


@pytest.mark.parametrize("scale", [1e-46, -1e-300])
def test_a_scale_that_is_none(scale: float) -> None:
    case = Case(DECODER, kv_heads=1, dtype=F32)
    tiny, none = (results(make(replace(case, scale=each), DEVICE), on_backend("triton")) for each in (scale, 0.0))
    assert all(torch.equal(tiny[name], none[name]) for name in none)


# -- on a GPU ----------------------------------------------------------------------------------------------------------


@gpu
def test_captured_in_a_graph() -> None:
    """A captured call reads its tensors anew at each replay, the seed of dropout among them."""
    case = Case(DECODER, group=2, dropout_p=0.3, padding="right", dtype=BF16)
    problem = make(case, DEVICE)
    seed = problem.options["seed"]
    results(problem, on_backend("triton"))  # compiled before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(problem, on_backend("triton"))
    for value in (3, -(2**50)):
        seed.fill_(value)
        graph.replay()
        eager = results(problem, on_backend("triton"))
        assert all(torch.equal(captured[name], eager[name]) for name in eager)


@gpu
def test_the_host_never_waits() -> None:
    problem = make(Case(DECODER, group=2, padding="left", stale=True, dropout_p=0.1, dtype=BF16), DEVICE)
    results(problem, on_backend("triton"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        results(problem, on_backend("triton"))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu
def test_checked_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    from rmt_kernels.backends import call

    monkeypatch.setattr(call, "_CHECK", True)
    query, key, value = tensors(Case(DECODER, batch=1))
    lengths = torch.tensor([71], dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match="token_lengths must be between 0 and 70"):
        segment_attention(query, key, value, DECODER, token_lengths=lengths, backend="triton")


@gpu
def test_tf32_is_a_choice() -> None:
    case = Case(DECODER, head_dim=64, dtype=F32)
    exact = results(make(case, DEVICE), on_backend("triton"))["out"]
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        rough = results(make(case, DEVICE), on_backend("triton"))["out"]
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert 1e-6 < float((exact - rough).abs().max()) < 1e-2
