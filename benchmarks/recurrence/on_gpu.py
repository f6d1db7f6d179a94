"""The stage "recurrence" of ``python -m benchmarks.gpu``: the same measurements on GPT-2 small, and CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.cases import Plan
from benchmarks.gpu.stage import Context, Item, Payload
from benchmarks.recurrence.contestants import CONTESTANTS
from benchmarks.recurrence.evaluation import Reader, evaluate
from benchmarks.recurrence.limits import failures
from benchmarks.recurrence.model import Sizes, Subject
from benchmarks.recurrence.runs import Checker, expected_bytes, time_steps, weigh_step
from rmt_kernels import RecurrentMemory, Replay, replay_step
from rmt_kernels.recurrence import ReplayGraphs

__all__ = ["SECTIONS", "collect", "recurrence_items"]

SECTIONS = ("time", "memory", "evaluation")
_DROPOUT = 0.1
_SAME = {None: 1e-4, torch.bfloat16: 1e-2}  # relative differences of gradients with the same masks, by autocast
_DIFFERENT = 10.0  # times that, at least, between gradients with different masks


def _sizes(plan: Plan) -> Sizes:
    return Sizes(
        plan.recurrence_width, plan.recurrence_heads, plan.recurrence_layers, plan.recurrence_vocabulary,
        plan.recurrence_tokens, plan.recurrence_memory,
    )  # fmt: skip


def _subject(context: Context) -> Subject:
    return Subject(_sizes(context.plan), context.gpu().torch, torch.bfloat16)


def _payload(subject: Subject, section: str, records: list[dict[str, Any]]) -> Payload:
    facts = {
        "sizes": asdict(subject.sizes), "memory_rows_bytes": subject.sizes.memory_bytes,
        "parameter_bytes": sum(p.nbytes for p in subject.parameters.values()),
    }  # fmt: skip
    said = failures({section: records})
    return {"records": [record | {"section": section} for record in records], "facts": facts, "failures": said}


def _time(context: Context) -> Payload:
    """Gradients of every contestant, then the time of those that are right."""
    device, plan, subject = context.gpu(), context.plan, _subject(context)
    checker = Checker(subject, plan.recurrence_checked)
    checks = {name: checker(name) for name in CONTESTANTS}
    del checker
    device.release()
    records = time_steps(
        subject, checks, plan.recurrence_time_segments, rounds=plan.recurrence_rounds,
        budget=min(plan.recurrence_seconds, max(1.0, context.left() / 2)), synchronize=device.synchronize,
    )  # fmt: skip
    for record in records:
        if record["seconds"]:
            rate = "" if record["match"] is None else f", {record['tokens_per_second']:,.0f} tokens/s"
            context.say(f"    {record['label']}: {record['seconds']['median'] * 1e3:.1f} ms{rate}")
    return _payload(subject, "time", records)


def _memory(name: str) -> Callable[[Context], Payload]:
    def run(context: Context) -> Payload:
        device, subject = context.gpu(), _subject(context)
        records: list[dict[str, Any]] = []
        for segments in context.plan.recurrence_segments:
            expected = expected_bytes(records, name, segments)
            records.append(
                weigh_step(subject, CONTESTANTS[name], segments, room=int(0.92 * device.memory()), expected=expected)
            )
            device.release()
        return _payload(subject, "memory", records)

    return run


def _gradients(subject: Subject, model: RecurrentMemory, ids: Tensor, seed: int, graphs: ReplayGraphs | None) -> Tensor:
    """All gradients of one step of the driver, in a row."""
    subject.forget_gradients()
    torch.manual_seed(seed)
    with subject.precision():
        replay_step(model, ids, labels=ids, graphs=graphs)
    found = torch.cat([gradient.flatten() for gradient in subject.gradients().values()])
    subject.forget_gradients()
    return found


def _difference(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def _dropout(context: Context) -> Payload:
    """Gradients of the graph driver equal the eager driver's with dropout and the same seed, captured and replayed."""
    device, plan = context.gpu(), context.plan
    sizes = Sizes(**asdict(_sizes(plan)) | {"dropout": _DROPOUT})
    facts: dict[str, Any] = {}
    said = []
    for autocast, same in _SAME.items():
        subject = Subject(sizes, device.torch, autocast)
        model, graphs = subject.recurrent(Replay()), ReplayGraphs()
        ids = subject.inputs(plan.recurrence_checked)

        first, other = (_gradients(subject, model, ids, seed, None) for seed in (1, 2))
        runs = (("captured", 1, first), ("replayed", 1, first), ("replayed, another seed", 2, other))
        found = {
            what: _difference(_gradients(subject, model, ids, seed, graphs), wanted) for what, seed, wanted in runs
        }
        between = _difference(other, first)
        precision = "float32" if autocast is None else "bf16 autocast"
        facts[precision] = {**found, "between seeds": between, "reasons": list(graphs.reasons)}
        said += [
            f"{precision}, {what}: gradients differ from the eager driver's by {off:.1e}, allowed {same:.0e}"
            for what, off in found.items()
            if not off <= same
        ]
        if not between > _DIFFERENT * same:
            said.append(f"{precision}: another seed changed the gradients by {between:.1e} only: is there dropout?")
        if graphs.reasons and device.torch.type == "cuda":
            said.append(f"{precision}: not captured: {'; '.join(graphs.reasons)}")
        context.say(f"    {precision}: " + ", ".join(f"{what} {off:.1e}" for what, off in found.items()))
    return {"facts": facts, "failures": said}


def _evaluation(context: Context) -> Payload:
    device, plan = context.gpu(), context.plan
    reader = Reader(plan.recurrence_reader_width, tokens=plan.recurrence_reader_tokens)
    records = evaluate(
        reader, plan.recurrence_evaluated, device.torch, rounds=3,
        budget=min(plan.recurrence_seconds, max(1.0, context.left() / 3)), synchronize=device.synchronize,
    )  # fmt: skip
    return {"records": [record | {"section": "evaluation"} for record in records], "failures": []}


def recurrence_items() -> list[Item]:
    """Times first, for they carry the target; then the memory of each contestant."""
    return [
        Item("time", _time, limit=200.0, least=40.0),
        Item("CUDA graphs with dropout", _dropout, limit=90.0, least=15.0),
        *(Item(f"memory: {contestant.label}", _memory(name), limit=75.0) for name, contestant in CONTESTANTS.items()),
        Item("evaluation of long inputs", _evaluation, limit=120.0, least=20.0),
    ]


def collect(results: dict[str, Any]) -> dict[str, Any]:
    """A GPU run's stage "recurrence" in the form of ``runs.run``; empty sections where it has not run."""
    found: dict[str, Any] = {"device": "cuda", "dtype": "bf16 autocast", **{section: [] for section in SECTIONS}}
    for item in results.get("stages", {}).get("recurrence", {}).get("items", {}).values():
        for record in item.get("records", []):
            found[record["section"]].append(record)
        if "sizes" in (item.get("facts") or {}):
            found |= item["facts"]
    return found
