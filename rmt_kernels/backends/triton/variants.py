"""Every kernel in every configuration of the table, as the compile gate wants them: made from the arguments that
``launch`` would launch with, on tensors without memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rmt_kernels.backends.triton import configs
from rmt_kernels.backends.triton.configs import Backward, Row, Tile
from rmt_kernels.backends.triton.launch import Launch, Shape, backward_launches, forward_launches
from rmt_kernels.backends.triton.resources import Variant, specialize
from rmt_kernels.layout import SegmentLayout

__all__ = ["FEATURES", "variants", "variants_of"]

_DTYPES = {
    "half": ((torch.bfloat16, "bf16"), (torch.float16, "fp16")),
    "tf32": ((torch.float32, "tf32"),),
    "float32": ((torch.float32, "fp32"),),
}
_ROWS = {"few": 4, "short": 512, "long": 2048, "any": 512}
_BATCH, _KV_HEADS = 2, 4


@dataclass(frozen=True)
class Feature:
    """Something a call may ask for that adds to a kernel."""

    name: str
    layout: Any  # of the number of tokens
    changes: dict[str, Any]
    group: int = 1


FEATURES = (
    Feature("plain", lambda n: SegmentLayout.rmt_decoder(n, 16), {}),
    Feature("strided", lambda n: SegmentLayout.rmt_decoder(n, 16), {"even": False}),
    Feature("gaps", lambda n: SegmentLayout.rmt_decoder(n, 16, window=100), {"padded": True}),
    Feature("own", lambda n: SegmentLayout.membart(n, 32), {}),
    Feature("apart", lambda n: SegmentLayout.rmt_decoder(n, 16, cache=100), {"apart": True}),
    Feature("grouped", lambda n: SegmentLayout.rmt_decoder(n, 16), {}, 4),
    Feature("dropout", lambda n: SegmentLayout.rmt_decoder(n, 16, window=100), {"padded": True, "dropout_p": 0.1}),
)


def variants(arch: int) -> Iterator[Variant]:
    """Every kernel in every row of the table that ``arch`` may use."""
    for table in (configs.FORWARD, configs.BACKWARD):
        for row in _reached(table, arch):
            yield from variants_of(row, arch)


def _reached(table: tuple[Row, ...], arch: int) -> Iterator[Row]:
    """The rows that some call on ``arch`` would take, each with one length and width, in order."""
    seen = set()
    for width in (16, 32, 64, 128, 256):
        for kind in _DTYPES:
            for length in ("few", "short", "long"):
                for dropout in (False, True):
                    row = next(row for row in table if row.applies(arch, width, kind, length, dropout))
                    # A narrower head takes less than the widest one that the row serves.
                    found = replace(row, length=length, dropout=dropout, width=row.width)
                    if found not in seen:
                        seen.add(found)
                        yield found


def variants_of(row: Row, arch: int) -> Iterator[Variant]:
    """The kernels that a row of one of the tables stands for, with every feature that it has to serve."""
    for dtype, name in _DTYPES[row.kind]:
        for feature in FEATURES:
            if row.dropout is not None and row.dropout != ("dropout_p" in feature.changes):
                continue
            yield from _made(row, arch, dtype, name, feature)


def _made(row: Row, arch: int, dtype: torch.dtype, name: str, feature: Feature) -> Iterator[Variant]:
    rows = _ROWS[row.length] // feature.group
    layout = feature.layout(1024 if row.length == "few" else rows)
    if row.length == "few":
        layout = layout.last(rows)
    given = {
        "precision": "tf32" if row.kind == "tf32" else "ieee", "scale": 0.125, "dropout_p": 0.0, "padded": False,
        "apart": False, "started": False, "even": True, **feature.changes,
    }  # fmt: skip
    shape = Shape(
        layout=layout.ints, batch=_BATCH, heads=_KV_HEADS * feature.group, kv_heads=_KV_HEADS,
        queries=layout.num_queries, head_dim=row.width, dtype=dtype, arch=arch, l2=50 << 20, **given,
    )  # fmt: skip
    # Strides that are no multiples of 16 bytes make other code.
    width = row.width if given["even"] else row.width + 1

    def tensor(heads: int, length: int) -> Tensor:
        return torch.empty(_BATCH, heads, length, width, dtype=dtype, device="meta")[..., : row.width]

    query, key = tensor(shape.heads, shape.queries), tensor(_KV_HEADS, shape.keys)
    ints, floats = torch.empty(8, dtype=torch.int32, device="meta"), torch.empty(8, device="meta")
    padding = (ints if shape.padded else None, None, None, None)
    seed = torch.empty(1, dtype=torch.int64, device="meta") if shape.dropout_p else None
    if isinstance(row.config, Tile):
        main, combine, chunks = forward_launches(shape, _strides(query, key, key, key, key, query), row.config)
        parts = floats if chunks > 1 else None
        launches = [(main, (query, key, key, key, key, query, floats, parts, *padding, seed), f"{row.length} forward")]
        if combine is not None:
            launches.append((combine, (floats, query, floats), "combine"))
    else:
        strides = _strides(query, key, key, key, key, query, query, key, key, key, key)
        prepare, gradients = backward_launches(shape, strides, _strides(query, query), row.config)
        assert prepare is not None
        launches = [(prepare, (query, query, floats, None, floats, ints, *padding), "prepare")]
        tensors = (
            query, key, key, key, key, query, floats, ints, query, key, key, key, key, *padding, seed, query, query,
            key, key,
        )  # fmt: skip
        names = ["both"] if row.config.joint else ["keys", "queries"]
        launches += [(launch, tensors, name) for launch, name in zip(gradients, names, strict=True)]
    for launch, arguments, part in launches:
        yield _variant(launch, arguments, part, row, arch, name, feature.name)


def _variant(
    launch: Launch, arguments: tuple[Any, ...], part: str, row: Row, arch: int, dtype: str, feature: str
) -> Variant:
    tiles = [row.config] if isinstance(row.config, Tile) else [row.config.keys, row.config.queries]
    if part in ("keys", "queries"):
        tiles = [tiles[part == "queries"]]
    label = " ".join(f"{tile.rows}x{tile.keys}" for tile in tiles)
    small = any(min(tile.rows, tile.keys) < 64 for tile in tiles)
    products = part not in ("prepare", "combine") and row.kind != "float32"
    return Variant(
        kernel=launch.kernel.fn.__name__.removesuffix("_kernel"), fn=launch.kernel,
        **specialize(launch.kernel, arch, *launch.described(arguments), *launch.numbers),
        num_warps=launch.warps, num_stages=launch.stages, dtype=dtype, head_dim=row.width,
        label=f"{part}, {label}, {feature}" + (", copy engine" if launch.blocks else ""),
        tensor_cores=("mma" if small else True) if products else False,
    )  # fmt: skip


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(number for tensor in tensors for number in tensor.stride()[:3])
