"""The configuration of RMT around a pretrained model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from transformers import AutoConfig, PretrainedConfig

from rmt_kernels.integrations.transformers.masks import CAUSAL, PAPER
from rmt_kernels.recurrence.policies import from_plain, resolve, to_plain

__all__ = ["RMTConfig", "marks_of"]


class RMTConfig(PretrainedConfig):  # type: ignore[misc]
    """A base model's configuration, and how it reads segments.

    Args:
        base_config: of the base model, an object or a dict with ``model_type``.
        memory: M, memory rows at an end of a segment.
        segment: tokens of a segment, the base model's rows less the memory's.
        mask: ``"rmt"``: the paper's (arXiv 2207.06881; for encoders, which have one block of memory rows, that of
            2304.11062), or ``"rmt_causal"``: the authors' wrapper's, plain causal over ``[READ | TOKENS | WRITE]``.
        bptt: how gradients go back through the segments, as in :class:`rmt_kernels.RecurrentMemory`; ``"replay"`` is
            ``Replay()``.
        align: which segment of a sample is the short one: the last (``"left"``) or the first (``"right"``).
        marks: (CLS, SEP) token numbers, for encoders: every segment is read as ``[CLS | memory | SEP | tokens | SEP]``
            with those positions (2304.11062, section 3); see :func:`marks_of`. None: ``[memory | tokens]``.
        rmt_backend: as in :func:`rmt_kernels.segment_attention`.

    Raises:
        TypeError, ValueError: a field that is not accepted.
    """

    model_type = "rmt"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["memory", "past_key_values"]
    sub_configs: ClassVar[dict[str, Any]] = {"base_config": AutoConfig}

    def __init__(
        self,
        base_config: PretrainedConfig | Mapping[str, Any] | None = None,
        memory: int = 16,
        segment: int = 512,
        mask: str = PAPER,
        bptt: Any = "full",
        align: str = "left",
        marks: Sequence[int] | None = None,
        rmt_backend: str = "auto",
        **others: Any,
    ) -> None:
        if isinstance(base_config, Mapping):
            fields = dict(base_config)
            if "model_type" not in fields:
                raise ValueError("base_config: a dict needs 'model_type', such as 'gpt2'")
            base_config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        for name, value in (("memory", memory), ("segment", segment)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int, got {type(value).__name__}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name, choice, accepted in (("mask", mask, (PAPER, CAUSAL)), ("align", align, ("left", "right"))):
            if choice not in accepted:
                raise ValueError(f"{name} must be one of {list(accepted)}, got {choice!r}")
        if marks is not None:
            marks = list(marks)
            if len(marks) != 2 or any(isinstance(mark, bool) or not isinstance(mark, int) for mark in marks):
                raise ValueError(f"marks must be the token numbers of CLS and SEP, got {marks!r}")
        resolve(from_plain(bptt))
        self.base_config = None  # while the base class sets what every part is to use: this one has its own
        self.memory, self.segment, self.mask, self.align, self.marks = memory, segment, mask, align, marks
        self.bptt, self.rmt_backend = to_plain(bptt), rmt_backend
        if base_config is not None:  # or output and input embeddings that are not tied would be
            others.setdefault("tie_word_embeddings", getattr(base_config, "tie_word_embeddings", False))
        super().__init__(**others)
        self.base_config = base_config
        if base_config is not None:
            for name in ("vocab_size", "hidden_size", "pad_token_id", "bos_token_id", "eos_token_id"):
                if getattr(self, name, None) is None and getattr(base_config, name, None) is not None:
                    setattr(self, name, getattr(base_config, name))

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers.

        Raises:
            ValueError: the configuration of another kind of model.
        """
        kind = config_dict.get("model_type", cls.model_type)
        if kind != cls.model_type:
            raise ValueError(
                f"this is the configuration of a {kind!r} model without memory; put one into RMT with "
                "RMTForCausalLM.from_base(folder, memory=..., segment=...), or from_base of the class that you need"
            )
        return super().from_dict(config_dict, **kwargs)

    @property
    def front(self) -> int:
        """Rows of marks in front of every segment's tokens."""
        return 3 if self.marks else 0


def marks_of(tokenizer: Any) -> tuple[int, int]:
    """CLS and SEP of a tokenizer, for :class:`RMTConfig`.

    Raises:
        ValueError: it has not both.
    """
    found = {}
    for name in ("cls_token", "sep_token"):
        number = getattr(tokenizer, f"{name}_id", None)
        if number is None:
            raise ValueError(
                f"{type(tokenizer).__name__} has no {name}, which ends a segment of an encoder; add one with "
                f"tokenizer.add_special_tokens({{{name!r}: ...}}), or leave marks= out"
            )
        found[name] = int(number)
    return found["cls_token"], found["sep_token"]
