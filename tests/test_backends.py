"""Every backend runs every case of the shared suite."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.cases import PUBLISHED
from benchmarks.cases import Case as PublishedCase
from rmt_kernels import SegmentLayout
from rmt_kernels.backends import cpu, cuda
from rmt_kernels.reference import segment_mask
from tests.draws import NAMED, draw
from tests.suite import BACKENDS, BF16, F32, KERNELS, Backend, Case, Problem, check, make, on_backend, refusal, results

pytestmark = pytest.mark.usefixtures("nan_memory")
FAST, MANY = range(60), range(60, 600)


def backends(given: tuple[Backend, ...] = BACKENDS) -> Any:
    """The innermost parameter, so that what is expected of a case is computed once for all of them."""
    return pytest.mark.parametrize("backend", given, ids=lambda backend: backend.name)


def made(case: Case, backend: Backend, with_lse: bool = True) -> Problem:
    """The tensors of a case that the backend serves."""
    problem = make(case, backend.device)
    reason = refusal(backend.name, problem, with_lse)
    if reason is not None:
        pytest.skip(reason)
    return problem


def run(case: Case, backend: Backend) -> None:
    if backend.device != "cpu" and not torch.cuda.is_available():
        pytest.skip(f"no device {backend.device}")
    case = backend.version(case)
    with_lse = backend.kernels or refusal(backend.name, make(case, backend.device), True) is None
    if not with_lse and case.grads == "lse":
        pytest.skip(str(refusal(backend.name, make(case, backend.device), True)))
    problem = made(case, backend, with_lse)
    check(case, results(problem, on_backend(backend.name, with_lse), None, with_lse), with_lse, backend.factor)


@backends()
@pytest.mark.parametrize("name", NAMED)
def test_named(name: str, backend: Backend) -> None:
    run(NAMED[name], backend)


def labelled(numbers: range) -> list[Any]:
    return [pytest.param(number, id=f"{number}-{draw(number).label}") for number in numbers]


@backends()
@pytest.mark.parametrize("number", labelled(FAST))
def test_drawn(number: int, backend: Backend) -> None:
    run(draw(number), backend)


@pytest.mark.slow
@backends()
@pytest.mark.parametrize("number", MANY)
def test_drawn_many(number: int, backend: Backend) -> None:
    run(draw(number), backend)


def published(case: PublishedCase, dtype: torch.dtype, batch: int, kv_heads: int) -> Case:
    return Case(
        case.layout, min(case.batch, batch), min(case.kv_heads, kv_heads), case.heads // case.kv_heads, case.head_dim,
        dtype, strides="projected",
    )  # fmt: skip


@backends()
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
@pytest.mark.parametrize("case", PUBLISHED, ids=lambda case: case.name)
def test_published(case: PublishedCase, dtype: torch.dtype, backend: Backend) -> None:
    """Few samples and heads: kernels are batch-invariant, so the others hold nothing new."""
    if backend.interpreted and case.layout.num_queries * case.layout.num_keys > 200**2:
        pytest.skip("too large for the interpreter")
    run(published(case, dtype, batch=2, kv_heads=1), backend)


@pytest.mark.slow
@backends()
@pytest.mark.parametrize("case", PUBLISHED, ids=lambda case: case.name)
def test_published_whole(case: PublishedCase, backend: Backend) -> None:
    if backend.interpreted:
        pytest.skip("too large for the interpreter")
    run(published(case, BF16, case.batch, case.kv_heads), backend)


@backends(KERNELS)
def test_kernels_serve_everything(backend: Backend) -> None:
    """A kernel backend that works here must refuse no case, or the tests above would skip in silence."""
    missing = {"cpu": cpu.why_missing, "cuda": cuda.why_missing}.get(backend.name)
    if missing:
        pytest.skip(missing)
    every = [*NAMED.values(), *(draw(number) for number in (*FAST, *MANY))]
    expected: dict[str, str] = {}
    if backend.interpreted:  # it says no to bfloat16, see test_triton.py
        every = [case for case in every if case.dtype is not BF16]
    if backend.name == "cuda":  # wide heads are the Triton backend's
        every = [backend.typed(case) for case in every]
        reason = "its largest head_dim is 128, got {}; use backend='triton'"
        expected = {case.label: reason.format(case.head_dim) for case in every if case.head_dim > 128}
    refused = {case.label: refusal(backend.name, make(case, backend.device), True) for case in every}
    assert {label: reason for label, reason in refused.items() if reason} == expected


CACHED = SegmentLayout.rmt_decoder(97, 8, cache=65)


@backends(KERNELS)
@pytest.mark.parametrize("how", ["column", "expanded"])
def test_lengths_lie_in_memory_as_they_like(how: str, backend: Backend) -> None:
    dense = made(backend.typed(Case(CACHED, batch=3, kv_heads=1, padding="right", stale=True)), backend)
    strided = replace(dense, options=dict(dense.options))
    for name, value in (("token_lengths", 40), ("cache_starts", 9)):
        if how == "expanded":
            strided.options[name] = torch.tensor([value], dtype=torch.int32, device=backend.device).expand(3)
            dense.options[name] = strided.options[name].contiguous()
        else:
            strided.options[name] = torch.stack([dense.options[name]] * 4, dim=1)[:, 1]
    assert not strided.options["token_lengths"].is_contiguous()
    expected, found = (results(problem, on_backend(backend.name)) for problem in (dense, strided))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@backends(KERNELS)
def test_a_window_without_end(backend: Backend) -> None:
    """The largest window there is hides nothing."""
    case = backend.typed(Case(SegmentLayout.rmt_decoder(130, 0), batch=1, kv_heads=1))
    plain = made(case, backend)
    endless = made(replace(case, layout=SegmentLayout.rmt_decoder(130, 0, window=2**31 - 1)), backend)
    expected, found = (results(problem, on_backend(backend.name)) for problem in (plain, endless))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def unused(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of padding (batch, 1, queries), and keys that are padding, stale or in the future (batch, 1, keys)."""
    layout, options, batch = problem.case.layout, problem.options, problem.case.batch

    def given(name: str, default: int) -> torch.Tensor:
        value = options.get(name)
        return (torch.full((batch,), default) if value is None else value.cpu())[:, None]

    mask, _ = segment_mask(
        layout, batch, torch.device("cpu"),
        **{name: None if options.get(name) is None else options[name].cpu() for name in
           ("token_lengths", "token_starts", "cache_starts", "query_start")},
    )  # fmt: skip
    key = torch.arange(layout.num_keys)[None]
    token = key - layout.key_size("cache") - layout.key_size("read")
    last = given("token_lengths", layout.tokens)
    if problem.case.start:
        last = given("query_start", 0) + layout.num_queries
    of_tokens = (token >= 0) & (token < layout.key_size("tokens"))
    keys = (key < given("cache_starts", 0)) | (of_tokens & ((token < given("token_starts", 0)) | (token >= last)))
    assert not (mask & keys[:, None]).any()
    return (~mask.any(dim=2))[:, None].to(problem.inputs["query"].device), keys[:, None].to(
        problem.inputs["key"].device
    )


