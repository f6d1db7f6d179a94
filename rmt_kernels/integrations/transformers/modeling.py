"""RMT around a pretrained model of transformers (arXiv 2207.06881, 2304.11062)."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import ModelOutput

from rmt_kernels.integrations.transformers.activations import in_one_kernel
from rmt_kernels.integrations.transformers.attention import EXPLICIT, check_interface, register
from rmt_kernels.integrations.transformers.config import RMTConfig
from rmt_kernels.integrations.transformers.masks import CAUSAL
from rmt_kernels.integrations.transformers.rows import (
    Backbone,
    Head,
    check_layers,
    check_positions,
    head_of,
)
from rmt_kernels.layout import SegmentLayout
from rmt_kernels.recurrence import RecurrentMemory, SampleLoss, SegmentLoss, TokenLoss
from rmt_kernels.recurrence.policies import from_plain

__all__ = ["RMTForMaskedLM", "RMTForSequenceClassification", "RMTOutput", "RMTPreTrainedModel", "Unpadded"]


@dataclass
class RMTOutput(ModelOutput):  # type: ignore[misc]
    """What the models return.

    loss: 0-dim, with labels. logits: (batch, n, vocabulary), 0 at padding; of a classifier (batch, classes); of a step
    of generation (batch, 1, vocabulary). memory: (batch, M, width), after the last segment. past_key_values: the state
    of generation.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    memory: Tensor | None = None
    past_key_values: Any = None


@dataclass(frozen=True)
class Unpadded:
    """Samples with their tokens in front and padding behind, from a mask of any padding."""

    lengths: Tensor | None  # int64 (batch,); None: no padding at all
    order: Tensor | None  # int64 (batch, n), where each token was; None: where it is

    @classmethod
    def of(cls, ids: Tensor, mask: Tensor | None) -> Unpadded:
        """mask: (batch, n), not 0 at tokens. Reads back one number from a GPU; None: nothing."""
        if mask is None:
            return cls(None, None)
        if mask.shape != ids.shape:
            raise ValueError(
                f"attention_mask must have the shape of input_ids, {tuple(ids.shape)}, got {tuple(mask.shape)}; memory "
                "rows are no part of it"
            )
        there = mask != 0
        if bool(there.all()):
            return cls(None, None)
        lengths = there.sum(dim=1)
        if bool((there[:, 1:] <= there[:, :-1]).all()):
            return cls(lengths, None)
        return cls(lengths, there.logical_not().to(torch.uint8).argsort(dim=1, stable=True))

    def front(self, x: Tensor) -> Tensor:
        """(batch, n) with tokens in front."""
        return x if self.order is None else x.gather(1, self.order)

    def back(self, x: Tensor) -> Tensor:
        """(batch, n, ...) with tokens where they were."""
        if self.order is None:
            return x
        index = self.order.view(*self.order.shape, *(1,) * (x.dim() - 2)).expand_as(x)
        return torch.zeros_like(x).scatter(1, index, x)


