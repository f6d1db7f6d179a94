"""What the tests of the recurrence share: a tiny float64 model with dropout, and a plain loop to compare it with.

The loop slices, pads, masks and concatenates in Python, sample by sample, and takes the loss from the full logits of
all tokens at the end. It calls the same modules on rows of the same shapes, so it draws the same random numbers. It
knows nothing of ``rmt_kernels.recurrence`` but where ``RecurrentMemory`` keeps its parts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rmt_kernels import RecurrentMemory, Region, SegmentLayout, replay_step, segment_attention

__all__ = [
    "LAYOUTS",
    "MEMORY",
    "SEGMENT",
    "VOCABULARY",
    "WIDTH",
    "Plain",
    "Step",
    "Tiny",
    "around",
    "check_step",
    "generator_state",
    "gradients",
    "largest_difference",
    "never_cut",
    "numbers",
    "plain_loop",
    "plain_step",
    "span",
    "step",
    "tiny",
]

WIDTH, VOCABULARY, SEGMENT, MEMORY = 8, 11, 5, 3
LAYOUTS: dict[str, Callable[[int, int], SegmentLayout]] = {
    "rmt_decoder": SegmentLayout.rmt_decoder,
    "causal": SegmentLayout.causal,
    "rmt_encoder": SegmentLayout.rmt_encoder,
}


# -- a backbone --------------------------------------------------------------------------------------------------------


def dense_attention(query: Tensor, key: Tensor, value: Tensor, layout: SegmentLayout, counts: Tensor | None) -> Tensor:
    """Attention with a mask that is written out; rows of padding get 0."""
    seen = layout.dense_mask().expand(len(query), -1, -1)
    if counts is not None:
        at = torch.arange(seen.shape[-1]) - layout.key_offset(Region.TOKENS)
        padding = (at >= 0) & (at < layout.tokens) & (at >= counts[:, None])
        seen = seen & ~padding[:, None, :] & ~padding[:, :, None]
    seen = seen[:, None]
    scores = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).masked_fill(~seen, -torch.inf)
    blind = ~seen.any(dim=-1, keepdim=True)
    mixed: Tensor = scores.masked_fill(blind, 0.0).softmax(dim=-1).masked_fill(blind, 0.0) @ value
    return mixed


class Block(nn.Module):
    """Pre-norm attention and feed-forward, with dropout on both branches.

    ``kernel``: attention by this package, with dropout on its probabilities too.
    """

    def __init__(self, width: int, heads: int, dropout: float, kernel: bool) -> None:
        super().__init__()
        self.heads, self.dropout, self.kernel = heads, dropout, kernel
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor, layout: SegmentLayout, counts: Tensor | None) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        if self.kernel:
            p = self.dropout if self.training else 0.0
            mixed = segment_attention(q, k, v, layout, token_lengths=counts, dropout_p=p)
        else:
            mixed = dense_attention(q, k, v, layout, counts)
        x = x + F.dropout(self.out(mixed.transpose(1, 2).flatten(2)), self.dropout, self.training)
        return x + F.dropout(self.mlp(self.norm2(x)), self.dropout, self.training)


class Tiny(nn.Module):
    """A backbone; ``gain``, a number or (batch,), scales its input."""

    def __init__(
        self, width: int = WIDTH, *, layers: int = 2, heads: int = 2, dropout: float = 0.2, kernel: bool = False
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, heads, dropout, kernel) for _ in range(layers))
        self.positions = nn.Parameter(torch.randn(64, width) / 4)
        self.norm = nn.LayerNorm(width)

    def forward(
        self, x: Tensor, *, layout: SegmentLayout, token_lengths: Tensor | None = None, gain: Any = 1.0
    ) -> Tensor:
        if isinstance(gain, Tensor):
            gain = gain.view(-1, 1, 1)
        x = x * gain + self.positions[: x.shape[1]]
        for block in self.blocks:
            x = block(x, layout, token_lengths)
        return self.norm(x)  # type: ignore[no-any-return]


def tiny(
    layout: str = "rmt_decoder",
    *,
    dtype: torch.dtype = torch.float64,
    dropout: float = 0.2,
    layers: int = 2,
    kernel: bool = False,
    tied: bool = False,
    bias: bool = True,
    seed: int = 3,
    **options: Any,
) -> RecurrentMemory:
    """A RecurrentMemory around :class:`Tiny`, the same for the same arguments; the random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        embed, head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=bias)
        if tied:
            head.weight = embed.weight
        backbone = Tiny(layers=layers, dropout=dropout, kernel=kernel)
        options = {"memory": MEMORY, "segment": SEGMENT, "embed": embed, "head": head, **options}
        model = RecurrentMemory(backbone, layout=LAYOUTS[layout], **options)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                nn.init.normal_(parameter, 0.5, 0.3)  # biases that are not 0 and norms that are not 1
    return model.to(dtype)


