"""Small Triton kernels for tests of the compile gate: one that passes, and one for each way to fail."""

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: N803

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from rmt_kernels.backends.triton.resources import Variant, specialize

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@triton.jit
def product(a, b, out, depth, stride, ROWS: tl.constexpr, COLS: tl.constexpr, STEP: tl.constexpr):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, COLS)
    total = tl.zeros([ROWS, COLS], tl.float32)
    for start in range(0, depth, STEP):
        steps = start + tl.arange(0, STEP)
        left = tl.load(a + rows[:, None] * stride + steps[None, :])
        right = tl.load(b + steps[:, None] * stride + cols[None, :])
        total = tl.dot(left, right, total, input_precision="ieee")
    tl.store(out + rows[:, None] * stride + cols[None, :], total.to(out.dtype.element_ty))


@triton.jit
def described(a, b, out, depth, stride, ROWS: tl.constexpr, COLS: tl.constexpr, STEP: tl.constexpr):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, COLS)
    total = tl.zeros([ROWS, COLS], tl.float32)
    for start in range(0, depth, STEP):
        total = tl.dot(a.load([tl.program_id(0) * ROWS, start]), b.load([start, 0]), total)
    tl.store(out + rows[:, None] * stride + cols[None, :], total.to(out.dtype.element_ty))


@triton.jit
def copied(a, out, COLS: tl.constexpr):
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    tl.store(out + cols, tl.load(a + cols))


@triton.jit
def refused(a, COLS: tl.constexpr):
    tl.static_assert(COLS < 0, "toy error: never true")


def _product(arch: int, name: str, tile: tuple[int, int, int], **changes: object) -> Variant:
    given = {"dtype": "bf16", "num_warps": 4, "num_stages": 2, "label": "x".join(map(str, tile)), **changes}
    matrix = torch.empty(512, 512, dtype=_DTYPES[str(given["dtype"])], device="meta")
    rows, cols, step = tile
    tiles = {"ROWS": rows, "COLS": cols, "STEP": step}
    if name == "described":
        left, right = (TensorDescriptor.from_tensor(matrix, list(block)) for block in ((rows, step), (step, cols)))
        call = specialize(described, arch, left, right, matrix, 512, 512, **tiles)
        return Variant(name, described, **call, head_dim=cols, **given)  # type: ignore[arg-type]
    call = specialize(product, arch, matrix, matrix, matrix, 512, 512, **tiles)
    return Variant(name, product, **call, head_dim=cols, **given)  # type: ignore[arg-type]


def variants(arch: int) -> Iterator[Variant]:
    """The toys for ``arch``; those named "fits", "described" and "narrow" pass, the others each break one rule."""
    for dtype in ("bf16", "fp16"):
        yield _product(arch, "fits", (64, 64, 32), dtype=dtype, programs=4)
    yield _product(arch, "fits", (32, 32, 16), dtype="fp32", tensor_cores=False)
    yield _product(arch, "narrow", (16, 64, 64), tensor_cores="mma")
    yield _product(arch, "shared", (128, 128, 128), num_warps=8, num_stages=5, tensor_cores="mma")
    copy = specialize(copied, arch, *[torch.empty(64, dtype=torch.bfloat16, device="meta")] * 2, COLS=64)
    plain = {"num_warps": 1, "num_stages": 1, "dtype": "bf16", "head_dim": 64, "label": "64"}
    yield Variant("scalar", copied, **copy, **plain)  # type: ignore[arg-type]
    if arch == 90:
        yield _product(arch, "described", (64, 64, 64))
        yield _product(arch, "spills", (128, 256, 64))
        yield _product(arch, "no_wgmma", (16, 64, 64))
        yield _product(arch, "crowded", (64, 64, 32), programs=9)
        yield _product(arch, "typo", (64, 64, 32), options={"maxnregs": 64})
        call = specialize(refused, arch, torch.empty(64, device="meta"), COLS=64)
        yield Variant("refused", refused, **call, **plain)  # type: ignore[arg-type]
