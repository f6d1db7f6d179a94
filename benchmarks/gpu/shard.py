"""A pytest plugin that runs every n-th test, writes each result down at once, and skips those already written down.

So a suite can be spread over processes, cut off by a time limit, killed by a crash, and taken up again. A process ends
itself, with a status of GIVEN_UP, where it lost the device, or where a test hangs, as one does whose kernel never ends.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

__all__ = ["GIVEN_UP", "cut_off", "read_log"]

GIVEN_UP = _DEVICE_LOST, _HUNG = 17, 18
_CUT_OFF = "cut off"
_ENDED = "its process died or was ended"
_LOST = ("CUDA error", "device-side assert", "illegal memory access")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("shard")
    group.addoption("--shard", default="0/1", help="I/N: every N-th test from the I-th")
    group.addoption("--shard-log", type=Path, required=True, help="a JSON line for each test that began or ended")
    group.addoption("--shard-done", type=Path, nargs="*", default=[], help="logs whose tests are not run again")
    group.addoption("--shard-seconds", type=float, default=float("inf"), help="no test is begun after that")
    group.addoption("--shard-test-seconds", type=float, default=threading.TIMEOUT_MAX, help="one test may take that")


def read_log(files: list[Path]) -> dict[str, dict[str, Any]]:
    """``{test id: {"outcome", "seconds", "message"}}`` of the logs; a test that began and never ended is "crashed".

    A test that was cut off (``cut_off``) is left out, as one that never began.
    """
    found: dict[str, dict[str, Any]] = {}
    for file in files:
        if not file.exists():
            continue
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # a line that a dying process did not finish
            ended = found.get(entry["id"], {}).get("outcome") not in (None, "crashed")
            if entry.get("outcome") == _CUT_OFF:
                found.pop(entry["id"], None)
            elif "outcome" in entry:
                found[entry["id"]] = entry
            elif not ended:
                found[entry["id"]] = {**entry, "outcome": "crashed", "message": _ENDED}
    return found


def cut_off(file: Path) -> None:
    """Note in the log of a process that was ended for want of time that what it was at is to be run again."""
    names = [name for name, entry in read_log([file]).items() if entry.get("message") == _ENDED]
    with file.open("a", encoding="utf-8") as log:
        log.writelines("\n" + json.dumps({"id": name, "outcome": _CUT_OFF}) + "\n" for name in names)


class _Plugin:
    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.log: Path = config.getoption("--shard-log")
        self.end = time.monotonic() + config.getoption("--shard-seconds")
        self.most: float = config.getoption("--shard-test-seconds")
        self.lost = False

    def _write(self, entry: dict[str, Any]) -> None:
        with self.log.open("a", encoding="utf-8") as log:
            log.write(json.dumps(entry) + "\n")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed and self.config.getoption("--shard").startswith("0/"):
            message = str(report.longrepr).strip().splitlines()[-1:]
            self._write({"id": f"collecting {report.nodeid}", "outcome": "failed", "seconds": 0.0, "message": message})

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        number, of = (int(part) for part in config.getoption("--shard").split("/"))
        done = read_log([*config.getoption("--shard-done")])
        chosen = [item for item in items[number::of] if item.nodeid not in done]
        self._write({"collected": len(items), "id": f"shard {number}", "outcome": "collected"})
        items[:] = chosen

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        if time.monotonic() > self.end:
            item.session.shouldstop = "the time is up"
        self._write({"id": item.nodeid})
        watch = threading.Timer(self.most, self._give_up, (item.nodeid,))
        watch.daemon = True
        watch.start()
        try:
            return (yield)
        finally:
            watch.cancel()

    def _give_up(self, name: str) -> None:
        message = f"it ran past {self.most:g} s, and its process was ended"
        self._write({"id": name, "outcome": "crashed", "seconds": self.most, "message": message})
        os._exit(_HUNG)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and not report.failed and not report.skipped:
            return
        message = ""
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            message = str(crash.message if crash is not None else report.longrepr).strip()[:500]
            if crash is not None:
                message += f" ({Path(crash.path).name}:{crash.lineno})"
            if any(word in str(report.longrepr) for word in _LOST):
                self.lost = True
        elif report.skipped and isinstance(report.longrepr, tuple):
            message = str(report.longrepr[2])[:200]
        outcome = "xfailed" if hasattr(report, "wasxfail") and report.skipped else report.outcome
        entry = {"id": report.nodeid, "outcome": outcome, "seconds": round(report.duration, 3), "message": message}
        self._write(entry)

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        if self.lost:  # a device that failed once fails every later test of the process
            pytest.exit("the device is lost", returncode=_DEVICE_LOST)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_Plugin(config))
