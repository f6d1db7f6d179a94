"""``RecurrentMemory``: a backbone that reads a long input segment by segment and passes a few memory rows on."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parallel import DistributedDataParallel

from rmt_kernels.layout import Region, Rule, SegmentLayout
from rmt_kernels.recurrence.losses import SampleLoss, SegmentLoss, TokenLoss, Weighed
from rmt_kernels.recurrence.policies import Policy, Replay, resolve
from rmt_kernels.recurrence.randomness import RandomState
from rmt_kernels.recurrence.replay import activation_bytes, add, run
from rmt_kernels.recurrence.segments import Segments
from rmt_kernels.recurrence.window import Window

__all__ = ["Batch", "RecurrentMemory", "RecurrentOutput", "SegmentCall", "Stretch"]

_OUTPUTS = (None, "hidden", "logits", "last_hidden", "last_logits", "sample_logits")
LayoutOf = Callable[[int, int], SegmentLayout]


class RecurrentOutput(NamedTuple):
    """What :class:`RecurrentMemory` returns. A tuple, so that data-parallel wrappers find the tensors in it."""

    loss: Tensor | None  # 0-dim; None without labels
    memory: Tensor  # (batch, M, width), after the last segment
    outputs: Tensor | None  # (batch, length or segment, width or classes) or (batch, classes), where asked for


@dataclass(frozen=True)
class SegmentCall:
    """All that one segment reads but its memory: tensors, whose shapes are the same for every segment."""

    inputs: Tensor  # (batch, segment) or (batch, segment, width)
    counts: Tensor | None  # int32 (batch,), tokens of each sample; None: the segment is full
    targets: tuple[Tensor, ...] | None  # of the loss; None: the segment has none
    factor: Tensor | None  # 0-dim
    layout: SegmentLayout
    output: str | None  # "hidden", "logits", "sample_logits" or None
    extra: Mapping[str, Any]  # for the backbone


class Stretch:
    """Some segments in turn, for one call of the module that one backward traversal follows.

    Not a dataclass: mixed precision of FSDP2 casts the tensors that it finds in one, and the loss's factor stays wide.
    """

    __slots__ = ("calls", "cuts")

    def __init__(self, calls: tuple[SegmentCall, ...], cuts: tuple[bool, ...]) -> None:
        self.calls = calls
        self.cuts = cuts  # whether the memory entering each is detached


@dataclass(frozen=True)
class Batch:
    """A call's arguments, checked: what the segments are cut from."""

    inputs: Tensor
    segments: Segments
    layout: SegmentLayout
    loss: SegmentLoss
    weighed: Weighed | None
    output: str | None
    extra: Mapping[str, Any]

    @property
    def count(self) -> int:
        """Number of segments."""
        return self.segments.count

    def call(self, s: int, *, loss: bool = True, silent: bool = True) -> SegmentCall:
        """Segment ``s``. ``loss=False`` leaves the loss out; ``silent=False`` keeps it where it is known to be 0."""
        targets = factor = None
        if loss and self.weighed is not None and not (silent and s in self.weighed.silent):
            targets = self.loss.targets(self.weighed, self.segments, s)
            factor = self.weighed.factors[s]
        output = self.output
        if output is not None and output.startswith("last_"):
            output = output.removeprefix("last_") if s == self.count - 1 else None
        return SegmentCall(
            self.segments.take(self.inputs, s), self.segments.token_counts(s), targets, factor, self.layout, output,
            self.extra,
        )  # fmt: skip

    def tensors(self) -> list[Tensor]:
        """What a caller holds anyway."""
        labels = [] if self.weighed is None else [self.weighed.labels]
        return [self.inputs, *labels, *(value for value in self.extra.values() if isinstance(value, Tensor))]


