"""The benchmark of training through many segments measures what it says: gradients, memory, time, targets, pictures."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import report
from benchmarks.gpu import plots as gpu_plots
from benchmarks.gpu import report as gpu_report
from benchmarks.gpu.cases import FULL as GPU_PLAN
from benchmarks.gpu.device import HostDevice
from benchmarks.gpu.stage import Context, Item
from benchmarks.gpu.stages import STAGES
from benchmarks.measure import Check, spread
from benchmarks.recurrence import __main__ as program
from benchmarks.recurrence import contestants, limits, memory, on_gpu, plots, runs, tables
from benchmarks.recurrence.contestants import CONTESTANTS, Contestant, plain_loss
from benchmarks.recurrence.evaluation import Reader, evaluate
from benchmarks.recurrence.model import Sizes, Subject

SIZES = Sizes(width=24, heads=2, layers=2, vocabulary=40, tokens=20, memory=3)
PLAN = replace(
    runs.FULL, name="tiny", seconds=600.0, sizes=SIZES, reader=Reader(16, 2, 1, 20, 9, 2), time_segments=4,
    time_rounds=3, time_budget=60.0, attention_rounds=9, attention_budget=60.0,
    memory=(("replay", (4, 32)), ("loop", (4, 32))),
    more_memory=tuple(
        (name, (4, 12)) for name in ("driver", "checkpoint", "checkpoint_clone", "replay_attention", "layer")
    ),
    evaluated=(4, 32), evaluation_rounds=2, evaluation_budget=60.0,
)  # fmt: skip
GPU = replace(
    GPU_PLAN, recurrence_width=24, recurrence_heads=2, recurrence_layers=2, recurrence_vocabulary=40,
    recurrence_tokens=20, recurrence_memory=3, recurrence_segments=(4, 32), recurrence_time_segments=4,
    recurrence_rounds=3, recurrence_seconds=0.3, recurrence_reader_width=16, recurrence_reader_tokens=9,
    recurrence_evaluated=(4, 32),
)  # fmt: skip


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    """A real run of everything, on a model so small that its times mean nothing."""
    return runs.run(PLAN, progress=False) | {"environment": {"device": {"cpu": "a CPU", "threads": 1}}}


# -- gradients ---------------------------------------------------------------------------------------------------------


def _contestant(loss: Callable[[Subject, Tensor], Tensor]) -> Contestant:
    def build(subject: Subject) -> contestants.Step:
        def step(ids: Tensor) -> Tensor:
            with subject.precision():
                found = loss(subject, ids)
            found.backward()
            return found.detach()

        return step

    return Contestant("it", "a contestant", build)


def _fault(scale: float = 1.0, cut: int | None = None, forget: str = "") -> Callable[[Subject, Tensor], Tensor]:
    def loss(subject: Subject, ids: Tensor) -> Tensor:
        found = plain_loss(subject, ids, cut=cut)
        if forget:
            subject.parameters[forget].register_hook(torch.zeros_like)
        return found + (scale - 1) * (found - found.detach())

    return loss


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
def test_every_contestant_computes_the_gradients(autocast: torch.dtype | None) -> None:
    checker = runs.Checker(Subject(SIZES, autocast=autocast), 5)
    with pytest.warns(RuntimeWarning, match="runs without CUDA graphs"):
        found = {name: checker(name) for name in CONTESTANTS}
    assert {name: check.reason for name, check in found.items() if not check.ok} == {}
    errors = {error["relative"] for check in found.values() for error in check.errors.values()}
    assert len(errors) > 2
    assert len(found["loop"].errors) == (2 if autocast is None else 4)
    json.dumps(checker.records())


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (_fault(scale=1.001), "gradient of"), (_fault(cut=2), "gradient of"), (_fault(cut=1), "gradient of"),
        (_fault(forget="start"), "gradient of start"), (_fault(scale=float("nan")), "gradient of"),
        (lambda subject, ids: plain_loss(subject, ids[:, :-20]), "gradient of"),
        (lambda subject, ids: plain_loss(subject, ids) + 1, "loss: relative error"),
    ],
    ids=["scaled", "truncated", "detached", "no initial memory", "NaN", "a segment short", "another loss"],
)  # fmt: skip
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
def test_a_wrong_contestant_has_no_time(
    fault: Callable[[Subject, Tensor], Tensor], reason: str, autocast: torch.dtype | None
) -> None:
    subject = Subject(SIZES, autocast=autocast)
    checked = runs.Checker(subject, 5, {"it": _contestant(fault)})("it")
    assert not checked.ok
    assert reason in checked.reason
    records = runs.time_steps(subject, {"it": checked}, 2, rounds=1, budget=0.0, contestants={"it": _contestant(fault)})
    (row,) = [record for record in records if record["contestant"] == "it"]
    assert (row["match"], row["seconds"], row["rounds"]) == (False, None, [])
    assert row["note"].startswith("WRONG: ")
    (said,) = limits.failures({"time": records})
    assert said.startswith("a contestant: WRONG")
    assert "WRONG" in tables.time_table({"time": records}).terminal()


def test_one_that_raises_is_recorded_and_the_others_are_timed() -> None:
    def broken(subject: Subject, ids: Tensor) -> Tensor:
        if ids.shape[1] > 5 * SIZES.tokens:
            raise RuntimeError("no room for so many segments")
        return plain_loss(subject, ids)

    every = {"it": _contestant(broken), "loop": CONTESTANTS["loop"]}
    subject = Subject(SIZES)
    checker = runs.Checker(subject, 5, every)
    checks = {name: checker(name) for name in every}
    records = runs.time_steps(subject, checks, 6, rounds=2, budget=9.0, contestants=every)
    rows = {record["contestant"]: record for record in records}
    assert rows["it"]["note"] == "failed: RuntimeError: no room for so many segments"
    assert rows["it"]["seconds"] is None
    assert len(rows["loop"]["rounds"]) == len(rows["forward"]["rounds"]) == 2
    assert limits.failures({"time": records}) == ["a contestant: failed: RuntimeError: no room for so many segments"]

    fails = {"it": _contestant(lambda subject, ids: 1 / 0)}  # type: ignore[arg-type, return-value]
    assert runs.Checker(subject, 5, fails)("it").reason.startswith("failed: ZeroDivisionError")


def test_truncation_is_compared_with_truncation() -> None:
    """A truncation that truncates nothing is wrong, and so is one that stands for full back-propagation."""
    whole = replace(_contestant(lambda subject, ids: plain_loss(subject, ids)), truncated=True)
    cut = _contestant(lambda subject, ids: plain_loss(subject, ids, cut=contestants.TRUNCATION))
    checker = runs.Checker(Subject(SIZES), 5, {"whole": whole, "cut": cut, "right": replace(cut, truncated=True)})
    assert {name: checker(name).ok for name in ("whole", "cut", "right")} == {
        "whole": False, "cut": False, "right": True
    }  # fmt: skip


def test_a_check_leaves_no_gradients_behind() -> None:
    subject = Subject(SIZES)
    runs.Checker(subject, 3)("replay")
    assert all(parameter.grad is None for parameter in subject.parameters.values())


# -- memory ------------------------------------------------------------------------------------------------------------


def test_peaks_tell_sizes_apart() -> None:
    changes = [100, 7, 30, -100, 7, 7, -30, -7, 50]
    assert memory.peaks(changes, frozenset()) == (137, 137, 0)
    assert memory.peaks(changes, frozenset({7})) == (137, 130, 21)
    assert memory.peaks([], frozenset({7})) == (0, 0, 0)


def test_a_step_is_weighed_without_its_gradients() -> None:
    weight = torch.ones(256, 300, requires_grad=True)  # 300 KiB
    rows = torch.ones(64, 256)

    def step() -> None:
        total = torch.zeros(())
        for _ in range(4):
            total = total + (rows @ weight).sigmoid().sum()  # keeps 75 KiB
        total.backward()

    peak = memory.weigh(step, [weight], torch.device("cpu"), frozenset({weight.nbytes}))
    assert peak.gradients == weight.nbytes
    assert 4 * 75 * 1024 <= peak.activations < 7 * 75 * 1024
    assert peak.total > peak.activations + weight.nbytes / 2
    assert weight.grad is None
    together = memory.weigh(step, [weight], torch.device("cpu"))
    assert together.activations == together.total == peak.total


def test_an_activation_as_large_as_a_weight_is_found_out() -> None:
    weight = torch.ones(64, 64, requires_grad=True)
    with pytest.raises(ValueError, match=r"apart: \d+ bytes have the size of a weight, all weights have 16384"):
        memory.weigh(
            lambda: [torch.ones(64, 64) for _ in range(5)], [weight], torch.device("cpu"), frozenset({weight.nbytes})
        )


@pytest.mark.parametrize(
    ("sizes", "autocast"),
    [(Sizes(layers=1), None), (Sizes(layers=1, vocabulary=50257), torch.bfloat16), (SIZES, None)],
    ids=["CPU", "GPU", "tests"],
)
def test_no_activation_is_as_large_as_a_weight(sizes: Sizes, autocast: torch.dtype | None) -> None:
    subject = Subject(sizes, autocast=autocast)
    matrices = {p.nbytes for name, p in subject.parameters.items() if p.dim() > 1 and name != "start"}
    found = subject.weight_sizes()
    assert matrices <= found
    copies = {m.weight.nbytes // 2 for m in subject.weights.modules() if isinstance(m, torch.nn.Linear)}
    assert copies <= found if autocast else found == matrices


def test_a_gpus_history_becomes_changes() -> None:
    trace: list[dict[str, Any]] = [
        {"action": "free_completed", "addr": 1, "size": 512},  # from before
        {"action": "alloc", "addr": 2, "size": 1000}, {"action": "segment_alloc", "addr": 2, "size": 2**21},
        {"action": "alloc", "addr": 3, "size": 512}, {"action": "free_requested", "addr": 2, "size": 1000},
        {"action": "free_completed", "addr": 2, "size": 1000}, {"action": "alloc", "addr": 2, "size": 1},
    ]  # fmt: skip
    assert memory._changes(trace) == [1000, 512, -1000, 1]


@pytest.mark.parametrize(("requested", "activations"), [(1300, 300), (1400, 600)], ids=["history", "no history"])
def test_a_gpu_is_asked_for_its_history(requested: int, activations: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weight's gradient, of 1,000 bytes, is told apart where the history agrees with what was requested."""
    trace = [
        {"action": "alloc", "addr": 1, "size": 300}, {"action": "alloc", "addr": 2, "size": 1000},
        {"action": "free_completed", "addr": 1, "size": 300},
    ]  # fmt: skip
    stats = {"requested_bytes.all.current": 50, "requested_bytes.all.peak": 50 + requested}
    recording: list[str | None] = []
    for name, value in {
        "synchronize": lambda device: None, "reset_peak_memory_stats": lambda device: None,
        "memory_allocated": lambda device: 64, "max_memory_allocated": lambda device: 64 + 1600,
        "memory_stats": lambda device: stats,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda what, **_: recording.append(what))
    monkeypatch.setattr(torch.cuda.memory, "_snapshot", lambda device: {"device_traces": [[], trace]})
    weight = torch.zeros(250, requires_grad=True)

    def step() -> None:
        weight.grad = torch.zeros(250)

    peak = memory.weigh(step, [weight], torch.device("cuda", 1), frozenset({1000}))
    assert (peak.total, peak.activations, peak.gradients) == (1600, activations, 1000)
    assert recording == ["all", None]


