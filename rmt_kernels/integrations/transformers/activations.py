"""Activations that transformers writes out in half a dozen operations, as PyTorch's one."""

from __future__ import annotations

from torch import nn
from transformers.activations import FastGELUActivation, NewGELUActivation

__all__ = ["in_one_kernel"]

# x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), written in two ways.
_TANH_GELU = (FastGELUActivation, NewGELUActivation)


def in_one_kernel(base: nn.Module) -> None:
    """Put PyTorch's tanh GELU in the place of "gelu_new" and "gelu_fast", which GPT-2 and its kin are made with.

    The same function, rounded once. Written out it keeps five tensors as wide as the inner layer for the backward pass,
    where PyTorch's keeps the input: three fifths of the activations of a GPT-2.
    """
    for part in list(base.modules()):
        for name, child in list(part._modules.items()):
            if child is not None and type(child) in _TANH_GELU and not _altered(child):
                setattr(part, name, nn.GELU(approximate="tanh").train(child.training))


def _altered(part: nn.Module) -> bool:
    """Whether somebody has hung something on it."""
    hooks = (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks, part._backward_pre_hooks)
    return "forward" in vars(part) or any(hooks)
