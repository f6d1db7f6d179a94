"""The cases that tests and benchmarks share: the published sizes of recurrent-memory transformers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rmt_kernels import SegmentLayout

__all__ = ["LONG", "PUBLISHED", "TARGET", "Case", "Inputs", "find", "make_inputs", "of_length"]


@dataclass(frozen=True)
class Case:
    """The sizes of one attention call; the dtype is chosen where it is used.

    ``name`` identifies the case, ``source`` says whose sizes they are.
    """

    name: str
    layout: SegmentLayout
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    source: str

    @property
    def forward_flop(self) -> int:
        """Floating-point operations of one forward pass over the visible entries: two products, 2 each per entry."""
        return 4 * self.layout.visible() * self.head_dim * self.heads * self.batch

    @property
    def tokens(self) -> int:
        """TOKENS rows in the batch."""
        return self.batch * self.layout.tokens

    def score_bytes(self, dtype: torch.dtype) -> int:
        """What the scores would take as dense matrices, one per batch row and query head."""
        return self.batch * self.heads * self.layout.num_queries * self.layout.num_keys * dtype.itemsize


@dataclass(frozen=True)
class Inputs:
    """Leaves of one call: query (batch, heads, queries, head_dim); key, value (batch, kv_heads, keys, head_dim);
    grad, the gradient of the result, shaped like query."""

    query: Tensor
    key: Tensor
    value: Tensor
    grad: Tensor


def make_inputs(
    case: Case, dtype: torch.dtype, *, requires_grad: bool = False, seed: int = 0, device: torch.device | str = "cpu"
) -> Inputs:
    """Standard normal inputs, drawn in float32 and rounded to ``dtype``: the same for every dtype up to rounding.

    They are drawn on ``device``, so a CPU and a GPU do not get the same ones.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def draw(heads: int, rows: int) -> Tensor:
        return torch.randn(case.batch, heads, rows, case.head_dim, generator=generator, device=device).to(dtype)

    queries, keys = case.layout.num_queries, case.layout.num_keys
    query, key, value = draw(case.heads, queries), draw(case.kv_heads, keys), draw(case.kv_heads, keys)
    grad = draw(case.heads, queries)
    for leaf in (query, key, value):
        leaf.requires_grad_(requires_grad)
    return Inputs(query, key, value, grad)


def of_length(tokens: int, *, memory: int = 16, heads: int = 12) -> Case:
    """A case of the length sweep: batch 1, 64 per head, the paper's decoder mask."""
    layout = SegmentLayout.rmt_decoder(tokens, memory)
    return Case(f"rmt_decoder_{tokens}", layout, 1, heads, heads, 64, "length sweep, GPT-2's heads")


_WIKITEXT = "Transformer-XL base on WikiText-103 (arXiv 2207.06881): 10 heads x 41, batch 60"
_GPT2 = "RMT around GPT-2 (the authors' Hugging Face wrapper): 12 heads x 64"
_MEMFORMER = "Memformer (arXiv 2010.06891): 32 slots; 12 heads x 64"
_MEMORY_TRANSFORMER = "Memory Transformer (arXiv 2006.11527): Transformer base, 8 heads x 64, memory 10 or 20"

TARGET = Case("target", SegmentLayout.rmt_decoder(1024, 16), 1, 12, 12, 64, "the case the speed targets are stated for")
PUBLISHED: tuple[Case, ...] = (
    Case("rmt_wikitext103", SegmentLayout.rmt_decoder(150, 10), 60, 10, 10, 41, _WIKITEXT),
    Case(
        "rmt_synthetic", SegmentLayout.rmt_decoder(120, 10), 32, 4, 4, 32,
        "RMT on copy, reverse and retrieval (arXiv 2207.06881): 4 heads x 32",
    ),
    Case(
        "rmt_bert", SegmentLayout.rmt_encoder(502, 10), 1, 12, 12, 64,
        "RMT around BERT base (arXiv 2304.11062): 499 text tokens, CLS, 2 SEP, 10 memory rows",
    ),
    Case("rmt_gpt2_512", SegmentLayout.rmt_decoder(512, 16), 1, 12, 12, 64, _GPT2 + ", with the paper's mask"),
    Case("causal_gpt2_512", SegmentLayout.causal(512, 16), 1, 12, 12, 64, _GPT2),
    Case("rmt_gpt2_1024", SegmentLayout.rmt_decoder(1024, 16), 1, 12, 12, 64, _GPT2 + ", with the paper's mask"),
    Case("causal_gpt2_1024", SegmentLayout.causal(1024, 16), 1, 12, 12, 64, _GPT2),
    Case(
        "rmt_llama1b", SegmentLayout.rmt_decoder(1024, 128), 1, 32, 8, 64,
        "RMT around Llama 3.2 1B: 32 query heads, 8 key/value heads x 64, 128 memory rows",
    ),
    Case("transformer_xl", SegmentLayout.transformer_xl(150, 150), 60, 10, 10, 41, _WIKITEXT),
    Case("transformer_xl_memory", SegmentLayout.transformer_xl(150, 150, memory=10), 60, 10, 10, 41, _WIKITEXT),
    Case(
        "transformer_xl_same_length", SegmentLayout.transformer_xl(150, 150, window=150), 60, 10, 10, 41, _WIKITEXT
    ),
    Case("memory_transformer", SegmentLayout.memory_transformer(128, 20), 32, 8, 8, 64, _MEMORY_TRANSFORMER),
    Case(
        "bottleneck_write", SegmentLayout.memory_bottleneck(128, 10, step="write"), 32, 8, 8, 64, _MEMORY_TRANSFORMER
    ),
    Case("bottleneck_read", SegmentLayout.memory_bottleneck(128, 10, step="read"), 32, 8, 8, 64, _MEMORY_TRANSFORMER),
    Case("memformer_read", SegmentLayout.memformer_read(512, 32), 8, 12, 12, 64, _MEMFORMER),
    Case("memformer_write", SegmentLayout.memformer_write(512, 32), 8, 12, 12, 64, _MEMFORMER),
    Case("membart", SegmentLayout.membart(512, 32), 4, 12, 12, 64, "MemBART, the Memformer authors' code: BART base"),
)  # fmt: skip
# Long enough for a matrix of scores to hurt.
LONG = Case("rmt_decoder_16384", SegmentLayout.rmt_decoder(16384, 16), 1, 12, 12, 64, "memory at length 16,384")


def find(name: str) -> Case:
    """The case called ``name``."""
    cases = {case.name: case for case in (*PUBLISHED, TARGET, LONG)}
    if name not in cases:
        raise ValueError(f"name: unknown case {name!r}; accepted: {sorted(cases)}")
    return cases[name]
