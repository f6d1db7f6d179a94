"""The registered operators ``rmt_kernels::forward`` and ``rmt_kernels::backward`` and their autograd formula.

Kernel backends register themselves under a name; the operator looks the name up. Operators are what torch.compile,
activation checkpointing and CUDA graphs see.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["backward", "forward", "register_kernels"]

_SHARED = (
    "Tensor query, Tensor key, Tensor value, Tensor? cache_key, Tensor? cache_value, Tensor? token_lengths, "
    "Tensor? token_starts, Tensor? cache_starts, Tensor? query_start, Tensor? seed, Tensor[] relative, "
    "int[] layout, float scale, float dropout_p, str relative_kind, str backend"
)
_library = torch.library.Library("rmt_kernels", "DEF")
_library.define(f"forward({_SHARED}) -> (Tensor, Tensor)", tags=(torch.Tag.pt2_compliant_tag,))
_library.define(
    f"backward(Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse, {_SHARED}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_FORWARD: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {}
_BACKWARD: dict[str, Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]] = {}


def register_kernels(
    backend: str,
    forward: Callable[..., tuple[Tensor, Tensor]],
    backward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor]],
) -> None:
    """Make a backend's kernels reachable through the operators. They get the operator's arguments without its name.

    out and the gradients are laid out (batch, rows, heads, head_dim) in memory and returned with rows and heads
    swapped, so that the usual ``transpose(1, 2).flatten(2)`` after attention copies nothing.
    """
    _FORWARD[backend], _BACKWARD[backend] = forward, backward


def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    return _FORWARD[args[-1]](*args[:-1])


def _backward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _BACKWARD[args[-1]](*args[:-1])


for _device in ("CPU", "CUDA"):
    _library.impl("forward", _forward, _device)
    _library.impl("backward", _backward, _device)


def _like(tensor: Tensor) -> Tensor:
    batch, heads, rows, head_dim = tensor.shape
    return tensor.new_empty((batch, rows, heads, head_dim)).transpose(1, 2)


@torch.library.register_fake("rmt_kernels::forward", lib=_library)
def _forward_fake(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _like(query), query.new_empty(query.shape[:3], dtype=torch.float32)


@torch.library.register_fake("rmt_kernels::backward", lib=_library)
def _backward_fake(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, query: Tensor, key: Tensor, value: Tensor,
    cache_key: Tensor | None, cache_value: Tensor | None, *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    none = query.new_empty(0)
    return (
        _like(query), _like(key), _like(value),
        none if cache_key is None else _like(cache_key),
        query.new_empty(0) if cache_value is None else _like(cache_value),
    )  # fmt: skip


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output, *inputs[:10], *inputs[10])
    ctx.rest = inputs[11:]


def _differentiate(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    out, lse, *saved = ctx.saved_tensors
    tensors, relative = saved[:10], saved[10:]
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    dq, dk, dv, dck, dcv = torch.ops.rmt_kernels.backward(grad_out, grad_lse, out, lse, *tensors, relative, *ctx.rest)
    if tensors[3] is None:
        dck = dcv = None
    return dq, dk, dv, dck, dcv, None, None, None, None, None, [None] * len(relative), None, None, None, None, None


def _refuse(ctx: Any, *_: Any) -> None:
    raise NotImplementedError(
        "segment_attention's kernels are differentiable once; for second derivatives use backend='reference'"
    )


torch.library.register_autograd("rmt_kernels::forward", _differentiate, setup_context=_save, lib=_library)
torch.library.register_autograd("rmt_kernels::backward", _refuse, lib=_library)
forward = torch.ops.rmt_kernels.forward.default
backward = torch.ops.rmt_kernels.backward.default
