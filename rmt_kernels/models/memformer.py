"""Memformer (arXiv 2010.06891): an encoder that reads a few memory slots, a slot-wise write, and a decoder.

The encoder reads segment s from both sides, and the slots, in every layer. The write makes the next slots of its last
hidden rows. The decoder sees the encoder's rows and, causally, the segment's tokens shifted right by one behind a
trained first row; its row i predicts position i.

What is to be predicted never enters as input: a task leaves a placeholder in the ids of an answer's rows, answers are
predicted in parallel, and evaluation computes what training does. (The paper feeds the decoder the true answer so far.)
Where ids hold their own labels, as in language modelling, the encoder sees them; that needs a causal system.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rmt_kernels.attention import segment_attention
from rmt_kernels.layout import Rule, SegmentLayout
from rmt_kernels.models.blocks import ModelConfig, SegmentModel, ends
from rmt_kernels.models.memory_transformer import Attend, Feed

__all__ = ["Decoder", "Memformer", "Places", "Write"]


class Places(nn.Module):
    """Trained positions of a segment's tokens, and dropout."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.randn(config.tokens, config.width) * config.width**-0.5)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, T, width) to the same."""
        return self.dropout(tokens + self.places)  # type: ignore[no-any-return]


def last_norm(config: ModelConfig) -> nn.Module:
    """What follows the layers: a norm where they have theirs in front."""
    return nn.LayerNorm(config.width) if config.norm == "pre" else nn.Identity()


def full(tokens: int) -> SegmentLayout:
    """Tokens that see all tokens."""
    return SegmentLayout(tokens=tokens, rules={("tokens", "tokens"): Rule.FULL}, name="full")


class EncoderLayer(nn.Module):
    """Self-attention, then the read, a cross-attention from tokens to slots, then feed-forward."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attend, self.read, self.feed = Attend(config), Attend(config), Feed(config)
        self.own = full(config.tokens)
        self.slots = SegmentLayout.memformer_read(config.tokens, config.memory)

    def forward(self, tokens: Tensor, memory: Tensor, counts: Tensor | None) -> Tensor:
        """Tokens (batch, T, width) that see themselves and the slots (batch, M, width)."""
        tokens = self.attend(tokens, tokens, self.own, counts)
        return self.feed(self.read(tokens, memory, self.slots, counts))  # type: ignore[no-any-return]


class Write(nn.Module):
    """Slot attention (section 3.3 of the paper): a slot sees the segment's tokens and itself, no other slot.

    Scores are divided by ``sqrt(head_dim) * temperature``. Values are the projected tokens and the slot itself, not
    projected, and nothing follows, so that a slot can keep what it has; no dropout, for the same reason.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.backend = config.heads, config.backend
        self.query, self.key, self.value = (nn.Linear(config.width, config.width, bias=False) for _ in range(3))
        # A slot has norm 1, a token's row that of its width: so slots ask for different tokens from the start, and what
        # they are given is as large as what they have.
        nn.init.normal_(self.query.weight)
        nn.init.normal_(self.value.weight, std=1 / config.width)
        self.scale = 1 / ((config.width // config.heads) ** 0.5 * config.temperature)
        self.layout = SegmentLayout.memformer_write(config.tokens, config.memory)

    def forward(self, memory: Tensor, tokens: Tensor, counts: Tensor | None) -> Tensor:
        """Slots (batch, M, width) and tokens (batch, T, width) to ``m'`` (batch, M, width)."""
        keys = self.key(torch.cat([tokens, memory], dim=1))
        values = torch.cat([self.value(tokens), memory], dim=1)
        query, key, value = (
            rows.unflatten(-1, (self.heads, -1)).transpose(1, 2) for rows in (self.query(memory), keys, values)
        )
        mixed = segment_attention(
            query, key, value, self.layout, scale=self.scale, token_lengths=counts, backend=self.backend
        )
        return mixed.transpose(1, 2).flatten(2)


class DecoderLayer(nn.Module):
    """Causal self-attention, cross-attention to what the encoder gives, feed-forward."""

    def __init__(self, config: ModelConfig, seen: SegmentLayout) -> None:
        super().__init__()
        self.attend, self.read, self.feed = Attend(config), Attend(config), Feed(config)
        self.own, self.seen = SegmentLayout.causal(config.tokens, 0), seen

    def forward(self, rows: Tensor, encoded: Tensor, counts: Tensor | None) -> Tensor:
        """Rows (batch, T, width) that see those before them, and the encoder's."""
        rows = self.attend(rows, rows, self.own, counts)
        return self.feed(self.read(rows, encoded, self.seen, counts))  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """As many layers as the encoder has, over the segment's tokens shifted right by one.

    Args:
        config: see :class:`ModelConfig`.
        seen: layout of the cross-attention: queries TOKENS, keys the encoder's rows.
    """

    def __init__(self, config: ModelConfig, seen: SegmentLayout) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(config.width) * config.width**-0.5)
        self.places = Places(config)
        self.layers = nn.ModuleList(DecoderLayer(config, seen) for _ in range(config.layers))
        self.norm = last_norm(config)

    def forward(self, tokens: Tensor, encoded: Tensor, counts: Tensor | None) -> Tensor:
        """Embedded tokens (batch, T, width) and the encoder's rows to hidden rows (batch, T, width)."""
        first = self.first.to(tokens.dtype).expand(len(tokens), 1, -1)
        rows = self.places(torch.cat([first, tokens[:, :-1]], dim=1))
        for layer in self.layers:
            rows = layer(rows, encoded, counts)
        return self.norm(rows)  # type: ignore[no-any-return]


class Memformer(SegmentModel):
    """Memformer: ``layers`` encoder layers and as many decoder layers.

    Forgetting (biased memory normalisation): with m' from :class:`Write`, ``m <- (m' + b) / ||m' + b||`` for each slot,
    b trained; the first slots are ``b / ||b||``. The state is the slots m, (batch, M, width), of norm 1.
    """

    name = "memformer"
    causal = False
    uses = ("memory", "temperature", "bptt")
    needs = ("memory",)

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.embed, self.head = ends(config)
        self.places = Places(config)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.layers))
        self.norm = last_norm(config)
        self.write = Write(config)
        # Its length is the speed of forgetting, so it starts short.
        self.bias = nn.Parameter(0.02 * torch.randn(config.memory, config.width))
        self.decoder = Decoder(config, full(config.tokens))

    def start(self, batch: int) -> Tensor:
        """The first slots (batch, M, width)."""
        return F.normalize(self.bias, dim=-1).expand(batch, -1, -1)

    def step(self, ids: Tensor, counts: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
        """One segment, see :class:`SegmentModel`."""
        embedded = self.embed(ids)
        tokens = self.places(embedded)
        for layer in self.layers:
            tokens = layer(tokens, state, counts)
        tokens = self.norm(tokens)
        slots = F.normalize(self.write(state, tokens, counts) + self.bias, dim=-1)
        return self.decoder(embedded, tokens, counts), slots
