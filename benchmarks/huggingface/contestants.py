"""Ways of training on segments and of reading them: stock PyTorch's loops with dense masks, and ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.huggingface.models import OURS, Subject
from rmt_kernels import Replay, replay_step
from rmt_kernels.recurrence import ReplayGraphs
from rmt_kernels.recurrence.policies import to_plain

__all__ = ["READERS", "TRAINERS", "Contestant", "Step", "authors_loss", "authors_pass"]

Step = Callable[[Tensor], Tensor]  # tokens (batch, n) to a loss, with gradients in .grad; or to a memory
_IGNORED = -100


@dataclass(frozen=True)
class Contestant:
    """``build(subject)`` gives its step, of a subject with ``attention``.

    ``graphs``: for GPUs only. ``compiled``, ``gelu``: of a :class:`Subject` with that. ``keeps``: what it has allocated
    when a step is over belongs to what the step needs.
    """

    name: str
    label: str
    build: Callable[[Subject], Step]
    attention: str = "sdpa"
    graphs: bool = False
    compiled: bool = False
    gelu: bool = False
    keeps: bool = False


def _rmt(subject: Subject) -> Any:
    assert subject.rmt is not None
    return subject.rmt


# -- training, stock ---------------------------------------------------------------------------------------------------


def authors_pass(subject: Subject, ids: Tensor) -> tuple[Tensor, Tensor]:
    """As the authors' wrapper runs the segments: every row's logits in each, those of all tokens put together; and the
    memory. Everything stays connected."""
    memory, m, logits = subject.memory.expand(len(ids), -1, -1), subject.shape.memory, []
    for piece in ids.split(subject.shape.segment, dim=1):
        rows = torch.cat([memory, subject.embed(piece), memory], dim=1)
        out = subject.lm(inputs_embeds=rows, attention_mask=subject.mask, output_hidden_states=True, use_cache=False)
        logits.append(out.logits[:, m:-m])
        memory = out.hidden_states[-1][:, -m:]
    return torch.cat(logits, dim=1), memory


def authors_loss(subject: Subject, ids: Tensor) -> Tensor:
    """One loss of all segments' logits, in float32 as under the autocast that the authors train with."""
    predicted = authors_pass(subject, ids)[0][:, :-1].contiguous()
    wide = torch.promote_types(predicted.dtype, torch.float32)
    return F.cross_entropy(predicted.view(-1, predicted.shape[-1]).to(wide), ids[:, 1:].reshape(-1))


def _by_segment(subject: Subject, ids: Tensor, recompute: bool) -> Tensor:
    """The loss of each segment at once, of its tokens' rows alone; labels go over the borders all the same."""
    m = subject.shape.memory

    def one(piece: Tensor, wanted: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        hidden = subject.rows(torch.cat([memory, subject.embed(piece), memory], dim=1))
        logits = subject.logits(hidden[:, m:-m]).flatten(0, 1)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = F.cross_entropy(wide, wanted.flatten(), ignore_index=_IGNORED, reduction="sum")
        return loss, hidden[:, -m:].clone()  # a view would keep all hidden rows

    labels = F.pad(ids[:, 1:], (0, 1), value=_IGNORED)
    memory, total = subject.memory.expand(len(ids), -1, -1), None
    for given in zip(ids.split(subject.shape.segment, 1), labels.split(subject.shape.segment, 1), strict=True):
        loss, memory = checkpoint(one, *given, memory, use_reentrant=False) if recompute else one(*given, memory)
        total = loss if total is None else total + loss
    assert total is not None
    return total / (ids.numel() - len(ids))


def _stock(loss: Callable[[Subject, Tensor], Tensor]) -> Callable[[Subject], Step]:
    def build(subject: Subject) -> Step:
        def step(ids: Tensor) -> Tensor:
            subject.train(True)
            found = loss(subject, ids)
            found.backward()
            return found.detach()

        return step

    return build


# -- training, ours ----------------------------------------------------------------------------------------------------


def _policy(bptt: Any) -> Callable[[Subject], Step]:
    def loss(subject: Subject, ids: Tensor) -> Tensor:
        rmt = _rmt(subject)
        rmt.config.bptt = to_plain(bptt)
        found: Tensor = rmt(ids, labels=ids).loss
        return found

    return _stock(loss)


def _replay_graphs(subject: Subject) -> Step:
    graphs = ReplayGraphs()

    def step(ids: Tensor) -> Tensor:
        subject.train(True)
        loss = replay_step(_rmt(subject).recurrence, ids, labels=ids, policy=Replay(), graphs=graphs).loss
        if graphs.reasons and subject.device.type == "cuda":
            raise RuntimeError(f"it ran without CUDA graphs: {'; '.join(graphs.reasons)}")
        assert loss is not None
        return loss

    return step


_authors, _kept, _recomputed = (
    _stock(authors_loss), _stock(lambda s, ids: _by_segment(s, ids, False)),
    _stock(lambda s, ids: _by_segment(s, ids, True)),
)  # fmt: skip
TRAINERS = {
    contestant.name: contestant
    for contestant in (
        Contestant("authors", "authors' loop", _authors),
        Contestant("by_segment", "loop, loss by segment", _kept),
        Contestant("by_segment_gelu", "loop, loss by segment, GELU in one kernel", _kept, gelu=True),
        Contestant("checkpoint", "loop, checkpoint per segment", _recomputed),
        Contestant("full", 'ours, bptt="full"', _policy("full"), OURS),
        Contestant("replay", "ours, bptt=Replay()", _policy(Replay()), OURS),
        Contestant("authors_graphs", "authors' loop, compiled", _authors, graphs=True, compiled=True),
        Contestant("by_segment_graphs", "loop, loss by segment, compiled", _kept, graphs=True, compiled=True),
        Contestant("full_graphs", 'ours, bptt="full", compiled', _policy("full"), OURS, graphs=True, compiled=True),
        Contestant("replay_graphs", "ours, replay_step, CUDA graphs", _replay_graphs, OURS, graphs=True, keeps=True),
    )
}


# -- reading -----------------------------------------------------------------------------------------------------------


def _read_as_authors(subject: Subject) -> Step:
    @torch.no_grad()
    def step(ids: Tensor) -> Tensor:
        subject.train(False)
        return authors_pass(subject, ids)[1]

    return step


def _read_hidden(subject: Subject) -> Step:
    @torch.no_grad()
    def step(ids: Tensor) -> Tensor:
        subject.train(False)
        memory, m = subject.memory.expand(len(ids), -1, -1), subject.shape.memory
        for piece in ids.split(subject.shape.segment, dim=1):
            memory = subject.rows(torch.cat([memory, subject.embed(piece), memory], dim=1))[:, -m:].clone()
        return memory

    return step


def _read(subject: Subject) -> Step:
    def step(ids: Tensor) -> Tensor:
        subject.train(False)
        memory: Tensor = _rmt(subject).read(ids)
        return memory

    return step


READERS = {
    contestant.name: contestant
    for contestant in (
        Contestant("authors", "authors' loop", _read_as_authors),
        Contestant("hidden", "loop without output layer", _read_hidden),
        Contestant("ours", "ours, model.read", _read, OURS),
        Contestant("hidden_graphs", "loop without output layer, compiled", _read_hidden, graphs=True, compiled=True),
        Contestant("ours_graphs", "ours, model.read, compiled", _read, OURS, graphs=True, compiled=True),
    )
}
