"""The operator is called without the dispatcher only where nothing could tell the difference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from rmt_kernels import SegmentLayout, ops, segment_attention
from rmt_kernels.backends import cpu
from tests.suite import Case, make, refusal

LAYOUT = SegmentLayout.rmt_decoder(20, 3)
CASE = Case(LAYOUT, batch=1)

if cpu.why_missing:
    pytest.skip(cpu.why_missing, allow_module_level=True)


class _Seen(TorchDispatchMode):
    """Counts the package's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "rmt_kernels":
            self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


class _Functions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def inputs(requires_grad: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    problem = make(CASE)
    assert refusal("cpu", problem, True) is None
    query, key, value = (tensor.detach().requires_grad_(requires_grad) for tensor in problem.inputs.values())
    return query, key, value


def attention(*tensors: Tensor) -> Tensor:
    return segment_attention(tensors[0], tensors[1], tensors[2], LAYOUT, backend="cpu")


@pytest.fixture
def through(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the operators that are called through the dispatcher."""
    called: list[str] = []

    def watch(name: str) -> None:
        op: Callable[..., Any] = getattr(ops, name)

        def run(*args: Any) -> Any:
            called.append(name)
            return op(*args)

        monkeypatch.setattr(ops, name, run)

    # `forward.redispatch` is not called in these tests but from within the operator itself.
    monkeypatch.setattr(ops, "forward", _Watched(ops.forward, called))
    watch("backward")
    return called


class _Watched:
    def __init__(self, op: Any, called: list[str]) -> None:
        self.op, self.called = op, called
        self.redispatch = op.redispatch

    def __call__(self, *args: Any) -> Any:
        self.called.append("forward")
        return self.op(*args)


def gradients(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    out = attention(*tensors)
    return (out, *torch.autograd.grad(out.square().sum(), tensors))


def test_plain_calls_go_straight_to_the_kernels(through: list[str]) -> None:
    gradients(inputs())
    with torch.no_grad():
        attention(*inputs())
    attention(*inputs(requires_grad=False))
    assert through == []


def test_both_ways_give_the_same_bits(through: list[str]) -> None:
    tensors = inputs()
    direct = gradients(tensors)
    with _Functions():
        watched = gradients(tensors)
    assert through == ["forward", "backward"]
    assert all(torch.equal(a, b) for a, b in zip(direct, watched, strict=True))


def test_a_dispatch_mode_sees_the_operators() -> None:
    with _Seen() as seen:
        gradients(inputs())
    assert seen.names == ["forward.default", "backward.default"]


def test_a_mode_around_backward_alone_sees_it() -> None:
    tensors = inputs()
    out = attention(*tensors)
    with _Seen() as seen:
        torch.autograd.grad(out.sum(), tensors)
    assert seen.names == ["backward.default"]


def test_selective_checkpointing_can_name_it() -> None:
    policy_saw = []

    def policy(ctx: Any, func: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        policy_saw.append(func)
        return CheckpointPolicy.PREFER_RECOMPUTE

    tensors = inputs()
    out = checkpoint(
        attention, *tensors, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy)
    )
    torch.autograd.grad(out.sum(), tensors)
    assert torch.ops.rmt_kernels.forward.default in policy_saw


def test_parameters_are_plain_tensors(through: list[str]) -> None:
    query, key, value = (torch.nn.Parameter(tensor.detach()) for tensor in inputs())
    gradients((query, key, value))
    assert through == []


def test_subclasses_are_not(through: list[str]) -> None:
    class Marked(Tensor):
        pass

    query, key, value = inputs(requires_grad=False)
    found = attention(query.as_subclass(Marked), key, value)
    assert through == ["forward"]
    assert torch.equal(torch.Tensor(found), attention(query, key, value))


def test_forward_mode_is_an_error_and_not_a_missing_tangent() -> None:
    query, key, value = inputs(requires_grad=False)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(query, torch.ones_like(query))
        with pytest.raises(NotImplementedError, match="no forward-mode derivative; use backend='reference'"):
            attention(dual, key, value)
        assert torch.equal(attention(query, key, value), attention(query.clone(), key, value))


def test_double_backward_is_refused_on_both_ways() -> None:
    for context in (torch.no_grad, None):
        tensors = inputs()
        out = attention(*tensors)
        if context is None:
            with _Functions():
                out = attention(*tensors)
        grads = torch.autograd.grad(out.square().sum(), tensors, create_graph=True)
        with pytest.raises(NotImplementedError, match="backend='reference'"):
            grads[0].sum().backward()
