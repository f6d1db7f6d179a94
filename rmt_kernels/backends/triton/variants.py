"""Every kernel in every configuration of the table, as the compile gate wants them: made from the arguments that
``launch`` would launch with, on tensors without memory.

``variants`` is what the ordinary tests compile: each row for float16 and bfloat16 as it mostly runs, and with
everything at once that a call may ask for. ``all_variants`` has each of these features alone, every width and float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rmt_kernels.backends.plans import UNIT
from rmt_kernels.backends.triton.configs import BACKWARD, CALLS, FORWARD, KINDS, LENGTHS, WIDTHS, Row, Tile
from rmt_kernels.backends.triton.launch import Launch, Shape, backward_launches, forward_launches
from rmt_kernels.backends.triton.resources import Variant, specialize
from rmt_kernels.layout import SegmentLayout

__all__ = ["FEATURES", "Feature", "Use", "all_variants", "uses", "variants", "variants_of"]

_DTYPES = {"half": (torch.bfloat16, torch.float16), "tf32": (torch.float32,), "float32": (torch.float32,)}
_ROWS = {"few": 4, "short": 512, "long": 2048}  # packed rows of a call of each length
_FEW_KEYS = 1024  # of a call with few rows: enough to be split
_BATCH, _KV_HEADS = 2, 4
_DROPOUT = 0.1


def _decoder(tokens: int) -> SegmentLayout:
    return SegmentLayout.rmt_decoder(tokens, 16)


def _window_and_own_keys(tokens: int) -> SegmentLayout:
    return SegmentLayout(
        cache=100, read=16, tokens=tokens, window=100,
        rules={("read", "read"): "self", ("tokens", "cache"): "full", ("tokens", "read"): "full",
               ("tokens", "tokens"): "causal"},
    )  # fmt: skip


@dataclass(frozen=True)
class Feature:
    """What a call asks for that adds to a kernel. ``changes`` are fields of ``launch.Shape``."""

    name: str
    layout: Callable[[int], SegmentLayout] = _decoder  # of the number of tokens
    changes: dict[str, Any] = field(default_factory=dict)
    group: int = 1  # query heads to a key/value head
    narrow: bool = False  # a head_dim that is no power of two
    dropout: bool = False


def _window(tokens: int) -> SegmentLayout:
    return SegmentLayout.rmt_decoder(tokens, 16, window=100)


# By the calls of ``configs.CALLS``, the ordinary one first, then everything at once that such a call may ask for.
_MOST: dict[str, Any] = {"group": 4, "narrow": True}
FEATURES = {
    "plain": (
        Feature("plain"),
        Feature("all of it", **_MOST),
        Feature("grouped by 3", group=3),
        Feature("grouped by 34", group=34),
        Feature("narrow", narrow=True),
    ),
    "gaps": (
        Feature("gaps", _window, {"padded": True}),
        Feature("gaps and all of it", _window, {"padded": True, "started": True}, **_MOST),
        Feature("started", changes={"started": True}),
    ),
    "extras": (
        Feature("dropout", dropout=True),
        Feature("everything", _window_and_own_keys, {"padded": True, "apart": True, "started": True}, dropout=True,
                **_MOST),
        Feature("own keys", lambda tokens: SegmentLayout.membart(tokens, 32)),
        Feature("cache apart", lambda tokens: SegmentLayout.rmt_decoder(tokens, 16, cache=100), {"apart": True}),
        Feature("everything but dropout", _window_and_own_keys, {"padded": True, "apart": True, "started": True},
                **_MOST),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Use:
    """A row of a table, with one of the lengths and of the kinds of calls it serves, and the widths that reach it."""

    row: Row
    length: str
    calls: str
    widths: tuple[int, ...]


def uses(table: tuple[Row, ...], arch: int) -> list[Use]:
    """The rows that some call on ``arch`` takes."""
    found: dict[tuple[Row, str, str], tuple[int, ...]] = {}
    for width in WIDTHS:
        for kind in KINDS:
            for length in LENGTHS:
                for calls in CALLS:
                    row = next(row for row in table if row.applies(arch, width, kind, length, calls))
                    found[row, length, calls] = (*found.get((row, length, calls), ()), width)
    return [Use(*key, widths) for key, widths in found.items()]


def variants(arch: int) -> Iterator[Variant]:
    """Every kernel in every row of the table for float16 and bfloat16."""
    return _distinct(arch, _half)


def all_variants(arch: int) -> Iterator[Variant]:
    """Every kernel in every row of the table, with each feature alone too, in every width and every dtype."""
    return _distinct(arch, _all)


def _half(use: Use) -> Iterator[tuple[Feature, torch.dtype, int]]:
    if use.row.kind == "half":
        ordinary, everything, *_ = FEATURES[use.calls]
        if use.calls == "plain":
            yield ordinary, torch.bfloat16, use.widths[-1]
            yield ordinary, torch.float16, use.widths[-1]
        if use.calls != "gaps" or use.length == "long" or use.row.calls == "gaps":  # else the plain one says it
            yield everything, torch.bfloat16, use.widths[-1]


def _all(use: Use) -> Iterator[tuple[Feature, torch.dtype, int]]:
    for dtype in _DTYPES[use.row.kind]:
        for width in use.widths:
            yield FEATURES[use.calls][0], dtype, width
        for feature in FEATURES[use.calls][1:]:
            yield feature, dtype, use.widths[-1]


def _distinct(arch: int, wanted: Callable[[Use], Iterable[tuple[Feature, torch.dtype, int]]]) -> Iterator[Variant]:
    """Those of them that no earlier one compiles to the same code as."""
    seen = set()
    for use in (*uses(FORWARD, arch), *uses(BACKWARD, arch)):
        for feature, dtype, width in wanted(use):
            for variant in variants_of(use.row, arch, use.length, width, dtype, feature):
                code = (
                    variant.fn, repr((variant.signature, variant.constexprs, variant.attrs)), variant.num_warps,
                    variant.num_stages, variant.tensor_cores, variant.programs,
                )  # fmt: skip
                if code not in seen:
                    seen.add(code)
                    yield variant


def variants_of(
    row: Row, arch: int, length: str, width: int, dtype: torch.dtype, feature: Feature
) -> Iterator[Variant]:
    """The kernels that a call of that kind launches."""
    tf32 = row.kind == "tf32"
    rows = max(1, _ROWS[length] // feature.group)
    layout = feature.layout(_FEW_KEYS if length == "few" else rows)
    if length == "few":
        layout = layout.last(rows)
    given = {"padded": False, "apart": False, "started": False, "stale": False, **feature.changes}
    head_dim = width // 2 + 8 if feature.narrow else width
    shape = Shape(
        layout=layout.ints, batch=_BATCH, heads=_KV_HEADS * feature.group, kv_heads=_KV_HEADS,
        queries=layout.num_queries, head_dim=head_dim, dtype=dtype, precision="tf32" if tf32 else "ieee", scale=0.125,
        dropout_p=_DROPOUT if feature.dropout else 0.0, arch=arch, l2=50 << 20, **given,
    )  # fmt: skip

    def tensor(heads: int, length: int) -> Tensor:
        return torch.empty(_BATCH, heads, length, head_dim, dtype=dtype, device="meta")

    query, key = tensor(shape.heads, shape.queries), tensor(_KV_HEADS, shape.keys)
    out, grad_key = tensor(shape.heads, shape.queries), tensor(_KV_HEADS, shape.keys)
    ints, floats = torch.empty(8, dtype=torch.int32, device="meta"), torch.empty(8, device="meta")
    padding = (ints if shape.padded else None, None, None, ints if shape.started else None)
    seed = torch.empty(1, dtype=torch.int64, device="meta") if feature.dropout else None

    def variant(launch: Launch, arguments: tuple[Any, ...], part: str, owned: int, *tiles: Tile) -> Variant:
        products = bool(tiles) and row.kind != "float32"
        sizes = " ".join(f"{tile.rows}x{tile.keys}" for tile in tiles)
        # wgmma needs 64 rows of its result's tile, and of tf32 operands layouts that transposed products do not have.
        mma = "mma" if owned < 64 or tf32 else True
        return Variant(
            kernel=launch.kernel.fn.__name__.removesuffix("_kernel"), fn=launch.kernel,
            **specialize(launch.kernel, arch, *launch.described(arguments), *launch.numbers),
            num_warps=launch.warps, num_stages=launch.stages, dtype=_NAMES[row.kind, dtype], head_dim=head_dim,
            label=f"{part}, {sizes}, {feature.name}" + (", copy engine" if launch.blocks else ""),
            tensor_cores=mma if products else False, programs=tiles[0].programs if tiles else 1,
            spills=max((tile.spills for tile in tiles), default=0),
            warp_specialized=any(tile.specialize for tile in tiles) and bool(launch.blocks),
        )  # fmt: skip

    if isinstance(row.config, Tile):
        tile = row.config
        main, combine, chunks = forward_launches(shape, _strides(query, key, key, key, key, out), tile)
        arguments = (query, key, key, key, key, out, floats, floats if chunks > 1 else None, *padding, seed)
        yield variant(main, arguments, f"{length} forward", tile.rows, tile)
        if combine is not None:
            yield variant(combine, (floats, out, floats), "combine", 0)
        return
    gradients_of = (out, grad_key, grad_key, grad_key, grad_key)
    strides = _strides(query, key, key, key, key, query, *gradients_of)
    prepare, gradients = backward_launches(shape, strides, _strides(out, query), row.config)
    assert prepare is not None
    yield variant(prepare, (out, query, floats, None, floats, ints, *padding), "prepare", 0)
    tensors = (
        query, key, key, key, key, query, floats, ints, *gradients_of, *padding, seed, query, query, key, key,
    )  # fmt: skip
    keys, queries = row.config.tiles
    if row.config.joint:
        yield variant(gradients[0], tensors, f"{length} keys and queries", min(keys.keys, queries.rows), keys, queries)
    else:
        yield variant(gradients[0], tensors, f"{length} keys", keys.keys, keys)
        yield variant(gradients[1], tensors, f"{length} queries", queries.rows, queries)


_NAMES = {
    ("half", torch.bfloat16): "bf16", ("half", torch.float16): "fp16", ("tf32", torch.float32): "tf32",
    ("float32", torch.float32): "fp32",
}  # fmt: skip


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(step * tensor.element_size() // UNIT for tensor in tensors for step in tensor.stride()[:3])
