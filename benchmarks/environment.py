"""Where and with what a result was measured; every result file carries it."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

import rmt_kernels
from rmt_kernels.backends import cpu

__all__ = ["ROOT", "device", "environment"]

ROOT = Path(__file__).resolve().parent.parent
_VECTOR_UNITS = ("amx_bf16", "amx_fp16", "avx512_bf16", "avx512_fp16", "avx512f", "avx2", "asimd", "sve")


def _proc(path: str, wanted: str) -> str:
    """The first value of a field of a /proc file, empty where there is none."""
    if not os.path.exists(path):
        return ""
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            name, _, value = line.partition(":")
            if name.strip() == wanted:
                return value.strip()
    return ""


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _commit() -> str:
    commit = _git("rev-parse", "HEAD")
    return commit + ("-dirty" if commit and _git("status", "--porcelain", "--untracked-files=no") else "")


def _kernel_isa() -> str | None:
    if cpu.why_missing:
        return None
    from rmt_kernels import _cpu

    return str(_cpu.isa())


@lru_cache(maxsize=1)
def device() -> dict[str, Any]:
    """The CPU, as plain JSON values."""
    flags = (_proc("/proc/cpuinfo", "flags") or _proc("/proc/cpuinfo", "Features")).split()
    memory = _proc("/proc/meminfo", "MemTotal").removesuffix(" kB")
    return {
        "cpu": _proc("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "kernel_isa": _kernel_isa(),
        "vector_units": [unit for unit in _VECTOR_UNITS if unit in flags],
        "memory_gib": round(int(memory) / 2**20, 1) if memory else None,
    }


def environment(command: list[str] | None = None) -> dict[str, Any]:
    """Device, versions, commit, date and command (default: this process's), as plain JSON values."""
    return {
        "device": device(),
        "versions": {
            "rmt_kernels": rmt_kernels.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "system": platform.platform(),
        },
        "commit": _commit() or "unknown",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *(sys.orig_argv[1:] if command is None else command)]),
    }
