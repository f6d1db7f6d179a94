"""Calls that candidates are compiled for, checked and timed on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from rmt_kernels.backends import plans
from rmt_kernels.backends.triton import launch, operators
from rmt_kernels.backends.triton.configs import Backward
from rmt_kernels.backends.triton.resources import Variant, specialize
from rmt_kernels.backends.triton.tune.candidates import DTYPES, Config, Key, label
from rmt_kernels.layout import SegmentLayout
from rmt_kernels.reference import reference_attention

__all__ = ["Case", "Problem", "cases"]

_DROPOUT = 0.1
_ALLOWED = {"half": 5e-3, "tf32": 2e-3, "float32": 1e-5}  # error of a row, of gradients twice that
_RESULTS: tuple[str, ...] = ("out", "lse")
_GRADIENTS = ("grad query", "grad key", "grad value")


@dataclass(frozen=True)
class Case:
    """Sizes of a call."""

    name: str
    layout: SegmentLayout
    batch: int
    heads: int
    kv_heads: int


def cases(key: Key) -> list[Case]:
    """What a key is timed on: the mean over them decides."""
    heads = 2048 // key.width

    def layout(tokens: int) -> SegmentLayout:
        return SegmentLayout.rmt_decoder(tokens, 16, window=tokens // 2 if key.calls == "gaps" else None)

    if key.length == "few":
        return [Case("a row against 8k keys, batch 16", layout(8192).decoding(), 16, 32, 8)]
    if key.length == "long":
        return [Case("T=2048, batch 8", layout(2048), 8, heads, heads)]
    return [Case("T=512, batch 32", layout(512), 32, heads, heads), Case("T=512, batch 1", layout(512), 1, 16, 16)]


Steps = list[tuple[launch.Launch, tuple[Any, ...]]]


class Problem:
    """A case's inputs, and the operator on them with one configuration or another."""

    def __init__(self, key: Key, case: Case, device: torch.device, arch: int) -> None:
        self.key, self.case, self.arch = key, case, arch
        generator = torch.Generator(device).manual_seed(0)

        def tensor(heads: int, rows: int) -> Tensor:
            size = (case.batch, heads, rows, key.width)
            return torch.randn(size, generator=generator, device=device).to(DTYPES[key.kind])

        queries, keys = case.layout.num_queries, case.layout.num_keys
        self._inputs = tensor(case.heads, queries), tensor(case.kv_heads, keys), tensor(case.kv_heads, keys)
        self._dropout = _DROPOUT if key.calls == "extras" else 0.0
        self._seed = torch.full((1,), 7, dtype=torch.int64, device=device) if self._dropout else None
        self._grad = tensor(case.heads, queries)
        self._exact: dict[str, Tensor] = {}
        self._accepted: dict[str, Tensor] = {}
        self._forward: dict[str, Tensor] = {}
        if key.backward:
            self._forward = self.run(replace(key, backward=False).row(arch).config)

    def run(self, config: Config) -> dict[str, Tensor]:
        """What the operator computes, by name: its work is only enqueued."""
        steps, results = self._steps(config)
        for step, tensors in steps:
            step(*tensors)
        return results

    def wrong(self, config: Config) -> str:
        """How far a result is off, empty where none is: from float64 in the first sample's first heads, and everywhere
        from the first configuration that was not. Results are written over NaN."""
        steps, results = self._steps(config)
        for tensor in results.values():
            tensor.fill_(float("nan"))
        for step, tensors in steps:
            step(*tensors)
        self._exact = self._exact or self._computed()
        for truth, whose in ((self._exact, "the reference"), (self._accepted, "an accepted configuration")):
            for name, true in truth.items():
                error = _error(results[name][: true.shape[0], : true.shape[1]], true)
                allowed = _ALLOWED[self.key.kind] * (2 if name in _GRADIENTS else 1)
                if not error <= allowed:  # NaN too
                    return f"{name} of {self.case.name} is {error:.1e} off {whose}, allowed {allowed:.1e}"
        self._accepted = self._accepted or results
        return ""

    def variants(self, config: Config) -> list[Variant]:
        """The kernels of a call as the compile gate takes them."""
        found = []
        for step, tensors in self._steps(config)[0]:
            name = step.kernel.fn.__name__.removesuffix("_kernel")
            products = name in ("forward", "backward") and self.key.kind != "float32"
            found.append(
                Variant(
                    kernel=name, fn=step.kernel,
                    **specialize(step.kernel, self.arch, *step.described(tensors), *step.numbers),
                    num_warps=step.warps, num_stages=step.stages, dtype=self.key.kind, head_dim=self.key.width,
                    label=label(config), tensor_cores="mma" if products else False,
                    warp_specialized=name == "forward" and any(tile.specialize for tile in config.tiles),
                )
            )  # fmt: skip
        return found

    def rate(self, seconds: float) -> str:
        """Visible TFLOP/s, or where moving a row's keys and values is all there is to do, GB/s."""
        entries = self.case.layout.visible() * self.key.width * self.case.batch
        if self.key.length == "few":
            moved = 2 * entries * self.case.kv_heads * DTYPES[self.key.kind].itemsize * (2 if self.key.backward else 1)
            return f"{moved / seconds / 1e9:.0f} GB/s"
        return f"{2 * (5 if self.key.backward else 2) * entries * self.case.heads / seconds / 1e12:.0f} TFLOP/s"

    def _steps(self, config: Config) -> tuple[Steps, dict[str, Tensor]]:
        """The operator's launches with a configuration, noted instead of done, and the tensors that they will write."""
        steps: Steps = []
        given: dict[str, Any] = dict(zip(("query", "key", "value"), self._inputs, strict=True))
        given |= {
            "seed": self._seed, "layout": list(self.case.layout.ints), "scale": self.key.width**-0.5,
            "dropout_p": self._dropout, "relative": (),
        }  # fmt: skip
        operator: Callable[..., tuple[Tensor, ...]] = operators.forward
        chooser, names = "forward_config", _RESULTS
        if isinstance(config, Backward):
            operator, chooser, names = operators.backward, "backward_config", _GRADIENTS
            given |= {"grad_out": self._grad, **self._forward}
        arguments = dict.fromkeys(signature(operator).parameters) | given

        def note(step: launch.Launch, *tensors: Any) -> None:
            steps.append((step, tensors))

        with (
            _products(self.key.kind),
            mock.patch.object(launch, chooser, return_value=config),
            mock.patch.object(plans, "_plans", {}),  # which are made for the configuration in the table
            mock.patch.object(launch.Launch, "__call__", note),
        ):
            return steps, dict(zip(names, operator(**arguments), strict=False))

    def _computed(self) -> dict[str, Tensor]:
        """The reference in float64, for the first sample's first key/value head."""
        group = self.case.heads // self.case.kv_heads
        query, key, value = (
            tensor[:1, :heads].double().requires_grad_()
            for tensor, heads in zip(self._inputs, (group, 1, 1), strict=True)
        )
        out, lse = reference_attention(query, key, value, self.case.layout, dropout_p=self._dropout, seed=self._seed)
        if not self.key.backward:
            return {"out": out.detach(), "lse": lse.detach()}
        grads = torch.autograd.grad(out, (query, key, value), self._grad[:1, :group].double())
        return dict(zip(_GRADIENTS, grads, strict=True))


def _error(found: Tensor, true: Tensor) -> float:
    """The largest error of a row, measured by the sum of its size and that of rows on the whole."""
    found, true = found.double(), true.double()
    if found.dim() == 3:  # lse: a row is one number
        found, true = found[..., None], true[..., None]
    size = true.norm(dim=-1)
    return float(((found - true).norm(dim=-1) / (size + size.square().mean().sqrt())).max())


@contextmanager
def _products(kind: str) -> Iterator[None]:
    """What float32 products are made of."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32" if kind == "tf32" else "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before
