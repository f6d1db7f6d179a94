"""The attention function of transformers' attention interface, and its registration."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from rmt_kernels.attention import segment_attention
from rmt_kernels.integrations.transformers.masks import CAUSAL, PAPER, SegmentMask, segment_mask
from rmt_kernels.layout import SegmentLayout
from rmt_kernels.padding import padding_runs

__all__ = ["EXPLICIT", "attend", "check_interface", "register", "swap_in"]

EXPLICIT = "rmt_layout"


def register() -> None:
    """Make ``attn_implementation="rmt"`` and ``"rmt_causal"`` known to transformers; doing it again changes nothing.

    ``"rmt"`` is the paper's mask (arXiv 2207.06881; for encoders that of 2304.11062), ``"rmt_causal"`` that of the
    authors' wrapper, plain causal over ``[READ | TOKENS | WRITE]``. How many rows are memory is said by
    ``config.rmt_memory`` (rows of READ and of WRITE; or ``{"read": rows, "write": rows}``), or with each call by
    ``model(..., rmt_layout=layout)``.

    ``"rmt_layout"`` has no mask hook: every call must bring ``rmt_layout=``, padding as ``rmt_lengths=`` or
    ``rmt_starts=`` (int32 (batch,)), and nothing is read back from a GPU. An ``attention_mask`` would not reach it.
    """
    for name in (PAPER, CAUSAL):
        AttentionInterface.register(name, attend)
        AttentionMaskInterface.register(name, segment_mask)
    AttentionInterface.register(EXPLICIT, attend)


def swap_in(model: PreTrainedModel, memory: int | dict[str, int] | None, implementation: str = PAPER) -> None:
    """Have a model of transformers compute its attention here, from the next call on.

    Args:
        model: a decoder or an encoder that uses transformers' attention interface.
        memory: ``config.rmt_memory``; None: ``rmt_layout=`` comes with each call.
        implementation: ``"rmt"``, ``"rmt_causal"`` or ``"rmt_layout"``.

    Raises:
        ValueError: the model does not use the attention interface, or the name is another one.
    """
    if implementation not in (PAPER, CAUSAL, EXPLICIT):
        raise ValueError(f"implementation must be {PAPER!r}, {CAUSAL!r} or {EXPLICIT!r}, got {implementation!r}")
    check_interface(model)
    register()
    model.set_attn_implementation(implementation)
    for config in {id(part.config): part.config for part in model.modules() if hasattr(part, "config")}.values():
        if memory is not None:
            config.rmt_memory = memory


def check_interface(model: PreTrainedModel) -> None:
    """Raise ValueError where a model does not use transformers' attention interface."""
    whole = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    if not all(type(part)._can_set_attn_implementation() for part in whole):
        import transformers

        raise ValueError(
            f"{type(model).__name__} of transformers {transformers.__version__} does not use the attention interface "
            "(AttentionInterface), so its attention can't be replaced; use a version of transformers in which it does, "
            "or rmt_kernels.RecurrentMemory around a model built on rmt_kernels.RMTAttention"
        )


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    rmt_layout: SegmentLayout | None = None,
    rmt_lengths: Tensor | None = None,
    rmt_starts: Tensor | None = None,
    rmt_query_start: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Segment attention for one layer of a model of transformers.

    Args:
        module: the layer's attention.
        query: (batch, heads, queries, head_dim); key, value: (batch, kv_heads, keys, head_dim). Any strides.
        attention_mask: a :class:`SegmentMask`, or None.
        scaling, dropout: of the scores, and of the probabilities.
        rmt_layout, rmt_lengths, rmt_starts, rmt_query_start: given to the model with the call: ``layout``,
            ``token_lengths``, ``token_starts`` and ``query_start`` of :func:`rmt_kernels.segment_attention`. They go
            before what the mask hook found.

    Returns:
        (batch, queries, heads, head_dim), None.

    Raises:
        ValueError: a feature of the model that segment attention has not, or no layout.
    """
    _refuse(module, others, key.shape[2])
    mask = attention_mask if isinstance(attention_mask, SegmentMask) else None
    if attention_mask is not None and mask is None:
        raise ValueError(
            f"attention_mask: a mask of shape {tuple(getattr(attention_mask, 'shape', ()))} was given; segment "
            "attention takes a (batch, keys) mask of padding, or rmt_layout=, rmt_lengths= and rmt_starts= with the "
            "call; for other masks use attn_implementation='sdpa'"
        )
    if mask is not None and mask.refused:
        raise ValueError(f"{type(module).__name__}: {mask.refused} can't be served by segment attention; use 'sdpa'")
    layout, lengths, starts, start = rmt_layout, rmt_lengths, rmt_starts, rmt_query_start
    if layout is None:
        if mask is None or mask.layout is None:
            if mask is not None and mask.missing.startswith("config.rmt_memory says"):
                raise ValueError(f"{type(module).__name__}: {mask.missing}")
            why = "" if mask is None else f" ({mask.missing})"
            if getattr(getattr(module, "config", None), "_attn_implementation", None) == EXPLICIT:
                raise ValueError(
                    f"{type(module).__name__}: no rmt_layout= has reached this layer; give it to the model's call, or "
                    "call the RMT model that this one is part of. Where it was given, this model of transformers does "
                    "not hand keywords on to its attention, and can't be served"
                )
            raise ValueError(
                f"{type(module).__name__}: nothing says which rows are memory{why}; set config.rmt_memory to the "
                "number of memory rows, or give rmt_layout= to the model's call"
            )
        layout, start = mask.layout, mask.query_start
        if start is not None and start.device != query.device:
            start = start.to(query.device)
        if layout.num_keys < key.shape[2]:  # a static cache: the rest is empty
            key, value = key[:, :, : layout.num_keys], value[:, :, : layout.num_keys]
    elif not isinstance(layout, SegmentLayout):
        raise TypeError(f"rmt_layout must be a SegmentLayout, got {type(layout).__name__}")
    if mask is not None and mask.hidden is not None and lengths is None and starts is None:
        hidden = mask.hidden
        if hidden.shape != (query.shape[0], layout.num_keys):
            raise ValueError(
                f"attention_mask must cover every row of [READ | TOKENS | WRITE], ({query.shape[0]}, "
                f"{layout.num_keys}), got {tuple(hidden.shape)}"
            )
        lengths, starts = padding_runs(
            hidden, layout.key_offset("tokens"), layout.key_size("tokens"), name="attention_mask", side=mask.side,
            elsewhere="set config.rmt_padding_side, or give rmt_lengths= or rmt_starts= to the model's call",
            otherwise="for other masks use attn_implementation='sdpa'",
        )  # fmt: skip
    out = segment_attention(
        query, key, value, layout, scale=scaling, token_lengths=lengths, token_starts=starts, query_start=start,
        dropout_p=float(dropout), backend=getattr(getattr(module, "config", None), "rmt_backend", "auto"),
    )  # fmt: skip
    return out.transpose(1, 2), None


def _refuse(module: nn.Module, others: dict[str, Any], keys: int) -> None:
    """Raise ValueError where the layer asks for what segment attention has not."""
    window, config = others.get("sliding_window"), getattr(module, "config", None)
    kinds, number = getattr(config, "layer_types", None) or [], getattr(module, "layer_idx", None)
    chunk = getattr(config, "attention_chunk_size", None)
    if number is None or number >= len(kinds) or kinds[number] != "chunked_attention":
        chunk = None
    asked = [
        name
        for name, wanted in (
            ("a soft cap on the scores (softcap)", others.get("softcap") is not None),
            ("attention sinks (s_aux)", others.get("s_aux") is not None),
            (f"a sliding window of {window}", window is not None and isinstance(window, int) and window < keys),
            (f"attention in chunks of {chunk}", chunk is not None and chunk < keys),
            ("a bias on the scores (position_bias)", others.get("position_bias") is not None),
            ("a mask of heads (head_mask)", others.get("head_mask") is not None),
            ("attention weights (output_attentions)", bool(others.get("output_attentions"))),
            ("cross-attention", bool(getattr(module, "is_cross_attention", False))),
        )
        if wanted
    ]
    if "CrossAttention" in type(module).__name__:
        asked.append("cross-attention")
    if asked:
        raise ValueError(
            f"{type(module).__name__} asks for {' and '.join(dict.fromkeys(asked))}, which segment attention does not "
            "serve; use attn_implementation='sdpa' or 'eager' for this model"
        )
