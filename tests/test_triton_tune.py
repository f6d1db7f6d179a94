"""The re-tuning command: which keys and candidates it takes, what may win, what a run survives, what it prints."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from rmt_kernels import SegmentLayout
from rmt_kernels.backends import plans
from rmt_kernels.backends.triton import configs, gate, launch, operators
from rmt_kernels.backends.triton.configs import CALLS, KINDS, LENGTHS, WIDTHS, Backward, Row, Tile, padded_width
from rmt_kernels.backends.triton.resources import Resources, Variant
from rmt_kernels.backends.triton.tune import __main__ as program
from rmt_kernels.backends.triton.tune import problem
from rmt_kernels.backends.triton.tune import tuner as tuning
from rmt_kernels.backends.triton.tune.candidates import KEYS, Config, Key, candidates, label, selected
from rmt_kernels.backends.triton.tune.problem import Case, Problem, cases
from rmt_kernels.backends.triton.tune.report import printed
from rmt_kernels.backends.triton.tune.timer import GraphTimer
from rmt_kernels.backends.triton.tune.tuner import DeviceLostError, Tuner
from tests.interpreter import INTERPRETED

if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
TINY = Case("tiny", SegmentLayout.rmt_decoder(20, 2), 2, 2, 1)
FORWARD, BACKWARD = Key("float32", 64, "short", False, "plain"), Key("float32", 64, "short", True, "plain")
PRESENT = Tile(64, 64, 4, 2)
A, B, C = Tile(64, 64, 8, 2), Tile(64, 64, 4, 3), Tile(64, 128, 4, 2)
IMPOSSIBLE = Tile(48, 32, 4, 2)  # sizes must be powers of two
gpu = pytest.mark.skipif(INTERPRETED, reason="needs a GPU")


@dataclass
class Times:
    """A timer that is told the seconds of each configuration, and notes what it was asked for."""

    of: Callable[[str], float]
    asked: list[list[str]] = field(default_factory=list)

    def __call__(
        self, functions: Mapping[str, Callable[[], object]], rounds: int, deadline: float
    ) -> dict[str, list[float]]:
        self.asked.append(list(functions))
        return {name: [self.of(name)] * rounds for name in functions}


def told(seconds: Mapping[Config, float]) -> Times:
    return Times({label(config): value for config, value in seconds.items()}.__getitem__)


def tuner(times: Callable[..., dict[str, list[float]]], arch: int = 0, **options: Any) -> Tuner:
    return Tuner("a chip", DEVICE, arch, times, cases=lambda key: [TINY], **options)


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Say which candidates there are."""

    def say(*given: Config) -> None:
        monkeypatch.setattr(tuning, "candidates", lambda key, arch, specialized: list(given))

    return say


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take every result for right, which saves the interpreter's time."""
    monkeypatch.setattr(Problem, "wrong", lambda problem, config: "")