def test_memory_that_would_not_fit_is_not_tried() -> None:
    rows = [
        {"contestant": "loop", "segments": n, "peak_bytes": b} for n, b in ((4, 100), (8, 140), (16, None))
    ]  # fmt: skip
    assert runs.expected_bytes(rows, "loop", 16) == 220.0
    assert runs.expected_bytes(rows, "layer", 16) == runs.expected_bytes(rows[:1], "loop", 16) == 0.0
    row = runs.weigh_step(Subject(SIZES), CONTESTANTS["loop"], 4, room=2**30, expected=3.0 * 2**30)
    assert (row["note"], row["peak_bytes"]) == ("would need about 3 GiB", None)
    assert limits.failures({"memory": [row]}) == []


def test_out_of_memory_is_a_result_and_other_errors_are_failures() -> None:
    def raises(error: Exception) -> dict[str, Any]:
        def loss(subject: Subject, ids: Tensor) -> Tensor:
            raise error

        return runs.weigh_step(Subject(SIZES), _contestant(loss), 4)

    full, broken = raises(torch.OutOfMemoryError("no")), raises(RuntimeError("no such thing"))
    assert full["note"] == "out of memory"
    assert limits.failures({"memory": [full, broken]}) == ["a contestant: failed: RuntimeError: no such thing"]


