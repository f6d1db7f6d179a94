"""Check a contestant against float64, then time it, interleaved with the others, and weigh its memory."""

from __future__ import annotations

import gc
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import accumulate
from statistics import quantiles
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case, Inputs, make_inputs
from benchmarks.contestants import CONTESTANTS, Contestant, computed_layout
from rmt_kernels import Region, SegmentLayout, reference_attention

__all__ = ["Check", "Prepared", "check", "interleave", "measure", "peak_bytes", "prepare", "record", "repeat"]

RMS_TOLERANCE = {torch.bfloat16: 5e-3, torch.float16: 1e-3, torch.float32: 1e-5}  # gradients: twice that
_OURS_FACTOR = 2.0  # largest error, over eager PyTorch's in the same dtype
_STOCK_FACTOR = 5.0  # the exponential in PyTorch's fused CPU attention is good to 20 bits only
_ENTRIES = 2**24  # of one score matrix in the reference at a time
_CPU = torch.device("cpu")


# -- correctness -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """Errors of one contestant: ``errors[name]`` holds the largest error, eager PyTorch's, and the RMS ratio."""

    ok: bool
    reason: str = ""
    errors: dict[str, dict[str, float]] = field(default_factory=dict)


def _chunks(layout: SegmentLayout, rows_at_once: int) -> Iterator[tuple[SegmentLayout, int | None, int, int]]:
    """``(layout, query_start, first row, last row)`` that together hold every query row of the layout."""
    if layout.num_queries <= rows_at_once:
        yield layout, None, 0, layout.num_queries
        return
    row = 0
    for region, form in zip((Region.READ, Region.TOKENS, Region.WRITE), layout.forms, strict=True):
        if region is Region.TOKENS:
            for start in range(0, form.rows, rows_at_once):
                end = min(form.rows, start + rows_at_once)
                yield layout.decoding(end - start), start, row + start, row + end
        elif form.rows:
            yield replace(layout, queries=(region,)), None, row, row + form.rows
        row += form.rows


