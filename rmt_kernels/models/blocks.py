"""A transformer on segment attention, in the pieces that the models are made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rmt_kernels.attention import segment_attention
from rmt_kernels.layout import SegmentLayout
from rmt_kernels.models.base import SegmentModel, kept, mapped
from rmt_kernels.models.config import ModelConfig
from rmt_kernels.relative import Relative, alibi_slopes

__all__ = [
    "Attention",
    "Distances",
    "FeedForward",
    "Layer",
    "ModelConfig",
    "SegmentModel",
    "Stack",
    "ends",
    "kept",
    "mapped",
]

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def ends(config: ModelConfig, *, bias: bool = False) -> tuple[nn.Embedding, nn.Linear]:
    """Embedding (vocabulary, width) and output layer (width to vocabulary), of one weight where ``config.tied``."""
    embed = nn.Embedding(config.vocabulary, config.width)
    head = nn.Linear(config.width, config.vocabulary, bias=bias)
    for part in (embed, head):
        nn.init.normal_(part.weight, std=config.width**-0.5)
    if config.tied:
        head.weight = embed.weight
    if head.bias is not None:
        nn.init.zeros_(head.bias)
    return embed, head


class Distances(nn.Module):
    """How the scores of one layer depend on the distance between a row and a key, as :class:`rmt_kernels.Relative`.

    Args:
        config: width and heads; ``relative`` is the mode.
        kind: ``"relative"``, ``"alibi"`` or ``"bias"``.
        distances: how many the tables hold, 0 to distances - 1.
    """

    sinusoids: Tensor
    slopes: Tensor

    def __init__(self, config: ModelConfig, kind: str, distances: int) -> None:
        super().__init__()
        self.kind, self.mode, self.heads, self.distances = kind, config.relative, config.heads, distances
        width = config.width
        if kind == "relative":
            if width % 2:
                raise ValueError(f"width must be even for positions='relative', got {width}")
            # In float64, so that no cast of the module makes them less exact than its own dtype.
            rate = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
            angles = torch.arange(distances, dtype=torch.float64)[:, None] * rate
            self.register_buffer("sinusoids", torch.cat([angles.sin(), angles.cos()], dim=1), persistent=False)
            self.key = nn.Linear(width, width, bias=False)
            self.content_bias = nn.Parameter(torch.zeros(config.heads, width // config.heads))
            self.position_bias = nn.Parameter(torch.zeros(config.heads, width // config.heads))
        elif kind == "alibi":
            self.register_buffer("slopes", alibi_slopes(config.heads).double(), persistent=False)
        else:
            self.bias = nn.Parameter(torch.zeros(config.heads, distances))

    def forward(self) -> Relative:
        """The tables."""
        if self.kind == "relative":
            key = self.key(self.sinusoids.to(self.key.weight.dtype)).unflatten(-1, (self.heads, -1)).transpose(0, 1)
            return Relative(key, self.content_bias, self.position_bias, mode=self.mode)
        if self.kind == "alibi":
            return Relative.alibi(self.slopes, self.distances)
        return Relative(bias=self.bias)


class Attention(nn.Module):
    """Segment attention with its projections; query, key and value in one product, as views of its result.

    Args:
        config: width, heads, dropout, backend.
        bias: whether the projections have one.
        scores: distance-dependent scores.
    """

    def __init__(self, config: ModelConfig, *, bias: bool = True, scores: Distances | None = None) -> None:
        super().__init__()
        self.heads, self.dropout, self.backend = config.heads, config.dropout, config.backend
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=bias)
        self.out = nn.Linear(config.width, config.width, bias=bias)
        self.scores = scores

    def forward(
        self, x: Tensor, layout: SegmentLayout, *, token_lengths: Tensor | None = None, cache: Tensor | None = None,
        cache_starts: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Rows (batch, rows, width) to one another, and to the CACHE region's, (batch, C, width), where given."""
        query, key, value = self.project(x)
        apart = None if cache is None else self.project_keys(cache)
        return self.attend(
            query, key, value, layout, token_lengths=token_lengths, cache=apart, cache_starts=cache_starts
        )

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows (batch, rows, width) to query, key and value, (batch, heads, rows, head_dim) each."""
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return query, key, value

    def project_query(self, x: Tensor) -> Tensor:
        """Rows to query alone."""
        part: Tensor = self._part(x, slice(None, x.shape[-1])).unflatten(-1, (self.heads, -1))
        return part.transpose(1, 2)

    def project_keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Rows to key and value alone."""
        part = self._part(x, slice(x.shape[-1], None))
        key, value = part.unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return key, value

    def _part(self, x: Tensor, rows: slice) -> Tensor:
        return F.linear(x, self.qkv.weight[rows], None if self.qkv.bias is None else self.qkv.bias[rows])

    def attend(self, query: Tensor, key: Tensor, value: Tensor, layout: SegmentLayout, **arguments: Any) -> Tensor:
        """Heads to rows (batch, query rows, width), after the output projection.

        arguments: as in :func:`rmt_kernels.segment_attention`, such as token_lengths, cache and scale.
        """
        out: Tensor = segment_attention(
            query, key, value, layout, dropout_p=self.dropout if self.training else 0.0, backend=self.backend,
            relative=None if self.scores is None else self.scores(), **arguments,
        )  # fmt: skip
        mixed: Tensor = self.out(out.transpose(1, 2).flatten(2))
        return mixed


