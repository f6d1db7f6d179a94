"""The configuration that all models share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from rmt_kernels.recurrence.policies import from_plain, resolve, to_plain

__all__ = ["POSITIONS", "ModelConfig"]

POSITIONS = ("learned", "relative", "alibi", "bias", "none")


@dataclass(frozen=True)
class ModelConfig:
    """The sizes and choices of every system. A field that a system has no use for must be left at its default.

    Args:
        vocabulary: token numbers are 0 to vocabulary - 1.
        tokens: T, tokens of a segment.
        memory: M, memory rows (slots).
        cache: C, rows of the previous segment that each layer of Transformer-XL keeps.
        width, heads, layers: of the transformer; width is a multiple of heads.
        inner: width of the feed-forward's inside. None: 4 x width.
        activation: of the feed-forward: ``"gelu"``, ``"gelu_tanh"`` or ``"relu"``.
        dropout: probability, 0 <= p < 1, on embeddings, attention probabilities and both branches of a layer.
        norm: ``"pre"`` (a last norm follows the layers) or ``"post"``.
        layout: the decoder's mask, ``"rmt_decoder"`` or ``"causal"``. ``""``: the system's first.
        positions: ``"learned"``, ``"relative"`` (Transformer-XL's), ``"alibi"``, ``"bias"`` (learned, one number a
            distance and head) or ``"none"``. ``""``: the system's first.
        relative: what ``"relative"`` positions give keys ahead, ``"clean"`` or ``"shifted"``; see
            :class:`rmt_kernels.Relative`.
        same_length: a token sees the last ``cache`` keys only, itself included.
        read_cache: memory rows see the cache too.
        tied: embedding and output layer share their weights.
        temperature: of the softmax of Memformer's write, 0 < temperature.
        bptt: how gradients go back through the segments, as in :class:`rmt_kernels.RecurrentMemory`; ``"replay"`` and
            the forms that :meth:`to_dict` gives are taken too.
        backend: as in :func:`rmt_kernels.segment_attention`.

    Raises:
        TypeError, ValueError: a field that is not accepted.
    """

    vocabulary: int
    tokens: int
    memory: int = 0
    cache: int = 0
    width: int = 128
    heads: int = 4
    layers: int = 4
    inner: int | None = None
    activation: str = "gelu"
    dropout: float = 0.0
    norm: str = "pre"
    layout: str = ""
    positions: str = ""
    relative: str = "clean"
    same_length: bool = False
    read_cache: bool = False
    tied: bool = True
    temperature: float = 1.0
    bptt: Any = "full"
    backend: str = "auto"

    def __post_init__(self) -> None:
        for name, least in (
            ("vocabulary", 1), ("tokens", 1), ("memory", 0), ("cache", 0), ("width", 1), ("heads", 1), ("layers", 1),
            ("inner", 1),
        ):  # fmt: skip
            value = getattr(self, name)
            if name == "inner" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int, got {type(value).__name__}")
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads, got {self.width} and {self.heads}")
        for name, accepted in (
            ("activation", ("gelu", "gelu_tanh", "relu")), ("norm", ("pre", "post")),
            ("layout", ("", "rmt_decoder", "causal")), ("positions", ("", *POSITIONS)),
            ("relative", ("clean", "shifted")),
        ):  # fmt: skip
            if getattr(self, name) not in accepted:
                raise ValueError(f"{name} must be one of {list(accepted)}, got {getattr(self, name)!r}")
        for name in ("same_length", "read_cache", "tied"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        for name in ("dropout", "temperature"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a float, got {type(value).__name__}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must satisfy 0 <= dropout < 1, got {self.dropout}")
        if not 0.0 < self.temperature < float("inf"):
            raise ValueError(f"temperature must be finite and above 0, got {self.temperature}")
        if not isinstance(self.backend, str):
            raise TypeError(f"backend must be a str, got {type(self.backend).__name__}")
        object.__setattr__(self, "bptt", from_plain(self.bptt))
        resolve(self.bptt)

    def to_dict(self) -> dict[str, Any]:
        """Every field as a plain JSON value."""
        return {field.name: getattr(self, field.name) for field in fields(self)} | {"bptt": to_plain(self.bptt)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """The inverse of :meth:`to_dict`; fields left out have their defaults."""
        known = [field.name for field in fields(cls)]
        unknown = [name for name in values if name not in known]
        if unknown:
            raise ValueError(f"unknown fields {unknown} of a model's configuration; accepted: {known}")
        missing = [name for name in ("vocabulary", "tokens") if name not in values]
        if missing:
            raise ValueError(f"a model's configuration needs {missing}, got only {list(values)}")
        return cls(**values)
