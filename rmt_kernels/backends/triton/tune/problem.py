"""Calls that candidates are compiled for, checked and timed on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rmt_kernels.backends.triton import launch
from rmt_kernels.backends.triton.configs import Tile
from rmt_kernels.backends.triton.resources import Variant, specialize
from rmt_kernels.backends.triton.tune.candidates import DTYPES, Key, Trial
from rmt_kernels.layout import SegmentLayout
from rmt_kernels.reference import reference_attention

__all__ = ["Case", "Problem", "Step", "cases", "run", "small_case"]

_DROPOUT = 0.1


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
    if key.length == "few":
        layout = SegmentLayout.rmt_decoder(8192, 16).decoding()
        return [Case("a row against 8k keys, batch 16", layout, 16, 32, 8)]
    if key.length == "long":
        return [Case("T=2048, batch 8", SegmentLayout.rmt_decoder(2048, 16), 8, heads, heads)]
    layout = SegmentLayout.rmt_decoder(512, 16)
    return [Case("T=512, batch 32", layout, 32, heads, heads), Case("T=512, batch 1", layout, 1, 16, 16)]


def small_case(key: Key) -> Case:
    """What a key is checked on in float64."""
    if key.length == "few":
        return Case("small", SegmentLayout.rmt_decoder(600, 16).decoding(), 2, 4, 1)
    return Case("small", SegmentLayout.rmt_decoder(180, 16), 1, 2, 2)


Step = tuple[launch.Launch, tuple[Any, ...]]


class Problem:
    """A case's inputs, and a configuration's launches on them. On the device "meta" it can be compiled, not run."""

    def __init__(self, key: Key, case: Case, device: torch.device, arch: int) -> None:
        self.key, self.case, self.arch, layout = key, case, arch, case.layout
        generator = None if device.type == "meta" else torch.Generator(device).manual_seed(0)

        def tensor(heads: int, rows: int) -> Tensor:
            size = (case.batch, heads, rows, key.width)
            return torch.randn(size, generator=generator, device=device).to(DTYPES[key.kind])

        self.query, self.grad = (tensor(case.heads, layout.num_queries) for _ in range(2))
        self.key_, self.value = (tensor(case.kv_heads, layout.num_keys) for _ in range(2))
        self.seed = torch.full((1,), 7, dtype=torch.int64, device=device) if key.dropout else None
        self.out = torch.empty_like(self.query)
        self.lse = self.query.new_empty(self.query.shape[:3], dtype=torch.float32)
        self.grads = tuple(map(torch.empty_like, (self.query, self.key_, self.value)))
        self.rows = self.query.new_empty(2 * self.lse.numel(), dtype=torch.float32)
        self.spans = self.query.new_empty(4 * case.batch * layout.num_queries, dtype=torch.int32)
        shape = launch._shape(
            self.query, self.key_, layout.ints, key.width**-0.5, _DROPOUT if key.dropout else 0.0,
            "tf32" if key.kind == "tf32" else "ieee", False, False, False, True,
        )  # fmt: skip
        self.shape = replace(shape, arch=arch)
        self._steps: dict[Trial, list[Step]] = {}
        if key.backward and device.type != "meta":
            present = replace(key, backward=False).present(arch)
            run(self.steps(Trial("whole", present)))
            run(self.steps(Trial("whole", key.present(arch)))[:1])  # what the rows' part of the others reads

    def steps(self, trial: Trial) -> list[Step]:
        """The launches of a trial, in order, with their tensors; made once, for they keep their compiled kernels."""
        if trial not in self._steps:
            self._steps[trial] = self._made(trial)
        return self._steps[trial]

    def _made(self, trial: Trial) -> list[Step]:
        q, k, v, out, config = self.query, self.key_, self.value, self.out, trial.config
        nothing = (None,) * 4  # no padding, no query_start
        if isinstance(config, Tile):
            main, combine, chunks = launch.forward_launches(self.shape, _strides(q, k, v, k, v, out), config)
            parts = q.new_empty(self.lse.numel() * chunks * (self.key.width + 2), dtype=torch.float32)
            given = (q, k, v, k, v, out, self.lse, parts if combine else None, *nothing, self.seed)
            return [(main, given), *([(combine, (parts, out, self.lse))] if combine else [])]
        dq, dk, dv = self.grads
        strides = _strides(q, k, v, k, v, self.grad, dq, dk, dv, dk, dv)
        prepare, kernels = launch.backward_launches(self.shape, strides, _strides(out, self.grad), config)
        tensors = (
            q, k, v, k, v, self.grad, self.rows, self.spans, dq, dk, dv, dk, dv, *nothing, self.seed, q, self.grad, k, v
        )  # fmt: skip
        steps: list[Step] = [(part, tensors) for part in kernels]
        if trial.part != "whole":
            return steps[:1] if trial.part == "keys" else steps[1:]
        assert prepare is not None
        return [(prepare, (out, self.grad, self.lse, None, self.rows, self.spans, *nothing)), *steps]

    def results(self, trial: Trial) -> dict[str, Tensor]:
        """What a trial computes, from memory filled with NaN."""
        if isinstance(trial.config, Tile):
            found = {"out": self.out, "lse": self.lse}
        else:
            found = dict(zip(("grad query", "grad key", "grad value"), self.grads, strict=True))
            if trial.part != "whole":
                found = {name: found[name] for name in found if (name == "grad query") == (trial.part == "queries")}
        for tensor in found.values():
            tensor.fill_(float("nan"))
        run(self.steps(trial))
        return {name: tensor.clone() for name, tensor in found.items()}

    def exact(self) -> dict[str, Tensor]:
        """What the reference gives in float64."""
        q, k, v = (tensor.double().requires_grad_() for tensor in (self.query, self.key_, self.value))
        dropout = self.shape.dropout_p
        out, lse = reference_attention(q, k, v, self.case.layout, dropout_p=dropout, seed=self.seed)
        if not self.key.backward:
            return {"out": out.detach(), "lse": lse.detach()}
        grads = torch.autograd.grad(out, (q, k, v), self.grad.double())
        return dict(zip(("grad query", "grad key", "grad value"), grads, strict=True))

    def variants(self, trial: Trial) -> list[Variant]:
        """The trial's kernels as the compile gate takes them."""
        tiles = trial.config.tiles
        return [
            Variant(
                step.kernel.fn.__name__, step.kernel,
                **specialize(step.kernel, self.arch, *step.described(tensors), *step.numbers), num_warps=step.warps,
                num_stages=step.stages, dtype=self.key.kind, head_dim=self.key.width, label=trial.label,
                tensor_cores=False, warp_specialized=step.warps > 1 and any(tile.specialize for tile in tiles),
            )
            for step, tensors in self.steps(trial)
        ]  # fmt: skip

    def rate(self, trial: Trial, seconds: float) -> str:
        """Visible TFLOP/s, or where reading keys is all there is to do, GB/s."""
        shape = self.shape
        if self.key.length == "few":
            read = 2 * shape.keys * shape.head_dim * shape.dtype.itemsize * shape.batch * shape.kv_heads
            return f"{read / seconds / 1e9:.0f} GB/s"
        products = 2 if not self.key.backward else {"whole": 5, "keys": 4, "queries": 3}[trial.part]
        work = 2 * products * self.case.layout.visible() * shape.head_dim * shape.batch * shape.heads
        return f"{work / seconds / 1e12:.0f} TFLOP/s"


def run(steps: Iterable[Step]) -> None:
    """Launch them in order."""
    for step, tensors in steps:
        step(*tensors)


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(number for tensor in tensors for number in tensor.stride()[:3])
