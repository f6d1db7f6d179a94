"""The interleaved experiments: the target, every published case, lengths, memory, the cost of a call."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.cases import LONG, PUBLISHED, TARGET, Case, make_inputs, of_length
from benchmarks.contestants import CONTESTANTS, opponents
from benchmarks.measure import interleave, measure, peak_bytes, repeat, spread
from rmt_kernels import SegmentLayout

__all__ = ["FULL", "QUICK", "Plan", "run"]

BF16, F32, F16 = torch.bfloat16, torch.float32, torch.float16
_LINE = ("ours", "dense", "split", "plain", "naive")
_TINY = Case("tiny", SegmentLayout.causal(8, 0), 1, 1, 1, 16, "the cost of a call: nothing to compute")


@dataclass(frozen=True)
class Plan:
    """How much is measured. ``seconds`` bounds the whole; what no longer fits is left out, and listed."""

    name: str
    seconds: float
    target_budget: float  # seconds of rounds for each dtype and mode; 30 rounds where they fit, at least 10
    published: tuple[torch.dtype, ...]
    published_modes: tuple[bool, ...]  # backward or not
    published_budget: float  # seconds of rounds for each case, dtype and mode
    published_rounds: int
    lengths: tuple[int, ...]
    length_modes: tuple[tuple[torch.dtype, bool], ...]
    length_budget: float
    flex: tuple[torch.dtype, ...]  # FlexAttention's first compilation takes 20 seconds
    check_long: bool  # the reference takes half a minute at 16,384 tokens
    entries: int  # scores checked in each case


QUICK = Plan(
    "quick",
    seconds=105.0,
    target_budget=5.0,
    published=(BF16,),
    published_modes=(True,),
    published_budget=0.3,
    published_rounds=15,
    lengths=(256, 512, 1024, 2048),
    length_modes=((BF16, True),),
    length_budget=1.0,
    flex=(),
    check_long=False,
    entries=2**20,
)
FULL = Plan(
    "full",
    seconds=420.0,
    target_budget=60.0,
    published=(BF16, F32),
    published_modes=(True, False),
    published_budget=1.0,
    published_rounds=30,
    lengths=(256, 512, 1024, 2048, 4096),
    length_modes=((BF16, True), (F32, True)),
    length_budget=3.0,
    flex=(BF16, F32),
    check_long=True,
    entries=2**22,
)

Records = list[dict[str, Any]]


@dataclass(frozen=True)
class _Experiment:
    section: str
    title: str
    run: Callable[[], Records]


def _target(dtype: torch.dtype, backward: bool, plan: Plan) -> Records:
    return measure(
        TARGET, dtype, backward, _LINE, rounds=30, warmup=2.0, budget=plan.target_budget, least=10, twice=True,
        entries=2 * plan.entries,
    )  # fmt: skip


def _published(case: Case, dtype: torch.dtype, backward: bool, plan: Plan) -> Records:
    return measure(
        case, dtype, backward, ("ours", *opponents(case, dtype)), rounds=plan.published_rounds, warmup=0.1,
        budget=plan.published_budget, least=3, entries=plan.entries,
    )  # fmt: skip


def _length(tokens: int, dtype: torch.dtype, backward: bool, plan: Plan) -> Records:
    return measure(
        of_length(tokens), dtype, backward, _LINE, rounds=30, warmup=0.1, budget=plan.length_budget, least=3,
        entries=plan.entries,
    )  # fmt: skip


def _flex(dtype: torch.dtype, plan: Plan) -> Records:
    return measure(
        TARGET, dtype, False, ("ours", "dense", "flex"), rounds=30, warmup=1.0, twice=True, entries=plan.entries
    )


def _long(plan: Plan) -> Records:
    """Peak memory of forward + backward at length 16,384; the full plan also checks and times it."""
    if plan.check_long:
        return measure(LONG, BF16, True, ("ours",), rounds=3, warmup=0.0, entries=1)
    contestant = CONTESTANTS["ours"]
    note = contestant.objection(LONG, BF16, True)
    peak = None
    if note is None:
        inputs = make_inputs(LONG, BF16, requires_grad=True)
        run = contestant.build(LONG, inputs)
        peak = peak_bytes(lambda: torch.autograd.grad(run(), (inputs.query, inputs.key, inputs.value), inputs.grad))
    return [{
        "case": LONG.name, "contestant": "ours", "label": contestant.label, "dtype": "bfloat16",
        "mode": "forward+backward", "peak_bytes": peak, "score_bytes": LONG.score_bytes(BF16), "seconds": None,
        "match": None,
        "note": note or "memory alone: the full run also checks the result and times it",
    }]  # fmt: skip


def _overhead() -> Records:
    """Seconds of one forward call on tiny inputs, ours and SDPA's."""
    times, inputs = 50, make_inputs(_TINY, F32)
    rows: Records = []
    steps = {}
    for name in ("ours", "plain"):
        contestant = CONTESTANTS[name]
        note = contestant.objection(_TINY, F32, False)
        if note is None:
            steps[name] = repeat(contestant.build(_TINY, inputs), times)
        rows.append({"case": "tiny", "contestant": name, "label": contestant.label, "note": note or ""})
    with torch.no_grad():
        seconds = interleave(steps, rounds=60, warmup=0.2, budget=1.0)
    for row in rows:
        taken = seconds.get(row["contestant"])
        row["seconds"] = None if taken is None else spread([value / times for value in taken])
    return rows


