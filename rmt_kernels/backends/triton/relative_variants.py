"""The kernels with distance-dependent scores, as the compile gate wants them.

``variants`` is what the ordinary tests compile, ``all_variants`` every row of the table.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import Tensor

from rmt_kernels.backends.triton.configs import KINDS, WIDTHS, Tile
from rmt_kernels.backends.triton.launch import Launch, Shape
from rmt_kernels.backends.triton.relative_launch import (
    RelativeShape,
    Tiles,
    relative_backward_launches,
    relative_config,
    relative_forward_launch,
)
from rmt_kernels.backends.triton.resources import Variant, specialize
from rmt_kernels.layout import SegmentLayout

__all__ = ["FEATURES", "Feature", "all_variants", "launches_of", "variants", "variants_of"]

_DTYPES = {"half": (torch.bfloat16, torch.float16), "tf32": (torch.float32,), "float32": (torch.float32,)}
_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
_BATCH, _KV_HEADS, _TOKENS = 2, 4, 512
_TRANSFORMER_XL = ("key", "content_bias", "position_bias")
_ALL = ("key", "bias", "content_bias", "position_bias")


_DECODER = SegmentLayout.rmt_decoder(_TOKENS, 16, cache=_TOKENS)


@dataclass(frozen=True)
class Feature:
    """What a call asks for. ``changes`` are fields of ``launch.Shape``, ``given`` those of ``Relative``."""

    name: str
    layout: SegmentLayout = _DECODER
    given: tuple[str, ...] = _TRANSFORMER_XL
    shifted: bool = False
    changes: dict[str, Any] = field(default_factory=dict)
    group: int = 1  # query heads to a key/value head
    narrow: bool = False  # a head_dim that is no power of two


_OWN_KEYS = SegmentLayout(
    cache=100, read=16, tokens=_TOKENS, window=100,
    rules={("read", "read"): "self", ("tokens", "cache"): "full", ("tokens", "read"): "full",
           ("tokens", "tokens"): "causal"},
)  # fmt: skip
_WINDOW = SegmentLayout.rmt_decoder(_TOKENS, 16, window=100)
_GAPS = {"padded": True, "started": True, "stale": True}

# Those of lean calls and of others: the ordinary one, everything at once, then single ones.
LEAN = (
    Feature("transformer-xl"),
    Feature("everything lean", _WINDOW, _ALL, changes=_GAPS, group=4, narrow=True),
    Feature("alibi", given=("bias",)),
    Feature("gaps", _WINDOW, changes=_GAPS),
)
OTHERS = (
    Feature("shifted", SegmentLayout.rmt_encoder(_TOKENS, 16), shifted=True),
    Feature("everything", _OWN_KEYS, _ALL, True, {**_GAPS, "apart": True, "dropout_p": 0.1}, 4, True),
    Feature("dropout", changes={"dropout_p": 0.1}),
    Feature("alibi, dropout", given=("bias",), changes={"dropout_p": 0.1}),
)
FEATURES = (*LEAN, *OTHERS)


def variants(arch: int) -> Iterator[Variant]:
    """Transformer-XL's calls of head_dim 64."""
    yield from variants_of(relative_config(arch, 64, "half", True), arch, 64, torch.bfloat16, LEAN[0])


def all_variants(arch: int) -> Iterator[Variant]:
    """Every row for bfloat16 and all kinds of calls; the ordinary ones in the other dtypes and widths too."""
    seen = set()
    for kind, width, (lean, features) in product(KINDS, WIDTHS, ((True, LEAN), (False, OTHERS))):
        tiles = relative_config(arch, width, kind, lean)
        for dtype in _DTYPES[kind]:
            widest = width == tiles.width
            chosen = features[:1] if not widest or dtype is torch.float16 else features
            for feature in chosen if kind == "half" else chosen[:2]:
                for variant in variants_of(tiles, arch, width, dtype, feature):
                    code = (variant.fn, repr((variant.signature, variant.constexprs, variant.attrs)),
                            variant.num_warps, variant.num_stages)  # fmt: skip
                    if code not in seen:
                        seen.add(code)
                        yield variant


def launches_of(
    tiles: Tiles, arch: int, width: int, dtype: torch.dtype, feature: Feature
) -> Iterator[tuple[str, Launch, Tile, tuple[Any, ...]]]:
    """Name, launch, tile and tensors of each kernel of such a call."""
    layout = feature.layout
    head_dim = width // 2 + 8 if feature.narrow else width
    given = {"padded": False, "apart": False, "started": False, "stale": False, "dropout_p": 0.0} | feature.changes
    shape = Shape(
        layout=layout.ints, batch=_BATCH, heads=_KV_HEADS * feature.group, kv_heads=_KV_HEADS,
        queries=layout.num_queries, head_dim=head_dim, dtype=dtype,
        precision="tf32" if tiles.kind == "tf32" else "ieee", scale=0.125, arch=arch, l2=50 << 20, **given,
    )  # fmt: skip
    reach, ahead = layout.offsets()
    key, bias, content, position = (name in feature.given for name in _ALL)
    offsets = reach + 1 + ahead
    relative = RelativeShape(
        shape, offsets, reach, feature.shifted, key, bias, content, position, bias_stride=offsets, config=tiles
    )

    def tensor(*sizes: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.empty(sizes, dtype=kind, device="meta")

    floats, ints = tensor(8, kind=torch.float32), tensor(8, kind=torch.int32)
    query = tensor(_BATCH, shape.heads, shape.queries, head_dim)
    read = (query,) * 8
    grad_query = floats if feature.shifted else query
    samples = (ints if shape.padded else None, None, None, ints if shape.started else None)
    seed = tensor(1, kind=torch.int64) if shape.dropout_p > 0.0 else None
    yield (
        "forward", relative_forward_launch(relative, (8,) * 27), tiles.forward,
        (*read, query, floats, floats, *samples, seed),
    )  # fmt: skip
    _, launches, _ = relative_backward_launches(relative, (8,) * 45)
    arguments = (
        *read[:7], query, grad_query, grad_query, query, query, query, query, floats, floats, ints, *[floats] * 4,
        *samples, seed,
    )  # fmt: skip
    for name, launch, tile in zip(
        ("keys", "queries", "entries"), launches, (tiles.keys, tiles.queries, tiles.entries), strict=False
    ):
        yield name, launch, tile, arguments


def variants_of(tiles: Tiles, arch: int, width: int, dtype: torch.dtype, feature: Feature) -> Iterator[Variant]:
    """The kernels that such a call launches."""
    for name, launch, tile, tensors in launches_of(tiles, arch, width, dtype, feature):
        yield Variant(
            kernel=launch.kernel.fn.__name__.removesuffix("_kernel"), fn=launch.kernel,
            **specialize(launch.kernel, arch, *tensors, *launch.numbers), num_warps=launch.warps,
            num_stages=launch.stages, dtype=_NAMES.get(dtype, "tf32" if tiles.kind == "tf32" else "fp32"),
            head_dim=width // 2 + 8 if feature.narrow else width,
            label=f"{name}, {tile.rows}x{tile.keys}, {feature.name}",
            tensor_cores="mma" if tiles.kind != "float32" else False, programs=tile.programs, spills=tile.spills,
        )  # fmt: skip
