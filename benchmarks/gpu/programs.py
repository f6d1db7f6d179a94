"""Stages that run other programs: builds, the compile gate, the retuning of tiles."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.environment import ROOT
from benchmarks.gpu.stage import Context, Item, Payload
from benchmarks.gpu.store import read_json
from benchmarks.gpu.suite import run_tests, shards

__all__ = ["build_items", "gate_items", "run_program", "tune_items"]

_TAIL = 1500


def run_program(
    context: Context, name: str, command: Sequence[str], environment: Mapping[str, str] | None = None
) -> Payload:
    """Run ``command`` from the root of the repository: its exit status, seconds and the end of what it wrote."""
    log = context.work / f"{name}.txt"
    begin = time.monotonic()
    with log.open("wb") as text:
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **(environment or {})}, stdout=text, stderr=subprocess.STDOUT
        )
        try:
            status: int | None = process.wait(timeout=max(1.0, context.left()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            status = None
    tail = log.read_bytes()[-_TAIL:].decode(errors="replace")
    facts = {
        "command": " ".join(command[:1] and ["python", *command[1:]]), "status": status,
        "seconds": round(time.monotonic() - begin, 1), "tail": tail,
    }  # fmt: skip
    failures = ["it ran past its time limit"] if status is None else [f"exit status {status}"] if status else []
    return {"facts": facts, "failures": failures}


def _build_cpu(context: Context) -> Payload:
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    found = run_program(context, "build", command, {"RMT_KERNELS_CPU": "1"})
    found["facts"]["cpu_module"] = [file.name for file in sorted((ROOT / "rmt_kernels").glob("_cpu*.so"))]
    return found


def _cpu_tests(context: Context) -> Payload:
    probe = "from rmt_kernels.backends import cpu; import sys; print(cpu.why_missing); sys.exit(bool(cpu.why_missing))"
    found = run_program(context, "probe", [sys.executable, "-c", probe])
    if found["failures"]:
        return {"facts": found["facts"], "failures": [f"no CPU module: {found['facts']['tail'].strip()[-300:]}"]}
    files = ["tests/test_cpu.py", "tests/test_backends.py", "tests/test_determinism.py"]
    return run_tests(context, files, "cpu", shards())


def _cuda_module(context: Context) -> Payload:
    if not (ROOT / "csrc" / "cuda").is_dir():
        return {"facts": {"cuda_module": "not present"}, "failures": []}
    modules = [file.name for file in sorted((ROOT / "rmt_kernels").glob("_cuda*.so"))]
    failures = [] if modules else ["csrc/cuda is there, and the build made no module of it"]
    return {"facts": {"cuda_module": modules}, "failures": failures}


def build_items() -> list[Item]:
    """Build the CPU module in place with this Python and torch, test it, and look for the CUDA module."""
    return [
        Item("CPU module", _build_cpu, limit=280.0, least=60.0),
        Item("CUDA module", _cuda_module, limit=30.0),
        Item("tests of the CPU module", _cpu_tests, limit=280.0, least=30.0),
    ]


def _module(context: Context, name: str, extra: Sequence[str]) -> Payload:
    """Run a command of the Triton backend that writes ``--json``."""
    try:
        present = importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        present = False
    if not present:
        return {"facts": {"present": False, "module": name}, "failures": [f"there is no module {name}"]}
    file = Path(context.work) / f"{name.rpartition('.')[2]}.json"
    file.unlink(missing_ok=True)
    found = run_program(context, "run", [sys.executable, "-m", name, "--json", str(file), *extra])
    found["facts"]["result"] = read_json(file)
    return found


def gate_items() -> list[Item]:
    """The compile gate."""
    return [Item("gate", lambda context: _module(context, "rmt_kernels.backends.triton.gate", []), 560.0, 60.0)]


def tune_items() -> list[Item]:
    """The retuning of the table of tiles."""

    def run(context: Context) -> Payload:
        seconds = f"{max(30.0, context.left() - 30.0):.0f}"
        return _module(context, "rmt_kernels.backends.triton.tune", ["--seconds", seconds])

    return [Item("tune", run, 560.0, 90.0)]
