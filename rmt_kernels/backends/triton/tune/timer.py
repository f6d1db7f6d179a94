"""Device time of several functions, taking turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Protocol

import torch

__all__ = ["GraphTimer", "Timer"]


class Timer(Protocol):
    """Times functions in turns: seconds of each in every round, as many rounds as end by ``deadline``, at least 3."""

    def __call__(
        self, functions: Mapping[str, Callable[[], None]], rounds: int, deadline: float
    ) -> dict[str, list[float]]: ...


class GraphTimer:
    """Device time by CUDA graphs, the L2 cache overwritten before every call."""

    def __init__(self, device: torch.device) -> None:
        l2 = torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.empty(max(2 * l2, 1 << 26), dtype=torch.uint8, device=device)

    def __call__(
        self, functions: Mapping[str, Callable[[], None]], rounds: int, deadline: float
    ) -> dict[str, list[float]]:
        empty = self._captured(lambda: None, 10)
        graphs = {}
        for name, function in functions.items():
            once = self._seconds(self._captured(function, 1), 1)
            copies = max(1, min(20, int(2e-3 / once)))
            graphs[name] = self._captured(function, copies), copies
        found: dict[str, list[float]] = {name: [] for name in functions}
        order = list(functions)
        for turn in range(rounds):
            if turn >= 3 and time.monotonic() > deadline:
                break
            flushing = self._seconds(empty, 10)
            for name in order[turn % len(order) :] + order[: turn % len(order)]:
                found[name].append(max(self._seconds(*graphs[name]) - flushing, 1e-9))
        return found

    def _captured(self, function: Callable[[], None], copies: int) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
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
