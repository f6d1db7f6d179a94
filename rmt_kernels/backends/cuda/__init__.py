"""The CUDA C++ kernels of csrc/cuda: NVIDIA GPUs from sm_80 on, and, for tests, an emulated GPU on the CPU.

Built from source (docs/building.md). RMT_KERNELS_EMULATE=1 runs the same kernels on CPU tensors, thread by thread.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
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
_MOST_BLOCKS = 2**31 - 1
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
    return None, _build.cuda().why_missing or "the compiled module is not beside the package; build it again"


module, why_missing = _load()


@torch.compiler.assume_constant_result
def _device_properties(device: torch.device) -> tuple[int, int, int]:
    """Capability, and the bytes of shared memory that a block may have."""
    properties: Any = torch.cuda.get_device_properties(device)
    return properties.major, properties.minor, int(properties.shared_memory_per_block_optin)


@torch.compiler.assume_constant_result
def _shared_memory(dtype: torch.dtype, head_dim: int) -> tuple[int, int] | None:
    found: tuple[int, int] | None = module.shared_memory(TYPES[dtype], head_dim)
    return found


@torch.compiler.assume_constant_result
def _compiled_for(dtype: torch.dtype) -> list[int]:
    """The widths that were compiled for a type."""
    return sorted(width for name, width in module.built()["instances"] if name == TYPES[dtype])


def supports(call: Call) -> str | None:
    """None where the kernels serve the call, otherwise the reason why not."""
    if why_missing:
        return why_missing
    device, dtype, head_dim = call.query.device, call.query.dtype, call.query.shape[-1]
    if device.type != ("cpu" if EMULATED else "cuda"):
        return f"it runs on {'CPU tensors, emulated' if EMULATED else 'CUDA tensors'}, got {device}"
    widths = _compiled_for(dtype) if dtype in TYPES else []
    if not widths:
        names = [str(known) for known in TYPES if _compiled_for(known)]
        return f"it was built for {' and '.join(names)}, got {dtype}; use backend='triton'"
    if head_dim > widths[-1]:
        return f"its largest head_dim is {widths[-1]}, got {head_dim}; use backend='triton'"
    if call.layout.num_keys > _MOST_KEYS:
        return f"it serves up to {_MOST_KEYS} keys, got {call.layout.num_keys}"
    batch, heads, rows = call.query.shape[:3]
    if batch * heads * (rows // 16 + 1) * (call.layout.num_keys // 512 + 1) > _MOST_BLOCKS:
        return f"it launches up to {_MOST_BLOCKS} blocks: split the batch"
    if EMULATED:
        return None
    major, minor, shared = _device_properties(device)
    if (major, minor) < LEAST_CAPABILITY:
        return f"it needs a GPU of compute capability 8.0 or later, this one has {major}.{minor}"
    needed = _shared_memory(dtype, head_dim)
    if needed is not None and max(needed) > shared:
        return (
            f"its blocks take {max(needed) >> 10} KiB of shared memory for head_dim {head_dim}, this GPU has "
            f"{shared >> 10}; use backend='triton'"
        )
    return None


@torch.compiler.assume_constant_result
def _proven(architecture: str) -> bool:
    return architecture in json.loads(_PROVEN.read_text())


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
