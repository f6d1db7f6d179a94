"""The model that all contestants train: a decoder of GPT-2's shape, and one set of weights for all of them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rmt_kernels import RecurrentMemory, SegmentLayout, segment_attention

__all__ = ["Backbone", "Layer", "Learner", "Sizes", "Subject", "Weights"]

IGNORED = -100  # the label of a row without one, cross entropy's default
_POSITIONS = 1024  # GPT-2's


@dataclass(frozen=True)
class Sizes:
    """A model and its segments; the defaults are GPT-2 small's width, two layers of it, reading bytes."""

    width: int = 768
    heads: int = 12
    layers: int = 2
    vocabulary: int = 256
    tokens: int = 512  # of a segment
    memory: int = 16
    batch: int = 1
    dropout: float = 0.0

    @property
    def layout(self) -> SegmentLayout:
        """The paper's decoder mask over ``[memory | tokens | memory]``."""
        return SegmentLayout.rmt_decoder(self.tokens, self.memory)

    @property
    def memory_bytes(self) -> int:
        """What one segment hands to the next: (batch, memory, width) in float32."""
        return self.batch * self.memory * self.width * 4


class Layer(nn.Module):
    """A pre-norm transformer layer; dropout on attention and on both residual branches."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, layout: SegmentLayout, token_lengths: Tensor | None) -> Tensor:
        """(batch, rows, width) to the same."""
        packed = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        query, key, value = packed.permute(2, 0, 3, 1, 4)  # (batch, heads, rows, head_dim), nothing copied
        attended = segment_attention(
            query, key, value, layout, token_lengths=token_lengths, dropout_p=self.dropout if self.training else 0.0
        )
        x = x + F.dropout(self.out(attended.transpose(1, 2).flatten(2)), self.dropout, self.training)
        return x + F.dropout(self.mlp(self.norm2(x)), self.dropout, self.training)


def _call(layer: nn.Module, *arguments: Any) -> Tensor:
    return layer(*arguments)  # type: ignore[no-any-return]


class Backbone(nn.Module):
    """Layers with learned positions over the rows of one segment."""

    def __init__(self, rows: int, width: int, heads: int, layers: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.positions = nn.Parameter(0.1 * torch.randn(max(rows, _POSITIONS), width))
        self.layers = nn.ModuleList(Layer(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(
        self,
        x: Tensor,
        *,
        layout: SegmentLayout,
        token_lengths: Tensor | None = None,
        run: Callable[..., Tensor] = _call,
    ) -> Tensor:
        """(batch, rows, width) to the same; ``run(layer, ...)`` calls a layer."""
        x = x + self.positions[: x.shape[1]]
        for layer in self.layers:
            x = run(layer, x, layout, token_lengths)
        return self.norm(x)  # type: ignore[no-any-return]


class Weights(nn.Module):
    """Everything that is trained."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.layout = sizes.layout
        self.embed = nn.Embedding(sizes.vocabulary, sizes.width)
        self.backbone = Backbone(self.layout.num_queries, sizes.width, sizes.heads, sizes.layers, sizes.dropout)
        self.head = nn.Linear(sizes.width, sizes.vocabulary)
        self.start = nn.Parameter(torch.randn(sizes.memory, sizes.width))

    def segment(
        self, ids: Tensor, labels: Tensor, memory: Tensor, run: Callable[..., Tensor] = _call
    ) -> tuple[Tensor, Tensor]:
        """The summed loss of one segment and the memory that leaves it, as stock code computes them."""
        rows = torch.cat([memory, self.embed(ids), memory], dim=1)
        hidden = self.backbone(rows, layout=self.layout, run=run)
        _, tokens, memory = hidden.split([self.layout.read, self.layout.tokens, self.layout.write], dim=1)
        logits = self.head(tokens).flatten(0, 1)
        return F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORED, reduction="sum"), memory


class Learner:
    """What has parameters."""

    parameters: dict[str, nn.Parameter]

    def forget_gradients(self) -> None:
        """As an optimizer does between steps."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def gradients(self) -> dict[str, Tensor]:
        """Copies of all gradients by name, zeros where a parameter has none."""
        return {
            name: torch.zeros_like(p) if p.grad is None else p.grad.detach().clone()
            for name, p in self.parameters.items()
        }


class Subject(Learner):
    """One model on one device, the same weights for every contestant.

    Args:
        sizes: of the model.
        device: where it is.
        autocast: the dtype of an autocast region around every forward pass; None: none.
        seed: of the weights.
    """

    def __init__(
        self,
        sizes: Sizes,
        device: torch.device | str = "cpu",
        autocast: torch.dtype | None = None,
        seed: int = 0,
        weights: Weights | None = None,
    ) -> None:
        self.sizes, self.device, self.autocast = sizes, torch.device(device), autocast
        if weights is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                weights = Weights(sizes)
        self.weights = weights.to(self.device)
        self.parameters = dict(self.weights.named_parameters())

    def weight_sizes(self) -> frozenset[int]:
        """Bytes of each weight matrix, and of its copy in autocast's dtype, that no activation has."""
        sizes, layout = self.sizes, self.sizes.layout
        dtypes = {torch.float32, self.autocast or torch.float32}
        matrices = [p.numel() for p in self.parameters.values() if p.dim() > 1 and p is not self.weights.start]
        rows = [layout.num_queries * sizes.width * times for times in (1, 3, 4)]  # hidden, packed, inside the MLP
        rows += [sizes.tokens * sizes.width, sizes.tokens * sizes.vocabulary, sizes.memory * sizes.width]
        activations = {sizes.batch * n * dtype.itemsize for n in rows for dtype in dtypes}
        return frozenset(n * dtype.itemsize for n in matrices for dtype in dtypes) - activations

    def without_autocast(self) -> Subject:
        """The same weights in float32 throughout."""
        return Subject(self.sizes, self.device, None, weights=self.weights)

    def precision(self) -> AbstractContextManager[Any]:
        """What every forward pass runs inside."""
        return nullcontext() if self.autocast is None else torch.autocast(self.device.type, dtype=self.autocast)

    def inputs(self, segments: int, seed: int = 1) -> Tensor:
        """Random tokens, int64 (batch, segments * tokens)."""
        generator = torch.Generator().manual_seed(seed)
        shape = (self.sizes.batch, segments * self.sizes.tokens)
        return torch.randint(self.sizes.vocabulary, shape, generator=generator).to(self.device)

    def recurrent(self, bptt: Any) -> RecurrentMemory:
        """Our wrapper around these weights, not copies of them."""
        sizes, weights = self.sizes, self.weights
        model = RecurrentMemory(
            weights.backbone, memory=sizes.memory, segment=sizes.tokens, bptt=bptt, embed=weights.embed,
            head=weights.head,
        )  # fmt: skip
        model.initial_memory = weights.start
        return model
