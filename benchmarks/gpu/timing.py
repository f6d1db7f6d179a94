"""Kernel time and call time of several functions, taking turns."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu.device import Device, Replay
from benchmarks.measure import spread

__all__ = ["Timed", "call_times", "kernel_times"]

_REPLAY_SECONDS = 5e-3  # of one run of a replay: short calls are repeated until it is about this long
_MOST_COPIES = 50


@dataclass(frozen=True)
class Timed:
    """A function to be timed, inside ``context`` where that chooses what it calls."""

    function: Callable[[], object]
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


@contextmanager
def _no_collection() -> Iterator[None]:
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _turns(names: list[str], rounds: int) -> Iterator[list[str]]:
    """The names for each round, a different one first in each."""
    for turn in range(rounds):
        first = turn % max(1, len(names))
        yield names[first:] + names[:first]


def _message(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"


def kernel_times(
    device: Device, functions: Mapping[str, Timed], *, rounds: int, budget: float, least: int = 5, flush: bool = True
) -> dict[str, dict[str, Any]]:
    """Device seconds per call: ``{name: {median, q1, q3, rounds, copies, by} or {error}}``.

    Each function is captured as a CUDA graph of several calls and replayed, the functions taking turns for ``rounds``
    rounds, or as many, at least ``least``, as fit into ``budget`` seconds. With ``flush`` the L2 cache is overwritten
    before every call; a graph that only does that is replayed in each round too, and its time subtracted.
    """
    replays: dict[str, Replay] = {}
    found: dict[str, dict[str, Any]] = {}
    only_flush = device.capture(lambda: None, 20, flush=True) if flush else None
    for name, timed in functions.items():
        try:
            with timed.context():
                trial = device.capture(timed.function, 1, flush=False)
                once = min(device.seconds(trial) for _ in range(3))
                del trial
                copies = max(1, min(_MOST_COPIES, int(_REPLAY_SECONDS / max(once, 1e-7))))
                replays[name] = device.capture(timed.function, copies, flush=flush)
        except Exception as error:  # recorded: one contestant must not end the stage
            found[name] = {"error": _message(error)}
    seconds: dict[str, list[float]] = {name: [] for name in replays}
    with _no_collection():
        for replay in replays.values():  # clocks rise, caches of instructions fill
            device.seconds(replay)
        begin = device.clock()
        for turn, names in enumerate(_turns(list(replays), rounds)):
            if turn >= least and device.clock() - begin > budget:
                break
            flushing = device.seconds(only_flush) / only_flush.copies if only_flush is not None else 0.0
            for name in names:
                replay = replays[name]
                with functions[name].context():
                    once = device.seconds(replay) / replay.copies - flushing
                seconds[name].append(max(once, 1e-9))
    for name, values in seconds.items():
        replay = replays[name]
        found[name] = {**spread(values), "copies": replay.copies, "by": replay.by}
        if replay.note:
            found[name]["note"] = replay.note
    return found


def call_times(
    device: Device, functions: Mapping[str, Timed], *, rounds: int, calls: Mapping[str, int], budget: float
) -> dict[str, dict[str, Any]]:
    """Host seconds per ordinary call: ``{name: {"call": spread, "enqueue": spread} or {error}}``.

    ``enqueue`` ends when the host is done with its calls, ``call`` when the device is too. ``calls[name]`` calls follow
    one another in each round.
    """
    found: dict[str, dict[str, Any]] = {}
    able = []
    for name, timed in functions.items():
        try:
            with timed.context():
                timed.function()
                timed.function()
            able.append(name)
        except Exception as error:  # recorded: one contestant must not end the stage
            found[name] = {"error": _message(error)}
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in able}
    with _no_collection():
        start = device.clock()
        for turn, names in enumerate(_turns(able, rounds)):
            if turn >= 3 and device.clock() - start > budget:
                break
            for name in names:
                function, count = functions[name].function, calls[name]
                with functions[name].context():
                    device.synchronize()
                    begin = device.clock()
                    for _ in range(count):
                        function()
                    enqueued = device.clock()
                    device.synchronize()
                    done = device.clock()
                times[name][0].append((done - begin) / count)
                times[name][1].append((enqueued - begin) / count)
    for name, (call, enqueue) in times.items():
        found[name] = {"call": spread(call), "enqueue": spread(enqueue), "calls": calls[name]}
    return found
