"""Memory Transformer (arXiv 2006.11527): encoders that read trained memory rows in front of each segment.

Nothing is handed from one segment to the next. The paper's equations are offered with ``norm="post"``, its own, and
``"pre"``. It leaves open where the memory rows stand; here only tokens have positions, for a trained row needs none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rmt_kernels.layout import SegmentLayout
from rmt_kernels.models.blocks import Attention, FeedForward, Layer, ModelConfig, SegmentModel, ends

__all__ = ["Attend", "Feed", "MemBottleneck", "MemCtrl", "MemCtrlShared", "MemTransformer", "SeeingLayer"]


class Attend(nn.Module):
    """Attention of some rows to others, with residual, dropout and norm.

    With ``norm="pre"`` the rows that see and the rows that are seen go through the same norm.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.pre = config.norm == "pre"
        self.attention, self.norm = Attention(config), nn.LayerNorm(config.width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, rows: Tensor, seen: Tensor, layout: SegmentLayout, counts: Tensor | None) -> Tensor:
        """The layout's query rows (batch, queries, width), which see its key rows ``seen`` (batch, keys, width)."""
        asking = self.norm(rows) if self.pre else rows
        given = asking if seen is rows else self.norm(seen) if self.pre else seen
        if seen is rows:
            query, key, value = self.attention.project(asking)
        else:
            query, (key, value) = self.attention.project_query(asking), self.attention.project_keys(given)
        rows = rows + self.dropout(self.attention.attend(query, key, value, layout, token_lengths=counts))
        return rows if self.pre else self.norm(rows)


class Feed(nn.Module):
    """Feed-forward with residual, dropout and norm, for rows (..., width)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.pre = config.norm == "pre"
        self.feedforward, self.norm = FeedForward(config), nn.LayerNorm(config.width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) to the same."""
        if self.pre:
            return x + self.dropout(self.feedforward(self.norm(x)))  # type: ignore[no-any-return]
        return self.norm(x + self.dropout(self.feedforward(x)))  # type: ignore[no-any-return]