@backends(KERNELS)
@pytest.mark.parametrize("dtype", [F32, torch.float16], ids=["f32", "f16"])
@pytest.mark.parametrize(
    "case",
    [
        Case(SegmentLayout.rmt_decoder(140, 8), batch=4, kv_heads=1, padding="right"),
        Case(SegmentLayout.causal(140, 8), batch=4, kv_heads=1, group=3, padding="left", dropout_p=0.2),
        Case(CACHED, batch=4, kv_heads=1, padding="right", stale=True, apart=True, head_dim=40),
        Case(SegmentLayout.rmt_decoder(140, 8, cache=65, window=30), batch=4, kv_heads=1, padding="left", stale=True),
        Case(SegmentLayout.rmt_encoder(140, 8), batch=4, kv_heads=1, padding="right"),
        Case(SegmentLayout.membart(100, 32), batch=4, kv_heads=1, padding="right"),
        Case(CACHED.decoding(3), batch=4, kv_heads=1, group=2, start=True, stale=True),
    ],
    ids=lambda case: case.label,
)
def test_what_nobody_sees_may_hold_anything(case: Case, dtype: torch.dtype, backend: Backend) -> None:
    """Padding, stale and future keys, and rows of padding: NaN there changes no bit of any result."""
    case = backend.typed(replace(case, dtype=dtype))
    clean, dirty = made(case, backend), made(case, backend)
    assert clean.grad_lse is not None
    assert dirty.grad_lse is not None
    assert dirty.grad_out is not None
    blind, unseen = unused(clean)
    assert blind.any() or unseen.any()
    size = case.layout.key_size("cache") if case.apart else 0
    hidden = {
        "query": blind, "key": unseen[..., size:], "value": unseen[..., size:], "cache_key": unseen[..., :size],
        "cache_value": unseen[..., :size],
    }  # fmt: skip
    for name, tensor in dirty.inputs.items():
        tensor.masked_fill_(hidden[name][..., None], float("nan"))
    dirty.grad_out.masked_fill_(blind[..., None], float("nan"))
    dirty.grad_lse.masked_fill_(blind, float("nan"))
    expected, found = results(clean, on_backend(backend.name)), results(dirty, on_backend(backend.name))
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


@backends(KERNELS)
@pytest.mark.parametrize("dtype", [F32, BF16, torch.float16], ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize(
    "case",
    [
        Case(CACHED, batch=3, group=2, head_dim=41),
        Case(CACHED, batch=3, padding="right", stale=True, dropout_p=0.2),
        Case(SegmentLayout.rmt_decoder(97, 8, cache=65, window=30), batch=3, padding="left", stale=True),
        Case(CACHED.decoding(3), batch=3, start=True, stale=True, head_dim=64),
        Case(SegmentLayout.rmt_decoder(40, 8, cache=1, read_cache=True)),
    ],
    ids=lambda case: case.label,
)
def test_cache_apart_is_bit_equal(case: Case, dtype: torch.dtype, backend: Backend) -> None:
    """A cache given apart gives the same bits as one concatenated with the other keys."""
    case = backend.version(replace(case, dtype=dtype))
    joined, apart = made(case, backend), made(replace(case, apart=True), backend)
    a, b = results(joined, on_backend(backend.name)), results(apart, on_backend(backend.name))
    for name in ("key", "value"):
        b[f"grad {name}"] = torch.cat([b.pop(f"grad cache_{name}"), b[f"grad {name}"]], dim=2)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
