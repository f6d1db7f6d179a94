"""``segment_attention``: check the arguments, choose a backend, call it."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from types import ModuleType
from typing import Literal, overload

import torch

from rmt_kernels.backends import cpu, cuda, reference, stock, triton
from rmt_kernels.backends.call import Call
from rmt_kernels.layout import SegmentLayout
from rmt_kernels.relative import Relative

__all__ = ["Explanation", "explain", "segment_attention"]

Cache = tuple[torch.Tensor, torch.Tensor]

_BACKENDS: dict[str, ModuleType | stock.Composition] = {
    "cpu": cpu,
    "cuda": cuda,
    "triton": triton,
    "stock": stock.best,
    "stock_split": stock.split,
    "stock_dense": stock.dense,
    "stock_flex": stock.flex,
    "reference": reference,
}
_AUTO = ("cpu", "cuda", "triton", "stock", "reference")
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Explanation:
    """Which backend serves a call, and why the ones before it in the order of preference do not."""

    backend: str
    refused: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.backend}: serves this call"]
        return "\n".join(lines + [f"{name}: refused, {reason}" for name, reason in self.refused.items()])


@overload
def segment_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: SegmentLayout, *, cache: Cache | None = ...,
    scale: float | None = ..., token_lengths: torch.Tensor | None = ..., token_starts: torch.Tensor | None = ...,
    cache_starts: torch.Tensor | None = ..., query_start: torch.Tensor | None = ..., dropout_p: float = ...,
    seed: torch.Tensor | None = ..., relative: Relative | None = ..., return_lse: Literal[False] = ...,
    backend: str = ...,
) -> torch.Tensor: ...  # fmt: skip
@overload
def segment_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: SegmentLayout, *, cache: Cache | None = ...,
    scale: float | None = ..., token_lengths: torch.Tensor | None = ..., token_starts: torch.Tensor | None = ...,
    cache_starts: torch.Tensor | None = ..., query_start: torch.Tensor | None = ..., dropout_p: float = ...,
    seed: torch.Tensor | None = ..., relative: Relative | None = ..., return_lse: Literal[True], backend: str = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...  # fmt: skip
def segment_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: SegmentLayout,
    *,
    cache: Cache | None = None,
    scale: float | None = None,
    token_lengths: torch.Tensor | None = None,
    token_starts: torch.Tensor | None = None,
    cache_starts: torch.Tensor | None = None,
    query_start: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    relative: Relative | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention over the regions of one segment.

    ``softmax(scale * query @ key^T + mask(layout)) @ value``, without the mask or the scores ever being stored.

    Args:
        query: (batch, heads, layout.num_queries, head_dim).
        key, value: (batch, kv_heads, layout.num_keys, head_dim); heads must be a multiple of kv_heads (grouped-query
            attention). With ``cache``, the rows of the CACHE region are left out here.
        layout: the regions and rules; see :class:`SegmentLayout`.
        cache: key and value of the CACHE region, (batch, kv_heads, cache, head_dim) each; nothing is concatenated.
        scale: factor on the scores (default ``head_dim ** -0.5``).
        token_lengths: int32 (batch,); TOKENS rows at or after it are padding (right-padded batches).
        token_starts: int32 (batch,); TOKENS rows before it are padding (left-padded batches).
        cache_starts: int32 (batch,); CACHE keys before it are padding.
        query_start: int32 (batch,); TOKENS position of the first query row, for decoding into a static key/value
            buffer; the layout's queries must be TOKENS alone (``layout.decoding(rows)``).
        dropout_p: probability that a softmax entry is dropped, 0 <= p < 1; the rest is scaled by 1 / (1 - p).
        seed: int64 (1,), decides the dropout mask, the same on every backend (default: drawn from the device's default
            generator).
        relative: distance-dependent scores, such as Transformer-XL's or ALiBi's; see :class:`Relative`.
        return_lse: also return the log-sum-exp of each row's scores.
        backend: "auto", or one of "cpu", "cuda", "triton", "stock", "stock_split", "stock_dense", "stock_flex",
            "reference".

    Returns:
        out, (batch, heads, queries, head_dim), in the dtype of ``query``; with ``return_lse=True`` also lse, (batch,
        heads, queries), float32 (float64 for float64 inputs), natural logarithm, differentiable. Padded rows, and rows
        that see nothing, have out 0, lse -inf and gradients 0.

    Raises:
        TypeError, ValueError: an argument that is not accepted, or a named backend that does not serve the call.
    """
    call = _checked(
        query, key, value, layout, cache, scale, token_lengths, token_starts, cache_starts, query_start, dropout_p,
        seed, relative, return_lse,
    )  # fmt: skip
    chosen = _choose(call, backend)
    if call.dropout_p > 0.0 and call.seed is None:
        call.seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=call.query.device)
    out, lse = _BACKENDS[chosen].run(call)
    return (out, lse) if return_lse else out


