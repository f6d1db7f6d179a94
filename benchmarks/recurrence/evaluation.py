"""Reading very long inputs in evaluation: memory must stay constant, time must grow linearly.

The model is the encoder of arXiv 2304.11062, small: 10 memory rows, 499 tokens a segment behind CLS and two SEP,
aligned right. 4,096 segments are the paper's 2,043,904 tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import interleave, spread
from benchmarks.recurrence.memory import weigh
from benchmarks.recurrence.model import Backbone
from rmt_kernels import RecurrentMemory, SegmentLayout
from rmt_kernels.recurrence import SampleLoss

__all__ = ["Reader", "evaluate"]

_PREFIX = (0, 1, 1)  # CLS and both SEP, which come first
_CLASSES = 2


@dataclass(frozen=True)
class Reader:
    """Sizes of the model that reads."""

    width: int = 128
    heads: int = 4
    layers: int = 2
    vocabulary: int = 1000
    tokens: int = 499  # of a segment
    memory: int = 10

    def build(self, device: torch.device) -> RecurrentMemory:
        """The model, in evaluation."""
        rows = self.memory + len(_PREFIX) + self.tokens
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = RecurrentMemory(
                Backbone(rows, self.width, self.heads, self.layers), memory=self.memory, segment=self.tokens,
                layout=SegmentLayout.rmt_encoder, embed=nn.Embedding(self.vocabulary, self.width),
                head=nn.Linear(self.width, _CLASSES), loss=SampleLoss(row=0), align="right", prefix=_PREFIX,
            )  # fmt: skip
        return model.to(device).eval()

    def inputs(self, segments: int, device: torch.device) -> Tensor:
        """Random tokens, int64 (1, segments * tokens)."""
        generator = torch.Generator().manual_seed(segments)
        return torch.randint(self.vocabulary, (1, segments * self.tokens), generator=generator).to(device)


def evaluate(
    reader: Reader,
    counts: Sequence[int],
    device: torch.device,
    *,
    rounds: int,
    budget: float,
    synchronize: Callable[[], None] = lambda: None,
    tick: Callable[[], object] = lambda: None,
) -> list[dict[str, Any]]:
    """A record for each number of segments: peak bytes of one call beyond its inputs, and its seconds.

    The calls of all lengths take turns, ``rounds`` times or as often, at least once, as fit into ``budget`` seconds.
    """
    model = reader.build(device)
    labels = torch.zeros(1, dtype=torch.int64, device=device)
    inputs = {count: reader.inputs(count, device) for count in counts}

    def read(count: int) -> Any:
        with torch.no_grad():
            found = model(inputs[count], labels=labels)
        synchronize()
        return found

    records: list[dict[str, Any]] = []
    for count in counts:
        found = read(min(counts)) if count == min(counts) else None  # warm: libraries allocate on their first call
        peak = weigh(lambda count=count: read(count), (), device)  # type: ignore[misc]
        del found
        records.append({
            "segments": count, "tokens": count * reader.tokens, "peak_bytes": peak.total,
            "input_bytes": inputs[count].nbytes, "seconds": None, "rounds": [],
        })  # fmt: skip
        tick()
    steps = {str(count): lambda count=count: read(count) for count in counts}  # type: ignore[misc]
    seconds = interleave(steps, rounds=rounds, warmup=0.0, budget=budget, least=1, tick=tick)
    for record in records:
        record["rounds"] = seconds[str(record["segments"])]
        record["seconds"] = spread(record["rounds"])
    return records
