"""Distance-dependent scores: what they mean, and that every backend that has them computes them."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rmt_kernels import (
    Relative,
    Rule,
    SegmentLayout,
    alibi_slopes,
    explain,
    ops,
    reference_attention,
    segment_attention,
)
from rmt_kernels.backends import cpu
from rmt_kernels.reference import _offsets
from tests.draws import draw
from tests.suite import (
    BF16,
    F16,
    F32,
    F64,
    KERNELS,
    RELATIVE,
    Backend,
    Case,
    check,
    make,
    on_backend,
    refusal,
    results,
)

DECODER = SegmentLayout.rmt_decoder(97, 8, cache=33)
SMALL = SegmentLayout.rmt_decoder(7, 3, cache=5, read_cache=True)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed + sum(shape)))


# -- what they mean ----------------------------------------------------------------------------------------------------


def shift(scores: Tensor) -> Tensor:
    """Transformer-XL's trick: column c of (..., queries, K) belongs to distance K - 1 - c; to columns by key."""
    *front, queries, keys = scores.shape
    padded = torch.cat([scores.new_zeros(*front, queries, 1), scores], dim=-1).reshape(*front, keys + 1, queries)
    return padded[..., 1:, :].reshape(*front, queries, keys)


@pytest.mark.parametrize(
    "layout",
    [SMALL, SegmentLayout.rmt_encoder(6, 3), SegmentLayout.transformer_xl(6, 4), SegmentLayout.causal(5, 2, cache=3)],
    ids=lambda layout: layout.name,
)
@pytest.mark.parametrize("mode", ["shifted", "clean"])
def test_the_reference_is_transformer_xl(layout: SegmentLayout, mode: str) -> None:
    """ "shifted" is the shift of the authors' code everywhere; "clean" where no key lies ahead, and symmetric there."""
    batch, heads, width = 2, 3, 8
    queries, keys = layout.num_queries, layout.num_keys
    query, key, value = normal(batch, heads, queries, width), normal(batch, heads, keys, width), normal(2, 3, keys, 8)
    r, u, v = normal(heads, keys, width), normal(heads, width), normal(heads, width, seed=1)
    position = (query + v[:, None]) @ r.flip(1).mT
    if mode == "shifted":
        relative = shift(position)
    else:
        own = torch.arange(queries)[:, None] + layout.key_size("cache")
        distance = (own - torch.arange(keys)).abs()
        relative = torch.einsum("bhqd,hqkd->bhqk", query + v[:, None], r[:, distance])
    scores = ((query + u[:, None]) @ key.mT + relative) * width**-0.5
    probabilities = scores.masked_fill(~layout.dense_mask(), float("-inf")).softmax(-1)
    out, _ = reference_attention(query, key, value, layout, relative=Relative(r, u, v, mode=mode))
    torch.testing.assert_close(out, probabilities @ value, rtol=0, atol=1e-12)


def test_alibi() -> None:
    assert alibi_slopes(8).tolist() == [2.0**-n for n in range(1, 9)]
    # 12 heads: the 8 of 8 heads, then every other one of 16 heads'.
    assert alibi_slopes(12).tolist() == pytest.approx(
        [2.0**-n for n in range(1, 9)] + [2.0 ** -(n / 2) for n in (1, 3, 5, 7)]
    )
    layout, heads = SegmentLayout.transformer_xl(9, 4), 4
    query, key, value = normal(1, heads, 9, 8), normal(1, heads, 13, 8), normal(1, heads, 13, 8, seed=1)
    slopes = alibi_slopes(heads).double()
    distance = 4 + torch.arange(9)[:, None] - torch.arange(13)
    scores = query @ key.mT * 8**-0.5 - slopes[:, None, None] * distance
    expected = scores.masked_fill(~layout.dense_mask(), float("-inf")).softmax(-1) @ value
    out = segment_attention(query, key, value, layout, relative=Relative.alibi(slopes, 13), backend="reference")
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


# -- every backend -----------------------------------------------------------------------------------------------------