# -- a real run --------------------------------------------------------------------------------------------------------


def test_a_run_measures_memory_as_theory_has_it(measured: dict[str, Any]) -> None:
    names = ("loop", "replay", "driver", "checkpoint", "checkpoint_clone", "replay_attention", "layer")
    slope = {name: limits.growth(measured, name) or 0.0 for name in names}
    rows = SIZES.memory_bytes
    for name in ("replay", "driver", "checkpoint_clone"):
        assert rows <= slope[name] <= 2 * rows + limits.STATE_BYTES
    # A view of the memory keeps all hidden rows of its segment; kept attention has as many in each layer.
    hidden = (SIZES.tokens + 2 * SIZES.memory) * SIZES.width * 4
    assert slope["checkpoint"] > slope["replay"] + hidden / 2
    assert slope["replay_attention"] > slope["replay"] + SIZES.layers * hidden
    assert SIZES.layers * hidden < slope["layer"] < slope["loop"] / 3
    for record in measured["memory"]:
        assert record["gradient_bytes"] >= measured["parameter_bytes"]
        assert record["activation_bytes"] <= record["peak_bytes"]
        assert record["input_bytes"] == 8 * SIZES.tokens * record["segments"]


def test_a_run_is_complete_and_plain_json(measured: dict[str, Any]) -> None:
    assert limits.failures(measured) == []
    assert measured["left_out"] == []
    assert json.loads(json.dumps(measured)) == measured
    timed = {record["contestant"]: record for record in measured["time"]}
    assert set(timed) == {*PLAN.timed, "again", "forward", "attention"}
    assert all(len(record["rounds"]) == 3 for record in timed.values())
    tokens = 4 * SIZES.tokens
    assert timed["loop"]["tokens_per_second"] == pytest.approx(tokens / timed["loop"]["seconds"]["median"])
    assert timed["attention"]["seconds"]["median"] < timed["forward"]["seconds"]["median"]
    assert {record["contestant"] for record in measured["checks"]} == {*PLAN.timed, *dict(PLAN.more_memory)}
    assert {goal.verdict for goal in limits.goals(measured)} <= {"reached", "missed"}


