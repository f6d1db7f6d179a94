"""The suite itself: it must fail backends that are wrong in one thing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rmt_kernels import SegmentLayout, reference_attention
from tests.draws import NAMED, PRESETS, draw
from tests.suite import BF16, F32, Attention, Case, check, complaints, expected, make, nan_filled_memory, results

CASE = Case(SegmentLayout.rmt_decoder(65, 8, cache=33), batch=3, kv_heads=2, group=2, padding="right", dropout_p=0.1)
Arguments = tuple[Tensor, Tensor, Tensor, SegmentLayout]


class _Scaled(torch.autograd.Function):
    """Its argument, with its gradient changed."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.change = change
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.change(grads[0]), None


def _with(**changed: Any) -> Attention:
    def compute(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        return reference_attention(*args, **(options | changed))

    return compute


def _layout(change: Callable[[SegmentLayout], SegmentLayout]) -> Attention:
    def compute(
        query: Tensor, key: Tensor, value: Tensor, layout: SegmentLayout, **options: Any
    ) -> tuple[Tensor, Tensor]:
        return reference_attention(query, key, value, change(layout), **options)

    return compute


def _gradient(which: int, change: Callable[[Tensor], Tensor]) -> Attention:
    def compute(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        tensors = list(args)
        tensors[which] = _Scaled.apply(tensors[which], change)
        return reference_attention(*tensors, **options)

    return compute


def _result(change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Attention:
    def compute(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        return change(*reference_attention(*args, **options))

    return compute


def _heads_swapped(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, Tensor]:
    return reference_attention(query, key.flip(1), value.flip(1), *rest, **options)


def _one_row_nan(grad: Tensor) -> Tensor:
    return torch.cat([grad[:, :, :-1], torch.full_like(grad[:, :, -1:], float("nan"))], dim=2)


WRONG: dict[str, Attention] = {
    "no padding": _with(token_lengths=None),
    "another dropout mask": _with(seed=torch.tensor([5])),
    "no dropout": _with(dropout_p=0.0),
    "scale off by 1e-4": _with(scale=32**-0.5 * 1.0001),
    "the wrapper's mask": _layout(lambda layout: SegmentLayout.causal(layout.tokens, layout.read, cache=layout.cache)),
    "memory sees the cache": _layout(lambda layout: SegmentLayout.rmt_decoder(65, 8, cache=33, read_cache=True)),
    "a window": _layout(lambda layout: replace(layout, window=97)),
    "other heads": _heads_swapped,
    "out rounded": _result(lambda out, lse: (out.bfloat16().float(), lse)),
    "lse in base 2": _result(lambda out, lse: (out, lse * 1.4426950408889634)),
    "lse finite": _result(lambda out, lse: (out, lse.clamp(min=-1e30))),
    "lse without gradient": _result(lambda out, lse: (out, _Scaled.apply(lse, torch.zeros_like))),
    "blind rows not 0": _result(lambda out, lse: (out + 1e-20, lse)),
    "grad query off by 1e-4": _gradient(0, lambda grad: grad * 1.0001),
    "grad key rounded": _gradient(1, lambda grad: grad.bfloat16().float()),
    "grad value missing": _gradient(2, torch.zeros_like),
    "grad key unwritten row": _gradient(1, _one_row_nan),
    "grad value at unseen keys": _gradient(2, lambda grad: grad + 1e-20),
    "one element of grad query": _gradient(0, lambda grad: grad + torch.eye(grad.shape[2], 32) * 3e-5),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_backend_is_found(name: str) -> None:
    found = results(make(CASE), WRONG[name])
    with pytest.raises(AssertionError):
        check(CASE, found)


def test_the_right_one_is_not() -> None:
    check(CASE, results(make(CASE), reference_attention))


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_precision_lost_in_the_products_is_found(dtype: torch.dtype) -> None:
    """Arithmetic in the next narrower dtype breaks the rule."""
    case = replace(CASE, dtype=dtype, padding="", dropout_p=0.0)
    problem = make(case)
    narrower = {F32: BF16, BF16: torch.float8_e4m3fn}[dtype]

    def compute(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, Tensor]:
        query = query + (query.to(narrower).to(dtype) - query).detach()
        out, lse = reference_attention(query.float(), key.float(), value.float(), *rest, **options)
        return out.to(dtype), lse

    said = complaints(case, results(problem, compute), expected(case))
    assert {complaint.split(":")[0] for complaint in said} >= {"out", "lse", "grad key", "grad value"}


def test_drawn_cases_repeat_and_cover_what_they_should() -> None:
    cases = [draw(number) for number in range(60)]
    assert cases == [draw(number) for number in range(60)]
    assert {case.layout.name for case in cases} >= {make(lambda most: 5).name for make in PRESETS.values()}
    for name, least in (
        ("dtype", 3), ("padding", 3), ("stale", 2), ("start", 2), ("apart", 2), ("dropout_p", 3), ("strides", 5),
        ("grads", 4), ("batch", 3), ("group", 4), ("head_dim", 11),
    ):  # fmt: skip
        assert len({getattr(case, name) for case in cases}) >= least, name
    assert any(case.layout.window for case in cases)
    assert any(case.layout.skip for case in cases)
    assert len({case.label for case in NAMED.values()}) > 100


def test_fresh_memory_is_nan() -> None:
    with nan_filled_memory():
        assert torch.empty(3).isnan().all()
        assert torch.ops.aten.empty_like(torch.ones(2, dtype=BF16)).isnan().all()
        assert torch.ones(2).new_empty(4, 2).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()