def around(backbone: nn.Module, **options: Any) -> RecurrentMemory:
    """Another backbone, with embedding and head of the same shapes; made from a seed of its own."""
    torch.manual_seed(0)
    parts: dict[str, Any] = {
        "memory": MEMORY, "segment": SEGMENT, "embed": nn.Embedding(VOCABULARY, WIDTH, dtype=torch.float64),
        "head": nn.Linear(WIDTH, VOCABULARY, dtype=torch.float64),
    }  # fmt: skip
    return RecurrentMemory(backbone, **(parts | options))


def numbers(batch: int, length: int, seed: int = 0) -> Tensor:
    """Token numbers (batch, length), the same for the same arguments; the random state is left alone."""
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


# -- the plain loop ----------------------------------------------------------------------------------------------------


def span(length: int, longest: int, size: int, align: str, s: int) -> range:
    """Positions of a sample's tokens in segment ``s``, where the batch's longest sample has ``longest``."""
    count = -(-longest // size)
    if align == "left":
        return range(min(s * size, length), min((s + 1) * size, length))
    return range(max(length - (count - s) * size, 0), max(length - (count - s - 1) * size, 0))


def never_cut(s: int, count: int) -> bool:
    """Full back-propagation."""
    return False


@dataclass
class Plain:
    """What the loop found."""

    memory: Tensor
    memories: list[Tensor]  # leaving each segment
    hidden: list[list[Tensor]]  # of each sample, of each of its tokens: (width,)
    where: list[list[int]]  # of each sample, of each of its tokens: its segment
    rows: list[Tensor]  # of each segment: the TOKENS rows (batch, tokens, width)
    logits: Tensor  # of all tokens of all samples in turn, (tokens, classes)
    loss: Tensor | None


def plain_loop(
    model: RecurrentMemory,
    inputs: Tensor,
    *,
    labels: Tensor | None = None,
    lengths: Sequence[int] | None = None,
    label_mask: Tensor | None = None,
    memory: Tensor | None = None,
    segment: int = SEGMENT,
    align: str = "left",
    layout: str = "rmt_decoder",
    shift: bool = True,
    weights: Any = "tokens",
    row: int | None = None,
    cuts: Callable[[int, int], bool] = never_cut,
    extra: Mapping[str, Any] | None = None,
    function: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Plain:
    """The recurrence and its loss, written out. ``row`` makes it a loss of one label a sample."""
    batch, length = inputs.shape[:2]
    ends = [length] * batch if lengths is None else list(lengths)
    front = 0 if model.prefix is None else len(model.prefix)
    rows_of_memory = len(model.initial_memory)
    made = LAYOUTS[layout](segment + front, rows_of_memory)
    if memory is None:
        memory = model.initial_memory.expand(batch, -1, -1)

    count = -(-length // segment)
    memories, rows = [], []
    hidden: list[list[Tensor]] = [[] for _ in range(batch)]
    where: list[list[int]] = [[] for _ in range(batch)]
    for s in range(count):
        if cuts(s, count):
            memory = memory.detach()
        spans = [span(end, length, segment, align, s) for end in ends]
        pieces = []
        for b in range(batch):
            piece = inputs[b, spans[b].start : spans[b].stop]
            padding = piece.new_zeros((segment - len(piece), *piece.shape[1:]))
            pieces.append(torch.cat([piece, padding]))
        tokens = torch.stack(pieces)
        if model.embed is not None:
            tokens = model.embed(tokens)
        if model.prefix is not None:
            prefix = model.prefix if model.prefix.is_floating_point() else model.embed(model.prefix)  # type: ignore[misc]
            tokens = torch.cat([torch.stack([prefix] * batch).to(tokens), tokens], dim=1)
        whole = lengths is None and all(len(positions) == segment for positions in spans)
        counts = None if whole else torch.tensor([len(p) + front for p in spans], dtype=torch.int32)
        x = torch.cat([memory, tokens, memory] if made.write else [memory, tokens], dim=1)
        out = model.backbone(x, layout=made, token_lengths=counts, **(extra or {}))
        tokens_out = out[:, rows_of_memory : rows_of_memory + front + segment]
        written = out[:, -rows_of_memory:] if made.write else out[:, :rows_of_memory]
        memory = torch.stack([written[b] if len(spans[b]) else memory[b] for b in range(batch)])
        memories.append(memory)
        rows.append(tokens_out)
        for b in range(batch):
            hidden[b] += list(tokens_out[b, front : front + len(spans[b])])
            where[b] += [s] * len(spans[b])

    every = [h for sample in hidden for h in sample]
    flat = torch.stack(every) if every else rows[0].new_zeros((0, rows[0].shape[-1]))
    logits = flat if model.head is None else model.head(flat)
    found = Plain(memory, memories, hidden, where, rows, logits, None)
    if labels is not None and row is not None:
        found.loss = _sample_loss(model, found, labels, ends, segment, length, align, row, weights, function)
    elif labels is not None:
        found.loss = _token_loss(found, labels, ends, label_mask, shift, weights, count, function)
    return found


def _token_loss(
    found: Plain, labels: Tensor, ends: list[int], mask: Tensor | None, shift: bool, weights: Any, count: int,
    function: Callable[[Tensor, Tensor], Tensor] | None,
) -> Tensor:  # fmt: skip
    targets, where, last = [], [], []
    for b, end in enumerate(ends):
        for t in range(end):
            at = t + 1 if shift else t
            counts = at < end and (mask is None or bool(mask[b, at]))
            targets.append(int(labels[b, at]) if counts else -100)
            where.append(found.where[b][t])
            last.append(found.where[b][t] == found.where[b][-1])
    goal = torch.tensor(targets, dtype=torch.int64)
    if function is None:
        losses = F.cross_entropy(found.logits, goal, ignore_index=-100, reduction="none")
    else:
        losses = function(found.logits, goal)
    counted = [target != -100 for target in targets]
    picked = {s: [losses[i] for i in range(len(targets)) if counted[i] and where[i] == s] for s in range(count)}
    zero = found.logits.sum() * 0
    if weights == "tokens":
        chosen = [loss for s in range(count) for loss in picked[s]]
        return torch.stack(chosen).mean() if chosen else zero
    if weights == "last":
        chosen = [losses[i] for i in range(len(targets)) if counted[i] and last[i]]
        return torch.stack(chosen).mean() if chosen else zero
    means = {s: torch.stack(chosen).mean() for s, chosen in picked.items() if chosen}
    if weights == "segments":
        return torch.stack(list(means.values())).mean() if means else zero
    return sum((weights[s] * mean for s, mean in means.items()), zero)  # type: ignore[no-any-return]


def _sample_loss(
    model: RecurrentMemory, found: Plain, labels: Tensor, ends: list[int], segment: int, length: int, align: str,
    row: int, weights: str, function: Callable[[Tensor, Tensor], Tensor] | None,
) -> Tensor:  # fmt: skip
    count, front = len(found.rows), 0 if model.prefix is None else len(model.prefix)
    losses = []
    for b, end in enumerate(ends):
        filled = [s for s in range(count) if len(span(end, length, segment, align, s))]
        for s in filled if weights == "segments" else filled[-1:]:
            at = front + len(span(end, length, segment, align, s)) - 1 if row == -1 else row
            chosen = found.rows[s][b : b + 1, at]
            logits = chosen if model.head is None else model.head(chosen)
            loss = (function or F.cross_entropy)(logits, labels[b : b + 1])
            losses.append(loss.reshape(()))
    return torch.stack(losses).mean() if losses else found.logits.sum() * 0


# -- comparisons -------------------------------------------------------------------------------------------------------


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter's ``.grad``, 0 where there is none."""
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach().clone()
        for name, parameter in module.named_parameters()
    }


def largest_difference(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """The largest relative difference of one tensor, in the norm; NaN counts as infinitely large."""
    assert found.keys() == wanted.keys()
    largest = 0.0
    for name, want in wanted.items():
        scale = float(want.double().norm())
        apart = float((found[name].double() - want.double()).norm())
        relative = apart / scale if scale > 0 else apart
        largest = max(largest, relative if relative == relative else float("inf"))
    return largest


def generator_state() -> Tensor:
    """PyTorch's random state."""
    return torch.get_rng_state()


# -- training steps ----------------------------------------------------------------------------------------------------


@dataclass
class Step:
    """What a forward and a backward pass left."""

    loss: float
    memory: Tensor
    gradients: dict[str, Tensor]
    state: Tensor


def plain_step(model: RecurrentMemory, inputs: Tensor, *, seed: int = 5, **options: Any) -> Step:
    """Forward and backward of the plain loop, from a seed; gradients are taken away again."""
    model.zero_grad()
    torch.manual_seed(seed)
    found = plain_loop(model, inputs, **options)
    assert found.loss is not None
    found.loss.backward()
    made = Step(found.loss.item(), found.memory.detach(), gradients(model), generator_state())
    model.zero_grad()
    return made


def step(
    model: RecurrentMemory, inputs: Tensor, policy: Any = None, *, driver: bool = False, seed: int = 5, **options: Any
) -> Step:
    """Forward and backward of the model, or of the driver, from a seed; gradients are taken away again."""
    model.zero_grad()
    before = model.bptt
    if policy is not None:
        model.bptt = policy
    torch.manual_seed(seed)
    if driver:
        out = replay_step(model, inputs, **options)
    else:
        out = model(inputs, **options)
        out.loss.backward()
    model.bptt = before
    assert out.loss is not None
    made = Step(out.loss.item(), out.memory.detach(), gradients(model), generator_state())
    model.zero_grad()
    return made


def check_step(found: Step, wanted: Step, tolerance: float = 1e-10) -> None:
    """Loss, memory and every gradient, relatively; and the random state, bit for bit."""
    assert abs(found.loss - wanted.loss) <= tolerance * abs(wanted.loss)
    assert largest_difference({"memory": found.memory}, {"memory": wanted.memory}) <= tolerance
    assert largest_difference(found.gradients, wanted.gradients) <= tolerance
    assert torch.equal(found.state, wanted.state), "the random state is not where full back-propagation leaves it"
