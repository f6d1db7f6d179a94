"""What every model is: segments read in turn, a state handed from one to the next, a loss inside each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rmt_kernels.layout import SegmentLayout
from rmt_kernels.models.config import ModelConfig
from rmt_kernels.recurrence.losses import TokenLoss
from rmt_kernels.recurrence.policies import Replay, resolve
from rmt_kernels.recurrence.randomness import RandomState
from rmt_kernels.recurrence.replay import activation_bytes, run
from rmt_kernels.recurrence.segments import Segments
from rmt_kernels.recurrence.wrapper import Batch, RecurrentOutput, join

__all__ = ["SegmentModel", "kept", "mapped"]

_COMMON = frozenset(
    ["vocabulary", "tokens", "width", "heads", "layers", "inner", "activation", "dropout", "norm", "tied", "backend"]
)


def mapped(function: Callable[..., Tensor], nest: Any, *others: Any) -> Any:
    """``function`` of the tensors of a nest of tuples, with those in the same places of other nests."""
    if isinstance(nest, Tensor):
        return function(nest, *others)
    return tuple(mapped(function, *parts) for parts in zip(nest, *others, strict=True))


class SegmentModel(nn.Module):
    """A model that reads token numbers segment by segment.

    A subclass has :meth:`start` and :meth:`step`, and a ``head`` from hidden rows to logits; or its own :meth:`read`.
    What one segment hands to the next, its state, is a tensor or a nest of tuples of tensors with the batch first.

    Raises:
        TypeError, ValueError: a configuration that the system can't have: a field that it has no use for, or needs.
    """

    name: ClassVar[str]
    causal: ClassVar[bool] = True  # row i predicts position i + 1; otherwise row i predicts position i
    recurrent: ClassVar[bool] = True  # whether anything is handed from segment to segment
    align: ClassVar[str] = "left"  # which of a sample's segments is the short one: the last ("left") or the first
    uses: ClassVar[tuple[str, ...]] = ()  # fields of the configuration that not all systems have
    needs: ClassVar[tuple[str, ...]] = ()  # those of them that must be at least 1
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {}  # of the fields that name something, the default first

    head: nn.Module

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if not isinstance(config, ModelConfig):
            raise TypeError(f"config must be a ModelConfig, got {type(config).__name__}")
        used = {*_COMMON, *self.uses, *self.choices}
        for field in fields(config):
            value = getattr(config, field.name)
            if field.name not in used and value != field.default:
                raise ValueError(f"{field.name}: {self.name} has no use for it; leave it at {field.default!r}")
            if field.name in self.needs and value < 1:
                raise ValueError(f"{field.name} must be at least 1 for {self.name}, got {value}")
            accepted = self.choices.get(field.name, ("",))
            if accepted != ("",) and value and value not in accepted:
                raise ValueError(f"{field.name} must be one of {list(accepted)} for {self.name}, got {value!r}")
        self.config = config
        if config.relative != "clean" and self.choice("positions") != "relative":
            raise ValueError(
                f"relative={config.relative!r} is about positions='relative', and {self.name} has positions="
                f"{self.choice('positions')!r} here; leave it at 'clean'"
            )

    def choice(self, field: str) -> str:
        """The value of a field that names something, ``""`` resolved."""
        return str(getattr(self.config, field) or self.choices[field][0])

    def forward(
        self,
        ids: Tensor,
        *,
        labels: Tensor | None = None,
        lengths: Tensor | None = None,
        memory: Any = None,
        outputs: str | None = None,
        carry: bool = True,
    ) -> RecurrentOutput:
        """Read whole samples.

        Args:
            ids: token numbers, int64 (batch, n), n any number of tokens: segments of ``config.tokens``, one of them
                short where n is not a multiple.
            labels: int64 (batch, n), those of the inputs' own positions, -100 where none counts. A causal model's row
                is held against the next position's, over the borders of segments too.
            lengths: int (batch,), tokens of each sample; padding follows them. None: all.
            memory: what an earlier call returned, to read on from there. None: the start.
            outputs: ``"logits"``: return them for every row, (batch, n, vocabulary), 0 at padding; ``"hidden"``:
                (batch, n, width).
            carry: False: every segment is read from the start, and nothing is handed on.

        Returns:
            RecurrentOutput: loss, 0-dim, the mean over labels that count (None without labels); memory, for the next
            call (None where nothing is handed on); outputs, where asked for.

        Raises:
            TypeError, ValueError: an argument that is not accepted.
        """
        for name, given in (("ids", ids), ("labels", labels)):
            if given is None and name == "labels":
                continue
            if not isinstance(given, Tensor) or given.dtype is not torch.int64:
                kind = given.dtype if isinstance(given, Tensor) else type(given).__name__
                raise TypeError(f"{name} must be an int64 tensor of shape (batch, n), got {kind}")
            if given.dim() != 2 or given.shape != ids.shape or given.device != ids.device:
                raise ValueError(
                    f"{name} must have shape (batch, n), the same as ids and on its device, got {tuple(given.shape)} "
                    f"on {given.device}"
                )
        if outputs not in (None, "hidden", "logits"):
            raise ValueError(f"outputs must be None, 'hidden' or 'logits', got {outputs!r}")
        if memory is not None and not (carry and self.recurrent):
            why = "carry=False reads each segment from the start" if self.recurrent else f"{self.name} hands nothing on"
            raise ValueError(f"memory is given, and {why}; leave it out")
        segments = Segments(ids.shape[0], ids.shape[1], self.config.tokens, self.align, lengths, ids.device)
        targets = None if labels is None else self._targets(labels, segments)
        if carry and self.recurrent:
            return self.read(ids, targets, segments, memory, outputs)
        return self._each_alone(ids, targets, segments, outputs)

    def start(self, batch: int) -> Any:
        """The state that enters the first segment."""
        return ()

    def step(self, ids: Tensor, counts: Tensor | None, state: Any) -> tuple[Tensor, Any]:
        """One segment: hidden rows (batch, T, width) of ids (batch, T), and the state for the next one.

        counts: int32 (batch,), tokens of each sample; None: T. A sample with none keeps its state, see :meth:`hand_on`.
        """
        raise NotImplementedError

    def hand_on(self, new: Any, old: Any, counts: Tensor | None) -> Any:
        """What the next segment is given: ``new``, the old state for samples without tokens."""
        return mapped(lambda new, old: kept(new, old, counts), new, old)

    def read(
        self, ids: Tensor, targets: Tensor | None, segments: Segments, memory: Any, outputs: str | None
    ) -> RecurrentOutput:
        """All segments in turn, from ``memory`` or from the start; ``targets`` (batch, n) are those of the rows."""
        batch = self._batch(ids, targets, segments, outputs)
        first = self.start(len(ids))
        if memory is not None:
            self.check_memory(memory, first)
            first = memory

        def cell(s: int, entering: Any) -> tuple[Tensor | None, Any, Tensor | None]:
            call = batch.call(s)
            with _steady(ids.device):
                hidden, new = self.step(call.inputs, call.counts, entering)
                new = self.hand_on(new, entering, call.counts)
                output = self.head(hidden) if call.output == "logits" else hidden if call.output else None
                loss = None
                if call.targets is not None and call.factor is not None:
                    loss = batch.loss.of_segment(hidden, call.targets, call.counts, self.head, call.factor)
            return loss, new, output

        policy, alive = resolve(self.config.bptt), segments.count
        if isinstance(policy, Replay) and torch.is_grad_enabled():

            def measure() -> int:
                with RandomState.now(ids.device).again():
                    return activation_bytes(lambda: cell(0, first), [*self.parameters(), *self.buffers(), ids])

            alive = policy.kept(segments.count, measure)
        detached = lambda state: mapped(Tensor.detach, state)  # noqa: E731
        loss, memory, pieces = run(cell, first, segments.count, policy, alive, range(segments.count), detached)
        return RecurrentOutput(loss, memory, join(batch, pieces))

    def _targets(self, labels: Tensor, segments: Segments) -> Tensor:
        """What each row is held against."""
        if segments.lengths is not None:
            padding = torch.arange(segments.length, device=labels.device) >= segments.lengths[:, None]
            labels = labels.masked_fill(padding, -100)
        return F.pad(labels[:, 1:], (0, 1), value=-100) if self.causal else labels

    def _batch(self, ids: Tensor, targets: Tensor | None, segments: Segments, outputs: str | None) -> Batch:
        loss = TokenLoss(shift=False)
        dtype = torch.promote_types(next(self.parameters()).dtype, torch.float32)
        weighed = None if targets is None else loss.weigh(targets, None, segments, dtype)
        return Batch(ids, segments, SegmentLayout(tokens=segments.size), loss, weighed, outputs, {})

    def _each_alone(
        self, ids: Tensor, targets: Tensor | None, segments: Segments, outputs: str | None
    ) -> RecurrentOutput:
        """All segments at once, as samples of one segment each."""
        calls = range(segments.count)
        inputs = torch.cat([segments.take(ids, s) for s in calls])
        if targets is not None:
            targets = torch.cat([segments.take(targets, s, fill=-100) for s in calls])
        counts, lengths = [segments.token_counts(s) for s in calls], None
        if any(count is not None for count in counts):
            full = torch.full((len(ids),), segments.size, dtype=torch.int32, device=ids.device)
            lengths = torch.cat([full if count is None else count for count in counts])
        alone = Segments(len(inputs), segments.size, segments.size, self.align, lengths, ids.device)
        found = self.read(inputs, targets, alone, None, outputs)
        pieces = [] if found.outputs is None else found.outputs.chunk(segments.count)
        whole = join(self._batch(ids, None, segments, outputs), pieces)
        return RecurrentOutput(found.loss, None, whole)  # type: ignore[arg-type]

    def check_memory(self, memory: Any, like: Any) -> None:
        """Raise TypeError, ValueError where ``memory`` has not the tensors of ``like``, the state at the start."""

        def check(given: Tensor, wanted: Tensor) -> Tensor:
            if not isinstance(given, Tensor) or given.dtype != wanted.dtype or given.device != wanted.device:
                kind = f"{given.dtype} on {given.device}" if isinstance(given, Tensor) else type(given).__name__
                raise TypeError(f"memory must hold tensors of {wanted.dtype} on {wanted.device}, got {kind}")
            if given.shape != wanted.shape:
                raise ValueError(
                    f"memory must be what {self.name} returned for as many samples, with a tensor of shape "
                    f"{tuple(wanted.shape)}, got {tuple(given.shape)}"
                )
            return given

        try:
            mapped(lambda wanted, given: check(given, wanted), like, memory)
        except (TypeError, ValueError) as error:
            if str(error).startswith("memory"):
                raise
            raise ValueError(f"memory must be what {self.name} returned: a nest of the same shape") from error


def kept(new: Tensor, old: Tensor, counts: Tensor | None) -> Tensor:
    """``new``, and ``old`` for samples without tokens. Never a view, which would keep all hidden rows alive."""
    if counts is None:
        return new.clone()
    return torch.where((counts != 0).view(-1, *(1,) * (new.dim() - 1)), new, old)


def _steady(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast without its cache of weights, which would sum their gradients over all segments in a narrow dtype."""
    if not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.get_autocast_dtype(device.type), cache_enabled=False)
