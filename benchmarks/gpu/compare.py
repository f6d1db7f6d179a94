"""One case, all contestants: each is checked against float64, then those that are right are timed together."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case, Inputs, make_inputs
from benchmarks.contestants import computed_layout
from benchmarks.gpu.contestants import Entrant, RefusalError
from benchmarks.gpu.device import Device
from benchmarks.gpu.stage import At, untold
from benchmarks.gpu.timing import Timed, call_times, kernel_times
from benchmarks.measure import Check, check

__all__ = ["FLOP_FACTORS", "DeviceLostError", "Record", "compare", "sizes"]

Record = dict[str, Any]
FLOP_FACTORS = {"forward": 1.0, "backward": 2.5, "forward+backward": 3.5}
_NAMES = ("out", "grad query", "grad key", "grad value")
_CALL_SECONDS = 20e-3  # of calls that follow one another in a round of call times
_OWN_SECONDS = 60.0  # for a first call of ours, compilation and the check included: one that hangs costs no more


class DeviceLostError(RuntimeError):
    """A contestant left the device unusable for this process; ``contestant`` says which."""

    def __init__(self, contestant: str, error: Exception) -> None:
        super().__init__(f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}")
        self.contestant = contestant


@dataclass
class _Subject:
    """A contestant on one case. ``kind`` is "right", "wrong", "refused" or "failed"; ``note`` says why."""

    entrant: Entrant
    kind: str = "right"
    note: str = ""
    trace: str = ""
    check: Check | None = None
    passes: dict[str, Callable[[], object]] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)


def sizes(case: Case) -> dict[str, int]:
    """The case's sizes, as plain JSON values."""
    layout = case.layout
    return {
        "cache": layout.cache, "read": layout.read, "tokens": layout.tokens, "write": layout.write,
        "queries": layout.num_queries, "keys": layout.num_keys, "batch": case.batch, "heads": case.heads,
        "kv_heads": case.kv_heads, "head_dim": case.head_dim,
    }  # fmt: skip


def _message(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {' '.join(lines[:2])[:400]}"


def _usable(device: Device) -> bool:
    try:
        device.synchronize()
        return bool(torch.ones(8, device=device.torch).sum() == 8)
    except RuntimeError:
        return False


def _passes(entrant: Entrant, case: Case, inputs: Inputs, backward: bool) -> dict[str, Callable[[], object]]:
    run = entrant.build(case, inputs)
    if not backward:
        return {"forward": lambda: (run(),)}
    leaves = (inputs.query, inputs.key, inputs.value)
    out = run()

    def alone() -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, leaves, inputs.grad, retain_graph=True)

    def both() -> tuple[Tensor, ...]:
        made = run()
        return (made, *torch.autograd.grad(made, leaves, inputs.grad))

    return {"backward": alone, "forward+backward": both}


def _prepare(
    device: Device, entrant: Entrant, case: Case, dtype: torch.dtype, inputs: Inputs, backward: bool
) -> _Subject:
    subject = _Subject(entrant)
    reason = entrant.objection(case, dtype, backward)
    if reason is not None:
        subject.kind, subject.note = "failed" if entrant.own else "refused", reason
        return subject
    try:
        with entrant.context():
            passes = _passes(entrant, case, inputs, backward)
            results: Any = passes["forward+backward" if backward else "forward"]()
            device.synchronize()
            found = {name: result.detach() for name, result in zip(_NAMES, results, strict=False)}
            del results
            entries = 2**22 if device.torch.type == "cpu" else 2**24
            # "ours" is held to the strict rule.
            judged = replace(entrant, name="ours") if entrant.own else entrant
            subject.check = check(judged, case, found, dtype, entries)
            del found
            if not subject.check.ok:
                subject.kind, subject.note = "wrong", f"WRONG: {subject.check.reason}"
                return subject
            peak = device.peak_bytes(passes["forward+backward" if backward else "forward"])
            subject.peaks = dict.fromkeys(["forward+backward"] if backward else ["forward"], peak)
            subject.passes = passes
    except RefusalError as error:
        subject.kind, subject.note = "refused", str(error)
    except torch.OutOfMemoryError as error:
        subject.kind, subject.note = "failed" if entrant.own else "refused", _message(error)
    except Exception as error:  # recorded and shown in place of a time: one contestant must not end the run
        subject.kind, subject.note = "failed", f"failed: {_message(error)}"
        subject.trace = traceback.format_exc()[-2500:]
        if not _usable(device):
            raise DeviceLostError(entrant.name, error) from error
    return subject


