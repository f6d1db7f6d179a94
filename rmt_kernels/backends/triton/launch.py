"""From shapes to launches: which kernel, how many programs, which sizes and compile-time choices."""

from __future__ import annotations

import math
from contextvars import copy_context
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from rmt_kernels.backends.plans import Strides
from rmt_kernels.backends.triton import backward as bwd
from rmt_kernels.backends.triton import forward as fwd
from rmt_kernels.backends.triton.configs import (
    SPLIT_KEYS,
    Backward,
    Tile,
    backward_config,
    calls,
    forward_config,
    kind,
    length,
    padded_width,
    splits,
)
from rmt_kernels.philox import threshold

__all__ = ["Launch", "Shape", "backward_launches", "forward_launches", "prepare_launch"]

COMBINED = 16  # chunks put together at a time
MAX_PACK = 16  # the smallest tile of rows
_LEAST, _MOST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
PREPARE_ROWS = 64  # rows of a program of prepare_kernel


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")


@dataclass(frozen=True)
class Launch:
    """One kernel launch: its grid, the arguments after the tensors, and the compiler's options."""

    kernel: Any
    grid: tuple[int, int]
    numbers: tuple[Any, ...]
    warps: int
    stages: int
    blocks: tuple[tuple[int, int], ...] = ()  # tensors given as descriptors: which, and the rows of a block
    scratch: bool = False  # whether the kernel makes a descriptor itself, for which Triton asks for memory
    compiled: dict[tuple[bool, ...], Any] = field(default_factory=dict, compare=False)

    def __call__(self, *tensors: Any) -> None:
        tensors = self.described(tensors)
        if self.scratch and torch.cuda.is_available():
            copy_context().run(self._allocating, tensors)
        else:
            self._launch(tensors)

    def _allocating(self, tensors: tuple[Any, ...]) -> None:
        triton.set_allocator(_scratch)  # for this launch: the context is a copy
        self._launch(tensors)

    def _launch(self, tensors: tuple[Any, ...]) -> None:
        # What Triton compiles depends on the numbers, which do not change here, and on which tensors there are.
        given = tuple([tensor is not None for tensor in tensors])
        compiled = self.compiled.get(given)
        if compiled is not None:
            compiled[self.grid[0], self.grid[1], 1](*tensors, *self.numbers)
            return
        found = self.kernel[self.grid](*tensors, *self.numbers, num_warps=self.warps, num_stages=self.stages)
        if found is not None:  # the interpreter gives nothing
            self.compiled[given] = found

    def described(self, tensors: tuple[Any, ...]) -> tuple[Any, ...]:
        """The tensors, those that the kernel fetches by blocks as descriptors."""
        if not self.blocks:
            return tensors
        changed = list(tensors)
        for index, rows in self.blocks:
            tensor = tensors[index]
            shape, block = list(tensor.shape), [1, 1, rows, padded_width(tensor.shape[-1])]
            # Along a size of 1 a stride means nothing, but must be a multiple of UNIT bytes.
            strides = [step if size > 1 else shape[-1] for size, step in zip(shape[:3], tensor.stride(), strict=False)]
            changed[index] = TensorDescriptor(tensor, shape, [*strides, 1], block)
        return tuple(changed)


