"""The models that are measured: random weights, the same for every contestant."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.recurrence.model import Learner
from rmt_kernels import SegmentLayout
from rmt_kernels.integrations.transformers import RMTForCausalLM
from rmt_kernels.integrations.transformers.activations import in_one_kernel

__all__ = ["EXACT", "OURS", "SHAPES", "Shape", "Subject"]

OURS, EXACT = "ours", "dense_softmax"  # beside the names of transformers' attention
_KINDS = {"gpt2": GPT2LMHeadModel, "llama": LlamaForCausalLM}
_CHECKED_HEADS, _CHECKED_SEGMENT, _CHECKED_VOCABULARY = 4, 48, 211


def _dense(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor,
    scaling: float | None = None, **others: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Two products and a softmax. Not transformers' "eager", which adds a causal mask of its own in some versions."""
    key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (key, value))
    scores = query @ key.mT * (scaling or query.shape[-1] ** -0.5) + attention_mask
    return (scores.softmax(-1) @ value).transpose(1, 2), None


AttentionInterface.register(EXACT, _dense)


@dataclass(frozen=True)
class Shape:
    """Sizes of a model and of its segments, ``[memory | segment | memory]`` rows."""

    name: str
    kind: str  # "gpt2" or "llama"
    layers: int
    width: int
    heads: int
    kv_heads: int
    inner: int
    vocabulary: int
    segment: int = 512
    memory: int = 16

    @property
    def spread(self) -> float:
        """Standard deviation of the weights: so large that a row depends on all that it sees, or no check would find
        what is wrong with it."""
        return 1.5 / math.sqrt(self.width)

    @property
    def gelu(self) -> bool:
        """Whether its activation is a tanh GELU, written out."""
        return self.kind == "gpt2"

    @property
    def layout(self) -> SegmentLayout:
        """The paper's (arXiv 2207.06881)."""
        return SegmentLayout.rmt_decoder(self.segment, self.memory)

    def small(self) -> Shape:
        """The same in little, for what is compared in float64."""
        heads = min(self.heads, _CHECKED_HEADS)
        width = self.width // self.heads * heads
        return replace(
            self, layers=min(self.layers, 2), width=width, heads=heads,
            kv_heads=max(1, heads * self.kv_heads // self.heads), inner=min(self.inner, 4 * width),
            vocabulary=min(self.vocabulary, _CHECKED_VOCABULARY), segment=min(self.segment, _CHECKED_SEGMENT),
            memory=min(self.memory, 8),
        )  # fmt: skip

    def config(self) -> Any:
        """Without dropout, so that contestants can be compared, and without tokens that end a text."""
        rows = max(1024, self.layout.num_queries)
        if self.kind == "gpt2":
            return GPT2Config(
                vocab_size=self.vocabulary, n_positions=rows, n_embd=self.width, n_layer=self.layers,
                n_head=self.heads, n_inner=self.inner, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
                bos_token_id=None, eos_token_id=None, initializer_range=self.spread,
            )  # fmt: skip
        return LlamaConfig(
            vocab_size=self.vocabulary, hidden_size=self.width, intermediate_size=self.inner,
            num_hidden_layers=self.layers, num_attention_heads=self.heads, num_key_value_heads=self.kv_heads,
            max_position_embeddings=rows, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None,
            initializer_range=self.spread,
        )  # fmt: skip


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("gpt2-small", "gpt2", 12, 768, 12, 12, 3072, 50257),
        Shape("llama-1b", "llama", 16, 2048, 32, 8, 8192, 128256),
        Shape("llama-reduced", "llama", 4, 1024, 16, 4, 4096, 32000),
        Shape("gpt2-tiny", "gpt2", 2, 128, 2, 2, 512, 2048, segment=64, memory=8),
        Shape("llama-tiny", "llama", 2, 128, 4, 2, 256, 2048, segment=64, memory=8),
    )
}


class Subject(Learner):
    """One model with one kind of attention: ``"sdpa"`` with a dense mask, ``OURS``, or ``EXACT``, for what is right.

    Subjects of one shape have the same weights, rounded to ``weights`` before they are brought to ``dtype``.

    Args:
        gelu: a tanh GELU is computed in one kernel, as it always is in ``OURS``.
        compiled: the base model is compiled with ``mode="reduce-overhead"``, on a GPU CUDA graphs.
    """

    def __init__(
        self, shape: Shape, attention: str, dtype: torch.dtype, device: torch.device | str = "cpu", *,
        weights: torch.dtype | None = None, gelu: bool = False, compiled: bool = False,
    ) -> None:  # fmt: skip
        self.shape, self.dtype, self.device = shape, dtype, torch.device(device)
        with torch.random.fork_rng(devices=[]), self.device:
            torch.manual_seed(0)
            base: PreTrainedModel = _KINDS[shape.kind](shape.config())
            memory = torch.empty(shape.memory, shape.width).normal_(std=shape.spread)
        memory = memory.to(weights or dtype).to(dtype)
        for rounded in (weights or dtype, dtype):
            nn.Module.to(base, rounded)
        self.rmt: RMTForCausalLM | None = None
        if attention == OURS:
            self.rmt = RMTForCausalLM.from_base(base, memory=shape.memory, segment=shape.segment)
            with torch.no_grad():
                self.rmt.initial_memory.copy_(memory)
            self.memory = self.rmt.initial_memory
        else:
            base.set_attn_implementation(attention)
            if gelu:
                in_one_kernel(base)
            self.memory = nn.Parameter(memory)
        self.lm = base
        seen = shape.layout.dense_mask().to(self.device)
        mask = torch.zeros(seen.shape, dtype=dtype, device=self.device)
        self.mask = mask.masked_fill(~seen, torch.finfo(dtype).min)[None, None]
        self.parameters = {"memory": self.memory, **dict(base.named_parameters())}
        if compiled:
            base.base_model.compile(mode="reduce-overhead")

    def train(self, training: bool) -> None:
        """As ``nn.Module.train``."""
        (self.lm if self.rmt is None else self.rmt).train(training)

    def inputs(self, segments: int, seed: int = 0) -> Tensor:
        """Random tokens, int64 (1, segments * segment)."""
        generator = torch.Generator().manual_seed(seed)
        shape = (1, segments * self.shape.segment)
        return torch.randint(self.shape.vocabulary, shape, generator=generator).to(self.device)

    def embed(self, ids: Tensor) -> Tensor:
        """Rows of tokens, (batch, n, width)."""
        rows: Tensor = self.lm.get_input_embeddings()(ids)
        return rows

    def rows(self, rows: Tensor) -> Tensor:
        """Hidden states of the first rows of a segment, (batch, n, width), with the dense mask."""
        n = rows.shape[1]
        found = self.lm.base_model(inputs_embeds=rows, attention_mask=self.mask[:, :, :n, :n], use_cache=False)
        hidden: Tensor = found.last_hidden_state
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """The output layer alone."""
        head: Any = self.lm.get_output_embeddings()
        found: Tensor = head(hidden)
        return found
