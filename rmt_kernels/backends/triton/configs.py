"""Which tiles a kernel uses: one table, no tuning at run time.

A row is chosen by architecture, width, precision, length and what a call asks for, never by batch or number of heads,
so a sample's result does not depend on its neighbours. ``python -m rmt_kernels.backends.triton.tune`` measures a GPU
and prints rows to put here; these were chosen by what the compile gate reports of their registers and memory.

What decides: a thread has 255 registers, and spilling one inside a loop costs more than any tile gains. Rows of tiles
come in 16 a warp (``mma``) or 64 a group of 4 warps (``wgmma``): more warps than that compute the same scores twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

__all__ = [
    "BACKWARD", "CALLS", "CHOSEN_WITH", "FORWARD", "KINDS", "LENGTHS", "SPLIT_KEYS", "WIDTHS", "Backward", "Row",
    "Tile", "backward_config", "calls", "forward_config", "kind", "length", "padded_width", "splits",
]  # fmt: skip

CHOSEN_WITH = "3.7.1"  # the version of Triton whose reports the rows were chosen by
SPLIT_KEYS = 512  # keys of a chunk where they are split over programs: a multiple of every tile
_FEW, _SHORT = 16, 1024  # packed rows
WIDTHS, KINDS, LENGTHS = (16, 32, 64, 128, 256), ("half", "tf32", "float32"), ("few", "short", "long")
CALLS = ("plain", "gaps", "extras")


@dataclass(frozen=True)
class Tile:
    """Rows and keys of a tile, warps of a program, and how many tiles ahead loads are issued."""

    rows: int
    keys: int
    warps: int
    stages: int
    descriptors: bool = False  # keys and values fetched by the copy engine (sm_90 and later) where strides allow
    specialize: bool = False  # 4 warps, descriptors, and others that only load (sm_90 and later); one masked loop
    programs: int = 1  # that one SM holds at once: what the compile gate demands
    spills: int = 0  # bytes of registers spilled at most: what the compile gate allows

    @property
    def tiles(self) -> tuple[Tile, ...]:
        """Those of a configuration."""
        return (self,)


@dataclass(frozen=True)
class Backward:
    """Tiles of the two parts of the backward pass; ``joint``: both in one launch, with the warps of ``keys``."""

    keys: Tile
    queries: Tile
    joint: bool = False
    descriptors: bool = False  # of rows in the one, of keys in the other; not with grouped heads

    @property
    def tiles(self) -> tuple[Tile, ...]:
        """Those of a configuration."""
        return self.keys, self.queries


@dataclass(frozen=True)
class Row:
    """Where a configuration applies, and why it was chosen. The first row of a table that applies is taken."""

    arch: int  # compute capability times 10, and later ones; 0 is the interpreter
    width: int  # padded head_dim up to this
    kind: str  # "half" (float16, bfloat16), "tf32" or "float32"
    length: str  # "few", "short", "long" or "any"
    config: Tile | Backward
    reason: str
    calls: str = "any"  # what a call asks for: "plain", "gaps", "extras" (see ``calls``) or "any"

    def applies(self, arch: int, width: int, kind: str, length: str, calls: str) -> bool:
        return (
            self.arch <= arch
            and width <= self.width
            and kind == self.kind
            and self.length in (length, "any")
            and self.calls in (calls, "any")
        )


_TWICE = "8 warps compute scores of 64 rows twice; 128 rows spill"
_SCALAR = "scalar products: what fits, whatever the compiler makes of it"
_DRAWS = "dropout's random numbers take the registers of half a tile"

FORWARD: tuple[Row, ...] = (
    # few rows: bound by memory, so that many small programs keep many loads in flight
    Row(100, 64, "half", "few", Tile(16, 128, 4, 2), "as 3 stages of 64 keys, which spill"),
    Row(80, 64, "half", "few", Tile(16, 64, 4, 3), "16 KiB of loads in flight a program"),
    Row(80, 128, "half", "few", Tile(16, 64, 4, 2), "3 stages spill", "extras"),
    Row(80, 128, "half", "few", Tile(16, 64, 4, 3), "32 KiB of loads in flight a program"),
    Row(80, 256, "half", "few", Tile(16, 32, 4, 2), "3 stages spill", "extras"),
    Row(80, 256, "half", "few", Tile(16, 32, 4, 3), "32 KiB of loads in flight a program"),
    # sm_100: sums and scores lie in tensor memory
    Row(100, 64, "half", "any", Tile(64, 64, 4, 2, programs=2), "128 rows spill", "extras"),
    Row(100, 64, "half", "short", Tile(64, 64, 4, 2, programs=3), "twice as many programs as of 128 rows, 3 on an SM"),
    Row(100, 64, "half", "long", Tile(128, 64, 4, 3, True, programs=2),
        "2 programs on an SM: one's exponentials fill the other's products"),
    Row(100, 128, "half", "any", Tile(64, 64, 8, 2), _DRAWS, "extras"),
    Row(100, 128, "half", "short", Tile(64, 64, 4, 2, programs=2), "2 programs on an SM"),
    Row(100, 128, "half", "long", Tile(128, 128, 8, 2, True), "128 x 64 in 4 warps spills"),
    Row(100, 256, "half", "any", Tile(64, 32, 8, 2), _DRAWS, "extras"),
    Row(100, 256, "half", "short", Tile(64, 32, 8, 2), "64 rows fill the chip sooner; in 4 warps they spill"),
    Row(100, 256, "half", "long", Tile(128, 32, 8, 2), "as much as registers hold"),
    # sm_90
    Row(90, 64, "half", "any", Tile(64, 64, 4, 2, programs=2), "128 rows spill", "extras"),
    Row(90, 64, "half", "short", Tile(64, 64, 4, 3, programs=3), "twice as many programs as of 128 rows, 3 on an SM"),
    Row(90, 64, "half", "long", Tile(128, 64, 4, 3, True, programs=2),
        "2 programs on an SM: one's exponentials fill the other's products"),
    Row(90, 128, "half", "any", Tile(64, 32, 4, 2, programs=2), _DRAWS, "extras"),
    Row(90, 128, "half", "short", Tile(64, 64, 4, 2, programs=2), "2 programs on an SM"),
    Row(90, 128, "half", "long", Tile(128, 128, 8, 2, True), "128 x 64 in 4 warps spills", "plain"),
    Row(90, 128, "half", "long", Tile(128, 64, 8, 2), "128 x 128 spills", "gaps"),
    Row(90, 256, "half", "any", Tile(64, 32, 8, 2), _TWICE, "extras"),
    Row(90, 256, "half", "short", Tile(64, 32, 8, 2), "64 rows fill the chip sooner; in 4 warps they spill"),
    Row(90, 256, "half", "long", Tile(128, 32, 8, 2), "as much as registers hold"),
    # sm_80 and later
    Row(80, 64, "half", "any", Tile(64, 32, 4, 2, programs=2), _DRAWS, "extras"),
    Row(80, 64, "half", "short", Tile(64, 64, 4, 3, programs=2), "twice as many programs as of 128 rows"),
    Row(80, 64, "half", "long", Tile(128, 64, 8, 3), "in 4 warps it spills"),
    Row(80, 128, "half", "any", Tile(32, 32, 4, 2, programs=2), _DRAWS, "extras"),
    Row(80, 128, "half", "short", Tile(64, 32, 4, 3, programs=2), "64 x 64 in 4 warps spills"),
    Row(80, 128, "half", "long", Tile(128, 32, 8, 3), "128 x 64 spills where rows have gaps"),
    Row(80, 256, "half", "any", Tile(32, 32, 8, 1), _DRAWS, "extras"),
    Row(80, 256, "half", "any", Tile(64, 32, 8, 2), "128 rows spill"),
    # float32: operands of a product are held for all of its width
    Row(80, 64, "tf32", "any", Tile(64, 32, 4, 1, programs=2), "64 x 64 spills"),
    Row(80, 128, "tf32", "any", Tile(32, 32, 4, 2, programs=2), "64 rows spill"),
    Row(80, 256, "tf32", "any", Tile(32, 32, 8, 1), "in 4 warps it spills"),
    Row(80, 64, "float32", "any", Tile(32, 16, 4, 1, spills=16), _SCALAR),
    Row(80, 128, "float32", "any", Tile(32, 16, 8, 1, spills=16), _SCALAR),
    Row(80, 256, "float32", "any", Tile(16, 16, 8, 1), _SCALAR),
    # the interpreter
    Row(0, 256, "half", "any", Tile(64, 64, 4, 2), "any will do"),
    Row(0, 256, "tf32", "any", Tile(64, 64, 4, 2), "any will do"),
    Row(0, 256, "float32", "any", Tile(64, 64, 4, 2), "any will do"),
)  # fmt: skip

_ONE = "one launch fills the chip sooner"
_SUMS = "the sums of 64 keys fill all registers: 32 keys, without wgmma"
_LEAN = "the sums of 64 keys fill half the registers"

BACKWARD: tuple[Row, ...] = (
    # sm_100
    Row(100, 64, "half", "any", Backward(Tile(32, 64, 4, 2), Tile(64, 32, 4, 2)), _DRAWS, "extras"),
    Row(100, 64, "half", "long", Backward(Tile(32, 64, 4, 2), Tile(64, 64, 4, 2)), "64 x 64 spills"),
    Row(100, 64, "half", "any", Backward(Tile(32, 64, 4, 3), Tile(64, 64, 4, 3), True), _ONE),
    Row(100, 128, "half", "any", Backward(Tile(32, 64, 8, 2), Tile(64, 64, 8, 2)), _DRAWS, "extras"),
    Row(100, 128, "half", "long", Backward(Tile(32, 128, 8, 2), Tile(64, 64, 4, 2)), "most keys that fit"),
    Row(100, 128, "half", "any", Backward(Tile(32, 64, 4, 2), Tile(64, 32, 4, 2), True), _ONE),
    Row(100, 256, "half", "any", Backward(Tile(16, 32, 8, 1), Tile(32, 32, 8, 1)), _DRAWS, "extras"),
    Row(100, 256, "half", "any", Backward(Tile(64, 32, 8, 1), Tile(64, 32, 8, 1)), _SUMS),
    # sm_90
    Row(90, 64, "half", "any", Backward(Tile(64, 32, 4, 2), Tile(64, 32, 4, 2)), _DRAWS, "extras"),
    Row(90, 64, "half", "long", Backward(Tile(64, 64, 4, 2, programs=2), Tile(64, 64, 4, 2, programs=3)),
        "2 and 3 programs on an SM"),
    Row(90, 64, "half", "any", Backward(Tile(32, 64, 4, 2), Tile(64, 64, 4, 2), True), _ONE),
    Row(90, 128, "half", "any", Backward(Tile(64, 32, 8, 2), Tile(64, 32, 8, 2)), _DRAWS, "extras"),
    Row(90, 128, "half", "long", Backward(Tile(32, 128, 8, 2), Tile(64, 64, 4, 2, programs=2)), _LEAN, "plain"),
    Row(90, 128, "half", "long", Backward(Tile(16, 64, 4, 2), Tile(64, 64, 4, 2, programs=2)), _LEAN, "gaps"),
    Row(90, 128, "half", "any", Backward(Tile(16, 64, 4, 4, programs=2), Tile(64, 32, 4, 4), True), _ONE),
    Row(90, 256, "half", "any", Backward(Tile(32, 16, 8, 1), Tile(32, 32, 8, 1)), _DRAWS, "extras"),
    Row(90, 256, "half", "any", Backward(Tile(64, 32, 8, 1), Tile(64, 32, 8, 2)), _SUMS),
    # sm_80 and later
    Row(80, 64, "half", "any", Backward(Tile(64, 32, 4, 2), Tile(64, 32, 4, 2)), _DRAWS, "extras"),
    Row(80, 64, "half", "long", Backward(Tile(32, 128, 8, 2), Tile(64, 64, 4, 3)), "64 x 128 spills"),
    Row(80, 64, "half", "any", Backward(Tile(32, 64, 4, 2), Tile(64, 64, 4, 2), True), _ONE),
    Row(80, 128, "half", "any", Backward(Tile(32, 32, 8, 2), Tile(64, 32, 8, 2)), _DRAWS, "extras"),
    Row(80, 128, "half", "long", Backward(Tile(64, 64, 8, 1), Tile(128, 32, 8, 2)), "128 keys spill"),
    Row(80, 128, "half", "any", Backward(Tile(32, 64, 8, 2), Tile(64, 32, 8, 2), True), _ONE),
    Row(80, 256, "half", "any", Backward(Tile(16, 32, 8, 1), Tile(32, 32, 8, 1)), _DRAWS, "extras"),
    Row(80, 256, "half", "any", Backward(Tile(64, 32, 8, 1), Tile(64, 32, 8, 1)), "as much as registers hold"),
    # float32
    Row(80, 64, "tf32", "any", Backward(Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)), "64 rows spill"),
    Row(80, 128, "tf32", "any", Backward(Tile(32, 32, 8, 1), Tile(32, 32, 4, 2)), "64 rows spill"),
    Row(80, 256, "tf32", "any", Backward(Tile(16, 16, 8, 1), Tile(32, 16, 8, 1)), "32 keys spill"),
    Row(80, 64, "float32", "any", Backward(Tile(32, 32, 8, 1), Tile(32, 16, 8, 1)), _SCALAR),
    Row(80, 128, "float32", "any", Backward(Tile(16, 16, 8, 1, spills=128), Tile(16, 16, 8, 1, spills=64)), _SCALAR),
    Row(80, 256, "float32", "any", Backward(Tile(16, 16, 8, 1, spills=3072), Tile(16, 16, 8, 1)), _SCALAR),
    # the interpreter
    Row(0, 256, "half", "any", Backward(Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), True), "any will do"),
    Row(0, 256, "tf32", "any", Backward(Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), True), "any will do"),
    Row(0, 256, "float32", "any", Backward(Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), True), "any will do"),
)  # fmt: skip


def padded_width(head_dim: int) -> int:
    """head_dim rounded up to a power of two, at least 16."""
    return max(16, 1 << (head_dim - 1).bit_length())


def length(rows: int) -> str:
    """The length class of a call with so many packed rows."""
    return "few" if rows <= _FEW else "short" if rows <= _SHORT else "long"


def kind(dtype: torch.dtype, precision: str) -> str:
    """What the products are made of."""
    if dtype is not torch.float32:
        return "half"
    return "tf32" if precision == "tf32" else "float32"


def calls(gaps: bool, extras: bool) -> str:
    """What kind of call it is: whether more keys are hidden than by the layout (padding, a window, stale ones, those
    behind ``query_start``); whether it asks for dropout, own keys outside the interval, or a cache of its own tensors.
    """
    return "extras" if extras else "gaps" if gaps else "plain"


def splits(rows: int, keys: int) -> int:
    """Into how many chunks the keys of a call with so many packed rows are split."""
    return max(1, -(-keys // SPLIT_KEYS)) if length(rows) == "few" else 1


@cache
def _find(table: tuple[Row, ...], arch: int, width: int, kind: str, length: str, calls: str) -> Row:
    for row in table:
        if row.applies(arch, width, kind, length, calls):
            return row
    raise AssertionError(f"no row for sm_{arch}, width {width}, {kind}, {length}, {calls}")


def forward_config(arch: int, width: int, kind: str, length: str, calls: str) -> Tile:
    """The forward kernel's tile."""
    config = _find(FORWARD, arch, width, kind, length, calls).config
    assert isinstance(config, Tile)
    return config


def backward_config(arch: int, width: int, kind: str, length: str, calls: str) -> Backward:
    """The backward kernel's tiles."""
    config = _find(BACKWARD, arch, width, kind, length, calls).config
    assert isinstance(config, Backward)
    return config
