"""Stages that run other programs: builds, the compile gate, the retuning of tiles."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import sysconfig
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import ROOT
from benchmarks.files import read_json
from benchmarks.gpu.stage import Context, Item, Payload
from benchmarks.gpu.suite import run_tests, shards

__all__ = ["build_items", "cpu_items", "gate_items", "lost_modules", "run_program", "tune_items"]

_TAIL = 1500  # characters of what a program wrote
_LONG_TAIL = 12000
_MODULES = ("_cpu", "_cuda")


def run_program(
    context: Context,
    name: str,
    command: Sequence[str],
    environment: Mapping[str, str] | None = None,
    characters: int = _TAIL,
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
    tail = log.read_bytes()[-characters:].decode(errors="replace")
    facts = {
        "command": " ".join(command[:1] and ["python", *command[1:]]), "status": status,
        "seconds": round(time.monotonic() - begin, 1), "tail": tail,
    }  # fmt: skip
    failures = ["it ran past its time limit"] if status is None else [f"exit status {status}"] if status else []
    return {"facts": facts, "failures": failures}


def architecture() -> str | None:
    """The GPU's architecture as nvcc calls it, such as 90a; None where torch sees no GPU."""
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return f"{major}{minor}{'a' if major >= 9 else ''}"


def _modules() -> dict[str, list[str]]:
    """Compiled modules of this Python beside the package."""
    folder, suffix = ROOT / "rmt_kernels", sysconfig.get_config_var("EXT_SUFFIX")
    return {name: [f"{name}{suffix}"] if (folder / f"{name}{suffix}").exists() else [] for name in _MODULES}


def lost_modules(state: dict[str, Any]) -> str:
    """Modules that the stage "build" made and that are gone, as on another machine; empty where there are none."""
    made = (state["items"].get("modules", {}).get("facts") or {}).get("modules", {})
    return ", ".join(file for name, files in _modules().items() for file in made.get(name, []) if file not in files)


def _build(context: Context) -> Payload:
    """Build in place: the CUDA extension with every element type, for this GPU, and the CPU module."""
    wishes = {"RMT_KERNELS_CUDA": "1", "RMT_KERNELS_CUDA_ALL": "1"}
    here = architecture()
    if here is not None and "RMT_KERNELS_CUDA_ARCHS" not in os.environ:
        wishes["RMT_KERNELS_CUDA_ARCHS"] = here
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    found = run_program(context, "build", command, wishes, characters=_LONG_TAIL)
    facts, said = found["facts"], found["failures"]
    facts |= {"modules": _modules(), "cuda": (read_json(ROOT / "rmt_kernels" / "_built.json") or {}).get("cuda")}
    last = "\n".join(facts["tail"].strip().splitlines()[-25:])
    said += [f"no module {name} was built" for name, files in facts["modules"].items() if not files]
    if said:
        context.say(last)
        said[0] += f": {last[-700:]}"
    return found


def _loads(context: Context) -> Payload:
    """Import what was built, in a new process, and say what it is."""
    probe = (
        "import sys\nfrom rmt_kernels import _build, cli\nfrom rmt_kernels.backends import cpu\ncli.main(['info'])\n"
        "missing = [why for why in (_build.why_no_cuda(), cpu.why_missing) if why]\nprint(*missing, sep='\\n')\n"
        "sys.exit(bool(missing))"
    )
    found = run_program(context, "info", [sys.executable, "-c", probe], {"RMT_KERNELS_EMULATE": "0"})
    found["facts"]["command"] = "python -m rmt_kernels info"
    if found["failures"]:
        found["failures"] = [found["facts"]["tail"].strip()[-500:]]
    return found


def _resources(context: Context) -> Payload:
    """Registers, spills and tensor-core instructions of every kernel, as compiled for this GPU."""
    here = architecture()
    extra = ["--element", "BF16", "F16"] + (["--arch", here] if here is not None else [])
    command = [sys.executable, "-m", "rmt_kernels.backends.cuda.report", *extra]
    return run_program(context, "resources", command, characters=_LONG_TAIL)


def build_items() -> list[Item]:
    """Build the CPU module and the CUDA extension in place with this Python and torch, load them, and tell what the
    kernels take."""
    return [
        Item("modules", _build, limit=400.0, least=60.0),
        Item("loading", _loads, limit=60.0),
        Item("resources", _resources, limit=200.0, least=20.0),
    ]


def cpu_items() -> list[Item]:
    """The tests of the CPU module."""

    def run(context: Context) -> Payload:
        files = ["tests/test_cpu.py", "tests/test_backends.py", "tests/test_determinism.py"]
        return run_tests(context, files, "cpu", shards())

    return [Item("tests of the CPU module", run, limit=400.0, least=30.0)]


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
