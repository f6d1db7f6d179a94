"""Attention maps: what a model's rows attended to, for pictures and figures.

No kernel stores a probability. But a row's are known from its query, the keys and the row's log-sum-exp, which kernels
give anyway: ``p_ij = exp(score_ij - lse_i)``. So a forward pass is recorded, and the rows of interest are recomputed.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rmt_kernels import attention, reference
from rmt_kernels.backends.call import Call, check_values
from rmt_kernels.layout import Region, SegmentLayout
from rmt_kernels.relative import Relative, Terms

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Recorded", "Recording", "Rows", "attention_probabilities", "plot_maps", "record_attention"]

Rows = Region | str | slice | Sequence[int] | Tensor | None
_SCORES_AT_ONCE = 1 << 22


def attention_probabilities(
    query: Tensor,
    key: Tensor,
    layout: SegmentLayout,
    lse: Tensor | None = None,
    *,
    rows: Rows = None,
    cache: Tensor | tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
    token_lengths: Tensor | None = None,
    token_starts: Tensor | None = None,
    cache_starts: Tensor | None = None,
    query_start: Tensor | None = None,
    relative: Relative | None = None,
) -> Tensor:
    """What query rows of a :func:`rmt_kernels.segment_attention` call attend to, before dropout. Not differentiable.

    Scores are computed for a few rows at a time, so what this takes is little more than what it returns.

    Args:
        query, key, layout, scale, token_lengths, token_starts, cache_starts, query_start, relative: those of the call.
        lse: (batch, heads, queries), what the call returned with ``return_lse=True``. None: it is computed again.
        rows: which of the call's query rows: a query region (``"write"``), a slice, or indices from 0; None: all.
        cache: key of the CACHE region, (batch, kv_heads, cache, head_dim), where it was given apart; or the pair that
            the call was given.

    Returns:
        (batch, heads, chosen rows, keys), float32 (float64 for float64 queries), as exact as lse. Hidden keys have 0. A
        row sums to 1, or to 0 where it sees nothing. With an lse of other arguments rows have other sums.

    Raises:
        TypeError, ValueError: an argument that is not accepted.
    """
    if isinstance(cache, Tensor):
        cache = (cache, cache)
    call = attention._checked(
        query, key, key, layout, cache, scale, token_lengths, token_starts, cache_starts, query_start, 0.0, None,
        relative, True,
    )  # fmt: skip
    if lse is not None:
        if not isinstance(lse, Tensor) or lse.dtype not in (torch.float32, torch.float64):
            kind = lse.dtype if isinstance(lse, Tensor) else type(lse).__name__
            raise TypeError(f"lse must be a float32 or float64 tensor, as segment_attention returns it, got {kind}")
        if lse.shape != query.shape[:3] or lse.device != query.device:
            raise ValueError(
                f"lse must have shape {tuple(query.shape[:3])}, (batch, heads, queries), on {query.device}, got "
                f"{tuple(lse.shape)} on {lse.device}"
            )
    check_values(call)
    return _recorded(call, lse, "", "", 0, copy=False).probabilities(rows)


@dataclass(frozen=True, eq=False)
class Recorded:
    """One call of ``segment_attention``, without its values; nothing that happens later changes it.

    query, key: (batch, heads, queries, head_dim), (batch, kv_heads, keys, head_dim), CACHE rows included.
    lse: (batch, heads, queries); None from a backend that keeps it to itself (``"stock"``).
    module: name, in the recorded model, of the innermost module that was being called; ``""`` without a model.
    number: calls of the same module and layout before this one: the segment, where modules are called once a segment.
    """

    query: Tensor
    key: Tensor
    layout: SegmentLayout
    lse: Tensor | None
    scale: float
    token_lengths: Tensor | None
    token_starts: Tensor | None
    cache_starts: Tensor | None
    query_start: Tensor | None
    relative: Terms | None
    backend: str
    module: str
    number: int

    @torch.no_grad()
    def probabilities(self, rows: Rows = None) -> Tensor:
        """Of the chosen query rows, see :func:`attention_probabilities`: (batch, heads, rows, keys)."""
        chosen = _row_numbers(self.layout, rows).to(self.query.device)
        batch, heads, _, _ = self.query.shape
        wide = torch.promote_types(self.query.dtype, torch.float32)
        found = torch.empty(batch, heads, len(chosen), self.layout.num_keys, dtype=wide, device=self.query.device)
        at_once = max(1, _SCORES_AT_ONCE // max(1, batch * heads * self.layout.num_keys))
        # Under autocast the products would be narrower than those that gave lse.
        with torch.autocast(self.query.device.type, enabled=False):
            key = self.key.to(wide).repeat_interleave(heads // self.key.shape[1], dim=1)
            for piece, into in zip(chosen.split(at_once), found.split(at_once, dim=2), strict=True):
                into.copy_(self._of(piece, key))
        return found

    def _of(self, rows: Tensor, key: Tensor) -> Tensor:
        """(batch, heads, rows, keys)"""
        layout, terms = self.layout, _mapped(lambda tensor: tensor.to(key.dtype), self.relative)
        if terms is not None and terms.shifted:  # a row's scores take in the next row's
            rows = torch.stack([rows, (rows + 1).clamp(max=layout.num_queries - 1)], dim=1).flatten()
        of_layout = self._layout_rows(rows)
        visible = self._visible(of_layout)
        blind = ~visible.any(dim=-1)[:, None, :, None]
        query, offsets = self.query, None if terms is None else reference._offsets(layout, of_layout)
        scores = reference._scores(query[:, :, rows].to(key.dtype), key, self.scale, terms, offsets, blind)
        if terms is not None and terms.shifted:
            rows, visible, scores = rows[::2], visible[:, ::2], scores[:, :, ::2]
        scores = scores.masked_fill(~visible[:, None], float("-inf"))
        lse = scores.logsumexp(dim=-1) if self.lse is None else self.lse[:, :, rows].to(key.dtype)
        # A row that sees nothing has -inf - -inf.
        return (scores - lse[..., None]).exp().masked_fill(~visible[:, None], 0.0)

    def _layout_rows(self, rows: Tensor) -> Tensor:
        """Rows of the layout, skipped ones counted, int64 (batch, rows)."""
        if self.query_start is None:
            return (rows + self.layout.skip).expand(len(self.query), -1)
        return rows + self.query_start.long()[:, None]  # all query rows are TOKENS

    def _visible(self, rows: Tensor) -> Tensor:
        """Which keys rows of the layout see, bool (batch, rows, keys)."""
        layout, device = replace(self.layout, skip=0), rows.device
        known = rows.clamp(0, max(0, layout.num_queries - 1))  # kernels gave NaN where a start was out of range
        lo, hi = layout.intervals().to(device)[known].unbind(-1)
        gap_lo, gap_hi = layout.gaps().to(device)[known].unbind(-1)
        own = layout.own_keys().to(device)[known]
        keys = torch.arange(layout.num_keys, device=device)

        def inside(first: Tensor, end: Tensor) -> Tensor:
            return (keys >= first[..., None]) & (keys < end[..., None])

        visible = (inside(lo, hi) & ~inside(gap_lo, gap_hi)) | (keys == own[..., None])
        cache, read, tokens, _ = layout.key_sizes
        row_padding = self._padding(rows - layout.forms[0].rows, layout.forms[1].rows)
        key_padding = self._padding((keys - cache - read)[None], tokens)
        visible &= ~row_padding[..., None] & ~key_padding[:, None]
        if self.cache_starts is not None:
            visible &= ~((keys < cache) & (keys < self.cache_starts[:, None]))[:, None]
        return visible

    def _padding(self, position: Tensor, tokens: int) -> Tensor:
        """Which TOKENS positions are padding, bool (batch, n); positions (batch or 1, n) out of 0 to tokens - 1 are
        other regions'."""
        padding = torch.zeros_like(position, dtype=torch.bool)
        if self.token_starts is not None:
            padding = padding | (position < self.token_starts[:, None])
        if self.token_lengths is not None:
            padding = padding | (position >= self.token_lengths[:, None])
        return padding & (position >= 0) & (position < tokens)


