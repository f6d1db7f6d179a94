"""The mask hook: what a model of transformers is to attend to, as a few integers.

transformers asks the hook once a forward pass for a mask, with the number of rows and keys, and hands what it returns
to every attention layer. Here that is a :class:`SegmentMask`; no (queries x keys) tensor is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import masking_utils

from rmt_kernels.layout import SegmentLayout

__all__ = ["CAUSAL", "PAPER", "SegmentMask", "memory_sizes", "segment_mask"]

PAPER, CAUSAL = "rmt", "rmt_causal"

_CAUSAL = masking_utils.causal_mask_function
_BIDIRECTIONAL = getattr(masking_utils, "bidirectional_mask_function", None)  # not in 4.57
# What the functions that masks are composed of stand for.
_KINDS = {
    "packed_sequence_mask_function": "packed documents (position_ids that are not consecutive, and no attention_mask)",
    "packed_sequence_compatibility_function": "packed documents (position_ids that are not consecutive, and no "
    "attention_mask)",
    "remap_positions_for_packed_sequence": "packed documents (position_ids that are not consecutive)",
    "sliding_window_overlay": "a sliding window",
    "sliding_window_bidirectional_overlay": "a sliding window",
    "chunked_overlay": "chunked attention",
    "_legacy_chunked_overlay": "chunked attention",
    "blockwise_overlay": "blocks that see themselves both ways",
}


class SegmentMask(NamedTuple):
    """Who sees whom in the attention of one forward pass."""

    layout: SegmentLayout | None  # None: the call must bring one, for the reason in ``missing``
    missing: str = ""
    refused: str = ""  # why no layout will do
    hidden: Tensor | None = None  # bool (batch, keys), True at padding
    query_start: Tensor | None = None  # int32 (batch,), TOKENS position of the first row
    side: str = "right"  # of the padding, where it can't be looked at

    # ``generate`` with a static cache asks for the mask itself, and handles it as the 4-D tensor that it expects.
    @property
    def ndim(self) -> int:
        """4: ready for the layers."""
        return 4

    def contiguous(self) -> SegmentMask:
        """Itself."""
        return self


def memory_sizes(config: Any) -> tuple[int, int] | None:
    """READ and WRITE rows of ``config.rmt_memory``: an int for both, or ``{"read": ..., "write": ...}``; None: not set.

    Raises:
        TypeError, ValueError: something else.
    """
    given = getattr(config, "rmt_memory", None)
    if given is None:
        return None
    if isinstance(given, Mapping):
        unknown = set(given) - {"read", "write"}
        if unknown or "read" not in given:
            raise ValueError(
                f"config.rmt_memory must be {{'read': rows, 'write': rows}} or an int, got {dict(given)!r}"
            )
        sizes = given["read"], given.get("write", 0)
    else:
        sizes = given, given
    for rows in sizes:
        if isinstance(rows, bool) or not isinstance(rows, int):
            raise TypeError(f"config.rmt_memory must be an int or {{'read': int, 'write': int}}, got {given!r}")
        if rows < 0:
            raise ValueError(f"config.rmt_memory must not be negative, got {given!r}")
    return sizes


def segment_mask(
    *,
    batch_size: int,
    kv_length: int,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = _CAUSAL,
    attention_mask: Tensor | SegmentMask | None = None,
    config: Any = None,
    cache_position: Tensor | None = None,
    q_length: int | None = None,
    q_offset: int | Tensor = 0,
    local_size: int | None = None,
    device: torch.device | None = None,
    use_vmap: bool = False,
    **unused: Any,
) -> SegmentMask:
    """The hook, with the keywords of transformers up to 5.3 (``cache_position``) and from 5.4 on (``q_length``,
    ``q_offset``)."""
    if isinstance(attention_mask, SegmentMask):
        return attention_mask
    if q_length is None:
        if cache_position is None:
            raise TypeError("segment_mask needs q_length or cache_position; this transformers gives neither")
        q_length, device = cache_position.shape[0], cache_position.device
        q_offset = 0 if q_length == kv_length else cache_position[0]
    # What masks that are not causal are made with says so, and a trace can't look into their functions.
    decoder = mask_function is not _BIDIRECTIONAL and "allow_is_bidirectional_skip" not in unused
    composed = mask_function is not _CAUSAL and mask_function is not _BIDIRECTIONAL
    refused = missing = ""
    if composed and torch.compiler.is_compiling():
        # A trace always has the function for packed documents.
        if use_vmap or (local_size is not None and local_size < kv_length):
            refused = f"a mask of the model's own, or attention to the last {local_size} keys only,"
    elif composed:
        kinds = list(dict.fromkeys(_kinds(mask_function)))
        harmless = kinds == ["a sliding window"] and local_size is not None and local_size >= kv_length
        if kinds and kinds[0].startswith("packed"):
            missing = (
                f"{kinds[0]}: attention to the memory would be cut; give attention_mask=, or rmt_layout= with each call"
            )
        elif kinds and not harmless:
            refused = " and ".join(kinds)
    hidden = None if attention_mask is None else ~attention_mask.bool()
    side = "left" if q_length < kv_length else getattr(config, "rmt_padding_side", "right")
    sizes = memory_sizes(config)
    if sizes is None:
        missing = missing or "config.rmt_memory is not set"
    if refused or missing or sizes is None:
        return SegmentMask(None, missing, refused, hidden, None, side)
    if kv_offset:
        return SegmentMask(None, "", "a cache that has dropped its first keys", hidden)
    paper = getattr(config, "_attn_implementation", PAPER) != CAUSAL
    if not decoder:
        if not paper:
            return SegmentMask(None, "", f"{CAUSAL!r} in a model whose rows see both ways; use {PAPER!r}", hidden)
        tokens = kv_length - sizes[0]
        _check_sizes(tokens, sizes, kv_length)
        return SegmentMask(_encoder(tokens, sizes[0]), hidden=_cut(hidden, kv_length), side=side)
    return _decoder_mask(q_length, kv_length, q_offset, sizes, paper, hidden, side, batch_size, device)


def _decoder_mask(
    queries: int, keys: int, offset: int | Tensor, sizes: tuple[int, int], paper: bool, hidden: Tensor | None,
    side: str, batch: int, device: torch.device | None,
) -> SegmentMask:  # fmt: skip
    read, write = sizes
    if queries < keys and write:
        return SegmentMask(
            None, f"config.rmt_memory says that a call ends with {write} WRITE rows, and this one has {queries} rows "
            f"to {keys} keys: for decoding set config.rmt_memory = {{'read': {read}, 'write': 0}}", hidden=hidden,
        )  # fmt: skip
    if queries == 1 and keys > 1:
        # Row and keys of a static cache or of a growing one: both are told by where the row stands.
        tokens = keys - read
        _check_sizes(tokens, sizes, keys)
        start = torch.as_tensor(offset - read, dtype=torch.int32, device=device)
        return SegmentMask(
            _decoder(read, tokens, write, paper, 1, True), hidden=_cut(hidden, keys, ahead=True),
            query_start=start.reshape(1).expand(batch), side=side,
        )  # fmt: skip
    end = int(offset) + queries  # of a tensor on a GPU: synchronises, once for a chunk of a prompt
    tokens = end - read - write
    _check_sizes(tokens, sizes, end)
    return SegmentMask(_decoder(read, tokens, write, paper, queries, False), hidden=_cut(hidden, end), side=side)


def _check_sizes(tokens: int, sizes: tuple[int, int], rows: int) -> None:
    if tokens < 1:
        raise ValueError(
            f"config.rmt_memory: {sizes[0]} READ and {sizes[1]} WRITE rows leave no tokens of {rows} rows; the input "
            "must be the rows of [READ | TOKENS | WRITE]"
        )


def _cut(hidden: Tensor | None, keys: int, ahead: bool = False) -> Tensor | None:
    """The mask of the keys: of a static cache's, those that are still empty are no padding."""
    if hidden is None or hidden.shape[1] == keys:
        return hidden
    if hidden.shape[1] < keys and ahead:
        return torch.nn.functional.pad(hidden, (0, keys - hidden.shape[1]))
    return hidden[:, :keys]


