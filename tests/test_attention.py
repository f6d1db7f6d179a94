"""segment_attention as users meet it: what it refuses, which backend it takes, and what it works under."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rmt_kernels import Rule, SegmentLayout, explain, ops, reference_attention, segment_attention
from rmt_kernels.backends import cpu
from tests.suite import (
    BF16,
    F16,
    F32,
    F64,
    KERNELS,
    Backend,
    Case,
    Problem,
    make,
    nan_filled_memory,
    on_backend,
    refusal,
    results,
)

LAYOUT = SegmentLayout.rmt_decoder(20, 3, cache=5)
CASE = Case(LAYOUT, batch=2, kv_heads=2, group=2, head_dim=16)
needs_cpu = pytest.mark.skipif(bool(cpu.why_missing), reason=cpu.why_missing)
Call = dict[str, Any]


def arguments(**changed: Any) -> Call:
    """Valid arguments, some changed; ``cache=...`` takes the cache out of key and value."""
    query, key, value = (torch.randn(2, heads, rows, 16) for heads, rows in ((4, 26), (2, 31), (2, 31)))
    return {"query": query, "key": key, "value": value, "layout": LAYOUT} | changed


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def noise(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(*shape).to(dtype)


CACHE = (noise(2, 2, 5, 16), noise(2, 2, 5, 16))
SHORT = {"key": noise(2, 2, 26, 16), "value": noise(2, 2, 26, 16)}  # key rows without the cache's
STEP = {"layout": LAYOUT.decoding(2), "query": noise(2, 4, 2, 16)}

BAD: list[tuple[str, type[Exception], Call]] = [
    # wrong types
    ("layout", TypeError, {"layout": None}),
    ("layout", TypeError, {"layout": {"tokens": 20}}),
    ("query", TypeError, {"query": None}),
    ("key", TypeError, {"key": [1.0]}),
    ("value", TypeError, {"value": "value"}),
    ("cache", TypeError, {"cache": noise(2, 2, 5, 16)}),
    ("cache", TypeError, {"cache": (noise(2, 2, 5, 16),)}),
    ("cache", TypeError, {"cache": 3}),
    (r"cache\[1\]", TypeError, {"cache": (CACHE[0], None), **SHORT}),
    ("scale", TypeError, {"scale": "1"}),
    ("scale", TypeError, {"scale": True}),
    ("scale", TypeError, {"scale": torch.ones(())}),
    ("dropout_p", TypeError, {"dropout_p": "0.1"}),
    ("dropout_p", TypeError, {"dropout_p": None}),
    ("dropout_p", TypeError, {"dropout_p": False}),
    ("seed", TypeError, {"seed": 3}),
    ("seed", TypeError, {"seed": torch.zeros(1)}),
    ("seed", TypeError, {"seed": int32(3)}),
    *((name, TypeError, {name: [20, 20]}) for name in ("token_lengths", "token_starts", "cache_starts")),
    *((name, TypeError, {name: torch.ones(2)}) for name in ("token_lengths", "token_starts", "cache_starts")),
    *((name, TypeError, {name: 3}) for name in ("token_lengths", "token_starts", "cache_starts", "query_start")),
    # wrong ranks
    ("query", ValueError, {"query": noise(4, 26, 16)}),
    ("key", ValueError, {"key": noise(31, 16)}),
    ("value", ValueError, {"value": noise(1, 2, 2, 31, 16)}),
    (r"cache\[0\]", ValueError, {"cache": (noise(2, 5, 16), CACHE[1]), **SHORT}),
    # sizes that disagree
    ("query", ValueError, {"query": noise(2, 4, 25, 16)}),
    ("query", ValueError, {"query": noise(2, 3, 26, 16)}),
    ("query", ValueError, {"query": noise(2, 0, 26, 16)}),
    ("query", ValueError, {"query": noise(2, 4, 26, 0), "key": noise(2, 2, 31, 0), "value": noise(2, 2, 31, 0)}),
    ("key", ValueError, {"query": noise(3, 4, 26, 16)}),
    ("key", ValueError, {"query": noise(2, 4, 26, 8)}),
    ("key", ValueError, {"key": noise(2, 2, 26, 16)}),
    ("key", ValueError, {"cache": CACHE}),
    ("value", ValueError, {"value": noise(2, 1, 31, 16)}),
    ("value", ValueError, {"value": noise(2, 2, 31, 8)}),
    ("heads", ValueError, {"key": noise(2, 0, 31, 16), "value": noise(2, 0, 31, 16)}),
    (r"cache\[0\]", ValueError, {"cache": (noise(2, 2, 4, 16), CACHE[1]), **SHORT}),
    (r"cache\[1\]", ValueError, {"cache": (CACHE[0], noise(2, 4, 5, 16)), **SHORT}),
    # dtypes and devices
    *((name, TypeError, {name: noise(2, 2 if name != "query" else 4, 31 if name != "query" else 26, 16, dtype=dtype)})
      for name in ("query", "key", "value") for dtype in (torch.int32, torch.complex64, torch.bool, torch.float8_e5m2)),
    ("dtype", TypeError, {"query": noise(2, 4, 26, 16, dtype=BF16)}),
    ("dtype", TypeError, {"value": noise(2, 2, 31, 16, dtype=F16)}),
    ("dtype", TypeError, {"cache": (CACHE[0], CACHE[1].double()), **SHORT}),
    ("key", ValueError, {"key": torch.empty(2, 2, 31, 16, device="meta")}),
    (r"cache\[0\]", ValueError, {"cache": (torch.empty(2, 2, 5, 16, device="meta"), CACHE[1]), **SHORT}),
    ("token_lengths", ValueError, {"token_lengths": torch.empty(2, dtype=torch.int32, device="meta")}),
    ("seed", ValueError, {"dropout_p": 0.1, "seed": torch.empty(1, dtype=torch.int64, device="meta")}),
    # values
    *(("scale", ValueError, {"scale": value}) for value in (float("nan"), float("inf"), -float("inf"))),
    *(("dropout_p", ValueError, {"dropout_p": value}) for value in (-0.1, 1, 1.0, 2.0, float("nan"), float("inf"))),
    ("seed", ValueError, {"dropout_p": 0.1, "seed": torch.tensor(3)}),
    ("seed", ValueError, {"dropout_p": 0.1, "seed": torch.tensor([3, 4])}),
    ("relative", TypeError, {"relative": object()}),
    ("backend", ValueError, {"backend": "fastest"}),
    ("backend", ValueError, {"backend": ""}),
    ("backend", (TypeError, ValueError), {"backend": None}),  # type: ignore[list-item]
    ("backend", (TypeError, ValueError), {"backend": ["cpu"]}),  # type: ignore[list-item]
    ("token_starts", ValueError, {"token_starts": int32(0, 0), "token_lengths": int32(20, 20)}),
    *((name, ValueError, {name: value}) for name in ("token_lengths", "token_starts", "cache_starts")
      for value in (int32(1), int32(1, 2, 3), torch.ones(2, 1, dtype=torch.int32))),
    *(("query_start", ValueError, STEP | {"query_start": value}) for value in (
        int32(0), torch.zeros(2, 2, dtype=torch.int32),
    )),
    ("query_start", ValueError, {"query_start": int32(0, 0)}),
    *(("return_lse", TypeError, {"return_lse": value}) for value in (None, "yes", torch.ones(2))),
]  # fmt: skip


# Numbers inside a tensor; int64 ones must not wrap around into the range.
OUT_OF_RANGE: list[tuple[str, type[Exception], Call]] = [
    *((name, ValueError, {name: value}) for name in ("token_lengths", "token_starts", "cache_starts") for value in (
        int32(-1, 3), int32(3, 21), int32(0, 2**31 - 1), torch.tensor([0, 2**31]), torch.tensor([0, 2**32]),
        torch.tensor([-(2**32), 0]), torch.tensor([2**63 - 1, 0]), torch.tensor([0, -(2**63)]),
    )),
    *(("query_start", ValueError, STEP | {"query_start": value}) for value in (
        int32(0, 19), int32(-1, 0), torch.tensor([0, 2**32]),
    )),
]  # fmt: skip


def bad(given: list[tuple[str, type[Exception], Call]]) -> Any:
    ids = [f"{i}-{word}" for i, (word, _, _) in enumerate(given)]
    return pytest.mark.parametrize(("word", "kind", "changed"), given, ids=ids)


@pytest.mark.parametrize("backend", ["auto", "cpu", "stock", "reference"])
@bad(BAD + OUT_OF_RANGE)
def test_bad_input(word: str, kind: type[Exception], changed: Call, backend: str) -> None:
    if backend == "cpu" and cpu.why_missing:
        pytest.skip(cpu.why_missing)
    with pytest.raises(kind, match=word):
        segment_attention(**arguments(**({"backend": backend} | changed)))


@bad([entry for entry in BAD if entry[0] != "backend"])
def test_bad_input_to_explain(word: str, kind: type[Exception], changed: Call) -> None:
    with pytest.raises(kind, match=word):
        explain(**arguments(**changed))


@needs_cpu
@pytest.mark.parametrize("which", ["token_lengths", "token_starts", "cache_starts", "query_start"])
def test_the_kernels_check_values_themselves(which: str) -> None:
    """Even a call of the operator itself cannot read past a tensor."""
    query, key, value = (noise(2, 2, rows, 16) for rows in (2, 31, 31))
    for bad in (int32(0, 100), int32(-1, 0), int32(2**31 - 1, 0)):
        given = {"query": query, "key": key, "value": value, which: bad}
        with pytest.raises(ValueError, match=which):
            ops.forward(*operator_call("cpu", LAYOUT.decoding(2), given))


# -- fuzz --------------------------------------------------------------------------------------------------------------

GARBAGE: tuple[Callable[[], Any], ...] = (
    lambda: None, lambda: "x", lambda: -1, lambda: 2**40, lambda: 0.5, lambda: float("nan"), lambda: [], lambda: (),
    lambda: object(), lambda: torch.zeros(()), lambda: torch.zeros(0), lambda: torch.ones(2, dtype=torch.int64) * 2**62,
    lambda: int32(-5, 5), lambda: int32(7, 2**31 - 1), lambda: torch.ones(2, 2, 31, 16).to_sparse(),
    lambda: torch.randn(2, 4, 26, 16, dtype=F64), lambda: torch.randn(2, 4, 26, 16, dtype=BF16),
    lambda: torch.empty(2, 4, 26, 16, device="meta"), lambda: noise(2, 2, 31, 16)[:, :, :, ::2],
    lambda: torch.quantize_per_tensor(torch.ones(2, 2, 31, 16), 0.1, 0, torch.qint8),
    lambda: (noise(2, 2, 5, 16), noise(2, 2, 5, 16)), lambda: SegmentLayout(tokens=26, cache=5), lambda: True,
    lambda: torch.tensor([3]), lambda: torch.zeros(2, dtype=torch.uint8),
    lambda: noise(2, 1, 31, 16).expand(2, 2, 31, 16),
)  # fmt: skip
NAMES = (
    "query", "key", "value", "layout", "cache", "scale", "token_lengths", "token_starts", "cache_starts", "query_start",
    "dropout_p", "seed", "relative", "return_lse", "backend",
)  # fmt: skip


def fuzzed(rng: random.Random) -> Call:
    """Arguments of a random small call, one or two of them replaced by garbage."""
    layout = SegmentLayout.rmt_decoder(rng.randint(0, 20), rng.randint(0, 3), cache=rng.randint(0, 5))
    batch, kv_heads, head_dim = rng.randint(0, 3), rng.randint(1, 2), rng.choice((1, 16, 41, 256, 257))
    dtype = rng.choice((F32, F32, BF16, F16, F64))
    call: Call = {
        "query": noise(batch, 2 * kv_heads, layout.num_queries, head_dim, dtype=dtype),
        "key": noise(batch, kv_heads, layout.num_keys, head_dim, dtype=dtype),
        "value": noise(batch, kv_heads, layout.num_keys, head_dim, dtype=dtype),
        "layout": layout,
        "backend": rng.choice(("auto", "cpu", "cuda", "reference", "stock")),
    }
    for name in ("token_lengths", "token_starts", "cache_starts"):
        if rng.random() < 0.3:
            most = layout.cache if name == "cache_starts" else layout.tokens
            least, most = rng.choice(((0, most), (0, most), (0, most), (-1, most + 1)))
            call[name] = torch.tensor([rng.randint(least, most) for _ in range(batch)], dtype=torch.int32)
    for _ in range(rng.choice((0, 0, 1, 1, 2))):
        name = rng.choice(NAMES)
        if rng.random() < 0.4 and isinstance(call.get(name), Tensor) and call[name].dim() == 4:
            shape = [max(0, size + rng.choice((-1, 0, 0, 1))) for size in call[name].shape]
            call[name] = noise(*shape, dtype=dtype)
        else:
            call[name] = rng.choice(GARBAGE)()
    return call


def fuzz(number: int) -> bool:
    """True where the call was served; raises where it fails in any way but a clear refusal."""
    torch.manual_seed(number)
    call = fuzzed(random.Random(number))
    refused = ""
    try:
        with nan_filled_memory():
            found = segment_attention(**call)
    except (TypeError, ValueError) as error:
        refused = str(error)
    if refused:
        assert any(name in refused for name in NAMES), f"{number}: names no argument: {refused}"
        return False
    out = found[0] if isinstance(found, tuple) else found
    options = {name: value for name, value in call.items() if name not in ("backend", "return_lse", "relative")}
    query, key, value = (options.pop(name) for name in ("query", "key", "value"))
    if options.get("dropout_p") and options.get("seed") is None:
        assert out.shape == query.shape
        return True
    if options.get("cache") is not None:
        options["cache"] = tuple(tensor.double() for tensor in options["cache"])
    expected, _ = reference_attention(query.double(), key.double(), value.double(), **options)
    tolerance = {F64: 1e-12, F32: 1e-4, BF16: 5e-2, F16: 1e-2}[query.dtype]
    assert out.shape == expected.shape
    assert torch.allclose(out.double(), expected, atol=tolerance, rtol=tolerance), number
    return True


@pytest.mark.parametrize("block", range(6))
def test_fuzz(block: int) -> None:
    served = sum(fuzz(number) for number in range(150 * block, 150 * (block + 1)))
    assert 20 < served < 130


@pytest.mark.slow
def test_fuzz_longer() -> None:
    for number in range(1000, 20_000):
        fuzz(number)


# -- which backend -----------------------------------------------------------------------------------------------------


def test_a_named_backend_that_cannot() -> None:
    wide = {"query": noise(2, 4, 26, 257), "key": noise(2, 2, 31, 257), "value": noise(2, 2, 31, 257)}
    with pytest.raises(ValueError, match=r"backend='cpu'.*does not serve this call: .*use backend='auto'"):
        segment_attention(**arguments(**wide, backend="cpu"))
    double = {name: tensor.double() for name, tensor in wide.items()}
    with pytest.raises(ValueError, match="backend='cpu'"):
        segment_attention(**arguments(**double, backend="cpu"))
    assert segment_attention(**arguments(**double)).dtype is F64


def test_explain() -> None:
    explained = explain(**arguments())
    assert explained.backend == ("stock" if cpu.why_missing else "cpu")
    assert explained.backend in str(explained)
    double = {name: value.double() for name, value in arguments().items() if isinstance(value, Tensor)}
    explained = explain(**arguments(**double, return_lse=True))
    assert explained.backend == "reference"
    assert list(explained.refused) == ["cpu", "cuda", "triton", "stock"]
    assert "lse" in explained.refused["stock"]
    assert all(f"{name}: refused, {reason}" in str(explained) for name, reason in explained.refused.items())
    if not cpu.why_missing:
        assert "float64" in explained.refused["cpu"]


def test_auto_is_what_explain_says() -> None:
    call = arguments()
    name = explain(**call).backend
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the fallback's, where nothing is compiled
        assert torch.equal(segment_attention(**call), segment_attention(**call, backend=name))


# -- results -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpu", "stock", "reference"])
@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64])
def test_shapes_and_dtypes(backend: str, dtype: torch.dtype) -> None:
    call: Call = {name: t.to(dtype) if isinstance(t, Tensor) else t for name, t in arguments().items()}
    with_lse = backend != "stock"
    if backend == "cpu" and (cpu.why_missing or dtype is F64):
        pytest.skip(cpu.why_missing or "float64 is the reference's")
    found = segment_attention(**call | {"backend": backend, "return_lse": with_lse})
    out = found[0] if isinstance(found, tuple) else found
    assert (out.shape, out.dtype) == ((2, 4, 26, 16), dtype)
    if isinstance(found, tuple):
        assert (found[1].shape, found[1].dtype) == ((2, 4, 26), F64 if dtype is F64 else F32)


@needs_cpu
def test_results_lie_in_memory_as_their_tensors() -> None:
    """After a projection rows lie outside heads; then joining the heads of out copies nothing."""
    call = arguments()
    tensors = {name: call[name].contiguous().requires_grad_() for name in ("query", "key", "value")}
    out = segment_attention(**call | tensors, backend="cpu")
    grads = torch.autograd.grad(out.sum(), list(tensors.values()))
    assert all(tensor.is_contiguous() for tensor in (out, *grads))

    tensors = {
        name: tensor.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
        for name, tensor in tensors.items()
    }
    out = segment_attention(**call | tensors, backend="cpu")
    grads = torch.autograd.grad(out.sum(), list(tensors.values()))
    assert all(tensor.transpose(1, 2).is_contiguous() for tensor in (out, *grads))


@pytest.fixture(params=KERNELS, ids=lambda backend: backend.name)
def kernels(request: pytest.FixtureRequest) -> Backend:
    backend: Backend = request.param
    reason = refusal(backend.name, made(CASE, backend), True)
    if reason is not None:
        pytest.skip(reason)
    return backend


def made(case: Case, kernels: Backend) -> Problem:
    """The tensors of a case in a dtype that the kernels serve."""
    return make(kernels.typed(case), kernels.device)


@pytest.mark.parametrize(
    "wanted", [("query",), ("key",), ("value",), ("query", "value"), ("cache_key",), ("cache_value",)]
)
def test_gradients_of_some_inputs(kernels: Backend, wanted: tuple[str, ...]) -> None:
    problem = made(Case(LAYOUT, group=2, apart=True), kernels)
    every = results(problem, on_backend(kernels.name))
    leaves = {n: t.detach().requires_grad_(n in wanted) for n, t in problem.inputs.items()}
    options = problem.options | {"cache": (leaves["cache_key"], leaves["cache_value"])}
    out, lse = on_backend(kernels.name)(leaves["query"], leaves["key"], leaves["value"], LAYOUT, **options)
    assert problem.grad_lse is not None
    found = torch.autograd.grad((out, lse), [leaves[n] for n in wanted], (problem.grad_out, problem.grad_lse))
    for name, grad in zip(wanted, found, strict=True):
        assert torch.equal(grad, every[f"grad {name}"])


def test_no_gradient_where_none_is_wanted(kernels: Backend) -> None:
    problem = made(CASE, kernels)
    inputs = [tensor.detach() for tensor in problem.inputs.values()]
    assert not segment_attention(inputs[0], inputs[1], inputs[2], LAYOUT, backend=kernels.name).requires_grad
    positional, _, _ = problem.arguments()
    with torch.no_grad():
        assert not segment_attention(
            positional[0], positional[1], positional[2], LAYOUT, backend=kernels.name
        ).requires_grad


def test_double_backward_is_refused(kernels: Backend) -> None:
    positional, _, leaves = made(CASE, kernels).arguments()
    out = segment_attention(positional[0], positional[1], positional[2], LAYOUT, backend=kernels.name)
    grads = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
    with pytest.raises(NotImplementedError, match="backend='reference'"):
        torch.autograd.grad(grads[0].sum(), leaves)


def test_inputs_changed_before_backward_are_noticed(kernels: Backend) -> None:
    positional, _, leaves = made(CASE, kernels).arguments()
    query = positional[0] * 1
    out = segment_attention(query, positional[1], positional[2], LAYOUT, backend=kernels.name)
    query.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out.sum(), leaves)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(kernels: Backend, dropout_p: float, use_reentrant: bool) -> None:
    """The same gradients, the seed drawn inside included."""
    call = partial(segment_attention, layout=LAYOUT, dropout_p=dropout_p, backend=kernels.name)

    def gradients(run: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        positional, _, leaves = made(CASE, kernels).arguments()
        torch.manual_seed(3)
        out = run(*positional)
        out.square().sum().backward()
        return (out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None))

    plain = gradients(call)
    again = gradients(partial(checkpoint, call, use_reentrant=use_reentrant))
    assert len(plain) == len(again) == 4
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_autocast(backend: str) -> None:
    call: Call = arguments(backend=backend)
    with torch.autocast("cpu", dtype=BF16):
        out = segment_attention(**call)
    assert out.dtype is BF16
    narrow: Call = {n: t.to(BF16) if isinstance(t, Tensor) else t for n, t in call.items()}
    assert torch.equal(out, segment_attention(**narrow))
    apart = arguments(**SHORT, cache=CACHE, backend=backend)
    with torch.autocast("cpu", dtype=BF16):
        assert segment_attention(**apart).dtype is BF16
        mixed = arguments(backend=backend)
        mixed["query"] = mixed["query"].to(BF16)
        assert segment_attention(**mixed).dtype is BF16
        double: Call = {n: t.double() if isinstance(t, Tensor) else t for n, t in arguments().items()}
        assert segment_attention(**double).dtype is F64
    leaf = call["query"].requires_grad_()
    with torch.autocast("cpu", dtype=BF16):
        segment_attention(**call).sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.dtype is F32


# -- torch.library and torch.compile -----------------------------------------------------------------------------------

OP_CASES = {
    "plain": CASE,
    "grouped bf16": Case(LAYOUT, group=2, dtype=BF16, padding="right", strides="projected"),
    "cache apart": Case(LAYOUT, apart=True, stale=True, padding="left"),
    "dropout": Case(LAYOUT, dropout_p=0.2),
    "decoding": Case(LAYOUT.decoding(2), start=True),
    "strided": Case(SegmentLayout.membart(7, 3), strides="column", dtype=F16),
}


def operator_call(backend: str, layout: SegmentLayout, given: Call) -> tuple[Any, ...]:
    """The operator's arguments in the order of its schema; tensors that are not given are None."""
    given = {"layout": layout.ints, "scale": 0.25, "dropout_p": 0.0, "relative": (), "backend": backend} | given
    return tuple(given.get(argument.name) for argument in ops.forward._schema.arguments)


