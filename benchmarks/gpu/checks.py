"""What a backend's kernels must keep besides their error: the same bits every time, memory, graphs, compilation, no
waiting."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks.cases import LONG, Case, make_inputs
from benchmarks.gpu.device import Device
from benchmarks.gpu.stage import Context, Item, Payload
from rmt_kernels import SegmentLayout, segment_attention

if TYPE_CHECKING:
    from tests.suite import Case as SuiteCase
    from tests.suite import Problem

__all__ = ["determinism_items", "memory_items"]

_DECODER = SegmentLayout.rmt_decoder(1000, 16)
_CACHED = SegmentLayout.rmt_decoder(500, 10, cache=129)
_OF_CUDA = (torch.bfloat16, torch.float16)
MOST_MEMORY = 0.05  # of the bytes of the scores as dense matrices, for forward + backward


def _cases() -> dict[str, SuiteCase]:
    from tests.suite import BF16, F16, F32
    from tests.suite import Case as SuiteCase

    return {
        "bf16, 64 a head": SuiteCase(_DECODER, batch=4, kv_heads=8, head_dim=64, dtype=BF16),
        "bf16, 128 a head, M = 128": SuiteCase(
            SegmentLayout.rmt_decoder(2048, 128), batch=2, kv_heads=8, head_dim=128, dtype=BF16
        ),
        "f16, odd sizes": SuiteCase(SegmentLayout.rmt_decoder(777, 13), batch=3, kv_heads=5, head_dim=41, dtype=F16),
        "f32": SuiteCase(_DECODER, batch=2, kv_heads=4, head_dim=64, dtype=F32),
        "grouped, right padding": SuiteCase(
            _CACHED, batch=5, kv_heads=2, group=4, head_dim=64, dtype=BF16, padding="right", stale=True
        ),
        "left padding, cache apart": SuiteCase(
            _CACHED, batch=5, kv_heads=4, head_dim=80, dtype=BF16, padding="left", apart=True
        ),
        "window": SuiteCase(
            SegmentLayout.rmt_decoder(1000, 16, cache=129, window=200), batch=3, kv_heads=4, head_dim=64, dtype=BF16
        ),
        "dropout": SuiteCase(_DECODER, batch=3, kv_heads=3, group=2, head_dim=64, dtype=BF16, dropout_p=0.2),
        "slots that see themselves": SuiteCase(
            SegmentLayout.membart(512, 32), batch=3, kv_heads=4, head_dim=64, dtype=F16
        ),
        "decoding": SuiteCase(
            SegmentLayout.rmt_decoder(4096, 16).decoding(), batch=4, kv_heads=4, group=4, head_dim=128, dtype=BF16,
            start=True,
        ),
    }  # fmt: skip


# -- the same bits -----------------------------------------------------------------------------------------------------


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


def _count_differences(first: dict[str, Tensor], found: dict[str, Tensor], into: Tensor) -> None:
    """Add the number of differing elements to ``into``, on the device, so that nothing waits."""
    for name, tensor in first.items():
        into += (_bits(tensor) != _bits(found[name])).sum()


def _repeats(case: SuiteCase, backend: str, context: Context) -> Payload:
    from tests.suite import make, on_backend, results

    device, attention = context.gpu(), on_backend(backend)
    problem = make(case, str(device.torch))
    first = {name: tensor.clone() for name, tensor in results(problem, attention).items()}
    differing = torch.zeros((), dtype=torch.int64, device=device.torch)
    beside = torch.cuda.Stream() if device.torch.type == "cuda" else None
    load = torch.randn(1024, 1024, device=device.torch)
    for turn in range(context.plan.repeats):
        if beside is not None and turn % 2:
            with torch.cuda.stream(beside):  # other work on the device changes which tile is done when
                load @ load
        _count_differences(first, results(problem, attention), differing)
    wrong, finite = int(differing), all(bool(tensor.isfinite().any()) for tensor in first.values() if tensor.numel())
    facts = {"backend": backend, "repeats": context.plan.repeats, "differing": wrong}
    failures = [f"{wrong} elements differed in {context.plan.repeats} repeats"] if wrong else []
    failures += [] if finite else ["a result has no finite value"]
    return {"facts": facts, "failures": failures}


def _sample(problem: Problem, row: int) -> Problem:
    """The same call on one sample alone."""
    batch = slice(row, row + 1)
    options = {
        name: value[batch] if isinstance(value, Tensor) and name != "seed" else value
        for name, value in problem.options.items()
    }
    return replace(
        problem, inputs={name: tensor[batch] for name, tensor in problem.inputs.items()}, options=options,
        grad_out=None if problem.grad_out is None else problem.grad_out[batch],
        grad_lse=None if problem.grad_lse is None else problem.grad_lse[batch],
    )  # fmt: skip


def _alone(case: SuiteCase, backend: str, context: Context) -> Payload:
    from tests.suite import make, on_backend, results

    device, attention = context.gpu(), on_backend(backend)
    problem = make(case, str(device.torch))
    whole = results(problem, attention)
    differing = torch.zeros((), dtype=torch.int64, device=device.torch)
    rows = [0] if case.dropout_p else list(range(case.batch))  # dropout counts samples from the first of the call
    for row in rows:
        found = results(_sample(problem, row), attention)
        _count_differences({name: tensor[row : row + 1] for name, tensor in whole.items()}, found, differing)
    wrong = int(differing)
    failures = [f"{wrong} elements differ between a sample alone and in its batch"] if wrong else []
    return {"facts": {"backend": backend, "samples": len(rows), "differing": wrong}, "failures": failures}


def determinism_items(backend: str) -> list[Item]:
    """Repeats and batch invariance of every case that the backend's kernels are for."""

    def bind(check: Callable[[SuiteCase, str, Context], Payload], name: str) -> Callable[[Context], Payload]:
        return lambda context: check(_cases()[name], backend, context)

    names = [name for name, case in _cases().items() if backend != "cuda" or case.dtype in _OF_CUDA]
    return [
        *(Item(f"alone: {name}", bind(_alone, name), limit=60) for name in names),
        *(Item(f"repeats: {name}", bind(_repeats, name), limit=90) for name in names),
    ]


