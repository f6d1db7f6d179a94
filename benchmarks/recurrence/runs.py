"""The experiments in order of importance: gradients, time, memory against the number of segments, long evaluation."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from benchmarks.measure import Check, interleave, spread
from benchmarks.recurrence.check import Truth, check, truth
from benchmarks.recurrence.contestants import (
    CONTESTANTS,
    Contestant,
    attention_alone,
    forward_alone,
    recomputation_alone,
)
from benchmarks.recurrence.evaluation import Reader, evaluate
from benchmarks.recurrence.memory import weigh
from benchmarks.recurrence.model import Sizes, Subject

__all__ = ["FULL", "QUICK", "Checker", "Plan", "expected_bytes", "run", "time_steps", "weigh_step"]

Record = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """How much is measured. ``seconds`` bounds the whole; what no longer fits is left out, and listed."""

    name: str
    seconds: float
    checked_segments: int  # of the gradients that are compared
    time_segments: int
    timed: tuple[str, ...]
    time_rounds: int
    time_budget: float  # seconds of rounds
    attention_rounds: int  # of what keeping attention saves, a small difference
    attention_budget: float
    memory: tuple[tuple[str, tuple[int, ...]], ...]  # contestants, and numbers of segments
    more_memory: tuple[tuple[str, tuple[int, ...]], ...]  # after the times, as far as there is time
    evaluated: tuple[int, ...]  # numbers of segments
    evaluation_rounds: int
    evaluation_budget: float
    sizes: Sizes = field(default_factory=Sizes)
    reader: Reader = field(default_factory=Reader)


QUICK = Plan(
    "quick",
    seconds=88.0,
    checked_segments=3,
    time_segments=2,
    timed=("loop", "checkpoint_clone", "replay", "replay_attention", "driver"),
    time_rounds=7,
    time_budget=18.0,
    attention_rounds=0,
    attention_budget=0.0,
    memory=(("replay", (4, 32)), ("loop", (4, 32))),
    more_memory=tuple(
        (name, (4, 8))
        for name in ("checkpoint", "driver", "layer", "replay_attention", "checkpoint_clone", "truncated")
    ),
    evaluated=(64, 256),
    evaluation_rounds=5,
    evaluation_budget=7.0,
)  # fmt: skip
FULL = Plan(
    "full",
    seconds=700.0,
    checked_segments=5,
    time_segments=8,
    timed=(
        "loop", "layer", "checkpoint", "checkpoint_clone", "truncated", "replay", "replay_keep4", "replay_attention",
        "driver",
    ),
    time_rounds=15,
    time_budget=170.0,
    attention_rounds=300,
    attention_budget=90.0,
    memory=(("replay", (4, 8, 16, 32, 64)), ("loop", (4, 8, 16, 32, 64)), ("driver", (4, 32, 64))),
    more_memory=(
        *((name, (4, 16, 64)) for name in ("checkpoint_clone", "checkpoint", "layer", "replay_attention")),
        ("replay_keep4", (4, 16, 64)), ("truncated", (4, 16)), ("full", (4, 16)), ("replay_offload", (4, 16)),
    ),
    evaluated=(512, 1024, 4096),
    evaluation_rounds=3,
    evaluation_budget=60.0,
)  # fmt: skip


def _message(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"


# -- gradients ---------------------------------------------------------------------------------------------------------


class Checker:
    """Contestants' gradients against full back-propagation, or truncated where that is what they compute.

    Under autocast they are compared without it too: rounding hides there what a missing piece of a gradient would show.
    """

    def __init__(self, subject: Subject, segments: int, contestants: Mapping[str, Contestant] = CONTESTANTS) -> None:
        self.subjects = [subject] if subject.autocast is None else [subject, subject.without_autocast()]
        self.segments, self.contestants = segments, contestants
        self.found: dict[str, Check] = {}
        self._truths: dict[tuple[int, bool], Truth] = {}

    def __call__(self, name: str) -> Check:
        """Whether the contestant of that name is right; computed once."""
        if name not in self.found:
            results = (self._one(self.contestants[name], i) for i in range(len(self.subjects)))
            errors: dict[str, dict[str, float]] = {}
            for result in results:
                errors |= result.errors
                if not result.ok:
                    break
            self.found[name] = Check(result.ok, result.reason, errors)
        return self.found[name]

    def _one(self, contestant: Contestant, i: int) -> Check:
        subject, key = self.subjects[i], (i, contestant.truncated)
        try:
            if key not in self._truths:
                self._truths[key] = truth(subject, self.segments, truncated=contestant.truncated)
            result = check(contestant, subject, self._truths[key])
        except Exception as error:  # recorded and shown in place of a time: one contestant must not end the run
            return Check(False, f"failed: {_message(error)}")
        return Check(result.ok, result.reason, {f"{what}{', no autocast' * i}": e for what, e in result.errors.items()})

    def records(self) -> list[Record]:
        """What was found, as plain JSON values."""
        return [
            {
                "contestant": name, "label": self.contestants[name].label, "match": found.ok, "errors": found.errors,
                "note": _note(found),
            }
            for name, found in self.found.items()
        ]  # fmt: skip


def _note(checked: Check) -> str:
    return checked.reason if checked.ok or checked.reason.startswith("failed") else f"WRONG: {checked.reason}"


# -- time --------------------------------------------------------------------------------------------------------------


def time_steps(
    subject: Subject,
    checks: Mapping[str, Check],
    segments: int,
    *,
    rounds: int,
    budget: float,
    contestants: Mapping[str, Contestant] = CONTESTANTS,
    synchronize: Callable[[], None] = lambda: None,
    tick: Callable[[], object] = lambda: None,
) -> list[Record]:
    """Records of the contestants that were checked, and of "again" (Replay() a second time: the noise), "forward" (one
    more forward pass without a graph) and "attention" (its attention calls alone), all taking turns.

    A contestant whose gradients are wrong has no time.
    """
    ids = subject.inputs(segments)
    steps: dict[str, Callable[[], object]] = {}

    records: dict[str, Record] = {}

    def guarded(name: str, function: Callable[[], object]) -> Callable[[], object]:
        """One that fails, with more segments than were checked, must not end the run: it is left out from there on."""

        def run() -> None:
            if records[name]["note"]:
                return
            try:
                function()
                synchronize()
            except Exception as error:
                records[name]["note"] = f"failed: {_message(error)}"

        return run

    def one(name: str, contestant: Contestant) -> Callable[[], object]:
        step = contestant.build(subject)

        def run() -> None:
            subject.forget_gradients()
            step(ids)

        return guarded(name, run)

    for name, checked in checks.items():
        contestant = contestants[name]
        records[name] = _time_record(name, contestant.label, segments, checked, _note(checked))
        records[name]["same"] = not contestant.truncated
        if checked.ok:
            steps[name] = one(name, contestant)
    if "replay" in steps:
        records["again"] = _time_record("again", "Replay(), measured again", segments, checks["replay"], "")
        steps["again"] = one("again", contestants["replay"])
    for name, label, function in (
        ("forward", "one forward pass, no graph", forward_alone(subject, ids)),
        ("attention", "attention of one forward pass, alone", attention_alone(subject, segments)),
    ):
        records[name] = _time_record(name, label, segments, None, "")
        steps[name] = guarded(name, function)

    def between() -> None:
        gc.collect(1)  # off within a round; what is new since the last one
        tick()

    seconds = interleave(steps, rounds=rounds, warmup=0.0, budget=budget, tick=between)
    subject.forget_gradients()
    for name, values in seconds.items():
        if records[name]["note"]:
            continue
        records[name]["rounds"] = values
        records[name]["seconds"] = spread(values)
        records[name]["tokens_per_second"] = ids.numel() / records[name]["seconds"]["median"]
    return list(records.values())


def time_recomputation(
    subject: Subject, *, rounds: int, budget: float, tick: Callable[[], object] = lambda: None
) -> list[Record]:
    """Records of one segment run again ("replay"), the same with its attention kept ("replay_attention"), and its
    attention alone ("attention"): in a whole step the difference would drown.
    """
    parts = {
        "replay": ("one segment run again", recomputation_alone(subject, kept=False)),
        "replay_attention": ("one segment run again, attention kept", recomputation_alone(subject, kept=True)),
        "attention": ("attention of one segment, alone", attention_alone(subject, 1)),
    }
    records = {name: _time_record(name, label, 1, None, "") for name, (label, _) in parts.items()}
    steps = {name: step for name, (_, step) in parts.items()}
    for name, values in interleave(steps, rounds=rounds, warmup=0.0, budget=budget, tick=tick).items():
        records[name] |= {"rounds": values, "seconds": spread(values)}
    return list(records.values())


def _time_record(name: str, label: str, segments: int, checked: Check | None, note: str) -> Record:
    return {
        "contestant": name, "label": label, "segments": segments, "same": True, "note": note,
        "match": None if checked is None else checked.ok, "errors": {} if checked is None else checked.errors,
        "rounds": [], "seconds": None, "tokens_per_second": None,
    }  # fmt: skip


# -- memory ------------------------------------------------------------------------------------------------------------


def weigh_step(
    subject: Subject, contestant: Contestant, segments: int, *, room: int | None = None, expected: float = 0.0
) -> Record:
    """The memory of one step, in bytes; where ``expected`` exceeds ``room``, it isn't run and says so.

    On a GPU a step is run before, so that what libraries allocate on their first call isn't counted; a contestant that
    keeps memory between its steps is counted from its first.
    """
    record: Record = {
        "contestant": contestant.name, "label": contestant.label, "segments": segments,
        "same": not contestant.truncated, "note": "", "peak_bytes": None, "gradient_bytes": None,
        "activation_bytes": None, "input_bytes": None,
    }  # fmt: skip
    if room is not None and expected > room:
        record["note"] = f"would need about {expected / 2**30:.0f} GiB"
        return record
    ids = subject.inputs(segments)
    try:
        if subject.device.type != "cpu":
            contestant.build(subject)(ids)
        step = contestant.build(subject)

        def run() -> None:
            for _ in range(2 if contestant.keeps else 1):
                subject.forget_gradients()
                step(ids)

        peak = weigh(run, subject.parameters.values(), subject.device, subject.weight_sizes())
    except torch.OutOfMemoryError:
        record["note"] = "out of memory"
        return record
    except Exception as error:  # recorded and shown: one contestant must not end the run
        record["note"] = f"failed: {_message(error)}"
        return record
    finally:
        subject.forget_gradients()
    return record | {
        "peak_bytes": peak.total, "gradient_bytes": peak.gradients, "activation_bytes": peak.activations,
        "input_bytes": ids.nbytes,
    }  # fmt: skip


def expected_bytes(records: Sequence[Record], name: str, segments: int) -> float:
    """Bytes that a contestant will need, if its memory grows as from its first to its last measurement."""
    found = [(r["segments"], r["peak_bytes"]) for r in records if r["contestant"] == name and r["peak_bytes"]]
    if len(found) < 2:
        return 0.0
    (n, a), (m, b) = found[0], found[-1]
    return float(b + (segments - m) * (b - a) / (m - n)) if m > n else 0.0


# -- all of it ---------------------------------------------------------------------------------------------------------


def _available() -> int | None:
    """Bytes of memory that are free, None where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def _points(memory: Sequence[tuple[str, Sequence[int]]]) -> list[tuple[str, int]]:
    return [(name, segments) for name, numbers in memory for segments in numbers]