def op_arguments(name: str, backend: Backend, requires_grad: bool) -> tuple[Any, ...]:
    case = OP_CASES[name]
    problem = made(case, backend)
    inputs = {n: t.detach().requires_grad_(requires_grad) for n, t in problem.inputs.items()}
    return operator_call(backend.name, case.layout, inputs | problem.options | {"scale": 0.25})


@pytest.mark.parametrize("name", OP_CASES)
def test_opcheck_forward(kernels: Backend, name: str) -> None:
    torch.library.opcheck(torch.ops.rmt_kernels.forward.default, op_arguments(name, kernels, True))


@pytest.mark.parametrize("with_lse", [True, False])
@pytest.mark.parametrize("name", OP_CASES)
def test_opcheck_backward(kernels: Backend, name: str, with_lse: bool) -> None:
    forward = op_arguments(name, kernels, False)
    out, lse = ops.forward(*forward)
    grads = (torch.randn_like(out), torch.randn_like(lse) if with_lse else None)
    torch.library.opcheck(torch.ops.rmt_kernels.backward.default, (*grads, out, lse, *forward))


COMPILED = {
    "plain": CASE,
    "dropout": Case(LAYOUT, dropout_p=0.2),
    "lengths": Case(LAYOUT, padding="right", dtype=BF16, strides="projected"),
    "starts": Case(LAYOUT, padding="left", stale=True),
    "cache": Case(LAYOUT, apart=True, stale=True, group=2),
    "decoding": Case(LAYOUT.decoding(), start=True, apart=True),
    "sum": Case(LAYOUT, grads="sum"),
}


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", COMPILED)
def test_compile(kernels: Backend, name: str, compiler: str) -> None:
    """One graph, and the same bits, forward and backward."""
    torch.compiler.reset()
    problem = made(COMPILED[name], kernels)
    reason = refusal(kernels.name, problem, True)
    if reason is not None:
        pytest.skip(reason)
    eager = on_backend(kernels.name)
    compiled = torch.compile(eager, backend=compiler, fullgraph=True, dynamic=False)
    a, b = results(problem, eager), results(problem, compiled)
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


