"""Launches of the kernels with distance-dependent scores: their tiles, grids and sizes.

They are simpler than those without: a program owns rows of one query head, and keys are never split.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

from rmt_kernels.backends.plans import Strides
from rmt_kernels.backends.triton import relative_backward as bwd
from rmt_kernels.backends.triton import relative_forward as fwd
from rmt_kernels.backends.triton.configs import KINDS, Tile, padded_width
from rmt_kernels.backends.triton.launch import Launch, Shape, prepare_launch

__all__ = [
    "RELATIVE", "RelativeShape", "Tiles", "relative_backward_launches", "relative_config", "relative_forward_launch",
]  # fmt: skip

_MOST = 3.4e38


@dataclass(frozen=True)
class Tiles:
    """Where tiles are used, and those of each kernel; the keys of ``entries`` are entries of a table."""

    arch: int  # compute capability times 10, and later ones; 0 is the interpreter
    width: int  # padded head_dim up to this
    kind: str  # as in ``configs``
    forward: Tile
    keys: Tile
    queries: Tile
    entries: Tile
    lean: bool = False  # for calls without dropout, a cache apart, own keys, and shifted products


_ANY = Tile(128, 128, 4, 2)
_WIDE = Tile(16, 16, 8, 1, spills=16384)  # scalar products of 256 numbers: whatever the compiler makes of them

# The first row that applies is taken. Chosen by what the compile gate reports: tiles of 32 keys and less need no
# ``wgmma``, and leave registers for what a window takes. Up to head_dim 128 the rows of sm_80 fit 99 KiB. Where
# ``spills`` stands some kinds of calls spill so many bytes at most; Transformer-XL's of head_dim 64 and 128 spill none.
RELATIVE: tuple[Tiles, ...] = (
    Tiles(100, 64, "half", Tile(64, 64, 4, 2, programs=2), Tile(32, 32, 4, 1), Tile(32, 64, 4, 1), Tile(64, 64, 8, 2),
          lean=True),
    Tiles(100, 64, "half", Tile(64, 64, 8, 1), Tile(32, 32, 4, 1), Tile(32, 64, 8, 1), Tile(32, 64, 8, 1)),
    Tiles(100, 128, "half", Tile(64, 64, 8, 2), Tile(16, 16, 8, 1), Tile(32, 64, 8, 2), Tile(32, 32, 8, 1), lean=True),
    Tiles(100, 128, "half", Tile(64, 64, 8, 1), Tile(16, 16, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
    Tiles(90, 64, "half", Tile(64, 64, 4, 2, programs=2), Tile(32, 32, 4, 2, spills=64), Tile(32, 64, 4, 1),
          Tile(64, 64, 8, 2), lean=True),
    Tiles(90, 64, "half", Tile(32, 64, 4, 1, spills=64), Tile(16, 32, 4, 1), Tile(32, 64, 8, 1, spills=64),
          Tile(32, 64, 8, 1)),
    Tiles(90, 128, "half", Tile(64, 64, 8, 2), Tile(32, 32, 8, 1, spills=64), Tile(32, 64, 8, 2), Tile(32, 32, 8, 1),
          lean=True),
    Tiles(90, 128, "half", Tile(32, 32, 8, 1), Tile(16, 16, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
    Tiles(80, 64, "half", Tile(64, 64, 4, 2, programs=2), Tile(32, 32, 4, 2, spills=64), Tile(32, 64, 4, 2),
          Tile(32, 64, 8, 1), lean=True),
    Tiles(80, 64, "half", Tile(32, 64, 8, 1), Tile(32, 32, 4, 1), Tile(32, 64, 8, 1, spills=64), Tile(32, 32, 8, 1)),
    Tiles(80, 128, "half", Tile(32, 64, 8, 1), Tile(32, 32, 8, 1), Tile(32, 64, 8, 1), Tile(32, 32, 8, 1), lean=True),
    Tiles(80, 128, "half", Tile(32, 32, 8, 1), Tile(16, 16, 8, 1), Tile(32, 32, 8, 1, spills=64),
          Tile(16, 32, 8, 1, spills=64)),
    Tiles(80, 256, "half", Tile(32, 64, 8, 1), Tile(16, 16, 8, 1, spills=64), Tile(32, 32, 8, 1), Tile(16, 16, 8, 1),
          lean=True),
    Tiles(80, 256, "half", Tile(32, 32, 8, 1), Tile(16, 16, 8, 1, spills=384), Tile(16, 32, 8, 1), Tile(16, 16, 8, 1)),
    # float32: operands of a product are held for all of its width
    Tiles(80, 64, "tf32", Tile(32, 32, 4, 1, spills=128), Tile(16, 16, 8, 1, spills=64), Tile(32, 32, 8, 1, spills=64),
          Tile(32, 32, 4, 1, spills=128)),
    Tiles(80, 128, "tf32", Tile(32, 32, 8, 1), Tile(16, 16, 8, 1, spills=384), Tile(16, 16, 8, 1),
          Tile(16, 16, 8, 1)),
    Tiles(80, 256, "tf32", Tile(16, 16, 8, 1), Tile(16, 16, 8, 1, spills=16384), Tile(16, 16, 8, 1, spills=512),
          Tile(16, 16, 8, 1, spills=512)),
    Tiles(80, 64, "float32", Tile(16, 16, 8, 1, spills=64), Tile(16, 16, 8, 1, spills=64), Tile(16, 16, 8, 1),
          Tile(16, 16, 8, 1, spills=64)),
    Tiles(80, 128, "float32", Tile(16, 16, 8, 1), Tile(16, 16, 8, 1, spills=128), Tile(16, 16, 8, 1, spills=128),
          Tile(16, 16, 8, 1, spills=128)),
    Tiles(80, 256, "float32", _WIDE, _WIDE, _WIDE, _WIDE),
    # the interpreter, whose time is that of a tile, of whatever size
    *(Tiles(0, 256, kind, _ANY, _ANY, _ANY, _ANY) for kind in KINDS),
)  # fmt: skip


@cache
def relative_config(arch: int, width: int, kind: str, lean: bool) -> Tiles:
    """The tiles of a call; ``lean`` as in ``Tiles``."""
    for row in RELATIVE:
        if row.arch <= arch and width <= row.width and kind == row.kind and (lean or not row.lean):
            return row
    raise AssertionError(f"no row for sm_{arch}, width {width}, {kind}")


@dataclass(frozen=True)
class RelativeShape:
    """What the launches of a call follow from."""

    shape: Shape
    offsets: int  # entries of the tables
    reach: int
    shifted: bool
    has_key: bool
    has_bias: bool
    has_content: bool
    has_position: bool
    bias_stride: int  # of relative_bias from head to head
    config: Tiles | None = None  # other tiles than the table's

    @property
    def tiles(self) -> Tiles:
        shape = self.shape
        if self.config is not None:
            return self.config
        lean = not (shape.dropout_p > 0.0 or shape.own or shape.apart or self.shifted)
        return relative_config(shape.arch, padded_width(shape.head_dim), shape.kind, lean)

    @property
    def hole(self) -> int:
        """Keys of TOKENS without queries between rows of READ and of WRITE."""
        layout = self.shape.layout
        return layout[2] if layout[6] < layout[7] and layout[12] == 0 and layout[17] else 0

    @property
    def layout(self) -> tuple[int, ...]:
        """``SegmentLayout.ints`` with rows in the hole, which see nothing."""
        layout = self.shape.layout
        return (*layout[:12], self.hole, 0, 0, 0, -1, *layout[17:]) if self.hole else layout

    @property
    def origin(self) -> int:
        """The entry of key j in row i of the layout is ``j - i + origin``."""
        cache, read, tokens, *_ = self.shape.layout
        first = 0
        for rows, own in zip(self.shape.layout[7::5], (cache, cache + read, cache + read + tokens), strict=True):
            if self.shape.layout[6] < first + rows:
                return self.reach - (own - first)
            first += rows
        raise AssertionError("a call without rows launches nothing")

    @property
    def factor(self) -> float:
        """What makes a score an exponent of 2."""
        return max(-_MOST, min(self.shape.scale * math.log2(math.e), _MOST))

    def flags(self, tile: Tile) -> tuple[object, ...]:
        """The compile-time arguments of every kernel."""
        shape = self.shape
        width = 1 << (tile.rows + tile.keys - 2).bit_length()
        return (
            shape.head_dim, padded_width(shape.head_dim), tile.rows, tile.keys, width, shape.gaps, shape.own,
            shape.apart, shape.dropout_p > 0.0, self.has_key, self.has_bias, self.has_content, self.has_position,
            self.shifted, shape.precision,
        )  # fmt: skip

    def sizes(self, tiles: int, units: int, together: int) -> tuple[int, ...]:
        """The sizes that every kernel is given, up to ``threshold``."""
        shape = self.shape
        return (
            shape.heads, shape.group, shape.queries, shape.queries + self.hole, self.hole, tiles, units, together,
            self.offsets, self.reach, self.origin, self.bias_stride, shape.threshold,
        )  # fmt: skip

    def row_tiles(self, tile: Tile) -> int:
        return -(-(self.shape.queries + self.hole) // tile.rows)

    def key_tiles(self, tile: Tile) -> int:
        return -(-self.shape.keys // tile.keys)

    def entry_tiles(self, tile: Tile) -> tuple[int, int]:
        """Of entries up to ``reach`` and beyond; the first of each begins up to 3 entries before them."""
        beyond = self.offsets - self.reach - 1
        return -(-(self.reach + 4) // tile.keys), -(-(beyond + 3) // tile.keys) if beyond > 0 else 0


def relative_forward_launch(relative: RelativeShape, strides: Strides) -> Launch:
    """``strides`` are those of query, key, value, cache key, cache value, relative_key, content_bias, position_bias and
    out."""
    shape, tile = relative.shape, relative.tiles.forward
    tiles, units = relative.row_tiles(tile), shape.batch * shape.heads
    together = shape.together(0.5) * shape.group
    numbers = (
        *strides[:15], *strides[24:], strides[16], strides[17], strides[19], strides[22],
        *relative.sizes(tiles, units, together), relative.factor, shape.keep_scale, *relative.layout,
        *relative.flags(tile),
    )  # fmt: skip
    return Launch(fwd.relative_forward_kernel, (tiles * units, 1), numbers, tile.warps, tile.stages)


def relative_backward_launches(
    relative: RelativeShape, strides: Strides
) -> tuple[Launch | None, list[Launch], tuple[int, int]]:
    """The kernel that prepares rows, those for the gradients, and the numbers of tiles of keys and of entries.

    ``strides`` are those of query (with content_bias), key, value, cache key, cache value, relative_key, query (with
    position_bias), grad_out, out, and the gradients of query, following query, key, value, cache key and cache value.
    """
    shape, tiles = relative.shape, relative.tiles
    heads = shape.batch * shape.heads
    behind, beyond = relative.entry_tiles(tiles.entries)
    parts = [
        ("keys", tiles.keys, relative.key_tiles(tiles.keys), shape.batch * shape.kv_heads),
        ("queries", tiles.queries, relative.row_tiles(tiles.queries), heads),
    ]
    if relative.has_key or relative.has_bias:
        parts.append(("entries", tiles.entries, behind + beyond, heads))
    launches = []
    for part, tile, count, units in parts:
        together = shape.together(0.25) * (units // (shape.batch * shape.kv_heads))
        numbers = (
            *strides[:15], *strides[18:24], *strides[27:], *strides[16:18],
            *relative.sizes(count, units, together), behind, relative.factor, shape.scale, shape.keep_scale,
            *relative.layout, *relative.flags(tile), part,
        )  # fmt: skip
        if count:
            launches.append(Launch(bwd.relative_backward_kernel, (count * units, 1), numbers, tile.warps, tile.stages))
    prepare = prepare_launch(shape, (*strides[24:27], *strides[21:24]))
    return prepare, launches, (relative.key_tiles(tiles.keys), behind + beyond)