def _rounds(records: Sequence[Record]) -> int:
    return max((len(record["rounds"]) for record in records), default=0)


def run(plan: Plan, *, contestants: Mapping[str, Contestant] = CONTESTANTS, progress: bool = True) -> dict[str, Any]:
    """Measure a plan on the CPU: plain JSON values, without the environment."""
    from tqdm import tqdm

    begin = time.perf_counter()
    subject = Subject(plan.sizes)
    results: dict[str, Any] = {
        "plan": plan.name, "device": "cpu", "dtype": "float32", "sizes": asdict(plan.sizes),
        "memory_rows_bytes": plan.sizes.memory_bytes, "reader": asdict(plan.reader),
        "parameter_bytes": sum(p.nbytes for p in subject.parameters.values()),
        "time": [], "attention_time": [], "memory": [], "evaluation": [], "left_out": [],
    }  # fmt: skip
    first, later = (_points(memory) for memory in (plan.memory, plan.more_memory))
    checked = list(dict.fromkeys((*plan.timed, *(name for name, _ in first))))
    checker = Checker(subject, plan.checked_segments, contestants)
    # A round of time costs about as much as a point of memory.
    total = len(checked) + len(first) + plan.time_rounds + plan.attention_rounds + len(later)
    total += len(plan.evaluated) + plan.evaluation_rounds
    with tqdm(total=total, unit="step", disable=not progress, dynamic_ncols=True) as bar:

        def say(what: str) -> None:
            bar.set_description(f"{what:<52}")

        def weigh_points(points: Sequence[tuple[str, int]], until: float) -> None:
            room = _available()
            for name, segments in points:
                what = f"memory of {contestants[name].label}, {segments} segments"
                say(what)
                if time.perf_counter() - begin > until:
                    results["left_out"].append(what)
                elif checker(name).ok:
                    expected = expected_bytes(results["memory"], name, segments)
                    results["memory"].append(
                        weigh_step(subject, contestants[name], segments, room=room and room * 3 // 4, expected=expected)
                    )
                bar.update()

        for name in checked:
            say(f"gradients of {contestants[name].label}")
            checker(name)
            bar.update()
        weigh_points(first, float("inf"))
        say(f"time of a step through {plan.time_segments} segments")
        results["time"] = time_steps(
            subject, {name: checker(name) for name in plan.timed}, plan.time_segments, rounds=plan.time_rounds,
            budget=plan.time_budget, contestants=contestants, tick=bar.update,
        )  # fmt: skip
        bar.update(plan.time_rounds - _rounds(results["time"]))
        if plan.attention_rounds:
            say("time that keeping attention saves")
            results["attention_time"] = time_recomputation(
                subject, rounds=plan.attention_rounds, budget=plan.attention_budget, tick=bar.update
            )
            bar.update(plan.attention_rounds - _rounds(results["attention_time"]))
        weigh_points(later, plan.seconds - 1.5 * plan.evaluation_budget)
        results["checks"] = checker.records()
        say("evaluation of long inputs")
        results["evaluation"] = evaluate(
            plan.reader, plan.evaluated, torch.device("cpu"), rounds=plan.evaluation_rounds,
            budget=plan.evaluation_budget, tick=bar.update,
        )  # fmt: skip
        bar.update(plan.evaluation_rounds - len(results["evaluation"][0]["rounds"]))
    results["took_seconds"] = time.perf_counter() - begin
    return results
