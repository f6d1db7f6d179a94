"""This package's kernels as an implementation of PyTorch's flash attention, for models that call
``torch.nn.functional.scaled_dot_product_attention`` (SDPA) and know nothing of segments::

    from torch.nn.attention import activate_flash_attention_impl, restore_flash_attention_impl
    from rmt_kernels.integrations.flash import register_flash_provider

    register_flash_provider()
    activate_flash_attention_impl("rmt_kernels")
    ...
    restore_flash_attention_impl()

While it is active, the operators below SDPA are replaced in PyTorch's dispatcher, for CPU and CUDA tensors; autograd
and the fake kernels that torch.compile traces with stay PyTorch's own. The CUDA operators' shapes and numbers are
checked on CPU tensors; they are not yet measured on a GPU.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from rmt_kernels import ops
from rmt_kernels.backends import cpu, cuda, triton
from rmt_kernels.backends.call import Call
from rmt_kernels.layout import Region, Rule, SegmentLayout

__all__ = ["NAME", "register_flash_provider"]

NAME = "rmt_kernels"
_log = logging.getLogger(__name__)

# What a causal mask is aligned with where queries != keys: PyTorch's CPU operator has row 0 see key 0, its CUDA
# operators have the last row see the last key (torch.nn.attention.bias reaches them for causal_lower_right).
_Causal = Literal["first", "last"]
_Tensors3 = tuple[Tensor, Tensor, Tensor]
_ABSENT = (None,) * 11  # the operators' tensors for caches, padding, dropout and distances


def register_flash_provider() -> None:
    """Register the implementation "rmt_kernels" with ``torch.nn.attention``; nothing changes until
    ``activate_flash_attention_impl("rmt_kernels")``. Once more is harmless.

    While it is active, flash attention without dropout and without a mask matrix, causal or full, with any scale,
    strides and grouped heads, is computed by backend "cpu" (float32, bfloat16, float16), "cuda" or "triton"; gradients
    too. A call that they do not serve (float64, a mask, sequences packed with ``cum_seq_q``, a window, ALiBi, ...) goes
    to the implementation that was replaced, and the reason to the log of this module at level DEBUG. SDPA picks its
    math or memory-efficient implementation as ever: what does not reach flash attention does not come here.

    Dropout raises NotImplementedError: PyTorch's state (seed, offset) draws another mask than these kernels. On the CPU
    SDPA does not use flash attention with dropout, so that no call of SDPA fails there.

    Raises:
        RuntimeError: this PyTorch has no registry of flash-attention implementations.
    """
    try:
        from torch.library import get_kernel  # noqa: F401  what is not served goes to the replaced implementation
        from torch.nn.attention import register_flash_attention_impl, restore_flash_attention_impl  # noqa: F401
    except ImportError as error:
        raise RuntimeError(
            f"PyTorch {torch.__version__} has no complete registry of flash-attention implementations ({error}): "
            "install PyTorch 2.11 or later, or call rmt_kernels.segment_attention"
        ) from None
    register_flash_attention_impl(NAME, register_fn=_Active)


class _Active:
    """The operators are replaced from the making of this object to ``remove()``."""

    def __init__(self) -> None:
        self._library: Any = torch.library.Library("aten", "IMPL")
        try:
            for name, key, serve in _OPERATORS:
                if hasattr(torch.ops.aten, name):  # not every version has every variant
                    self._replace(name, key, serve)
        except BaseException:
            self.remove()
            raise

    def _replace(self, name: str, key: str, serve: Callable[..., Any]) -> None:
        qualified = f"aten::{name}"
        known = torch._C._dispatch_has_kernel_for_dispatch_key(qualified, key)
        replaced: Any = torch.library.get_kernel(qualified, key) if known else None
        keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

        def run(*args: Any, **kwargs: Any) -> Any:
            try:
                return serve(*args, **kwargs)
            except _NotServedError as reason:
                if replaced is None:
                    raise RuntimeError(
                        f"{qualified}: {reason}; this build of PyTorch has no implementation of its own for {key}"
                    ) from None
                _log.debug("%s goes to PyTorch's own implementation: %s", qualified, reason)
            return replaced.call_boxed(keys, *args, **kwargs)

        with warnings.catch_warnings():  # replacing is what was asked for
            warnings.filterwarnings("ignore", "(?s).*Overriding a previously registered kernel", UserWarning)
            self._library.impl(name, run, key)

    def remove(self) -> None:
        """Give the operators back; once more is harmless."""
        if self._library is not None:
            self._library._destroy()
            self._library = None


class _NotServedError(Exception):
    """Says why a call goes to the replaced implementation."""


@dataclass(frozen=True)
class _Plan:
    backend: str
    layout: tuple[int, ...]
    scale: float

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        found = ops.forward(query, key, value, *_ABSENT, self.layout, self.scale, 0.0, (), self.backend)
        return found  # type: ignore[no-any-return]

    def backward(
        self, grad_out: Tensor, out: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor
    ) -> _Tensors3:
        given = (grad_out, None, out, lse.contiguous(), query, key, value)
        found = ops.backward(*given, *_ABSENT, self.layout, self.scale, 0.0, (), self.backend)
        return found[0], found[1], found[2]


def _plan(query: Tensor, key: Tensor, value: Tensor, causal: _Causal | None, scale: float | None) -> _Plan:
    """Tensors are (batch, heads, rows, head_dim)."""
    if not query.dim() == key.dim() == value.dim() == 4:
        raise _NotServedError(f"tensors have {query.dim()}, {key.dim()} and {value.dim()} dimensions, served are 4")
    if not query.dtype == key.dtype == value.dtype or not query.device == key.device == value.device:
        raise _NotServedError("query, key and value differ in dtype or device")
    if value.shape != key.shape:
        raise _NotServedError(f"key {tuple(key.shape)} and value {tuple(value.shape)} differ in shape")
    if scale is None:
        scale = query.shape[3] ** -0.5 if query.shape[3] else 1.0
    elif not math.isfinite(scale):
        raise _NotServedError(f"scale is {scale}")
    chosen = _choose(tuple(query.shape), tuple(key.shape), query.dtype, query.device, causal)
    if isinstance(chosen, str):
        raise _NotServedError(chosen)
    return _Plan(*chosen, float(scale))


@lru_cache(maxsize=4096)
def _choose(
    shape: tuple[int, ...], key_shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, causal: _Causal | None
) -> tuple[str, tuple[int, ...]] | str:
    """The backend for forward and backward, and the layout's integers; or why there is none."""
    batch, heads, queries, head_dim = shape
    kv_heads, keys = key_shape[1:3]
    if 0 in shape or 0 in key_shape:
        return "there is nothing to compute"
    if (batch, head_dim) != (key_shape[0], key_shape[3]) or heads % kv_heads:
        return f"query {shape} and key {key_shape} do not go together"
    if causal == "last" and queries > keys:
        return f"{queries} causal queries end with {keys} keys: the first rows see nothing"
    # Only shapes decide, so one number stands for each tensor; it asks for gradients because the backend must have both
    # directions.
    with torch.enable_grad():
        number = torch.zeros(1, dtype=dtype, device=device)
        query, key = number.expand(shape).requires_grad_(dtype.is_floating_point), number.expand(key_shape)
        layout = _layout(queries, keys, causal)
        call = Call(query, key, key, layout, None, 1.0, None, None, None, None, 0.0, None, True)
        refused = []
        for name, backend in (("cpu", cpu),) if device.type == "cpu" else (("cuda", cuda), ("triton", triton)):
            reason = backend.supports(call)
            if reason is None and backend is cuda:
                reason = cuda.unproven(call)
            if reason is None:
                return name, layout.ints
            refused.append(f"backend {name!r}: {reason}")
    return "; ".join(refused)


