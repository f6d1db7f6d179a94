"""What a stage is: named items, each run in isolation, with what it needs to know."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu.cases import Plan
from benchmarks.gpu.device import Device

__all__ = ["At", "Context", "Item", "Payload", "Stage", "untold"]

Payload = dict[str, Any]
At = Callable[[str, float | None], None]


def untold(contestant: str, seconds: float | None) -> None:
    """An ``At`` for where nobody watches."""


@dataclass
class Context:
    """What an item may use: ``work``, a folder for its files; ``excluded``, contestants not to be run, and why.

    ``at(contestant, seconds)`` says whose code is run from now on, so that it alone is left out where it hangs, after
    ``seconds`` (None: the item's limit), or takes the process down; ``at("", None)``: nobody's alone.
    """

    device: Device | None
    plan: Plan
    work: Path
    deadline: float = float("inf")  # on time.monotonic
    excluded: dict[str, str] = field(default_factory=dict)
    say: Callable[[str], None] = print
    at: At = untold

    def left(self) -> float:
        """Seconds left to the item."""
        return self.deadline - time.monotonic()

    def gpu(self) -> Device:
        """The device, where the stage has one."""
        assert self.device is not None, "this stage has no device"
        return self.device


@dataclass(frozen=True)
class Item:
    """One step of a stage. ``run`` returns any of ``records``, ``facts``, ``failures`` (sentences that fail the run)
    and ``unfinished`` (true: call it again, it goes on where it stopped).

    It is not started with less than ``least`` seconds left, and ended after ``limit`` seconds.
    """

    key: str
    run: Callable[[Context], Payload]
    limit: float = 120.0
    least: float = 5.0


@dataclass(frozen=True)
class Stage:
    """``limit``: seconds of one invocation; ``device``: whether its items use the GPU in their own process.

    ``lost(state)`` says what the stage left on the machine, for others, and is not there any more: it is run again.
    """

    name: str
    title: str
    limit: float
    items: Callable[[Plan], list[Item]]
    device: bool = True
    lost: Callable[[dict[str, Any]], str] = lambda state: ""