class RecurrentMemory(nn.Module):
    """The recurrence of RMT (arXiv 2207.06881, 2304.11062) around any module that maps embeddings to hidden states.

    Segment s is ``[memory_s | tokens_s | memory_s]`` (decoder form, a layout with READ and WRITE) or
    ``[memory_s | tokens_s]`` (encoder form, a layout without WRITE). The hidden states of the WRITE rows (READ rows,
    where there is no WRITE) are ``memory_{s+1}``. A sample without tokens in a segment keeps its memory, bit for bit.
    The module holds no state between calls: memory comes in and goes out as an argument.

    Args:
        backbone: called as ``backbone(x, layout=layout, token_lengths=counts, **extra)`` with x (batch, rows, width) of
            the layout's rows, counts int32 (batch,) or None, and what else ``forward`` was given; returns hidden states
            of the same rows, (batch, rows, width), or an object with ``last_hidden_state``. Keywords that it does not
            have are left out, as far as ``own_mask`` allows.
        memory: M, the number of memory rows, drawn from a normal distribution with the standard deviation of the
            embedding's weights; or the rows, (M, width), to start from. They are trained, as ``initial_memory``.
        segment: tokens of a segment.
        bptt: ``"full"``; ``"replay"``, which is ``Replay()``; k, the number of last segments that stay connected;
            :class:`Truncate`; :class:`Replay`.
        layout: of a segment, or a function ``(tokens, memory) -> SegmentLayout``. None: ``SegmentLayout.rmt_decoder``.
        embed: token numbers (batch, n) to (batch, n, width). None: inputs are embeddings.
        head: hidden rows (n, width) to logits (n, classes). None: the loss is given hidden rows.
        loss: :class:`TokenLoss` (the default: cross entropy, of the next token where tokens see one another causally),
            :class:`SampleLoss`, or a function ``(logits (n, ...), labels (n,)) -> losses (n,)``.
        align: ``"left"``: a sample's last segment is the short one; ``"right"``: its first.
        prefix: token numbers, or rows (P, width), in front of every segment's tokens, such as CLS and SEP. They count
            as TOKENS of the layout.
        width: of the rows, where neither ``memory`` nor ``embed`` tells.
        own_mask: the backbone applies exactly the layout's mask by itself. A backbone without the keyword ``layout`` is
            refused otherwise.
        check_memory: raise where a segment hands on a memory with NaN or infinity. Synchronises a GPU each segment.

    Raises:
        TypeError, ValueError: an argument that is not accepted.
    """

    prefix: Tensor | None

    def __init__(
        self,
        backbone: nn.Module,
        *,
        memory: int | Tensor,
        segment: int,
        bptt: Any = "full",
        layout: SegmentLayout | LayoutOf | None = None,
        embed: nn.Module | None = None,
        head: nn.Module | None = None,
        loss: SegmentLoss | Callable[[Tensor, Tensor], Tensor] | None = None,
        align: str = "left",
        prefix: Tensor | Sequence[int] | None = None,
        width: int | None = None,
        own_mask: bool = False,
        check_memory: bool = False,
    ) -> None:
        super().__init__()
        for name, module in (("backbone", backbone), ("embed", embed), ("head", head)):
            if not isinstance(module, nn.Module) and (name == "backbone" or module is not None):
                raise TypeError(f"{name} must be a torch.nn.Module, got {type(module).__name__}")
        if align not in ("left", "right"):
            raise ValueError(f"align must be 'left' or 'right', got {align!r}")
        if isinstance(segment, bool) or not isinstance(segment, int):
            raise TypeError(f"segment must be an int, got {type(segment).__name__}")
        if segment < 1:
            raise ValueError(f"segment must be at least 1 token, got {segment}")
        self.backbone, self.embed, self.head = backbone, embed, head
        self.segment, self.align, self.check_memory = segment, align, check_memory
        self.bptt = bptt
        self.initial_memory = nn.Parameter(_first_memory(memory, width, embed))
        self._set_prefix(prefix)
        self.layout = self._layout(layout)
        self._keywords = _keywords(backbone)
        if not own_mask and "layout" not in self._keywords:
            raise ValueError(
                f"backbone: {type(backbone).__name__}.forward has no keyword 'layout', so it can't be told who sees "
                "whom; give it one, or say own_mask=True if its own mask is the layout's "
                f"({self.layout.name}) whenever it is given these rows"
            )
        self.loss = _segment_loss(loss, self.layout)
        function = getattr(self.loss, "function", None)
        self.loss_function = function if isinstance(function, nn.Module) else None  # where parameters are looked for
        self._bytes: dict[Any, int] = {}  # activations of a segment, by its shape

    @property
    def bptt(self) -> Policy:
        """How gradients go back through the segments; may be set anew between steps."""
        return self._policy

    @bptt.setter
    def bptt(self, bptt: Any) -> None:
        self._policy: Policy = resolve(bptt)

    def extra_repr(self) -> str:
        """What ``print`` shows beside the submodules."""
        return f"memory={len(self.initial_memory)}, segment={self.segment}, bptt={self.bptt}, {self.layout.name}"

    def _set_prefix(self, prefix: Tensor | Sequence[int] | None) -> None:
        if prefix is not None and not isinstance(prefix, Tensor):
            if any(isinstance(number, bool) or not isinstance(number, int) for number in prefix):
                raise TypeError(f"prefix must be token numbers or a tensor, got {prefix!r}")
            prefix = torch.tensor(list(prefix), dtype=torch.int64, device=self.initial_memory.device)
        if prefix is not None:
            dims = 2 if self.embed is None or prefix.is_floating_point() else 1
            if prefix.dim() != dims or not len(prefix) or prefix.is_floating_point() != (dims == 2):
                raise ValueError(
                    f"prefix must be token numbers (P,), or rows (P, width), got {prefix.dtype} {tuple(prefix.shape)}"
                    + ("; token numbers need embed=" if self.embed is None else "")
                )
            if dims == 2 and prefix.shape[1] != self.initial_memory.shape[1]:
                raise ValueError(
                    f"prefix must be rows (P, {self.initial_memory.shape[1]}), as wide as the memory, got "
                    f"{tuple(prefix.shape)}"
                )
        self.register_buffer("prefix", prefix, persistent=False)

    def _layout(self, layout: Any) -> SegmentLayout:
        memory, front = len(self.initial_memory), 0 if self.prefix is None else len(self.prefix)
        tokens = self.segment + front
        if layout is None:
            layout = SegmentLayout.rmt_decoder
        made = layout if isinstance(layout, SegmentLayout) else layout(tokens, memory) if callable(layout) else None
        if not isinstance(made, SegmentLayout):
            raise TypeError(
                f"layout must be a SegmentLayout or a function (tokens, memory) -> SegmentLayout, got {layout!r}"
            )
        carrier = Region.WRITE if made.write else Region.READ
        if (
            made.cache
            or made.skip
            or not {carrier, Region.TOKENS} <= set(made.queries)
            or made.num_keys != sum((made.read, made.tokens, made.write))
            or made.num_queries != made.num_keys
        ):
            raise ValueError(
                "layout: every row of READ, TOKENS and WRITE must be a query and a key, without cache and skipped "
                f"rows, got {made}"
            )
        if made.tokens != tokens:
            apart = f" + {front} of the prefix" if front else ""
            raise ValueError(f"layout must have segment{apart} = {tokens} tokens, got {made.tokens}")
        if {made.read, made.write} - {0, memory} or not made.read + made.write:
            raise ValueError(
                f"memory: the layout has {made.read} READ and {made.write} WRITE rows, which must be {memory}, the "
                "rows of memory=, or 0 where the layout has no such region"
            )
        return made

    # -- the call ------------------------------------------------------------------------------------------------------

    def forward(
        self,
        inputs: Tensor,
        *,
        labels: Tensor | None = None,
        lengths: Tensor | None = None,
        label_mask: Tensor | None = None,
        memory: Tensor | None = None,
        segment: int | None = None,
        outputs: str | None = None,
        progress: bool = False,
        **extra: Any,
    ) -> RecurrentOutput:
        """Read whole samples.

        Args:
            inputs: token numbers, int (batch, length), or, without ``embed``, rows (batch, length, width).
            labels: as the loss wants them; :class:`TokenLoss`: int64 (batch, length), those of the inputs' own
                positions (they are shifted here), -100 where none counts.
            lengths: int (batch,), tokens of each sample; padding follows them. None: all.
            label_mask: bool (batch, length), True where a label counts.
            memory: (batch, M, width) in the dtype of ``initial_memory``, what an earlier call returned. None: start.
            segment: tokens of a segment in this call.
            outputs: ``"hidden"`` or ``"logits"``: return them for every token, (batch, length, ...), 0 at padding;
                ``"last_hidden"``, ``"last_logits"``: for the last segment, (batch, segment, ...);
                ``"sample_logits"``: with :class:`SampleLoss`, those of the row that predicts in each sample's last
                segment, (batch, classes).
            progress: show a progress bar.
            extra: for the backbone, the same in every segment.

        Returns:
            RecurrentOutput: loss, final memory, outputs.

        Raises:
            TypeError, ValueError: an argument that is not accepted; nothing has been changed then.
            FloatingPointError: NaN or infinity in a memory, with ``check_memory``.
        """
        if isinstance(inputs, Stretch):
            return self._stretch(inputs, memory)
        batch = self.batch(
            inputs, labels=labels, lengths=lengths, label_mask=label_mask, memory=memory, segment=segment,
            outputs=outputs, **extra,
        )  # fmt: skip
        with RandomState.unless_it_fails(inputs.device):
            entering = self.entering(batch, None if memory is None else self._beside_the_start(memory))

            kept, first = batch.count, batch.count
            if torch.is_grad_enabled():
                self.refuse_wrapped_parts()
                kept = self.kept(batch, self.bptt, lambda call: self._segment(call, entering, ""))
                first = batch.count - kept
            window = Window(self, batch)

            def cell(s: int, entering: Tensor) -> tuple[Tensor | None, Tensor, Any]:
                return self._segment(batch.call(s), entering, f"segment {s}", None if s < first else window)

            order = bar(batch.count, progress)
            loss, memory, pieces = run(cell, entering, batch.count, self.bptt, kept, order, self._cut)
            with self._steady(inputs.device.type):
                loss = add(loss, window.loss())
        if loss is None and labels is not None:
            loss = memory.new_zeros(())
        return RecurrentOutput(loss, memory, join(batch, pieces))

    def batch(
        self,
        inputs: Tensor,
        *,
        labels: Tensor | None = None,
        lengths: Tensor | None = None,
        label_mask: Tensor | None = None,
        memory: Tensor | None = None,
        segment: int | None = None,
        outputs: str | None = None,
        **extra: Any,
    ) -> Batch:
        """The arguments of :meth:`forward`, checked."""
        if not isinstance(inputs, Tensor):
            raise TypeError(f"inputs must be a torch.Tensor, got {type(inputs).__name__}")
        width = self.initial_memory.shape[1]
        if self.embed is not None:
            if inputs.dtype not in (torch.int32, torch.int64):
                raise TypeError(f"inputs must be token numbers, int64 (batch, length), got {inputs.dtype}")
            if inputs.dim() != 2:
                raise ValueError(f"inputs must have shape (batch, length), got {tuple(inputs.shape)}")
        elif inputs.dim() != 3 or inputs.shape[2] != width or not inputs.is_floating_point():
            raise ValueError(
                f"inputs must be rows (batch, length, {width}), got {inputs.dtype} {tuple(inputs.shape)}; for token "
                "numbers give RecurrentMemory embed="
            )
        # Sharded parameters may wait on the host.
        device = inputs.device if self.sharded() else self.initial_memory.device
        if inputs.device != device:
            raise ValueError(f"inputs must be on the model's device, {device}, got {inputs.device}")
        layout = self.layout
        if segment is None:
            segment = self.segment
        elif isinstance(segment, int) and segment > 0:
            layout = replace(layout, tokens=layout.tokens - self.segment + segment)
        segments = Segments(inputs.shape[0], inputs.shape[1], segment, self.align, lengths, device)
        if outputs not in _OUTPUTS:
            raise ValueError(f"outputs must be one of {list(_OUTPUTS)}, got {outputs!r}")
        if outputs is not None and outputs.endswith("logits") and self.head is None:
            raise ValueError(f"outputs={outputs!r} needs a head; give RecurrentMemory head=, or ask for 'hidden'")
        if outputs == "sample_logits" and not isinstance(self.loss, SampleLoss):
            raise ValueError(
                "outputs='sample_logits' is for one label a sample: give RecurrentMemory loss=SampleLoss()"
            )
        if memory is not None:
            self._check_memory_argument(memory, len(inputs), device)
        taken = [name for name in ("layout", "token_lengths") if name in extra]
        if taken:
            raise TypeError(f"{taken[0]} is given to the backbone by RecurrentMemory; for padding use lengths=")
        unknown = [name for name in extra if not self._takes(name)]
        if unknown:
            raise TypeError(f"unknown arguments {unknown}: neither RecurrentMemory nor its backbone has them")
        padded = lengths is not None or inputs.shape[1] % segment
        if padded and not self._takes("token_lengths"):
            raise ValueError(
                f"inputs: {inputs.shape[1]} tokens in segments of {segment}"
                f"{'' if lengths is None else ' with lengths'} need padding, and the backbone has no keyword "
                "'token_lengths' to hide it; give whole segments only"
            )
        weighed = None
        if labels is not None:
            if not isinstance(labels, Tensor):
                raise TypeError(f"labels must be a torch.Tensor, got {type(labels).__name__}")
            if labels.device != device:
                raise ValueError(f"labels must be on the model's device, {device}, got {labels.device}")
            dtype = torch.promote_types(self.initial_memory.dtype, torch.float32)
            weighed = self.loss.weigh(labels, label_mask, segments, dtype)
        elif label_mask is not None:
            raise ValueError("label_mask is given without labels")
        return Batch(inputs, segments, layout, self.loss, weighed, outputs, extra)

    def _check_memory_argument(self, memory: Tensor, batch: int, device: torch.device) -> None:
        like = self.initial_memory
        if not isinstance(memory, Tensor):
            raise TypeError(f"memory must be a torch.Tensor, got {type(memory).__name__}")
        if memory.dtype != like.dtype:
            raise TypeError(f"memory must be {like.dtype}, as initial_memory is, got {memory.dtype}")
        if memory.shape != (batch, *like.shape) or memory.device != device:
            raise ValueError(
                f"memory must have shape {(batch, *like.shape)}, (batch, memory rows, width), on {device}, got "
                f"{tuple(memory.shape)} on {memory.device}"
            )
        if self.check_memory:
            _finite(memory, "the memory that was given")

    def _takes(self, name: str) -> bool:
        return name in self._keywords or "**" in self._keywords

    def kept(self, batch: Batch, policy: Policy, once: Callable[[SegmentCall], Any]) -> int:
        """How many of the last segments keep their activations; ``once`` runs a segment to measure them."""
        if not isinstance(policy, Replay):
            return batch.count
        if policy.keep < batch.count or policy.budget_bytes is not None:
            self._refuse_running_statistics()

        def measure() -> int:
            kind = batch.inputs.device.type
            key = (
                batch.layout, batch.segments.batch, batch.weighed is None, batch.segments.lengths is None,
                self.training, torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind),
            )  # fmt: skip
            if key not in self._bytes:
                known = [*self.parameters(), *self.buffers(), *batch.tensors()]
                with RandomState.now(batch.inputs.device).again():
                    self._bytes[key] = activation_bytes(lambda: once(batch.call(0, silent=False)), known)
            return self._bytes[key]

        return policy.kept(batch.count, measure)

    def sharded(self) -> bool:
        """Whether ``fully_shard`` was called on it."""
        return hasattr(self, "set_requires_gradient_sync")

    def refuse_wrapped_parts(self) -> None:
        """Raise ValueError where a data-parallel wrapper holds a part of this module and not the whole of it."""
        if not torch.distributed.is_available() or not torch.distributed.is_initialized():
            return
        whole = self.sharded()
        for name, module in self.named_modules():
            wrapper = "DistributedDataParallel" if isinstance(module, DistributedDataParallel) else "fully_shard"
            # Inside a larger module that is the root, blocks know that they are not.
            part = not whole and hasattr(module, "_get_fsdp_state") and module._get_fsdp_state()._is_root is not False  # type: ignore[operator]
            if part or isinstance(module, DistributedDataParallel):
                raise ValueError(
                    f"{name}: {wrapper} must hold the whole RecurrentMemory, not only a part of it such as the "
                    "backbone; the gradients of what is outside, initial_memory among it, would not be averaged. "
                    "With fully_shard, wrap the blocks and then the RecurrentMemory"
                )

    def _refuse_running_statistics(self) -> None:
        for name, module in self.named_modules():
            if isinstance(module, _BatchNorm) and module.training and module.track_running_stats:
                raise ValueError(
                    f"bptt: Replay runs segments twice, which would update the running statistics of '{name}' "
                    f"({type(module).__name__}) twice; use LayerNorm, put that module in eval(), or bptt='full'"
                )

    def head_draws(self) -> bool:
        """Whether the head or the loss has dropout that is on: random numbers, as far as that can be seen."""
        parts = [part for module in (self.head, self.loss_function) if module is not None for part in module.modules()]
        return any(isinstance(part, _DropoutNd) and part.training and part.p > 0 for part in parts)

    def entering(self, batch: Batch, memory: Tensor | None) -> Tensor:
        """``memory``, or the initial one for each sample."""
        return self._start(batch.segments.batch) if memory is None else memory

    def _start(self, batch: int) -> Tensor:
        return self.initial_memory.expand(batch, -1, -1)

    def _beside_the_start(self, memory: Tensor) -> Tensor:
        """``memory``, with a gradient of zero for the initial one.

        Data-parallel wrappers want a gradient of each parameter in every traversal, FSDP2 in the same dtype.
        """
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if not distributed or not torch.is_grad_enabled() or not self.initial_memory.requires_grad:
            return memory
        never = torch.zeros((), dtype=torch.bool, device=memory.device)
        return torch.where(never, self.initial_memory.to(memory.dtype), memory)

    def _cut(self, memory: Tensor) -> Tensor:
        return self._beside_the_start(memory.detach())

    def compiled(self) -> bool:
        """Whether ``torch.compile`` was called on a part of it."""
        return any(hasattr(module, "_orig_mod") or module._compiled_call_impl is not None for module in self.modules())

    # -- segments ------------------------------------------------------------------------------------------------------

    def _stretch(self, stretch: Stretch, memory: Tensor | None) -> RecurrentOutput:
        """Some segments, connected, for :func:`replay_step`; outputs are a tuple, one for each."""
        memory = self._start(len(stretch.calls[0].inputs)) if memory is None else self._beside_the_start(memory)
        total: Tensor | None = None
        pieces = []
        for call, cut in zip(stretch.calls, stretch.cuts, strict=True):
            loss, memory, piece = self._segment(call, self._cut(memory) if cut else memory, "a segment")
            total = add(total, loss)
            pieces.append(piece)
        return RecurrentOutput(total, memory, tuple(pieces))  # type: ignore[arg-type]

    def _segment(
        self, call: SegmentCall, memory: Tensor, name: str, window: Window | None = None
    ) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """One segment: its share of the loss (None: it has none, or ``window`` has it), the memory that leaves it, and
        what was asked for."""
        with self._steady(call.inputs.device.type):
            return self._one(call, memory, name, window)

    @staticmethod
    def _steady(kind: str) -> AbstractContextManager[Any]:
        # Autocast keeps one narrow copy of each weight and sums its gradient over all segments in that dtype: 2e-2 off
        # after 512 segments. A copy for each segment is summed in the weight's own dtype.
        if not torch.is_autocast_enabled(kind):
            return nullcontext()
        return torch.autocast(kind, dtype=torch.get_autocast_dtype(kind), cache_enabled=False)

    def _one(
        self, call: SegmentCall, memory: Tensor, name: str, window: Window | None
    ) -> tuple[Tensor | None, Tensor, Tensor | None]:
        layout, counts = call.layout, call.counts
        if self.embed is not None:
            tokens = self.embed(call.inputs)
        elif counts is None:
            tokens = call.inputs
        else:  # whatever padding holds, 0 is what gradients may be multiplied with
            padding = torch.arange(call.inputs.shape[1], device=call.inputs.device) >= counts[:, None]
            tokens = call.inputs.masked_fill(padding[..., None], 0)
        front = 0
        if self.prefix is not None:
            front = len(self.prefix)
            known = self.prefix if self.prefix.is_floating_point() or self.embed is None else self.embed(self.prefix)
            tokens = torch.cat([known.to(tokens.dtype).expand(len(tokens), -1, -1), tokens], dim=1)
        rows = memory.to(tokens.dtype)
        x = torch.cat([*([rows] if layout.read else []), tokens, *([rows] if layout.write else [])], dim=1)

        keywords: dict[str, Any] = dict(call.extra)
        if self._takes("layout"):
            keywords["layout"] = layout
        if self._takes("token_lengths"):
            keywords["token_lengths"] = None if counts is None else torch.where(counts < 0, counts, counts + front)
        hidden = self.backbone(x, **keywords)
        hidden = getattr(hidden, "last_hidden_state", hidden)
        if not isinstance(hidden, Tensor) or hidden.shape != x.shape:
            got = tuple(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
            raise ValueError(f"backbone must return hidden states of shape {tuple(x.shape)}, got {got}")

        read, middle, write = hidden.split([layout.read, layout.tokens, layout.write], dim=1)
        written = (write if layout.write else read).to(memory.dtype)
        # Never a view: it would keep the hidden states of the whole segment alive.
        new = written.clone() if counts is None else torch.where((counts != 0)[:, None, None], written, memory)
        if self.check_memory:
            _finite(new, f"the memory that leaves {name}")

        output = None
        if call.output in ("hidden", "logits"):
            output = middle[:, front:]
            if call.output == "logits":
                assert self.head is not None
                output = self.head(output)
        full = None if counts is None else counts + front
        if call.output == "sample_logits":
            assert self.head is not None
            assert isinstance(self.loss, SampleLoss)
            output = self.head(self.loss.chosen(middle, full))
        # Last, for a pass that recomputes a segment leaves it out, with the random numbers that a head may draw.
        loss = None
        if call.targets is not None and (window is None or not window.take(call, middle)):
            assert call.factor is not None
            loss = self.loss.of_segment(middle, call.targets, full, self.head, call.factor)
        return loss, new, output


def _finite(memory: Tensor, name: str) -> None:
    if not bool(torch.isfinite(memory).all()):
        bad = (~torch.isfinite(memory)).flatten(1).any(dim=1).nonzero().flatten().tolist()
        raise FloatingPointError(f"{name} holds NaN or infinity, in samples {bad}")


def _segment_loss(loss: Any, layout: SegmentLayout) -> SegmentLoss:
    if loss is None or isinstance(loss, type) or not hasattr(loss, "of_segment"):
        if loss is not None and (not callable(loss) or isinstance(loss, type)):
            got = f"the class {loss.__name__}" if isinstance(loss, type) else type(loss).__name__
            raise TypeError(f"loss must be TokenLoss, SampleLoss or a function, got {got}")
        loss = TokenLoss(loss)
    if isinstance(loss, TokenLoss) and loss.shift is None:
        loss = replace(loss, shift=layout.rule(Region.TOKENS, Region.TOKENS) is Rule.CAUSAL)
    made: SegmentLoss = loss
    return made


def _first_memory(memory: int | Tensor, width: int | None, embed: nn.Module | None) -> Tensor:
    """Rows (M, width) to start from."""
    if width is not None and (isinstance(width, bool) or not isinstance(width, int)):
        raise TypeError(f"width must be an int, got {type(width).__name__}")
    if width is not None and width < 1:
        raise ValueError(f"width must be at least 1, got {width}")
    weight = getattr(embed, "weight", None)
    known = weight.shape[1] if isinstance(weight, Tensor) and weight.dim() == 2 else None
    if width is not None and known not in (None, width):
        raise ValueError(f"width must be the embedding's, {known}, or left out, got {width}")
    width = known if width is None else width
    if isinstance(memory, Tensor):
        if memory.dim() != 2 or not memory.numel() or not memory.is_floating_point():
            raise ValueError(
                f"memory must be a number of rows or floating-point rows (M, width), got {memory.dtype} "
                f"{tuple(memory.shape)}"
            )
        if width not in (None, memory.shape[1]):
            raise ValueError(f"memory must have rows of width {width}, got {tuple(memory.shape)}")
        return memory.detach().clone()
    if isinstance(memory, bool) or not isinstance(memory, int):
        raise TypeError(f"memory must be an int or a tensor (M, width), got {type(memory).__name__}")
    if memory < 1:
        raise ValueError(f"memory must be at least 1 row, got {memory}; without memory there is no recurrence")
    if width is None:
        raise ValueError("width: neither memory nor embed tells the width of the rows; give width=, or memory as rows")
    if known is None:
        return 0.02 * torch.randn(memory, width)
    assert isinstance(weight, Tensor)
    # As the authors' wrapper for pretrained models does.
    scale = 1.0 if weight.device.type == "meta" else float(weight.detach().float().std())
    return scale * torch.randn(memory, width, dtype=weight.dtype, device=weight.device)


def _keywords(backbone: nn.Module) -> frozenset[str]:
    """Names of the backbone's arguments; ``"**"``: it takes any."""
    module = getattr(backbone, "_orig_mod", backbone)  # of torch.compile
    parameters = list(inspect.signature(module.forward).parameters.values())
    names = {p.name for p in parameters[1:] if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        names.add("**")
    return frozenset(names)


def bar(count: int, progress: bool, what: str = "segment") -> Iterable[int]:
    """``range(count)``, with a progress bar where asked."""
    if not progress:
        return range(count)
    try:
        from tqdm.auto import tqdm
    except ImportError:
        raise ImportError("progress=True needs tqdm: pip install tqdm") from None
    shown: Iterable[int] = tqdm(range(count), unit=what, dynamic_ncols=True, leave=False)
    return shown


def join(batch: Batch, pieces: Sequence[Tensor | None]) -> Tensor | None:
    """Outputs of the segments as those of the samples, (batch, length, ...), or the last segment's alone."""
    if batch.output is None:
        return None
    if batch.output.startswith("last_"):
        return pieces[-1]
    if batch.output == "sample_logits":
        each = torch.stack([piece for piece in pieces if piece is not None], dim=1)  # (batch, count, classes)
        last = batch.segments.last().clamp(min=0).expand(len(each))
        return each[torch.arange(len(each), device=each.device), last]
    segments = batch.segments
    joined = torch.cat([piece for piece in pieces if piece is not None], dim=1)  # (batch, count * size, ...)
    if segments.lengths is None and segments.length % segments.size == 0:
        return joined
    at = torch.arange(segments.length, device=joined.device)
    s = segments.segment_of()  # (batch or 1, length)
    if segments.align == "left":
        begin: Tensor | int = 0
        index = at[None]
    else:
        ends = torch.full((1,), segments.length, device=joined.device) if segments.lengths is None else segments.lengths
        begin = (ends[:, None] - (segments.count - s) * segments.size).clamp(min=0)
        index = s * segments.size + at - begin
    index = index.clamp(0, joined.shape[1] - 1).expand(segments.batch, -1)
    found = joined[torch.arange(segments.batch, device=joined.device)[:, None], index]
    if segments.lengths is None:
        return found
    padding = at >= segments.lengths[:, None]
    return found.masked_fill(padding.view(*padding.shape, *(1,) * (found.dim() - 2)), 0)
