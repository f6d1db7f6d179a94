"""Philox4x32-10 (Salmon et al., SC'11) and the dropout mask every backend draws from it."""

from __future__ import annotations

import torch

__all__ = ["dropout_keep", "philox4x32", "threshold"]

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)

Words = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def philox4x32(counter: Words, key: tuple[torch.Tensor, torch.Tensor]) -> Words:
    """Ten rounds of Philox on four counter words and two key words, all int64 tensors holding 32-bit values."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # int64 wraps modulo 2^64, so the low and the high word of the product are exact.
        a, b = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (b >> 32) & _WORD ^ c1 ^ k0, b & _WORD, (a >> 32) & _WORD ^ c3 ^ k1, a & _WORD
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def threshold(dropout_p: float) -> int:
    """An entry is kept iff its random word is at least this: floor(p * 2^32)."""
    return int(dropout_p * 2.0**32)


def dropout_keep(
    seed: torch.Tensor, batch: int, heads: int, query_rows: torch.Tensor, num_keys: int, dropout_p: float
) -> torch.Tensor:
    """Which attention probabilities survive dropout, bool (batch, heads, queries, keys).

    Key = (seed low, seed high); counter = (key // 4, query, query head, batch); word = key % 4.

    Args:
        seed: int64 (1,).
        query_rows: int64 (batch or 1, queries), row index of each query in the layout.
    """
    device = seed.device
    rows = query_rows.to(device).expand(batch, -1)
    quads = -(-num_keys // 4)
    c0 = torch.arange(quads, device=device)
    c2 = torch.arange(heads, device=device)[None, :, None, None]
    c3 = torch.arange(batch, device=device)[:, None, None, None]
    words = philox4x32(
        (c0.expand(batch, heads, rows.shape[1], quads), rows[:, None, :, None], c2, c3),
        (seed & _WORD, (seed >> 32) & _WORD),
    )
    drawn = torch.stack(torch.broadcast_tensors(*words), dim=-1).flatten(-2)[..., :num_keys]
    return drawn >= threshold(dropout_p)
