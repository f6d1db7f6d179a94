"""The stages of ``python -m benchmarks.gpu``, in order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.cases import Case
from benchmarks.gpu.about import copy, environment_items
from benchmarks.gpu.cases import Plan, decode_case, filling, short
from benchmarks.gpu.checks import determinism_items, memory_items
from benchmarks.gpu.compare import Record, compare
from benchmarks.gpu.contestants import decoders, entrants
from benchmarks.gpu.programs import build_items, cpu_items, gate_items, lost_modules, tune_items
from benchmarks.gpu.sanitizer import sanitizer_items
from benchmarks.gpu.stage import Context, Item, Payload, Stage
from benchmarks.gpu.suite import suite_items
from benchmarks.huggingface.on_gpu import huggingface_items
from benchmarks.recurrence.on_gpu import recurrence_items

__all__ = ["STAGES"]

_FORWARD = (
    "ours", "cuda", "flex", "split_flash", "split_cudnn", "dense", "dense_cudnn", "naive", "plain_flash", "plain_cudnn"
)  # fmt: skip
_SHORT = ("ours", "cuda", "flex", "split_flash", "split_cudnn", "dense", "plain_flash", "plain_cudnn", "plain")
_SHORT_WIDE = ("ours", "cuda", "split_cudnn", "plain_flash", "plain_cudnn", "plain")


def _payload(records: list[Record], context: Context) -> Payload:
    """Records, and as failures what no contestant may do: be wrong, or, if it is ours, not run."""
    failures = [
        f"{record['label']}, {record['pass']}: {record['note']}"
        for record in records
        if record["kind"] in ("wrong", "failed")
    ]
    for which in dict.fromkeys(record["pass"] for record in records):
        parts = []
        for record in records:
            if record["pass"] == which and record["kernel"]:
                rate = f" ({record['tflops']:.0f})" if record.get("tflops") else ""
                parts.append(f"{record['contestant']} {record['kernel']['median'] * 1e6:.0f}{rate}")
        context.say(f"    {which}, µs (TFLOP/s): {', '.join(parts)}")
    return {"records": records, "failures": failures}


def _compared(case: Case, names: Sequence[str], **how: Any) -> Callable[[Context], Payload]:
    def run(context: Context) -> Payload:
        device, plan = context.gpu(), context.plan
        every = entrants(plan.backend, device.memory(), plan.cuda)
        chosen = {name: every[name] for name in names}
        records = compare(
            device, case, chosen, rounds=plan.rounds, budget=plan.seconds, excluded=context.excluded, at=context.at,
            **how,
        )  # fmt: skip
        return _payload(records, context)

    return run


def _speed(backward: bool, names: Sequence[str] = _FORWARD) -> Callable[[Plan], list[Item]]:
    return lambda plan: [
        Item(case.name, _compared(case, names, backward=backward), limit=120.0, least=15.0) for case in filling(plan)
    ]


def _short(plan: Plan) -> list[Item]:
    items = []
    for backward in (False, True):
        for case in short(plan):
            names = _SHORT if case.head_dim == 64 else _SHORT_WIDE
            run = _compared(case, names, backward=backward, warm=True, calls=0.6)
            items.append(Item(f"{case.name} {'backward' if backward else 'forward'}", run, limit=90.0, least=15.0))
    return items


def _decode(plan: Plan) -> list[Item]:
    def bind(case: Case) -> Callable[[Context], Payload]:
        def run(context: Context) -> Payload:
            device = context.gpu()
            start = torch.full((case.batch,), case.layout.tokens - 1, dtype=torch.int32, device=device.torch)
            records = compare(
                device, case, decoders(plan.backend, start, plan.cuda), rounds=plan.rounds, budget=plan.seconds,
                calls=0.4, beside={"copy": copy(device, plan.copy_bytes // 2)}, excluded=context.excluded,
                at=context.at,
            )  # fmt: skip
            visible = case.layout.visible() * case.batch * case.kv_heads * case.head_dim * 2 * 2
            bandwidth = next(r for r in records if r["contestant"] == "copy")["kernel"]
            for record in records:
                if record["kernel"] and bandwidth:
                    moved = plan.copy_bytes if record["contestant"] == "copy" else visible
                    record["bytes_per_second"] = moved / record["kernel"]["median"]
                    record["copy_share"] = record["bytes_per_second"] * bandwidth["median"] / plan.copy_bytes
            return _payload(records, context)

        return run

    cases = [decode_case(plan, head_dim) for head_dim in plan.head_dims]
    return [Item(case.name, bind(case), limit=90.0, least=15.0) for case in cases]


def _evidence(context: Context) -> Payload:
    """Which kernels each contestant runs, from the profiler; last, for a profiler may disturb what follows it."""
    from benchmarks.cases import make_inputs
    from benchmarks.gpu.compare import _passes
    from benchmarks.gpu.fused import kernel_names, unfused_kernels

    device = context.gpu()
    case = filling(context.plan)[0]
    inputs = make_inputs(case, torch.bfloat16, requires_grad=True, device=device.torch)
    facts: dict[str, Any] = {}
    failures = []
    for name, entrant in entrants(context.plan.backend, device.memory(), context.plan.cuda).items():
        try:
            with entrant.context():
                names = kernel_names(_passes(entrant, case, inputs, True)["forward+backward"])
        except Exception as error:  # what refuses was recorded with its reason where it was timed
            facts[name] = f"{type(error).__name__}: {str(error)[:200]}"
            continue
        facts[name] = [kernel[:120] for kernel in dict.fromkeys(names)]
        unfused = unfused_kernels(names, True) if name == "flex" and names else None
        if unfused:
            failures.append(f"FlexAttention is not the fused kernel: {unfused}")
    return {"facts": facts, "failures": failures}


def _of_backend(suffix: str, backend: Callable[[Plan], str]) -> list[Stage]:
    """What shows that a backend is right. The stages' names end with ``suffix``."""
    return [
        Stage(
            f"suite{suffix}", "the shared test suite", 570, lambda plan: suite_items(backend(plan)), device=False
        ),
        Stage(
            f"determinism{suffix}", "the same bits, repeated and alone", 400,
            lambda plan: determinism_items(backend(plan)),
        ),
        Stage(
            f"memory{suffix}", "memory, graphs, compilation, no waiting", 240, lambda plan: memory_items(backend(plan))
        ),
    ]  # fmt: skip


STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage("environment", "device, versions, ceilings", 120, lambda plan: environment_items()),
        Stage(
            "build", "build the CPU module and the CUDA extension", 560, lambda plan: build_items(), device=False,
            lost=lost_modules,
        ),
        *_of_backend("_cuda", lambda plan: plan.cuda),
        Stage("sanitizer", "compute-sanitizer's tools", 570, lambda plan: sanitizer_items(), device=False),
        *_of_backend("", lambda plan: plan.backend),
        Stage("decode", "one row against many keys", 200, _decode),
        Stage("short", "batch 1", 500, _short),
        Stage("forward", "forward, the chip filled", 560, _speed(False)),
        Stage("backward", "backward, the chip filled", 570, _speed(True)),
        Stage("recurrence", "training through many segments", 480, lambda plan: recurrence_items()),
        Stage(
            "huggingface", "RMT around models of transformers", 570,
            lambda plan: huggingface_items(plan.huggingface_models),
        ),
        Stage("kernels", "which kernels ran", 120, lambda plan: [Item("kernels", _evidence, limit=110.0)]),
        Stage("suite_cpu", "the tests of the CPU module", 420, lambda plan: cpu_items(), device=False),
        Stage("gate", "the compile gate", 570, lambda plan: gate_items(), device=False),
        Stage("tune", "measure other tiles", 570, lambda plan: tune_items(), device=False),
        Stage(
            "suite_slow", "the slow tests", 570, lambda plan: suite_items(plan.backend, ["--slow", "-m", "slow"]),
            device=False,
        ),
    )
}  # fmt: skip
