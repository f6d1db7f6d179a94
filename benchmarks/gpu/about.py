"""The GPU, the versions, and the ceilings that were measured on it."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
from typing import Any

import torch

from benchmarks.environment import environment
from benchmarks.files import read_json
from benchmarks.gpu.device import Device
from benchmarks.gpu.prove import PROVEN
from benchmarks.gpu.stage import Context, Item, Payload
from benchmarks.gpu.timing import Timed, kernel_times

__all__ = ["about", "copy", "environment_items"]

_QUERY = (
    "name", "driver_version", "memory.total", "clocks.max.sm", "clocks.sm", "clocks.max.memory", "power.limit",
    "temperature.gpu", "ecc.mode.current", "mig.mode.current", "compute_mode",
)  # fmt: skip
_PACKAGES = ("torch", "triton", "numpy", "pytest", "matplotlib", "setuptools", "cmake", "ninja", "pybind11")


def _smi() -> dict[str, str]:
    """What nvidia-smi says, read and nothing set."""
    command = ["nvidia-smi", f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"unavailable": type(error).__name__}
    if done.returncode != 0 or not done.stdout.strip():
        return {"unavailable": (done.stderr or done.stdout).strip()[:200]}
    return dict(zip(_QUERY, (value.strip() for value in done.stdout.splitlines()[0].split(",")), strict=False))


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    cudnn = torch.backends.cudnn.version()
    return {**found, "cuda": str(torch.version.cuda), "cudnn": str(cudnn)}


def about(command: list[str]) -> dict[str, Any]:
    """Where, with what, when and by which command; the commit is taken from RMT_KERNELS_COMMIT where git knows none."""
    here = environment(command)
    if here["commit"] == "unknown":
        here["commit"] = os.environ.get("RMT_KERNELS_COMMIT", "unknown")
    here["versions"] |= _versions()
    here["gpu"] = _smi()
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        here["gpu"] |= {
            "torch_name": properties.name, "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count, "memory_bytes": properties.total_memory,
            "l2_bytes": getattr(properties, "L2_cache_size", None),
        }  # fmt: skip
    return here


def copy(device: Device, size: int) -> Timed:
    """A device-to-device copy of ``size`` bytes: 2 x ``size`` bytes of traffic."""
    source = torch.empty(size, dtype=torch.uint8, device=device.torch).random_()
    target = torch.empty_like(source)
    return Timed(lambda: target.copy_(source))


def _ceilings(context: Context) -> Payload:
    device, plan = context.gpu(), context.plan
    a, b = (torch.randn(plan.product, plan.product, device=device.torch).bfloat16() for _ in range(2))
    out = torch.empty_like(a)
    functions = {"copy": copy(device, plan.copy_bytes), "matmul": Timed(lambda: torch.mm(a, b, out=out))}
    times = kernel_times(device, functions, rounds=plan.rounds, budget=5.0, flush=False)
    for name, time in times.items():
        if "error" in time:
            raise RuntimeError(f"{name}: {time['error']}")
    facts: dict[str, Any] = {
        "copy_bytes_per_second": 2 * plan.copy_bytes / times["copy"]["median"],
        "matmul_tflops": 2 * plan.product**3 / times["matmul"]["median"] / 1e12,
        "times": times,
    }
    copied, product = facts["copy_bytes_per_second"] / 1e12, facts["matmul_tflops"]
    context.say(f"    copy {copied:.2f} TB/s, bf16 product {product:.0f} TFLOP/s")
    return {"facts": facts, "failures": []}


def _dispatch(context: Context) -> Payload:
    """backend="auto" must choose the CUDA backend where it is there and proven, and else the other that is measured."""
    from rmt_kernels import SegmentLayout, explain
    from rmt_kernels.backends import cuda

    device, plan, layout = context.gpu(), context.plan, SegmentLayout.rmt_decoder(64, 4)
    query, key, value = (torch.randn(1, 2, 72, 64, device=device.torch, dtype=torch.bfloat16) for _ in range(3))
    chosen = explain(query, key, value, layout)
    proven = device.torch.type == "cuda" and "sm_{}{}".format(*torch.cuda.get_device_capability()) in read_json(PROVEN)
    built = not cuda.why_missing
    wanted = plan.cuda if built and proven else plan.backend
    failures = [f"backend='auto' chooses {chosen.backend!r}, not {wanted!r}"] if chosen.backend != wanted else []
    facts = {"auto": chosen.backend, "refused": chosen.refused, "built": built, "proven": proven}
    return {"facts": facts, "failures": failures}


def environment_items() -> list[Item]:
    """Ceilings, and which backend is chosen."""
    return [Item("ceilings", _ceilings, limit=60.0), Item("dispatch", _dispatch, limit=60.0)]