def _layout(queries: int, keys: int, causal: _Causal | None) -> SegmentLayout:
    """Plain attention as a segment: the rows and keys on the mask's diagonal are TOKENS."""
    if causal is None:
        return SegmentLayout.memformer_read(queries, keys)
    rules: dict[tuple[Region | str, Region | str], Rule | str] = {
        ("tokens", "tokens"): Rule.CAUSAL,
        ("tokens", "cache"): Rule.FULL,
        ("write", "tokens"): Rule.FULL,
    }
    if causal == "last":
        return SegmentLayout(cache=keys - queries, tokens=queries, rules=rules, queries=("tokens",))
    if queries <= keys:  # WRITE: keys that no row sees
        return SegmentLayout(tokens=queries, write=keys - queries, queries=("tokens",), rules=rules)
    return SegmentLayout(tokens=keys, write=queries - keys, keys=("tokens",), rules=rules)


def _refuse_dropout(dropout_p: float) -> None:
    if dropout_p > 0.0:
        raise NotImplementedError(
            f"dropout_p={dropout_p}: flash attention by {NAME!r} has no dropout, because PyTorch's (seed, offset) "
            "draws another mask than its kernels; use dropout_p=0, rmt_kernels.segment_attention(dropout_p=, seed=) or "
            "torch.nn.attention.restore_flash_attention_impl()"
        )