def _record(subject: _Subject, case: Case, dtype: torch.dtype, which: str) -> Record:
    entrant = subject.entrant
    return {
        "case": case.name, "layout": case.layout.name, "sizes": sizes(case), "memory_rows": case.layout.write,
        "dtype": str(dtype).removeprefix("torch."), "pass": which,
        "contestant": entrant.name, "label": entrant.label, "same": entrant.same(case),
        "kind": subject.kind, "note": subject.note, "trace": subject.trace,
        "match": None if subject.check is None else subject.check.ok,
        "errors": {} if subject.check is None else subject.check.errors,
        "peak_bytes": subject.peaks.get(which), "score_bytes": case.score_bytes(dtype), "facts": dict(entrant.facts),
        "kernel": None, "kernel_warm": None, "calls": None, "tflops": None,
    }  # fmt: skip


def _put(device: Device, rows: Mapping[str, Record], times: Mapping[str, Mapping[str, Any]], into: str) -> None:
    """Put times into the records, or why there are none."""
    for name, found in times.items():
        if "error" not in found:
            rows[name][into] = dict(found)
            continue
        rows[name]["kind"], rows[name]["note"] = "failed", f"failed: {found['error']}"
        if not _usable(device):
            raise DeviceLostError("ours" if name == "again" else name, RuntimeError(found["error"]))


def compare(
    device: Device,
    case: Case,
    entrants: Mapping[str, Entrant],
    *,
    dtype: torch.dtype = torch.bfloat16,
    backward: bool = False,
    rounds: int = 30,
    budget: float = 1.5,
    warm: bool = False,
    calls: float = 0.2,
    beside: Mapping[str, Timed] | None = None,
    excluded: Mapping[str, str] | None = None,
    at: At = untold,
) -> list[Record]:
    """Records of the contestants, one for each of "forward", or "backward" and "forward+backward".

    ``budget`` and ``calls`` are seconds for kernel times and for call times of each pass (0: none); ``warm`` also times
    kernels without flushing the L2 cache. ``beside`` are functions timed in the same rounds, not checked, recorded by
    name alone. ``excluded`` contestants are not run and recorded as failed with the reason given. ``at`` is told whose
    first calls are made, see :class:`~benchmarks.gpu.stage.Context`.

    Raises:
        DeviceLostError: a contestant left the device unusable.
    """
    excluded, beside = excluded or {}, beside or {}
    inputs = make_inputs(case, dtype, requires_grad=backward, device=device.torch)
    subjects = []
    for name, entrant in entrants.items():
        if name in excluded:
            subjects.append(_Subject(entrant, "failed", f"failed: {excluded[name]}"))
            continue
        at(name, _OWN_SECONDS if entrant.own else None)
        subjects.append(_prepare(device, entrant, case, dtype, inputs, backward))
    at("", None)
    records = []
    for which in ("backward", "forward+backward") if backward else ("forward",):
        rows = {subject.entrant.name: _record(subject, case, dtype, which) for subject in subjects}
        timed = {
            subject.entrant.name: Timed(subject.passes[which], subject.entrant.context)
            for subject in subjects
            if which in subject.passes
        }
        twice = {"again": timed["ours"]} if "ours" in timed else {}
        kernels = kernel_times(device, {**timed, **twice, **beside}, rounds=rounds, budget=budget)
        if twice:
            ours = next(subject for subject in subjects if subject.entrant.name == "ours")
            rows["again"] = _record(ours, case, dtype, which) | {
                "contestant": "again", "label": f"{ours.entrant.label}, measured again"
            }  # fmt: skip
        for name in beside:
            rows[name] = {
                "case": case.name, "pass": which, "contestant": name, "label": name, "kind": "beside", "note": "",
                "kernel": None,
            }  # fmt: skip
        _put(device, rows, kernels, "kernel")
        able = {name: function for name, function in timed.items() if rows[name]["kernel"]}
        if warm:
            _put(device, rows, kernel_times(device, able, rounds=rounds, budget=budget, flush=False), "kernel_warm")
        if calls:
            counts = {name: max(5, min(100, int(_CALL_SECONDS / rows[name]["kernel"]["median"]))) for name in able}
            _put(device, rows, call_times(device, able, rounds=7, calls=counts, budget=calls), "calls")
        for name, row in rows.items():
            if name not in beside and row["kernel"]:
                entrant = next(s.entrant for s in subjects if s.entrant.name == ("ours" if name == "again" else name))
                visible = computed_layout(entrant, case).visible()
                flop = 4 * visible * case.head_dim * case.heads * case.batch * FLOP_FACTORS[which]
                row["tflops"] = flop / row["kernel"]["median"] / 1e12
        records += list(rows.values())
        device.release()
    return records