# -- memory, graphs, compilation, synchronisation ----------------------------------------------------------------------


def _both(tensors: Sequence[Tensor], layout: SegmentLayout, **options: Any) -> list[Tensor]:
    """out and the gradients; ``tensors`` are query, key, value and the gradient of out."""
    query, key, value, grad = tensors
    out = segment_attention(query, key, value, layout, **options)
    return [out, *torch.autograd.grad(out, (query, key, value), grad)]


def _long(backend: str, context: Context) -> Payload:
    """Peak memory of a long segment, beside what dense scores would take."""
    device = context.gpu()
    case = replace(LONG, layout=SegmentLayout.rmt_decoder(context.plan.long_tokens, 16))
    inputs = make_inputs(case, torch.bfloat16, device=device.torch, requires_grad=True)
    four = (inputs.query, inputs.key, inputs.value, inputs.grad)

    def forward() -> Tensor:
        with torch.no_grad():
            return segment_attention(*four[:3], case.layout, backend=backend)

    found = {
        "forward": device.peak_bytes(forward),
        "forward+backward": device.peak_bytes(lambda: _both(four, case.layout, backend=backend)),
    }
    dense = case.score_bytes(torch.bfloat16)
    share = found["forward+backward"] / dense
    failures = [f"forward + backward took {share:.1%} of the dense scores' bytes"] if share > MOST_MEMORY else []
    facts = {
        "backend": backend, "tokens": case.layout.tokens, "peak_bytes": found, "dense_bytes": dense, "share": share
    }  # fmt: skip
    return {"facts": facts, "failures": failures}


def _small(device: Device) -> tuple[Case, list[Tensor]]:
    case = Case("small", SegmentLayout.rmt_decoder(300, 16), 2, 4, 2, 64, "a check")
    inputs = make_inputs(case, torch.bfloat16, device=device.torch, requires_grad=True)
    return case, [inputs.query, inputs.key, inputs.value, inputs.grad]


def _differing(a: list[Tensor], b: list[Tensor]) -> int:
    return sum(int((_bits(x.detach()) != _bits(y.detach())).sum()) for x, y in zip(a, b, strict=True))