def _experiments(plan: Plan) -> list[_Experiment]:
    """In order of importance: a plan that runs out of time loses the last ones."""
    found: list[_Experiment] = []

    def add(section: str, title: str, run: Callable[..., Records], *arguments: Any) -> None:
        found.append(_Experiment(section, title, lambda: run(*arguments)))

    def words(dtype: torch.dtype, backward: bool) -> str:
        return f"{str(dtype).removeprefix('torch.')} {'forward+backward' if backward else 'forward'}"

    for dtype in (BF16, F32):
        for backward in (False, True):
            add("target", f"target {words(dtype, backward)}", _target, dtype, backward, plan)
    add("overhead", "cost of a call", _overhead)
    if not plan.check_long:
        add("long", f"{LONG.name} bfloat16 forward+backward", _long, plan)
    for dtype in plan.published:
        for backward in plan.published_modes:
            for case in PUBLISHED:
                add("published", f"{case.name} {words(dtype, backward)}", _published, case, dtype, backward, plan)
    for dtype in plan.flex:
        add("flex", f"FlexAttention {words(dtype, False)}", _flex, dtype, plan)
    for dtype, backward in plan.length_modes:
        for tokens in plan.lengths:
            title = f"length {tokens} {words(dtype, backward)}"
            add("lengths", title, _length, tokens, dtype, backward, plan)
    if plan.check_long:
        add("long", f"{LONG.name} bfloat16 forward+backward", _long, plan)
    return found


def run(plan: Plan, *, sections: Sequence[str] = (), progress: bool = True) -> dict[str, Any]:
    """Run a plan (or some of its sections) and return its records by section, and the titles of what was left out."""
    from tqdm import tqdm

    experiments = [e for e in _experiments(plan) if not sections or e.section in sections]
    results: dict[str, Any] = {"plan": plan.name, "left_out": []}
    begin = time.perf_counter()
    with tqdm(experiments, unit="experiment", disable=not progress, dynamic_ncols=True) as bar:
        for experiment in bar:
            records = results.setdefault(experiment.section, [])
            if time.perf_counter() - begin > plan.seconds:
                results["left_out"].append(experiment.title)
                continue
            bar.set_description(f"{experiment.title:<46}")
            records += experiment.run()
    results["took_seconds"] = time.perf_counter() - begin
    return results
