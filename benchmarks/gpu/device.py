"""The machine under test behind a small interface, so that all that is built on it is also tested on a CPU."""

from __future__ import annotations

import gc
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.measure import peak_bytes

__all__ = ["CudaDevice", "Device", "HostDevice", "Replay", "current"]

Function = Callable[[], object]


@dataclass
class Replay:
    """Some calls of a function, ready to be run again: ``run()`` enqueues all ``copies`` of them.

    ``by`` says how they are run, "graph" or "calls"; ``note`` why not as a graph.
    """

    run: Function
    copies: int
    by: str
    note: str = ""
    keep: list[Any] = field(default_factory=list)


class Device(ABC):
    """What timing needs of a machine."""

    torch: torch.device

    @abstractmethod
    def synchronize(self) -> None:
        """Wait for everything enqueued."""

    @abstractmethod
    def capture(self, function: Function, copies: int, *, flush: bool) -> Replay:
        """``copies`` calls of ``function`` in a row; with ``flush`` the L2 cache is overwritten before each."""

    @abstractmethod
    def seconds(self, replay: Replay) -> float:
        """How long the device takes for one run of ``replay``."""

    @abstractmethod
    def peak_bytes(self, function: Function) -> int:
        """The most bytes allocated at a time during a call of ``function``, beyond those allocated before."""

    @abstractmethod
    def memory(self) -> int:
        """Bytes of the device's memory."""

    def scope(self) -> AbstractContextManager[Any]:
        """What all work on the device, autograd's included, must run inside."""
        return nullcontext()

    def release(self) -> None:
        """Give memory back that nothing refers to."""
        gc.collect()

    def clock(self) -> float:
        """Host seconds."""
        return time.perf_counter()


class CudaDevice(Device):
    """The current CUDA device. Work runs on a stream of its own, because a captured backward pass must run on the
    stream of its forward pass, and that cannot be the default one."""

    def __init__(self) -> None:
        self.torch = torch.device("cuda", torch.cuda.current_device())
        self.stream = torch.cuda.Stream()
        self._flush = torch.empty(self._flush_bytes(), dtype=torch.uint8, device=self.torch)

    def _flush_bytes(self) -> int:
        """Twice the L2 cache, or 256 MiB where its size is not known."""
        l2 = int(getattr(torch.cuda.get_device_properties(self.torch), "L2_cache_size", 0))
        return max(2 * l2, 2**26) if l2 else 2**28

    def scope(self) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self.stream)  # type: ignore[no-any-return]

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.torch)

    def capture(self, function: Function, copies: int, *, flush: bool) -> Replay:
        def calls() -> None:
            for _ in range(copies):
                if flush:
                    self._flush.zero_()
                function()

        function()  # compiles and allocates outside the capture
        self.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                calls()
        except Exception as error:  # not every operator can be captured; then its calls are timed, and it says so
            self.synchronize()
            return Replay(calls, copies, "calls", f"not capturable: {str(error).strip().splitlines()[:1]}")
        graph.replay()
        self.synchronize()
        return Replay(graph.replay, copies, "graph", keep=[graph, function])

    def seconds(self, replay: Replay) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        if replay.by != "graph":
            torch.cuda._sleep(2_000_000)  # about a millisecond in which the host gets ahead
        begin.record()
        replay.run()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e-3

    def peak_bytes(self, function: Function) -> int:
        function()
        self.synchronize()
        gc.collect()
        torch.cuda.reset_peak_memory_stats(self.torch)
        before = torch.cuda.memory_allocated(self.torch)
        kept = function()
        self.synchronize()
        del kept
        return int(torch.cuda.max_memory_allocated(self.torch)) - before

    def memory(self) -> int:
        return int(torch.cuda.get_device_properties(self.torch).total_memory)

    def release(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()


class HostDevice(Device):
    """The CPU: calls instead of graphs, the host's clock instead of events. For tests."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.torch = torch.device("cpu")
        self._clock = clock

    def synchronize(self) -> None:
        pass

    def capture(self, function: Function, copies: int, *, flush: bool) -> Replay:
        def calls() -> None:
            for _ in range(copies):
                if flush:
                    self.flush()
                function()

        function()
        return Replay(calls, copies, "calls")

    def flush(self) -> None:
        """A CPU's caches are left as they are."""

    def seconds(self, replay: Replay) -> float:
        begin = self.clock()
        replay.run()
        return self.clock() - begin

    def peak_bytes(self, function: Function) -> int:
        return peak_bytes(function)

    def memory(self) -> int:
        return 2**33

    def clock(self) -> float:
        return self._clock()


def current() -> Device | None:
    """The GPU, or None where there is none that torch can use."""
    return CudaDevice() if torch.cuda.is_available() else None