def _refuse_options(options: dict[str, Any]) -> None:
    for name, given in options.items():
        if given is not None and not (name.startswith("window_size") and given == -1):
            raise _NotServedError(f"{name} is given")


def _check_backward(grad_out: Tensor, query: Tensor, lse: Tensor, dropout_p: float) -> None:
    if dropout_p > 0.0:  # its forward pass ran before the activation
        raise _NotServedError("its forward pass had dropout")
    if lse.shape != query.shape[:3] or lse.dtype != torch.float32 or grad_out.dtype != query.dtype:
        raise _NotServedError(f"logsumexp is {lse.dtype} {tuple(lse.shape)}, grad_out {grad_out.dtype}")


def _as(result: Tensor, tensor: Tensor) -> Tensor:
    """The result in the memory layout of ``torch.empty_like(tensor)``, which the fake kernels promise."""
    return result if result.stride() == tensor.stride() else torch.empty_like(tensor).copy_(result)


def _rows_outside(result: Tensor) -> Tensor:
    """The result as (batch, rows, heads, ...) seen transposed, which the CPU's fake kernels promise."""
    return result.transpose(1, 2).contiguous().transpose(1, 2)


# The operators; their arguments are named as in PyTorch's schemas.


def _cpu_forward(
    query: Tensor, key: Tensor, value: Tensor, dropout_p: float = 0.0, is_causal: bool = False, *,
    attn_mask: Tensor | None = None, scale: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    _refuse_dropout(dropout_p)
    _refuse_options({"attn_mask": attn_mask})
    out, lse = _plan(query, key, value, "first" if is_causal else None, scale).forward(query, key, value)
    return _as(out, query), _rows_outside(lse)


def _cpu_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor, dropout_p: float,
    is_causal: bool, *, attn_mask: Tensor | None = None, scale: float | None = None,
) -> _Tensors3:  # fmt: skip
    _refuse_options({"attn_mask": attn_mask})
    plan = _plan(query, key, value, "first" if is_causal else None, scale)
    _check_backward(grad_out, query, logsumexp, dropout_p)
    dq, dk, dv = plan.backward(grad_out, out, logsumexp, query, key, value)
    return _rows_outside(dq), _rows_outside(dk), _rows_outside(dv)