def _graph(backend: str, context: Context) -> Payload:
    """A captured forward + backward gives the eager bits, on the inputs of the capture and on new ones; a seed that
    changes between replays changes the mask."""
    device = context.gpu()
    case, tensors = _small(device)
    seed = torch.tensor([11], device=device.torch)
    options: dict[str, Any] = {"backend": backend, "dropout_p": 0.3, "seed": seed}
    kept: list[Tensor] = []

    def step() -> None:
        kept[:] = _both(tensors, case.layout, **options)

    replay = device.capture(step, 1, flush=False)
    captured = list(kept)
    failures = [] if device.torch.type == "cpu" or replay.by == "graph" else [f"it was not captured: {replay.note}"]
    facts: dict[str, Any] = {"backend": backend, "by": replay.by}
    seen = []
    for what, new_seed, new_inputs in (("as captured", 11, False), ("new seed", 12, False), ("new inputs", 12, True)):
        seed.fill_(new_seed)
        if new_inputs:
            with torch.no_grad():
                for tensor in tensors:
                    tensor.copy_(torch.randn_like(tensor))
        replay.run()
        device.synchronize()
        got = [tensor.detach().clone() for tensor in (captured if replay.by == "graph" else kept)]
        facts[what] = _differing(got, _both(tensors, case.layout, **options))
        if facts[what]:
            failures.append(f"{what}: {facts[what]} elements of a replay differ from the eager call")
        seen.append(got[0])
    if torch.equal(seen[0], seen[1]):
        failures.append("a new seed did not change the dropout mask of a replay")
    return {"facts": facts, "failures": failures}


def _compiled(backend: str, context: Context) -> Payload:
    """torch.compile(fullgraph=True) gives the eager bits."""
    device = context.gpu()
    case, tensors = _small(device)
    torch._dynamo.reset()

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return segment_attention(query, key, value, case.layout, backend=backend)

    compiled: Any = torch.compile(call, fullgraph=True)
    query, key, value, grad = tensors
    out = compiled(query, key, value)
    found = [out, *torch.autograd.grad(out, (query, key, value), grad)]
    wrong = _differing(found, _both(tensors, case.layout, backend=backend))
    failures = [f"{wrong} elements of the compiled call differ from the eager one"] if wrong else []
    return {"facts": {"backend": backend, "differing": wrong}, "failures": failures}


def _no_waiting(backend: str, context: Context) -> Payload:
    """Nothing of a call waits for the device, with padding, with dropout whose seed is drawn, and when decoding."""
    device = context.gpu()
    case, tensors = _small(device)
    lengths = torch.tensor([300, 120], dtype=torch.int32, device=device.torch)
    step, start = case.layout.decoding(), torch.tensor([299, 7], dtype=torch.int32, device=device.torch)
    calls: dict[str, Callable[[], object]] = {
        "plain": lambda: _both(tensors, case.layout, backend=backend),
        "padding": lambda: _both(tensors, case.layout, backend=backend, token_lengths=lengths),
        "dropout": lambda: _both(tensors, case.layout, backend=backend, dropout_p=0.1),
        "decoding": lambda: segment_attention(
            tensors[0][:, :, :1], tensors[1], tensors[2], step, backend=backend, query_start=start
        ),
    }  # fmt: skip
    for call in calls.values():
        call()
    device.synchronize()
    failures = []
    for name, call in calls.items():
        if device.torch.type == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        except RuntimeError as error:
            failures.append(f"{name}: {str(error).strip().splitlines()[0][:200]}")
        finally:
            if device.torch.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    facts = {"backend": backend, "calls": list(calls), "enforced": device.torch.type == "cuda"}
    return {"facts": facts, "failures": failures}


def memory_items(backend: str) -> list[Item]:
    """Memory, and what a call must allow around itself."""
    return [
        Item("peak memory of a long segment", partial(_long, backend), limit=90),
        Item("CUDA graph", partial(_graph, backend), limit=90),
        Item("torch.compile", partial(_compiled, backend), limit=120),
        Item("no synchronisation", partial(_no_waiting, backend), limit=60),
    ]