class RMTPreTrainedModel(PreTrainedModel):  # type: ignore[misc]
    """A base model that reads segments and hands M memory rows on; ``model`` and ``initial_memory`` are its parts.

    Args:
        config: see :class:`RMTConfig`.
        base: the base model, whose attention is replaced; None: made from ``config.base_config`` with new weights.

    Raises:
        ValueError: a base model that can't be told who sees whom, or a segment longer than its table of positions.
    """

    config_class = RMTConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _auto: ClassVar[Any] = AutoModel
    _tied_weights_keys: ClassVar[Any] = None

    def __init__(self, config: RMTConfig, base: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        register()
        if base is None:
            if config.base_config is None:
                raise ValueError(
                    "config.base_config is not set; give RMTConfig the base model's configuration, or, around a "
                    f"pretrained model without memory, use {type(self).__name__}.from_base(...)"
                )
            own = copy.deepcopy(config.base_config)  # another model may be made from it
            base = self._auto.from_config(own, attn_implementation=EXPLICIT)
        check_interface(base)
        base.set_attn_implementation(EXPLICIT)
        in_one_kernel(base)
        self.model = base
        config.base_config = base.config
        base.config.rmt_backend = config.rmt_backend
        decoder = self._decoder
        self.layout = self._make_layout(config, getattr(decoder.config, "is_decoder", False))
        check_layers(decoder, self.layout.num_keys)
        check_positions(decoder, self.layout.num_keys, f"{config.segment} tokens, {config.front} marks and the memory")
        width = decoder.get_input_embeddings().weight.shape[1]
        self.initial_memory = nn.Parameter(torch.zeros(config.memory, width))
        self._add_parts(config, width)
        self._made_with = _fixed(config)
        self._no_split_modules = getattr(base, "_no_split_modules", None)
        self.post_init()

    @classmethod
    def from_base(cls, base: PreTrainedModel | str, *, memory: int, segment: int, **fields: Any) -> Any:
        """RMT around a base model, with memory drawn as its embedding's weights are distributed.

        The model that is given is taken over, not copied: its attention knows of segments from then on.

        Args:
            base: a model of transformers with the head that this class needs, or a name that ``from_pretrained`` takes.
            memory, segment, fields: see :class:`RMTConfig`.
        """
        known = set(inspect.signature(RMTConfig.__init__).parameters) | set(vars(PretrainedConfig())) | {"num_labels"}
        unknown = sorted(set(fields) - known)
        if unknown:
            raise TypeError(f"from_base has no argument {', '.join(unknown)}; see RMTConfig for those it has")
        if isinstance(base, PretrainedConfig):
            raise TypeError(f"base must be a model or a name, got a {type(base).__name__}; make the model of it first")
        if not isinstance(base, PreTrainedModel):
            base = cls._auto.from_pretrained(base)
        made = cls(RMTConfig(base.config, memory=memory, segment=segment, **fields), base)
        # Of the base nothing is cast: its buffers and some of its weights may be wider than the others.
        device = base.get_input_embeddings().weight.device
        base_names = {id(p) for p in base.parameters()}
        for parameter in made.parameters():
            if id(parameter) not in base_names:
                parameter.data = parameter.data.to(device, base.dtype)
        made.reset_memory()
        return made

    @torch.no_grad()
    def reset_memory(self) -> None:
        """Draw ``initial_memory`` anew, with the standard deviation of the embedding's weights."""
        weight = self.get_input_embeddings().weight
        if weight.device.type != "meta":
            nn.init.normal_(self.initial_memory, std=float(weight.float().std()))

    def _init_weights(self, module: nn.Module) -> None:
        # With the functions of nn.init, which from_pretrained keeps away from what it has loaded.
        if module is self:
            self.reset_memory()
        elif module is getattr(self, "score", None):
            nn.init.normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)

    @property
    def _decoder(self) -> PreTrainedModel:
        """The base model without a head."""
        found: PreTrainedModel = self.model.base_model
        return found

    def get_input_embeddings(self) -> nn.Embedding:
        """The base model's."""
        found: nn.Embedding = self.model.get_input_embeddings()
        return found

    def set_input_embeddings(self, value: nn.Module) -> None:
        """The base model's."""
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> Any:
        """The base model's, a module; None where it has no head."""
        return self.model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """The base model's."""
        self.model.set_output_embeddings(new_embeddings)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's, and the size in both configurations."""
        found = self.model.resize_token_embeddings(*args, **kwargs)
        self.config.vocab_size = self.model.config.get_text_config().vocab_size
        return found

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = checkpoint, **others: Any
    ) -> None:
        # Every segment goes through the same layers: the reentrant kind, transformers 4's default, makes a backward
        # traversal of its own for each, which DistributedDataParallel refuses and FSDP2 gets wrong.
        checkpointing = partial(gradient_checkpointing_func, use_reentrant=False)
        super()._set_gradient_checkpointing(enable, checkpointing, **others)

    def _make_layout(self, config: RMTConfig, is_decoder: bool) -> SegmentLayout:
        raise NotImplementedError

    def _add_parts(self, config: RMTConfig, width: int) -> None:
        """Make what a model has besides its base."""

    def _loss(self) -> SegmentLoss:
        return TokenLoss()

    def _head(self) -> nn.Module:
        return head_of(self.model)

    @property
    def recurrence(self) -> RecurrentMemory:
        """The segments' recurrence over this model's parts; its parameters are this model's."""
        try:
            return self._recurrence_now()
        except AttributeError as error:  # or nn.Module would say that there is no such property
            raise RuntimeError(f"{type(self.model).__name__} is no base model of a known kind: {error}") from error

    def _recurrence_now(self) -> RecurrentMemory:
        implementation = self._decoder.config._attn_implementation
        if implementation != EXPLICIT:
            raise ValueError(
                f"the base model's attention was set to {implementation!r}, which knows of no segments; set it back "
                f"with model.model.set_attn_implementation({EXPLICIT!r})"
            )
        if _fixed(self.config) != self._made_with:
            raise ValueError(
                f"config: memory, segment, mask, align and marks are fixed when a model is made, as {self._made_with}, "
                f"and are {_fixed(self.config)} now; make another with from_base"
            )
        embed, bptt = self.get_input_embeddings(), from_plain(self.config.bptt)
        parts = (embed, *self._modules.values(), *self.model._modules.values())
        made = self.__dict__.get("_recurrence")
        if made is None or made[0] != [id(part) for part in parts]:
            config = self.config
            recurrence = RecurrentMemory(
                Backbone(self._decoder, config), memory=torch.zeros_like(self.initial_memory, device="cpu"),
                segment=config.segment, layout=self.layout, embed=embed, head=self._head(), loss=self._loss(),
                align=config.align, bptt=bptt, prefix=self._prefix(),
            )  # fmt: skip
            # Not a submodule: every part of it is one already.
            made = self.__dict__["_recurrence"] = ([id(part) for part in parts], recurrence)
        found: RecurrentMemory = made[1]
        found.initial_memory = self.initial_memory
        found.bptt = bptt
        if found.prefix is not None:
            found.prefix = found.prefix.to(self.initial_memory.device)
        # The flags of the base model's own parts are theirs: some may be in another mode.
        own: list[Any] = [found, found.backbone]
        if isinstance(found.head, (Head, _Classifier)):
            own += [found.head, *([found.head.after] if isinstance(found.head, Head) else [])]
        for part in own:
            part.training = self.training
        return found

    def _prefix(self) -> list[int] | None:
        if not self.config.marks:
            return None
        cls, sep = self.config.marks
        return [cls, sep, sep]

    def _segments(
        self, input_ids: Tensor, mask: Tensor | None, labels: Tensor | None, memory: Tensor | None, outputs: str | None,
        items: Any = None,
    ) -> RMTOutput:  # fmt: skip
        """All segments of whole samples."""
        if not isinstance(input_ids, Tensor) or input_ids.dim() != 2:
            raise ValueError("input_ids must be token numbers, int64 (batch, n)")
        unpadded = Unpadded.of(input_ids, mask)
        if labels is not None and labels.shape == input_ids.shape:
            labels = unpadded.front(labels)
        found = self.recurrence(
            unpadded.front(input_ids), labels=labels, lengths=unpadded.lengths, memory=memory, outputs=outputs
        )  # fmt: skip
        loss, logits = found.loss, found.outputs
        if loss is not None and items is not None:
            # Trainer's mean over the tokens of several batches, of which this is one.
            loss = loss * self._counted(unpadded, labels) / items
        if logits is not None and outputs == "logits":
            logits = unpadded.back(logits)
        return RMTOutput(loss=loss, logits=logits, memory=found.memory)

    def _counted(self, unpadded: Unpadded, labels: Any) -> Tensor:
        """How many labels, with tokens in front, count."""
        counted: Tensor = labels != -100
        if unpadded.lengths is not None:
            counted = counted & (torch.arange(labels.shape[1], device=labels.device) < unpadded.lengths[:, None])
        loss = self.recurrence.loss
        if isinstance(loss, TokenLoss) and loss.shift:
            counted = counted[:, 1:]
        return counted.sum()