class FeedForward(nn.Module):
    """Linear, activation, linear, for rows (..., width)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        inner = 4 * config.width if config.inner is None else config.inner
        self.inner, self.out = nn.Linear(config.width, inner), nn.Linear(inner, config.width)
        self.activation, self.dropout = _ACTIVATIONS[config.activation], nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) to the same."""
        out: Tensor = self.out(self.dropout(self.activation(self.inner(x))))
        return out


class Layer(nn.Module):
    """Attention and feed-forward, each with a residual, normed before (``"pre"``) or after it (``"post"``).

    Args:
        config: see :class:`ModelConfig`.
        bias: whether the attention's projections have one.
        scores: distance-dependent scores.
    """

    def __init__(self, config: ModelConfig, *, bias: bool = True, scores: Distances | None = None) -> None:
        super().__init__()
        self.pre = config.norm == "pre"
        self.attention = Attention(config, bias=bias, scores=scores)
        self.feedforward = FeedForward(config)
        self.norm1, self.norm2 = nn.LayerNorm(config.width), nn.LayerNorm(config.width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, layout: SegmentLayout, *, token_lengths: Tensor | None = None, cache: Tensor | None = None,
        cache_starts: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Rows of the layout (batch, rows, width) to the same; ``cache``: this layer's input rows of CACHE."""
        keywords: dict[str, Any] = {"token_lengths": token_lengths, "cache_starts": cache_starts}
        if self.pre:
            cache = None if cache is None else self.norm1(cache)
            x = x + self.dropout(self.attention(self.norm1(x), layout, cache=cache, **keywords))
            return x + self.dropout(self.feedforward(self.norm2(x)))  # type: ignore[no-any-return]
        x = self.norm1(x + self.dropout(self.attention(x, layout, cache=cache, **keywords)))
        return self.norm2(x + self.dropout(self.feedforward(x)))  # type: ignore[no-any-return]


class Stack(nn.Module):
    """Layers over the rows of a segment: a backbone for :class:`rmt_kernels.RecurrentMemory`.

    Args:
        config: see :class:`ModelConfig`.
        rows: of a segment, memory included.
        positions: one of those of :class:`ModelConfig`, never ``""``.
        bias: whether the attention's projections have one.
    """

    def __init__(self, config: ModelConfig, rows: int, positions: str, *, bias: bool = True) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.empty(rows, config.width)) if positions == "learned" else None
        if self.places is not None:
            nn.init.normal_(self.places, std=config.width**-0.5)

        def scores() -> Distances | None:
            return None if positions in ("learned", "none") else Distances(config, positions, rows)

        self.layers = nn.ModuleList(Layer(config, bias=bias, scores=scores()) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width) if config.norm == "pre" else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, *, layout: SegmentLayout, token_lengths: Tensor | None = None) -> Tensor:
        """Rows of the layout (batch, rows, width) to their hidden states."""
        x = self.dropout(self.place(x, token_lengths))
        for layer in self.layers:
            x = layer(x, layout, token_lengths=token_lengths)
        return self.norm(x)  # type: ignore[no-any-return]

    def place(self, x: Tensor, token_lengths: Tensor | None) -> Tensor:
        """Add each row's position to it, counted over the whole segment."""
        return x if self.places is None else x + self.places