class SeeingLayer(nn.Module):
    """A transformer layer for some rows that see others: :class:`Attend`, then :class:`Feed`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attend, self.feed = Attend(config), Feed(config)

    def forward(self, rows: Tensor, seen: Tensor, layout: SegmentLayout, counts: Tensor | None) -> Tensor:
        """As :class:`Attend`."""
        return self.feed(self.attend(rows, seen, layout, counts))  # type: ignore[no-any-return]


class _MemoryEncoder(SegmentModel):
    """``[memory | tokens]`` through layers that :meth:`layer` knows; row i predicts position i."""

    causal = False
    recurrent = False
    uses = ("memory",)
    needs = ("memory",)
    choices = {"positions": ("learned", "none")}  # noqa: RUF012

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.embed, self.head = ends(config)
        self.memory = nn.Parameter(torch.randn(config.memory, config.width) * config.width**-0.5)
        learned = self.choice("positions") == "learned"
        places = torch.randn(config.tokens, config.width) * config.width**-0.5
        self.places = nn.Parameter(places) if learned else None
        self.dropout = nn.Dropout(config.dropout)
        self.norm = nn.LayerNorm(config.width) if config.norm == "pre" else nn.Identity()

    def layer(self, number: int, memory: Tensor, tokens: Tensor, counts: Tensor | None) -> tuple[Tensor, Tensor]:
        """One layer: memory (batch, M, width) and tokens (batch, T, width) to the same; counts: of each sample."""
        raise NotImplementedError

    def step(self, ids: Tensor, counts: Tensor | None, state: Any) -> tuple[Tensor, Any]:
        """One segment, see :class:`SegmentModel`; there is no state."""
        tokens = self.embed(ids)
        if self.places is not None:
            tokens = tokens + self.places
        memory = self.dropout(self.memory.expand(len(ids), -1, -1))
        tokens = self.dropout(tokens)
        for number in range(self.config.layers):
            memory, tokens = self.layer(number, memory, tokens, counts)
        return self.norm(tokens), state


class MemTransformer(_MemoryEncoder):
    """MemTransformer: memory and tokens go through unchanged layers, every row sees every row."""

    name = "memory_transformer"

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.layout = SegmentLayout.memory_transformer(config.tokens, config.memory)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))

    def layer(self, number: int, memory: Tensor, tokens: Tensor, counts: Tensor | None) -> tuple[Tensor, Tensor]:
        """``X <- layer(X)`` with ``X = [memory | tokens]``."""
        x = self.layers[number](torch.cat([memory, tokens], dim=1), self.layout, token_lengths=counts)
        return x[:, : memory.shape[1]], x[:, memory.shape[1] :]


class _TwoLayers(_MemoryEncoder):
    """What MemCtrl and MemBottleneck share: layers of the tokens, and layers of the memory.

    A memory layer's rows are the memory, which sees memory and tokens: attention (its queries, keys, values and
    output are all projected by its own weights), then its own feed-forward.
    """

    def __init__(self, config: ModelConfig, memory_layers: int) -> None:
        super().__init__(config)
        self.memory_layout = SegmentLayout.memory_bottleneck(config.tokens, config.memory, step="write")
        self.token_layers = nn.ModuleList(SeeingLayer(config) for _ in range(config.layers))
        self.memory_layers = nn.ModuleList(SeeingLayer(config) for _ in range(memory_layers))


class MemCtrl(_TwoLayers):
    """MemCtrl: the mask of MemTransformer, but memory rows are updated by layers of their own, one at each depth.

    ``memory' = memory_layer(memory sees [memory | tokens])``, ``tokens' = token_layer(tokens see [memory | tokens])``.
    Nobody reads the memory after the last depth, so there is no memory layer there.

    Raises:
        ValueError: less than 2 layers, for then there is no memory layer at all.
    """

    name = "mem_ctrl"
    shared = False

    def __init__(self, config: ModelConfig) -> None:
        if isinstance(config, ModelConfig) and config.layers < 2:
            raise ValueError(
                f"layers must be at least 2 for {self.name}, got {config.layers}: tokens read the memory that the "
                "layer before has updated; with one layer use memory_transformer, which is the same then"
            )
        super().__init__(config, 1 if self.shared else config.layers - 1)
        self.token_layout = SegmentLayout.memory_transformer(config.tokens, config.memory).last(config.tokens)

    def layer(self, number: int, memory: Tensor, tokens: Tensor, counts: Tensor | None) -> tuple[Tensor, Tensor]:
        """Both from the same rows."""
        x = torch.cat([memory, tokens], dim=1)
        if number < self.config.layers - 1:
            memory = self.memory_layers[0 if self.shared else number](memory, x, self.memory_layout, counts)
        return memory, self.token_layers[number](tokens, x, self.token_layout, counts)


class MemCtrlShared(MemCtrl):
    """MemCtrl with one memory layer for all depths ("shared" in the paper's tables)."""

    name = "mem_ctrl_shared"
    shared = True


class MemBottleneck(_TwoLayers):
    """MemBottleneck: tokens see nothing but the memory, not even themselves (their residual aside).

    ``memory' = memory_layer(memory sees [memory | tokens])``, then ``tokens' = token_layer(tokens see memory')``.
    """

    name = "mem_bottleneck"

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, config.layers)
        self.token_layout = SegmentLayout.memory_bottleneck(config.tokens, config.memory, step="read")

    def layer(self, number: int, memory: Tensor, tokens: Tensor, counts: Tensor | None) -> tuple[Tensor, Tensor]:
        """The memory, then the tokens."""
        memory = self.memory_layers[number](memory, torch.cat([memory, tokens], dim=1), self.memory_layout, counts)
        return memory, self.token_layers[number](tokens, memory, self.token_layout, counts)