def drawn(number: int) -> Case:
    """A case of the suite with distance-dependent scores: no SELF rule, and rows that follow one another."""
    rng = random.Random(number)
    kind = rng.choice(list(RELATIVE))
    while True:
        case = draw(rng.randrange(10**6))
        layout = case.layout
        try:
            layout.offsets()
        except ValueError:
            continue
        own = _offsets(layout, torch.arange(layout.num_queries + layout.skip)[None])[0, :, :1]
        if any(form.rows and form.own >= 0 for form in layout.forms) or (own.diff(dim=0) != -1).any():
            continue
        if case.start and kind in ("shifted", "all shifted"):
            continue
        complete = not layout.skip and [form.rows for form in layout.forms] == list(layout.key_sizes[1:])
        if "shifted" in kind and not complete:
            continue
        return replace(case, relative=kind, strides=case.strides if case.strides != "expanded" else "projected")


NAMED = {
    **{
        f"{kind} {name}": Case(DECODER, batch=5, group=2, head_dim=41, dtype=dtype, relative=kind, seed=5)
        for kind in RELATIVE
        for name, dtype in (("f32", F32), ("bf16", BF16), ("f16", F16))
    },
    "read_cache": Case(SegmentLayout.rmt_decoder(70, 8, cache=33, read_cache=True), relative="shifted"),
    "encoder": Case(SegmentLayout.rmt_encoder(120, 10), relative="shifted", head_dim=64),
    "encoder padded": Case(SegmentLayout.rmt_encoder(120, 10), batch=3, relative="all", padding="right"),
    "many samples": Case(SMALL, batch=9, kv_heads=1, relative="all", head_dim=8),
    "window": Case(
        SegmentLayout.transformer_xl(90, 70, memory=5, window=70), batch=3, relative="transformer-xl", stale=True
    ),
    "cache apart": Case(DECODER, relative="transformer-xl", apart=True, stale=True, padding="right", batch=3),
    "dropout": Case(DECODER, relative="all", dropout_p=0.3),
    "decoding": Case(DECODER.decoding(3), batch=3, relative="all", start=True),
    "last rows": Case(DECODER.last(30), relative="all"),
    "scale 0": Case(DECODER, relative="all", scale=0.0),
    "scale below 0": Case(DECODER, relative="all", scale=-0.3),
    "lse alone": Case(DECODER, relative="shifted", grads="lse"),
    "long": Case(SegmentLayout.transformer_xl(400, 300), batch=1, kv_heads=1, relative="transformer-xl"),
    "one row": Case(SegmentLayout.rmt_decoder(1, 1), relative="shifted"),
    "no batch": Case(DECODER, batch=0, relative="all"),
    "no queries": Case(DECODER.last(0), relative="all"),
    "nothing seen": Case(SegmentLayout(read=3, tokens=40), relative="all"),
}  # fmt: skip


def run(case: Case, backend: Backend) -> None:
    case = backend.version(case)
    problem = make(case, backend.device)
    reason = refusal(backend.name, problem, True)
    if reason is not None:
        pytest.skip(reason)
    check(case, results(problem, on_backend(backend.name)), factor=backend.factor)


backends = pytest.mark.parametrize("backend", KERNELS, ids=lambda backend: backend.name)


@backends
@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize("name", NAMED)
def test_named(name: str, backend: Backend) -> None:
    run(NAMED[name], backend)


# What the interpreter, which takes seconds for a case, runs without --slow: between them most of what a case may have.
QUICK = (0, 4, 10, 11, 14, 16, 18, 25, 31, 33, 35, 37)


@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize(
    ("number", "backend"),
    [
        pytest.param(
            number, backend, id=f"{number}-{backend.name}",
            marks=[pytest.mark.slow] if backend.interpreted and number not in QUICK else [],
        )
        for number in range(40) for backend in KERNELS
    ],
)  # fmt: skip
def test_drawn(number: int, backend: Backend) -> None:
    run(drawn(number), backend)


@pytest.mark.slow
@backends
@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize("number", range(40, 500))
def test_drawn_many(number: int, backend: Backend) -> None:
    run(drawn(number), backend)


