"""The per-case suite for pytest-benchmark: case x dtype x contestant x {forward, forward+backward}.

A contestant is timed only after its result was compared with the float64 reference; a wrong one fails, one that cannot
compute the case is skipped with its reason.
"""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from benchmarks.cases import PUBLISHED, find
from benchmarks.contestants import CONTESTANTS
from benchmarks.environment import device
from benchmarks.measure import prepare, record

__all__ = ["parameters"]

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_SECONDS = 0.2  # of rounds for each benchmark
_QUICK_CASES = ("rmt_synthetic", "rmt_gpt2_512", "memformer_write")


def parameters(full: bool) -> tuple[str, list[tuple[str, str, str, str]]]:
    """The argument names of the benchmark and their values; the contestants of one case follow one another."""
    cases = tuple(case.name for case in PUBLISHED) if full else _QUICK_CASES
    dtypes = tuple(_DTYPES) if full else ("bfloat16",)
    contestants = ("ours", "dense", "split", "plain", "naive") if full else ("ours", "dense", "split")
    values = [
        (case, dtype, mode, contestant)
        for case in cases
        for dtype in dtypes
        for mode in ("forward", "forward+backward")
        for contestant in contestants
    ]
    return "case,dtype,mode,contestant", values


def bench_attention(benchmark: Any, case: str, dtype: str, mode: str, contestant: str) -> None:
    """One contestant on one case; ``extra_info`` holds match, errors, peak memory, TFLOP/s, tokens/s and device."""
    prepared = prepare(CONTESTANTS[contestant], find(case), _DTYPES[dtype], mode == "forward+backward", 2**20)
    if prepared.step is None:
        if prepared.check is None and not prepared.note.startswith("failed"):
            pytest.skip(prepared.note)
        pytest.fail(prepared.note)
    start = time.perf_counter()
    prepared.step()
    rounds = max(3, min(30, int(_SECONDS / (time.perf_counter() - start))))
    benchmark.pedantic(prepared.step, rounds=rounds, warmup_rounds=1)
    seconds = [] if benchmark.stats is None else list(benchmark.stats.stats.data)
    row = record(prepared, seconds)
    del row["seconds"]
    benchmark.extra_info.update(row, device=device())
