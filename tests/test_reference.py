"""The specification itself: against loops over rows written from the published tables, and its derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rmt_kernels import Rule, SegmentLayout, reference_attention
from rmt_kernels.philox import dropout_keep

C, M, T = 3, 2, 5  # rows of the cache, of each memory region, of the tokens
Array = np.ndarray[Any, Any]
Seen = Callable[[int], list[int]]  # the keys that a query row sees


def _decoder(read_cache: bool, window: int = 10**6) -> Seen:
    """Keys [cache | read | tokens | write], queries [read | tokens | write], Recurrent Memory Transformer."""
    cache, read, write = [*range(C)], [*range(C, C + M)], [*range(C + M + T, C + M + T + M)]

    def seen(row: int) -> list[int]:
        if row < M:
            return (cache if read_cache else []) + read
        if row < M + T:
            t = row - M
            past = [j for j in cache if C + t - j < window]
            return past + read + [C + M + j for j in range(t + 1) if t - j < window]
        return (cache if read_cache else []) + read + [C + M + j for j in range(T)] + write

    return seen


TABLES: dict[str, tuple[SegmentLayout, Seen]] = {
    "rmt_decoder": (SegmentLayout.rmt_decoder(T, M, cache=C), _decoder(False)),
    "read_cache": (SegmentLayout.rmt_decoder(T, M, cache=C, read_cache=True), _decoder(True)),
    "window": (SegmentLayout.rmt_decoder(T, M, cache=C, window=4), _decoder(False, 4)),
    "wide window": (SegmentLayout.rmt_decoder(T, M, cache=C, window=7), _decoder(False, 7)),
    "causal": (SegmentLayout.causal(T, M, cache=C), lambda row: [*range(C + row + 1)]),
    "rmt_encoder": (SegmentLayout.rmt_encoder(T, M), lambda row: [*range(M + T)]),
    "transformer_xl": (SegmentLayout.transformer_xl(T, C), lambda row: [*range(C + row + 1)]),
    "same length": (SegmentLayout.transformer_xl(T, C, window=C), lambda row: [*range(row + 1, row + 1 + C)]),
    "memory_transformer": (SegmentLayout.memory_transformer(T, M), lambda row: [*range(M + T)]),
    "bottleneck write": (SegmentLayout.memory_bottleneck(T, M, step="write"), lambda row: [*range(M + T)]),
    "bottleneck read": (SegmentLayout.memory_bottleneck(T, M, step="read"), lambda row: [*range(M)]),
    "memformer_read": (SegmentLayout.memformer_read(T, M), lambda row: [*range(M)]),
    "memformer_write": (SegmentLayout.memformer_write(T, M), lambda row: [*range(T), T + row]),
    "membart": (
        SegmentLayout.membart(T, M),
        lambda row: [row, *range(M, M + T)] if row < M else [*range(M + T)],
    ),
    "blind rows": (SegmentLayout(read=M, tokens=T, rules={("tokens", "tokens"): Rule.CAUSAL}),
                   lambda row: [*range(M, row + 1)]),
}  # fmt: skip


def by_rows(
    query: Array, key: Array, value: Array, seen: Callable[[int, int], list[int]], scale: float,
    keep: Array | None = None, dropout_p: float = 0.0,
) -> tuple[Array, Array]:  # fmt: skip
    """(out, lse), one row at a time."""
    batch, heads, rows, _ = query.shape
    group = heads // key.shape[1]
    out, lse = np.zeros_like(query), np.full(query.shape[:3], -np.inf)
    for b in range(batch):
        for h in range(heads):
            for i in range(rows):
                keys = seen(b, i)
                if not keys:
                    continue
                scores = np.array([scale * query[b, h, i] @ key[b, h // group, j] for j in keys])
                total = np.exp(scores).sum()
                lse[b, h, i] = np.log(total)
                for score, j in zip(scores, keys, strict=True):
                    weight = np.exp(score) / total
                    if keep is not None:
                        weight *= keep[b, h, i, j] / (1 - dropout_p)
                    out[b, h, i] += weight * value[b, h // group, j]
    return out, lse


def inputs(layout: SegmentLayout, batch: int = 3, heads: int = 4, kv_heads: int = 2, head_dim: int = 3) -> list[Tensor]:
    shapes = [(heads, layout.num_queries), (kv_heads, layout.num_keys), (kv_heads, layout.num_keys)]
    return [torch.randn(batch, n, rows, head_dim, dtype=torch.float64) for n, rows in shapes]


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def assert_equal_by_rows(
    layout: SegmentLayout, seen: Callable[[int, int], list[int]], scale: float | None = None, **options: Any
) -> None:
    query, key, value = inputs(layout)
    out, lse = reference_attention(query, key, value, layout, scale=scale, **options)
    keep = None
    if options.get("dropout_p"):
        rows = torch.arange(layout.num_queries)[None]
        keep = dropout_keep(options["seed"], 3, 4, rows, layout.num_keys, options["dropout_p"]).numpy()
    expected = by_rows(
        query.numpy(), key.numpy(), value.numpy(), seen, 3**-0.5 if scale is None else scale, keep,
        options.get("dropout_p", 0.0),
    )  # fmt: skip
    np.testing.assert_allclose(out.numpy(), expected[0], rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(lse.numpy(), expected[1], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("scale", [None, -0.4])
def test_published_tables(name: str, scale: float | None) -> None:
    layout, seen = TABLES[name]
    assert_equal_by_rows(layout, lambda b, i: seen(i), scale)


@pytest.mark.parametrize("name", TABLES)
def test_dropout(name: str) -> None:
    layout, seen = TABLES[name]
    assert_equal_by_rows(layout, lambda b, i: seen(i), dropout_p=0.4, seed=torch.tensor([-5]))


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("side", ["token_lengths", "token_starts"])
def test_padding(name: str, side: str) -> None:
    """A padded token is hidden from every row, and as a row sees nothing."""
    layout, seen = TABLES[name]
    bounds = (T, 0, 3) if side == "token_lengths" else (0, T, 3)
    first_row, first_key = layout.query_offset("tokens"), layout.key_offset("tokens")
    token_rows = range(first_row, first_row + (T if any(r.name == "TOKENS" for r in layout.queries) else 0))  # type: ignore[union-attr]
    token_keys = range(first_key, first_key + layout.key_size("tokens"))

    def padded(b: int, position: int) -> bool:
        return position >= bounds[b] if side == "token_lengths" else position < bounds[b]

    def visible(b: int, i: int) -> list[int]:
        if i in token_rows and padded(b, i - first_row):
            return []
        return [j for j in seen(i) if not (j in token_keys and padded(b, j - first_key))]

    options: dict[str, Any] = {side: int32(*bounds)}
    assert_equal_by_rows(layout, visible, **options)


@pytest.mark.parametrize("name", ["rmt_decoder", "read_cache", "window", "causal", "same length"])
def test_cache_starts(name: str) -> None:
    layout, seen = TABLES[name]
    starts = (0, C, 1)
    assert_equal_by_rows(layout, lambda b, i: [j for j in seen(i) if not j < starts[b]], cache_starts=int32(*starts))


@pytest.mark.parametrize("name", ["rmt_decoder", "window", "causal", "memformer_read"])
def test_query_start(name: str) -> None:
    layout, seen = TABLES[name]
    first = layout.query_offset("tokens")
    starts = (0, 3, 1)
    assert_equal_by_rows(layout.decoding(2), lambda b, i: seen(first + starts[b] + i), query_start=int32(*starts))


@pytest.mark.parametrize("name", TABLES)
def test_last(name: str) -> None:
    layout, seen = TABLES[name]
    rows = layout.num_queries // 2
    first = layout.num_queries - rows
    assert_equal_by_rows(layout.last(rows), lambda b, i: seen(first + i))


def test_cache_apart() -> None:
    layout = TABLES["rmt_decoder"][0]
    query, key, value = inputs(layout)
    joined = reference_attention(query, key, value, layout)
    apart = reference_attention(query, key[:, :, C:], value[:, :, C:], layout, cache=(key[:, :, :C], value[:, :, :C]))
    assert torch.equal(joined[0], apart[0])
    assert torch.equal(joined[1], apart[1])


# -- derivatives -------------------------------------------------------------------------------------------------------

SMALL = SegmentLayout.rmt_decoder(3, 1, cache=2)
DERIVED: dict[str, tuple[SegmentLayout, dict[str, Any]]] = {
    "plain": (SMALL, {}),
    "scale": (SMALL, {"scale": -0.7}),
    "right padding": (SMALL, {"token_lengths": int32(2, 0)}),
    "left padding": (SMALL, {"token_starts": int32(1, 3), "cache_starts": int32(0, 2)}),
    "dropout": (SMALL, {"dropout_p": 0.4, "seed": torch.tensor([11])}),
    "padding and dropout": (SMALL, {"token_lengths": int32(1, 3), "dropout_p": 0.3, "seed": torch.tensor([2])}),
    "blind rows": (SegmentLayout(read=2, tokens=3, rules={("tokens", "tokens"): Rule.CAUSAL}), {}),
    "own row": (SegmentLayout.memformer_write(3, 2), {}),
    "decoding": (SMALL.decoding(1), {"query_start": int32(0, 2)}),
}


@pytest.mark.parametrize("name", DERIVED)
@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck], ids=["first", "second"])
def test_derivatives(name: str, check: Callable[..., bool]) -> None:
    layout, options = DERIVED[name]
    leaves = [tensor.requires_grad_() for tensor in inputs(layout, batch=2, heads=2, kv_heads=1, head_dim=2)]

    def finite(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = reference_attention(query, key, value, layout, **options)
        return out, lse.masked_fill(lse.isinf(), 0.0)  # finite differences of -inf are NaN

    assert check(finite, leaves)


@pytest.mark.parametrize("name", ["right padding", "left padding", "blind rows"])
def test_blind_rows(name: str) -> None:
    """Out 0, lse -inf, and gradients 0 whatever is sent to them."""
    layout, options = DERIVED[name]
    leaves = [tensor.requires_grad_() for tensor in inputs(layout, batch=2, heads=2, kv_heads=1)]
    out, lse = reference_attention(leaves[0], leaves[1], leaves[2], layout, **options)
    blind = lse.isinf()
    assert blind.any()
    assert (lse[blind] < 0).all()
    assert not out[blind].any()
    grads = torch.autograd.grad(
        (out, lse), leaves, (blind[..., None] * torch.randn_like(out), blind * torch.randn_like(lse))
    )
    assert not any(grad.any() for grad in grads)


def test_masks_take_no_part_in_the_dtype() -> None:
    query, key, value = inputs(SMALL)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        out, lse = reference_attention(query.to(dtype), key.to(dtype), value.to(dtype), SMALL)
        assert out.dtype == lse.dtype == dtype