def test_the_cpu_serves_everything() -> None:
    """Or the tests above would skip in silence."""
    if cpu.why_missing:
        pytest.skip(cpu.why_missing)
    for case in (*NAMED.values(), *(drawn(number) for number in range(200))):
        assert refusal("cpu", make(replace(case, batch=1)), True) is None


@pytest.mark.skipif(bool(cpu.why_missing), reason=cpu.why_missing)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
def test_the_same_bits_for_any_number_of_threads_and_samples(dtype: torch.dtype) -> None:
    """But the sums over the batch, which are those of a batch."""
    case = Case(DECODER, batch=6, kv_heads=3, group=2, head_dim=41, dtype=dtype, relative="shifted", padding="right")
    problem, before = make(case), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(results(problem, on_backend("cpu")))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(other[name], tensor) for name, tensor in found[0].items())
    few = make(replace(case, batch=2))
    for name, tensor in problem.inputs.items():
        few.inputs[name] = tensor if name.startswith("relative") else tensor[:2]
    few.options["token_lengths"] = problem.options["token_lengths"][:2]
    assert problem.grad_out is not None
    assert problem.grad_lse is not None
    few.grad_out, few.grad_lse = problem.grad_out[:2], problem.grad_lse[:2]
    for name, tensor in results(few, on_backend("cpu")).items():
        if "relative" not in name:
            assert torch.equal(tensor, found[0][name][:2]), name


@backends
def test_keys_ahead_of_the_last_row_before_padding(backend: Backend) -> None:
    """It sees keys ahead of it, and the row after it is padding: zeros."""
    case = backend.version(Case(SegmentLayout.rmt_encoder(70, 3), batch=3, relative="shifted", padding="left"))
    problem = make(case, backend.device)
    if (reason := refusal(backend.name, problem, True)) is not None:
        pytest.skip(reason)
    exact = results(make(case), reference_attention, F64)
    for name, tensor in results(problem, on_backend(backend.name)).items():
        scale = float(exact[name].nan_to_num(neginf=0.0).abs().max())
        torch.testing.assert_close(
            tensor.cpu().double(), exact[name], rtol=0, atol=(1e-5 if tensor.dtype is F32 else 2e-2) * scale, msg=name
        )


@backends
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
@pytest.mark.parametrize(
    "case",
    [
        Case(SegmentLayout.rmt_decoder(70, 3, cache=20), relative="all", padding="right", stale=True, batch=4),
        Case(SegmentLayout.rmt_decoder(70, 3, cache=20), relative="all", padding="left", stale=True, batch=4),
        Case(SegmentLayout.rmt_decoder(70, 3, cache=20), relative="shifted", padding="right", stale=True, batch=4),
        Case(SegmentLayout.rmt_decoder(70, 3, cache=20), relative="shifted", padding="left", stale=True, batch=4),
        Case(SegmentLayout.rmt_encoder(70, 3), relative="shifted", padding="right", batch=4),
        Case(SegmentLayout.rmt_encoder(70, 3), relative="shifted", padding="left", batch=4),
    ],
    ids=lambda case: case.label,
)
def test_padding_may_hold_anything(case: Case, dtype: torch.dtype, backend: Backend) -> None:
    """NaN in padding, in stale keys and in what is sent to rows of padding changes no bit of any result."""
    case = backend.version(replace(case, dtype=dtype, kv_heads=1, scores="random"))
    clean, dirty = make(case, backend.device), make(case, backend.device)
    if (reason := refusal(backend.name, clean, True)) is not None:
        pytest.skip(reason)
    layout = case.layout
    position = torch.arange(layout.num_keys) - layout.key_offset("tokens")
    token = (position >= 0) & (position < layout.tokens)
    given = {name: value.cpu()[:, None] for name, value in clean.options.items() if isinstance(value, Tensor)}
    first, last = given.get("token_starts", torch.zeros(1, 1)), given.get("token_lengths", torch.full((1, 1), 10**6))
    padding = token & ((position < first) | (position >= last))
    assert padding.any()
    assert not padding.all()
    stale = torch.arange(layout.num_keys) < given.get("cache_starts", torch.zeros(1, 1))
    rows, keys = padding[:, None, -layout.num_queries :], (padding | stale)[:, None]
    assert dirty.grad_out is not None
    assert dirty.grad_lse is not None
    for tensor, hidden in (
        (dirty.inputs["query"], rows[..., None]), (dirty.inputs["key"], keys[..., None]),
        (dirty.inputs["value"], keys[..., None]), (dirty.grad_out, rows[..., None]), (dirty.grad_lse, rows),
    ):  # fmt: skip
        tensor.masked_fill_(hidden.to(tensor.device), float("nan"))
    expected, found = results(clean, on_backend(backend.name)), results(dirty, on_backend(backend.name))
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.skipif(bool(cpu.why_missing), reason=cpu.why_missing)
@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize("name", ["all f32", "shifted bf16", "shifted f16", "encoder", "decoding"])
def test_lesser_isa(name: str) -> None:
    from rmt_kernels import _cpu

    before = _cpu.isa()
    try:
        for isa in _cpu.isas()[1:]:
            _cpu.set_isa(isa)
            run(NAMED[name], KERNELS[0])
    finally:
        _cpu.set_isa(before)


