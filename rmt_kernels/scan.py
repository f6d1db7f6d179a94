"""Layer-local recurrence: the memory of many segments by a scan over its own rows, then all tokens at once.

Where the memory lives inside one attention layer, no key and no value of a token depends on it. So N segments are not N
attentions one after another: only the memory rows are, M of them a segment.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from rmt_kernels.layout import Region, SegmentLayout

__all__ = ["segment_scan"]

Project = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
Attend = Callable[[Tensor, Tensor, Tensor, SegmentLayout, Tensor | None, Tensor | None], Tensor]


def segment_scan(
    tokens: Tensor,
    memory: Tensor,
    layout: SegmentLayout | None,
    project: Project,
    attend: Attend,
    token_lengths: Tensor | None = None,
    token_starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One attention layer over N segments, ``[memory_s | tokens_s | memory_s]``, each handing its memory to the next.

    Args:
        tokens: (batch, rows, width), segments of ``layout.tokens`` rows; the last may be short.
        memory: (batch, M, width), the rows of READ and WRITE in the first segment.
        layout: of one segment. The outgoing memory is what WRITE rows give (READ rows, where there is no WRITE).
        project: (batch, rows, width) to query, key and value, (batch, rows, heads, head_dim).
        attend: query, key, value, layout, token_lengths, token_starts to (batch, query rows, width).
        token_lengths, token_starts: int (batch,), padding on the right or left of the whole sample. A batch row
            without tokens in a segment keeps its memory.

    Returns:
        ``(out, memory)``: (batch, rows, width) for the tokens, and the memory after the last segment.
    """
    writer, reader = _writer_and_reader(layout)
    _check_rows(tokens, memory, writer.num_queries)
    size, (batch, rows, _) = reader.tokens, tokens.shape
    count = -(-rows // size)
    if rows % size:
        if token_starts is not None:
            raise ValueError(f"query must hold whole segments of {size} rows where padding is left, got {rows} rows")
        if token_lengths is None:
            token_lengths = torch.full((batch,), rows, dtype=torch.int32, device=tokens.device)
        tokens = F.pad(tokens, (0, 0, 0, count * size - rows))
    lengths = _per_segment("token_lengths", token_lengths, tokens, rows, size)
    starts = _per_segment("token_starts", token_starts, tokens, rows, size)
    query, key, value = project(tokens)

    memory_keys, memory_values = [], []
    for s in range(count):
        asked, memory_key, memory_value = project(memory)
        memory_keys.append(memory_key)
        memory_values.append(memory_value)
        here = slice(s * size, (s + 1) * size)
        length, start = (None if ends is None else ends[:, s] for ends in (lengths, starts))
        keys = _around(key[:, here], memory_key, writer)
        values = _around(value[:, here], memory_value, writer)
        written = attend(asked, keys, values, writer, length, start)
        if length is not None:
            written = torch.where((length != 0)[:, None, None], written, memory)
        if start is not None:
            written = torch.where((start != size)[:, None, None], written, memory)
        memory = written

    # All memories are known: every segment becomes a batch row of one call.
    query, key, value = (part.unflatten(1, (count, size)).flatten(0, 1) for part in (query, key, value))
    keys = _around(key, torch.stack(memory_keys, dim=1).flatten(0, 1), reader)
    values = _around(value, torch.stack(memory_values, dim=1).flatten(0, 1), reader)
    length, start = (None if ends is None else ends.flatten() for ends in (lengths, starts))
    out = attend(query, keys, values, reader, length, start)
    return out.unflatten(0, (batch, count)).flatten(1, 2)[:, :rows], memory


# torch.compile cannot trace the making of a layout, so this is run, not traced.
@torch.compiler.assume_constant_result
def _writer_and_reader(layout: SegmentLayout | None) -> tuple[SegmentLayout, SegmentLayout]:
    """The layout with the queries of the outgoing memory alone, and with those of the tokens alone."""
    if layout is None:
        raise ValueError("layout: memory= needs one, such as SegmentLayout.rmt_decoder(tokens, memory)")
    carrier = Region.WRITE if layout.write else Region.READ
    if layout.cache or layout.skip or not layout.tokens or not {carrier, Region.TOKENS} <= set(layout.queries):
        raise ValueError(
            "layout: memory= needs queries in TOKENS and in WRITE (in READ, where there is no WRITE), no cache and no "
            f"skipped rows, got {layout}"
        )
    if carrier is Region.WRITE and layout.read not in (0, layout.write):
        raise ValueError(f"layout: READ and WRITE hold the same memory, got {layout.read} and {layout.write} rows")
    return replace(layout, queries=(carrier,)), replace(layout, queries=(Region.TOKENS,))


def _check_rows(tokens: Tensor, memory: Tensor, size: int) -> None:
    if not isinstance(memory, Tensor):
        raise TypeError(f"memory must be a torch.Tensor, got {type(memory).__name__}")
    shape = (tokens.shape[0], size, tokens.shape[2])
    if memory.shape != shape or memory.device != tokens.device:
        raise ValueError(
            f"memory must have shape {shape}, (batch, memory rows of the layout, embed_dim), on {tokens.device}, got "
            f"{tuple(memory.shape)} on {memory.device}"
        )
    if not tokens.shape[1]:
        raise ValueError("query must hold at least one token with memory=, got 0 rows")


def _around(tokens: Tensor, memory: Tensor, layout: SegmentLayout) -> Tensor:
    """The layout's key rows: ``[memory | tokens | memory]``, as far as it has those regions."""
    _, read, rows, write = layout.ints[:4]
    return torch.cat([part for part, size in ((memory, read), (tokens, rows), (memory, write)) if size], dim=1)


def _per_segment(name: str, ends: Tensor | None, tokens: Tensor, rows: int, size: int) -> Tensor | None:
    """Lengths or starts of whole samples, (batch,), as those of their segments, int32 (batch, segments)."""
    if ends is None:
        return None
    if not isinstance(ends, Tensor) or ends.dtype not in (torch.int32, torch.int64) or ends.shape != tokens.shape[:1]:
        raise ValueError(f"{name} must be an int32 tensor of shape ({tokens.shape[0]},), got {ends!r}")
    wrong = (ends < 0) | (ends > rows)
    if ends.device.type == "cpu" and not torch.compiler.is_compiling() and bool(wrong.any()):
        raise ValueError(f"{name} must be between 0 and {rows}, got {ends.tolist()}")
    first = torch.arange(0, tokens.shape[1], size, device=ends.device)
    # What is out of range stays so: kernels refuse it, or write NaN where they cannot raise.
    return torch.where(wrong[:, None], -1, (ends[:, None] - first).clamp(0, size)).to(torch.int32)