def _fixed(config: RMTConfig) -> tuple[Any, ...]:
    return config.memory, config.segment, config.mask, config.align, config.marks


def given_only(name: str, others: dict[str, Any]) -> None:
    """Raise TypeError for arguments that would be without effect, and for values that would have one elsewhere."""
    harmless = {"use_cache", "return_dict", "cache_position"}
    same: dict[str, Callable[[Any], bool]] = {
        "token_type_ids": lambda given: not bool(given.any()),  # one kind of tokens
        "position_ids": lambda given: bool((given == torch.arange(given.shape[-1], device=given.device)).all()),
        "logits_to_keep": lambda given: isinstance(given, int) and given == 0,
    }
    asked = {key: value for key, value in others.items() if value is not None and value is not False}
    wrong = [key for key in asked if key not in harmless and not (key in same and same[key](asked[key]))]
    if wrong:
        raise TypeError(
            f"{name} has no argument {', '.join(wrong)}; it takes input_ids, attention_mask, labels and "
            "memory, and rmt_kernels.maps recomputes attention maps"
        )


class RMTForMaskedLM(RMTPreTrainedModel):
    """An encoder over segments: every row sees every row of its segment, memory rows included."""

    _auto = AutoModelForMaskedLM
    accepts_loss_kwargs = True

    def _make_layout(self, config: RMTConfig, is_decoder: bool) -> SegmentLayout:
        if is_decoder:
            raise ValueError(f"{type(self.model).__name__} is made as a decoder; use RMTForCausalLM")
        return encoder_layout(config)

    def _loss(self) -> SegmentLoss:
        return TokenLoss(shift=False)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None,
        memory: Tensor | None = None, num_items_in_batch: Any = None, **others: Any,
    ) -> RMTOutput:  # fmt: skip
        """Read whole samples.

        Args:
            input_ids: int64 (batch, n), any n.
            attention_mask: (batch, n), 0 at padding, on either side.
            labels: int64 (batch, n), -100 where none counts.
            memory: what an earlier call returned, (batch, M, width). None: the start.
            num_items_in_batch: of Trainer: what the loss is divided by in place of the number of labels.

        Returns:
            RMTOutput; logits are left out in training.
        """
        given_only(type(self).__name__, others)
        outputs = None if labels is not None and self.training else "logits"
        return self._segments(input_ids, attention_mask, labels, memory, outputs, num_items_in_batch)


