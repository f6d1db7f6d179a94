"""Kernel backends repeat themselves bit for bit: over calls, threads, batches and heads, and in whatever order a GPU
runs blocks, warps and threads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from rmt_kernels import Rule, SegmentLayout
from tests.draws import draw
from tests.emulation import EMULATED, emulated, ordering
from tests.suite import BF16, F16, F32, KERNELS, Backend, Case, Problem, Results, make, on_backend, refusal, results

pytestmark = pytest.mark.usefixtures("nan_memory")

DECODER = SegmentLayout.rmt_decoder(150, 10, cache=65)
CASES = {
    "long": Case(SegmentLayout.rmt_decoder(500, 16), batch=2, kv_heads=2, head_dim=64),
    "long bf16": Case(SegmentLayout.rmt_decoder(500, 16), batch=2, kv_heads=2, head_dim=64, dtype=BF16),
    "grouped": Case(DECODER, batch=3, kv_heads=2, group=3, head_dim=41, padding="right", stale=True),
    "grouped bf16": Case(DECODER, batch=3, kv_heads=2, group=4, head_dim=64, dtype=BF16, padding="left", apart=True),
    "dropout": Case(DECODER, batch=3, kv_heads=3, group=2, dropout_p=0.2, padding="right"),
    "dropout f16": Case(DECODER, batch=3, kv_heads=3, group=2, dropout_p=0.2, dtype=F16, strides="projected"),
    "window": Case(SegmentLayout.rmt_decoder(150, 10, cache=65, window=40), batch=3, padding="left", group=2),
    "slots": Case(SegmentLayout.memformer_write(200, 33), batch=3, padding="right", dtype=BF16, head_dim=64),
    "decoding f16": Case(DECODER.decoding(2), batch=3, kv_heads=2, group=3, start=True, dtype=F16, head_dim=41),
    "decoding": Case(DECODER.decoding(), batch=3, kv_heads=2, group=4, start=True, dtype=BF16, head_dim=64),
    **{str(number): draw(number) for number in range(20)},
}


@pytest.fixture(params=KERNELS, ids=lambda backend: backend.name)
def backend(request: pytest.FixtureRequest) -> Backend:
    chosen: Backend = request.param
    return chosen


IN_THE_INTERPRETER = {"grouped": 2, "dropout f16": 1, "decoding f16": 3, "window": 2}  # and how many samples


@pytest.fixture(params=CASES)
def problem(request: pytest.FixtureRequest, backend: Backend) -> Problem:
    if backend.interpreted and request.param not in IN_THE_INTERPRETER:
        pytest.skip("the interpreter runs one program after another: a few cases tell whether they mix")
    case = CASES[request.param]
    if backend.interpreted:
        case = replace(case, batch=IN_THE_INTERPRETER[request.param], kv_heads=2)
    made = make(backend.typed(case), backend.device)
    reason = refusal(backend.name, made, True)
    if reason is not None:
        pytest.skip(reason)
    return made


def assert_same_bits(a: Results, b: Results) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), f"{name}: {int((a[name] != b[name]).sum())} of {a[name].numel()} differ"


def test_repeats(problem: Problem, backend: Backend) -> None:
    if backend.interpreted:
        pytest.skip("nothing in the interpreter could differ")
    first = results(problem, on_backend(backend.name))
    for _ in range(1 if backend.name == "cuda" and EMULATED else 3):  # the emulated GPU repeats its order
        assert_same_bits(first, results(problem, on_backend(backend.name)))


def test_threads(problem: Problem, backend: Backend) -> None:
    if backend.name != "cpu":
        pytest.skip("its kernels do not run on the CPU's threads")
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(results(problem, on_backend(backend.name)))
    assert_same_bits(found[0], found[1])
    assert_same_bits(found[0], found[2])


def part(problem: Problem, batch: slice, kv_heads: slice) -> Problem:
    """The same call on some samples and some key/value heads with their query heads."""
    group = problem.case.group
    heads = slice(kv_heads.start * group, kv_heads.stop * group)
    options = {
        name: value[batch] if isinstance(value, torch.Tensor) and name != "seed" else value
        for name, value in problem.options.items()
    }
    inputs = {name: tensor[batch, heads if name == "query" else kv_heads] for name, tensor in problem.inputs.items()}
    grad_out = None if problem.grad_out is None else problem.grad_out[batch, heads]
    grad_lse = None if problem.grad_lse is None else problem.grad_lse[batch, heads]
    return Problem(problem.case, inputs, options, grad_out, grad_lse)


def parts(problem: Problem) -> Iterator[tuple[slice, slice]]:
    """One sample or one head group at a time. Dropout counts samples and heads from the first of the call."""
    case = problem.case
    every_head = slice(0, case.kv_heads)
    if case.dropout_p:
        yield slice(0, 1), slice(0, 1)
        return
    for b in range(case.batch):
        yield slice(b, b + 1), every_head
    for h in range(case.kv_heads):
        yield slice(0, case.batch), slice(h, h + 1)


def test_batch_and_heads(problem: Problem, backend: Backend) -> None:
    case = problem.case
    whole = results(problem, on_backend(backend.name))
    for batch, kv_heads in parts(problem):
        alone = results(part(problem, batch, kv_heads), on_backend(backend.name))
        heads = slice(kv_heads.start * case.group, kv_heads.stop * case.group)
        of_queries = ("out", "lse", "grad query")
        cut = {name: tensor[batch, heads if name in of_queries else kv_heads] for name, tensor in whole.items()}
        assert_same_bits(alone, cut)


def test_strides_do_not_change_bits(problem: Problem, backend: Backend) -> None:
    """What lies where in memory is no part of the result."""
    plain = Problem(
        problem.case, {name: tensor.contiguous() for name, tensor in problem.inputs.items()}, problem.options,
        None if problem.grad_out is None else problem.grad_out.contiguous(), problem.grad_lse,
    )  # fmt: skip
    assert_same_bits(results(problem, on_backend(backend.name)), results(plain, on_backend(backend.name)))


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=["f32", "bf16", "f16"])
def test_a_large_batch_is_its_samples(backend: Backend, dtype: torch.dtype) -> None:
    """More samples than threads, in a batch of every size: scheduling must not reach the arithmetic."""
    if backend.interpreted:
        pytest.skip("too large for the interpreter")
    layout = SegmentLayout.rmt_decoder(70, 5)
    case = backend.typed(Case(layout, batch=17, kv_heads=1, group=2, dtype=dtype, head_dim=16))
    whole = make(case, backend.device)
    reason = refusal(backend.name, whole, True)
    if reason is not None:
        pytest.skip(reason)
    torch.set_num_threads(2)
    every = results(whole, on_backend(backend.name))
    for size in (1, 2, 3, 5, 16):
        some = results(part(whole, slice(0, size), slice(0, 1)), on_backend(backend.name))
        assert_same_bits(some, {name: tensor[:size] for name, tensor in every.items()})


# -- the emulated GPU in another order --------------------------------------------------------------------------------

ORDERS = [(2, 1), (40, 2), (3, 0)]  # blocks alive at once, and the seed of the order; 0: none
# Gradients of queries are summed over tiles of 64 or, beyond 512 packed rows, 128 keys: several, in turns.
ORDERED = {
    "long": Case(SegmentLayout.rmt_decoder(1100, 16), batch=1, kv_heads=1, head_dim=64, dtype=BF16),
    "long, wide": Case(
        SegmentLayout.causal(256, 8), batch=1, kv_heads=1, group=4, head_dim=96, dropout_p=0.2, dtype=F16
    ),
    "long, encoder": Case(SegmentLayout.rmt_encoder(256, 10), batch=1, kv_heads=1, group=4, dtype=F16),
    "grouped": Case(
        SegmentLayout.rmt_decoder(150, 10, cache=100), batch=2, kv_heads=1, group=3, padding="right", dtype=BF16
    ),
    "window": Case(
        SegmentLayout.rmt_decoder(330, 8, cache=65, window=90), batch=2, kv_heads=1, padding="left", stale=True,
        dtype=F16,
    ),
    "cache apart": Case(
        SegmentLayout.rmt_decoder(150, 8, cache=130), batch=2, kv_heads=1, apart=True, dropout_p=0.1, dtype=BF16,
        head_dim=128,
    ),
    "gaps": Case(
        SegmentLayout.memory_bottleneck(300, 40, step="read"), batch=3, kv_heads=1, padding="right", dtype=F16
    ),
    "own rows": Case(SegmentLayout.membart(150, 100), batch=2, kv_heads=1, padding="left", dtype=BF16),
    "only own rows": Case(
        SegmentLayout(tokens=200, rules={("tokens", "tokens"): Rule.SELF}), batch=1, kv_heads=1, group=4, dtype=F16
    ),
    "decoding": Case(
        SegmentLayout.rmt_decoder(400, 8).decoding(2), batch=3, kv_heads=1, group=4, start=True, dtype=BF16
    ),
    "decoding, split": Case(
        SegmentLayout.rmt_decoder(1190, 8, cache=33).decoding(2), batch=2, kv_heads=1, group=4, start=True, stale=True,
        head_dim=96, dropout_p=0.1, dtype=F16,
    ),
    "slots, split": Case(SegmentLayout.memformer_write(1100, 20), batch=2, kv_heads=1, padding="right", dtype=BF16),
}  # fmt: skip


@pytest.fixture
def cuda_kernels() -> Backend:
    return next(backend for backend in KERNELS if backend.name == "cuda")


@emulated
@pytest.mark.parametrize("name", ORDERED)
def test_any_order_of_blocks_and_warps(name: str, cuda_kernels: Backend) -> None:
    """Blocks wait for one another, in the backward pass; nothing may depend on who is first."""
    problem = make(cuda_kernels.typed(ORDERED[name]))
    in_order = results(problem, on_backend("cuda"))
    for resident_blocks, seed in ORDERS:
        with ordering(resident_blocks, seed):
            assert_same_bits(in_order, results(problem, on_backend("cuda")))
    with ordering(2, 4, strict_warps=True):
        assert_same_bits(in_order, results(problem, on_backend("cuda")))
