"""The stage "sanitizer": NVIDIA's checkers of memory, races, barriers and uninitialised reads over sanitized.py."""

from __future__ import annotations

import os
import re
import shutil
import sys
from functools import partial

from benchmarks.gpu.programs import run_program
from benchmarks.gpu.stage import Context, Item, Payload
from rmt_kernels.backends.cuda.report import find_nvcc

__all__ = ["TOOLS", "find_sanitizer", "judge", "sanitizer_items"]

# With their options. PyTorch tries calls that may fail, and copes: failed calls of the CUDA interface are not errors.
# Padding lies between allocations, so that what overruns one does not fall into the next.
TOOLS = {
    "memcheck": ("--report-api-errors", "no", "--padding", "256"),
    "racecheck": (),
    "synccheck": (),
    "initcheck": (),
}
_SHARED = (
    "--error-exitcode", "86", "--print-limit", "40", "--show-backtrace", "no", "--launch-timeout", "120",
    "--target-processes", "application-only",
)  # fmt: skip
_SUMMARY = re.compile(r"^=+ (?:RACECHECK |ERROR )SUMMARY: (\d+)[^\n]*", re.MULTILINE)
_RIGHT = re.compile(r"^(\d+) of (\d+) calls right$", re.MULTILINE)
_SPARE = 8.0  # seconds that the tool may take to end after the calls ran out of time
_SHOWN = 30  # lines of what a tool found first


def find_sanitizer() -> str | None:
    """Path of compute-sanitizer: under CUDA_HOME, nvcc's neighbour, in the usual place or in PATH; None: nowhere."""
    roots = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    if nvcc := find_nvcc():
        roots += [os.path.dirname(os.path.dirname(path)) for path in (nvcc, os.path.realpath(nvcc))]
    roots.append("/usr/local/cuda")
    folders = [os.path.join(root, folder) for root in roots for folder in ("bin", "compute-sanitizer")]
    return shutil.which("compute-sanitizer", path=os.pathsep.join([*folders, os.environ.get("PATH", "")]))


def judge(output: str, status: int | None) -> tuple[dict[str, object], list[str]]:
    """Facts and failures: what the tool counted, what it said first, and whether the calls it watched were right."""
    summaries, calls = _SUMMARY.findall(output), _RIGHT.findall(output)
    said = [line for line in output.splitlines() if line.startswith("===")]
    found = None if not summaries else sum(map(int, summaries))
    right, every = map(int, calls[-1]) if calls else (0, 0)
    facts: dict[str, object] = {"found": found, "right": right, "calls": every, "first": said[:_SHOWN]}
    failures = []
    if status is None:
        failures.append("it ran past its time limit")
    if found is None:
        failures.append("it gave no summary, so it checked nothing")
    elif found:
        first = " ".join(line.lstrip("= ") for line in said[1:4])[:300]
        failures.append(f"{found} {'error' if found == 1 else 'errors'}, the first: {first}")
    if every == 0:
        failures.append("the calls did not come to their end")
    elif right < every:
        failures.append(f"{every - right} of {every} calls gave wrong results")
    if status and not failures:
        failures.append(f"exit status {status}")
    return facts, failures


def _run(tool: str, context: Context) -> Payload:
    found = find_sanitizer()
    if found is None:
        said = "compute-sanitizer is neither beside nvcc, nor under CUDA_HOME, nor in PATH"
        return {"facts": {"tool": tool}, "failures": [said]}
    seconds = max(1.0, context.left() - _SPARE)
    command = [
        found, "--tool", tool, *_SHARED, *TOOLS[tool], sys.executable, "-m", "benchmarks.gpu.sanitized", "--backend",
        context.plan.cuda, "--seconds", f"{seconds:.0f}",
    ]  # fmt: skip
    # Each tensor in an allocation of its own, or the tools would see one block that is initialised and in bounds.
    alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "1"}
    result = run_program(context, tool, command, alone)
    output = (context.work / f"{tool}.txt").read_text(encoding="utf-8", errors="replace")
    facts, failures = judge(output, result["facts"]["status"])
    for line in failures:
        context.say(f"    {line}")
    return {"facts": {"tool": tool, "path": found, **result["facts"], **facts}, "failures": failures}


def sanitizer_items() -> list[Item]:
    """Each tool in a process of its own."""
    return [Item(tool, partial(_run, tool), limit=200.0, least=30.0) for tool in TOOLS]