@pytest.mark.skipif(bool(cpu.why_missing), reason=cpu.why_missing)
@pytest.mark.parametrize("kind", ["all shifted", "content"])
def test_the_operators_keep_their_promises(kind: str) -> None:
    """Fake kernels, autograd and no aliasing, with all of the tensors and with some."""
    problem = make(Case(SMALL, relative=kind, dtype=F16))
    tables = problem.relative(problem.inputs).terms(SMALL, problem.inputs["query"])
    given: dict[str, Any] = dict(zip(("query", "key", "value"), problem.arguments()[0], strict=True))
    names = ("relative_key", "relative_bias", "content_bias", "position_bias")
    given |= dict(zip(names, tables, strict=False)) | {
        "layout": SMALL.ints, "scale": 0.3, "dropout_p": 0.0, "relative": tables.ints, "backend": "cpu",
    }  # fmt: skip
    arguments = tuple(given.get(argument.name) for argument in ops.forward._schema.arguments)
    torch.library.opcheck(ops.forward, arguments)
    out, lse = ops.forward(*arguments)
    torch.library.opcheck(
        ops.backward, (torch.randn_like(out), None, out.detach(), lse.detach(), *(
            a.detach() if isinstance(a, Tensor) else a for a in arguments
        )),
    )  # fmt: skip


@pytest.mark.skipif(bool(cpu.why_missing), reason=cpu.why_missing)
def test_compiled() -> None:
    problem = make(Case(SMALL, relative="all shifted"))
    compiled = torch.compile(on_backend("cpu"), fullgraph=True, backend="aot_eager")
    eager, found = results(problem, on_backend("cpu")), results(problem, compiled)
    assert all(torch.equal(found[name], eager[name]) for name in eager)


