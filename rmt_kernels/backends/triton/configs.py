"""Which tiles a kernel uses: one table, no tuning at run time.

A row is chosen by architecture, width, precision, length and dropout alone, never by batch or number of heads, so a
sample's result does not depend on its neighbours. ``python -m rmt_kernels.backends.triton.tune`` measures a GPU and
prints rows to put here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

__all__ = [
    "BACKWARD", "FORWARD", "SPLIT_KEYS", "Backward", "Row", "Tile", "backward_config", "forward_config", "kind",
    "length", "padded_width", "splits",
]  # fmt: skip

SPLIT_KEYS = 512  # keys of a chunk where they are split over programs: a multiple of every tile
_FEW, _SHORT = 16, 1024  # packed rows
WIDTHS, KINDS, LENGTHS = (16, 32, 64, 128, 256), ("half", "tf32", "float32"), ("few", "short", "long")


@dataclass(frozen=True)
class Tile:
    """Rows and keys of a tile, warps of a program, and how many tiles ahead loads are issued."""

    rows: int
    keys: int
    warps: int
    stages: int
    descriptors: bool = False  # keys and values fetched by the copy engine (sm_90 and later) where strides allow
    specialize: bool = False  # separate warps for loads and products (sm_90 and later), instead of a loop without mask
    programs: int = 1  # that one SM holds at once: what the compile gate demands

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
    dropout: bool | None = None  # with, without, or either

    def applies(self, arch: int, width: int, kind: str, length: str, dropout: bool) -> bool:
        return (
            self.arch <= arch
            and width <= self.width
            and kind == self.kind
            and self.length in (length, "any")
            and self.dropout in (dropout, None)
        )


FORWARD: tuple[Row, ...] = (
    Row(90, 64, "half", "few", Tile(16, 64, 4, 3), "bound by memory: many small programs keep many loads in flight"),
    Row(90, 64, "half", "short", Tile(64, 64, 4, 3), "twice the programs of 128 rows; 3 of them on an SM"),
    Row(90, 64, "half", "long", Tile(128, 64, 4, 3, descriptors=True), "two programs on an SM stand in for ping-pong"),
    Row(90, 128, "half", "few", Tile(16, 64, 4, 3), "as for 64"),
    Row(90, 128, "half", "short", Tile(64, 64, 4, 2), "two programs on an SM"),
    Row(90, 128, "half", "long", Tile(128, 128, 8, 2, descriptors=True), "as for 64"),
    Row(0, 256, "half", "any", Tile(64, 64, 4, 2), "interpreter"),
    Row(0, 256, "float32", "any", Tile(64, 64, 4, 2), "interpreter"),
    Row(0, 256, "tf32", "any", Tile(64, 64, 4, 2), "interpreter"),
)
BACKWARD: tuple[Row, ...] = (
    Row(90, 64, "half", "long", Backward(Tile(64, 64, 4, 3), Tile(64, 64, 4, 3)), ""),
    Row(90, 64, "half", "any", Backward(Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), True), ""),
    Row(90, 128, "half", "long", Backward(Tile(32, 128, 8, 2), Tile(128, 64, 8, 2)), ""),
    Row(90, 128, "half", "any", Backward(Tile(64, 64, 8, 2), Tile(64, 64, 8, 2), True), ""),
    Row(0, 256, "half", "any", Backward(Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), True), "interpreter"),
    Row(0, 256, "float32", "any", Backward(Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), True), "interpreter"),
    Row(0, 256, "tf32", "any", Backward(Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), True), "interpreter"),
)


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


def splits(rows: int, keys: int) -> int:
    """Into how many chunks the keys of a call with so many packed rows are split."""
    return max(1, -(-keys // SPLIT_KEYS)) if length(rows) == "few" else 1


@lru_cache(maxsize=None)
def _find(
    table: tuple[Row, ...], arch: int, width: int, dtype: torch.dtype, precision: str, rows: int, dropout: bool
) -> Row:
    for row in table:
        if row.applies(arch, width, kind(dtype, precision), length(rows), dropout):
            return row
    raise AssertionError(f"no row for sm_{arch}, width {width}, {dtype}")


def forward_config(arch: int, width: int, dtype: torch.dtype, precision: str, rows: int, dropout: bool) -> Tile:
    """The forward kernel's tile."""
    config = _find(FORWARD, arch, width, dtype, precision, rows, dropout).config
    assert isinstance(config, Tile)
    return config


def backward_config(arch: int, width: int, dtype: torch.dtype, precision: str, rows: int, dropout: bool) -> Backward:
    """The backward kernel's tiles."""
    config = _find(BACKWARD, arch, width, dtype, precision, rows, dropout).config
    assert isinstance(config, Backward)
    return config
