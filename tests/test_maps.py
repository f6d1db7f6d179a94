"""Attention maps: probabilities against the dense reference, what is recorded, and what is drawn."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.systems import maps as command
from rmt_kernels import (
    Relative,
    RMTAttention,
    Rule,
    SegmentLayout,
    alibi_slopes,
    attention,
    reference,
    reference_attention,
    segment_attention,
)
from rmt_kernels import maps as maps_module
from rmt_kernels.backends import cpu
from rmt_kernels.maps import Rows, attention_probabilities, plot_maps, record_attention
from rmt_kernels.models import ModelConfig, SegmentModel, build
from rmt_kernels.training import configure, train
from rmt_kernels.training.symbols import Copy

B, H, D = 3, 4, 8
LENGTHS = torch.tensor([0, 3, 9], dtype=torch.int32)
DECODER = SegmentLayout.rmt_decoder(9, 3)
CACHED = SegmentLayout.rmt_decoder(9, 3, cache=5, window=4)
BLIND = SegmentLayout(read=3, tokens=9, rules={("tokens", "read"): Rule.FULL})

LAYOUTS: dict[str, tuple[SegmentLayout, dict[str, Any]]] = {
    "decoder": (DECODER, {}),
    "own rows": (SegmentLayout.memformer_write(9, 4), {"token_lengths": LENGTHS, "scale": 0.7}),
    "membart": (SegmentLayout.membart(9, 4), {}),
    "padding right": (DECODER, {"token_lengths": LENGTHS}),
    "padding left": (DECODER, {"token_starts": LENGTHS}),
    "cache, window": (CACHED, {"cache_starts": torch.tensor([0, 2, 5], dtype=torch.int32)}),
    "last rows": (CACHED.last(6), {"token_lengths": LENGTHS}),
    "decoding": (CACHED.decoding(2), {"query_start": torch.tensor([0, 4, 7], dtype=torch.int32)}),
    "read": (SegmentLayout.memformer_read(9, 4), {}),
    "blind rows": (BLIND, {}),
}


def _inputs(layout: SegmentLayout, dtype: torch.dtype, kv_heads: int = H) -> tuple[Tensor, Tensor]:
    query = torch.randn(B, H, layout.num_queries, D, dtype=torch.float64)
    return query.to(dtype), torch.randn(B, kv_heads, layout.num_keys, D, dtype=torch.float64).to(dtype)


def _dense(query: Tensor, key: Tensor, layout: SegmentLayout, **how: Any) -> tuple[Tensor, Tensor]:
    """(probabilities, lse): what the reference gives for the identity."""
    eye = torch.eye(layout.num_keys, dtype=query.dtype).expand(*key.shape[:2], -1, -1)
    return reference_attention(query, key, eye, layout, **how)


def _check(found: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(found, expected.to(found.dtype), rtol=0, atol=tolerance)
    sums, seen = found.sum(dim=-1), expected.sum(dim=-1) > 0.5
    torch.testing.assert_close(sums, seen.to(sums.dtype), rtol=0, atol=4 * tolerance)


# -- probabilities -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_heads", [H, 2])
@pytest.mark.parametrize("name", LAYOUTS)
def test_probabilities_are_the_reference_s(name: str, kv_heads: int) -> None:
    layout, how = LAYOUTS[name]
    query, key = _inputs(layout, torch.float64, kv_heads)
    expected, lse = _dense(query, key, layout, **how)
    for given in (lse, None):
        found = attention_probabilities(query, key, layout, given, **how)
        assert found.dtype is torch.float64
        _check(found, expected, 1e-9)
    if "blind" in name or "padding" in name:
        assert bool((expected.sum(dim=-1) == 0).any())


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-4)])
@pytest.mark.skipif(bool(cpu.why_missing), reason="the compiled CPU module is not built")
def test_probabilities_from_the_kernels_lse(name: str, dtype: torch.dtype, tolerance: float) -> None:
    layout, how = LAYOUTS[name]
    query, key = _inputs(layout, dtype, 2)
    _, lse = segment_attention(query, key, torch.randn_like(key), layout, return_lse=True, backend="cpu", **how)
    assert lse.dtype is torch.float32
    found = attention_probabilities(query, key, layout, lse, **how)
    expected, _ = _dense(query.double(), key.double(), layout, **how)
    assert found.dtype is torch.float32
    _check(found, expected, tolerance)


RELATIVES: dict[str, Callable[[int], Relative]] = {
    "clean": lambda n: Relative(_t(H, n, D), _t(H, D), _t(H, D)),
    "shifted": lambda n: Relative(_t(H, n, D), _t(H, D), _t(H, D), mode="shifted"),
    "bias": lambda n: Relative(bias=_t(1, n)),
    "alibi": lambda n: Relative.alibi(alibi_slopes(H).double(), n),
}


def _t(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("kind", RELATIVES)
@pytest.mark.parametrize("layout", [SegmentLayout.transformer_xl(9, 5, memory=3), SegmentLayout.rmt_encoder(9, 3)])
def test_distance_dependent_scores(kind: str, layout: SegmentLayout) -> None:
    relative = RELATIVES[kind](layout.num_keys)
    query, key = _inputs(layout, torch.float64)
    expected, lse = _dense(query, key, layout, relative=relative)
    assert float((expected - _dense(query, key, layout)[0]).abs().max()) > 0.01
    _check(attention_probabilities(query, key, layout, lse, relative=relative), expected, 1e-9)
    some = [layout.num_queries - 1, 0, 4]
    _check(attention_probabilities(query, key, layout, rows=some, relative=relative), expected[:, :, some], 1e-9)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ("read", [0, 1, 2]), ("tokens", range(3, 12)), ("write", range(12, 15)), (slice(2, None, 5), [2, 7, 12]),
        ([14, 0, 0], [14, 0, 0]), (torch.tensor([5, 3], dtype=torch.int32), [5, 3]), (range(4, 6), [4, 5]), ([], []),
        (slice(9, 9), []), (slice(-2, None), [13, 14]),
    ],
)  # fmt: skip
def test_chosen_rows(rows: Rows, expected: Any) -> None:
    query, key = _inputs(DECODER, torch.float64)
    whole = attention_probabilities(query, key, DECODER)
    found = attention_probabilities(query, key, DECODER, rows=rows)
    torch.testing.assert_close(found, whole[:, :, list(expected)], rtol=0, atol=1e-12)


def test_regions_of_a_layout_that_skips_rows() -> None:
    layout = DECODER.last(5)  # the last 2 of TOKENS, and WRITE
    query, key = _inputs(layout, torch.float64)
    whole = attention_probabilities(query, key, layout)
    for region, rows in (("read", []), ("tokens", [0, 1]), ("write", [2, 3, 4])):
        found = attention_probabilities(query, key, layout, rows=region)
        torch.testing.assert_close(found, whole[:, :, rows], rtol=0, atol=1e-12)


def test_a_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    layout, how = LAYOUTS["decoding"]
    query, key = _inputs(layout, torch.float64)
    relative = RELATIVES["clean"](layout.num_keys)
    whole = attention_probabilities(query, key, layout, relative=relative, **how)
    sizes: list[int] = []
    scores = reference._scores

    def spied(query: Tensor, *args: Any) -> Tensor:
        sizes.append(query.shape[2])
        return scores(query, *args)

    monkeypatch.setattr(reference, "_scores", spied)
    monkeypatch.setattr(maps_module, "_SCORES_AT_ONCE", 1)
    pieces = attention_probabilities(query, key, layout, relative=relative, **how)
    torch.testing.assert_close(pieces, whole, rtol=0, atol=1e-12)
    assert sizes == [1, 1]


def test_a_cache_given_apart() -> None:
    query, key = _inputs(CACHED, torch.float64, 2)
    expected, lse = _dense(query, key, CACHED)
    apart, rest = key[:, :, :5], key[:, :, 5:]
    for cache in (apart, (apart, torch.randn_like(apart))):
        _check(attention_probabilities(query, rest, CACHED, lse, cache=cache), expected, 1e-9)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rows": "middle"}, ValueError, "unknown region 'middle'"),
        ({"rows": "cache"}, ValueError, "'cache' holds keys only"),
        ({"rows": [0, 15]}, ValueError, "rows must be between 0 and 14"),
        ({"rows": [-1]}, ValueError, "rows must be between 0 and 14"),
        ({"rows": [0.5]}, TypeError, "rows must be None, a query region"),
        ({"rows": 3}, TypeError, "a sequence of ints from 0 to 14, got 3"),
        ({"rows": ["a"]}, TypeError, "rows must be None, a query region"),
        ({"rows": torch.ones(15, dtype=torch.bool)}, TypeError, r"shape \(15,\), torch.bool"),
        ({"rows": slice(None, None, -1)}, TypeError, "a slice with a positive step"),
        ({"lse": torch.zeros(B, H, 14)}, ValueError, r"lse must have shape \(3, 4, 15\)"),
        ({"lse": torch.zeros(B, H, 15, dtype=torch.int64)}, TypeError, "lse must be a float32 or float64 tensor"),
        ({"lse": 1.0}, TypeError, "lse must be a float32 or float64 tensor.* got float"),
        ({"token_lengths": torch.tensor([1, 2, 10])}, ValueError, "token_lengths must be between 0 and 9"),
        ({"cache": torch.zeros(B, H, 2, D)}, ValueError, "cache"),
        ({"layout": "causal"}, TypeError, "layout must be a SegmentLayout"),
        ({"query": torch.zeros(B, H, 4, D)}, ValueError, "query must have the layout's 15 rows"),
    ],
)  # fmt: skip
def test_what_is_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    query, key = _inputs(DECODER, torch.float32)
    arguments: dict[str, Any] = {"query": query, "key": key, "layout": DECODER, "lse": None} | change
    with pytest.raises(error, match=message):
        attention_probabilities(**arguments)


# -- recording ---------------------------------------------------------------------------------------------------------


def _model(name: str, **options: Any) -> SegmentModel:
    sizes: dict[str, Any] = {"vocabulary": 11, "tokens": 6, "width": 16, "heads": 2, "layers": 2, "memory": 3}
    return build(name, ModelConfig(**sizes | options)).eval()


def _logits(model: SegmentModel, ids: Tensor, **how: Any) -> Tensor:
    out: Tensor | None = model(ids, outputs="logits", **how).outputs
    assert out is not None
    return out


def test_every_layer_and_segment_is_recorded_in_order() -> None:
    model, ids = _model("rmt"), torch.randint(11, (2, 16))  # the last segment is short
    before = _logits(model, ids)
    with record_attention(model) as calls:
        inside = _logits(model, ids)
    assert torch.equal(before, inside)
    assert torch.equal(before, _logits(model, ids))
    layers = [f"recurrence.backbone.layers.{i}.attention" for i in range(2)]
    assert [(call.module, call.number) for call in calls] == [(layer, s) for s in range(3) for layer in layers]
    assert list(calls.by_module()) == layers
    assert [call.number for call in calls.by_module()[layers[1]]] == [0, 1, 2]
    for call in calls:
        assert not call.query.requires_grad
        probabilities = call.probabilities()
        expected, _ = _dense(
            call.query.double(), call.key.double(), call.layout, scale=call.scale, token_lengths=call.token_lengths
        )
        _check(probabilities, expected, 2e-6)
    assert calls[0].token_lengths is None
    assert calls[-1].token_lengths is not None
    assert calls[-1].token_lengths.tolist() == [4, 4]
    _ = plot_maps(calls.by_module())  # rows of padding too


@pytest.mark.parametrize(
    ("name", "options", "of_a_segment"),
    [
        ("rmt_transformer_xl", {"cache": 6}, 2),
        ("memformer", {}, 2 * 2 + 1 + 2 * 2),
        ("membart", {}, None),
        ("mem_ctrl_shared", {}, None),
    ],
)
def test_other_systems(name: str, options: dict[str, Any], of_a_segment: int | None) -> None:
    model, ids = _model(name, **options), torch.randint(11, (2, 12))
    before = _logits(model, ids)
    with record_attention(model) as calls:
        inside = _logits(model, ids)
    assert torch.equal(before, inside)
    assert len(calls) == 2 * of_a_segment if of_a_segment else len(calls) >= 2
    for call in calls:
        assert call.module in dict(model.named_modules())
        assert call.key.shape[2] == call.layout.num_keys
        sums = call.probabilities().sum(dim=-1)
        torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=1e-5)


def test_nothing_is_recorded_outside() -> None:
    table = dict(attention._BACKENDS)
    model, ids = _model("rmt"), torch.randint(11, (2, 12))
    with record_attention(model) as calls:
        assert table != attention._BACKENDS
    assert table == attention._BACKENDS
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    model.train()
    loss = model(ids, labels=ids).loss
    assert loss is not None
    loss.backward()
    assert calls == []
    assert all(p.grad is not None for p in model.parameters())


def test_an_error_inside_leaves_all_as_it_was() -> None:
    table = dict(attention._BACKENDS)
    model = _model("rmt")
    with pytest.raises(IndexError), record_attention(model) as calls:
        model(torch.full((1, 6), 99))
    assert table == attention._BACKENDS
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.is_grad_enabled()
    with record_attention(model) as calls:
        with pytest.raises(IndexError):
            model(torch.full((1, 6), 99))
        model(torch.zeros(1, 6, dtype=torch.int64))
    assert calls[0].module == "recurrence.backbone.layers.0.attention"  # no stale name


def test_training_is_not_recorded() -> None:
    model, ids = _model("rmt"), torch.randint(11, (2, 12))
    with record_attention(model), torch.enable_grad(), pytest.raises(RuntimeError, match="without gradients"):
        model(ids, labels=ids)
    with record_attention(model):
        assert model(ids, labels=ids).loss.requires_grad is False


def test_recordings_inside_one_another_and_of_other_threads() -> None:
    layout = DECODER
    query, key = _inputs(layout, torch.float32)
    with record_attention() as outer:
        segment_attention(query, key, key, layout)
        with record_attention() as inner:
            segment_attention(query, key, key, layout)
        thread = threading.Thread(target=lambda: segment_attention(query, key, key, layout))
        thread.start()
        thread.join()
        segment_attention(query, key, key, layout)
    assert [len(inner), len(outer)] == [1, 3]
    assert [(call.module, call.number) for call in outer] == [("", 0), ("", 1), ("", 2)]


@pytest.mark.parametrize("backend", ["auto", "stock", "reference"])
def test_what_is_recorded_is_a_copy(backend: str) -> None:
    layout = CACHED.decoding(2)
    start, relative = torch.tensor([0, 4, 7], dtype=torch.int32), Relative(bias=torch.randn(H, layout.num_keys))
    how: dict[str, Any] = {"query_start": start} if backend == "stock" else {"query_start": start, "relative": relative}
    query, key = _inputs(layout, torch.float32)
    cache, rest = key[:, :, :5].clone(), key[:, :, 5:].clone()
    expected, _ = _dense(query, key, layout, **how)
    with record_attention() as calls:
        segment_attention(query, rest, rest, layout, cache=(cache, cache), backend=backend, **how)
    assert (calls[0].lse is None) is (backend == "stock")
    for tensor in (query, cache, rest, start, relative.bias):
        assert tensor is not None
        tensor.zero_()
    _check(calls[0].probabilities(), expected, 2e-6)
    assert calls[0].backend == (backend if backend != "auto" else calls[0].backend)


def test_a_module_of_one_s_own_and_dropout() -> None:
    layer = RMTAttention(16, 2, dropout=0.5, layout=DECODER)  # in training mode
    model = nn.Sequential()
    model.add_module("mix", layer)
    x = torch.randn(2, 15, 16)
    torch.manual_seed(1)
    before, _ = layer(x)
    torch.manual_seed(1)
    with record_attention(model) as calls:
        inside, _ = layer(x)
    assert torch.equal(before, inside)
    assert [call.module for call in calls] == ["mix"]
    sums = calls[0].probabilities().sum(dim=-1)  # before dropout
    torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=1e-5)


def test_layer_local_recurrence() -> None:
    layer = RMTAttention(16, 2, layout=DECODER)
    with record_attention(layer) as calls:
        layer(torch.randn(2, 18, 16), memory=torch.randn(2, 3, 16))
    # The scan's WRITE rows segment by segment, then the tokens of both segments at once.
    assert [(call.number, call.query.shape[0], call.query.shape[2]) for call in calls] == [
        (0, 2, 3), (1, 2, 3), (0, 4, 9),
    ]  # fmt: skip


def test_autocast_records_what_attention_was_given() -> None:
    query, key = _inputs(DECODER, torch.float32)
    with torch.autocast("cpu", torch.bfloat16), record_attention() as calls:
        segment_attention(query, key, key, DECODER)
        found = calls[0].probabilities()
    assert calls[0].query.dtype is torch.bfloat16
    expected, _ = _dense(query.bfloat16().double(), key.bfloat16().double(), DECODER)
    _check(found, expected, 1e-4)


def test_compiled_code_is_recorded() -> None:
    def attend(query: Tensor, key: Tensor) -> Tensor:
        return segment_attention(query.cos(), key, key, DECODER) * 2

    query, key = _inputs(DECODER, torch.float32)
    compiled = torch.compile(attend, backend="eager")
    with torch.no_grad():
        before = compiled(query, key)
    with record_attention() as calls:
        inside = compiled(query, key)
    assert len(calls) == 1
    assert torch.equal(calls[0].query, query.cos())
    with torch.no_grad():
        assert torch.equal(before, compiled(query, key))
    assert torch.equal(before, inside)
    assert len(calls) == 1
    whole = torch.compile(lambda: segment_attention(query, key, key, DECODER), backend="eager", fullgraph=True)
    with pytest.raises(RuntimeError, match="without fullgraph=True"), record_attention():
        whole()


def test_the_model_must_be_a_module() -> None:
    model: Any = "rmt"
    with pytest.raises(TypeError, match=r"model must be an nn\.Module or None, got str"), record_attention(model):
        pass


# -- pictures ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def calls() -> dict[str, list[maps_module.Recorded]]:
    model, ids = _model("rmt"), torch.randint(11, (2, 12), generator=torch.Generator().manual_seed(0))
    with record_attention(model) as found:
        model(ids)
    return {f"layer {i}": of_layer for i, of_layer in enumerate(found.by_module().values())}


def _pictures(figure: Any) -> list[Any]:
    return [ax for ax in figure.axes if ax.images]


def test_the_picture(calls: dict[str, list[maps_module.Recorded]]) -> None:
    texts = [list("abcdef"), list("ghijkl")]
    figure = plot_maps(
        calls, sample=1, titles=["first", "last"], tokens=texts, frames=[None, (slice(4, 6), "read")]
    )  # fmt: skip
    drawn = _pictures(figure)
    assert [ax.get_title() for ax in drawn] == ["first", "last", "", ""]
    assert [ax.get_ylabel() for ax in drawn] == ["layer 0", "", "layer 1", ""]
    mean = calls["layer 1"][1].probabilities()[1].mean(dim=0)
    image = torch.from_numpy(drawn[3].images[0].get_array().filled(-1.0))
    visible = DECODER_OF_MODEL.dense_mask()
    torch.testing.assert_close(image[visible], mean[visible], rtol=0, atol=1e-6)
    assert bool((image[~visible] == -1).all())
    assert [label.get_text() for label in drawn[0].get_xticklabels()] == ["READ", "TOKENS", "WRITE"]
    assert [label.get_text() for label in drawn[0].get_yticklabels()] == ["READ", "TOKENS", "WRITE"]
    sides = [[label.get_text() for label in axis.get_xticklabels()] for axis in drawn[1].child_axes]
    assert list("ghijkl") in sides
    assert [len(ax.patches) for ax in drawn] == [0, 1, 0, 1]
    assert drawn[1].patches[0].get_bbox().bounds == (-0.5, 3.5, 3.0, 2.0)
    norms = {ax.images[0].norm.vmax for ax in drawn}
    assert len(norms) == 1  # one scale
    assert norms.pop() == pytest.approx(
        max(float(c.probabilities()[1].mean(0).max()) for p in calls.values() for c in p)
    )


DECODER_OF_MODEL = SegmentLayout.rmt_decoder(6, 3)


def test_heads(calls: dict[str, list[maps_module.Recorded]]) -> None:
    each = _pictures(plot_maps(calls, heads="each"))
    assert [ax.get_ylabel() for ax in each][::2] == [f"layer {i}, head {h}" for i in range(2) for h in range(2)]
    one = _pictures(plot_maps(list(calls.values()), heads=1))
    assert [ax.get_ylabel() for ax in one][::2] == ["layer 1, head 1", "layer 2, head 1"]
    same = [ax.images[0].get_array().filled(-1.0) for ax in (each[2], one[0])]
    assert torch.equal(*map(torch.from_numpy, same))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"grid": []}, ValueError, "at least one call"),
        ({"grid": [[]]}, ValueError, "at least one call"),
        ({"grid": [["a"]]}, TypeError, "calls of a Recording, got str"),
        ({"sample": 2}, ValueError, "sample must be an int between 0 and 1, got 2"),
        ({"heads": 2}, ValueError, "heads must be 'mean', 'each' or an int between 0 and 1, got 2"),
        ({"heads": "all"}, ValueError, "heads must be"),
        ({"titles": ["one"]}, ValueError, "titles must have an entry for each of the 2 columns, got 1"),
        ({"tokens": [["a"], ["b"]]}, ValueError, r"tokens\[0\] must have 6 texts, got 1"),
        ({"frames": [None, ([0, 2], "read")]}, ValueError, r"follow one another, .* got \[0, 2\]"),
    ],
)  # fmt: skip
def test_what_a_picture_refuses(
    calls: dict[str, list[maps_module.Recorded]], change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        plot_maps(**{"grid": calls, **change})
    uneven = [calls["layer 0"], calls["layer 1"][:1]]
    with pytest.raises(ValueError, match=r"as many calls in every row, got \[2, 1\]"):
        plot_maps(uneven)


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = configure("copy", "rmt", "quick", steps=2, evaluate=(2,), evaluate_every=0, cut=False, samples=4)
    train(config, tmp_path / "run")
    given = ["--run", str(tmp_path / "run"), "--samples", "3", "--out", str(tmp_path / "maps.png")]
    assert command.main(given) == 1
    assert "hasn't learned the task" in capsys.readouterr().out
    assert not (tmp_path / "maps.png").exists()
    assert command.main([*given, "--anyway", "--segments", "2"]) == 0
    out = capsys.readouterr().out
    assert "copy, 3 held-out samples of 2 segments" in out
    assert "layer 2: READ" in out
    assert (tmp_path / "maps.png").read_bytes().startswith(b"\x89PNG")
    for wrong, message in ((["--segments", "1"], "segments must be at least 2"), (["--heads", "9"], "heads must be")):
        with pytest.raises(SystemExit):
            command.main([*given, "--anyway", *wrong])
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main(["--run", str(tmp_path / "nothing")])
    assert "nothing" in capsys.readouterr().err


def test_the_command_trains(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"steps": 2, "width": 16, "batch": 2, "samples": 4}.items():
        monkeypatch.setitem(command._SIZES, name, value)
    assert command.main(["--samples", "2", "--out", str(tmp_path / "maps.png")]) == 1
    assert "copy, 2 held-out samples of 4 segments" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("task", "model", "message"),
    [
        ("associative", "rmt", "the maps are of copy or reverse, and this is a run of associative"),
        ("copy", "memory_transformer", "READ, TOKENS and WRITE rows, such as rmt; in memory_transformer"),
    ],
)
def test_runs_that_the_command_refuses(
    task: str, model: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configure(task, model, "quick", steps=1, evaluate=(2,), evaluate_every=0, cut=False, samples=2)
    train(config, tmp_path / "run")
    with pytest.raises(SystemExit):
        command.main(["--run", str(tmp_path / "run"), "--samples", "2"])
    assert message in capsys.readouterr().err


def test_the_report_counts_what_is_there() -> None:
    """Made by hand: WRITE row j looks at symbol j alone, answer row i at READ slot i alone."""
    task, layout = Copy(length=8), SegmentLayout.rmt_decoder(20, 8)

    def call(pairs: list[tuple[int, int]]) -> maps_module.Recorded:
        query, key = torch.zeros(1, 1, 36, 36), 100 * torch.eye(36)[None, None]
        for row, seen in pairs:
            query[0, 0, row, seen] = 1.0
        with record_attention() as found:
            segment_attention(query, key, key, layout, scale=1.0)
        return found[0]

    answer = list(range(8 + 11, 8 + 19))
    write = call([(28 + j, 8 + j) for j in range(8)])
    for shift, share in ((0, "100%"), (1, "0%")):
        last = call([(row, (i + shift) % 8) for i, row in enumerate(answer)])
        reading = command.Reading(task, 4, {"layer 1": [write, last]}, list(range(8)), answer, [], 1.0)
        text = "\n".join(command.report(reading))
        assert "layer 1: READ 0%, sequence 100%, noise 0%, WRITE 0%" in text
        assert "layer 1: READ 100%, TOKENS 0%" in text
        assert f"written in layer 1, reading in layer 1: {share}" in text
