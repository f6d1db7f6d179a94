"""The compiled C++ kernels of csrc/cpu."""

from __future__ import annotations

import importlib.util

import torch

from rmt_kernels import ops
from rmt_kernels.backends.call import Call, run_kernels
from rmt_kernels.layout import SegmentLayout

__all__ = ["run", "supports", "why_missing"]

try:
    from rmt_kernels import _cpu

    why_missing = ""
except ImportError as error:
    found = importlib.util.find_spec("rmt_kernels._cpu")
    why_missing = (
        "the compiled CPU module was not built" if found is None else f"the compiled CPU module does not load ({error})"
    ) + "; build it with: pip install --no-build-isolation ."
else:
    built, here = _cpu.built_with_torch(), torch.__version__.split("+")[0]
    if built != here:
        why_missing = (
            f"the CPU module was built with torch {built} and this is torch {here}; rebuild it with: "
            "pip install --no-build-isolation ."
        )
    else:
        ops.register_kernels("cpu", _cpu.forward, _cpu.backward)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256


def supports(call: Call) -> str | None:
    """None where the kernels serve the call, otherwise the reason why not."""
    if why_missing:
        return why_missing
    if call.query.device.type != "cpu":
        return f"it runs on CPU tensors, got {call.query.device}"
    if call.query.dtype not in _DTYPES:
        return f"it computes in float32, bfloat16 and float16, got {call.query.dtype}"
    if call.query.shape[-1] > MAX_HEAD_DIM:
        return f"its largest head_dim is {MAX_HEAD_DIM}, got {call.query.shape[-1]}"
    return None if call.relative is None else _why_not_relative(call.layout)


def _why_not_relative(layout: SegmentLayout) -> str | None:
    if any(form.rows and form.own >= 0 for form in layout.forms):
        return "its distance-dependent scores leave out SELF rules"
    held = [region for region, form in zip((1, 2, 3), layout.forms, strict=True) if form.rows]
    between = layout.key_sizes[held[0] : held[-1] + 1] if held else ()
    if sum(between) != sum(form.rows for form in layout.forms):
        return "its distance-dependent scores need query rows that follow one another among the keys"
    return None


def run(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """``(out, lse)`` by the kernels."""
    return run_kernels(call, "cpu")