@dataclass(frozen=True)
class Shape:
    """What the launches of a call follow from."""

    layout: tuple[int, ...]  # SegmentLayout.ints
    batch: int
    heads: int
    kv_heads: int
    queries: int
    head_dim: int
    dtype: torch.dtype
    precision: str  # of float32 products: "ieee" or "tf32"
    scale: float
    dropout_p: float
    padded: bool  # token_lengths or token_starts given
    apart: bool  # CACHE given as tensors of its own
    started: bool  # query_start given
    stale: bool  # cache_starts given
    arch: int  # compute capability times 10; 0 in the interpreter
    l2: int  # bytes of cache

    @property
    def keys(self) -> int:
        return sum(self.layout[:4])

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def rows(self) -> int:
        """Query rows that read one key/value head's keys."""
        return self.queries * self.group

    @property
    def pack(self) -> int:
        """Heads of a group that lie side by side in a tile of rows: all, unless they are many."""
        return max(pack for pack in range(1, MAX_PACK + 1) if self.group % pack == 0)

    @property
    def blocks(self) -> int:
        return self.group // self.pack

    @property
    def gaps(self) -> bool:
        """Whether a row's interval may have a gap, or there are keys that hold nothing."""
        return self.padded or self.stale or self.layout[5] > 0

    @property
    def own(self) -> bool:
        """Whether a row may see its own key outside its interval."""
        return max(self.layout[11], self.layout[16], self.layout[21]) >= 0

    @property
    def kind(self) -> str:
        """Which rows of the table its products are for."""
        return kind(self.dtype, self.precision)

    @property
    def calls(self) -> str:
        """Which rows of the table its options are for."""
        return calls(self.gaps or self.started, self.dropout_p > 0.0 or self.own or self.apart)

    @property
    def sign(self) -> int:
        return 0 if abs(self.scale) < _LEAST else 1 if self.scale > 0.0 else -1

    @property
    def size(self) -> float:
        """The scale without its sign; 1 where it is 0, since the kernels then take queries to be 0."""
        return abs(self.scale) if self.sign else 1.0

    @property
    def factor(self) -> float:
        """What makes a score, its sign aside, an exponent of 2."""
        return min(self.size * math.log2(math.e), _MOST)

    @property
    def threshold(self) -> int:
        """Of dropout, as the int32 of the same bits."""
        drawn = threshold(self.dropout_p)
        return drawn - 2**32 if drawn >= 2**31 else drawn

    @property
    def keep_scale(self) -> float:
        return 1.0 / (1.0 - self.dropout_p)

    def described(self, wanted: bool, expanded: bool) -> bool:
        """Whether tiles are fetched through descriptors: wanted, and every tile is rows of one dense tensor that all
        hold something."""
        empty = self.keys == 0 or self.queries == 0
        return wanted and not (empty or expanded or self.apart or self.own or self.started or self.padded or self.stale)

    def together(self, share: float) -> int:
        """Key/value heads whose keys and values fill ``share`` of the cache."""
        size = 2 * self.keys * self.head_dim * self.dtype.itemsize
        return max(1, min(self.batch * self.kv_heads, int(self.l2 * share) // max(1, size)))


def _expanded(shape: Shape, strides: Strides) -> bool:
    """Whether one of the tensors of those strides repeats itself along an axis: query or grad_out, key and value."""
    heads, rows = [shape.heads, shape.kv_heads, shape.kv_heads], [shape.queries, shape.keys, shape.keys]
    return any(
        stride == 0 and size > 1
        for index in range(len(strides) // 3)
        for stride, size in zip(strides[3 * index :], (shape.batch, heads[index], rows[index]), strict=False)
    )


def forward_launches(shape: Shape, strides: Strides, tile: Tile | None = None) -> tuple[Launch, Launch | None, int]:
    """The forward kernel, the kernel that combines its parts where keys are split, and into how many parts.

    ``strides`` are those of query, key, value, cache key, cache value and out.
    """
    block_d = padded_width(shape.head_dim)
    if tile is None:
        tile = forward_config(shape.arch, block_d, shape.kind, length(shape.rows), shape.calls)
    heads, tiles = shape.batch * shape.kv_heads * shape.blocks, -(-shape.queries // (tile.rows // shape.pack))
    chunks = splits(shape.rows, shape.keys)
    described = shape.described(tile.descriptors, _expanded(shape, strides[:9])) and chunks == 1
    specialize = described and tile.specialize and shape.pack == 1
    main = Launch(
        fwd.forward_kernel,
        (tiles * heads, chunks),
        (
            *strides, shape.kv_heads, shape.queries, tiles, heads, shape.together(0.5), SPLIT_KEYS, shape.threshold,
            shape.factor, 2.0 ** (math.frexp(shape.factor)[1] - 1), shape.size, shape.keep_scale, *shape.layout,
            shape.pack, shape.blocks, shape.head_dim, block_d, tile.rows, tile.keys, shape.gaps, shape.own, shape.apart,
            described, shape.dropout_p > 0.0, shape.sign, shape.precision, chunks > 1, specialize,
        ),
        tile.warps,
        tile.stages,
        ((1, tile.keys), (2, tile.keys)) if described else (),
        specialize,
    )  # fmt: skip
    if chunks == 1:
        return main, None, 1
    combine = Launch(
        fwd.combine_kernel,
        (shape.batch * shape.heads * shape.queries, 1),
        (
            *strides[-3:], shape.heads, shape.queries, chunks, shape.factor, shape.size, shape.keep_scale,
            shape.head_dim, block_d, COMBINED,
        ),
        1,
        1,
    )  # fmt: skip
    return main, combine, chunks


def backward_launches(
    shape: Shape, strides: Strides, out_strides: Strides, config: Backward | None = None
) -> tuple[Launch | None, list[Launch]]:
    """The kernel that prepares rows, where there are any, and one or two kernels for the gradients.

    ``strides`` are those of query, key, value, cache key, cache value, grad_out and the gradients of the first five;
    ``out_strides`` those of out and grad_out.
    """
    block_d = padded_width(shape.head_dim)
    if config is None:
        config = backward_config(shape.arch, block_d, shape.kind, length(shape.rows), shape.calls)
    heads = shape.batch * shape.kv_heads
    read = _expanded(shape, strides[:9]) or _expanded(shape, strides[15:18])
    described = shape.described(config.descriptors, read) and shape.pack == 1
    row_tiles = -(-shape.queries // (config.queries.rows // shape.pack))
    key_tiles = -(-shape.keys // config.keys.keys)

    def part(name: str, programs: int, warps: int, stages: int) -> Launch:
        # The part that does not run is given the same tile always: no kernel is compiled anew for it.
        keys = config.keys if name != "queries" else Tile(16, 16, warps, stages)
        queries = config.queries if name != "keys" else Tile(16, 16, warps, stages)
        numbers = (
            *strides, shape.kv_heads, shape.queries, row_tiles, key_tiles, heads, shape.together(0.25),
            key_tiles * heads, shape.threshold, shape.factor, shape.scale, shape.keep_scale, *shape.layout, shape.pack,
            shape.blocks, shape.head_dim, block_d, keys.rows, keys.keys, queries.rows, queries.keys, shape.gaps,
            shape.own, shape.apart, described, shape.dropout_p > 0.0, shape.sign, shape.precision, name,
        )  # fmt: skip
        blocks = ((18, keys.rows), (19, keys.rows), (20, queries.keys), (21, queries.keys))
        return Launch(bwd.backward_kernel, (programs, 1), numbers, warps, stages, blocks if described else ())

    if config.joint:
        parts = [part("both", (row_tiles * shape.blocks + key_tiles) * heads, config.keys.warps, config.keys.stages)]
    else:
        parts = [
            part("keys", key_tiles * heads, config.keys.warps, config.keys.stages),
            part("queries", row_tiles * shape.blocks * heads, config.queries.warps, config.queries.stages),
        ]
    return prepare_launch(shape, out_strides), [launch for launch in parts if launch.grid[0]]


def prepare_launch(shape: Shape, strides: Strides) -> Launch | None:
    """The kernel that prepares rows; ``strides`` are those of out and grad_out."""
    count = shape.batch * shape.heads * shape.queries
    numbers = (
        *strides, shape.heads, shape.queries, count, shape.batch, *shape.layout, shape.head_dim,
        padded_width(shape.head_dim), PREPARE_ROWS, shape.gaps,
    )  # fmt: skip
    return Launch(bwd.prepare_kernel, (-(-count // PREPARE_ROWS), 1), numbers, 4, 1) if count else None