def explain(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: SegmentLayout,
    *,
    cache: Cache | None = None,
    scale: float | None = None,
    token_lengths: torch.Tensor | None = None,
    token_starts: torch.Tensor | None = None,
    cache_starts: torch.Tensor | None = None,
    query_start: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    relative: Relative | None = None,
    return_lse: bool = False,
) -> Explanation:
    """Which backend ``segment_attention`` would choose for these arguments, and why no faster one. Computes nothing."""
    call = _checked(
        query, key, value, layout, cache, scale, token_lengths, token_starts, cache_starts, query_start, dropout_p,
        seed, relative, return_lse,
    )  # fmt: skip
    refused: dict[str, str] = {}
    for name in _AUTO:
        reason = _objection(name, call)
        if reason is None:
            return Explanation(name, refused)
        refused[name] = reason
    raise AssertionError("the reference serves every call")


def _objection(name: str, call: Call) -> str | None:
    """Why "auto" does not choose the backend, or None."""
    reason = _BACKENDS[name].supports(call)
    if reason is None and name == "triton" and call.query.device.type == "cpu":
        return "Triton's interpreter is for tests: it is chosen by name only"
    if reason is None and name == "cuda":
        return cuda.unproven(call)
    return reason


def _choose(call: Call, backend: str) -> str:
    if not isinstance(backend, str):
        raise TypeError(f"backend must be a str, got {type(backend).__name__}")
    if backend == "auto":
        for name in _AUTO:
            if _objection(name, call) is None:
                if not torch.compiler.is_compiling():
                    _warn_of_fallback(name, call.query.device)
                return name
    if backend not in _BACKENDS:
        raise ValueError(f"backend must be 'auto' or one of {sorted(_BACKENDS)}, got {backend!r}")
    reason = _BACKENDS[backend].supports(call)
    if reason is not None:
        raise ValueError(f"backend={backend!r} does not serve this call: {reason}; use backend='auto'")
    return backend


_warned: set[str] = set()


def _warn_of_fallback(name: str, device: torch.device) -> None:
    """Once for each kind of device: its kernels are missing, something slower runs instead."""
    kernels, why = ("cpu", cpu.why_missing) if device.type == "cpu" else ("triton", triton.why_missing)
    if why and name != kernels and device.type not in _warned:
        _warned.add(device.type)
        warnings.warn(f"segment_attention falls back to '{name}': {why}", RuntimeWarning, stacklevel=4)


