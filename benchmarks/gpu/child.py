"""The process that runs one stage's items: ``python -m benchmarks.gpu.child STAGE --out DIR --seconds N``.

It writes the stage's state after each item, and before each the one it is about to run, so that the parent knows what
it was at when it died.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.files import write_json
from benchmarks.gpu.cases import FULL, Plan
from benchmarks.gpu.compare import DeviceLostError
from benchmarks.gpu.device import Device, current
from benchmarks.gpu.stage import Context, Item, Stage
from benchmarks.gpu.stages import STAGES
from benchmarks.gpu.store import State, Store, pending

__all__ = ["DEVICE_LOST", "main", "running_file"]

DEVICE_LOST = 17  # exit status: the device is unusable for this process, a new one should go on
_SPARE = 5.0  # seconds for writing and leaving
_MOST_LOSSES = 2  # items that a contestant may spoil: it is left out of the others then


def running_file(store: Store, stage: str) -> Path:
    """Where the child says which item it is at, and whose code in it: ``{"key", "limit", "contestant", "seconds"}``."""
    return store.folder / "stages" / f"{stage}.running"


def _say(line: str) -> None:
    print(line, flush=True)


def _left_out(state: State, key: str) -> dict[str, str]:
    """Contestants that item ``key`` must do without, and why: what they did to it, or to several others."""
    every = [(name, reason) for entry in state["items"].values() for name, reason in entry.get("excluded", {}).items()]
    counts = Counter(name for name, _ in every)
    often = {name: f"left out after {counts[name]} items: {reason}" for name, reason in every}
    here: dict[str, str] = state["items"][key].get("excluded", {})
    return {name: reason for name, reason in often.items() if counts[name] >= _MOST_LOSSES} | here


def _run(item: Item, context: Context, entry: dict[str, Any]) -> None:
    """Run the item and put what came of it into its entry."""
    begin = time.monotonic()
    try:
        payload = item.run(context)
        unfinished = bool(payload.pop("unfinished", False))
        entry.update(payload, status="unfinished" if unfinished else "done", error=None)
    except DeviceLostError as error:
        entry.setdefault("excluded", {})[error.contestant] = str(error)
        entry["status"] = "unfinished"
        raise
    except Exception as error:  # recorded and reported; the next item is run
        lines = str(error).strip().splitlines() or [""]
        entry.update(
            status="failed", error=f"{type(error).__name__}: {' '.join(lines[:3])[:600]}",
            trace=traceback.format_exc()[-3000:],
        )  # fmt: skip
        _say(f"    FAILED {item.key}: {entry['error'][:200]}")
    finally:
        entry["seconds"] = round(entry.get("seconds", 0.0) + time.monotonic() - begin, 2)


def main(
    arguments: list[str] | None = None,
    *,
    stages: Mapping[str, Stage] | None = None,
    plan: Plan = FULL,
    device: Device | None = None,
) -> int:
    """Run the pending items of one stage while there is time; 0, or ``DEVICE_LOST``: another process must go on."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.child", description=__doc__)
    parser.add_argument("stage")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    options = parser.parse_args(arguments)
    end = time.monotonic() + options.seconds
    stage, store = (STAGES if stages is None else stages)[options.stage], Store(options.out)
    state = store.load(stage.name)
    items = {item.key: item for item in stage.items(plan)}
    state["planned"] = list(items)
    store.save(state)
    if stage.device and device is None:
        device = current()
        if device is None:
            print("there is no GPU that torch can use", file=sys.stderr)
            return 2
    status = 0
    for key in pending(state):
        item = items[key]
        left = end - time.monotonic()
        if left < min(item.least, options.seconds / 2):
            continue
        entry = state["items"].setdefault(key, {"status": "started", "attempts": 0, "excluded": {}})
        entry.update(status="started", attempts=entry["attempts"] + 1)
        store.save(state)
        running = {"key": key, "limit": item.limit, "contestant": "", "seconds": None}

        def at(contestant: str, seconds: float | None, running: dict[str, Any] = running) -> None:
            write_json(running_file(store, stage.name), running | {"contestant": contestant, "seconds": seconds})

        at("", None)
        _say(f"  {key}")
        context = Context(
            device, plan, store.work(stage.name), time.monotonic() + min(item.limit, left) - _SPARE,
            _left_out(state, key), _say, at,
        )  # fmt: skip
        try:
            if device is not None:
                with device.scope():
                    _run(item, context, entry)
                device.release()
            else:
                _run(item, context, entry)
        except DeviceLostError as error:
            _say(f"    {error.contestant} left the device unusable in {key}: {error}")
            status = DEVICE_LOST
        except RuntimeError as error:  # of giving memory back: the item's result stands, the device is lost
            _say(f"    the device is lost after {key}: {error}")
            status = DEVICE_LOST
        store.save(state)
        running_file(store, stage.name).unlink(missing_ok=True)
        if status:
            break
        if device is not None and entry["status"] == "failed":
            try:
                device.synchronize()
            except RuntimeError:
                return DEVICE_LOST
    return status


if __name__ == "__main__":
    raise SystemExit(main())