def evaluate(
    layout: SegmentLayout, query: Tensor, key: Tensor, value: Tensor, grad: Tensor | None
) -> dict[str, Tensor]:
    """out, and with ``grad`` the gradients, by ``reference_attention`` in the dtype given, some rows at a time."""
    key, value = key.detach().requires_grad_(), value.detach().requires_grad_()
    outs, grad_query = [], []
    grad_key, grad_value = torch.zeros_like(key), torch.zeros_like(value)
    batch, heads = query.shape[:2]
    for part, start, first, last in _chunks(layout, max(1, _ENTRIES // (batch * heads * layout.num_keys))):
        rows = query[:, :, first:last].detach().requires_grad_()
        query_start = None if start is None else torch.full((batch,), start, dtype=torch.int32, device=query.device)
        out, _ = reference_attention(rows, key, value, part, query_start=query_start)
        outs.append(out.detach())
        if grad is not None:
            gradients = torch.autograd.grad(out, (rows, key, value), grad[:, :, first:last])
            grad_query.append(gradients[0])
            grad_key += gradients[1]
            grad_value += gradients[2]
    found = {"out": torch.cat(outs, dim=2)}
    if grad is not None:
        found |= {"grad query": torch.cat(grad_query, dim=2), "grad key": grad_key, "grad value": grad_value}
    return found


def _pick(tensor: Tensor, kv_heads: int, pairs: Sequence[int]) -> Tensor:
    """(pairs, group, rows, head_dim): the chosen (batch row, key/value head) pairs, as batch rows of their own."""
    heads = tensor.detach().unflatten(1, (kv_heads, -1)).flatten(0, 1)
    return torch.index_select(heads, 0, torch.tensor(pairs, device=heads.device))


@lru_cache(maxsize=4)
def _truth(
    case: Case,
    layout: SegmentLayout,
    dtype: torch.dtype,
    backward: bool,
    entries: int,
    device: torch.device = _CPU,
) -> tuple[tuple[int, ...], dict[str, Tensor], dict[str, float]]:
    """The (batch row, key/value head) pairs that are checked, what float64 gives there, and eager PyTorch's errors.

    Heads do not mix in attention, so where all of them would take too long, some spread over the batch are checked,
    the first and the last among them.
    """
    every, group = case.batch * case.kv_heads, case.heads // case.kv_heads
    count = min(every, max(2, entries // (group * layout.num_queries * layout.num_keys)))
    pairs = tuple(sorted({round(i * (every - 1) / max(1, count - 1)) for i in range(count)}))
    inputs = make_inputs(case, dtype, device=device)
    tensors = [
        _pick(inputs.query, case.kv_heads, pairs), _pick(inputs.key, case.kv_heads, pairs),
        _pick(inputs.value, case.kv_heads, pairs), _pick(inputs.grad, case.kv_heads, pairs),
    ]  # fmt: skip
    query, key, value, grad = (tensor.double() for tensor in tensors)
    exact = evaluate(layout, query, key, value, grad if backward else None)
    eager = evaluate(layout, tensors[0], tensors[1], tensors[2], tensors[3] if backward else None)
    return pairs, exact, {name: float((eager[name].double() - exact[name]).abs().max()) for name in exact}


def check(
    contestant: Contestant, case: Case, found: Mapping[str, Tensor], dtype: torch.dtype, entries: int = 2**22
) -> Check:
    """Compare ``found`` (out, and gradients where there are any) with the reference in float64.

    The largest error must be at most twice that of eager PyTorch in the same dtype (five times for fused stock
    attention), plus the rounding of the result; ours must also keep RMS error / RMS within ``RMS_TOLERANCE``, stock
    within four times that. About ``entries`` scores are checked. ``found`` must come from ``make_inputs`` on its own
    device.
    """
    ours = contestant.name == "ours"
    factor, slack = (_OURS_FACTOR, 1.0) if ours else (_STOCK_FACTOR, 4.0)
    device = found["out"].device
    pairs, exact, eager = _truth(case, computed_layout(contestant, case), dtype, len(found) > 1, entries, device)
    errors: dict[str, dict[str, float]] = {}
    reasons = []
    for name, want in exact.items():
        if not found[name].isfinite().all():
            reasons.append(f"{name} has values that are not finite")
            continue
        error = _pick(found[name], case.kv_heads, pairs).double() - want
        largest, rms = float(error.abs().max()), float(error.norm() / want.norm())
        errors[name] = {"max": largest, "eager_max": eager[name], "rms": rms}
        allowed = factor * eager[name] + torch.finfo(dtype).eps / 2 * float(want.abs().max())
        tolerance = slack * RMS_TOLERANCE[dtype] * (1 if name == "out" else 2)
        if largest > allowed:
            reasons.append(f"{name}: largest error {largest:.2e}, allowed {allowed:.2e}")
        if rms > tolerance:
            reasons.append(f"{name}: RMS error ratio {rms:.2e}, allowed {tolerance:.2e}")
    return Check(not reasons, "; ".join(reasons), errors)


# -- running -----------------------------------------------------------------------------------------------------------

Step = Callable[[], tuple[Tensor, ...]]


@dataclass
class Prepared:
    """A contestant that computes one case: ``step`` is what is timed, None where it cannot or is wrong."""

    contestant: Contestant
    case: Case
    dtype: torch.dtype
    backward: bool
    step: Step | None = None
    check: Check | None = None
    note: str = ""
    peak: int | None = None


def _step(contestant: Contestant, case: Case, inputs: Inputs, backward: bool) -> Step:
    run = contestant.build(case, inputs)
    if not backward:
        return lambda: (run(),)
    leaves = (inputs.query, inputs.key, inputs.value)

    def both() -> tuple[Tensor, ...]:
        out = run()
        return (out, *torch.autograd.grad(out, leaves, inputs.grad))

    return both


def prepare(
    contestant: Contestant,
    case: Case,
    dtype: torch.dtype,
    backward: bool,
    entries: int = 2**22,
    inputs: Inputs | None = None,
) -> Prepared:
    """Build the contestant, check its result, and weigh its memory. One that cannot or is wrong has no ``step``."""
    prepared = Prepared(contestant, case, dtype, backward)
    reason = contestant.objection(case, dtype, backward)
    if reason is not None:
        prepared.note = reason
        return prepared
    try:
        inputs = make_inputs(case, dtype, requires_grad=backward) if inputs is None else inputs
        step = _step(contestant, case, inputs, backward)
        results = step()
    except Exception as error:  # recorded and shown in place of a time: one contestant must not end the run
        prepared.note = f"failed: {type(error).__name__}: {str(error).strip().splitlines()[:1]}"
        return prepared
    names = ("out", "grad query", "grad key", "grad value")
    prepared.check = check(
        contestant, case, {name: result.detach() for name, result in zip(names, results, strict=False)}, dtype, entries
    )
    del results
    if prepared.check.ok:
        prepared.step, prepared.peak = step, peak_bytes(step)
    else:
        prepared.note = f"WRONG: {prepared.check.reason}"
    return prepared


# -- memory ------------------------------------------------------------------------------------------------------------


@contextmanager
def _without_profiler_lines() -> Iterator[None]:
    """Hold back the lines ``USDT:...`` that PyTorch writes to stderr at each start of its profiler; pass on others."""
    sys.stderr.flush()
    saved = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            held.seek(0)
            for line in held:
                if not line.startswith(b"USDT:"):
                    os.write(2, line)


def allocations(step: Callable[[], object]) -> list[int]:
    """Bytes that PyTorch's CPU allocator handed out during one call, in order, those given back negative.

    Results are given back at the end. Kernels that take their scratch from ``at::empty``, as ours do, are seen in full.
    """
    with (
        _without_profiler_lines(),
        torch.autograd.profiler.profile(use_cpu=True, profile_memory=True) as profiler,
    ):
        kept = step()
    del kept
    assert profiler.kineto_results is not None
    events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def peak_bytes(step: Callable[[], object]) -> int:
    """The most bytes that PyTorch's CPU allocator held at a time for one call, results included."""
    gc.collect()
    return max(accumulate(allocations(step), initial=0))


# -- time --------------------------------------------------------------------------------------------------------------


def interleave(
    steps: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: float,
    budget: float = float("inf"),
    least: int = 3,
    tick: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of each call, the contestants taking turns in one process, a different one first in each round.

    Runs ``warmup`` seconds unmeasured, then ``rounds`` rounds, or, where they exceed ``budget`` seconds, as many as
    fit, at least ``least``.
    """
    names = list(steps)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    if not names:
        return seconds
    collecting = gc.isenabled()
    gc.disable()
    try:
        end = time.perf_counter() + warmup
        while True:
            for name in names:
                steps[name]()
            if time.perf_counter() >= end:
                break
        begin = time.perf_counter()
        for turn in range(rounds):
            if turn >= least and time.perf_counter() - begin > budget:
                break
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                start = time.perf_counter()
                steps[name]()
                seconds[name].append(time.perf_counter() - start)
            tick()
    finally:
        if collecting:
            gc.enable()
    return seconds


def repeat(function: Callable[[], object], times: int) -> Callable[[], None]:
    """``function`` called ``times`` times: for calls too short for the clock."""

    def many() -> None:
        for _ in range(times):
            function()

    return many


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Median and quartiles, in seconds, and the number of rounds."""
    if len(seconds) < 2:
        return {"median": seconds[0], "q1": seconds[0], "q3": seconds[0], "rounds": 1}
    q1, median, q3 = quantiles(seconds, n=4, method="inclusive")
    return {"median": median, "q1": q1, "q3": q3, "rounds": len(seconds)}


# -- records -----------------------------------------------------------------------------------------------------------


def record(prepared: Prepared, seconds: Sequence[float] | None) -> dict[str, Any]:
    """One line of a result file: what was computed, whether it was right, and what it took. Plain JSON values."""
    case, flop = prepared.case, prepared.case.forward_flop * (3.5 if prepared.backward else 1.0)
    row: dict[str, Any] = {
        "case": case.name, "source": case.source, "layout": case.layout.name,
        "sizes": {
            "cache": case.layout.cache, "read": case.layout.read, "tokens": case.layout.tokens,
            "write": case.layout.write, "batch": case.batch, "heads": case.heads, "kv_heads": case.kv_heads,
            "head_dim": case.head_dim,
        },
        "dtype": str(prepared.dtype).removeprefix("torch."),
        "mode": "forward+backward" if prepared.backward else "forward",
        "contestant": prepared.contestant.name, "label": prepared.contestant.label,
        "same": prepared.contestant.same(case), "note": prepared.note,
        "match": None if prepared.check is None else prepared.check.ok,
        "errors": {} if prepared.check is None else prepared.check.errors,
        "peak_bytes": prepared.peak, "score_bytes": case.score_bytes(prepared.dtype),
        "seconds": None, "tflops": None, "tokens_per_second": None,
    }  # fmt: skip
    if seconds:
        row["seconds"] = spread(seconds)
        median = row["seconds"]["median"]
        row["tflops"], row["tokens_per_second"] = flop / median / 1e12, case.tokens / median
    return row


def measure(
    case: Case,
    dtype: torch.dtype,
    backward: bool,
    names: Sequence[str],
    *,
    rounds: int,
    warmup: float,
    budget: float = float("inf"),
    least: int = 3,
    twice: bool = False,
    entries: int = 2**22,
    tick: Callable[[], object] = lambda: None,
) -> list[dict[str, Any]]:
    """Records of the named contestants on one case, timed against each other.

    ``twice`` times ours a second time under the name "again": how far the two differ is the noise. The other keywords
    are those of :func:`interleave` and :func:`check`.
    """
    inputs = make_inputs(case, dtype, requires_grad=backward)
    prepared = {name: prepare(CONTESTANTS[name], case, dtype, backward, entries, inputs) for name in names}
    if twice and prepared["ours"].step is not None:
        contestant = replace(CONTESTANTS["ours"], name="again", label="rmt_kernels, measured again")
        prepared["again"] = replace(prepared["ours"], contestant=contestant)
    steps = {name: entry.step for name, entry in prepared.items() if entry.step is not None}
    seconds = interleave(steps, rounds=rounds, warmup=warmup, budget=budget, least=least, tick=tick)
    return [record(entry, seconds.get(name)) for name, entry in prepared.items()]
