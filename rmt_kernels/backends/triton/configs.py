"""Which tiles a kernel uses: one table, no tuning at run time.

A row is chosen by architecture, head_dim, dtype and length alone, never by batch or number of heads, so a sample's
result does not depend on its neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

__all__ = ["SPLIT_KEYS", "Backward", "Tile", "backward_config", "forward_config", "padded_width", "splits"]

SPLIT_KEYS = 512  # keys of a chunk where they are split over programs: a multiple of every tile
_SPLIT_ROWS = 64  # packed rows up to which they are


@dataclass(frozen=True)
class Tile:
    """Rows and keys of a tile, warps of a program, and how many tiles ahead loads are issued."""

    rows: int
    keys: int
    warps: int
    stages: int
    specialize: bool = False  # separate warps for loads and products (sm_90 and later), instead of a loop without mask


@dataclass(frozen=True)
class Backward:
    """Tiles of the two parts of the backward pass; ``joint``: both in one launch, with the warps of ``keys``."""

    keys: Tile
    queries: Tile
    joint: bool


def padded_width(head_dim: int) -> int:
    """head_dim rounded up to a power of two, at least 16."""
    return max(16, 1 << (head_dim - 1).bit_length())


def splits(rows: int, keys: int) -> int:
    """Into how many chunks the keys of a call with so many packed rows are split."""
    return max(1, -(-keys // SPLIT_KEYS)) if rows <= _SPLIT_ROWS else 1


@lru_cache(maxsize=None)
def forward_config(arch: int, block_d: int, dtype: torch.dtype, precision: str, rows: int) -> Tile:
    return Tile(64, 64, 4, 2)


@lru_cache(maxsize=None)
def backward_config(arch: int, block_d: int, dtype: torch.dtype, precision: str, rows: int) -> Backward:
    return Backward(Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), True)