def _kinds(function: Callable[..., Any]) -> Iterator[str]:
    """What a composed mask function restricts, beside causality."""
    if function is _CAUSAL or function is _BIDIRECTIONAL:
        return
    name = getattr(function, "__qualname__", "").split(".")[0]
    content = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    # transformers 4 composes it always, with the number of each row's document: it may be the same for all.
    numbers = [part for part in content if isinstance(part, Tensor)] if name == "packed_sequence_mask_function" else []
    if name in _KINDS and not (numbers and all(bool((part == part[:, :1]).all()) for part in numbers)):
        yield _KINDS[name]
    elif name not in (*_KINDS, "and_masks", "or_masks"):
        yield "a mask function of the model or of the caller"
        return
    for inner in content:
        for part in inner if isinstance(inner, (tuple, list)) else (inner,):
            if callable(part):
                yield from _kinds(part)


@torch.compiler.assume_constant_result
def _decoder(read: int, tokens: int, write: int, paper: bool, rows: int, placed: bool) -> SegmentLayout:
    return _made_decoder(read, tokens, write, paper, rows, placed)


@lru_cache(maxsize=1024)
def _made_decoder(read: int, tokens: int, write: int, paper: bool, rows: int, placed: bool) -> SegmentLayout:
    make = SegmentLayout.rmt_decoder if paper else SegmentLayout.causal
    whole = replace(make(tokens, max(read, write)), read=read, write=write)
    return whole.decoding(rows) if placed else whole.last(rows)


@torch.compiler.assume_constant_result
def _encoder(tokens: int, memory: int) -> SegmentLayout:
    return _made_encoder(tokens, memory)


@lru_cache(maxsize=1024)
def _made_encoder(tokens: int, memory: int) -> SegmentLayout:
    return SegmentLayout.rmt_encoder(tokens, memory)
