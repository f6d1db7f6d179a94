"""The CUDA C++ kernels of csrc/cuda: NVIDIA GPUs from sm_80 on, and, for tests, an emulated GPU on the CPU.

Built from source (docs/building.md). RMT_KERNELS_EMULATE=1 runs the same kernels on CPU tensors, thread by thread.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from rmt_kernels import _build, ops
from rmt_kernels.backends.call import Call, check_values, run_kernels

__all__ = ["module", "run", "supports", "unproven", "why_missing"]

EMULATED = os.environ.get("RMT_KERNELS_EMULATE", "0") == "1"
TYPES = {torch.bfloat16: "bf16", torch.float16: "f16"}
# Architectures on which a result file of `make gpu` shows that every check passed, and that file.
_PROVEN = Path(__file__).with_name("proven.json")
_MOST_KEYS = 1 << 24
_MOST = 2**31 - 1
LEAST_CAPABILITY = (8, 0)

module: Any = None  # rmt_kernels._cuda or rmt_kernels._emulated


def _load() -> tuple[ModuleType | None, str]:
    name = "_emulated" if EMULATED else "_cuda"
    try:
        return importlib.import_module(f"rmt_kernels.{name}"), ""
    except ImportError as error:
        if importlib.util.find_spec(f"rmt_kernels.{name}") is not None:
            return None, f"the module {name} does not load ({error}); rebuild it"
    if EMULATED:
        return None, "the emulated module was not built; build it with: RMT_KERNELS_EMULATED=1 pip install ."
    return None, _build.why_no_cuda()


module, why_missing = _load()


@cache
def _properties(device: torch.device) -> tuple[int, int, int]:
    properties: Any = torch.cuda.get_device_properties(device)
    return properties.major, properties.minor, int(properties.shared_memory_per_block_optin)


@cache
def _kernels(dtype: torch.dtype, head_dim: int) -> tuple[int, int] | None:
    found: tuple[int, int] | None = module.shared_memory(TYPES[dtype], head_dim)
    return found


@cache
def _known_widths(dtype: torch.dtype) -> tuple[int, ...]:
    return tuple(sorted(width for name, width in module.built()["instances"] if name == TYPES.get(dtype)))


@torch.compiler.assume_constant_result
def _device_properties(device: torch.device) -> tuple[int, int, int]:
    """Compute capability, and the bytes of shared memory that a block may have."""
    return _properties(device)


@torch.compiler.assume_constant_result
def _shared_memory(dtype: torch.dtype, head_dim: int) -> tuple[int, int] | None:
    """Bytes that blocks take at most, forward and backward."""
    return _kernels(dtype, head_dim)


@torch.compiler.assume_constant_result
def _widths(dtype: torch.dtype) -> tuple[int, ...]:
    """The widths that were compiled for a type, ascending."""
    return _known_widths(dtype)


@torch.compiler.assume_constant_result
def _architectures() -> tuple[str, ...]:
    """What was compiled for, as nvcc names it: "80", "90a"."""
    return tuple(module.built()["architectures"].split(", "))


def _has_code(architectures: tuple[str, ...], major: int, minor: int) -> bool:
    """Whether such a GPU runs what was compiled: code for its architecture or an earlier one of the same generation, or
    PTX of any earlier one, which comes with the first that has no letter."""
    plain = [int(name) for name in architectures if name.isdigit()]
    own = 10 * major + minor
    return (
        f"{own}a" in architectures
        or any(10 * major <= name <= own for name in plain)
        or bool(plain and plain[0] <= own)
    )


def supports(call: Call) -> str | None:
    """None where the kernels serve the call, otherwise the reason why not."""
    if why_missing:
        return why_missing
    if call.relative is not None:
        return "it has no distance-dependent scores (relative=); use backend='triton'"
    device, dtype, head_dim = call.query.device, call.query.dtype, call.query.shape[-1]
    if device.type != ("cpu" if EMULATED else "cuda"):
        return f"it runs on {'CPU tensors, emulated' if EMULATED else 'CUDA tensors'}, got {device}"
    widths = _widths(dtype)
    if not widths:
        names = " and ".join(str(known) for known in TYPES if _widths(known))
        return f"it was built for {names}, got {dtype}; use backend='triton'"
    if head_dim > widths[-1]:
        return f"its largest head_dim is {widths[-1]}, got {head_dim}; use backend='triton'"
    if call.layout.num_keys > _MOST_KEYS:
        return f"it serves up to {_MOST_KEYS} keys, got {call.layout.num_keys}"
    batch, heads, rows = call.query.shape[:3]
    if heads // call.key.shape[1] * rows > _MOST - 128:
        return f"it serves up to {_MOST - 128} query rows of a group of heads, got {heads // call.key.shape[1] * rows}"
    if batch * heads * (rows // 16 + 1) * (call.layout.num_keys // 512 + 1) > _MOST:
        return f"it launches up to {_MOST} blocks: split the batch"
    if EMULATED:
        return None
    major, minor, most = _device_properties(device)
    if (major, minor) < LEAST_CAPABILITY:
        return f"it needs a GPU of compute capability 8.0 or later, this one has {major}.{minor}"
    if not _has_code(_architectures(), major, minor):
        return (
            f"it was built for {', '.join(_architectures())}, and this GPU has {major}.{minor}: build it for that too"
        )
    needed = _shared_memory(dtype, head_dim)
    assert needed is not None  # head_dim is at most the widest
    forward, backward = needed
    tensors = (call.query, call.key, call.value, *(call.cache or ()))
    differentiated = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    if max(forward, backward if differentiated else 0) > most:
        return (
            f"its blocks take {max(needed) >> 10} KiB of shared memory for head_dim {head_dim}"
            f"{' and gradients' if forward <= most else ''}, this GPU has {most >> 10}; use backend='triton'"
        )
    return None


@cache
def _read_proven() -> frozenset[str]:
    return frozenset(json.loads(_PROVEN.read_text()))


@torch.compiler.assume_constant_result
def _proven(architecture: str) -> bool:
    return architecture in _read_proven()


def unproven(call: Call) -> str | None:
    """Why "auto" does not choose the kernels though they serve the call, or None."""
    if call.query.device.type != "cuda":
        return "the emulated GPU is for tests: it is chosen by name only"
    major, minor, _ = _device_properties(call.query.device)
    if _proven(f"sm_{major}{minor}"):
        return None
    return f"no result file shows yet that its checks passed on sm_{major}{minor}: it is chosen by name only"


def _forward(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    from rmt_kernels.backends.cuda import operators

    return operators.forward(*args)


def _backward(*args: Any) -> ops.Gradients:
    from rmt_kernels.backends.cuda import operators

    return operators.backward(*args)


if not why_missing:
    ops.register_kernels("cuda", _forward, _backward)


def run(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """``(out, lse)`` by the kernels."""
    check_values(call)
    return run_kernels(call, "cuda")