def _sdpa_forward(
    query: Tensor, key: Tensor, value: Tensor, dropout_p: float = 0.0, is_causal: bool = False,
    return_debug_mask: bool = False, *, scale: float | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    _refuse_dropout(dropout_p)
    _refuse_options({"return_debug_mask": return_debug_mask or None})
    out, lse = _plan(query, key, value, "last" if is_causal else None, scale).forward(query, key, value)
    return (_as(out, query), lse, None, None, query.shape[2], key.shape[2], *_no_dropout_state(query))


def _sdpa_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor,
    cum_seq_q: Tensor | None, cum_seq_k: Tensor | None, max_q: int, max_k: int, dropout_p: float, is_causal: bool,
    philox_seed: Tensor | None, philox_offset: Tensor | None, *, scale: float | None = None,
) -> _Tensors3:  # fmt: skip
    _refuse_options({"cum_seq_q": cum_seq_q, "cum_seq_k": cum_seq_k})
    plan = _plan(query, key, value, "last" if is_causal else None, scale)
    _check_backward(grad_out, query, logsumexp, dropout_p)
    dq, dk, dv = plan.backward(grad_out, out, logsumexp, query, key, value)
    return _as(dq, query), _as(dk, key), _as(dv, value)


def _flash_forward(
    query: Tensor, key: Tensor, value: Tensor, cum_seq_q: Tensor | None, cum_seq_k: Tensor | None, max_q: int,
    max_k: int, dropout_p: float, is_causal: bool, return_debug_mask: bool, *, scale: float | None = None,
    **options: Any,
) -> tuple[Any, ...]:  # fmt: skip
    """Tensors are (batch, rows, heads, head_dim) here and in the two that follow."""
    _refuse_options({"cum_seq_q": cum_seq_q, "cum_seq_k": cum_seq_k, **options})
    _refuse_four(query, key, value)
    q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
    out, lse, *_, seed, offset, mask = _sdpa_forward(q, k, v, dropout_p, is_causal, return_debug_mask, scale=scale)
    return _as(out.transpose(1, 2), query), lse, seed, offset, mask


def _flash_forward_inplace(out: Tensor, query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    found, lse, *_ = _flash_forward(query, *args, **kwargs)
    out.copy_(found)
    return lse  # type: ignore[no-any-return]


def _flash_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor,
    cum_seq_q: Tensor | None, cum_seq_k: Tensor | None, max_q: int, max_k: int, dropout_p: float, is_causal: bool,
    rng_state: Tensor | None, unused: Tensor | None, *, scale: float | None = None, **options: Any,
) -> _Tensors3:  # fmt: skip
    _refuse_options({"cum_seq_q": cum_seq_q, "cum_seq_k": cum_seq_k, **options})
    _refuse_four(query, key, value)
    go, q, k, v, o = (tensor.transpose(1, 2) for tensor in (grad_out, query, key, value, out))
    found = _sdpa_backward(
        go, q, k, v, o, logsumexp, None, None, max_q, max_k, dropout_p, is_causal, None, None, scale=scale
    )  # fmt: skip
    dq, dk, dv = (gradient.transpose(1, 2) for gradient in found)
    return _as(dq, query), _as(dk, key), _as(dv, value)


def _refuse_four(*tensors: Tensor) -> None:
    if any(tensor.dim() != 4 for tensor in tensors):
        raise _NotServedError("tensors without a batch dimension are not served")


def _no_dropout_state(query: Tensor) -> _Tensors3:
    """rng_state, its offset and the debug mask, all without meaning where there is no dropout."""
    seed = torch.zeros(2, dtype=torch.uint64, device=query.device)
    return seed, torch.zeros((), dtype=torch.uint64, device=query.device), query.new_empty(0)


_OPERATORS: tuple[tuple[str, str, Callable[..., Any]], ...] = (
    ("_scaled_dot_product_flash_attention_for_cpu", "CPU", _cpu_forward),
    ("_scaled_dot_product_flash_attention_for_cpu_backward", "CPU", _cpu_backward),
    ("_scaled_dot_product_flash_attention", "CUDA", _sdpa_forward),
    ("_scaled_dot_product_flash_attention_backward", "CUDA", _sdpa_backward),
    ("_flash_attention_forward", "CUDA", _flash_forward),
    ("_flash_attention_forward_no_dropout_inplace", "CUDA", _flash_forward_inplace),
    ("_flash_attention_backward", "CUDA", _flash_backward),
)
