"""Transformer-XL (arXiv 1901.02860), and RMT on Transformer-XL (arXiv 2207.06881).

Each layer keeps the last C rows that it was given in the previous segment, detached, and computes their keys and values
again. With memory those are rows of ``[READ | TOKENS | WRITE]``; memory is gone back through, the cache is not.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rmt_kernels.layout import SegmentLayout
from rmt_kernels.models.blocks import Distances, Layer, ModelConfig, SegmentModel, ends, kept

__all__ = ["RMTTransformerXL", "TransformerXL"]


class TransformerXL(SegmentModel):
    """The baseline: causal tokens over a cache.

    State: ``(memory or (), caches, starts or ())``: memory (batch, M, width); a cache for each layer, (batch, held,
    width), where held grows from 0 to C; and, once samples differ in length, int32 (batch,) starts: rows of the caches
    before them are padding. Embeddings are multiplied by sqrt(width), as published; u, v and r are each layer's own.
    """

    name = "transformer_xl"
    uses: ClassVar[tuple[str, ...]] = ("cache", "same_length", "relative", "bptt")
    needs: ClassVar[tuple[str, ...]] = ("cache",)
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {"positions": ("relative", "alibi", "bias")}

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        if config.same_length and not config.cache:
            raise ValueError("same_length: a token sees the last `cache` keys, and cache is 0; leave it at False")
        self.embed, self.head = ends(config, bias=True)
        positions, most = self.choice("positions"), config.cache + config.tokens + 2 * config.memory
        self.layers = nn.ModuleList(
            Layer(config, bias=False, scores=Distances(config, positions, most)) for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(config.width) if config.norm == "pre" else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)
        self.initial_memory = nn.Parameter(torch.randn(config.memory, config.width)) if config.memory else None

    def start(self, batch: int) -> Any:
        """Initial memory and caches of no rows."""
        memory = () if self.initial_memory is None else self.initial_memory.expand(batch, -1, -1)
        empty = self.embed.weight.new_zeros(batch, 0, self.config.width)
        return memory, (empty,) * self.config.layers, ()

    def step(self, ids: Tensor, counts: Tensor | None, state: Any) -> tuple[Tensor, Any]:
        """See :class:`SegmentModel`."""
        memory, caches, starts = state
        held = caches[0].shape[1]
        x = self.embed(ids) * self.config.width**0.5
        if self.initial_memory is not None:
            rows = memory.to(x.dtype)
            x = torch.cat([rows, x, rows], dim=1)
        x, layout, inputs = self.dropout(x), _layout(self.config, held), []
        for layer, cache in zip(self.layers, caches, strict=True):
            inputs.append(x)
            x = layer(
                x, layout, token_lengths=counts, cache=cache if held else None,
                cache_starts=starts if held and isinstance(starts, Tensor) else None,
            )  # fmt: skip
        x = self.dropout(self.norm(x))
        hidden = x[:, layout.read : layout.read + layout.tokens]
        if self.initial_memory is not None:
            memory = kept(x[:, -layout.write :].to(memory.dtype), memory, counts)
        return hidden, (memory, *self._caches(caches, starts, inputs, counts))

    def hand_on(self, new: Any, old: Any, counts: Tensor | None) -> Any:
        """``new``: :meth:`step` keeps the state of samples without tokens itself."""
        return new

    @torch.no_grad()
    def _caches(self, caches: Any, starts: Any, inputs: list[Tensor], counts: Tensor | None) -> tuple[Any, Any]:
        """The last C rows of [caches | inputs] that are no padding, and where they start."""
        batch, held, _ = caches[0].shape
        rows, memory, tokens = inputs[0].shape[1], self.config.memory, self.config.tokens
        size = min(self.config.cache, held + rows)
        if counts is None:
            if isinstance(starts, Tensor):
                starts = (starts - (held + rows - size)).clamp(min=0)
            if size <= rows:
                return tuple(x[:, rows - size :].clone() for x in inputs), starts
            return tuple(
                torch.cat([old[:, held + rows - size :], x], dim=1) for old, x in zip(caches, inputs, strict=True)
            ), starts
        # Padding is left out: output row p is the (size - 1 - p)-th last row that is none.
        device = counts.device
        if not isinstance(starts, Tensor):
            starts = torch.zeros(batch, dtype=torch.int32, device=device)
        counts = counts.long().clamp(min=0)
        fresh = torch.where(counts > 0, counts + 2 * memory, 0)[:, None]
        back = torch.arange(size - 1, -1, -1, device=device)
        new = fresh - 1 - back
        new = held + torch.where(new < memory + counts[:, None], new, new + (tokens - counts[:, None]))
        index = torch.where(back < fresh, new, held - 1 - (back - fresh)).clamp(min=0)[..., None]
        starts = (size - fresh[:, 0] - (held - starts)).clamp(min=0).to(torch.int32)
        joined = (torch.cat([old, x], dim=1) for old, x in zip(caches, inputs, strict=True))
        return tuple(x.gather(1, index.expand(-1, -1, x.shape[2])) for x in joined), starts

    def check_memory(self, memory: Any, like: Any) -> None:
        """See :class:`SegmentModel`; caches may hold up to C rows."""
        try:
            _, caches, starts = memory
            held = caches[0].shape[1]
        except (TypeError, ValueError, AttributeError, IndexError) as error:
            raise ValueError(f"memory must be what {self.name} returned: (memory, caches, starts)") from error
        if held > self.config.cache:
            raise ValueError(f"memory must hold caches of at most {self.config.cache} rows, got {held}")
        first, empty, _ = like
        wanted = tuple(cache.new_zeros(len(cache), held, self.config.width) for cache in empty)
        where = empty[0].new_zeros(len(empty[0]), dtype=torch.int32) if isinstance(starts, Tensor) else ()
        super().check_memory(memory, (first, wanted, where))


class RMTTransformerXL(TransformerXL):
    """Transformer-XL with RMT's memory rows at both ends of each segment.

    ``config.cache`` may be 0: memory is then all that is handed on. ``config.read_cache``: memory rows see the cache.
    ``config.relative="shifted"`` is what the authors' checkpoints were trained with.
    """

    name = "rmt_transformer_xl"
    uses: ClassVar[tuple[str, ...]] = ("cache", "same_length", "relative", "bptt", "memory", "read_cache")
    needs: ClassVar[tuple[str, ...]] = ("memory",)


@lru_cache(maxsize=64)
def _made(tokens: int, cache: int, memory: int, read_cache: bool, window: int | None) -> SegmentLayout:
    return SegmentLayout.transformer_xl(tokens, cache, memory=memory, read_cache=read_cache, window=window)


def _layout(config: ModelConfig, held: int) -> SegmentLayout:
    window = config.cache if config.same_length else None
    return _made(config.tokens, held, config.memory, config.read_cache, window)
