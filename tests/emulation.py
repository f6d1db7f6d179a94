"""The emulated GPU (csrc/cuda/emulation), as the tests use it where there is no GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from rmt_kernels.backends import cuda

__all__ = ["EMULATED", "Counters", "counters", "emulated", "needs_module", "ordering"]

EMULATED = os.environ.get("RMT_KERNELS_EMULATE") == "1"
Counters = dict[str, int]

needs_module = pytest.mark.skipif(bool(cuda.why_missing), reason=cuda.why_missing)
emulated = pytest.mark.skipif(
    bool(cuda.why_missing) or not EMULATED, reason=cuda.why_missing or "asks what only the emulated GPU can tell"
)


@contextmanager
def ordering(resident_blocks: int = 1, seed: int = 0, strict_warps: bool = False) -> Iterator[None]:
    """The order in which launches run, see csrc/cuda/emulation/control.h; afterwards it is as it was at first."""
    cuda.module.set_schedule(resident_blocks, seed)
    cuda.module.set_strict_warps(strict_warps)
    try:
        yield
    finally:
        cuda.module.set_schedule()
        cuda.module.set_strict_warps(False)


def counters() -> Counters:
    """What the latest launch did."""
    found: Counters = cuda.module.counters()
    return found