@pytest.fixture
def damaged(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make a configuration compute one row wrongly, of the first sample and head or of the last."""
    steps = Problem._steps

    def say(bad: Config, sample: int = -1) -> None:
        def wrong_steps(problem: Problem, config: Config) -> Any:
            found, results = steps(problem, config)
            if config == bad:
                row = next(iter(results.values()))[sample, sample, -1]
                found.append((lambda *_: row.mul_(1.5), ()))  # type: ignore[arg-type]
            return found, results

        monkeypatch.setattr(Problem, "_steps", wrong_steps)

    return say


def entry(record: Mapping[str, Any], config: Config) -> dict[str, Any]:
    (found,) = (each for each in record["candidates"] if each["label"] == label(config))
    return dict(found)


def row_of(record: Mapping[str, Any]) -> Row:
    (row,) = eval(f"({record['row']})", {"Row": Row, "Tile": Tile, "Backward": Backward})
    assert isinstance(row, Row)
    return row


# -- keys and candidates -----------------------------------------------------------------------------------------------


def test_patterns_name_keys_by_their_fields() -> None:
    assert [key.name for key in selected(["half:64:long"])] == [
        "half:64:long:forward:plain", "half:64:long:backward:plain", "half:64:long:forward:extras",
        "half:64:long:backward:extras", "half:64:long:forward:gaps", "half:64:long:backward:gaps",
    ]  # fmt: skip
    wanted = [key for key in KEYS if key.kind == "tf32" and not key.backward]
    assert selected(["tf32:*:*:forward"]) == wanted
    assert selected(["tf32:*:*:f*", "tf32:*:*:forward:plain"]) == wanted
    assert selected(["*"]) == list(KEYS)
    assert selected(["*:256:few:backward:gaps", "half:*"])[0].kind == "half"


@pytest.mark.parametrize("pattern", ["quarter", "half:6", "half:64:long:forward:plain:more", ""])
def test_a_pattern_that_names_no_key_is_refused(pattern: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=f"'{pattern}' names no key; a key is, for example, half:64:long"):
        selected(["half", pattern])
    with pytest.raises(SystemExit) as ended:
        program.main(["--list", "--only", "half", pattern])
    assert ended.value.code == 2
    assert f"--only '{pattern}' names no key" in capsys.readouterr().err


@pytest.mark.parametrize("arch", [80, 90, 100, 120])
def test_candidates_are_distinct_and_begin_with_what_the_table_has(arch: int) -> None:
    for key in KEYS:
        found = candidates(key, arch)
        choose = configs.backward_config if key.backward else configs.forward_config
        assert found[0] == choose(arch, key.width, key.kind, key.length, key.calls)
        assert len({label(config) for config in found}) == len(found)
        assert len(found) >= 8, key.name
        assert all(isinstance(config, Backward) == key.backward for config in found)
        assert any(config.descriptors for config in found) == (arch >= 90 and key.length != "few")
        assert not any(tile.specialize for config in found[1:] for tile in config.tiles)


def test_specialized_warps_are_tried_where_asked_for_and_possible() -> None:
    def some(key: Key, arch: int) -> bool:
        return any(tile.specialize for config in candidates(key, arch, specialized=True)[1:] for tile in config.tiles)

    (key,) = selected(["half:128:long:forward:plain"])
    assert some(key, 90)
    assert not some(key, 80)
    assert not some(replace(key, length="few"), 90)


def test_list_prints_the_candidates_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["--list", "80", "--only", "half:64:few:forward", "half:64:short:backward:plain"]) == 0
    expected = []
    for key in selected(["half:64:few:forward", "half:64:short:backward:plain"]):
        found = candidates(key, 80)
        expected += [f"{key.name}: {len(found)} candidates, the present one first"]
        expected += [f"  {label(config)}" for config in found]
    assert capsys.readouterr().out.splitlines() == expected
    assert len(expected) > 50


# -- wrong calls -------------------------------------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        program.main(arguments)
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_no_gpu_is_status_2(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no GPU that torch can use; --list prints the candidates without one" in refused(capsys)


def test_a_gpu_that_cannot_be_measured_is_status_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    old = SimpleNamespace(name="old chip", major=7, minor=5)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: old)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "TRITON_INTERPRET is set" in refused(capsys)
    monkeypatch.delenv("TRITON_INTERPRET")
    assert "old chip is of compute capability 7.5, the kernels need 8.0" in refused(capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--jobs", "0"], "--jobs and --seconds must be positive, got 0 and"),
        (["--seconds", "-1"], "must be positive"),
        (["--seconds", "nan"], "must be positive"),
        (["--list", "75"], "at least 80, got 75"),
    ],
)
def test_wrong_options_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refused(capsys, *arguments)


# -- problems ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    ("kind", "length", "call"),
    [
        ("tf32", "short", "plain"),
        ("float32", "few", "plain"),
        ("float32", "short", "extras"),
        ("tf32", "short", "gaps"),
    ],
)
def test_present_configurations_are_right(kind: str, length: str, call: str, backward: bool) -> None:
    layout = SegmentLayout.rmt_decoder(520 if length == "few" else 20, 2, window=12 if call == "gaps" else None)
    case = replace(TINY, layout=layout.decoding() if length == "few" else layout)
    problem = Problem(Key(kind, 64, length, backward, call), case, DEVICE, 0)
    assert problem.wrong(problem.key.row(0).config) == ""


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("length", LENGTHS)
def test_calls_are_of_the_kind_that_their_key_says(length: str, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    launches = launch.forward_launches

    def watched(shape: launch.Shape, strides: plans.Strides) -> Any:
        seen.append((shape.kind, padded_width(shape.head_dim), configs.length(shape.rows), shape.calls))
        return launches(shape, strides)

    key = Key("tf32", 128, length, False, call)
    for case in cases(key):
        monkeypatch.setattr(operators, "forward_launches", watched)
        small = replace(case, batch=1, heads=case.heads // case.kv_heads, kv_heads=1)
        Problem(key, small, DEVICE, 0)._steps(PRESENT)
    assert set(seen) == {("tf32", 128, length, call)}
    assert len(seen) == (2 if length == "short" else 1)


def test_the_configuration_asked_for_is_run_and_the_table_left_as_it_is() -> None:
    matmul = torch.backends.cuda.matmul
    before, kept, call = matmul.fp32_precision, dict(plans._plans), launch.Launch.__call__
    matmul.fp32_precision = "ieee"
    try:
        problem = Problem(replace(FORWARD, kind="tf32"), TINY, DEVICE, 0)
        for tile in (Tile(16, 32, 2, 3), Tile(32, 16, 4, 2)):
            (step, tensors), *rest = problem._steps(tile)[0]
            assert not rest
            assert (step.warps, step.stages) == (tile.warps, tile.stages)
            assert step.grid[0] == TINY.batch * TINY.kv_heads * -(-TINY.layout.num_queries * 2 // tile.rows)
            assert "tf32" in step.numbers
            assert all(any(tensor is given for given in tensors) for tensor in problem._inputs)
        assert matmul.fp32_precision == "ieee"
    finally:
        matmul.fp32_precision = before
    assert (plans._plans, launch.Launch.__call__) == (kept, call)
    assert launch.forward_config is configs.forward_config  # type: ignore[attr-defined]


def test_rates() -> None:
    forward, backward = Problem(FORWARD, TINY, DEVICE, 0), Problem(BACKWARD, TINY, DEVICE, 0)
    work = 2 * TINY.layout.visible() * 64 * TINY.batch * TINY.heads  # of one product
    assert forward.rate(2 * work / 7e12) == "7 TFLOP/s"
    assert backward.rate(5 * work / 9e12) == "9 TFLOP/s"
    row = replace(TINY, layout=TINY.layout.decoding())
    read = 2 * TINY.batch * TINY.kv_heads * (TINY.layout.num_keys - 2) * 64 * 4  # all but WRITE's keys
    assert Problem(replace(FORWARD, length="few"), row, DEVICE, 0).rate(read / 3e9) == "3 GB/s"


# -- what wins ---------------------------------------------------------------------------------------------------------


def test_the_fastest_wins(tried: Callable[..., None]) -> None:
    tried(PRESENT, A, B, C)
    record = tuner(told({PRESENT: 4e-5, A: 3e-5, B: 2e-5, C: 5e-5})).tune(FORWARD, deadline=float("inf"))
    row = row_of(record)
    assert row == Row(0, 64, "float32", "short", B, row.reason, "plain")
    rate = Problem(FORWARD, TINY, DEVICE, 0).rate
    assert row.reason == (
        f"a chip, tiny: 20.0 µs ({rate(2e-5)}); next {label(A)}: 30.0 µs ({rate(3e-5)}); "
        f"before, {label(PRESENT)}: 40.0 µs ({rate(4e-5)})"
    )
    assert record["complete"]
    assert "failed" not in record
    assert [each["label"] for each in record["candidates"]] == [label(config) for config in (B, A, PRESENT, C)]
    assert entry(record, B)["seconds"] == [2e-5]
    assert entry(record, B)["final"]


@pytest.mark.parametrize(("gain", "wins"), [(0.005, False), (0.02, True)])
def test_the_present_configuration_stays_unless_another_gains_enough(
    tried: Callable[..., None], gain: float, wins: bool
) -> None:
    tried(PRESENT, A)
    record = tuner(told({PRESENT: 1e-5, A: 1e-5 * (1 - gain)})).tune(FORWARD, float("inf"))
    assert row_of(record).config == (A if wins else PRESENT)


def test_cases_weigh_alike(tried: Callable[..., None]) -> None:
    tried(PRESENT, A)
    seconds: list[dict[Config, float]] = [{PRESENT: 1e-3, A: 1.1e-3}, {PRESENT: 1e-5, A: 0.8e-5}] * 2
    rounds = iter(seconds)

    def times(functions: Mapping[str, Callable[[], object]], count: int, deadline: float) -> dict[str, list[float]]:
        return told(next(rounds))(functions, count, deadline)

    two = replace(tuner(times), cases=lambda key: [TINY, replace(TINY, batch=1, name="alone")])
    record = two.tune(FORWARD, float("inf"))
    assert row_of(record).config == A  # slower by a tenth, faster by a fifth
    assert "a chip, tiny; alone: 1100.0, 8.0 µs" in row_of(record).reason


def test_what_is_timed_is_the_operator(tried: Callable[..., None]) -> None:
    tried(PRESENT, A)
    outs: list[Any] = []

    def times(functions: Mapping[str, Callable[[], object]], count: int, deadline: float) -> dict[str, list[float]]:
        outs.extend(function() for function in functions.values())
        return {name: [1e-5] for name in functions}

    tuner(times).tune(FORWARD, float("inf"))
    exact = Problem(FORWARD, TINY, DEVICE, 0)._computed()
    assert len(outs) == 4
    for found in outs:
        torch.testing.assert_close(found["out"][:1], exact["out"].float())


@pytest.mark.parametrize("sample", [0, -1])
@pytest.mark.parametrize("key", [FORWARD, BACKWARD], ids=["forward", "backward"])
def test_a_fast_but_wrong_candidate_loses(
    tried: Callable[..., None], damaged: Callable[..., None], key: Key, sample: int
) -> None:
    bad, good, present = A, B, PRESENT
    if key.backward:
        tried(*(tiles := [Backward(tile, tile, True) for tile in (PRESENT, A, B)]))
        present, bad, good = tiles  # type: ignore[assignment]
    else:
        tried(present, bad, good)
    damaged(bad, sample)
    times = Times(lambda name: {label(present): 3e-5, label(good): 2e-5, label(bad): 1e-9}.get(name, 1e-4))
    record = tuner(times).tune(key, float("inf"))
    assert row_of(record).config == good
    name, whose = "grad query" if key.backward else "out", "an accepted configuration" if sample else "the reference"
    note = entry(record, bad)["note"]
    assert note.startswith(f"WRONG: {name} of tiny is ")
    assert f" off {whose}, allowed " in note
    assert entry(record, bad)["seconds"] == []
    assert all(label(bad) not in asked for asked in times.asked)


def test_a_candidate_that_fails_is_noted_and_loses(tried: Callable[..., None]) -> None:
    tried(PRESENT, IMPOSSIBLE, A)
    times = told({PRESENT: 3e-5, A: 2e-5, IMPOSSIBLE: 1e-9})
    record = tuner(times).tune(FORWARD, float("inf"))
    assert row_of(record).config == A
    assert entry(record, IMPOSSIBLE)["note"].startswith("fails on tiny: ")
    assert all(label(IMPOSSIBLE) not in asked for asked in times.asked)


def test_a_candidate_that_writes_nothing_loses(tried: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    tried(PRESENT, A)
    steps = Problem._steps

    def none_of_a(problem: Problem, config: Config) -> Any:
        found, results = steps(problem, config)
        return ([] if config == A else found), results

    monkeypatch.setattr(Problem, "_steps", none_of_a)
    record = tuner(told({PRESENT: 3e-5, A: 1e-5})).tune(FORWARD, float("inf"))
    assert "out of tiny is nan off the reference" in entry(record, A)["note"]
    assert row_of(record).config == PRESENT


@pytest.mark.parametrize("present", ["wrong", "failing"])
def test_a_present_configuration_that_is_wrong_is_reported_and_replaced(
    tried: Callable[..., None], damaged: Callable[..., None], present: str
) -> None:
    first = PRESENT if present == "wrong" else IMPOSSIBLE
    damaged(PRESENT, 0)
    tried(first, A)
    record = tuner(told({A: 3e-5})).tune(FORWARD, float("inf"))
    assert record["failed"].startswith(f"the present configuration, {label(first)}: ")
    assert row_of(record).config == A
    tried(first)
    record = tuner(told({})).tune(FORWARD, float("inf"))
    assert "failed" in record
    assert "row" not in record


@pytest.mark.usefixtures("unchecked")
def test_the_best_parts_of_a_backward_pass_are_put_together(tried: Callable[..., None]) -> None:
    present = Backward(PRESENT, PRESENT)
    parts = [*(replace(present, keys=tile) for tile in (A, B)), *(replace(present, queries=tile) for tile in (C, A))]
    tried(present, *parts, replace(present, descriptors=True))
    cost = dict(zip((PRESENT, A, B, C), (4e-5, 3e-5, 2e-5, 1e-5), strict=True))
    seconds: dict[Config, float] = {
        Backward(keys, queries, False, copy): (cost[keys] + cost[queries]) * (0.9 if copy else 1.0)
        for keys, queries, copy in product(cost, cost, (False, True))
    }
    record = tuner(told(seconds)).tune(BACKWARD, float("inf"))
    assert row_of(record).config == Backward(B, C, False, True)
    assert entry(record, Backward(B, C))["seconds"] == [pytest.approx(3e-5)]


# -- the compile gate --------------------------------------------------------------------------------------------------

_USED = Resources(100, 4, 0, 0, 0, 48 << 10, 0, 0, {}, 4096, "", 0.5)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Say what the gate finds: violations by configuration, alone and with every feature."""

    def variant(config: Config, feature: str) -> Variant:
        return Variant("forward", feature, {"config": label(config)}, {}, 4, 2, "fp32", 64, label(config))

    def say(alone: Mapping[Config, str] | None = None, everywhere: Mapping[Config, str] | None = None) -> None:
        found = {
            "alone": {label(config): words for config, words in (alone or {}).items()},
            "everything": {label(config): words for config, words in (everywhere or {}).items()},
        }

        def run(tasks: Sequence[tuple[Variant, int]], jobs: int) -> Iterator[tuple[int, gate.Row]]:
            for index, (task, arch) in reversed(list(enumerate(tasks))):
                assert arch == 90
                words = found[task.fn].get(task.label)
                violations = (words,) if words else ()
                yield index, gate.Row(task.kernel, arch, "fp32", 64, task.label, 4, 2, _USED, violations)

        monkeypatch.setattr(gate, "run", run)
        monkeypatch.setattr(Problem, "variants", lambda problem, config: [variant(config, "alone")])
        monkeypatch.setattr(tuning, "variants_of", lambda row, *_: [variant(row.config, "everything")])

    return say


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", ["forward", "backward", "decoding"])
def test_a_sound_kernel_passes_and_one_that_spills_does_not(
    part: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(problem, "specialize", lambda *_: {"signature": {}, "constexprs": {}, "attrs": {}})
    key = Key(kind, 64, "few" if part == "decoding" else "short", part == "backward", "plain")
    long = SegmentLayout.rmt_decoder(600, 4).decoding()
    made = Problem(key, replace(TINY, layout=long if part == "decoding" else TINY.layout), DEVICE, 90)
    found = made.variants(Backward(PRESENT, PRESENT) if key.backward else PRESENT)
    names = {"forward": ["forward"], "backward": ["prepare", *["backward"] * 2], "decoding": ["forward", "combine"]}
    assert [variant.kernel for variant in found] == names[part]
    for variant in found:
        products = variant.kernel in ("forward", "backward") and kind != "float32"
        for name in ("HMMA", "HGMMA") if products else ("",):
            used = replace(_USED, tensor_ops={name: 8} if name else {}, warps=variant.num_warps)
            assert gate.violations(variant, 90, used) == ()
            assert len(gate.violations(variant, 90, replace(used, spilled=4))) == 1


def test_what_spills_is_not_timed(tried: Callable[..., None], compiled: Callable[..., None]) -> None:
    tried(PRESENT, A, B)
    compiled(alone={A: "spills: 8 bytes"})
    times = told({PRESENT: 3e-5, B: 2e-5})
    record = tuner(times, arch=90, jobs=2).tune(FORWARD, float("inf"))
    assert row_of(record) == Row(90, 64, "float32", "short", B, row_of(record).reason, "plain")
    assert entry(record, A)["note"] == "spills: 8 bytes"
    assert entry(record, B)["note"] == ""
    assert (entry(record, B)["registers"], entry(record, B)["programs"]) == (100, _USED.programs(90))
    assert all(label(A) not in asked for asked in times.asked)


def test_a_winner_must_pass_the_gate_with_every_feature(
    tried: Callable[..., None], compiled: Callable[..., None]
) -> None:
    tried(PRESENT, A, B)
    compiled(everywhere={A: "too many registers"})
    record = tuner(told({PRESENT: 3e-5, A: 1e-5, B: 2e-5}), arch=90).tune(FORWARD, float("inf"))
    assert row_of(record).config == B
    assert entry(record, A)["note"].startswith("the compile gate refuses it: ")
    assert "too many registers" in entry(record, A)["note"]


def test_where_the_present_configuration_spills_any_faster_one_wins(
    tried: Callable[..., None], compiled: Callable[..., None]
) -> None:
    tried(PRESENT, A)
    compiled(alone={PRESENT: "spills: 8 bytes"})
    record = tuner(told({PRESENT: 1e-5, A: 0.999e-5}), arch=90).tune(FORWARD, float("inf"))
    assert entry(record, PRESENT)["seconds"] == [1e-5]
    assert "failed" not in record
    assert row_of(record).config == A


# -- time, files, status -----------------------------------------------------------------------------------------------


@dataclass
class Clock:
    now: float = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(tuning, "time", made)
    monkeypatch.setattr(program, "time", made)
    return made


@pytest.mark.parametrize("seconds", [0.0, 20.0])
def test_past_the_time_of_a_step_no_more_candidates_are_tried(
    tried: Callable[..., None], clock: Clock, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    def wrong(problem: Problem, config: Config) -> str:
        clock.now += seconds
        return ""

    monkeypatch.setattr(Problem, "wrong", wrong)
    tried(PRESENT, *(Tile(64, 64, 4, stages) for stages in (1, 4, 5)), A)
    record = tuner(Times(lambda name: 1e-5)).tune(FORWARD, clock.now + (7.5 * seconds or -1))
    assert [bool(each["seconds"]) for each in record["candidates"]] == [True] * 4 + [False]
    assert not record["complete"]
    assert entry(record, A)["note"] == "not reached in the time given"
    assert f"{FORWARD.name}, INCOMPLETE" in (text := printed({"keys": {FORWARD.name: record}}))
    assert "Row(" not in text


@dataclass
class Fake:
    """A tuner whose every key takes some seconds and has a record or an error."""

    clock: Clock
    seconds: float = 10.0
    found: dict[str, Any] = field(default_factory=dict)
    tuned: list[str] = field(default_factory=list)
    name: str = "a chip"
    arch: int = 90

    def tune(self, key: Key, deadline: float) -> dict[str, Any]:
        self.tuned.append(key.name)
        self.clock.now += self.seconds
        found = self.found.get(key.name, {"complete": True, "cases": [], "candidates": []})
        if isinstance(found, Exception):
            raise found
        return dict(found)


@pytest.fixture
def fake(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Fake:
    made = Fake(clock)
    monkeypatch.setattr(program, "opened", lambda *, jobs, specialized: made)
    return made


NAMES = [key.name for key in selected(["half:64:long"])]


def test_no_key_is_begun_that_may_take_too_long(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["--only", "half:64:long", "--seconds", "25"]) == 0
    assert fake.tuned == NAMES[:2]
    assert capsys.readouterr().out.splitlines()[-1] == "2 of 6 keys measured; give more --seconds"


def test_a_run_goes_on_where_it_stopped(fake: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "tune.json"
    call = ["--only", "half:64:long", "--json", str(file)]
    fake.found[NAMES[1]] = {"complete": False, "cases": [], "candidates": []}
    assert program.main([*call, "--seconds", "35"]) == 0
    assert fake.tuned == NAMES[:3]
    written = json.loads(file.read_text())
    assert list(written["keys"]) == NAMES[:3]
    assert written["environment"]["device"] == "a chip"
    fake.tuned.clear()
    fake.found.clear()
    assert program.main(call) == 0
    assert fake.tuned == [NAMES[1], *NAMES[3:]]
    assert capsys.readouterr().out.splitlines()[-1] == "6 of 6 keys measured"
    assert all(record["complete"] for record in json.loads(file.read_text())["keys"].values())
    assert [path.name for path in tmp_path.iterdir()] == ["tune.json"]


def test_what_was_measured_is_written_after_every_key(fake: Fake, tmp_path: Path) -> None:
    file = tmp_path / "tune.json"

    def tune(key: Key, deadline: float) -> dict[str, Any]:
        if key.name == NAMES[1]:
            raise KeyboardInterrupt
        return {"complete": True, "cases": [], "candidates": []}

    fake.tune = tune  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        program.main(["--only", "half:64:long", "--json", str(file)])
    assert list(json.loads(file.read_text())["keys"]) == NAMES[:1]


@pytest.mark.parametrize("change", ["device", "sources", "triton"])
def test_a_file_measured_otherwise_is_refused_and_kept(
    fake: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str
) -> None:
    file = tmp_path / "tune.json"
    call = ["--only", "half:64:long", "--json", str(file)]
    program.main(call)
    report = json.loads(file.read_text())
    report["environment"][change] = "other"
    file.write_text(json.dumps(report))
    assert f"{file} was measured with other {change}: move it" in refused(capsys, *call)
    assert json.loads(file.read_text()) == report


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"environment": {}, "keys": 3}'])
def test_a_file_that_is_no_report_is_refused_and_kept(
    fake: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    file = tmp_path / "notes.json"
    file.write_text(text)
    assert f"{file} is no report of this command" in refused(capsys, "--json", str(file))
    assert file.read_text() == text


def test_a_file_that_cannot_be_written_is_refused_before_measuring(
    fake: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "No such file" in refused(capsys, "--json", str(tmp_path / "missing" / "tune.json"))
    assert fake.tuned == []


@pytest.mark.parametrize("kind", ["error", "present"])
def test_a_failing_key_is_status_1_and_does_not_end_the_run(
    fake: Fake, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    wrong = {"complete": True, "failed": "wrong", "cases": [], "candidates": []}
    fake.found[NAMES[0]] = ValueError("broken") if kind == "error" else wrong
    assert program.main(["--only", "half:64:long"]) == 1
    assert fake.tuned == NAMES
    assert f"FAILED: {'ValueError: broken' if kind == 'error' else 'wrong'}" in capsys.readouterr().out


def test_a_lost_gpu_ends_the_run(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    fake.found[NAMES[1]] = DeviceLostError("by 64x64")
    assert program.main(["--only", "half:64:long"]) == 1
    assert fake.tuned == NAMES[:2]
    assert "FAILED: DeviceLostError: by 64x64" in capsys.readouterr().out


def test_a_candidate_that_breaks_the_gpu_is_named(tried: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(device: object = None) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    tried(PRESENT, IMPOSSIBLE)
    made = tuner(told({}))
    problem = Problem(FORWARD, TINY, DEVICE, 0)
    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    made.device = torch.device("cuda")
    with pytest.raises(DeviceLostError, match=f"{label(IMPOSSIBLE)} on tiny"):
        made._complaint([problem], IMPOSSIBLE)


# -- rows --------------------------------------------------------------------------------------------------------------


@dataclass
class Pasted:
    """What a chip measured for some keys, what was printed, and the tables with its rows where it says."""

    arch: int
    measured: dict[Key, Config]
    lines: list[str]
    tables: dict[str, tuple[Row, ...]]


@pytest.fixture(params=[(90, "half"), (0, "float32")], ids=["sm_90", "interpreter"])
def pasted(
    request: pytest.FixtureRequest, compiled: Callable[..., None], unchecked: None, monkeypatch: pytest.MonkeyPatch
) -> Pasted:
    arch, kind = request.param
    keys = selected([f"{kind}:64:short", f"{kind}:128:short:*:plain", f"{kind}:64:few:forward:extras"])
    best: dict[Key, Config] = {}
    for key in keys:
        tile = Tile(16, 16, 1, key.width // 64, descriptors=key.calls == "extras")
        best[key] = Backward(tile, A) if key.backward else tile
    compiled()
    monkeypatch.setattr(tuning, "candidates", lambda key, arch, specialized: [key.row(arch).config, best[key]])
    fast = {label(config) for config in best.values()}
    report: dict[str, Any] = {"keys": {}}
    program.run(keys, tuner(Times(lambda name: 2e-5 if name in fast else 3e-5), arch), report, float("inf"), None)
    tables, lines = {"FORWARD": configs.FORWARD, "BACKWARD": configs.BACKWARD}, []
    for section in printed(report).split("# In ")[1:]:
        place, _, rows = section.partition(":\n")
        name, _, hidden = place.partition(", in front of ")
        (before,) = evaluated(hidden + ",")
        (index,) = (i for i, row in enumerate(tables[name]) if replace(row, reason=before.reason) == before)
        tables[name] = (*tables[name][:index], *evaluated(rows), *tables[name][index:])
        lines += rows.splitlines()
    return Pasted(arch, best, lines, tables)


def evaluated(rows: str) -> tuple[Row, ...]:
    found: tuple[Row, ...] = eval(f"({rows})", {"Row": Row, "Tile": Tile, "Backward": Backward})
    return found


def test_printed_rows_are_chosen_where_they_were_measured_and_nowhere_else(
    pasted: Pasted, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = [
        (arch, Key(kind, width, length, backward, call))
        for arch, kind, width, length, call in product((0, 80, 90, 100), KINDS, WIDTHS, LENGTHS, CALLS)
        for backward in (False, True)
    ]
    expected = []
    for arch, key in places:
        row = key.row(arch)
        wider = [
            (other.width, config)
            for other, config in pasted.measured.items()
            if replace(other, width=key.width) == key and other.width >= key.width
            if other.row(pasted.arch) is row and arch >= pasted.arch
        ]
        expected.append(min(wider, key=lambda pair: pair[0])[1] if wider else row.config)
    for name, table in pasted.tables.items():
        monkeypatch.setattr(configs, name, table)
    assert [key.row(arch).config for arch, key in places] == expected
    for key, config in pasted.measured.items():
        choose = configs.backward_config if key.backward else configs.forward_config
        assert choose(pasted.arch, key.width, key.kind, key.length, key.calls) == config


def test_printed_rows_are_no_longer_than_a_line_may_be(pasted: Pasted) -> None:
    assert sum(line.startswith("    Row(") for line in pasted.lines) == len(pasted.measured)
    assert max(map(len, pasted.lines)) <= 120
    assert any(line.startswith("        ") for line in pasted.lines)  # some need more than one


def test_an_incomplete_key_prints_no_row() -> None:
    record = {"cases": [], "candidates": [], "row": "    Row(),", "before": "    Row(…),"}
    report = {"keys": {"half:64:long:forward:plain": record | {"complete": True}}}
    assert "# In FORWARD, in front of Row(…):\n    Row()," in printed(report)
    report["keys"]["half:64:long:forward:plain"]["complete"] = False
    assert "Row" not in printed(report)


# -- on a GPU ----------------------------------------------------------------------------------------------------------


@gpu
def test_the_timer_measures_each_function_alone() -> None:
    small, large = (torch.empty(size, device=DEVICE) for size in (2**20, 2**28))
    functions = {"small": small.zero_, "large": large.zero_, "both": lambda: (small.clone(), large.zero_())}
    found = GraphTimer(DEVICE)(functions, 5, float("inf"))
    assert {len(times) for times in found.values()} == {5}
    best = {name: min(times) for name, times in found.items()}
    assert 0 < 10 * best["small"] < best["large"] < 1.1 * best["both"] < 1.5 * best["large"]
    assert {len(times) for times in GraphTimer(DEVICE)(functions, 5, 0.0).values()} == {3}


@gpu
def test_a_key_is_tuned(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    some = candidates
    monkeypatch.setattr(tuning, "candidates", lambda key, arch, specialized: some(key, arch)[:6])
    file = tmp_path / "tune.json"
    names = ["half:64:short:forward:plain", "half:64:short:backward:plain"]
    assert program.main(["--only", *names, "--json", str(file)]) == 0
    text = capsys.readouterr().out
    for name in names:
        record = json.loads(file.read_text())["keys"][name]
        assert record["complete"]
        assert record["row"] in text
        assert sum(bool(each["seconds"]) for each in record["candidates"]) >= 2