def test_memory_of_long_inputs_is_constant(measured: dict[str, Any]) -> None:
    few, many = measured["evaluation"]
    assert (few["segments"], many["segments"], many["tokens"]) == (4, 32, 32 * 9)
    assert many["peak_bytes"] == few["peak_bytes"] > 0
    assert many["input_bytes"] == 8 * 32 * 9


def test_the_reader_is_the_papers() -> None:
    reader = Reader()
    model = reader.build(torch.device("cpu"))
    assert (model.layout.name, model.layout.tokens, model.layout.read, model.layout.write) == (
        "rmt_encoder", 502, *((10, 0) if model.layout.read else (0, 10)),
    )  # fmt: skip
    assert (model.segment, model.align, model.training) == (499, "right", False)
    assert 4096 * reader.tokens == 2_043_904
    assert max(runs.FULL.evaluated) == max(GPU_PLAN.recurrence_evaluated) == 4096


def test_a_reader_that_keeps_what_it_read_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    build = Reader.build

    def hoarding(reader: Reader, device: torch.device) -> Any:
        model = build(reader, device)
        kept: list[Tensor] = []
        model.backbone.register_forward_hook(lambda module, given, out: kept.append(out.clone()))
        return model

    monkeypatch.setattr(Reader, "build", hoarding)
    records = evaluate(PLAN.reader, (4, 32), torch.device("cpu"), rounds=1, budget=0.0)
    (goal,) = [goal for goal in limits.goals({"evaluation": records}) if "peak memory between" in goal.what]
    assert goal.verdict == "missed"


