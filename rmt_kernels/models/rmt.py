"""Recurrent Memory Transformer: decoder (arXiv 2207.06881), encoder (arXiv 2304.11062), and the same without memory.

Segment s is ``[memory_s | tokens_s | memory_s]`` (encoder: ``[memory_s | tokens_s]``); the hidden states of its last
memory rows are ``memory_{s+1}``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rmt_kernels.layout import SegmentLayout
from rmt_kernels.models.blocks import ModelConfig, SegmentModel, Stack, ends
from rmt_kernels.models.config import POSITIONS
from rmt_kernels.recurrence.losses import TokenLoss
from rmt_kernels.recurrence.segments import Segments
from rmt_kernels.recurrence.wrapper import RecurrentMemory, RecurrentOutput

__all__ = ["RMT", "NoMemory", "RMTEncoder"]

_LAYOUTS: dict[str, Callable[[int, int], SegmentLayout]] = {
    "rmt_decoder": SegmentLayout.rmt_decoder,
    "causal": SegmentLayout.causal,
}


class NoMemory(SegmentModel):
    """The decoder of :class:`RMT` without memory rows: every segment alone."""

    name, recurrent = "none", False
    uses: ClassVar[tuple[str, ...]] = ("relative",)
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {"positions": POSITIONS}

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.layout = SegmentLayout.rmt_decoder(config.tokens, 0)
        self.embed, self.head = ends(config)
        self.backbone = Stack(config, config.tokens, self.choice("positions"))

    def step(self, ids: Tensor, counts: Tensor | None, state: Any) -> tuple[Tensor, Any]:
        """See :class:`SegmentModel`."""
        return self.backbone(self.embed(ids), layout=self.layout, token_lengths=counts), state


class RMT(SegmentModel):
    """The decoder. ``config.layout`` says which of the two masks in use it has, see ``SegmentLayout``.

    The memory starts as trained rows, drawn with the standard deviation of the embedding's weights.
    """

    name = "rmt"
    uses: ClassVar[tuple[str, ...]] = ("memory", "relative", "bptt")
    needs: ClassVar[tuple[str, ...]] = ("memory",)
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {"layout": tuple(_LAYOUTS), "positions": POSITIONS}

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        embed, head = ends(config)
        rows = config.tokens + 2 * config.memory
        self.recurrence = RecurrentMemory(
            Stack(config, rows, self.choice("positions")), memory=config.memory, segment=config.tokens,
            layout=_LAYOUTS[self.choice("layout")], embed=embed, head=head, loss=TokenLoss(shift=False),
            bptt=config.bptt,
        )  # fmt: skip

    def read(
        self, ids: Tensor, targets: Tensor | None, segments: Segments, memory: Any, outputs: str | None
    ) -> RecurrentOutput:
        """See :class:`SegmentModel`."""
        found: RecurrentOutput = self.recurrence(
            ids, labels=targets, lengths=segments.lengths, memory=memory, outputs=outputs
        )
        return found


class RMTEncoder(RMT):
    """The encoder: every row sees every row. A sample's first segment is the short one.

    A segment of the paper is ``[CLS | memory | SEP | tokens | SEP]``; here the rows are
    ``[memory | CLS SEP SEP | tokens]``, at the positions that they have there.
    """

    name, causal, align = "rmt_encoder", False, "right"
    uses: ClassVar[tuple[str, ...]] = ("memory", "bptt")
    needs: ClassVar[tuple[str, ...]] = ("memory",)
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {"positions": ("learned", "none")}

    def __init__(self, config: ModelConfig) -> None:
        SegmentModel.__init__(self, config)
        embed, head = ends(config)
        self.recurrence = RecurrentMemory(
            EncoderStack(config, self.choice("positions")), memory=config.memory, segment=config.tokens,
            layout=SegmentLayout.rmt_encoder, embed=embed, head=head, align=self.align, loss=TokenLoss(shift=False),
            prefix=torch.zeros(3, config.width), bptt=config.bptt,
        )  # fmt: skip


class EncoderStack(Stack):
    """A stack that is given zeros for CLS and the SEPs, and puts its own trained rows there."""

    def __init__(self, config: ModelConfig, positions: str) -> None:
        super().__init__(config, config.memory + 3 + config.tokens, positions)
        self.memory = config.memory
        self.marks = nn.Parameter(torch.empty(2, config.width))  # CLS, SEP
        nn.init.normal_(self.marks, std=config.width**-0.5)

    def place(self, x: Tensor, token_lengths: Tensor | None) -> Tensor:
        """See :class:`Stack`; token_lengths count CLS and SEPs."""
        m, tokens = self.memory, x.shape[1] - self.memory - 3
        x = x + F.pad(self.marks[[0, 1, 1]], (0, 0, m, tokens))
        if self.places is None:
            return x
        # The last SEP follows the tokens, as many as there are.
        if token_lengths is None:
            closing = self.places[m + 2 + tokens].expand(len(x), 1, -1)
        else:
            closing = self.places[(token_lengths.long() - 1 + m).clamp(min=0)][:, None]
        before = torch.cat([self.places[1 : m + 1], self.places[:1], self.places[m + 1 : m + 2]]).expand(len(x), -1, -1)
        after = self.places[m + 2 : m + 2 + tokens].expand(len(x), -1, -1)
        return x + torch.cat([before, closing, after], dim=1)
