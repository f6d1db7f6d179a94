"""``RMTAttention``: segment attention with its projections, in place of ``nn.MultiheadAttention``."""

from __future__ import annotations

import operator
from collections.abc import Collection
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rmt_kernels.attention import segment_attention
from rmt_kernels.layout import Region, Rule, SegmentLayout
from rmt_kernels.padding import can_look, padding_runs
from rmt_kernels.reference import reference_attention
from rmt_kernels.scan import segment_scan

__all__ = ["RMTAttention"]


class RMTAttention(nn.Module):
    """Self-attention over the regions of a segment; a drop-in for ``nn.MultiheadAttention(batch_first=True)``.

    Loads the state dict of ``nn.MultiheadAttention`` and, where the layout is FULL, gives its outputs. It can take the
    place of ``self_attn`` in ``nn.TransformerEncoderLayer`` and ``nn.TransformerDecoderLayer``. Positional arguments
    are those of ``nn.MultiheadAttention``, in its order.

    Args:
        embed_dim: width of the rows; a multiple of ``num_heads``.
        num_heads: query heads.
        dropout: probability that an attention weight is dropped in training, 0 <= p < 1.
        bias: whether the projections have one.
        add_bias_kv, add_zero_attn, kdim, vdim: not supported; here so that positional arguments keep their meaning.
        batch_first: only True.
        device, dtype: of the parameters.
        num_kv_heads: key/value heads, a divisor of ``num_heads``. Fewer than ``num_heads`` is grouped-query attention
            with parameters ``q_proj``, ``k_proj``, ``v_proj``; otherwise there is one ``in_proj_weight``.
        layout: the layout of every call, unless the call brings its own. None: all rows see all rows.
        backend: as in :func:`rmt_kernels.segment_attention`.

    Raises:
        TypeError, ValueError: an argument that is not accepted.
    """

    in_proj_weight: nn.Parameter | None
    in_proj_bias: nn.Parameter | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        num_kv_heads: int | None = None,
        layout: SegmentLayout | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        for name, size, multiple in (
            ("num_heads", num_heads, 1), ("num_kv_heads", num_kv_heads, 1), ("num_heads", num_heads, num_kv_heads),
            ("embed_dim", embed_dim, num_heads),
        ):  # fmt: skip
            if isinstance(size, bool) or not isinstance(size, int):
                raise TypeError(f"{name} must be an int, got {type(size).__name__}")
            if size < 1 or size % multiple:
                kind = "positive" if multiple == 1 else f"a positive multiple of {multiple}"
                raise ValueError(f"{name} must be {kind}, got {size}")
        if isinstance(dropout, bool) or not isinstance(dropout, (int, float)):
            raise TypeError(f"dropout must be a float, got {type(dropout).__name__}")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must satisfy 0 <= dropout < 1, got {dropout}")
        for name, given, accepted, instead in (
            ("add_bias_kv", add_bias_kv, (False,), "memory rows in READ serve as trained keys and values"),
            ("add_zero_attn", add_zero_attn, (False,), "there is no substitute"),
            ("kdim", kdim, (None, embed_dim), "keys and values are the query's own rows"),
            ("vdim", vdim, (None, embed_dim), "keys and values are the query's own rows"),
            ("batch_first", batch_first, (True,), "transpose the input to (batch, rows, embed_dim)"),
        ):
            if given not in accepted:
                raise ValueError(f"{name}={given!r} is not supported, accepted: {accepted[-1]!r}; {instead}")
        _check_layout(layout)

        self.embed_dim, self.num_heads, self.num_kv_heads = embed_dim, num_heads, num_kv_heads
        self.head_dim = embed_dim // num_heads
        self.dropout, self.batch_first = float(dropout), True
        self.layout, self.backend = layout, backend
        # Read by nn.TransformerEncoderLayer: False keeps it from its fused inference path, which takes the weights,
        # knows nothing of layouts, and never calls this module.
        self._qkv_same_embed_dim = False

        made: dict[str, Any] = {"device": device, "dtype": dtype}
        if num_kv_heads == num_heads:
            self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dim, embed_dim, **made))
            self.in_proj_bias = nn.Parameter(torch.empty(3 * embed_dim, **made)) if bias else None
        else:
            self.in_proj_weight = self.in_proj_bias = None
            kv_dim = num_kv_heads * self.head_dim
            self.q_proj = nn.Linear(embed_dim, embed_dim, bias=bias, **made)
            self.k_proj = nn.Linear(embed_dim, kv_dim, bias=bias, **made)
            self.v_proj = nn.Linear(embed_dim, kv_dim, bias=bias, **made)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, **made)
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        """As ``nn.MultiheadAttention``: Xavier uniform in, ``nn.Linear``'s own weight out, zero biases."""
        if self.in_proj_weight is not None:
            nn.init.xavier_uniform_(self.in_proj_weight)
            inputs: list[nn.Parameter | None] = [self.in_proj_bias]
        else:
            inputs = []
            for linear in (self.q_proj, self.k_proj, self.v_proj):
                nn.init.xavier_uniform_(linear.weight)
                inputs.append(linear.bias)
        for bias in (*inputs, self.out_proj.bias):
            if bias is not None:
                nn.init.zeros_(bias)

    def extra_repr(self) -> str:
        """What ``print`` shows beside the submodules."""
        heads = f"{self.num_heads}" if self.num_kv_heads == self.num_heads else f"{self.num_heads}/{self.num_kv_heads}"
        layout = "" if self.layout is None else f", layout={self.layout.name}"
        return f"{self.embed_dim}, heads={heads}, dropout={self.dropout}{layout}, backend={self.backend!r}"

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        layout: SegmentLayout | None = None,
        token_lengths: Tensor | None = None,
        token_starts: Tensor | None = None,
        memory: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of the rows of ``query`` to one another, under a layout.

        Args:
            query: (batch, rows, embed_dim) or (rows, embed_dim): every row of the layout, ``[read | tokens | write]``
                (a layout with a cache: the cache's rows in front).
            key, value: None, or ``query`` itself.
            key_padding_mask: (batch, rows), bool with True = padding or float with -inf = padding, 0 = not. Padding
                must be a run at one end of TOKENS, the same end in the whole batch. While compiling, and away from the
                CPU, that end is taken to be the right one; for the other give ``token_starts``.
            need_weights: also return the weights, computed by the dense reference.
            attn_mask: nothing to be gained from it; accepted where it equals the layout's mask, in the convention
                of ``nn.MultiheadAttention``.
            average_attn_weights: average the weights over heads.
            is_causal: the layout is causal over all rows; without a layout, makes it so.
            layout: instead of the one given at construction. None in both places: all rows see all rows.
            token_lengths, token_starts: int32 (batch,), padding as in :func:`rmt_kernels.segment_attention`.
            memory: (batch, M, embed_dim), for layer-local recurrence: ``query`` then holds the tokens alone,
                (batch, N * layout.tokens, embed_dim), of N segments (the last may be short). Segment s is
                ``[memory_s | tokens_s | memory_s]`` as far as the layout has those regions, and ``memory_{s+1}`` is
                what the module gives for the WRITE rows (the READ rows, where the layout has no WRITE). A batch row
                without tokens in a segment keeps its memory. Padding then counts from the first token of all.

        Returns:
            ``(out, weights)``: (batch, the layout's query rows, embed_dim); and (batch, queries, keys), with heads
            after batch where not averaged, or None. With ``memory``: ``(out, new_memory)``, out for the tokens.

        Raises:
            TypeError, ValueError: an argument that is not accepted.
        """
        if (key is not None and key is not query) or (value is not None and value is not query):
            raise ValueError(
                "key and value must be None or the same object as query: this is self-attention; for other keys "
                "call rmt_kernels.segment_attention with a layout whose regions stand on one side only"
            )
        if not isinstance(query, Tensor):
            raise TypeError(f"query must be a torch.Tensor, got {type(query).__name__}")
        padding = _given(key_padding_mask=key_padding_mask, token_lengths=token_lengths, token_starts=token_starts)
        if len(padding) > 1:
            raise ValueError(f"{padding[1]}: padding is already given by {padding[0]}; give one of them")
        _check_layout(layout)
        layout = layout or self.layout
        if query.is_nested:
            if padding or memory is not None or attn_mask is not None or need_weights:
                raise ValueError("query: a nested tensor is accepted without masks, need_weights and memory only")
            return self._nested(query, layout, is_causal), None
        if query.dim() == 2 and memory is None:
            mask = None if key_padding_mask is None else key_padding_mask[None]
            out, weights = self(
                query[None], None, None, mask, need_weights, attn_mask, average_attn_weights, is_causal, layout=layout,
                token_lengths=token_lengths, token_starts=token_starts,
            )  # fmt: skip
            return out[0], None if weights is None else weights[0]
        if query.dim() != 3 or query.shape[-1] != self.embed_dim:
            raise ValueError(f"query must have shape (batch, rows, {self.embed_dim}), got {tuple(query.shape)}")

        rows = query.shape[1]
        if memory is not None:
            refused = _given(attn_mask=attn_mask, need_weights=need_weights or None, is_causal=is_causal or None)
            if refused:
                raise ValueError(f"{refused[0]} cannot be combined with memory=; the layout says who sees whom")
            if key_padding_mask is not None:
                token_lengths, token_starts = _padding(key_padding_mask, query, 0, rows)
            return segment_scan(query, memory, layout, self._project, self._attend, token_lengths, token_starts)

        layout = _resolve(layout, rows, attn_mask, is_causal)
        if rows != sum(_sizes(layout)):
            sizes = ", ".join(f"{region.name} {layout.size(region)}" for region in Region if layout.size(region))
            raise ValueError(f"query must have every row of the layout ({sizes}), got {rows} rows")
        if key_padding_mask is not None:
            first = layout.cache + layout.read
            token_lengths, token_starts = _padding(key_padding_mask, query, first, layout.tokens)
        queries, keys = _take(query, layout, layout.queries, layout.skip), _take(query, layout, layout.keys)
        heads = self._project(queries, keys)
        seed = self._draw_seed(query.device) if need_weights else None
        out = self._attend(*heads, layout, token_lengths, token_starts, seed)
        if not need_weights:
            return out, None
        weights = self._weights(*heads[:2], layout, token_lengths, token_starts, seed)
        return out, weights.mean(dim=1) if average_attn_weights else weights

    def _project(self, queries: Tensor, keys: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Rows (batch, rows, embed_dim) to query, key and value, (batch, rows, heads, head_dim)."""
        keys = queries if keys is None else keys
        if self.in_proj_weight is None:
            query, key, value = self.q_proj(queries), self.k_proj(keys), self.v_proj(keys)
        elif queries is keys:
            query, key, value = F.linear(queries, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        else:
            sizes = (self.embed_dim, 2 * self.embed_dim)
            weights = self.in_proj_weight.split(sizes)
            biases = (None, None) if self.in_proj_bias is None else self.in_proj_bias.split(sizes)
            query = F.linear(queries, weights[0], biases[0])
            key, value = F.linear(keys, weights[1], biases[1]).chunk(2, dim=-1)
        return tuple(part.unflatten(-1, (-1, self.head_dim)) for part in (query, key, value))  # type: ignore[return-value]

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, layout: SegmentLayout,
        token_lengths: Tensor | None = None, token_starts: Tensor | None = None, seed: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """(batch, rows, heads, head_dim) each, to (batch, query rows, embed_dim) after the output projection."""
        out = segment_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), layout, token_lengths=token_lengths,
            token_starts=token_starts, dropout_p=self.dropout if self.training else 0.0, seed=seed,
            backend=self.backend,
        )  # fmt: skip
        return self.out_proj(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def _weights(
        self, query: Tensor, key: Tensor, layout: SegmentLayout,
        token_lengths: Tensor | None, token_starts: Tensor | None, seed: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """The attention weights after dropout, (batch, heads, queries, keys): what attention gives for the identity."""
        wide = torch.promote_types(query.dtype, torch.float32)
        batch, keys, kv_heads, _ = key.shape
        identity = torch.eye(keys, dtype=wide, device=key.device).expand(batch, kv_heads, keys, keys)
        with torch.autocast(query.device.type, enabled=False):
            weights, _ = reference_attention(
                query.transpose(1, 2).to(wide), key.transpose(1, 2).to(wide), identity, layout,
                token_lengths=token_lengths, token_starts=token_starts,
                dropout_p=self.dropout if seed is not None else 0.0, seed=seed,
            )  # fmt: skip
        return weights.to(query.dtype)

    def _draw_seed(self, device: torch.device) -> Tensor | None:
        """A seed that the output and its weights share, None where nothing is dropped."""
        if not self.training or self.dropout == 0.0:
            return None
        return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)

    def _nested(self, query: Tensor, layout: SegmentLayout | None, is_causal: bool) -> Tensor:
        """A nested tensor, which ``nn.TransformerEncoder`` makes of a right-padded batch in evaluation."""
        lengths = [part.shape[0] for part in query.unbind()]
        rows = max(lengths) if layout is None else sum(_sizes(layout))
        if max(lengths) > rows:
            raise ValueError(f"query must have at most the layout's {rows} rows, got {max(lengths)}")
        padded = query.to_padded_tensor(0.0, (len(lengths), rows, self.embed_dim))
        mask = torch.arange(rows, device=query.device) >= torch.tensor(lengths, device=query.device)[:, None]
        out, _ = self(padded, key_padding_mask=mask, is_causal=is_causal, layout=layout)
        return torch.nested.as_nested_tensor([part[:n] for part, n in zip(out, lengths, strict=True)])


def _given(**arguments: Any) -> list[str]:
    return [name for name, argument in arguments.items() if argument is not None]


def _check_layout(layout: Any) -> None:
    if layout is not None and not isinstance(layout, SegmentLayout):
        raise TypeError(f"layout must be a SegmentLayout or None, got {type(layout).__name__}")


def _sizes(layout: SegmentLayout) -> list[int]:
    """Rows of each region, in the order of the keys."""
    return [layout.cache, layout.read, layout.tokens, layout.write]


def _take(x: Tensor, layout: SegmentLayout, regions: Collection[Region | str], skip: int = 0) -> Tensor:
    """The rows of some regions, of a tensor that holds every row of the layout; ``x`` itself where that is all."""
    sizes = _sizes(layout)
    if any(size and region not in regions for region, size in zip(Region, sizes, strict=True)):
        pieces = zip(Region, x.split(sizes, dim=1), strict=True)
        chosen = [piece for region, piece in pieces if region in regions]
        x = torch.cat(chosen, dim=1) if chosen else x[:, :0]
    return x[:, skip:] if skip else x


def _hidden(name: str, mask: Tensor) -> Tensor:
    """A bool mask, True = hidden, from a bool one or from an additive one of 0 and -inf."""
    if isinstance(mask, Tensor) and mask.dtype is torch.bool:
        return mask
    if not isinstance(mask, Tensor) or not mask.is_floating_point():
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{name} must be a bool tensor, or a float tensor of 0 and -inf, got {kind}")
    hidden = mask == float("-inf")
    if can_look(mask) and not bool((hidden | (mask == 0)).all()):
        raise ValueError(f"{name}: a float mask may hold 0 and -inf only; no backend adds other biases to the scores")
    return hidden


def _padding(mask: Tensor, query: Tensor, first: int, tokens: int) -> tuple[Tensor | None, Tensor | None]:
    """``(token_lengths, token_starts)``, at most one of them, for a mask whose TOKENS begin at ``first``."""
    hidden = _hidden("key_padding_mask", mask)
    if mask.shape != query.shape[:2] or mask.device != query.device:
        raise ValueError(
            f"key_padding_mask must have shape {tuple(query.shape[:2])} on {query.device}, got {tuple(mask.shape)} on "
            f"{mask.device}"
        )
    return padding_runs(
        hidden, first, tokens, name="key_padding_mask", elsewhere="for the left use token_starts",
        otherwise="for other masks use nn.MultiheadAttention",
    )  # fmt: skip


def _resolve(layout: SegmentLayout | None, rows: int, attn_mask: Tensor | None, is_causal: bool) -> SegmentLayout:
    """The layout of a call, in agreement with its attn_mask and is_causal."""
    hidden = None if attn_mask is None else _hidden("attn_mask", attn_mask)
    look = attn_mask is not None and can_look(attn_mask)
    if layout is None:
        causal = bool(is_causal) or (look and hidden is not None and bool(hidden.any()))
        layout = _whole(operator.index(rows), causal)  # index() makes a number of a compiled graph's symbol
    if is_causal and not _causal_over_all(layout):
        raise ValueError(f"is_causal=True contradicts the layout ({layout.name}), which is not causal over all rows")
    if hidden is not None and look:
        mask = layout.dense_mask()
        if hidden.shape[-2:] != mask.shape or hidden.dim() not in (2, 3) or not bool((hidden == ~mask).all()):
            raise ValueError(
                f"attn_mask (shape {tuple(hidden.shape)}) is not the mask of the layout ({layout.name}, {rows} rows); "
                "leave it out and say who sees whom with layout=, which is all this module computes with"
            )
    elif hidden is not None and not is_causal:
        raise ValueError(
            "attn_mask cannot be compared with the layout while compiling or away from the CPU; leave it out and give "
            "layout=, or is_causal=True where it is the causal mask"
        )
    return layout


# torch.compile cannot trace the making of a layout, so this is run, not traced.
@torch.compiler.assume_constant_result
def _whole(rows: int, causal: bool) -> SegmentLayout:
    """The layout of plain attention."""
    return _cached_whole(rows, causal)


@lru_cache(maxsize=64)
def _cached_whole(rows: int, causal: bool) -> SegmentLayout:
    rule, name = (Rule.CAUSAL, "causal") if causal else (Rule.FULL, "full")
    return SegmentLayout(tokens=rows, rules={("tokens", "tokens"): rule}, name=name)


def _causal_over_all(layout: SegmentLayout) -> bool:
    """Whether query row i sees keys 0 to i and no others, for all rows of a layout without skipped rows."""
    if layout.num_queries != layout.num_keys or layout.window is not None:
        return False
    row = 0
    for form in layout.forms:
        straight = form.lo == 0 and form.hi == row + 1 and form.own < 0 and (form.step == 1 or form.rows == 1)
        if form.rows and not straight:
            return False
        row += form.rows
    return True
