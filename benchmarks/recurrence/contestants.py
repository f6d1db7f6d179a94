"""Ways of training on many segments: stock PyTorch's, and ours. Each turns tokens into a loss and gradients.

A contestant's step runs forward and backward and leaves the gradients in ``.grad``; there is no optimizer.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.recurrence.model import IGNORED, Subject
from rmt_kernels import Replay, replay_step
from rmt_kernels.recurrence import ReplayGraphs
from rmt_kernels.recurrence.chunks import without_value
from rmt_kernels.recurrence.wrapper import Stretch
from rmt_kernels.tape import Tape

__all__ = [
    "CONTESTANTS",
    "TRUNCATION",
    "Contestant",
    "attention_alone",
    "forward_alone",
    "plain_loss",
    "recomputation_alone",
]

Step = Callable[[Tensor], Tensor]  # tokens to the loss
Segment = Callable[..., tuple[Tensor, Tensor]]
TRUNCATION = 2  # segments that truncated back-propagation connects


@dataclass(frozen=True)
class Contestant:
    """``build(subject)`` gives its step. ``truncated``: it computes truncated gradients, not the full ones.

    ``keeps``: what it has allocated when a step is over belongs to what the step needs.
    """

    name: str
    label: str
    build: Callable[[Subject], Step]
    ours: bool = False
    truncated: bool = False
    keeps: bool = False


def plain_loss(subject: Subject, ids: Tensor, segment: Segment | None = None, cut: int | None = None) -> Tensor:
    """The mean next-token loss by a plain loop over segments, labels shifted across their borders.

    ``segment`` computes one segment as ``Weights.segment`` does. ``cut``: only the memories entering the last that many
    segments keep their gradient, as in truncated back-propagation.
    """
    weights, tokens = subject.weights, subject.sizes.tokens
    labels = F.pad(ids[:, 1:], (0, 1), value=IGNORED)
    memory = weights.start.expand(len(ids), -1, -1)
    total: Tensor | None = None
    pieces = list(zip(ids.split(tokens, dim=1), labels.split(tokens, dim=1), strict=True))
    for s, (piece, wanted) in enumerate(pieces):
        if cut is not None and 1 <= s <= len(pieces) - cut:
            memory = memory.detach()
        loss, memory = (segment or weights.segment)(piece, wanted, memory)
        total = loss if total is None else total + loss
    assert total is not None
    return total / (ids.numel() - len(ids))


# -- stock -------------------------------------------------------------------------------------------------------------


def _stock(make: Callable[[Subject], Segment]) -> Callable[[Subject], Step]:
    def build(subject: Subject) -> Step:
        segment = make(subject)

        def step(ids: Tensor) -> Tensor:
            with subject.precision():
                loss = plain_loss(subject, ids, segment)
            loss.backward()
            return loss.detach()

        return step

    return build


def _as_written(subject: Subject) -> Segment:
    return lambda *given: checkpoint(subject.weights.segment, *given, use_reentrant=False)  # type: ignore[no-any-return]


def _cloned(subject: Subject) -> Segment:
    """The memory is copied out of the hidden rows, which it would keep alive as a view of them."""

    def segment(*given: Any) -> tuple[Tensor, Tensor]:
        loss, memory = subject.weights.segment(*given)
        return loss, memory.clone()

    return lambda *given: checkpoint(segment, *given, use_reentrant=False)  # type: ignore[no-any-return]


def _by_layer(subject: Subject) -> Segment:
    def run(layer: Any, *given: Any) -> Tensor:
        return checkpoint(layer, *given, use_reentrant=False)  # type: ignore[no-any-return]

    return partial(subject.weights.segment, run=run)


# -- ours --------------------------------------------------------------------------------------------------------------


def _policy(bptt: Any) -> Callable[[Subject], Step]:
    def build(subject: Subject) -> Step:
        model = subject.recurrent(bptt)

        def step(ids: Tensor) -> Tensor:
            with subject.precision():
                loss = model(ids, labels=ids).loss
            loss.backward()
            return loss.detach()  # type: ignore[no-any-return]

        return step

    return build


def _driver(graphs: bool) -> Callable[[Subject], Step]:
    def build(subject: Subject) -> Step:
        model, captured = subject.recurrent(Replay()), ReplayGraphs() if graphs else None

        def step(ids: Tensor) -> Tensor:
            with subject.precision():
                loss = replay_step(model, ids, labels=ids, graphs=captured).loss
            if captured is not None and captured.reasons and subject.device.type == "cuda":
                raise RuntimeError(f"it ran without CUDA graphs: {'; '.join(captured.reasons)}")
            assert loss is not None
            return loss

        return step

    return build


CONTESTANTS = {
    contestant.name: contestant
    for contestant in (
        Contestant("loop", "full BPTT, plain loop", _stock(lambda subject: subject.weights.segment)),
        Contestant("full", 'full BPTT, bptt="full"', _policy("full"), ours=True),
        Contestant("layer", "checkpoint per layer", _stock(_by_layer)),
        Contestant("checkpoint", "checkpoint per segment", _stock(_as_written)),
        Contestant("checkpoint_clone", "checkpoint per segment, memory cloned", _stock(_cloned)),
        Contestant("truncated", f"truncated, k = {TRUNCATION} *", _policy(TRUNCATION), ours=True, truncated=True),
        Contestant("replay", "Replay()", _policy(Replay()), ours=True),
        Contestant("replay_keep4", "Replay(keep=4)", _policy(Replay(keep=4)), ours=True),
        Contestant(
            "replay_attention", 'Replay(recompute="except_attention")', _policy(Replay(recompute="except_attention")),
            ours=True,
        ),
        Contestant("replay_offload", "Replay(offload=True)", _policy(Replay(offload=True)), ours=True),
        Contestant("driver", "replay_step", _driver(graphs=False), ours=True),
        Contestant("driver_graphs", "replay_step, CUDA graphs", _driver(graphs=True), ours=True, keeps=True),
    )
}  # fmt: skip


# -- what a step is made of --------------------------------------------------------------------------------------------


def forward_alone(subject: Subject, ids: Tensor) -> Callable[[], object]:
    """The price of one more forward pass over all segments: no graph is recorded."""
    model = subject.recurrent("full")

    def run() -> object:
        with torch.no_grad(), subject.precision():
            return model(ids, labels=ids).loss

    return run


def recomputation_alone(subject: Subject, kept: bool) -> Callable[[], object]:
    """One segment run again with a graph, its attention computed or, ``kept``, taken from the pass before."""
    model, ids, tape = subject.recurrent(Replay()), subject.inputs(1), Tape()
    again = Stretch((model.batch(ids, labels=ids).call(0),), (False,))

    def run() -> object:
        with tape.replaying() if kept else nullcontext(), subject.precision(), without_value():
            return model(again)

    with tape.recording(), subject.precision():
        model(again)
    return run


def attention_alone(subject: Subject, segments: int) -> Callable[[], object]:
    """The attention calls of one forward pass over that many segments, and nothing else."""
    from rmt_kernels import segment_attention

    sizes, layout = subject.sizes, subject.sizes.layout
    dtype = subject.autocast or torch.float32
    shape = (sizes.layers, sizes.batch, layout.num_queries, 3, sizes.heads, sizes.width // sizes.heads)
    packed = torch.randn(shape, device=subject.device, dtype=dtype).permute(0, 3, 1, 4, 2, 5)

    def run() -> object:
        out = None
        with torch.no_grad():
            for _ in range(segments):
                for query, key, value in packed:
                    out = segment_attention(query, key, value, layout)
        return out

    return run
