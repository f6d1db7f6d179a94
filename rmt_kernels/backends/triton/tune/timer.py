"""Device time of several functions, taking turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

__all__ = ["GraphTimer", "Timer"]

_LEAST = 2e-3  # seconds of one measurement: events resolve half a microsecond
_MOST = 20  # calls in one


class Timer(Protocol):
    """Times functions in turns: seconds of each in every round, as many rounds as end by ``deadline``, at least 3."""

    def __call__(
        self, functions: Mapping[str, Callable[[], object]], rounds: int, deadline: float
    ) -> dict[str, list[float]]: ...


class GraphTimer:
    """Device time by CUDA graphs, the L2 cache overwritten before every call. Functions have run before."""

    def __init__(self, device: torch.device) -> None:
        l2 = torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.empty(max(2 * l2, 1 << 26), dtype=torch.uint8, device=device)

    def __call__(
        self, functions: Mapping[str, Callable[[], object]], rounds: int, deadline: float
    ) -> dict[str, list[float]]:
        pool = torch.cuda.graph_pool_handle()  # one for all, which never run at once
        empty = self._captured(lambda: None, _MOST, pool)
        graphs = {}
        for name, function in functions.items():
            once = self._captured(function, 1, pool)
            copies = max(1, min(_MOST, int(_LEAST / self._seconds(once, 1))))
            graphs[name] = self._captured(function, copies, pool), copies
        found: dict[str, list[float]] = {name: [] for name in functions}
        order = list(functions)
        for turn in range(rounds):
            if turn >= 3 and time.monotonic() > deadline:
                break
            flushing = self._seconds(empty, _MOST)
            first = turn % max(1, len(order))
            for name in order[first:] + order[:first]:
                found[name].append(max(self._seconds(*graphs[name]) - flushing, 1e-9))
        return found

    def _captured(self, function: Callable[[], object], copies: int, pool: Any) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            for _ in range(copies):
                self._flush.zero_()
                function()
        graph.replay()
        return graph

    def _seconds(self, graph: torch.cuda.CUDAGraph, copies: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e-3 / copies
