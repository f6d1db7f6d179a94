"""The arguments of one segment attention, checked; what a backend is asked about."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from rmt_kernels import ops
from rmt_kernels.layout import SegmentLayout
from rmt_kernels.relative import Terms

__all__ = ["Call", "check_values", "run_kernels"]

_NOT_RELATIVE = (None, None, None, None)
_CHECK = os.environ.get("RMT_KERNELS_CHECK", "0") == "1"


@dataclass(slots=True)
class Call:
    """One call of ``segment_attention``; shapes and dtypes agree with the layout, ``scale`` is a number."""

    query: torch.Tensor  # (batch, heads, queries, head_dim)
    key: torch.Tensor  # (batch, kv_heads, keys, head_dim), without CACHE where `cache` is given
    value: torch.Tensor
    layout: SegmentLayout
    cache: tuple[torch.Tensor, torch.Tensor] | None
    scale: float
    token_lengths: torch.Tensor | None  # int32 (batch,), as the next three
    token_starts: torch.Tensor | None
    cache_starts: torch.Tensor | None
    query_start: torch.Tensor | None
    dropout_p: float
    seed: torch.Tensor | None  # int64 (1,)
    return_lse: bool
    relative: Terms | None = None


def check_values(call: Call) -> None:
    """Raise ValueError where a length or start is out of range. The CPU kernels check this themselves.

    Skipped while compiling, where looking at a value would break the graph, and away from the CPU, where it would
    synchronise; the environment variable RMT_KERNELS_CHECK=1 asks for it there too.
    """
    if torch.compiler.is_compiling() or (call.query.device.type != "cpu" and not _CHECK):
        return
    layout = call.layout
    limits = (
        ("token_lengths", call.token_lengths, layout.tokens),
        ("token_starts", call.token_starts, layout.tokens),
        ("cache_starts", call.cache_starts, layout.key_sizes[0]),
        ("query_start", call.query_start, layout.tokens - layout.num_queries),
    )
    for name, values, most in limits:
        if values is not None and values.numel() and not 0 <= int(values.min()) <= int(values.max()) <= most:
            raise ValueError(f"{name} must be between 0 and {most}, got {values.tolist()}")


def run_kernels(call: Call, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """``(out, lse)`` by the kernels that are registered under a name."""
    cache_key, cache_value = call.cache or (None, None)
    tensors, ints = (_NOT_RELATIVE, ()) if call.relative is None else (call.relative[:4], call.relative.ints)
    return ops.attend(
        call.query, call.key, call.value, cache_key, cache_value, call.token_lengths, call.token_starts,
        call.cache_starts, call.query_start, call.seed, *tensors, call.layout.ints, call.scale, call.dropout_p, ints,
        name,
    )  # fmt: skip