class Recording(list[Recorded]):
    """The calls of a forward pass, in order."""

    def by_module(self) -> dict[str, list[Recorded]]:
        """The calls of each module, modules in the order of their first call: layer by layer, segment by segment."""
        found: dict[str, list[Recorded]] = {}
        for call in self:
            found.setdefault(call.module, []).append(call)
        return found


@contextmanager
def record_attention(model: nn.Module | None = None) -> Iterator[Recording]:
    """Record every ``segment_attention`` of this thread: ``with record_attention(model) as calls: model(ids)``.

    Gradients are off inside. Results are the same, bit for bit; outside nothing is recorded, and nothing costs more.
    Queries and keys are copied, so what is recorded takes as much memory as they do. Compiled models leave their graphs
    at attention, which ``fullgraph=True`` refuses; replays of a CUDA graph are not recorded.

    Args:
        model: whose modules give the calls their names. None: calls have none.

    Raises:
        TypeError: ``model`` is no module.
        RuntimeError: in a call with gradients turned on again: training is not recorded.
    """
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module or None, got {type(model).__name__}")
    recorder = _Recorder()
    with ExitStack() as stack:
        if model is not None:
            for name, module in model.named_modules():
                stack.callback(module.register_forward_pre_hook(recorder.entering(name)).remove)
                stack.callback(module.register_forward_hook(recorder.left, always_call=True).remove)
        stack.enter_context(_listening(recorder))
        stack.enter_context(torch.no_grad())
        yield recorder.calls


