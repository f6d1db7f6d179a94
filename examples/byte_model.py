"""A small recurrent language model over bytes, and the text that ships with Python to train it on."""

from __future__ import annotations

from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rmt_kernels import RecurrentMemory, Replay, SegmentLayout, segment_attention

__all__ = ["Layer", "make_model", "samples", "text"]


class Layer(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, layout: SegmentLayout) -> Tensor:
        """(batch, rows, width) to the same."""
        packed = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        query, key, value = packed.permute(2, 0, 3, 1, 4)  # (batch, heads, rows, head_dim)
        attended = segment_attention(query, key, value, layout)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + F.dropout(self.mlp(self.norm2(x)), 0.1, self.training)


class Backbone(nn.Module):
    """Layers over the rows ``[memory | tokens | memory]`` of one segment, with learned positions."""

    def __init__(self, rows: int, width: int, layers: int) -> None:
        super().__init__()
        self.positions = nn.Parameter(0.1 * torch.randn(rows, width))
        self.layers = nn.ModuleList(Layer(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, *, layout: SegmentLayout) -> Tensor:
        """(batch, rows, width) to the same."""
        x = x + self.positions
        for layer in self.layers:
            x = layer(x, layout)
        return self.norm(x)  # type: ignore[no-any-return]


def make_model(*, segment: int, memory: int, width: int, layers: int, full: bool = False) -> RecurrentMemory:
    """The same weights in every process. ``full``: keep every segment's activations in place of replaying them."""
    torch.manual_seed(0)
    return RecurrentMemory(
        Backbone(segment + 2 * memory, width, layers),
        memory=memory,
        segment=segment,
        bptt="full" if full else Replay(),
        embed=nn.Embedding(256, width),
        head=nn.Linear(width, 256),
    )


def text() -> Tensor:
    """Python's language documentation, uint8 (about 460,000,)."""
    return torch.frombuffer(bytearray("\n".join(topics[name] for name in sorted(topics)).encode()), dtype=torch.uint8)


def samples(data: Tensor, batch: int, length: int, number: int) -> Tensor:
    """``batch`` passages of ``length`` bytes, int64 (batch, length); each ``number`` draws others."""
    generator = torch.Generator().manual_seed(number)
    starts = torch.randint(len(data) - length, (batch, 1), generator=generator)
    return data[starts + torch.arange(length)].long()