def test_a_plan_without_time_lists_what_it_left_out() -> None:
    found = runs.run(replace(PLAN, seconds=-1.0, memory=(), timed=("loop",), attention_rounds=0), progress=False)
    assert len(found["left_out"]) == 10
    assert found["left_out"][0] == "memory of replay_step, 4 segments"
    assert found["memory"] == []
    assert [record["contestant"] for record in found["checks"]] == ["loop"]
    assert "left out, no time left: 10" in tables.summary_lines(found)[-1]


def test_a_wrong_contestant_is_not_weighed() -> None:
    every = {**CONTESTANTS, "replay": replace(_contestant(_fault(cut=1)), name="replay")}
    plan = replace(PLAN, memory=(("replay", (4,)),), more_memory=(), timed=("loop", "replay"), attention_rounds=0)
    found = runs.run(plan, contestants=every, progress=False)
    assert found["memory"] == []
    assert {record["contestant"] for record in found["time"] if record["rounds"]} == {"loop", "forward", "attention"}
    assert limits.failures(found)


@pytest.mark.parametrize("plan", [runs.QUICK, runs.FULL], ids=lambda plan: plan.name)
def test_plans_name_contestants_once(plan: runs.Plan) -> None:
    points = [name for name, _ in (*plan.memory, *plan.more_memory)]
    assert len(set(points)) == len(points)
    assert {*points, *plan.timed} <= set(CONTESTANTS) - {"driver_graphs"}
    assert {"loop", "checkpoint_clone", "replay"} <= set(plan.timed)
    assert plan.sizes == Sizes(width=768, heads=12, layers=2, vocabulary=256, tokens=512, memory=16)
    truncated = plan.checked_segments > contestants.TRUNCATION
    assert truncated  # else truncation is nothing
    assert "replay_keep4" not in {*points, *plan.timed} or plan.checked_segments > 4


# -- targets -----------------------------------------------------------------------------------------------------------

MIB = 2**20
ROWS = 48 * 1024


def _memory(name: str, points: dict[int, float]) -> list[dict[str, Any]]:
    return [
        {
            "contestant": name, "label": CONTESTANTS[name].label, "segments": segments, "same": True, "note": "",
            "peak_bytes": int(size + 60 * MIB), "gradient_bytes": 58 * MIB, "activation_bytes": int(size),
            "input_bytes": segments * 4096,
        }
        for segments, size in points.items()
    ]  # fmt: skip


def _time(name: str, seconds: float, segments: int = 8, rounds: int = 9) -> dict[str, Any]:
    values = [seconds * (1 + 0.001 * i) for i in range(rounds)]
    label = CONTESTANTS[name].label if name in CONTESTANTS else name
    checked = Check(True)
    return runs._time_record(name, label, segments, checked, "") | {
        "rounds": values, "seconds": spread(values), "tokens_per_second": 4096 / seconds
    }  # fmt: skip


def _evaluated(segments: int, peak: float, seconds: float) -> dict[str, Any]:
    return {
        "segments": segments, "tokens": 499 * segments, "peak_bytes": int(peak), "input_bytes": 3992 * segments,
        "rounds": [seconds, 1.3 * seconds], "seconds": spread([seconds, 1.3 * seconds]),
    }  # fmt: skip


def made_up(device: str = "cpu", /, **changed: float) -> dict[str, Any]:
    """A result that reaches every target, or misses the one whose number is ``changed``."""
    number: dict[str, float] = {
        "slope": 53 * 1024, "base": 60 * MIB, "full": 1760 * MIB, "replay": 1.30, "attention": 1.20, "share": 0.12,
        "checkpoint": 1.33, "long_peak": 4.0, "long_seconds": 6.4, "graphs": 0.45,
    } | changed  # fmt: skip
    ours = {n: number["base"] + (n - 4) * number["slope"] for n in (4, 32, 64)}
    seconds = {
        "loop": 1.0, "forward": 0.3, "replay": number["replay"], "replay_attention": number["attention"],
        "attention": number["share"], "checkpoint_clone": number["checkpoint"],
        "checkpoint": number["checkpoint"] + 0.1, "again": number["replay"], "driver": 1.2,
        "driver_graphs": number["graphs"],
    }  # fmt: skip
    return {
        "plan": "full", "device": device, "dtype": "float32", "sizes": copy.copy(Sizes().__dict__),
        "memory_rows_bytes": ROWS, "parameter_bytes": 58 * MIB, "left_out": [], "checks": [],
        "memory": [
            *_memory("loop", {4: 223 * MIB, 32: number["full"], 64: 2 * number["full"]}),
            *_memory("replay", ours), *_memory("driver", ours),
        ],
        "time": [_time(name, value) for name, value in seconds.items()],
        "evaluation": [
            _evaluated(1024, 4 * MIB, 1.6), _evaluated(4096, number["long_peak"] * MIB, number["long_seconds"])
        ],
        "environment": {"device": {"cpu": "a CPU", "threads": 2}},
    }  # fmt: skip


