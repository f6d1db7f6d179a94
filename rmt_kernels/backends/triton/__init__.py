"""The Triton kernels: NVIDIA GPUs from sm_80 on, and, for tests, Triton's interpreter on the CPU."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch

from rmt_kernels import ops
from rmt_kernels.backends.call import Call, check_values, run_kernels

__all__ = ["run", "supports", "why_missing"]

why_missing = ""
if importlib.util.find_spec("triton") is None:
    why_missing = "triton is not installed; install it with: pip install triton"
elif torch.version.hip is not None:
    why_missing = "its configurations are for NVIDIA GPUs, and this PyTorch is built for AMD's"

_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256
MAX_KEYS = 512 * 65535  # chunks of keys, in a grid's second dimension
LEAST_CAPABILITY = (8, 0)
_WIDE_SHARED = 160 << 10  # bytes of shared memory that tiles wider than 128 may take
_RELATIVE_SHARED = 200 << 10  # and, from sm_90 on, those with distance-dependent scores


@torch.compiler.assume_constant_result
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@torch.compiler.assume_constant_result
def _shared(device: torch.device) -> int:
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)


def supports(call: Call) -> str | None:
    """None where the kernels serve the call, otherwise the reason why not."""
    if why_missing:
        return why_missing
    device, dtype = call.query.device, call.query.dtype
    if device.type != ("cpu" if _INTERPRETED else "cuda"):
        return f"it runs on CUDA tensors, got {device}"
    if dtype not in _DTYPES:
        return f"it computes in float32, bfloat16 and float16, got {dtype}"
    if call.query.shape[-1] > MAX_HEAD_DIM:
        return f"its largest head_dim is {MAX_HEAD_DIM}, got {call.query.shape[-1]}"
    if call.layout.num_keys > MAX_KEYS:
        return f"it serves up to {MAX_KEYS} keys, got {call.layout.num_keys}"
    if _INTERPRETED:
        return "Triton's interpreter computes bfloat16 products wrongly" if dtype is torch.bfloat16 else None
    capability = _capability(device)
    if capability < LEAST_CAPABILITY:
        return f"it needs a GPU of compute capability 8.0 or later, this one has {capability[0]}.{capability[1]}"
    if call.query.shape[-1] > 128 and _shared(device) < _WIDE_SHARED:
        return (
            f"head_dim {call.query.shape[-1]} takes up to {_WIDE_SHARED >> 10} KiB of shared memory, this GPU has "
            f"{_shared(device) >> 10}; up to 128 is served"
        )
    if call.relative is not None and capability >= (9, 0) and _shared(device) < _RELATIVE_SHARED:
        return (
            f"distance-dependent scores (relative=) take up to {_RELATIVE_SHARED >> 10} KiB of shared memory from "
            f"compute capability 9.0 on, this GPU has {_shared(device) >> 10}"
        )
    return None


# Triton is imported with the first call that needs it, inside the operators, where torch.compile does not look.
def _forward(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return _registered().forward(*args)  # type: ignore[no-any-return]


def _backward(*args: Any) -> ops.Gradients:
    return _registered().backward(*args)  # type: ignore[no-any-return]


def _registered() -> Any:
    from rmt_kernels.backends.triton import operators

    ops.register_kernels("triton", operators.forward, operators.backward)
    return operators


if not why_missing:
    ops.register_kernels("triton", _forward, _backward)


def run(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """``(out, lse)`` by the kernels."""
    check_values(call)
    return run_kernels(call, "triton")