def _checked(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: SegmentLayout,
    cache: Cache | None,
    scale: float | None,
    token_lengths: torch.Tensor | None,
    token_starts: torch.Tensor | None,
    cache_starts: torch.Tensor | None,
    query_start: torch.Tensor | None,
    dropout_p: float,
    seed: torch.Tensor | None,
    relative: Relative | None,
    return_lse: bool,
) -> Call:
    if not isinstance(layout, SegmentLayout):
        raise TypeError(f"layout must be a SegmentLayout, got {type(layout).__name__}")
    if not isinstance(return_lse, bool):
        raise TypeError(f"return_lse must be True or False, got {type(return_lse).__name__}")
    if relative is not None and not isinstance(relative, Relative):
        raise TypeError(f"relative must be a Relative or None, got {type(relative).__name__}")
    tensors = {"query": query, "key": key, "value": value}
    if cache is not None:
        if not isinstance(cache, (tuple, list)) or len(cache) != 2:
            raise TypeError(f"cache must be a pair (key, value) of tensors, got {type(cache).__name__}")
        tensors |= {"cache[0]": cache[0], "cache[1]": cache[1]}
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dim() != 4:
            raise ValueError(f"{name} must have 4 dimensions (batch, heads, rows, head_dim), got {tuple(tensor.shape)}")
        if tensor.device != query.device:
            raise ValueError(f"{name} must be on the device of query, {query.device}, got {tensor.device}")
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"{name} must be float32, float16, bfloat16 or float64, got {tensor.dtype}")

    device = query.device.type
    if torch.is_autocast_enabled(device) and query.dtype is not torch.float64:
        dtype = torch.get_autocast_dtype(device)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        cache = None if cache is None else (cache[0].to(dtype), cache[1].to(dtype))
    elif any(tensor.dtype != query.dtype for tensor in tensors.values()):
        given = ", ".join(f"{name} {tensor.dtype}" for name, tensor in tensors.items())
        raise TypeError(f"query, key, value and cache must share one dtype, got {given}")

    batch, heads, rows, head_dim = query.shape
    kv_heads = key.shape[1]
    if head_dim == 0:
        raise ValueError("query: head_dim must be at least 1, got 0")
    if rows != layout.num_queries:
        raise ValueError(f"query must have the layout's {layout.num_queries} rows, got {rows}")
    if kv_heads == 0 or heads == 0 or heads % kv_heads:
        raise ValueError(f"query: heads must be a positive multiple of key's heads, got {heads} and {kv_heads}")
    given_apart = 0 if cache is None else layout.key_sizes[0]
    shape = (batch, kv_heads, layout.num_keys - given_apart, head_dim)
    for name, tensor in (("key", key), ("value", value)):
        if tensor.shape != shape:
            apart = f" ({given_apart} CACHE rows given apart)" if given_apart else ""
            raise ValueError(
                f"{name} must have shape {shape}: (batch, kv_heads, the layout's key rows{apart}, head_dim), "
                f"got {tuple(tensor.shape)}"
            )
    if cache is not None:
        shape = (batch, kv_heads, given_apart, head_dim)
        for i, tensor in enumerate(cache):
            if tensor.shape != shape:
                raise ValueError(f"cache[{i}] must have shape {shape}, got {tuple(tensor.shape)}")
        cache = (cache[0], cache[1])

    if scale is None:
        scale = head_dim**-0.5
    elif isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale must be a float or None, got {type(scale).__name__}")
    elif not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, (int, float)):
        raise TypeError(f"dropout_p must be a float, got {type(dropout_p).__name__}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must satisfy 0 <= dropout_p < 1, got {dropout_p}")
    if seed is not None:
        if not isinstance(seed, torch.Tensor) or seed.dtype != torch.int64:
            raise TypeError("seed must be an int64 tensor of shape (1,)")
        if seed.shape != (1,) or seed.device != query.device:
            raise ValueError(f"seed must have shape (1,) on {query.device}, got {tuple(seed.shape)} on {seed.device}")

    if token_lengths is not None and token_starts is not None:
        raise ValueError("token_starts: padding is at one end of TOKENS; give token_lengths or token_starts, not both")
    token_lengths = _per_batch("token_lengths", token_lengths, batch, query.device)
    token_starts = _per_batch("token_starts", token_starts, batch, query.device)
    cache_starts = _per_batch("cache_starts", cache_starts, batch, query.device)
    query_start = _per_batch("query_start", query_start, batch, query.device)
    if query_start is not None and (layout.forms[0].rows or layout.forms[2].rows):
        raise ValueError("query_start needs a layout whose queries are TOKENS alone: use layout.decoding(rows)")
    return Call(
        query, key, value, layout, cache, float(scale), token_lengths, token_starts, cache_starts, query_start,
        float(dropout_p), seed, return_lse, None if relative is None else relative.terms(layout, query),
    )  # fmt: skip


def _per_batch(name: str, given: torch.Tensor | None, batch: int, device: torch.device) -> torch.Tensor | None:
    if given is None:
        return None
    if not isinstance(given, torch.Tensor) or given.dtype not in (torch.int32, torch.int64):
        kind = given.dtype if isinstance(given, torch.Tensor) else type(given).__name__
        raise TypeError(f"{name} must be an int32 tensor of shape (batch,), got {kind}")
    if given.shape != (batch,) or given.device != device:
        raise ValueError(f"{name} must have shape ({batch},) on {device}, got {tuple(given.shape)} on {given.device}")
    return given if given.dtype is torch.int32 else given.clamp(-1, 2**31 - 1).to(torch.int32)
