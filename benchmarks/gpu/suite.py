"""The shared test suite on the GPU, spread over processes; it can be cut off and taken up again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.environment import ROOT
from benchmarks.gpu.shard import GIVEN_UP, cut_off, read_log
from benchmarks.gpu.stage import Context, Item, Payload

__all__ = ["run_tests", "suite_items", "summary", "test_files"]

_MOST_STARTS = 6  # of one shard: after a crash the rest of its tests are run by a new process
_SHOWN = 60
_TEST_SECONDS = 90.0  # one test; those of many processes wait for one another's compilation


def test_files() -> list[str]:
    """The files whose tests may run on a GPU; what compiles is a stage of its own, what emulates a GPU needs none."""
    wanted = ("backends", "determinism", "attention", "memory", "modules", "philox", "scan", "triton", "cuda", "suite")
    left_out = ("gate", "tune", "interpret", "benchmarks", "build", "report", "emulat")
    return sorted(
        str(file.relative_to(ROOT))
        for file in (ROOT / "tests").glob("test_*.py")
        if any(word in file.stem for word in wanted) and not any(word in file.stem for word in left_out)
    )


def _logs(work: Path) -> list[Path]:
    return sorted(work.glob("*.jsonl"))


def summary(work: Path) -> Payload:
    """What the logs in ``work`` say: counts, failures with their assertion, the slowest tests, why some skipped."""
    entries = read_log(_logs(work))
    collected = max((entry.get("collected", 0) for entry in entries.values()), default=0)
    tests = {name: entry for name, entry in entries.items() if entry["outcome"] != "collected"}
    counts = Counter(entry["outcome"] for entry in tests.values())
    bad = {name: entry for name, entry in tests.items() if entry["outcome"] in ("failed", "crashed")}
    skips = Counter(entry["message"] for entry in tests.values() if entry["outcome"] == "skipped")
    slowest = sorted(tests.items(), key=lambda pair: -float(pair[1].get("seconds", 0.0)))[:5]
    facts: dict[str, Any] = {
        "collected": collected, "counts": dict(counts), "skipped_because": dict(skips.most_common(5)),
        "failed": [{"id": name, "message": str(entry["message"])} for name, entry in list(bad.items())[:_SHOWN]],
        "slowest": [{"id": name, "seconds": entry.get("seconds")} for name, entry in slowest],
    }  # fmt: skip
    failures = [f"{len(bad)} of {len(tests)} tests failed"] if bad else []
    if collected and not counts.get("passed") and not bad and len(tests) >= collected:
        failures.append("no test ran: all were skipped")
    return {"facts": facts, "failures": failures, "unfinished": len(tests) < collected}


def run_tests(context: Context, files: Sequence[str], select: str, shards: int, options: Sequence[str] = ()) -> Payload:
    """Run the tests that ``-k select`` picks in ``shards`` processes, those in the logs excepted."""
    work, environment = context.work, dict(os.environ)
    # The suite fills new memory with NaN by way of deterministic algorithms, which need this for cuBLAS.
    environment.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        environment.setdefault(name, "1")
    running: dict[int, tuple[subprocess.Popen[bytes], Path]] = {}  # and the log of each
    starts = Counter[int]()
    statuses: dict[int, int] = {}
    ended: set[int] = set()

    def start(number: int) -> None:
        starts[number] += 1
        log = work / f"{number}-{time.time_ns()}.jsonl"
        command = [
            sys.executable, "-m", "pytest", *files, "-q", "-p", "benchmarks.gpu.shard",
            "-p", "no:cacheprovider", "--continue-on-collection-errors", "-k", select, "--shard", f"{number}/{shards}",
            "--shard-log", str(log), "--shard-seconds", f"{max(1.0, context.left()):.1f}",
            "--shard-test-seconds", f"{_TEST_SECONDS:.1f}", *options,
            "--shard-done", *(str(file) for file in _logs(work)),
        ]  # fmt: skip
        output = work / f"shard-{number}.txt"
        with output.open("wb") as text:
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=text, stderr=subprocess.STDOUT)
        running[number] = process, log

    for number in range(shards):
        start(number)
    told = time.monotonic()
    while running:
        time.sleep(0.2)
        for number, (process, log) in list(running.items()):
            if process.poll() is None:
                if context.left() >= -3.0:
                    continue
                process.kill()
                process.wait()
                if log.exists():
                    cut_off(log)
            del running[number]
            statuses[number] = process.returncode
            # 0: passed, 1: some failed, 5: none was chosen; anything else ended before its tests did.
            if process.returncode not in (0, 1, 5) and starts[number] < _MOST_STARTS and context.left() > 20.0:
                start(number)
            else:
                ended.add(number)
        if time.monotonic() - told > 30.0:
            told = time.monotonic()
            counts = summary(work)["facts"]["counts"]
            context.say(f"    so far {json.dumps({k: v for k, v in counts.items() if k != 'crashed'})}")
    found = summary(work)
    found["facts"]["statuses"] = statuses
    broken = {number: status for number, status in statuses.items() if status not in (0, 1, 2, 5, *GIVEN_UP)}
    if broken and not found["facts"]["counts"]:
        tail = (work / f"shard-{min(broken)}.txt").read_text(encoding="utf-8", errors="replace")[-800:]
        found["failures"].append(f"pytest ended with status {min(broken.values())}: {tail}")
        found["unfinished"] = False
    context.say(f"    {json.dumps(found['facts']['counts'])} of {found['facts']['collected']}")
    return found


def shards() -> int:
    """Processes that run tests at the same time: each test waits for compilation and for float64 on one CPU core."""
    return max(1, min(14, (os.cpu_count() or 2) - 2))


def suite_items(select: str, options: Sequence[str] = (), limit: float = 560.0) -> list[Item]:
    """One item: all tests whose name holds ``select``."""
    return [
        Item(
            f"pytest -k {select} {' '.join(options)}".strip(),
            lambda context: run_tests(context, test_files(), select, shards(), options), limit, least=30.0,
        )
    ]  # fmt: skip
