"""Runs a stage in a process of its own, ends it when it hangs, and goes on with the rest when it dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.environment import ROOT
from benchmarks.files import read_json
from benchmarks.gpu.child import DEVICE_LOST, running_file
from benchmarks.gpu.stage import Stage
from benchmarks.gpu.store import State, Store, complete, pending

__all__ = ["run_stage", "stop"]

Command = Callable[[Stage, Path, float], list[str]]
_GRACE = 10.0  # seconds an item may exceed its limit, and a stage its own, before it is ended
_MOST_ATTEMPTS = 3


def child_command(stage: Stage, out: Path, seconds: float) -> list[str]:
    """How a stage's process is started."""
    return [sys.executable, "-m", "benchmarks.gpu.child", stage.name, "--out", str(out), "--seconds", f"{seconds:.1f}"]


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process that was started in a session of its own, and all that it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(timeout=5)
            break
        except subprocess.TimeoutExpired:
            continue
    process.wait()


@dataclass
class _Place:
    """Where a child is: an item, and in it a contestant ("" where it is nobody's alone), each since a time."""

    key: str | None = None
    contestant: str = ""
    began: float = 0.0
    took_over: float = 0.0

    def follow(self, running: dict[str, Any] | None, now: float) -> bool:
        """Take in what the child says; whether an item, or a contestant, has run past its limit."""
        told = running or {}
        key, contestant, seconds = told.get("key"), told.get("contestant") or "", told.get("seconds")
        if key != self.key:
            self.key, self.contestant, self.began, self.took_over = key, contestant, now, now
        elif contestant != self.contestant:
            self.contestant, self.took_over = contestant, now
        past = key is not None and now - self.began > told["limit"] + _GRACE
        return past or (seconds is not None and now - self.took_over > seconds + _GRACE)


def _watch(process: subprocess.Popen[bytes], store: Store, stage: Stage, end: float) -> tuple[str, _Place]:
    """``(how it ended, where it was)``: "left", "hung" (ran past a limit) or "late" (past ``end``)."""
    place = _Place()
    file = running_file(store, stage.name)
    while process.poll() is None:
        time.sleep(0.1)
        now = time.monotonic()
        hung = place.follow(read_json(file), now)
        if hung or now > end + _GRACE:
            stop(process)
            return "hung" if hung else "late", place
    place.follow(read_json(file), time.monotonic())
    return "left", place


def _tail(log: Path, characters: int = 2000) -> str:
    try:
        return log.read_bytes()[-characters:].decode(errors="replace")
    except OSError:
        return ""


def _blame(state: State, place: _Place, reason: str, log: Path) -> None:
    """What went wrong is the contestant's fault, which is left out when the item is tried again, or else the item's."""
    assert place.key is not None
    entry = state["items"].setdefault(place.key, {"attempts": 1, "excluded": {}})
    if place.contestant and entry["attempts"] < _MOST_ATTEMPTS + 2:
        entry.setdefault("excluded", {})[place.contestant] = reason
        entry.update(status="unfinished", trace=_tail(log))
    else:
        entry.update(status="failed", error=reason, trace=_tail(log))


def run_stage(store: Store, stage: Stage, seconds: float, command: Command = child_command) -> State:
    """Run the stage's pending items for at most ``seconds``; returns its state, which is also on disk."""
    begin = time.monotonic()
    end = begin + seconds
    log = store.work(stage.name) / "log.txt"
    before = store.load(stage.name)["seconds"]
    deaths = 0
    while True:
        left = end - time.monotonic()
        state = store.load(stage.name)
        if complete(state) or left < 5.0:
            break
        running_file(store, stage.name).unlink(missing_ok=True)
        with log.open("ab") as errors:
            process = subprocess.Popen(
                command(stage, store.folder, left), cwd=ROOT, stderr=errors, start_new_session=True
            )
            try:
                how, place = _watch(process, store, stage, end)
            except BaseException:
                stop(process)
                raise
        status = process.returncode
        running_file(store, stage.name).unlink(missing_ok=True)
        state = store.load(stage.name)
        if how == "hung":
            _blame(state, place, "it ran past its time limit and was ended", log)
        elif how == "late":
            # Cut off, not at fault; but an item that is always cut off must not be tried for ever.
            if place.key is not None and state["items"].get(place.key, {}).get("attempts", 0) >= _MOST_ATTEMPTS:
                _blame(state, _Place(place.key), f"cut off {_MOST_ATTEMPTS} times by the time limit", log)
        elif place.key is not None and status not in (0, DEVICE_LOST):
            _blame(state, place, f"its process died with status {status}", log)
        elif status not in (0, DEVICE_LOST):
            deaths += 1
            state["error"] = f"the stage's process ended with status {status}: {_tail(log, 600)}"
        if status == DEVICE_LOST:
            for other in pending(state):
                if state["items"].get(other, {}).get("attempts", 0) >= _MOST_ATTEMPTS + 2:
                    _blame(state, _Place(other), "it left the device unusable again and again", log)
        store.save(state)
        if how == "late" or deaths >= 2 or (how == "left" and status == 0):
            break
    state = store.load(stage.name)
    state["seconds"] = round(before + time.monotonic() - begin, 1)
    state["complete"] = complete(state)
    store.save(state)
    return state
