"""Who is compared. Each opponent is timed as its stock functions alone: masks, and our argument checks, are paid for
before the clock starts. Ours is timed through the public ``segment_attention``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Case, Inputs
from rmt_kernels import SegmentLayout, segment_attention
from rmt_kernels.backends import cpu, stock
from rmt_kernels.backends.call import Call

__all__ = ["CONTESTANTS", "Contestant", "computed_layout", "opponents", "plain_form"]

Run = Callable[[], Tensor]
_MOST_BYTES = 2**30  # for one matrix of scores (naive attention holds several), or for the mask given to SDPA


@dataclass(frozen=True)
class Contestant:
    """A way of computing a case. ``build(case, inputs)`` prepares it and returns the call that is timed.

    ``objection(case, dtype, backward)`` is None where it can compute the case, otherwise the reason why not.
    """

    name: str
    label: str
    build: Callable[[Case, Inputs], Run]
    objection: Callable[[Case, torch.dtype, bool], str | None]

    def same(self, case: Case) -> bool:
        """Whether it computes the case itself, and not the ceiling without memory rules."""
        return not self.name.startswith("plain") or plain_form(case.layout) in ("full", "causal")


def plain_form(layout: SegmentLayout) -> str | None:
    """What SDPA without a mask makes of the layout: exactly it, "full" or "causal"; else "ceiling", or None."""
    queries, keys = layout.num_queries, layout.num_keys
    if layout.visible() == queries * keys:
        return "full"
    if queries != keys:
        return None
    rows = torch.arange(queries)
    lo, hi = layout.intervals().unbind(1)
    exact = bool((lo == 0).all() and (hi == rows + 1).all()) and layout.visible() == queries * (queries + 1) // 2
    return "causal" if exact else "ceiling"


def computed_layout(contestant: Contestant, case: Case) -> SegmentLayout:
    """The layout whose attention the contestant computes: the case's, or plain causal over as many rows."""
    return case.layout if contestant.same(case) else SegmentLayout.causal(case.layout.num_queries, 0)


def _call(case: Case, inputs: Inputs) -> Call:
    return Call(
        inputs.query, inputs.key, inputs.value, case.layout, None, case.head_dim**-0.5, None, None, None, None, 0.0,
        None, False,
    )  # fmt: skip


def _bias(case: Case, inputs: Inputs) -> Tensor:
    bias: Tensor = stock.dense_bias(case.layout, inputs.query.dtype, inputs.query.device)
    return bias


def _build_naive(case: Case, inputs: Inputs) -> Run:
    bias, scale, group = _bias(case, inputs), case.head_dim**-0.5, case.heads // case.kv_heads

    def run() -> Tensor:
        key, value = inputs.key, inputs.value
        if group > 1:
            key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
        scores = inputs.query @ key.transpose(-1, -2) * scale + bias
        return torch.matmul(scores.softmax(dim=-1), value)

    return run


def _build_dense(case: Case, inputs: Inputs) -> Run:
    bias, grouped = _bias(case, inputs), case.heads != case.kv_heads
    return lambda: F.scaled_dot_product_attention(
        inputs.query, inputs.key, inputs.value, attn_mask=bias, enable_gqa=grouped
    )


def _build_split(case: Case, inputs: Inputs) -> Run:
    call = _call(case, inputs)
    return lambda: stock.split.compute(call)


def _build_plain(case: Case, inputs: Inputs) -> Run:
    causal, grouped = plain_form(case.layout) != "full", case.heads != case.kv_heads
    return lambda: F.scaled_dot_product_attention(
        inputs.query, inputs.key, inputs.value, is_causal=causal, enable_gqa=grouped
    )


@lru_cache(maxsize=1)
def _compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def _build_flex(case: Case, inputs: Inputs) -> Run:
    from torch.nn.attention.flex_attention import create_block_mask

    mask = case.layout.dense_mask(inputs.query.device)

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return mask[q, k]

    blocks = create_block_mask(
        visible, None, None, case.layout.num_queries, case.layout.num_keys, device=str(inputs.query.device)
    )
    # Past its limit of recompilations torch.compile would fall back to the unfused form without a word.
    torch._dynamo.reset()
    compiled, grouped = _compiled_flex(), case.heads != case.kv_heads

    def run() -> Tensor:
        with torch.no_grad():
            result: Tensor = compiled(inputs.query, inputs.key, inputs.value, block_mask=blocks, enable_gqa=grouped)
        return result

    run()
    return run


def _build_ours(case: Case, inputs: Inputs) -> Run:
    return lambda: segment_attention(inputs.query, inputs.key, inputs.value, case.layout, backend="cpu")


def _too_large(what: str, size: int) -> str | None:
    return f"{what} would take {size / 2**30:.1f} GiB" if size > _MOST_BYTES else None


def _naive_objection(case: Case, dtype: torch.dtype, backward: bool) -> str | None:
    return _too_large("one matrix of scores", case.score_bytes(dtype))


def _dense_objection(case: Case, dtype: torch.dtype, backward: bool) -> str | None:
    return _too_large("the mask", case.layout.num_queries * case.layout.num_keys * dtype.itemsize)


def _split_objection(case: Case, dtype: torch.dtype, backward: bool) -> str | None:
    layout = case.layout
    if layout.window is not None or any(form.own >= 0 for form in layout.forms if form.rows):
        return "a call per region cannot express a window or SELF rules"
    return None


def _plain_objection(case: Case, dtype: torch.dtype, backward: bool) -> str | None:
    return None if plain_form(case.layout) else "no plain causal attention has this shape"


def _flex_objection(case: Case, dtype: torch.dtype, backward: bool) -> str | None:
    if backward:
        return "FlexAttention has no backward on the CPU"
    return _dense_objection(case, dtype, backward)


CONTESTANTS: dict[str, Contestant] = {
    contestant.name: contestant
    for contestant in (
        Contestant("ours", "rmt_kernels", _build_ours, lambda case, dtype, backward: cpu.why_missing or None),
        Contestant("dense", "SDPA, dense mask", _build_dense, _dense_objection),
        Contestant("split", "three-call split", _build_split, _split_objection),
        Contestant("plain", "plain SDPA", _build_plain, _plain_objection),
        Contestant("flex", "FlexAttention", _build_flex, _flex_objection),
        Contestant("naive", "naive PyTorch", _build_naive, _naive_objection),
    )
}


def opponents(case: Case, dtype: torch.dtype) -> tuple[str, ...]:
    """The stock ways that compute the case exactly and could be its fastest.

    Not FlexAttention, which is measured on the target alone: on the CPU it has no backward, and it takes seconds of
    compilation for every shape.
    """
    able = (c for c in CONTESTANTS.values() if c.same(case) and c.objection(case, dtype, True) is None)
    return tuple(c.name for c in able if c.name not in ("ours", "flex"))
