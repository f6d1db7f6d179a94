"""Who is compared on a GPU, each in its best stock form. Masks and block masks are built before the clock starts."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import contestants as stock
from benchmarks.cases import Case, Inputs
from benchmarks.contestants import CONTESTANTS, Contestant
from benchmarks.gpu.fused import generated_code, unfused_code
from rmt_kernels import SegmentLayout, attention, segment_attention

__all__ = ["Entrant", "RefusalError", "decoders", "entrants", "sdpa_choice"]

Run = Callable[[], Tensor]
_CUDNN, _FLASH = SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION
_MEMORY_SHARE = 24  # naive attention holds several matrices of scores; one may take this part of the memory


class RefusalError(RuntimeError):
    """A contestant that cannot compute the case, or is not what it is meant to be; not a failure of the run."""


@dataclass(frozen=True)
class Entrant(Contestant):
    """A contestant, and the context inside which it must be called. ``facts`` is filled by ``build``: seconds spent on
    masks and compilation, which kernels SDPA chose. ``own``: it is ours, may not refuse, and has to be as exact."""

    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    own: bool = False
    facts: dict[str, Any] = field(default_factory=dict, compare=False)


def _able(case: Case, dtype: torch.dtype, backward: bool) -> str | None:
    return None


def _only(backend: SDPBackend) -> Callable[[], AbstractContextManager[Any]]:
    return lambda: sdpa_kernel(backend)


def sdpa_choice(inputs: Inputs, **how: Any) -> str:
    """Which of SDPA's backends serves these inputs."""
    try:
        choice = torch._fused_sdp_choice(inputs.query, inputs.key, inputs.value, **how)
        return str(SDPBackend(choice)).rpartition(".")[2].lower()
    except Exception as error:  # a private function, asked only in order to report its answer
        return f"unknown ({type(error).__name__})"


def refusing(run: Run) -> Run:
    """``run``, called once here: where SDPA has no kernel, a :class:`RefusalError` with the reasons that it gives."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            run()
        except RuntimeError as error:
            if "No available kernel" not in str(error) and "No viable backend" not in str(error):
                raise
            reasons = [str(warning.message).split("(Triggered")[0].strip() for warning in caught]
            raise RefusalError("; ".join(dict.fromkeys(reasons))[:400] or str(error)[:200]) from error
    return run


# -- ours --------------------------------------------------------------------------------------------------------------


_NAMES = {"triton": "Triton", "cuda": "CUDA"}


def _ours(name: str, backend: str, **options: Any) -> Entrant:
    def build(case: Case, inputs: Inputs) -> Run:
        return lambda: segment_attention(
            inputs.query, inputs.key, inputs.value, case.layout, backend=backend, **options
        )

    def objection(case: Case, dtype: torch.dtype, backward: bool) -> str | None:
        if backend not in ("auto", *attention._BACKENDS):
            return f"there is no backend {backend!r}"
        missing: str = getattr(attention._BACKENDS.get(backend), "why_missing", "")
        return missing or None

    return Entrant(name, f"rmt_kernels, {_NAMES.get(backend, backend)}", build, objection, own=True)


# -- stock PyTorch -----------------------------------------------------------------------------------------------------


def _naive(memory: int) -> Entrant:
    def objection(case: Case, dtype: torch.dtype, backward: bool) -> str | None:
        size = case.score_bytes(dtype)
        return None if size * _MEMORY_SHARE <= memory else f"one matrix of scores would take {size / 2**30:.1f} GiB"

    return Entrant("naive", "naive PyTorch", stock._build_naive, objection)


def _dense(name: str, label: str, context: Callable[[], AbstractContextManager[Any]] = nullcontext) -> Entrant:
    facts: dict[str, Any] = {}

    def build(case: Case, inputs: Inputs) -> Run:
        run = refusing(stock._build_dense(case, inputs))
        bias = stock._bias(case, inputs)
        facts["sdpa"] = sdpa_choice(inputs, attn_mask=bias, enable_gqa=case.heads != case.kv_heads)
        return run

    return Entrant(name, label, build, _able, context, facts=facts)


def _split(backend: SDPBackend, name: str, label: str) -> Entrant:
    def build(case: Case, inputs: Inputs) -> Run:
        return refusing(stock._build_split(case, inputs))

    return Entrant(name, label, build, CONTESTANTS["split"].objection, _only(backend))


def _plain(name: str, label: str, context: Callable[[], AbstractContextManager[Any]] = nullcontext) -> Entrant:
    facts: dict[str, Any] = {}

    def build(case: Case, inputs: Inputs) -> Run:
        run = refusing(stock._build_plain(case, inputs))
        causal, grouped = stock.plain_form(case.layout) != "full", case.heads != case.kv_heads
        facts["sdpa"] = sdpa_choice(inputs, is_causal=causal, enable_gqa=grouped)
        return run

    return Entrant(name, label, build, CONTESTANTS["plain"].objection, context, facts=facts)


# -- FlexAttention -----------------------------------------------------------------------------------------------------


def closed_form(layout: SegmentLayout) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """A mask_mod from the layout's integers: arithmetic only, no matrix is read."""
    forms, skip = [form for form in layout.forms if form.rows], layout.skip

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        q, first = q + skip, 0
        found = None
        for form in forms:
            p = q - first
            seen = (k >= form.lo) & (k < form.hi + form.step * p) if form.step else (k >= form.lo) & (k < form.hi)
            found = seen if found is None else torch.where(q < first, found, seen)
            first += form.rows
        assert found is not None
        return found

    return visible


