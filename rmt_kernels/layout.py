"""Segment layouts: which keys each query row of a segment may see, as a few integers.

A segment holds up to four regions. Keys are ordered ``[CACHE | READ | TOKENS | WRITE]``, queries
``[READ | TOKENS | WRITE]``. A 3 x 4 table of rules says what each query region sees of each key region. In that order
every row of every published recurrent-memory transformer sees ONE interval of keys ``[lo, hi)``, minus at most one
gap (padding, or keys too old for a sliding window), plus optionally its own row. Kernels only ever see those integers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import TYPE_CHECKING, Any, ClassVar

import torch

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Region", "Rule", "SegmentLayout"]


class Region(IntEnum):
    """A run of rows in a segment; the order is the order of the keys."""

    CACHE = 0  # rows of an earlier segment: keys only
    READ = 1  # memory coming in
    TOKENS = 2  # every row that is not memory
    WRITE = 3  # memory going out


class Rule(IntEnum):
    """What a query region sees of a key region."""

    NONE = 0
    FULL = 1
    CAUSAL = 2  # up to its own position; only where query region = key region
    SELF = 3  # only its own row; only where query region = key region


_QUERY_REGIONS = (Region.READ, Region.TOKENS, Region.WRITE)
_ALL_REGIONS = tuple(Region)
_Key = tuple["Region | str", "Region | str"]


def _region(argument: str, value: Region | str) -> Region:
    if isinstance(value, Region):
        return value
    if isinstance(value, str) and value.upper() in Region.__members__:
        return Region[value.upper()]
    raise ValueError(f"{argument}: unknown region {value!r}; accepted: 'cache', 'read', 'tokens', 'write'")


def _rule(argument: str, value: Rule | str) -> Rule:
    if isinstance(value, Rule):
        return value
    if isinstance(value, str) and value.upper() in Rule.__members__:
        return Rule[value.upper()]
    raise ValueError(f"{argument}: unknown rule {value!r}; accepted: Rule.NONE, Rule.FULL, Rule.CAUSAL, Rule.SELF")


def _size(argument: str, value: Any, least: int = 0) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{argument} must be an int, got {type(value).__name__}")
    if not least <= value < 2**31:
        raise ValueError(f"{argument} must be between {least} and 2**31 - 1, got {value}")
    return value


@dataclass(frozen=True)
class RowForm:
    """The rows of one query region in closed form: row p sees keys ``[lo, hi + step * p)`` and key ``own + p``.

    ``own`` is -1 where the region has no SELF rule. ``rows`` is 0 where the region holds no queries.
    """

    rows: int
    lo: int
    hi: int
    step: int
    own: int


@dataclass(frozen=True)
class SegmentLayout:
    """Sizes and rules of a segment's regions. Immutable, hashable, validated.

    Args:
        cache, read, tokens, write: rows in each region; any may be 0.
        rules: ``{(query region, key region): rule}``, regions by name; pairs left out are ``Rule.NONE``.
        queries: regions that hold query rows (default: read, tokens, write).
        keys: regions that hold key rows (default: all).
        window: a TOKENS row sees only the last ``window`` keys in ``[CACHE | TOKENS]`` order, itself included
            (READ and WRITE keys are not counted and stay visible). Needs TOKENS -> TOKENS CAUSAL.
        skip: leading query rows left out of the call; see :meth:`last`.

    Raises:
        TypeError, ValueError: a size, region or rule that is not accepted, or a table in which a row would see more
            than one interval of keys; the message names the row.
    """

    cache: int = 0
    read: int = 0
    tokens: int = 0
    write: int = 0
    rules: Mapping[_Key, Rule | str] | tuple[Rule, ...] = ()
    queries: tuple[Region | str, ...] = _QUERY_REGIONS
    keys: tuple[Region | str, ...] = _ALL_REGIONS
    window: int | None = None
    skip: int = 0
    name: str = field(default="custom", compare=False)
    # Derived by each instance. Not fields, so that dataclasses.replace(layout, <every field>) works; FSDP2 does that.
    forms: ClassVar[tuple[RowForm, RowForm, RowForm]]
    key_sizes: ClassVar[tuple[int, int, int, int]]
    ints: ClassVar[tuple[int, ...]]
    num_queries: ClassVar[int]
    num_keys: ClassVar[int]
    _offsets: ClassVar[tuple[int, int] | str]

    def __post_init__(self) -> None:
        for name in ("cache", "read", "tokens", "write", "skip"):
            _size(name, getattr(self, name))
        if self.window is not None:
            _size("window", self.window, 1)
        put = object.__setattr__
        put(self, "queries", _regions("queries", self.queries, _QUERY_REGIONS))
        put(self, "keys", _regions("keys", self.keys, _ALL_REGIONS))
        put(self, "rules", _table(self.rules))
        if self.window is not None:
            rule = self.rule(Region.TOKENS, Region.TOKENS)
            if rule is not Rule.CAUSAL or Region.TOKENS not in self.keys:
                raise ValueError(
                    f"window={self.window} needs the rule ('tokens', 'tokens'): Rule.CAUSAL and 'tokens' among the "
                    f"keys, got {rule.name} and keys {[_region('keys', r).name.lower() for r in self.keys]}"
                )
        sizes = (self.cache, self.read, self.tokens, self.write)
        put(self, "key_sizes", tuple(n if region in self.keys else 0 for region, n in zip(Region, sizes, strict=True)))
        put(self, "forms", tuple(self._form(region) for region in _QUERY_REGIONS))
        total = sum(form.rows for form in self.forms)
        if self.skip > total:
            raise ValueError(f"skip={self.skip} is more than the layout's {total} query rows")
        put(self, "num_queries", total - self.skip)
        put(self, "num_keys", sum(self.key_sizes))
        ints = [*self.key_sizes, self.tokens, self.window or 0, self.skip]
        for form in self.forms:
            ints += [form.rows, form.lo, form.hi, form.step, form.own]
        put(self, "ints", tuple(ints))
        put(self, "_offsets", self._most_offsets())

    # -- presets -----------------------------------------------------------------------------------------------------

    @classmethod
    def rmt_decoder(
        cls, tokens: int, memory: int, *, cache: int = 0, read_cache: bool = False, window: int | None = None
    ) -> SegmentLayout:
        """Recurrent Memory Transformer, decoder, with the paper's mask (arXiv 2207.06881).

        READ rows see READ; TOKENS rows see CACHE, READ and the tokens so far; WRITE rows see READ, TOKENS and WRITE.
        ``read_cache=True`` lets READ and WRITE rows see CACHE too.
        """
        seen = Rule.FULL if read_cache else Rule.NONE
        return cls(
            cache=cache, read=memory, tokens=tokens, write=memory, window=window, name="rmt_decoder",
            rules={
                ("read", "cache"): seen, ("read", "read"): Rule.FULL,
                ("tokens", "cache"): Rule.FULL, ("tokens", "read"): Rule.FULL, ("tokens", "tokens"): Rule.CAUSAL,
                ("write", "cache"): seen, ("write", "read"): Rule.FULL, ("write", "tokens"): Rule.FULL,
                ("write", "write"): Rule.FULL,
            },
        )  # fmt: skip

    @classmethod
    def causal(cls, tokens: int, memory: int, *, cache: int = 0) -> SegmentLayout:
        """Plain causal over ``[READ | TOKENS | WRITE]``: the authors' Hugging Face wrapper, BABILong, ARMT, HMT.

        A checkpoint trained with one decoder mask is wrong under the other; see :meth:`rmt_decoder`.
        """
        return cls(
            cache=cache, read=memory, tokens=tokens, write=memory, name="causal",
            rules={
                ("read", "cache"): Rule.FULL, ("read", "read"): Rule.CAUSAL,
                ("tokens", "cache"): Rule.FULL, ("tokens", "read"): Rule.FULL, ("tokens", "tokens"): Rule.CAUSAL,
                ("write", "cache"): Rule.FULL, ("write", "read"): Rule.FULL, ("write", "tokens"): Rule.FULL,
                ("write", "write"): Rule.CAUSAL,
            },
        )  # fmt: skip

    @classmethod
    def rmt_encoder(cls, tokens: int, memory: int) -> SegmentLayout:
        """Recurrent Memory Transformer, encoder (arXiv 2304.11062): one memory block, every row sees every row."""
        return cls._joint(tokens, memory, Rule.FULL, "rmt_encoder")

    @classmethod
    def transformer_xl(
        cls, tokens: int, cache: int, *, memory: int = 0, read_cache: bool = False, window: int | None = None
    ) -> SegmentLayout:
        """Transformer-XL (arXiv 1901.02860): causal tokens over a cache, optionally with RMT's memory tokens.

        ``window=cache`` is its same-length mode: every row sees exactly ``cache`` keys.
        """
        layout = cls.rmt_decoder(tokens, memory, cache=cache, read_cache=read_cache, window=window)
        return replace(layout, name="transformer_xl")

    @classmethod
    def memory_transformer(cls, tokens: int, memory: int) -> SegmentLayout:
        """MemTransformer and MemCtrl (arXiv 2006.11527): ``[memory | tokens]``, every row sees every row."""
        return cls._joint(tokens, memory, Rule.FULL, "memory_transformer")

    @classmethod
    def memory_bottleneck(cls, tokens: int, memory: int, *, step: str) -> SegmentLayout:
        """MemBottleneck (arXiv 2006.11527), one of its two attentions.

        ``step="write"``: memory rows see memory and tokens. ``step="read"``: token rows see the updated memory only.
        """
        if step == "write":
            return cls(
                read=memory, tokens=tokens, queries=(Region.READ,), name="memory_bottleneck",
                rules={("read", "read"): Rule.FULL, ("read", "tokens"): Rule.FULL},
            )  # fmt: skip
        if step == "read":
            return replace(cls.memformer_read(tokens, memory), name="memory_bottleneck")
        raise ValueError(f"step must be 'write' or 'read', got {step!r}")

    @classmethod
    def memformer_read(cls, tokens: int, memory: int) -> SegmentLayout:
        """Memformer's read (arXiv 2010.06891): a cross-attention from the tokens to the memory slots."""
        return cls(
            read=memory, tokens=tokens, queries=(Region.TOKENS,), keys=(Region.READ,), name="memformer_read",
            rules={("tokens", "read"): Rule.FULL},
        )  # fmt: skip

    @classmethod
    def memformer_write(cls, tokens: int, memory: int) -> SegmentLayout:
        """Memformer's write (arXiv 2010.06891): a slot sees all tokens and itself, no other slot."""
        return cls(
            tokens=tokens, write=memory, queries=(Region.WRITE,), keys=(Region.TOKENS, Region.WRITE),
            name="memformer_write", rules={("write", "tokens"): Rule.FULL, ("write", "write"): Rule.SELF},
        )  # fmt: skip

    @classmethod
    def membart(cls, tokens: int, memory: int) -> SegmentLayout:
        """MemBART, the Memformer authors' present code: ``[memory | tokens]``, a slot sees itself and all tokens."""
        return cls._joint(tokens, memory, Rule.SELF, "membart")

    @classmethod
    def _joint(cls, tokens: int, memory: int, between_memory: Rule, name: str) -> SegmentLayout:
        return cls(
            read=memory, tokens=tokens, name=name,
            rules={
                ("read", "read"): between_memory, ("read", "tokens"): Rule.FULL,
                ("tokens", "read"): Rule.FULL, ("tokens", "tokens"): Rule.FULL,
            },
        )  # fmt: skip

    # -- derived layouts ---------------------------------------------------------------------------------------------

    def last(self, rows: int) -> SegmentLayout:
        """The same keys, only the last ``rows`` of the query rows."""
        _size("rows", rows)
        if rows > self.num_queries:
            raise ValueError(f"rows must be at most the layout's {self.num_queries} query rows, got {rows}")
        return replace(self, skip=self.skip + self.num_queries - rows)

    def decoding(self, rows: int = 1) -> SegmentLayout:
        """The same keys, ``rows`` TOKENS queries: a decoding step, for use with ``query_start=``."""
        return replace(self, queries=(Region.TOKENS,), skip=0).last(rows)

    # -- sizes and rules ---------------------------------------------------------------------------------------------

    def size(self, region: Region | str) -> int:
        """Rows of ``region``, whether it holds queries, keys or both."""
        return (self.cache, self.read, self.tokens, self.write)[_region("region", region)]

    def key_size(self, region: Region | str) -> int:
        """Key rows of ``region``: 0 where the layout leaves it out of its keys."""
        return self.key_sizes[_region("region", region)]

    def key_offset(self, region: Region | str) -> int:
        """Index of the first key row of ``region``."""
        return sum(self.key_sizes[: _region("region", region)])

    def query_offset(self, region: Region | str) -> int:
        """Index of the first query row of ``region``, leading rows skipped by :meth:`last` counted."""
        return sum(form.rows for form in self.forms[: _region("region", region) - 1])

    def rule(self, query: Region | str, key: Region | str) -> Rule:
        """The rule between a query region and a key region."""
        query, key = _region("query", query), _region("key", key)
        if query is Region.CACHE:
            raise ValueError("query: 'cache' holds keys only; accepted: 'read', 'tokens', 'write'")
        return tuple(self.rules)[(query - 1) * 4 + key]  # type: ignore[return-value]

    def offsets(self) -> tuple[int, int]:
        """How far behind and how far ahead of its own key a row of this layout may see, at most: two ints >= 0.

        Distance-dependent scores need tables that long; rows that :meth:`last` skips and ``window`` count as if they
        were not.

        Raises:
            ValueError: rows that hold queries are not among the keys, so that they have no place there.
        """
        if isinstance(self._offsets, str):
            raise ValueError(self._offsets)
        return self._offsets

    def _most_offsets(self) -> tuple[int, int] | str:
        behind = ahead = 0
        for region, form in zip(_QUERY_REGIONS, self.forms, strict=True):
            if form.rows == 0:
                continue
            if self.key_size(region) != form.rows:
                return f"relative: distances count keys, and {region.name} holds queries but is not among the keys"
            if form.hi + form.step * (form.rows - 1) > form.lo:
                own = self.key_offset(region)
                behind = max(behind, own + form.rows - 1 - form.lo)
                ahead = max(ahead, form.hi - 1 - own)
        return behind, ahead

    def _form(self, query: Region) -> RowForm:
        rows = self.size(query) if query in self.queries else 0
        problem = ""
        # A SELF region of one row may count as FULL, which can close a gap, or open one: either reading will do.
        for self_is_full in (False, True):
            lo = hi = step = 0
            own, started, problem = -1, False, ""
            for key in Region:
                rule, size, offset = self.rule(query, key), self.key_size(key), self.key_offset(key)
                if size == 0 or rule is Rule.NONE:
                    continue
                if rule is Rule.SELF and not (self_is_full and size == 1):
                    own = offset
                    continue
                if started and (step or hi != offset):
                    problem = f"rules: {query.name} row 0 sees keys [{lo}, {hi}) and again {key.name} from {offset}"
                    break
                lo = lo if started else offset
                started = True
                step = 1 if rule is Rule.CAUSAL and size > 1 else 0
                hi = offset + 1 if step else offset + size
            if not problem:
                return RowForm(rows, lo, hi, step, own)
            if rows == 0:
                return RowForm(0, 0, 0, 0, -1)
        raise ValueError(
            f"{problem}; a row must see one interval of [CACHE | READ | TOKENS | WRITE] (gaps come from padding and "
            "window= only). For other masks use torch.nn.functional.scaled_dot_product_attention with attn_mask="
        )

    # -- intervals and masks -----------------------------------------------------------------------------------------

    def intervals(self) -> torch.Tensor:
        """``[lo, hi)`` of visible keys for each query row, int64 (queries, 2), gaps and SELF not counted.

        An empty interval has ``lo == hi``.
        """
        return self._rows()[:, :2].contiguous()

    def gaps(self) -> torch.Tensor:
        """Hidden keys ``[lo, hi)`` inside each row's interval, int64 (queries, 2); only ``window`` makes any."""
        return self._rows()[:, 2:4].contiguous()

    def own_keys(self) -> torch.Tensor:
        """The SELF key of each query row, int64 (queries,); -1 where the row has none."""
        return self._rows()[:, 4].contiguous()

    def _rows(self) -> torch.Tensor:
        """(queries, 5): lo, hi, gap lo, gap hi, own key."""
        blocks = []
        cache, first = self.key_size(Region.CACHE), self.key_offset(Region.TOKENS)
        for region, form in zip(_QUERY_REGIONS, self.forms, strict=True):
            p = torch.arange(form.rows)
            lo, hi = torch.full_like(p, form.lo), form.hi + form.step * p
            gap_lo = gap_hi = torch.zeros_like(p)
            if region is Region.TOKENS and self.window is not None:
                old = cache + p + 1 - self.window  # keys of [CACHE | TOKENS] that are too old
                lo = torch.maximum(lo, old.clamp(max=cache))
                gap_hi = first + (old - cache).clamp(min=0)
                swallowed = lo >= first
                lo = torch.where(swallowed, torch.maximum(lo, gap_hi), lo)
                empty = swallowed | (gap_hi == first)
                gap_lo = torch.where(empty, 0, first)
                gap_hi = torch.where(empty, 0, gap_hi)
            own = form.own + p if form.own >= 0 else torch.full_like(p, -1)
            blocks.append(torch.stack([lo, hi, gap_lo, gap_hi, own], dim=1))
        return torch.cat(blocks)[self.skip :]

    def dense_mask(self, device: torch.device | str | None = None) -> torch.Tensor:
        """The mask as a bool matrix (queries, keys), True = visible, built from the table of rules.

        For tests, drawings and stock attention; no kernel of this package reads it.
        """
        rows = []
        for query in self.queries:
            n = self.size(query)
            blocks = []
            for key in self.keys:
                m, rule = self.size(key), self.rule(query, key)
                if rule is Rule.CAUSAL:
                    block = torch.ones(n, m, dtype=torch.bool, device=device).tril()
                elif rule is Rule.SELF:
                    block = torch.eye(n, m, dtype=torch.bool, device=device)
                else:
                    block = torch.full((n, m), rule is Rule.FULL, dtype=torch.bool, device=device)
                if self.window is not None and query is Region.TOKENS and key in (Region.CACHE, Region.TOKENS):
                    now = torch.arange(n, device=device)[:, None] + self.key_size(Region.CACHE)
                    then = torch.arange(m, device=device)[None, :]
                    then = then + self.key_size(Region.CACHE) if key is Region.TOKENS else then
                    block &= now - then < self.window
                blocks.append(block)
            rows.append(torch.cat(blocks, dim=1) if blocks else torch.zeros(n, 0, dtype=torch.bool, device=device))
        mask = torch.cat(rows) if rows else torch.zeros(0, self.num_keys, dtype=torch.bool, device=device)
        return mask[self.skip :]

    def visible(self) -> int:
        """Number of (query, key) entries that are visible, from the closed form."""
        lo, hi, gap_lo, gap_hi, own = self._rows().unbind(1)
        return int(((hi - lo).clamp(min=0) - (gap_hi - gap_lo) + (own >= 0)).sum())

    # -- drawings ----------------------------------------------------------------------------------------------------

    def show(self, width: int = 72) -> str:
        """A text drawing: a line per query row (or run of rows), ``#`` visible, ``.`` hidden, ``+`` partly visible."""
        names = f"{self.name}: " + ", ".join(f"{r.name} {self.size(r)}" for r in Region if self.size(r))
        if self.num_queries == 0 or self.num_keys == 0:
            return names + "\n(no rows)"
        mask, regions = self.dense_mask().float(), self._query_regions()
        per_column = -(-self.num_keys // width)
        per_row = -(-self.num_queries // 40)
        columns = [
            list(range(start, min(start + per_column, self.key_offset(r) + self.key_size(r))))
            for r in Region
            for start in range(self.key_offset(r), self.key_offset(r) + self.key_size(r), per_column)
        ]
        bounds = {self.key_offset(r) for r in Region if self.key_size(r)} - {0}
        header = "".join(("|" if c[0] in bounds else "") + self._key_region(c[0]).name[0] for c in columns)
        lines = [names, " " * 8 + header]
        row = 0
        while row < self.num_queries:
            end = row
            while end < self.num_queries and end < row + per_row and regions[end] is regions[row]:
                end += 1
            cells = ""
            for c in columns:
                share = float(mask[row:end, c].mean())
                cells += ("|" if c[0] in bounds else "") + ("#" if share == 1 else "." if share == 0 else "+")
            first_of_region = row == 0 or regions[row - 1] is not regions[row]
            lines.append(f"{regions[row].name if first_of_region else '':<8}" + cells)
            row = end
        return "\n".join(lines)

    def plot(self, ax: Axes | None = None) -> Axes:
        """A picture of the mask with region names, on ``ax`` or a new figure. Needs matplotlib."""
        from rmt_kernels._plot import plot_layout

        return plot_layout(self, ax)

    def _query_regions(self) -> list[Region]:
        every = [r for r, form in zip(_QUERY_REGIONS, self.forms, strict=True) for _ in range(form.rows)]
        return every[self.skip :]

    def _key_region(self, key: int) -> Region:
        return max(r for r in Region if self.key_size(r) and self.key_offset(r) <= key)


def _regions(argument: str, given: Iterable[Region | str], accepted: tuple[Region, ...]) -> tuple[Region, ...]:
    if isinstance(given, str):
        raise TypeError(f"{argument} must be a tuple of region names, got the string {given!r}; write ({given!r},)")
    if not isinstance(given, Iterable):
        raise TypeError(f"{argument} must be a tuple of region names, got {type(given).__name__}")
    chosen = {_region(argument, value) for value in given}
    for region in chosen - set(accepted):
        raise ValueError(f"{argument}: {region.name} holds keys only; accepted: {[r.name.lower() for r in accepted]}")
    return tuple(sorted(chosen))


def _table(rules: Mapping[_Key, Rule | str] | tuple[Rule, ...]) -> tuple[Rule, ...]:
    if isinstance(rules, tuple):
        if rules and len(rules) != 12:
            raise ValueError(f"rules: a tuple must hold the 12 rules of the 3 x 4 table, got {len(rules)}")
        return tuple(_rule("rules", r) for r in rules) or (Rule.NONE,) * 12
    if not isinstance(rules, Mapping):
        raise TypeError(
            f"rules must be a mapping such as {{('tokens', 'read'): Rule.FULL}}, got {type(rules).__name__}"
        )
    table = [Rule.NONE] * 12
    for pair, value in rules.items():
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise ValueError(f"rules: a key must be (query region, key region), got {pair!r}")
        query, key, rule = _region("rules", pair[0]), _region("rules", pair[1]), _rule("rules", value)
        if query is Region.CACHE:
            raise ValueError(f"rules: {pair!r}: 'cache' holds keys only")
        if rule in (Rule.CAUSAL, Rule.SELF) and query is not key:
            raise ValueError(
                f"rules: {pair!r}: {rule.name} needs the same region on both sides; accepted here: NONE, FULL"
            )
        table[(query - 1) * 4 + key] = rule
    return tuple(table)