def _verdicts(results: dict[str, Any]) -> dict[str, str]:
    return {goal.what: goal.verdict for goal in limits.goals(results)}


def test_targets_that_are_reached() -> None:
    assert set(_verdicts(made_up()).values()) == {"reached"}
    found = _verdicts(made_up("cuda"))
    assert set(found.values()) == {"reached"}
    assert len(found) == len(_verdicts(made_up())) + 1


@pytest.mark.parametrize(
    ("changed", "missed"),
    [
        ({"slope": 1.1 * ROWS + 8192 + 20}, ["activation memory of one segment more"]),
        ({"full": 1250 * MIB}, ["stretch: full BPTT's peak activations over ours, 32 segments"]),
        (
            {"full": 1000 * MIB},
            ["full BPTT's peak activations over ours, 32 segments",
             "stretch: full BPTT's peak activations over ours, 32 segments"],
        ),
        ({"replay": 1.37, "attention": 1.27, "checkpoint": 1.4},
         ["time of a step over full BPTT's and one more forward pass"]),
        ({"attention": 1.23}, ["share of the recomputed attention that keeping it saves"]),
        ({"share": 0.16}, ["share of the recomputed attention that keeping it saves"]),
        ({"checkpoint": 1.29}, ["time of a step over stock checkpoint per segment's"]),
        ({"long_peak": 4.05}, ["evaluation: difference of peak memory between lengths"]),
        ({"long_seconds": 6.8}, ["evaluation: difference of time from linear"]),
        ({"long_seconds": 6.0}, ["evaluation: difference of time from linear"]),
    ],
)  # fmt: skip
def test_each_target_can_be_missed(changed: dict[str, float], missed: list[str]) -> None:
    found = _verdicts(made_up(**changed))
    assert [what for what, verdict in found.items() if verdict == "missed"] == missed
    assert set(found.values()) == {"reached", "missed"}


def test_the_peak_beyond_what_a_segment_may_cost_is_compared() -> None:
    results = made_up()
    allowed, what = 1.1 * ROWS + 8192, "peak activations at the most segments over those at 4, net of that"
    (last,) = [r for r in results["memory"] if (r["contestant"], r["segments"]) == ("replay", 64)]
    last["activation_bytes"] = int(60 * MIB * 1.02 + 60 * allowed)
    assert limits._net(results, "replay") == pytest.approx(1.02)
    assert _verdicts(results)[what] == "reached"
    last["activation_bytes"] += MIB
    assert _verdicts(results)[what] == "missed"


def test_graphs_are_compared_with_the_fastest_eager_loop() -> None:
    (goal,) = [goal for goal in limits.goals(made_up("cuda", graphs=0.52)) if "CUDA-graph driver" in goal.what]
    assert goal.verdict == "missed"
    assert goal.worst is not None
    assert goal.worst[1] == pytest.approx(1 / 0.52)
    on_gpu_only_wished = [goal.what for goal in limits.goals(made_up("cuda")) if goal.optional]
    assert len(on_gpu_only_wished) == 4


def test_one_segment_by_itself_decides_what_kept_attention_saves() -> None:
    results = made_up(attention=1.25)
    results["attention_time"] = [
        _time("replay", 0.065, 1, 30), _time("replay_attention", 0.0605, 1, 30), _time("attention", 0.006, 1, 30)
    ]  # fmt: skip
    assert limits._attention_saved(results) == pytest.approx(75, rel=0.02)
    few = made_up()
    for record in few["time"]:
        record["rounds"] = record["rounds"][:7]
    assert limits._attention_saved(few) is None


