"""The registered operators ``rmt_kernels::forward`` and ``rmt_kernels::backward`` and their autograd formula.

Kernel backends register themselves under a name; the operator looks the name up. Operators are what torch.compile,
activation checkpointing and CUDA graphs see.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from rmt_kernels import tape

__all__ = ["Gradients", "attend", "backward", "forward", "like", "register_kernels"]

_SHARED = (
    "Tensor query, Tensor key, Tensor value, Tensor? cache_key, Tensor? cache_value, Tensor? token_lengths, "
    "Tensor? token_starts, Tensor? cache_starts, Tensor? query_start, Tensor? seed, Tensor? relative_key, "
    "Tensor? relative_bias, Tensor? content_bias, Tensor? position_bias, int[] layout, float scale, float dropout_p, "
    "int[] relative, str backend"
)
_TENSORS = 14  # of _SHARED, in front
_DIFFERENTIABLE = (0, 1, 2, 3, 4, 10, 11, 12, 13)  # query, key, value, and those of the cache and of `relative`
_library = torch.library.Library("rmt_kernels", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)  # strides of the inputs decide the outputs'
_library.define(f"forward({_SHARED}) -> (Tensor, Tensor)", tags=_TAGS)
_library.define(
    f"backward(Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse, {_SHARED}) "
    f"-> ({', '.join(['Tensor'] * len(_DIFFERENTIABLE))})",
    tags=_TAGS,
)
forward = torch.ops.rmt_kernels.forward.default
backward = torch.ops.rmt_kernels.backward.default

Gradients = tuple[Tensor, ...]  # of _DIFFERENTIABLE in order, or of the first five; empty where there is no tensor
_FORWARD: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {}
_BACKWARD: dict[str, Callable[..., Gradients]] = {}


def register_kernels(
    backend: str, forward: Callable[..., tuple[Tensor, Tensor]], backward: Callable[..., Gradients]
) -> None:
    """Make a backend's kernels reachable through the operators. They get the operator's arguments without its name;
    ``backward`` may leave out the gradients of `relative` where there is none.

    out lies in memory as query does, a gradient as its tensor: (batch, heads, rows, head_dim), or, where rows lie
    outside heads, as after a projection, (batch, rows, heads, head_dim) seen transposed. So neither the kernels nor
    the ``transpose(1, 2).flatten(2)`` that follows attention jump about or copy.
    """
    _FORWARD[backend], _BACKWARD[backend] = forward, backward


def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    recorded = tape.current()
    if recorded is not None:
        return recorded.run(args[0], lambda: _FORWARD[args[-1]](*args[:-1]))
    return _FORWARD[args[-1]](*args[:-1])


def _backward(*args: Any) -> Gradients:
    found = _BACKWARD[args[-1]](*args[:-1])
    return (*found, *(args[0].new_empty(0) for _ in range(len(_DIFFERENTIABLE) - len(found))))


for _device in ("CPU", "CUDA"):
    _library.impl("forward", _forward, _device)
    _library.impl("backward", _backward, _device)


def like(tensor: Tensor) -> Tensor:
    """An empty tensor of the same shape that lies in memory as ``register_kernels`` says."""
    batch, heads, rows, head_dim = tensor.shape
    if tensor.stride(1) >= tensor.stride(2):
        return tensor.new_empty((batch, heads, rows, head_dim))
    return tensor.new_empty((batch, rows, heads, head_dim)).transpose(1, 2)


@torch.library.register_fake("rmt_kernels::forward", lib=_library)
def _forward_fake(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return like(query), query.new_empty(query.shape[:3], dtype=torch.float32)


@torch.library.register_fake("rmt_kernels::backward", lib=_library)
def _backward_fake(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor,
    cache_key: Tensor | None, cache_value: Tensor | None, *rest: Any,
) -> Gradients:  # fmt: skip
    cache = [query.new_empty(0) if tensor is None else like(tensor) for tensor in (cache_key, cache_value)]
    relative = [query.new_empty(0) if tensor is None else torch.empty_like(tensor) for tensor in rest[5:9]]
    return like(query), like(key), like(value), *cache, *relative


# torch.library.register_autograd would do the same at 100 microseconds a call.
class _Attention(torch.autograd.Function):
    """Through the dispatcher, whose keys are given, or without it where they are None."""

    @staticmethod
    def forward(ctx: Any, keyset: Any, *args: Any) -> tuple[Tensor, Tensor]:
        out, lse = _forward(*args) if keyset is None else forward.redispatch(keyset, *args)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(out, lse, *args[:_TENSORS])
        ctx.rest, ctx.direct = args[_TENSORS:], keyset is None
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_out, grad_lse = grads
        out, lse, *tensors = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        args = (grad_out, grad_lse, out, lse, *tensors, *ctx.rest)
        direct = ctx.direct and not torch.is_grad_enabled() and _unobserved((*grads, out, lse, *tensors))
        found = _BACKWARD[args[-1]](*args[:-1]) if direct else backward(*args)
        gradients: list[Tensor | None] = [None] * (_TENSORS + len(ctx.rest))
        for i, gradient in zip(_DIFFERENTIABLE, found, strict=False):
            if tensors[i] is not None:
                gradients[i] = gradient
        return (None, *gradients)


class _OnceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, keyset: Any, *args: Any) -> Gradients:
        return backward.redispatch(keyset, *args)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        raise NotImplementedError(
            "segment_attention's kernels are differentiable once; for second derivatives use backend='reference'"
        )


def _under_autograd(
    function: type[torch.autograd.Function], op: Any, tensors: int
) -> Callable[..., tuple[Tensor, ...]]:
    def run(keyset: Any, *args: Any) -> tuple[Tensor, ...]:
        if forward_ad._current_level >= 0 and any(
            tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in args[:tensors]
        ):
            raise NotImplementedError(
                "segment_attention's kernels have no forward-mode derivative; use backend='reference'"
            )
        keyset = keyset & torch._C._after_autograd_keyset
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in args[:tensors]):
            return function.apply(keyset, *args)  # type: ignore[no-any-return]
        return op.redispatch(keyset, *args)  # type: ignore[no-any-return]

    return run


_library.impl("forward", _under_autograd(_Attention, forward, _TENSORS), "Autograd", with_keyset=True)
_library.impl("backward", _under_autograd(_OnceDifferentiable, backward, 4 + _TENSORS), "Autograd", with_keyset=True)


_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None)))


def _unobserved(tensors: tuple[Any, ...]) -> bool:
    """Whether the dispatcher would do nothing but call the kernels: plain tensors, and nothing that wants to see the
    operator."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and torch._C._get_tracing_state() is None
        and set(map(type, tensors)) <= _PLAIN
    )


def attend(*args: Any) -> tuple[Tensor, Tensor]:
    """The operator ``forward``, called without the dispatcher where that makes no difference but to the host's time: it
    takes as long as a short kernel."""
    if not _unobserved(args[:_TENSORS]):
        return forward(*args)  # type: ignore[no-any-return]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in args[:_TENSORS]):
        return _Attention.apply(None, *args)  # type: ignore[no-any-return]
    return _forward(*args)