def test_autocast_casts_them() -> None:
    layout = SegmentLayout.transformer_xl(9, 4)
    query, key, value = (normal(1, 2, n, 8).float() for n in (9, 13, 13))
    relative = Relative(normal(2, 13, 8).float(), normal(2, 8).float(), normal(2, 8).float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert segment_attention(query, key, value, layout, relative=relative).dtype is BF16
    with pytest.raises(
        TypeError, match=r"relative\.key must have the dtype of query, torch.bfloat16, got torch.float32"
    ):
        segment_attention(query.to(BF16), key.to(BF16), value.to(BF16), layout, relative=relative)


def test_a_shared_table() -> None:
    layout = SegmentLayout.transformer_xl(9, 4)
    query, key, value = (normal(1, 2, n, 8).float() for n in (9, 13, 13))
    one, bias = normal(1, 13, 8).float().requires_grad_(), normal(1, 13).float().requires_grad_()
    shared = segment_attention(query, key, value, layout, relative=Relative(one, bias=bias))
    apart = segment_attention(
        query, key, value, layout, relative=Relative(one.expand(2, -1, -1), bias=bias.expand(2, -1))
    )
    assert torch.equal(shared, apart)
    assert [g.shape for g in torch.autograd.grad(shared.sum(), [one, bias])] == [one.shape, bias.shape]


# -- what is refused ---------------------------------------------------------------------------------------------------

KEY = torch.zeros(2, 18, 8)


@pytest.mark.parametrize(
    ("error", "match", "given", "layout"),
    [
        (ValueError, "mode must be 'clean' or 'shifted', got 'both'", {"mode": "both"}, SMALL),
        (ValueError, "holds none of them", {"key": None}, SMALL),
        (ValueError, "key is None", {"key": None, "bias": KEY[..., 0], "position_bias": KEY[:, 0]}, SMALL),
        (ValueError, r"key must have shape \(2, 18, 8\) or \(1, 18, 8\), got \(3, 18, 8\)",
         {"key": torch.zeros(3, 18, 8)}, SMALL),
        (ValueError, r"must hold 18 distances, 0 to 17, for this layout, got 17; .* repeat its last row",
         {"key": KEY[:, 1:]}, SMALL),
        (ValueError, r"bias must hold 18 distances", {"bias": torch.zeros(2, 4)}, SMALL),
        (ValueError, r"content_bias must have shape \(2, 8\), got \(8,\)", {"content_bias": torch.zeros(8)}, SMALL),
        (ValueError, "needs a layout whose queries are all of READ", {"mode": "shifted"},
         SegmentLayout.rmt_encoder(6, 3).last(4)),
        (ValueError, "TOKENS holds queries but is not among the keys", {}, SegmentLayout.memformer_read(6, 3)),
        (TypeError, r"relative\.key must be a torch\.Tensor, got list", {"key": [1.0]}, SMALL),
        (TypeError, "must be float32, float16, bfloat16 or float64, got torch.int64", {"key": KEY.long()}, SMALL),
        (TypeError, r"relative\.key must have the dtype of query", {"key": KEY.double()}, SMALL),
        (ValueError, r"relative\.key must be on the device of query", {"key": KEY.to("meta")}, SMALL),
    ],
)  # fmt: skip
def test_refused(error: type[Exception], match: str, given: dict[str, Any], layout: SegmentLayout) -> None:
    query, key = torch.zeros(1, 2, layout.num_queries, 8), torch.zeros(1, 2, layout.num_keys, 8)
    with pytest.raises(error, match=match):
        segment_attention(query, key, key, layout, relative=Relative(**{"key": KEY} | given))


def test_the_wrong_kind_of_argument() -> None:
    query, key = torch.zeros(1, 2, SMALL.num_queries, 8), torch.zeros(1, 2, SMALL.num_keys, 8)
    with pytest.raises(TypeError, match="relative must be a Relative or None, got Tensor"):
        segment_attention(query, key, key, SMALL, relative=KEY)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match=r"slopes must be a tensor of shape \(heads,\), got list"):
        Relative.alibi([0.5], 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="heads must be an int of at least 1, got 0"):
        alibi_slopes(0)


@pytest.mark.parametrize(
    ("layout", "reason"),
    [
        (SegmentLayout.membart(6, 3), "leave out SELF rules"),
        (
            SegmentLayout(read=3, tokens=4, write=3, queries=("read", "write"), rules={("read", "read"): Rule.FULL}),
            "query rows that follow one another among the keys",
        ),
    ],
)
def test_what_the_cpu_leaves_to_the_reference(layout: SegmentLayout, reason: str) -> None:
    if cpu.why_missing:
        pytest.skip(cpu.why_missing)
    query, key = torch.zeros(1, 2, layout.num_queries, 8), torch.zeros(1, 2, layout.num_keys, 8)
    chosen = explain(query, key, key, layout, relative=Relative(KEY))
    assert chosen.backend == "reference"
    assert reason in chosen.refused["cpu"]
    with pytest.raises(ValueError, match=reason):
        segment_attention(query, key, key, layout, relative=Relative(KEY), backend="cpu")