def test_rounds_are_compared_in_pairs() -> None:
    """A machine that is slow for a while is so for all that take turns."""
    results = made_up()
    for record in results["time"]:
        record["rounds"] = [seconds * (3 if i % 2 else 1) for i, seconds in enumerate(record["rounds"])]
    assert limits._over_full(results) == pytest.approx(1.0)
    assert limits._over_checkpoint(results) == pytest.approx(1.30 / 1.33)


def test_nothing_measured_is_nothing_reached() -> None:
    assert set(_verdicts({}).values()) == {"not measured"}
    only = made_up()
    only["memory"] = [record for record in only["memory"] if record["contestant"] != "driver"]
    assert _verdicts(only)["activation memory of one segment more"] == "partly measured"
    table = tables.targets(only)
    assert ["replay_step", "-", "≤ 60.8 KiB", "not measured"] in [row[1:] for row in table.rows]


# -- tables, picture, command ------------------------------------------------------------------------------------------


def test_tables_and_picture_of_a_result(measured: dict[str, Any], tmp_path: Path) -> None:
    for results in (made_up(), measured):
        shown = "\n".join(table.terminal() for table in tables.tables(results))
        for text in ("Replay()", "full BPTT, plain loop", "KiB a segment", "tokens/s", "ms a segment"):
            assert text in shown
        file = tmp_path / "recurrence.png"
        assert plots.save(results, "a CPU", file)
        assert 10_000 < file.stat().st_size < 150_000
    first = file.read_bytes()
    plots.save(measured, "a CPU", file)
    assert file.read_bytes() == first
    wide = made_up()
    wide["memory"] = []
    assert plots.save(wide, "a CPU", file)
    assert not plots.save(wide | {"time": []}, "a CPU", file)
    cells = tables.memory_table(made_up()).rows[0]
    assert list(cells) == ["full BPTT, plain loop", "223", "1,760", "3,520", "56,268.8"]


def test_noise_and_failures_are_said() -> None:
    results = made_up()
    results["memory"][0]["note"] = "failed: ValueError: no"
    assert tables.summary_lines(results) == [
        "noise: Replay() against itself 1.000x", "FAILED full BPTT, plain loop: failed: ValueError: no"
    ]  # fmt: skip


def test_the_command_measures_and_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    plan = replace(
        PLAN, memory=(("replay", (4, 8)), ("loop", (4, 8))), more_memory=(), timed=("loop", "replay"),
        attention_rounds=0, time_rounds=1,
    )  # fmt: skip
    monkeypatch.setattr(program, "QUICK", plan)
    monkeypatch.setattr(program, "RESULTS", tmp_path)
    monkeypatch.setattr(program, "PICTURE", tmp_path / "picture.png")
    assert program.main(["--out", str(tmp_path / "out"), "--save", "kept"]) == 0
    written = json.loads((tmp_path / "out" / "recurrence.json").read_text())
    assert written == json.loads((tmp_path / "kept.json").read_text())
    assert written["environment"]["versions"]["torch"] == torch.__version__
    assert "command" in written["environment"]
    assert (tmp_path / "out" / "recurrence.png").exists()
    assert (tmp_path / "picture.png").exists()
    printed = capsys.readouterr()
    assert "Training through many segments: targets" in printed.out
    assert "step" in printed.err  # the progress bar

    assert program.main(["--render", str(tmp_path / "kept.json"), "--out", str(tmp_path / "again")]) == 0
    assert json.loads((tmp_path / "again" / "recurrence.json").read_text()) == written

    wrong = {**CONTESTANTS, "replay": replace(_contestant(_fault(scale=2.0)), name="replay")}
    monkeypatch.setattr(program, "run", lambda plan: runs.run(plan, contestants=wrong, progress=False))
    assert program.main(["--out", str(tmp_path / "out")]) == 1
    assert "FAILED a contestant: WRONG" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["[]", "{}", "no JSON", '{"memory": [], "time": []}'])