class _Recorder:
    def __init__(self) -> None:
        self.calls = Recording()
        self._inside: list[str] = []  # modules being called
        self._seen: Counter[tuple[str, SegmentLayout]] = Counter()
        self._thread = threading.get_ident()

    def entering(self, name: str) -> Callable[..., None]:
        def enter(*_: Any) -> None:
            if threading.get_ident() == self._thread:
                self._inside.append(name)

        return enter

    def left(self, *_: Any) -> None:
        if threading.get_ident() == self._thread and self._inside:
            self._inside.pop()

    def take(self, call: Call, lse: Tensor, backend: str) -> None:
        module = self._inside[-1] if self._inside else ""
        number = self._seen[module, call.layout]
        self._seen[module, call.layout] += 1
        given = lse if lse.shape == call.query.shape[:3] else None
        self.calls.append(_recorded(call, given, backend, module, number))


@dataclass(frozen=True)
class _Watched:
    """A backend, watched."""

    name: str
    backend: Any

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    # What is traced holds no values.
    @torch.compiler.disable(reason="record_attention copies what attention is given; compile without fullgraph=True")
    def run(self, call: Call) -> tuple[Tensor, Tensor]:
        recorders = getattr(_local, "recorders", ())
        if recorders and torch.is_grad_enabled():
            raise RuntimeError(
                "record_attention records forward passes without gradients, and they were turned on inside of it; "
                "train outside of it"
            )
        out, lse = self.backend.run(call)
        for recorder in recorders:
            recorder.take(call, lse, self.name)
        return out, lse


_local = threading.local()
_lock = threading.Lock()
_watching = 0  # contexts that are open, in all threads


@contextmanager
def _listening(recorder: _Recorder) -> Iterator[None]:
    """Backends are exchanged for watched ones while anybody listens, so that nobody pays for it otherwise."""
    global _watching
    table: dict[str, Any] = attention._BACKENDS  # type: ignore[assignment]
    with _lock:
        _watching += 1
        if _watching == 1:
            table.update({name: _Watched(name, backend) for name, backend in table.items()})
    before = getattr(_local, "recorders", ())
    _local.recorders = (*before, recorder)
    try:
        yield
    finally:
        _local.recorders = before
        with _lock:
            _watching -= 1
            if _watching == 0:
                table.update({name: watched.backend for name, watched in table.items()})


