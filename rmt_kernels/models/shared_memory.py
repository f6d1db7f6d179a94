"""Shared episodic memory (arXiv 1905.02662): an actor-critic that remembers across the sub-tasks of an episode.

Two sub-networks read every observation. The episodic one is not told the task, and keeps its memory when a sub-task
ends; the task one is told, and starts anew with each sub-task. Policy, value and task-finished heads read both. The
episodic memory is a recurrent network's state, as in the paper, or the memory rows of a Recurrent Memory Transformer,
which is what this package adds: a segment ``[memory | steps | memory]`` is a sub-task, or as many of its steps as fit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rmt_kernels.attention import segment_attention
from rmt_kernels.layout import Region, Rule, SegmentLayout

__all__ = ["AgentConfig", "AgentOutput", "SharedMemoryAgent"]

MEMORIES = ("recurrent", "rmt")


@dataclass(frozen=True)
class AgentConfig:
    """Sizes of a :class:`SharedMemoryAgent`. The paper's widths are not known to us; these are ours.

    Args:
        observation: inputs of a step.
        tasks, actions: kinds of sub-tasks; actions to choose from.
        memory: "recurrent" (an LSTM's state) or "rmt" (memory rows).
        share: the episodic memory outlives the sub-task; False restarts it with each one, the baseline.
        width: of both sub-networks.
        rows: memory rows ("rmt").
        segment: steps a segment holds; a longer sub-task continues in the next segment, its memory handed on ("rmt").
        heads, layers: of the transformer ("rmt"); ``width`` is a multiple of ``heads``.
        backend: of :func:`rmt_kernels.segment_attention` ("rmt").

    Raises:
        TypeError, ValueError: a value that is not accepted.
    """

    observation: int
    tasks: int
    actions: int
    memory: str = "recurrent"
    share: bool = True
    width: int = 64
    rows: int = 4
    segment: int = 16
    heads: int = 2
    layers: int = 1
    backend: str = "auto"

    def __post_init__(self) -> None:
        for name in ("observation", "tasks", "actions", "width", "rows", "segment", "heads", "layers"):
            size = getattr(self, name)
            if isinstance(size, bool) or not isinstance(size, int):
                raise TypeError(f"{name} must be an int, got {type(size).__name__}")
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if self.memory not in MEMORIES:
            raise ValueError(f"memory must be one of {MEMORIES}, got {self.memory!r}")
        if not isinstance(self.share, bool):
            raise TypeError(f"share must be True or False, got {type(self.share).__name__}")
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads={self.heads}, got {self.width}")


class AgentOutput(NamedTuple):
    """What the heads say of each step. Leading dimensions: (batch,) or (batch, steps)."""

    policy: Tensor  # (..., actions): logits
    value: Tensor  # (...)
    finished: Tensor  # (..., actions): logit of "this action, taken now, finishes the sub-task"


Recurrent = tuple[Tensor, Tensor]


class LSTMMemory(nn.Module):
    """An LSTM over the steps of an episode. Its state restarts where a sub-task begins, unless it is to be shared."""

    def __init__(self, width: int, share: bool) -> None:
        super().__init__()
        self.share = share
        self.lstm = nn.LSTM(width, width, batch_first=True)

    def start(self, batch: int) -> Recurrent:
        """The state before the first step: hidden and cell, (batch, width) each, zeros."""
        zeros = next(self.lstm.parameters()).new_zeros(batch, self.lstm.hidden_size)
        return zeros, zeros

    def step(self, x: Tensor, begins: Tensor, state: Recurrent) -> tuple[Tensor, Recurrent]:
        """One step: x (batch, width), begins bool (batch,), the state; to what the heads read, and the next state."""
        hidden, cell = state
        if not self.share:
            hidden, cell = hidden.masked_fill(begins[:, None], 0.0), cell.masked_fill(begins[:, None], 0.0)
        out, (hidden, cell) = self.lstm(x[:, None], (hidden[None], cell[None]))
        return out[:, 0], (hidden[0], cell[0])

    def forward(self, x: Tensor, begins: Tensor, lengths: Tensor) -> Tensor:
        """Whole episodes: x (batch, steps, width), begins bool (batch, steps); to (batch, steps, width)."""
        if self.share:
            return self.lstm(x)[0]  # type: ignore[no-any-return]
        # Sub-tasks that share nothing are sequences of their own, and run side by side.
        now = torch.arange(x.shape[1], device=x.device)
        inside, since = now < lengths[:, None], since_begin(begins)
        number = ((since == 0) & inside).flatten().cumsum(0).view_as(since)[inside] - 1
        place = (number, since[inside])
        rows = x.new_zeros(int(number.max()) + 1, int(place[1].max()) + 1, x.shape[2]).index_put(place, x[inside])
        return torch.zeros_like(x).masked_scatter(inside[..., None], self.lstm(rows)[0][place])


class Block(nn.Module):
    """A pre-norm transformer layer that is given its keys and values, so that it serves segments and single steps."""

    def __init__(self, width: int, heads: int, backend: str) -> None:
        super().__init__()
        self.heads, self.backend = heads, backend
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def project(self, x: Tensor) -> Tensor:
        """Rows (batch, n, width) to query, key and value, (3, batch, heads, n, head_dim)."""
        return self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # type: ignore[no-any-return]

    def attend(
        self, x: Tensor, query: Tensor, key: Tensor, value: Tensor, layout: SegmentLayout, **padding: Any
    ) -> Tensor:
        """The layer's output for the rows x that ``query`` was made of."""
        seen = segment_attention(query, key, value, layout, backend=self.backend, **padding)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class RMTState(NamedTuple):
    """Where an episode stands inside its segment."""

    memory: Tensor  # (batch, rows, width): the memory that entered the segment
    keys: Tensor  # (layers, 2, batch, heads, rows + segment, head_dim): keys and values of its READ and TOKENS rows
    filled: Tensor  # int32 (batch,): its steps so far


class RMTMemory(nn.Module):
    """The episodic memory as memory rows: a small Recurrent Memory Transformer over segments of steps.

    A segment is ``[memory | steps | memory]`` under :meth:`SegmentLayout.rmt_decoder`: a step sees the memory that came
    in and the steps so far, the outgoing rows see all of it. It ends with its sub-task, or when it is full. The last
    layer's WRITE rows enter the next segment, also inside a sub-task; at a sub-task's begin the memory is handed on if
    it is to be shared, and is the trained first memory if not.
    """

    def __init__(self, config: AgentConfig) -> None:
        super().__init__()
        self.share, self.rows, self.segment, self.heads = config.share, config.rows, config.segment, config.heads
        self.layout = SegmentLayout.rmt_decoder(config.segment, config.rows)
        # The layout's three parts, for acting: memory in, one step more, memory out.
        read, tokens, write = Region.READ, Region.TOKENS, Region.WRITE
        self.reading = SegmentLayout(read=config.rows, rules={(read, read): Rule.FULL}, queries=(read,), keys=(read,))
        self.stepping = replace(self.layout.decoding(), keys=(read, tokens))
        self.writing = replace(self.layout, queries=(write,))
        self.blocks = nn.ModuleList(Block(config.width, config.heads, config.backend) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.first = nn.Parameter(torch.randn(config.rows, config.width))
        self.positions = nn.Parameter(0.1 * torch.randn(2 * config.rows + config.segment, config.width))

    def _parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Positions of the READ, TOKENS and WRITE rows."""
        read, tokens, write = self.positions.split([self.rows, self.segment, self.rows])
        return read, tokens, write

    def _layers(self, keys: Tensor) -> Iterator[tuple[Block, Tensor]]:
        for block, kept in zip(self.blocks, keys, strict=True):
            assert isinstance(block, Block)
            yield block, kept

    def start(self, batch: int) -> RMTState:
        """The state before the first step."""
        shape = (len(self.blocks), 2, batch, self.heads, self.rows + self.segment, self.first.shape[1] // self.heads)
        count = torch.zeros(batch, dtype=torch.int32, device=self.first.device)
        return RMTState(self.first.detach().repeat(batch, 1, 1), self.first.new_zeros(shape), count)

    @torch.no_grad()
    def step(self, x: Tensor, begins: Tensor, state: RMTState) -> tuple[Tensor, RMTState]:
        """One step of acting, without gradients: only its own row is computed, and memory rows where a segment ends.

        Writes into the state it is given, and returns it.
        """
        memory, keys, filled = state
        new = (begins | (filled == self.segment) | (filled == 0)).nonzero()[:, 0]
        if len(new):
            used = filled[new] > 0
            entering = torch.where(
                used[:, None, None], self._write(memory[new], keys[:, :, new], filled[new]), memory[new]
            )
            if not self.share:
                entering = torch.where(begins[new, None, None], self.first, entering)
            memory[new], filled[new] = entering, 0
            keys[:, :, new, :, : self.rows] = self._read(entering)
        hidden = x + self._parts()[1][filled.long()]
        hidden, batch = hidden[:, None], torch.arange(len(x), device=x.device)
        for block, kept in self._layers(keys):
            query, key, value = block.project(hidden)
            kept[0][batch, :, self.rows + filled], kept[1][batch, :, self.rows + filled] = key[:, :, 0], value[:, :, 0]
            hidden = block.attend(hidden, query, kept[0], kept[1], self.stepping, query_start=filled)
        filled += 1
        return self.norm(hidden[:, 0]), state

    def _read(self, memory: Tensor) -> Tensor:
        """Keys and values of the READ rows of a new segment, (layers, 2, n, heads, rows, head_dim)."""
        hidden, made = memory + self._parts()[0], []
        for block in self.blocks:
            assert isinstance(block, Block)
            projected = block.project(hidden)
            made.append(projected[1:])
            hidden = block.attend(hidden, projected[0], projected[1], projected[2], self.reading)
        return torch.stack(made)

    def _write(self, memory: Tensor, keys: Tensor, count: Tensor) -> Tensor:
        """The memory that leaves a segment of ``count`` steps: (n, rows, width)."""
        hidden = memory + self._parts()[2]
        for block, kept in self._layers(keys):
            query, key, value = block.project(hidden)
            key, value = torch.cat([kept[0], key], dim=2), torch.cat([kept[1], value], dim=2)
            hidden = block.attend(hidden, query, key, value, self.writing, token_lengths=count.clamp(min=1))
        return self.norm(hidden)  # type: ignore[no-any-return]

    def forward(self, x: Tensor, begins: Tensor, lengths: Tensor) -> Tensor:
        """Whole episodes, with gradients through every memory handed on: (batch, steps, width) to the same."""
        batch, _, width = x.shape
        segments, where, fresh = cut_segments(begins, lengths, self.segment)
        place = where[..., None].expand(-1, -1, width)
        # Steps beyond an episode's length land in a column of their own, after all segments.
        rows = x.new_zeros(batch, segments * self.segment + 1, width).scatter(1, place, x)
        counts = torch.zeros(batch, segments * self.segment + 1, dtype=torch.int32, device=x.device)
        counts = counts.scatter(1, where, 1)[:, :-1].unflatten(1, (segments, -1)).sum(2, dtype=torch.int32)
        memory, outputs = self.first.expand(batch, -1, -1), []
        for s in range(segments):
            if not self.share:
                memory = torch.where(fresh[:, s, None, None], self.first, memory)
            tokens = rows[:, s * self.segment : (s + 1) * self.segment]
            hidden = torch.cat([memory, tokens, memory], dim=1) + self.positions
            for block in self.blocks:
                assert isinstance(block, Block)
                query, key, value = block.project(hidden)
                hidden = block.attend(hidden, query, key, value, self.layout, token_lengths=counts[:, s])
            _, out, written = self.norm(hidden).split([self.rows, self.segment, self.rows], dim=1)
            memory = torch.where(counts[:, s, None, None] > 0, written, memory)
            outputs.append(out)
        outputs.append(x.new_zeros(batch, 1, width))
        return torch.cat(outputs, dim=1).gather(1, place)


def since_begin(begins: Tensor) -> Tensor:
    """Steps since the sub-task in progress began, int64 (batch, steps); the first step of an episode begins one."""
    now = torch.arange(begins.shape[1], device=begins.device)
    return now - torch.where(begins, now, 0).cummax(dim=1).values


def cut_segments(begins: Tensor, lengths: Tensor, segment: int) -> tuple[int, Tensor, Tensor]:
    """Which row of which segment each step is.

    Args:
        begins: bool (batch, steps), where sub-tasks begin; the first step always does.
        lengths: int64 (batch,), steps of each episode.
        segment: steps a segment holds.

    Returns:
        The number of segments; for each step ``segment * number + row``, int64 (batch, steps), and one past the last
        row of all for steps beyond the episode's length; and whether a segment begins a sub-task, bool (batch, number).
    """
    batch = len(begins)
    inside = torch.arange(begins.shape[1], device=begins.device) < lengths[:, None]
    since = since_begin(begins)
    cut = (since % segment == 0) & inside
    number = cut.cumsum(dim=1) - 1
    segments = int(number.max()) + 1
    where = torch.where(inside, number * segment + since % segment, segments * segment)
    fresh = torch.zeros(batch, segments + 1, dtype=torch.bool, device=begins.device)
    fresh = fresh.scatter(1, torch.where((since == 0) & inside, number, segments), True)[:, :segments]
    return segments, where, fresh


class SharedMemoryAgent(nn.Module):
    """Actor-critic with a shared episodic memory (arXiv 1905.02662). Holds nothing between calls.

    ``e_t = episodic(x_t)``, ``k_t = task(x_t, task_t)``, with ``x_t`` the encoded observation; three linear heads read
    ``z_t = relu(W [e_t; k_t])``. That they read both is the paper's; the hidden layer ``z`` is ours.
    """

    def __init__(self, config: AgentConfig) -> None:
        super().__init__()
        self.config, width = config, config.width
        # Normalised: inputs that are mostly zeros would come out too small to learn from.
        self.encode = nn.Sequential(nn.Linear(config.observation, width), nn.LayerNorm(width), nn.ReLU())
        self.instruct = nn.Embedding(config.tasks, width)
        self.episodic: Any = RMTMemory(config) if config.memory == "rmt" else LSTMMemory(width, config.share)
        self.task = LSTMMemory(width, share=False)
        self.join = nn.Sequential(nn.Linear(2 * width, width), nn.LayerNorm(width), nn.ReLU())
        self.policy, self.value = nn.Linear(width, config.actions), nn.Linear(width, 1)
        self.finished = nn.Linear(width, config.actions)
        with torch.no_grad():
            self.policy.weight.mul_(0.01)  # every action about as likely at first

    def start(self, batch: int) -> tuple[Any, Recurrent]:
        """The state of ``batch`` episodes before their first step, for :meth:`step`."""
        return self.episodic.start(batch), self.task.start(batch)

    def step(
        self, observation: Tensor, tasks: Tensor, begins: Tensor, state: tuple[Any, Recurrent]
    ) -> tuple[AgentOutput, tuple[Any, Recurrent]]:
        """One step of acting.

        Args:
            observation: (batch, config.observation).
            tasks: int64 (batch,), the sub-task in progress.
            begins: bool (batch,), whether it begins with this step; True at an episode's first step.
            state: what :meth:`start` or the step before returned; used up, as "rmt" writes into it.

        Returns:
            What the heads say, and the next state. The memory rows of "rmt" carry no gradient here; train with
            :meth:`forward`, which gives the same numbers for whole episodes.
        """
        x = self.encode(observation)
        episodic, memory = self.episodic.step(x, begins, state[0])
        task, working = self.task.step(x + self.instruct(tasks), begins, state[1])
        return self._heads(episodic, task), (memory, working)

    def forward(self, observation: Tensor, tasks: Tensor, begins: Tensor, lengths: Tensor | None = None) -> AgentOutput:
        """Whole episodes, from their first step on, with gradients back to it.

        Args:
            observation: (batch, steps, config.observation).
            tasks: int64 (batch, steps), the sub-task in progress at each step.
            begins: bool (batch, steps), whether it begins there; True at the first step.
            lengths: int64 (batch,), steps of each episode (default: all); what is said of later steps means nothing.

        Returns:
            What the heads say of each step.

        Raises:
            ValueError: shapes that do not fit.
        """
        if observation.dim() != 3 or observation.shape[2] != self.config.observation:
            expected = f"(batch, steps, {self.config.observation})"
            raise ValueError(f"observation must have shape {expected}, got {tuple(observation.shape)}")
        for name, given in (("tasks", tasks), ("begins", begins)):
            if given.shape != observation.shape[:2]:
                shape = tuple(observation.shape[:2])
                raise ValueError(f"{name} must have shape {shape}, (batch, steps), got {tuple(given.shape)}")
        if lengths is None:
            lengths = torch.full((len(tasks),), tasks.shape[1], device=tasks.device)
        elif lengths.shape != tasks.shape[:1]:
            raise ValueError(f"lengths must have shape ({len(tasks)},), got {tuple(lengths.shape)}")
        x = self.encode(observation)
        episodic = self.episodic(x, begins, lengths)
        task = self.task(x + self.instruct(tasks), begins, lengths)
        return self._heads(episodic, task)

    def _heads(self, episodic: Tensor, task: Tensor) -> AgentOutput:
        joined = self.join(torch.cat([episodic, task], dim=-1))
        return AgentOutput(self.policy(joined), self.value(joined).squeeze(-1), self.finished(joined))