def test_what_is_no_result_is_refused(text: str, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(SystemExit):
        program.main(["--render", str(tmp_path / "x.json"), "--out", str(tmp_path)])
    assert "x.json" in capsys.readouterr().err


def test_the_report_shows_it(measured: dict[str, Any], tmp_path: Path) -> None:
    from benchmarks.environment import environment

    results = {"plan": "quick", "left_out": [], "environment": environment(["-m", "benchmarks"])}
    (tmp_path / "results.json").write_text(json.dumps(results))
    (tmp_path / "recurrence.json").write_text(json.dumps(measured))
    plots.save(measured, "a CPU", tmp_path / "recurrence.png")
    loaded = report.load(tmp_path)
    page = report.render(loaded, tmp_path).read_text()
    assert page.count("data:image/png;base64,") == 1
    assert "Peak activations of a training step" in page
    assert "(recurrence.png)" in (tmp_path / "report.md").read_text()
    assert "Training through many segments: targets" in report.terminal(loaded)


# -- the stage of the GPU run ------------------------------------------------------------------------------------------


def _context(work: Path) -> Context:
    return Context(HostDevice(), GPU, work, time.monotonic() + 300, say=lambda line: None)


def _items() -> dict[str, Item]:
    return {item.key: item for item in STAGES["recurrence"].items(GPU)}


@pytest.mark.filterwarnings("ignore:replay_step runs without CUDA graphs")
def test_the_stage_on_a_stand_in(tmp_path: Path) -> None:
    items = {}
    for key, item in _items().items():
        if not key.startswith("memory: ") or key.removeprefix("memory: ") in (
            "Replay()", "replay_step", "full BPTT, plain loop"
        ):  # fmt: skip
            payload = item.run(_context(tmp_path))
            assert payload["failures"] == [], key
            items[key] = {"status": "done", "attempts": 1, "seconds": 1.0, "error": None, **payload}
    state = {"stage": "recurrence", "planned": list(items), "items": items, "seconds": 9.0, "complete": True}
    results = json.loads(json.dumps({"environment": {}, "stages": {"recurrence": state}}))
    found = on_gpu.collect(results)
    assert found["sizes"]["tokens"] == 20
    timed = {record["contestant"] for record in found["time"] if record["rounds"]}
    assert timed == {*CONTESTANTS, "again", "forward", "attention"}
    assert {goal.verdict for goal in limits.goals(found) if "keeping it" not in goal.what} <= {"reached", "missed"}
    assert items["CUDA graphs with dropout"]["facts"]["float32"]["between seeds"] > 0.01
    page = gpu_report.render(results, tmp_path).read_text()
    for text in ("CUDA-graph driver: tokens/s", "Peak activations of a training step", "Reading long inputs"):
        assert text in page
    assert set(gpu_plots.draw(results, tmp_path)) == {"Training through many segments: memory and time"}


def test_graphs_with_other_gradients_fail_the_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rmt_kernels import replay_step as step

    def other_masks(model: Any, ids: Tensor, *, graphs: Any, **how: Any) -> Any:
        if graphs is not None:
            torch.rand(1)
        return step(model, ids, **how)

    monkeypatch.setattr(on_gpu, "replay_step", other_masks)
    said = _items()["CUDA graphs with dropout"].run(_context(tmp_path))["failures"]
    assert len(said) == 6
    assert "captured: gradients differ from the eager driver's" in said[0]


@pytest.mark.filterwarnings("ignore:replay_step runs without CUDA graphs")
def test_dropout_that_drops_nothing_fails_the_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_gpu, "_DROPOUT", 0.0)
    said = _items()["CUDA graphs with dropout"].run(_context(tmp_path))["failures"]
    assert len(said) == 2
    assert all("is there dropout?" in line for line in said)


def test_the_stage_covers_every_contestant_and_its_sizes_are_gpt2s() -> None:
    keys = list(_items())
    assert [key for key in keys if key.startswith("memory: ")] == [
        f"memory: {contestant.label}" for contestant in CONTESTANTS.values()
    ]
    sizes = on_gpu._sizes(GPU_PLAN)
    assert (sizes.width, sizes.heads, sizes.layers, sizes.vocabulary, sizes.tokens) == (768, 12, 12, 50257, 512)
    assert {4, 32, 64} <= set(GPU_PLAN.recurrence_segments)
