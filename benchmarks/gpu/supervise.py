"""Runs a stage in a process of its own, ends it when it hangs, and goes on with the rest when it dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.environment import ROOT
from benchmarks.gpu.child import DEVICE_LOST, running_file
from benchmarks.gpu.stage import Stage
from benchmarks.gpu.store import State, Store, complete, pending, read_json

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


def _watch(process: subprocess.Popen[bytes], store: Store, stage: Stage, end: float) -> tuple[str, str | None]:
    """``(how it ended, the item it was at)``: "left", "hung" (an item ran past its limit) or "late" (past ``end``)."""
    key: str | None = None
    since = time.monotonic()
    limit = float("inf")
    file = running_file(store, stage.name)
    while process.poll() is None:
        time.sleep(0.1)
        running = read_json(file)
        now = time.monotonic()
        found = running["key"] if running else None
        if found != key:
            key, since, limit = found, now, running["limit"] if running else float("inf")
        how = "hung" if now - since > limit + _GRACE else "late" if now > end + _GRACE else None
        if how:
            stop(process)
            return how, key
    running = read_json(file)
    return "left", running["key"] if running else None


def _tail(log: Path, characters: int = 2000) -> str:
    try:
        return log.read_bytes()[-characters:].decode(errors="replace")
    except OSError:
        return ""


def _blame(state: State, key: str, reason: str, log: Path) -> None:
    entry = state["items"].setdefault(key, {"attempts": 1, "excluded": {}})
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
                how, key = _watch(process, store, stage, end)
            except BaseException:
                stop(process)
                raise
        status = process.returncode
        running_file(store, stage.name).unlink(missing_ok=True)
        state = store.load(stage.name)
        if how == "hung" and key is not None:
            _blame(state, key, "it ran past its time limit and was ended", log)
        elif how == "late":
            # Cut off, not at fault; but an item that is always cut off must not be tried for ever.
            if key is not None and state["items"].get(key, {}).get("attempts", 0) >= _MOST_ATTEMPTS:
                _blame(state, key, f"cut off {_MOST_ATTEMPTS} times by the time limit", log)
        elif key is not None and status not in (0, DEVICE_LOST):
            _blame(state, key, f"its process died with status {status}", log)
        elif status not in (0, DEVICE_LOST):
            deaths += 1
            state["error"] = f"the stage's process ended with status {status}: {_tail(log, 600)}"
        if status == DEVICE_LOST:
            for other in pending(state):
                if state["items"].get(other, {}).get("attempts", 0) >= _MOST_ATTEMPTS + 2:
                    _blame(state, other, "it left the device unusable again and again", log)
        store.save(state)
        if how == "late" or deaths >= 2 or (how == "left" and status == 0):
            break
    state = store.load(stage.name)
    state["seconds"] = round(before + time.monotonic() - begin, 1)
    state["complete"] = complete(state)
    store.save(state)
    return state
