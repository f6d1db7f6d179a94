"""MemBART (arXiv 2209.07634), the Memformer authors' later system: memory rows inside the encoder's self-attention.

The memory is normed and goes through the encoder's layers beside the tokens, with weights of its own; a gate then
mixes what comes out with what went in. The decoder is that of :mod:`rmt_kernels.models.memformer`, which says what it
reads and why; it sees the new memory beside the encoder's tokens. With ``norm="post"`` the encoder is that of the
authors' code, without BART's norm of the embeddings.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rmt_kernels.attention import segment_attention
from rmt_kernels.layout import SegmentLayout
from rmt_kernels.models.blocks import Attention, ModelConfig, SegmentModel, ends
from rmt_kernels.models.memformer import Decoder, Places, last_norm
from rmt_kernels.models.memory_transformer import Feed

__all__ = ["Gate", "JointLayer", "MemBART", "Side"]


class Side(nn.Module):
    """What one kind of rows has of its own in a layer: projections, norms and feed-forward."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.pre = config.norm == "pre"
        self.attention, self.norm, self.feed = Attention(config), nn.LayerNorm(config.width), Feed(config)
        self.dropout = nn.Dropout(config.dropout)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows (batch, rows, width) to query, key and value, (batch, heads, rows, head_dim) each."""
        return self.attention.project(self.norm(x) if self.pre else x)

    def finish(self, x: Tensor, mixed: Tensor) -> Tensor:
        """The layer's rows, from those that entered it and what attention made of them, (batch, rows, width) both."""
        x = x + self.dropout(self.attention.out(mixed))
        return self.feed(x if self.pre else self.norm(x))  # type: ignore[no-any-return]


class JointLayer(nn.Module):
    """One attention over ``[memory | tokens]``: a memory row sees itself and the tokens, a token sees every row."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.memory, self.tokens = Side(config), Side(config)
        self.layout = SegmentLayout.membart(config.tokens, config.memory)
        self.dropout, self.backend = config.dropout, config.backend

    def forward(self, memory: Tensor, tokens: Tensor, counts: Tensor | None) -> tuple[Tensor, Tensor]:
        """Memory (batch, M, width) and tokens (batch, T, width) to the same."""
        parts = zip(self.memory.project(memory), self.tokens.project(tokens), strict=True)
        query, key, value = (torch.cat(part, dim=2) for part in parts)
        mixed = segment_attention(
            query, key, value, self.layout, token_lengths=counts, dropout_p=self.dropout if self.training else 0.0,
            backend=self.backend,
        ).transpose(1, 2).flatten(2)  # fmt: skip
        slots = memory.shape[1]
        return self.memory.finish(memory, mixed[:, :slots]), self.tokens.finish(tokens, mixed[:, slots:])


class Gate(nn.Module):
    """``alpha`` in (0, 1), one number a memory row: a feed-forward network with a sigmoid."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(config.width, config.width), nn.Linear(config.width, 1)
        self.activation, self.dropout = nn.GELU(), nn.Dropout(config.dropout)

    def forward(self, memory: Tensor) -> Tensor:
        """(batch, M, width) to (batch, M, 1)."""
        inner = self.activation(self.inner(self.dropout(memory)))
        return torch.sigmoid(self.out(self.dropout(inner)))


class MemBART(SegmentModel):
    """MemBART: ``layers`` encoder layers and as many decoder layers.

    ``M_s = norm(state + b)`` with b trained goes in, mem comes out of the last layer, and the next state is
    ``alpha * mem + (1 - alpha) * M_s`` with alpha from :class:`Gate`. The first state is 0. The state is
    (batch, M, width).
    """

    name = "membart"
    causal = False
    uses = ("memory", "bptt")
    needs = ("memory",)

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.embed, self.head = ends(config)
        self.places = Places(config)
        self.bias = nn.Parameter(0.02 * torch.randn(config.memory, config.width))
        self.entry = nn.LayerNorm(config.width)
        self.layers = nn.ModuleList(JointLayer(config) for _ in range(config.layers))
        self.norm, self.memory_norm = last_norm(config), last_norm(config)
        self.gate = Gate(config)
        self.decoder = Decoder(config, SegmentLayout.membart(config.tokens, config.memory).last(config.tokens))

    def start(self, batch: int) -> Tensor:
        """Zeros (batch, M, width)."""
        return torch.zeros_like(self.bias).expand(batch, -1, -1)

    def step(self, ids: Tensor, counts: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
        """One segment, see :class:`SegmentModel`."""
        embedded = self.embed(ids)
        entering = self.entry(state + self.bias)
        memory, tokens = entering, self.places(embedded)
        for layer in self.layers:
            memory, tokens = layer(memory, tokens, counts)
        memory, tokens = self.memory_norm(memory), self.norm(tokens)
        alpha = self.gate(memory)
        memory = alpha * memory + (1 - alpha) * entering
        return self.decoder(embedded, torch.cat([memory, tokens], dim=1), counts), memory