def _flex_objection(case: Case, dtype: torch.dtype, backward: bool) -> str | None:
    layout = case.layout
    if layout.window is not None or any(form.own >= 0 for form in layout.forms if form.rows):
        return "the mask function here states layouts without a window and SELF rules"
    return None


def _flex() -> Entrant:
    facts: dict[str, Any] = {}

    def build(case: Case, inputs: Inputs) -> Run:
        from torch._functorch import config
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        config.donated_buffer = False  # else its backward cannot be called twice, as timing it alone must
        layout, device = case.layout, inputs.query.device

        def blocks() -> Any:
            return create_block_mask(
                closed_form(layout), None, None, layout.num_queries, layout.num_keys, device=str(device)
            )

        def waited() -> float:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            return time.perf_counter()

        mask = blocks()
        begin = waited()
        mask = blocks()
        facts["mask_seconds"] = waited() - begin
        torch._dynamo.reset()  # past its limit of recompilations torch.compile would fall back to the unfused form
        compiled: Any = torch.compile(flex_attention, dynamic=False, fullgraph=True)
        grouped = case.heads != case.kv_heads

        def run() -> Tensor:
            result: Tensor = compiled(inputs.query, inputs.key, inputs.value, block_mask=mask, enable_gqa=grouped)
            return result

        with generated_code() as sources:
            begin = waited()
            out = run()
            backward = out.requires_grad
            if backward:
                torch.autograd.grad(out, (inputs.query, inputs.key, inputs.value), inputs.grad)
            facts["compile_seconds"] = waited() - begin
        unfused = unfused_code(sources, backward)
        facts["fused"] = unfused is None
        if unfused is not None:
            raise RefusalError(f"not the fused kernel: {unfused}")
        return run

    return Entrant("flex", "FlexAttention", build, _flex_objection, facts=facts)


# -- decoding ----------------------------------------------------------------------------------------------------------


def _grouped(query: Tensor, kv_heads: int) -> Tensor:
    """(batch, kv_heads, group, head_dim): the heads of a group as rows of one head; no grouped-query support needed."""
    return query.reshape(query.shape[0], kv_heads, -1, query.shape[-1])


def _folded(name: str, label: str, backend: SDPBackend | None, masked: bool) -> Entrant:
    """SDPA on one row: all of K and V under a mask, or the visible rows of K and V without one."""

    def build(case: Case, inputs: Inputs) -> Run:
        query, shape = _grouped(inputs.query, case.kv_heads), inputs.query.shape
        (lo, hi), key, value = case.layout.intervals()[0].tolist(), inputs.key, inputs.value
        bias = stock._bias(case, inputs) if masked else None
        if not masked:
            key, value = key[:, :, lo:hi], value[:, :, lo:hi]
        return refusing(lambda: F.scaled_dot_product_attention(query, key, value, attn_mask=bias).reshape(shape))

    return Entrant(name, label, build, _able, nullcontext if backend is None else _only(backend))


def decoders(backend: str, query_start: Tensor, cuda: str = "cuda") -> dict[str, Entrant]:
    """Contestants of a decoding step with one query row, by name; ``query_start`` is ours to read."""
    every = (
        _ours("ours", backend, query_start=query_start),
        _ours("cuda", cuda, query_start=query_start),
        _folded("dense", "SDPA, dense mask", None, True),
        _folded("sliced_flash", "SDPA on K and V cut, flash", _FLASH, False),
        _folded("sliced_cudnn", "SDPA on K and V cut, cuDNN", _CUDNN, False),
        _flex(),
    )
    return {entrant.name: entrant for entrant in every}


def entrants(backend: str, memory: int, cuda: str = "cuda") -> dict[str, Entrant]:
    """All contestants by name; ``memory`` is the device's, in bytes."""
    every = (
        _ours("ours", backend),
        _ours("cuda", cuda),
        _flex(),
        _split(_FLASH, "split_flash", "three-call split, flash"),
        _split(_CUDNN, "split_cudnn", "three-call split, cuDNN"),
        _dense("dense", "SDPA, dense mask"),
        _dense("dense_cudnn", "SDPA, dense mask, cuDNN", _only(_CUDNN)),
        _naive(memory),
        _plain("plain_flash", "plain causal SDPA, flash", _only(_FLASH)),
        _plain("plain_cudnn", "plain causal SDPA, cuDNN", _only(_CUDNN)),
        _plain("plain", "plain causal SDPA, default"),
    )
    return {entrant.name: entrant for entrant in every}
