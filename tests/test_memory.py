"""Extra memory grows with the rows, not with their square."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from rmt_kernels import Relative, SegmentLayout, segment_attention
from rmt_kernels.backends import cpu
from tests.emulation import emulated

needs_cpu = pytest.mark.skipif(bool(cpu.why_missing), reason=cpu.why_missing)


def allocated(
    tokens: int, head_dim: int, dtype: torch.dtype, backend: str = "cpu", relative: bool = False
) -> tuple[int, int]:
    """Most bytes that one forward and backward hold at once, inputs and grad_out aside, and all bytes they ask for.

    The profiler sees every tensor, ``at::empty`` in C++ included.
    """
    layout = SegmentLayout.rmt_decoder(tokens, 16)
    shape = (1, 1, layout.num_queries, head_dim)
    leaves = [torch.randn(shape, dtype=dtype).requires_grad_() for _ in range(3)]
    if relative:
        sizes = ((1, layout.num_keys, head_dim), (1, head_dim), (1, head_dim))
        leaves += [torch.randn(size, dtype=dtype).requires_grad_() for size in sizes]
    grad_out = torch.randn(shape, dtype=dtype)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        distances = Relative(leaves[3], leaves[4], leaves[5], mode="shifted") if relative else None
        out = segment_attention(leaves[0], leaves[1], leaves[2], layout, relative=distances, backend=backend)
        grads = torch.autograd.grad(out, leaves, grad_out)
    assert len(grads) == len(leaves)
    assert profiler.profiler is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = asked = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        asked += max(0, event.nbytes())
        peak = max(peak, held)
    return peak, asked


def dense_bytes(tokens: int) -> int:
    rows = SegmentLayout.rmt_decoder(tokens, 16).num_queries
    return rows * rows * 4


def test_the_measure_sees_a_dense_matrix() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        torch.empty(1000, 1000)
    assert profiler.profiler is not None
    sizes = [e.nbytes() for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert 4_000_000 in sizes


@pytest.mark.parametrize(
    ("dtype", "backend", "relative"),
    [
        pytest.param(torch.float32, "cpu", False, marks=needs_cpu),
        pytest.param(torch.bfloat16, "cpu", False, marks=needs_cpu),
        pytest.param(torch.float32, "cpu", True, marks=needs_cpu),
        pytest.param(torch.bfloat16, "cpu", True, marks=needs_cpu),
        pytest.param(torch.bfloat16, "cuda", False, marks=emulated),
    ],
    ids=["f32", "bf16", "f32 relative", "bf16 relative", "cuda"],
)
def test_share_of_a_dense_matrix(dtype: torch.dtype, backend: str, relative: bool) -> None:
    """With head_dim 16 the gradients alone are 1 MB, and a matrix of scores 68 MB."""
    peak, asked = allocated(4096, 16, dtype, backend, relative)
    assert peak > 3 * 4128 * 16 * dtype.itemsize, "the results themselves were not seen"
    share = 0.1 if relative else 0.05  # a table is as long as the keys, and in backward it is there five times
    assert peak < share * dense_bytes(4096)
    assert asked < 2 * share * dense_bytes(4096)


@needs_cpu
@pytest.mark.parametrize("relative", [False, True], ids=["", "relative"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_linear(dtype: torch.dtype, relative: bool) -> None:
    short, long = (allocated(tokens, 64, dtype, relative=relative)[0] for tokens in (1024, 4096))
    assert long <= 4.2 * short


# Run in a process of its own: the high-water mark also sees what C++ takes without asking PyTorch.
HIGH_WATER = """
import json, sys, torch
from rmt_kernels import SegmentLayout, segment_attention
tokens, dtype = int(sys.argv[1]), getattr(torch, sys.argv[2])
torch.set_num_threads(1)
def run(tokens):
    layout = SegmentLayout.rmt_decoder(tokens, 16)
    leaves = [torch.randn(1, 1, layout.num_queries, 64, dtype=dtype).requires_grad_() for _ in range(3)]
    grad_out = torch.randn(1, 1, layout.num_queries, 64, dtype=dtype)
    before = mark("VmRSS")
    out = segment_attention(*leaves, layout, backend="cpu")
    torch.autograd.grad(out, leaves, grad_out)
    return mark("VmHWM") - before
def mark(name):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(name))
run(256)
print(json.dumps(run(tokens)))
"""


@needs_cpu
@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_long_segment(dtype: str) -> None:
    """T = 16,384 with 64 per head, measured both ways."""
    peak, _ = allocated(16384, 64, getattr(torch, dtype))
    assert peak < 0.05 * dense_bytes(16384)
    run = subprocess.run([sys.executable, "-c", HIGH_WATER, "16384", dtype], check=True, capture_output=True, text=True)
    assert 3 * 16416 * 64 * 2 < json.loads(run.stdout) < 0.05 * dense_bytes(16384)