def test_compile_with_the_default_backend_and_seed() -> None:
    torch.compiler.reset()

    @partial(torch.compile, backend="aot_eager", fullgraph=True)
    def block(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = segment_attention(2 * query, key, value, LAYOUT, dropout_p=0.5)
        return out.transpose(1, 2).flatten(2)

    call = arguments()
    first, second = (block(call["query"], call["key"], call["value"]) for _ in range(2))
    assert first.shape == (2, 26, 64)
    assert not torch.equal(first, second), "each call draws its own dropout mask"


def test_compile_does_not_recompile_for_new_lengths(kernels: Backend) -> None:
    torch.compiler.reset()
    graphs = 0

    def counting(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        return graph.forward

    names, given = ("query", "key", "value"), arguments()
    call = {name: given[name].to(kernels.device, kernels.typed(CASE).dtype) for name in names}
    compiled = torch.compile(
        partial(segment_attention, layout=LAYOUT, backend=kernels.name), backend=counting, fullgraph=True
    )
    for lengths in (int32(3, 20), int32(0, 7), int32(20, 20)):
        lengths = lengths.to(kernels.device)
        found = compiled(**call, token_lengths=lengths)
        assert torch.equal(found, segment_attention(**call, layout=LAYOUT, backend=kernels.name, token_lengths=lengths))
    assert graphs == 1


def test_a_layout_in_a_mask_free_loop(kernels: Backend) -> None:
    """Decoding row by row into a static buffer gives the rows of the whole call."""
    layout = SegmentLayout.rmt_decoder(17, 3, cache=4)
    problem = made(Case(layout, batch=2, group=2), kernels)
    query, key, value = (tensor.detach() for tensor in problem.inputs.values())
    tolerance = max(2e-6, torch.finfo(query.dtype).eps)
    whole = segment_attention(query, key, value, layout, backend=kernels.name)
    for t in range(17):
        start = torch.full((2,), t, dtype=torch.int32, device=kernels.device)
        row = segment_attention(
            query[:, :, 3 + t : 4 + t], key, value, layout.decoding(), query_start=start, backend=kernels.name
        )
        assert torch.allclose(row, whole[:, :, 3 + t : 4 + t], atol=tolerance, rtol=5 * tolerance)


def test_own_rows_of_one_memory_row() -> None:
    """A SELF region of one row is FULL."""
    by_self = SegmentLayout(tokens=6, write=1, rules={("write", "write"): Rule.SELF, ("write", "tokens"): Rule.FULL})
    by_full = SegmentLayout(tokens=6, write=1, rules={("write", "write"): Rule.FULL, ("write", "tokens"): Rule.FULL})
    assert torch.equal(by_self.dense_mask(), by_full.dense_mask())
