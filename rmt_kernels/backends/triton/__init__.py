"""The Triton kernels: NVIDIA GPUs, and, for tests, Triton's interpreter on the CPU."""

from __future__ import annotations

import importlib.util
import os

import torch

from rmt_kernels import ops
from rmt_kernels.backends.call import Call, check_values

__all__ = ["run", "supports", "why_missing"]

why_missing = (
    "" if importlib.util.find_spec("triton") else "triton is not installed; install it with: pip install triton"
)
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256


def supports(call: Call) -> str | None:
    """None where the kernels serve the call, otherwise the reason why not."""
    if why_missing:
        return why_missing
    device, dtype = call.query.device, call.query.dtype
    if device.type != ("cpu" if _INTERPRETED else "cuda"):
        return f"it runs on CUDA tensors, got {device}"
    if dtype not in _DTYPES:
        return f"it computes in float32, bfloat16 and float16, got {dtype}"
    if _INTERPRETED and dtype is torch.bfloat16:
        return "Triton's interpreter computes bfloat16 products wrongly"
    if call.query.shape[-1] > MAX_HEAD_DIM:
        return f"its largest head_dim is {MAX_HEAD_DIM}, got {call.query.shape[-1]}"
    return None


def _register() -> None:
    from rmt_kernels.backends.triton import launch

    ops.register_kernels("triton", launch.forward, launch.backward)


def run(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """``(out, lse)`` by the kernels."""
    if "triton" not in ops._FORWARD:
        _register()
    if _INTERPRETED:
        check_values(call)
    cache_key, cache_value = call.cache or (None, None)
    found: tuple[torch.Tensor, torch.Tensor] = ops.forward(
        call.query, call.key, call.value, cache_key, cache_value, call.token_lengths, call.token_starts,
        call.cache_starts, call.query_start, call.seed, None, None, None, call.layout.ints, call.scale, call.dropout_p,
        "", "triton",
    )  # fmt: skip
    return found
