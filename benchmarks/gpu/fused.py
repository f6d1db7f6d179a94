"""Whether compiled FlexAttention really is the fused kernel: past its recompilation limit, or for a call it cannot
lower, torch.compile falls back without a word to separate matrix products and a softmax."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

__all__ = ["generated_code", "unfused_code", "unfused_kernels"]

# Functions of inductor's templates, by which generated code is known to hold the fused kernel.
_FORWARD = ("def forward_block_mn(", "cpp_fused_flex_attention")
_BACKWARD = ("def bwd_dq_inner(", "def bwd_dkdv_inner(")
_PRODUCTS = re.compile(r"extern_kernels\.(?:bmm|mm|baddbmm|addmm)\b|aten\.(?:bmm|mm|_softmax|_scaled_dot_product)\w*")
_KERNELS = re.compile(r"gemm|cutlass|cublas|nvjet|xmma|bmm|softmax", re.IGNORECASE)
_TEMPLATE = "triton_tem_fused"


@contextmanager
def generated_code() -> Iterator[list[str]]:
    """Collects the source of everything that inductor generates, or loads from its cache, inside the block."""
    from torch._inductor.graph import GraphLowering

    sources: list[str] = []
    with mock.patch.object(GraphLowering, "save_output_code", staticmethod(sources.append)):
        yield sources


def unfused_code(sources: Sequence[str], backward: bool) -> str | None:
    """None where the sources hold the fused kernels and no product or softmax beside them, else what is wrong."""
    text = "\n".join(sources)
    if not text:
        return "torch.compile generated no code"
    if not any(marker in text for marker in _FORWARD):
        return "the generated code holds no fused forward kernel"
    missing = [marker for marker in _BACKWARD if marker not in text] if backward else []
    if missing:
        return f"the generated code holds no fused backward kernel (no {', '.join(missing)})"
    called = sorted(set(_PRODUCTS.findall(text)))
    return f"the generated code calls {', '.join(called)}" if called else None


def unfused_kernels(names: Sequence[str], backward: bool) -> str | None:
    """The same from the names of the kernels that ran on the device."""
    if not names:
        return "no kernel was seen"
    templates = {name for name in names if _TEMPLATE in name}
    if not templates:
        return "no kernel of a template ran"
    if backward and len(templates) < 2:
        return f"only one kernel of a template ran: {templates.pop()}"
    separate = sorted({name for name in names if _KERNELS.search(name) and _TEMPLATE not in name})
    return f"separate products or a softmax ran: {', '.join(separate)[:300]}" if separate else None


def kernel_names(function: Callable[[], Any]) -> list[str]:
    """Names of the device kernels of one call, in order, from PyTorch's profiler."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    function()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        function()
        torch.cuda.synchronize()
    events = [event for event in profiler.events() if str(event.device_type).endswith("CUDA")]
    events.sort(key=lambda event: event.time_range.start)
    return [event.name for event in events if not event.name.startswith(("Memset", "Memcpy"))]
