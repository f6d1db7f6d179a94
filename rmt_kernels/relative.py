"""Scores that depend on the distance between a row and a key: Transformer-XL's, a bias per distance, ALiBi."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rmt_kernels.layout import SegmentLayout

__all__ = ["Relative", "Terms", "alibi_slopes"]

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class Terms(NamedTuple):
    """A :class:`Relative` made ready for a layout: tables that hold every offset a row may see, in ascending order.

    The offset of key j from row i, whose own key is o, is j - o; entry e of a table is for offset e - reach.
    """

    key: Tensor | None  # (heads, offsets, head_dim), dtype of the query
    bias: Tensor | None  # (heads, offsets), float32 (float64 for float64 queries)
    content_bias: Tensor | None  # (heads, head_dim), dtype of the query, as the next
    position_bias: Tensor | None
    reach: int
    shifted: bool  # the product with `key` of an offset above 0 is the next row's

    @property
    def ints(self) -> tuple[int, int]:
        """What kernels are given besides the tensors."""
        return self.reach, int(self.shifted)


@dataclass(frozen=True, eq=False)
class Relative:
    """Distance-dependent scores of one attention: ``segment_attention(..., relative=Relative(...))``.

    With o(i) the index of row i's own key in ``[CACHE | READ | TOKENS | WRITE]`` and d = o(i) - j::

        score_ij = scale * ((q_i + content_bias) . k_j + (q_i + position_bias) . key[d]) + bias[d]

    Args:
        key: (heads, distances, head_dim), row d for distance d >= 0: Transformer-XL's ``r``, a projection of sinusoids
            of the distance (arXiv 1901.02860, section 3.3). heads may be 1: shared.
        content_bias: (heads, head_dim), added to the query where it meets the keys; Transformer-XL's ``u``.
        position_bias: (heads, head_dim), added to the query where it meets ``key``; Transformer-XL's ``v``.
        bias: (heads, distances), added to the scores after scaling; heads may be 1. See also :meth:`alibi`.
        mode: what rows give keys ahead of them (distance below 0), as in READ -> READ: ``"clean"`` takes distance |d|,
            by symmetry; ``"shifted"`` does what the shift of Transformer-XL's code yields there, for its checkpoints:
            with K keys, 0 at d = -1 and, beyond, ``(q_{i+1} + position_bias) . key[K + 1 + d]``, 0 where row i + 1 is
            padding. ``bias`` is symmetric in both.

    ``key`` and the two biases have the dtype of the query (autocast casts them). Gradients flow to all four.

    Raises:
        TypeError, ValueError: by ``segment_attention``, where shapes or dtypes do not fit the query and the layout.
    """

    key: Tensor | None = None
    content_bias: Tensor | None = None
    position_bias: Tensor | None = None
    bias: Tensor | None = None
    mode: str = "clean"

    @classmethod
    def alibi(cls, slopes: Tensor, distances: int) -> Relative:
        """ALiBi (arXiv 2108.12409): ``-slope * distance``; ``slopes`` (heads,), see :func:`alibi_slopes`."""
        if not isinstance(slopes, Tensor) or slopes.dim() != 1:
            raise TypeError(f"slopes must be a tensor of shape (heads,), got {_described(slopes)}")
        steps = torch.arange(distances, device=slopes.device, dtype=slopes.dtype)
        return cls(bias=-slopes[:, None] * steps)

    def terms(self, layout: SegmentLayout, query: Tensor) -> Terms:
        """The tables for a layout and a query of shape (batch, heads, queries, head_dim), checked."""
        heads, head_dim = query.shape[1], query.shape[3]
        if self.mode not in ("clean", "shifted"):
            raise ValueError(f"relative.mode must be 'clean' or 'shifted', got {self.mode!r}")
        if self.key is None and self.bias is None and self.content_bias is None:
            raise ValueError("relative: give key, bias or content_bias; it holds none of them")
        if self.key is None and self.position_bias is not None:
            raise ValueError("relative.position_bias is added where the query meets relative.key, and key is None")
        reach, ahead = layout.offsets()
        shifted = self.mode == "shifted" and self.key is not None and ahead > 0
        if shifted:
            _check_shifted(layout)
        key = bias = None
        if self.key is not None:
            rows = max(reach, layout.num_keys - 1 if shifted else ahead) + 1
            key = _table("key", self.key, heads, rows, (head_dim,), query)
            ends = [key[:, layout.num_keys + 1 - ahead : layout.num_keys].flip(1), torch.zeros_like(key[:, :1])]
            key = torch.cat([key[:, : reach + 1].flip(1), *(ends[::-1] if shifted else [key[:, 1 : ahead + 1]])], dim=1)
        if self.bias is not None:
            bias = _table("bias", self.bias, heads, max(reach, ahead) + 1, (), query)
            bias = torch.cat([bias[:, : reach + 1].flip(1), bias[:, 1 : ahead + 1]], dim=1)
        return Terms(
            key, bias, _vector("content_bias", self.content_bias, query),
            _vector("position_bias", self.position_bias, query), reach, shifted,
        )  # fmt: skip


def alibi_slopes(heads: int) -> Tensor:
    """ALiBi's slopes, float32 (heads,): a geometric sequence, and for other numbers than powers of two the next odd
    terms of the sequence of twice as many."""
    if isinstance(heads, bool) or not isinstance(heads, int) or heads < 1:
        raise ValueError(f"heads must be an int of at least 1, got {heads!r}")
    power = 1 << (heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * (i + 1) / power) for i in range(power)]
    slopes += [2.0 ** (-8.0 * (2 * i + 1) / (2 * power)) for i in range(heads - power)]
    return torch.tensor(slopes)


def _described(given: object) -> str:
    return str(tuple(given.shape)) if isinstance(given, Tensor) else type(given).__name__


def _check_shifted(layout: SegmentLayout) -> None:
    """The shift is defined where the rows are the last keys, in order, and none is left out."""
    lengths = [form.rows for form in layout.forms]
    if layout.skip or lengths != list(layout.key_sizes[1:]):
        raise ValueError(
            "relative.mode: 'shifted' mixes neighbouring rows where a row sees keys ahead of it, so it needs a layout "
            f"whose queries are all of READ, TOKENS and WRITE; got query rows {lengths}, the first {layout.skip} "
            f"skipped, and key rows {list(layout.key_sizes[1:])}; accepted here: mode='clean'"
        )


def _checked(name: str, given: Tensor, shapes: tuple[tuple[int, ...], ...], query: Tensor) -> Tensor:
    if not isinstance(given, Tensor):
        raise TypeError(f"relative.{name} must be a torch.Tensor, got {type(given).__name__}")
    if given.dtype not in _FLOATS:
        raise TypeError(f"relative.{name} must be float32, float16, bfloat16 or float64, got {given.dtype}")
    if given.device != query.device:
        raise ValueError(f"relative.{name} must be on the device of query, {query.device}, got {given.device}")
    if tuple(given.shape) not in shapes:
        raise ValueError(
            f"relative.{name} must have shape {' or '.join(map(str, dict.fromkeys(shapes)))}, got {tuple(given.shape)}"
        )
    return given


def _cast(name: str, given: Tensor, query: Tensor) -> Tensor:
    if given.dtype == query.dtype:
        return given
    if torch.is_autocast_enabled(query.device.type):
        return given.to(query.dtype)
    raise TypeError(f"relative.{name} must have the dtype of query, {query.dtype}, got {given.dtype}")


def _table(name: str, given: Tensor, heads: int, rows: int, last: tuple[int, ...], query: Tensor) -> Tensor:
    held = given.shape[1] if isinstance(given, Tensor) and given.dim() > 1 else rows
    given = _checked(name, given, ((heads, held, *last), (1, held, *last)), query)
    if held < rows:
        raise ValueError(
            f"relative.{name} must hold {rows} distances, 0 to {rows - 1}, for this layout, got {held}; to treat all "
            "farther ones alike, repeat its last row"
        )
    wide = torch.promote_types(query.dtype, torch.float32)
    given = given.to(wide) if name == "bias" else _cast(name, given, query)
    return given.expand(heads, *given.shape[1:])


def _vector(name: str, given: Tensor | None, query: Tensor) -> Tensor | None:
    if given is None:
        return None
    given = _checked(name, given, ((query.shape[1], query.shape[3]),), query)
    return _cast(name, given, query).contiguous()