def _recorded(call: Call, lse: Tensor | None, backend: str, module: str, number: int, copy: bool = True) -> Recorded:
    def kept(tensor: Tensor) -> Tensor:
        return tensor.detach().clone() if copy else tensor

    def held(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else kept(tensor)

    key = kept(call.key) if call.cache is None else torch.cat([call.cache[0], call.key], dim=2)
    return Recorded(
        kept(call.query), key, call.layout, held(lse), call.scale, held(call.token_lengths), held(call.token_starts),
        held(call.cache_starts), held(call.query_start), _mapped(kept, call.relative), backend, module, number,
    )  # fmt: skip


def _mapped(function: Callable[[Tensor], Tensor], terms: Terms | None) -> Terms | None:
    if terms is None:
        return None
    tensors: dict[str, Any] = {
        name: function(tensor) for name, tensor in terms._asdict().items() if isinstance(tensor, Tensor)
    }
    return terms._replace(**tensors)


def _row_numbers(layout: SegmentLayout, rows: Rows) -> Tensor:
    """Query rows of a call, int64 (rows,), on the CPU."""
    count = layout.num_queries
    if rows is None:
        return torch.arange(count)
    if isinstance(rows, (Region, str)):
        return torch.arange(*_query_span(layout, rows))
    try:
        chosen = torch.arange(count)[rows] if isinstance(rows, slice) else torch.as_tensor(rows)
    except (TypeError, ValueError, RuntimeError):
        raise _not_rows(rows, count) from None
    if chosen.numel() == 0:
        chosen = chosen.long()
    if chosen.dim() != 1 or chosen.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise _not_rows(rows, count)
    chosen = chosen.long().cpu()
    if chosen.numel() and not 0 <= int(chosen.min()) <= int(chosen.max()) < count:
        raise ValueError(f"rows must be between 0 and {count - 1}, the call's query rows, got {chosen.tolist()}")
    return chosen


def _not_rows(rows: Any, count: int) -> TypeError:
    given = f"a tensor of shape {tuple(rows.shape)}, {rows.dtype}" if isinstance(rows, Tensor) else repr(rows)
    return TypeError(
        "rows must be None, a query region ('read', 'tokens', 'write'), a slice with a positive step, or a sequence of "
        f"ints from 0 to {count - 1}, got {given}"
    )


def _query_span(layout: SegmentLayout, region: Region | str) -> tuple[int, int]:
    """First query row of a region and the one after its last, skipped rows not counted."""
    first = layout.query_offset(region)  # refuses what is no region
    rows = {name: form.rows for name, form in zip(tuple(Region)[1:], layout.forms, strict=True)}
    region = Region[region.upper()] if isinstance(region, str) else region
    if region is Region.CACHE:
        raise ValueError("rows: 'cache' holds keys only; accepted: 'read', 'tokens', 'write'")
    return max(0, first - layout.skip), max(0, first + rows[region] - layout.skip)


# -- drawing -----------------------------------------------------------------------------------------------------------

_INK, _HIDDEN, _FRAME = "#333a45", "#eef0f4", "#d1495b"
_NAMES = {Region.CACHE: "#8a5a83", Region.READ: "#c96a12", Region.TOKENS: "#2f6db3", Region.WRITE: "#2f7d47"}
_CELL = 0.125  # inches


def plot_maps(
    grid: Sequence[Sequence[Recorded]] | Mapping[str, Sequence[Recorded]],
    *,
    sample: int = 0,
    heads: str | int = "mean",
    titles: Sequence[str] = (),
    tokens: Sequence[Sequence[str]] = (),
    frames: Sequence[tuple[Rows, Region | str] | None] = (),
) -> Figure:
    """Draw attention maps, a row of pictures a layer, a column a segment, one scale of colours for all.

    Args:
        grid: calls of one layer after another, as many of each: ``[[layer[s] for s in (0, 3)] for layer in ...]``; a
            mapping names its rows, see :meth:`Recording.by_module`.
        sample: which of the batch.
        heads: ``"mean"``: of all heads; a number: that head; ``"each"``: a row of pictures for each head.
        titles: of the columns.
        tokens: of each column the text of its TOKENS rows, written along both sides where they are keys or queries.
        frames: of each column a block to point at, (query rows that follow one another, key region), or None.

    Returns:
        A matplotlib figure; hidden keys are grey. ``figure.savefig(path)`` writes it.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError, ValueError: an argument that is not accepted.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError:
        raise ImportError("plot_maps needs matplotlib: pip install matplotlib") from None

    names = list(grid) if isinstance(grid, Mapping) else [f"layer {i + 1}" for i in range(len(grid))]
    layers = [list(calls) for calls in (grid.values() if isinstance(grid, Mapping) else grid)]
    columns = _check_grid(layers, sample, heads, titles=titles, tokens=tokens, frames=frames)
    rows: list[tuple[str, list[tuple[Recorded, Tensor]]]] = []
    for name, calls in zip(names, layers, strict=True):
        maps = [(call, replace(call, **_one(call, sample)).probabilities()[0].cpu()) for call in calls]
        if heads == "each":
            most = max(len(map_) for _, map_ in maps)
            rows += [(f"{name}, head {h}", [(call, map_[h]) for call, map_ in maps]) for h in range(most)]
        elif heads == "mean":
            rows.append((name, [(call, map_.mean(dim=0)) for call, map_ in maps]))
        else:
            rows.append((f"{name}, head {heads}", [(call, map_[int(heads)]) for call, map_ in maps]))

    highest = max(float(map_.max()) if map_.numel() else 0.0 for _, maps in rows for _, map_ in maps) or 1.0
    widths = [max(calls[c].layout.num_keys for calls in layers) for c in range(columns)]
    heights = [max(call.layout.num_queries for call, _ in maps) for _, maps in rows]
    size = (sum(widths) * _CELL + 1.0 * columns + 0.9, sum(heights) * _CELL + 0.75 * len(rows) + 0.5)
    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(w_pad=0.09, h_pad=0.09), dpi=150)
    axes = figure.subplots(
        len(rows), columns, squeeze=False, gridspec_kw={"width_ratios": widths, "height_ratios": heights}
    )
    image: Any = None
    for r, (name, maps) in enumerate(rows):
        for c, (call, map_) in enumerate(maps):
            ax = axes[r, c]
            image = _draw(ax, call, map_, highest, list(tokens[c]) if tokens else None)
            if frames and (frame := frames[c]) is not None:
                _frame(ax, call.layout, *frame)
            if r == 0 and titles:
                ax.set_title(titles[c], color=_INK, fontsize=12, fontweight="bold", pad=10)
            if c == 0:
                ax.set_ylabel(name, color=_INK, fontsize=11, fontweight="bold", labelpad=8)
    bar = figure.colorbar(image, ax=axes, shrink=min(1.0, 3.5 / size[1]), aspect=22, pad=0.015)
    bar.set_label("attention probability", color=_INK, fontsize=9)
    bar.ax.tick_params(labelsize=8, colors=_INK)
    bar.outline.set_visible(False)
    return figure


def _one(call: Recorded, sample: int) -> dict[str, Any]:
    """The tensors of one sample of a call."""
    names = ("query", "key", "lse", "token_lengths", "token_starts", "cache_starts", "query_start")
    tensors = {name: getattr(call, name) for name in names}
    return {name: None if tensor is None else tensor[sample : sample + 1] for name, tensor in tensors.items()}


def _check_grid(layers: list[list[Recorded]], sample: int, heads: str | int, **by_column: Sequence[Any]) -> int:
    """The number of columns."""
    if not layers or not layers[0]:
        raise ValueError(
            "grid must hold at least one call; nothing is recorded of a model that doesn't call segment_attention "
            "inside of record_attention"
        )
    columns = len(layers[0])
    if any(len(calls) != columns for calls in layers):
        raise ValueError(f"grid must have as many calls in every row, got {[len(calls) for calls in layers]}")
    for calls in layers:
        for call in calls:
            if not isinstance(call, Recorded):
                raise TypeError(f"grid must hold calls of a Recording, got {type(call).__name__}")
            batch, most = call.query.shape[:2]
            if isinstance(sample, bool) or not isinstance(sample, int) or not 0 <= sample < batch:
                raise ValueError(f"sample must be an int between 0 and {batch - 1}, got {sample!r}")
            number = isinstance(heads, int) and not isinstance(heads, bool)
            if heads not in ("mean", "each") and not (number and 0 <= int(heads) < most):
                raise ValueError(f"heads must be 'mean', 'each' or an int between 0 and {most - 1}, got {heads!r}")
            if call.query.shape[1] != layers[0][0].query.shape[1] and heads == "each":
                raise ValueError("heads='each' needs calls of as many heads")
    for name, given in by_column.items():
        if given and len(given) != columns:
            raise ValueError(f"{name} must have an entry for each of the {columns} columns, got {len(given)}")
    for c, texts in enumerate(by_column["tokens"]):
        for calls in layers:
            if len(texts) != calls[c].layout.tokens:
                raise ValueError(f"tokens[{c}] must have {calls[c].layout.tokens} texts, got {len(texts)}")
    return columns


def _draw(ax: Axes, call: Recorded, map_: Tensor, highest: float, texts: list[str] | None) -> Any:
    """One map (queries, keys), and what its colour bar is made of."""
    from matplotlib.colors import LinearSegmentedColormap, PowerNorm

    blues = LinearSegmentedColormap.from_list("maps", ["#ffffff", "#c5dcf2", "#6ea6d9", "#2a63a8", "#0d2b5c"])
    layout = call.layout
    visible = call._visible(call._layout_rows(torch.arange(layout.num_queries)))[0]
    shown = torch.where(visible, map_, float("nan"))
    # The root brings out what is small: many keys that share a row's attention.
    image = ax.imshow(
        shown.numpy(),
        cmap=blues.with_extremes(bad=_HIDDEN),
        norm=PowerNorm(0.5, 0.0, highest),
        interpolation="nearest",
        aspect="equal",
    )
    keys = [(r, layout.key_offset(r), layout.key_offset(r) + layout.key_size(r)) for r in Region if layout.key_size(r)]
    spans = [(region, *_query_span(layout, region)) for region in tuple(Region)[1:]]
    queries = [(region, first, end) for region, first, end in spans if end > first]
    for _, first, _ in keys[1:]:
        ax.axvline(first - 0.5, color=_INK, linewidth=0.7)
    for _, first, _ in queries[1:]:
        ax.axhline(first - 0.5, color=_INK, linewidth=0.7)
    ax.set_xticks([(first + end - 1) / 2 for _, first, end in keys], [region.name for region, _, _ in keys])
    ax.set_yticks([(first + end - 1) / 2 for _, first, end in queries], [region.name for region, _, _ in queries])
    ax.xaxis.tick_top()
    ax.tick_params(length=0, labelsize=8.5)
    for label in ax.get_yticklabels():
        label.set(rotation=90, va="center")
    for labels, regions in ((ax.get_xticklabels(), keys), (ax.get_yticklabels(), queries)):
        for label, (region, _, _) in zip(labels, regions, strict=True):
            label.set(color=_NAMES[region], fontweight="bold")
    for spine in ax.spines.values():
        spine.set(color=_INK, linewidth=0.7)
    if texts is not None:
        for side, regions in (("bottom", keys), ("right", queries)):
            _along(ax, side, texts, regions)
    return image


def _along(ax: Axes, side: str, texts: list[str], regions: list[tuple[Region, int, int]]) -> None:
    """The tokens, along the other side than the regions' names."""
    for region, first, end in regions:
        if region is not Region.TOKENS:
            continue
        places = range(first, end)
        other = ax.secondary_xaxis("bottom") if side == "bottom" else ax.secondary_yaxis("right")
        if side == "bottom":
            other.set_xticks(places, texts[-len(places) :])
        else:
            other.set_yticks(places, texts[-len(places) :])
        other.tick_params(length=0, labelsize=7, colors=_INK, pad=2)
        for spine in other.spines.values():
            spine.set_visible(False)


def _frame(ax: Axes, layout: SegmentLayout, rows: Rows, key: Region | str) -> None:
    from matplotlib.patches import Rectangle

    chosen = _row_numbers(layout, rows).tolist()
    if not chosen or chosen != list(range(chosen[0], chosen[-1] + 1)):
        raise ValueError(f"frames: query rows must follow one another, and be at least one, got {chosen}")
    corner = (layout.key_offset(key) - 0.5, chosen[0] - 0.5)
    frame = Rectangle(corner, layout.key_size(key), len(chosen), fill=False, edgecolor=_FRAME, linewidth=2.2, zorder=3)
    frame.set_clip_on(False)
    ax.add_patch(frame)