class RMTForSequenceClassification(RMTPreTrainedModel):
    """One label a sample, from its last segment: of an encoder from the first row (CLS), of a decoder from the last
    token. ``config.num_labels`` classes; one: a number, with squared error."""

    _auto = AutoModel
    accepts_loss_kwargs = False  # the mean over samples is Trainer's own

    def _add_parts(self, config: RMTConfig, width: int) -> None:
        self.score = nn.Linear(width, config.num_labels)

    @property
    def _encodes(self) -> bool:
        return self.layout.write == 0

    def _make_layout(self, config: RMTConfig, is_decoder: bool) -> SegmentLayout:
        if sees_both_ways(self._decoder):
            return encoder_layout(config)
        return decoder_layout(config)

    def _loss(self) -> SegmentLoss:
        one = self.config.num_labels == 1
        return SampleLoss(_squared if one else None, row=0 if self._encodes else -1)

    def _head(self) -> nn.Module:
        return _Classifier(self._decoder, self.score)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None,
        memory: Tensor | None = None, **others: Any,
    ) -> RMTOutput:  # fmt: skip
        """Read whole samples; labels: int64 (batch,), or float (batch,) where there is one class. See the base class;
        logits are (batch, classes)."""
        given_only(type(self).__name__, others)
        if self.config.num_labels == 1 and labels is not None and labels.shape[1:] == (1,):
            labels = labels[:, 0]
        return self._segments(input_ids, attention_mask, labels, memory, "sample_logits")


class _Classifier(nn.Module):
    """The base model's pooler, where it has one, and the output layer."""

    def __init__(self, base: PreTrainedModel, score: nn.Module) -> None:
        super().__init__()
        self.pooler, self.score = getattr(base, "pooler", None), score

    def forward(self, rows: Tensor) -> Tensor:
        """(batch, width) to (batch, classes)."""
        if self.pooler is not None:
            rows = self.pooler(rows[:, None])
        logits: Tensor = self.score(rows)
        return logits


def _squared(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.squeeze(-1) - labels.to(logits.dtype)).square()


def sees_both_ways(base: PreTrainedModel) -> bool:
    """Whether a base model's attention is an encoder's."""
    flags = [part.is_causal for part in base.modules() if isinstance(getattr(part, "is_causal", None), bool)]
    return bool(flags) and not any(flags)


def encoder_layout(config: RMTConfig) -> SegmentLayout:
    """Of an encoder's segment."""
    if config.mask == CAUSAL:
        raise ValueError("mask: the base model's rows see both ways; use mask='rmt'")
    return SegmentLayout.rmt_encoder(config.segment + config.front, config.memory)


def decoder_layout(config: RMTConfig) -> SegmentLayout:
    """Of a decoder's segment."""
    if config.marks:
        raise ValueError("marks: CLS and SEP are for encoders; leave marks out for a decoder")
    make = SegmentLayout.causal if config.mask == CAUSAL else SegmentLayout.rmt_decoder
    return make(config.segment, config.memory)


AutoConfig.register("rmt", RMTConfig, exist_ok=True)
AutoModelForMaskedLM.register(RMTConfig, RMTForMaskedLM, exist_ok=True)
AutoModelForSequenceClassification.register(RMTConfig, RMTForSequenceClassification, exist_ok=True)
