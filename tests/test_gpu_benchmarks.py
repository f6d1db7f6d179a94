"""The GPU benchmarks, run on the CPU: what they time, what they refuse, what survives a failure, what they report."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.cases import Case, Inputs, make_inputs
from benchmarks.files import read_json, write_json
from benchmarks.gpu import __main__ as program
from benchmarks.gpu import (
    checks,
    child,
    compare,
    contestants,
    fused,
    programs,
    report,
    suite,
    supervise,
    tables,
    targets,
)
from benchmarks.gpu.cases import FULL, Plan, decode_case, filling, short
from benchmarks.gpu.contestants import Entrant, RefusalError, closed_form, entrants
from benchmarks.gpu.device import CudaDevice, HostDevice
from benchmarks.gpu.shard import cut_off, read_log
from benchmarks.gpu.stage import Context, Item, Payload, Stage
from benchmarks.gpu.stages import STAGES
from benchmarks.gpu.store import Store, complete, pending
from benchmarks.gpu.timing import Timed, call_times, kernel_times
from benchmarks.measure import Check
from rmt_kernels import SegmentLayout, reference_attention, segment_attention
from rmt_kernels.backends import cpu, cuda

TINY = Plan(
    backend="stock", rows=128, width=64, tokens=(32,), memory=(4,), head_dims=(32,), short_tokens=(32,), short_heads=2,
    short_wide_tokens=(32,), decode_tokens=48, decode_batch=2, decode_heads=2, decode_group=2, copy_bytes=2**16,
    product=64, long_tokens=64, repeats=3, rounds=3, seconds=0.05,
)  # fmt: skip
SMALL = Case("small", SegmentLayout.rmt_decoder(40, 5), 2, 4, 2, 16, "a test")
STOCK = ("split_flash", "dense", "naive", "plain")


class Machine(HostDevice):
    """A device whose clock moves only when a function says so, by ``spend``, and whose flush takes a millisecond."""

    def __init__(self) -> None:
        self.now = 0.0
        super().__init__(lambda: self.now)

    def spend(self, seconds: float) -> Callable[[], None]:
        def function() -> None:
            self.now += seconds

        return function

    def flush(self) -> None:
        self.now += 1e-3


# -- timing ------------------------------------------------------------------------------------------------------------


def test_kernel_time_is_that_of_one_call_without_the_flush() -> None:
    machine = Machine()
    functions = {"short": Timed(machine.spend(2e-5)), "long": Timed(machine.spend(3e-3))}
    for flush in (True, False):
        found = kernel_times(machine, functions, rounds=7, budget=100.0, flush=flush)
        assert found["short"]["median"] == pytest.approx(2e-5, rel=1e-6)
        assert found["long"]["median"] == pytest.approx(3e-3, rel=1e-6)
        assert (found["short"]["rounds"], found["short"]["copies"], found["long"]["copies"]) == (7, 50, 1)


def test_call_time_and_the_host_part_of_it() -> None:
    class Queue(Machine):
        waiting = 0.0

        def synchronize(self) -> None:
            self.now, self.waiting = self.now + self.waiting, 0.0

    machine = Queue()

    def launch() -> None:
        machine.now += 1e-5
        machine.waiting += 4e-5

    found = call_times(machine, {"f": Timed(launch)}, rounds=5, calls={"f": 10}, budget=100.0)["f"]
    assert found["enqueue"]["median"] == pytest.approx(1e-5)
    assert found["call"]["median"] == pytest.approx(5e-5)


def test_functions_take_turns_and_a_budget_ends_the_rounds() -> None:
    machine, order = Machine(), []

    def function(name: str) -> Callable[[], None]:
        def run() -> None:
            order.append(name)
            machine.now += 1e-2

        return run

    functions = {name: Timed(function(name)) for name in "abc"}
    kernel_times(machine, functions, rounds=3, budget=100.0)
    assert "".join(order[-9:]) == "abcbcacab"
    assert kernel_times(machine, functions, rounds=50, budget=0.1)["a"]["rounds"] == 5


def test_a_function_that_fails_is_recorded_and_the_others_are_timed() -> None:
    machine = Machine()

    def broken() -> None:
        raise RuntimeError("no such kernel")

    for found in (
        kernel_times(machine, {"x": Timed(broken), "y": Timed(machine.spend(1e-3))}, rounds=3, budget=9.0),
        call_times(
            machine, {"x": Timed(broken), "y": Timed(machine.spend(1e-3))}, rounds=3, calls={"x": 1, "y": 1}, budget=9.0
        ),
    ):
        assert found["x"] == {"error": "RuntimeError: no such kernel"}
        assert "error" not in found["y"]


def test_a_context_is_entered_around_the_calls_and_not_for_each() -> None:
    machine, entered, called = Machine(), [], []

    @contextmanager
    def context() -> Iterator[None]:
        entered.append(1)
        yield

    call_times(machine, {"f": Timed(lambda: called.append(1), context)}, rounds=3, calls={"f": 20}, budget=9.0)
    assert len(called) == 2 + 3 * 20
    assert len(entered) == 1 + 3


class FakeCuda:
    """``torch.cuda`` as far as CudaDevice needs it; time passes by what is run, captured calls run on replay."""

    def __init__(self, capturable: bool = True) -> None:
        self.now, self.capturable = 0.0, capturable
        self.log: list[str] = []
        self.capturing: list[Callable[[], None]] | None = None

    def launch(self, name: str, seconds: float) -> None:
        def run() -> None:
            self.log.append(name)
            self.now += seconds

        if self.capturing is None:
            run()
        elif self.capturable:
            self.capturing.append(run)
        else:
            raise RuntimeError("operation not permitted when stream is capturing")

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fake = self

        class Graph:
            def __init__(self) -> None:
                self.calls: list[Callable[[], None]] = []

            def replay(self) -> None:
                for call in self.calls:
                    call()

        @contextmanager
        def graph(into: Graph, stream: Any) -> Iterator[None]:
            assert stream == "own stream"
            fake.capturing = []
            try:
                yield
                into.calls = fake.capturing
            finally:
                fake.capturing = None

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = fake.now

            def synchronize(self) -> None:
                pass

            def elapsed_time(self, other: Any) -> float:
                return float(1e3 * (other.at - self.at))

        class Flush:
            def zero_(self) -> None:
                fake.launch("flush", 1e-4)

        flushes: list[tuple[int, torch.device]] = []

        def empty(size: int, dtype: torch.dtype, device: torch.device) -> Flush:
            flushes.append((size, device))
            return Flush()

        properties = type("Properties", (), {"L2_cache_size": 50 * 2**20, "total_memory": 2**30})()
        for name, value in {
            "current_device": lambda: 0, "Stream": lambda: "own stream", "CUDAGraph": Graph, "graph": graph,
            "Event": Event, "synchronize": lambda device: None, "get_device_properties": lambda device: properties,
            "_sleep": lambda cycles: fake.log.append("sleep"), "stream": lambda stream: nullcontext(),
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch, "empty", empty)
        self.flushes = flushes


@pytest.mark.parametrize("capturable", [True, False])
def test_the_cuda_device_times_replays_on_its_own_stream(capturable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCuda(capturable)
    fake.install(monkeypatch)
    device = CudaDevice()
    assert fake.flushes == [(100 * 2**20, torch.device("cuda:0"))]  # twice the L2 cache
    found = kernel_times(device, {"f": Timed(lambda: fake.launch("f", 1e-3))}, rounds=5, budget=100.0)["f"]
    assert found["median"] == pytest.approx(1e-3)
    assert (found["by"], found["copies"]) == ("graph" if capturable else "calls", 5)
    assert fake.log[-10:] == ["flush", "f"] * 5
    assert ("sleep" in fake.log) is not capturable
    if not capturable:
        assert "not permitted when stream is capturing" in found["note"]


# -- cases and contestants ---------------------------------------------------------------------------------------------


def test_cases_of_the_plan_are_those_of_the_targets() -> None:
    cases = filling(FULL)
    assert {(c.layout.tokens, c.layout.write, c.head_dim) for c in cases} == {
        (t, m, d) for t in (512, 1024, 2048, 4096) for m in (16, 128) for d in (64, 128)
    }
    assert {c.batch * c.layout.tokens for c in cases} == {16384}
    assert {c.heads * c.head_dim for c in cases} == {2048}
    assert {(c.batch, c.heads) for c in short(FULL)} == {(1, 16)}
    for head_dim, longest in ((64, 2048), (128, 512)):
        lengths = [c.layout.tokens for c in short(FULL) if c.head_dim == head_dim]
        assert {128, 256, 512} <= set(lengths)
        assert max(lengths) == longest
    step = decode_case(FULL, 64)
    assert (step.batch, step.heads, step.kv_heads, step.layout.num_queries) == (16, 32, 8, 1)
    assert step.layout.visible() == 8192 + 16


@pytest.mark.parametrize(
    "layout",
    [
        SegmentLayout.rmt_decoder(30, 4), SegmentLayout.rmt_decoder(30, 4, cache=7, read_cache=True),
        SegmentLayout.causal(30, 4), SegmentLayout.rmt_encoder(30, 4), SegmentLayout.rmt_decoder(30, 4).last(9),
        SegmentLayout.rmt_decoder(30, 4).decoding(), SegmentLayout.memformer_read(30, 4),
    ],
    ids=lambda layout: f"{layout.name}-{layout.num_queries}",
)  # fmt: skip
def test_the_closed_form_given_to_flex_is_the_mask(layout: SegmentLayout) -> None:
    q, k = torch.arange(layout.num_queries)[:, None], torch.arange(layout.num_keys)[None, :]
    want = layout.dense_mask()
    assert torch.equal(closed_form(layout)(q, k, q, k).expand(want.shape), want)


def test_flex_refuses_masks_that_its_closed_form_cannot_state() -> None:
    objection = entrants("stock", 2**40)["flex"].objection
    for layout in (SegmentLayout.membart(9, 2), SegmentLayout.transformer_xl(9, 9, window=9)):
        assert objection(replace(SMALL, layout=layout), torch.bfloat16, True) is not None
    assert objection(SMALL, torch.bfloat16, True) is None


def test_naive_attention_is_left_out_where_its_scores_would_not_fit() -> None:
    size = SMALL.score_bytes(torch.bfloat16)
    assert entrants("stock", 24 * size)["naive"].objection(SMALL, torch.bfloat16, True) is None
    assert entrants("stock", 24 * size - 24)["naive"].objection(SMALL, torch.bfloat16, True) is not None


def test_what_sdpa_refuses_is_a_refusal_and_other_errors_are_not() -> None:
    def unavailable() -> Tensor:
        import warnings

        warnings.warn("Flash attention only supports what it supports (Triggered internally at x)", stacklevel=1)
        raise RuntimeError("No available kernel. Aborting execution.")

    def broken() -> Tensor:
        raise RuntimeError("shapes differ")

    with pytest.raises(RefusalError, match=r"^Flash attention only supports what it supports$"):
        contestants.refusing(unavailable)
    with pytest.raises(RuntimeError, match="shapes differ"):
        contestants.refusing(broken)


def test_decoding_contestants_compute_the_step() -> None:
    case = decode_case(TINY, 16)
    start = torch.full((case.batch,), case.layout.tokens - 1, dtype=torch.int32)
    every = contestants.decoders("reference", start, cuda="cpu" if not cpu.why_missing else "reference")
    records = compare.compare(
        HostDevice(), case, {name: every[name] for name in ("ours", "cuda", "dense", "sliced_flash")},
        dtype=torch.float32, rounds=2, budget=0.1, calls=0,
    )  # fmt: skip
    assert {r["contestant"]: r["kind"] for r in records} == {
        "ours": "right", "cuda": "right", "dense": "right", "sliced_flash": "right", "again": "right"
    }  # fmt: skip


def test_both_backends_of_ours_may_not_refuse_and_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    every = entrants("triton", 2**40)
    assert [name for name, entrant in every.items() if entrant.own] == ["ours", "cuda"]
    assert (every["ours"].label, every["cuda"].label) == ("rmt_kernels, Triton", "rmt_kernels, CUDA")
    assert [e.name for e in contestants.decoders("triton", torch.zeros(1)).values() if e.own] == ["ours", "cuda"]
    monkeypatch.setattr(cuda, "why_missing", "the extension was not built")
    (row,) = _compare({"cuda": every["cuda"]})
    assert (row["kind"], row["note"]) == ("failed", "the extension was not built")


def test_both_backends_of_ours_are_held_to_the_strict_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    judged: list[str] = []

    def check(contestant: Entrant, *args: Any) -> Check:
        judged.append(contestant.name)
        return Check(True)

    monkeypatch.setattr(compare, "check", check)
    every = {name: replace(_entrant(name, _exact), own=name in ("ours", "cuda")) for name in ("ours", "cuda", "dense")}
    rows = _by_name(_compare(every), "forward")
    assert judged == ["ours", "ours", "dense"]
    assert set(rows) == {"ours", "cuda", "dense", "again"}


def test_it_is_told_whose_first_calls_are_made() -> None:
    told: list[tuple[str, float | None]] = []
    every = {"cuda": replace(_entrant("cuda", _exact), own=True), "fine": _entrant("fine", _exact)}
    _compare(every, at=lambda name, seconds: told.append((name, seconds)), excluded={"fine": "it hung"})
    assert told == [("cuda", compare._OWN_SECONDS), ("", None)]
    told.clear()
    _compare(every, at=lambda name, seconds: told.append((name, seconds)))
    assert told == [("cuda", compare._OWN_SECONDS), ("fine", None), ("", None)]


# -- the fused kernel --------------------------------------------------------------------------------------------------

FORWARD = "@triton.jit\ndef triton_tem_fused_flex_attention_0():\n  pass\n@triton.jit\ndef forward_block_mn(\n"
BACKWARD = "@triton.jit\ndef bwd_dq_inner(\n@triton.jit\ndef bwd_dkdv_inner(\n"


@pytest.mark.parametrize(
    ("sources", "backward", "complaint"),
    [
        ([FORWARD], False, None), ([FORWARD, BACKWARD], True, None), ([], False, "no code"),
        ([FORWARD], True, "no fused backward"), (["extern_kernels.bmm(a, b, out=c)"], False, "no fused forward"),
        ([FORWARD, "extern_kernels.bmm(a, b, out=c)"], False, r"calls extern_kernels\.bmm"),
        ([FORWARD, "buf = torch.ops.aten._scaled_dot_product_flash_attention.default(x)"], False, "calls aten"),
    ],
)  # fmt: skip
def test_generated_code_without_the_fused_kernel_is_found(
    sources: list[str], backward: bool, complaint: str | None
) -> None:
    found = fused.unfused_code(sources, backward)
    if complaint is None:
        assert found is None
    else:
        with pytest.raises(AssertionError, match=complaint):
            raise AssertionError(found)


@pytest.mark.parametrize(
    ("names", "backward", "right"),
    [
        (["triton_tem_fused_flex_attention_0"], False, True),
        (["triton_tem_fused_0", "triton_red_fused_mul_1", "triton_tem_fused_zeros_2"], True, True),
        (["triton_tem_fused_flex_attention_0"], True, False), ([], False, False),
        (["triton_poi_fused_0"], False, False),
        (["triton_tem_fused_0", "nvjet_tst_128x256"], False, False),
        (["triton_tem_fused_0", "void cunn_SoftMaxForward<4>"], False, False),
    ],
)  # fmt: skip
def test_kernels_that_are_not_fused_are_found(names: list[str], backward: bool, right: bool) -> None:
    assert (fused.unfused_kernels(names, backward) is None) is right


def test_real_generated_code_is_told_apart() -> None:
    """FlexAttention compiled on the CPU is fused; the same attention written out and compiled is not."""
    inputs = make_inputs(SMALL, torch.float32)
    entrant = entrants("stock", 2**40)["flex"]
    out = entrant.build(SMALL, inputs)()
    want = reference_attention(inputs.query, inputs.key, inputs.value, SMALL.layout)[0]
    torch.testing.assert_close(out, want)
    assert entrant.facts["fused"] is True
    assert entrant.facts["compile_seconds"] > 0
    assert entrant.facts["mask_seconds"] > 0

    torch._dynamo.reset()

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return torch.softmax(query @ key.mT, -1) @ value

    written_out: Any = torch.compile(attention, dynamic=False)
    with fused.generated_code() as sources:
        written_out(*(torch.randn(1, 2, 64, 16) for _ in range(3)))
    assert sources
    assert fused.unfused_code(sources, False) is not None


# -- comparing ---------------------------------------------------------------------------------------------------------


def _entrant(name: str, compute: Callable[[Inputs], Tensor]) -> Entrant:
    return Entrant(name, name, lambda case, inputs: lambda: compute(inputs), lambda case, dtype, backward: None)


def _exact(inputs: Inputs) -> Tensor:
    return reference_attention(inputs.query, inputs.key, inputs.value, SMALL.layout)[0]


def _wrong(inputs: Inputs) -> Tensor:
    return _exact(inputs) * 1.01


def _raises(inputs: Inputs) -> Tensor:
    raise ValueError("no such configuration")


def _by_name(records: list[compare.Record], which: str) -> dict[str, compare.Record]:
    return {r["contestant"]: r for r in records if r["pass"] == which}


def _compare(every: dict[str, Entrant], backward: bool = False, **how: Any) -> list[compare.Record]:
    return compare.compare(
        HostDevice(), SMALL, every, dtype=torch.float32, backward=backward, rounds=2, budget=0.1, calls=0.05, **how
    )


def test_stock_contestants_are_right_in_both_passes() -> None:
    every = entrants("stock", 2**40)
    records = _compare({name: every[name] for name in ("ours", *STOCK)}, backward=True)
    for which in ("backward", "forward+backward"):
        rows = _by_name(records, which)
        assert set(rows) == {"ours", "again", *STOCK}
        for name, row in rows.items():
            assert row["kind"] == "right", (name, row["note"])
            assert set(row["errors"]) == {"out", "grad query", "grad key", "grad value"}
            assert row["kernel"]["rounds"] == 2
            factor = {"backward": 10, "forward+backward": 14}[which]
            entries = 50 * 51 // 2 if name == "plain" else SMALL.layout.visible()
            flop = factor * entries * 16 * 4 * 2
            assert row["tflops"] == pytest.approx(flop / row["kernel"]["median"] / 1e12)
        assert rows["dense"]["calls"]["enqueue"]["median"] > 0
        assert rows["plain"]["same"] is False
    assert _by_name(records, "forward+backward")["naive"]["peak_bytes"] > 0
    json.dumps(records)


def test_a_wrong_contestant_has_no_time_and_fails_the_run_and_the_others_go_on() -> None:
    every = {"ours": _entrant("ours", _wrong), "broken": _entrant("broken", _raises), "fine": _entrant("fine", _exact)}
    records = _compare(every)
    rows = _by_name(records, "forward")
    assert (rows["ours"]["kind"], rows["ours"]["kernel"], rows["ours"]["tflops"]) == ("wrong", None, None)
    assert rows["ours"]["note"].startswith("WRONG: out: largest error")
    assert rows["broken"]["note"] == "failed: ValueError: no such configuration"
    assert "_raises" in rows["broken"]["trace"]
    assert rows["fine"]["kernel"] is not None
    from benchmarks.gpu.stages import _payload

    said = _payload(records, Context(None, TINY, Path(), say=lambda line: None))["failures"]
    assert [line.split(":")[0] for line in said] == ["ours, forward", "broken, forward"]


def test_a_refusal_does_not_fail_the_run_but_ours_may_not_object() -> None:
    missing = entrants("no such backend", 2**40)["ours"]

    def refuses(inputs: Inputs) -> Tensor:
        raise RefusalError("it has no kernel for this")

    rows = _by_name(_compare({"ours": missing, "other": _entrant("other", refuses)}), "forward")
    assert (rows["ours"]["kind"], rows["ours"]["note"]) == ("failed", "there is no backend 'no such backend'")
    assert (rows["other"]["kind"], rows["other"]["note"]) == ("refused", "it has no kernel for this")


def test_a_contestant_that_loses_the_device_is_named_and_can_be_left_out() -> None:
    class Lost(HostDevice):
        lost = False

        def synchronize(self) -> None:
            if self.lost:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")

    device = Lost()

    def poison(inputs: Inputs) -> Tensor:
        device.lost = True
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    every = {"bad": _entrant("bad", poison), "ours": _entrant("ours", _exact)}
    with pytest.raises(compare.DeviceLostError) as caught:
        compare.compare(device, SMALL, every, dtype=torch.float32, rounds=2, budget=0.1)
    assert caught.value.contestant == "bad"
    device.lost = False
    records = compare.compare(
        device, SMALL, every, dtype=torch.float32, rounds=2, budget=0.1, excluded={"bad": str(caught.value)}
    )
    rows = _by_name(records, "forward")
    assert rows["bad"]["kind"] == "failed"
    assert "illegal memory access" in rows["bad"]["note"]
    assert rows["ours"]["kernel"] is not None


# -- checks ------------------------------------------------------------------------------------------------------------


def _context(work: Path, plan: Plan = TINY) -> Context:
    return Context(HostDevice(), plan, work, time.monotonic() + 300, say=lambda line: None)


@pytest.mark.skipif(bool(cpu.why_missing), reason="the compiled CPU module is missing")
def test_checks_pass_on_a_backend_that_keeps_them(tmp_path: Path) -> None:
    for item in [*checks.determinism_items("cpu"), *checks.memory_items("cpu")[1:]]:
        if "M = 128" not in item.key:
            found = item.run(_context(tmp_path))
            assert (found["failures"], found["facts"]["backend"]) == ([], "cpu"), item.key


def _unsteady(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter(range(10**6))

    def compute(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        options.pop("cache", None)
        out, lse = reference_attention(*args, **options)
        return out * (1 + 2**-6 * (next(calls) % 2)), lse

    monkeypatch.setattr("tests.suite.on_backend", lambda name: compute)


def test_checks_find_results_that_differ(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _unsteady(monkeypatch)
    for item in checks.determinism_items("stock"):
        if item.key in ("repeats: decoding", "alone: decoding"):
            (said,) = item.run(_context(tmp_path))["failures"]
            assert "differ" in said


def test_too_much_memory_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    peak = checks.memory_items("stock")[0]
    (said,) = peak.run(_context(tmp_path))["failures"]
    assert "of the dense scores" in said
    monkeypatch.setattr(checks, "MOST_MEMORY", 1e9)
    assert peak.run(_context(tmp_path))["failures"] == []


def test_a_compiled_call_with_other_bits_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def compile_wrongly(function: Any, **_: Any) -> Any:
        return lambda *args: function(*args) * 1.5

    monkeypatch.setattr(torch, "compile", compile_wrongly)
    (item,) = [item for item in checks.memory_items("stock") if item.key == "torch.compile"]
    (said,) = item.run(_context(tmp_path))["failures"]
    assert "differ from the eager one" in said


def test_decoding_is_measured_beside_a_copy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    every = contestants.decoders("reference", torch.full((2,), TINY.decode_tokens - 1, dtype=torch.int32))
    monkeypatch.setattr("benchmarks.gpu.stages.decoders", lambda backend, start, cuda: {"ours": every["ours"]})
    (item,) = STAGES["decode"].items(TINY)
    rows = _by_name(item.run(_context(tmp_path))["records"], "forward")
    ours, copied = rows["ours"], rows["copy"]
    assert copied["copy_share"] == pytest.approx(1.0)
    moved = (TINY.decode_tokens + 16) * 32 * 2 * 2 * 2 * 2  # rows x head_dim x batch x kv_heads x (K, V) x bytes
    assert ours["bytes_per_second"] == pytest.approx(moved / ours["kernel"]["median"])
    assert ours["copy_share"] == pytest.approx(ours["bytes_per_second"] / copied["bytes_per_second"])


# -- stages: state, isolation, resuming --------------------------------------------------------------------------------


def _stage(**runs: Callable[[Context], Payload]) -> Stage:
    return Stage("s", "a test", 100.0, lambda plan: [Item(key, run, least=0.0) for key, run in runs.items()])


def _child(tmp_path: Path, stage: Stage, seconds: float = 60.0) -> tuple[int, dict[str, Any]]:
    arguments = ["s", "--out", str(tmp_path), "--seconds", str(seconds)]
    status = child.main(arguments, stages={"s": stage}, plan=TINY, device=HostDevice())
    return status, Store(tmp_path).load("s")


def test_a_failing_item_is_recorded_and_the_next_is_run(tmp_path: Path) -> None:
    def broken(context: Context) -> Payload:
        raise ValueError("out of luck")

    status, state = _child(tmp_path, _stage(a=broken, b=lambda context: {"facts": {"x": 1}, "failures": []}))
    assert status == 0
    assert state["items"]["a"]["status"] == "failed"
    assert state["items"]["a"]["error"] == "ValueError: out of luck"
    assert "broken" in state["items"]["a"]["trace"]
    assert (state["items"]["b"]["status"], state["items"]["b"]["facts"]) == ("done", {"x": 1})
    assert complete(state)


def test_items_that_are_done_are_not_run_again_and_unfinished_ones_are(tmp_path: Path) -> None:
    calls: list[str] = []

    def done(context: Context) -> Payload:
        calls.append("done")
        return {}

    def twice(context: Context) -> Payload:
        calls.append("twice")
        return {"unfinished": calls.count("twice") < 2, "facts": {"calls": calls.count("twice")}}

    stage = _stage(done=done, twice=twice)
    _, state = _child(tmp_path, stage)
    assert pending(state) == ["twice"]
    _, state = _child(tmp_path, stage)
    assert complete(state)
    assert calls == ["done", "twice", "twice"]
    assert state["items"]["twice"]["facts"] == {"calls": 2}


def test_without_time_nothing_is_begun(tmp_path: Path) -> None:
    stage = Stage("s", "a test", 1.0, lambda plan: [Item("a", lambda context: {}, least=50.0)])
    _, state = _child(tmp_path, stage, seconds=1e-9)
    assert (state["planned"], state["items"]) == (["a"], {})


def test_a_lost_device_ends_the_process_and_the_next_leaves_the_contestant_out(tmp_path: Path) -> None:
    def run(context: Context) -> Payload:
        if "bad" not in context.excluded:
            raise compare.DeviceLostError("bad", RuntimeError("CUDA error"))
        return {"facts": {"excluded": context.excluded}}

    stage = _stage(a=run, b=lambda context: {})
    status, state = _child(tmp_path, stage)
    assert status == child.DEVICE_LOST
    assert pending(state) == ["a", "b"]
    status, state = _child(tmp_path, stage)
    assert status == 0
    assert complete(state)
    assert "CUDA error" in state["items"]["a"]["facts"]["excluded"]["bad"]


def test_a_contestant_that_spoils_two_items_is_left_out_of_the_others(tmp_path: Path) -> None:
    def run(context: Context) -> Payload:
        if "bad" not in context.excluded:
            raise compare.DeviceLostError("bad", RuntimeError("CUDA error"))
        return {"facts": {"excluded": context.excluded}}

    stage = _stage(a=run, b=run, c=run)
    statuses = [_child(tmp_path, stage)[0] for _ in range(3)]
    assert statuses == [child.DEVICE_LOST, child.DEVICE_LOST, 0]
    _, state = _child(tmp_path, stage)
    reasons = [item["facts"]["excluded"]["bad"] for item in state["items"].values()]
    assert [reason.startswith("left out after 2 items: ") for reason in reasons] == [False, False, True]


def test_the_child_says_whose_code_it_is_at(tmp_path: Path) -> None:
    file = child.running_file(Store(tmp_path), "s")
    seen: list[Any] = []

    def run(context: Context) -> Payload:
        seen.append(read_json(file))
        context.at("cuda", 60.0)
        seen.append(read_json(file))
        context.at("", None)
        seen.append(read_json(file))
        return {}

    _child(tmp_path, _stage(a=run))
    nobody = {"key": "a", "limit": 120.0, "contestant": "", "seconds": None}
    assert seen == [nobody, nobody | {"contestant": "cuda", "seconds": 60.0}, nobody]
    assert not file.exists()


SCRIPT = """
import os, sys, time
from pathlib import Path
from benchmarks.files import write_json
from benchmarks.gpu.store import Store, pending
store, keys = Store(Path(sys.argv[1])), sys.argv[2].split(",")
state = store.load("s")
state["planned"] = keys
store.save(state)
for key in pending(state):
    entry = state["items"].setdefault(key, {"attempts": 0})
    entry["attempts"] += 1
    store.save(state)
    contestant = "bad" if key.startswith("bad") and "bad" not in entry.get("excluded", {}) else ""
    limits = {"limit": 60.0, "contestant": contestant, "seconds": 0.3} if contestant else {"limit": 0.3}
    write_json(store.folder / "stages" / "s.running", {"key": key, **limits})
    if contestant:
        time.sleep(60) if key == "bad hangs" else os._exit(9)
    if key == "dies":
        print("last words", file=sys.stderr, flush=True)
        os._exit(9)
    if key == "hangs" or (key == "slow" and entry["attempts"] == 1):
        time.sleep(60)
    if key == "loses" and entry["attempts"] < 3:
        os._exit(17)
    entry["status"] = "done"
    store.save(state)
    (store.folder / "stages" / "s.running").unlink()
"""


def _supervised(
    tmp_path: Path, keys: str, seconds: float, monkeypatch: pytest.MonkeyPatch, grace: float
) -> dict[str, Any]:
    monkeypatch.setattr(supervise, "_GRACE", grace)
    stage = Stage("s", "a test", 100.0, lambda plan: [])
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), keys]
    return supervise.run_stage(Store(tmp_path), stage, seconds, lambda stage, out, left: command)


def test_death_and_hanging_are_blamed_on_the_item_and_the_rest_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = _supervised(tmp_path, "a,dies,b,hangs,c,loses,d", 60.0, monkeypatch, grace=0.5)
    status = {key: item["status"] for key, item in state["items"].items()}
    assert status == {
        "a": "done", "dies": "failed", "b": "done", "hangs": "failed", "c": "done", "loses": "done", "d": "done"
    }  # fmt: skip
    assert state["items"]["dies"]["error"] == "its process died with status 9"
    assert "last words" in state["items"]["dies"]["trace"]
    assert "time limit" in state["items"]["hangs"]["error"]
    assert state["complete"] is True


def test_hanging_and_death_are_blamed_on_the_contestant_where_it_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The item is tried again without it."""
    state = _supervised(tmp_path, "a,bad hangs,bad dies,b", 60.0, monkeypatch, grace=0.5)
    assert {item["status"] for item in state["items"].values()} == {"done"}
    excluded = {key: item.get("excluded") for key, item in state["items"].items()}
    assert excluded == {
        "a": None, "b": None, "bad hangs": {"bad": "it ran past its time limit and was ended"},
        "bad dies": {"bad": "its process died with status 9"},
    }  # fmt: skip


def test_an_item_cut_off_by_the_stage_is_run_again_on_resuming(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "_watch", _hasty(supervise._watch))
    state = _supervised(tmp_path, "a,slow,b", 6.0, monkeypatch, grace=10.0)
    assert state["complete"] is False
    assert pending(state) == ["slow", "b"]
    monkeypatch.undo()
    state = _supervised(tmp_path, "a,slow,b", 60.0, monkeypatch, grace=10.0)
    assert state["complete"] is True
    assert (state["items"]["slow"]["attempts"], state["items"]["a"]["attempts"]) == (2, 1)


def _hasty(watch: Any) -> Any:
    """The stage's time is over ten seconds before it is, so that the grace period need not be waited for."""
    return lambda process, store, stage, end: watch(process, store, stage, end - 15.0)


def test_a_stage_whose_process_never_gets_going_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage("s", "a test", 100.0, lambda plan: [])
    command = [sys.executable, "-c", "import sys; sys.exit('cannot import torch')"]
    state = supervise.run_stage(Store(tmp_path), stage, 60.0, lambda stage, out, left: command)
    assert state["complete"] is False
    assert "cannot import torch" in state["error"]
    assert tables.failures({"stages": {"s": state}})


def test_files_are_replaced_whole(tmp_path: Path) -> None:
    file = tmp_path / "a" / "x.json"
    write_json(file, {"a": 1})
    assert read_json(file) == {"a": 1}
    file.write_text('{"a": ')
    assert read_json(file) is None
    assert read_json(tmp_path / "missing.json") is None
    assert Store(tmp_path).load("s") == {"stage": "s", "planned": None, "items": {}, "seconds": 0.0}
    assert not complete(Store(tmp_path).load("s"))


# -- the command -------------------------------------------------------------------------------------------------------


def test_without_a_gpu_it_says_so_and_measures_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["--out", str(tmp_path / "out")], gpu=False) == 2
    assert "needs a CUDA GPU" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def _on_cpu(stage: Stage, out: Path, seconds: float) -> list[str]:
    code = (
        "from benchmarks.gpu import child; from benchmarks.gpu.device import HostDevice; "
        "from benchmarks.gpu.cases import Plan; "
        f"raise SystemExit(child.main({[stage.name, '--out', str(out), '--seconds', str(seconds)]!r}, "
        f"plan={TINY!r}, device=HostDevice()))"
    )
    return [sys.executable, "-c", code]


def test_the_whole_command_on_a_small_plan(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RMT_KERNELS_COMMIT", "0123456789")
    monkeypatch.setattr("benchmarks.environment._commit", lambda: "")
    monkeypatch.setattr(program, "STAGES", {"environment": STAGES["environment"]})
    arguments = ["--out", str(tmp_path)]
    assert program.main([*arguments, "--seconds", "1"], gpu=True, command=_on_cpu) == 3  # no time, nothing begun
    status = program.main([*arguments, "--resume"], gpu=True, command=_on_cpu)
    result = read_json(tmp_path / "gpu.json")
    assert result["environment"]["commit"] == "0123456789"
    assert result["environment"]["versions"]["torch"]
    assert {name: stage["complete"] for name, stage in result["stages"].items()} == {"environment": True}
    ceilings = result["stages"]["environment"]["items"]["ceilings"]["facts"]
    assert ceilings["copy_bytes_per_second"] > 0
    (dispatch,) = result["stages"]["environment"]["items"]["dispatch"]["failures"]
    assert "backend='auto' chooses" in dispatch  # "stock", which the small plan measures, is not what auto takes
    assert status == 1
    assert len(list(tmp_path.iterdir())) <= 8
    assert "report.html" in {file.name for file in tmp_path.iterdir()}

    seconds = {name: stage["seconds"] for name, stage in result["stages"].items()}
    assert program.main([*arguments, "--resume"], gpu=True, command=_refuse_to_start) == 1
    again = read_json(tmp_path / "gpu.json")
    assert {name: stage["seconds"] for name, stage in again["stages"].items()} == seconds
    assert "done before" in capfd.readouterr().out


def test_stages_run_in_the_order_given_and_each_has_its_share_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.environment._commit", lambda: "0123456789")
    begun: list[tuple[str, float]] = []

    def run_stage(store: Store, stage: Stage, seconds: float, command: Any) -> dict[str, Any]:
        begun.append((stage.name, seconds))
        assert store.load(stage.name)["commits"] == ["0123456789"]
        state = store.load(stage.name) | {"planned": ["a"], "items": {"a": {"status": "done"}}, "complete": True}
        store.save(state)
        return state

    monkeypatch.setattr(program, "run_stage", run_stage)
    arguments = ["--out", str(tmp_path), "--each", "100", "--stages", "decode", "sanitizer", "environment", "decode"]
    assert program.main(arguments, gpu=True) == 0
    assert begun == [("decode", 100.0), ("sanitizer", 100.0), ("environment", 100.0)]
    begun.clear()
    assert program.main(["--out", str(tmp_path), "--stages", "decode", "--seconds", "90"], gpu=True) == 0
    ((_, seconds),) = begun
    assert 60.0 < seconds < 70.0


@pytest.mark.parametrize(("proven", "wanted"), [(True, "cuda"), (False, "stock")])
def test_auto_must_choose_the_cuda_backend_where_it_is_proven(
    proven: bool, wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = tmp_path / "proven.json"
    write_json(entries, {"sm_90": {}} if proven else {"sm_80": {}})
    monkeypatch.setattr("benchmarks.gpu.about.PROVEN", entries)
    monkeypatch.setattr(cuda, "why_missing", "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))

    class Gpu(HostDevice):
        """Its tensors are the CPU's: what is asked is only what should be chosen."""

        torch = torch.device("cuda")

        def __init__(self) -> None:
            pass

    real = torch.randn

    def randn(*shape: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        return real(*shape, dtype=dtype)

    monkeypatch.setattr(torch, "randn", randn)
    (item,) = [item for item in STAGES["environment"].items(TINY) if item.key == "dispatch"]
    (said,) = item.run(replace(_context(tmp_path), device=Gpu()))["failures"]
    assert said.endswith(f"not {wanted!r}")


def _refuse_to_start(stage: Stage, out: Path, seconds: float) -> list[str]:
    raise AssertionError(f"{stage.name} was started again")


def test_every_stage_stays_within_ten_minutes() -> None:
    for stage in STAGES.values():
        assert stage.limit + supervise._GRACE < 600
        keys = [item.key for item in stage.items(FULL)]
        assert keys
        assert len(set(keys)) == len(keys)
        assert all(item.limit <= 600 - supervise._GRACE for item in stage.items(FULL))


# -- the test suite's stage --------------------------------------------------------------------------------------------

TESTS = """
import os, pytest

@pytest.mark.parametrize("number", range(6))
def test_passes(number):
    assert number < 6

def test_fails():
    assert [1, 2] == [1, 3], "lists differ"

@pytest.mark.skip(reason="not today")
def test_skipped():
    pass

def test_dies():
    os._exit(7)

def test_lost():
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

def test_other():
    pass
"""


def _tests(tmp_path: Path, text: str, select: str, **how: Any) -> Payload:
    file = tmp_path / "test_generated.py"
    file.write_text(text)
    work = tmp_path / "work"
    work.mkdir(exist_ok=True)
    context = Context(None, TINY, work, time.monotonic() + how.pop("seconds", 120.0), say=lambda line: None)
    return suite.run_tests(context, [str(file)], select, how.pop("shards", 2), ["-o", "addopts="])


def test_the_suite_survives_crashes_and_lists_failures(tmp_path: Path) -> None:
    found = _tests(tmp_path, TESTS, "test_generated")
    facts = found["facts"]
    assert facts["collected"] == 11
    assert facts["counts"] == {"passed": 7, "failed": 2, "skipped": 1, "crashed": 1}
    failed = {entry["id"].rpartition("::")[2]: entry["message"] for entry in facts["failed"]}
    assert set(failed) == {"test_fails", "test_dies", "test_lost"}
    assert "lists differ" in failed["test_fails"]
    assert "illegal memory access" in failed["test_lost"]
    assert found["failures"] == ["3 of 11 tests failed"]
    assert found["unfinished"] is False
    assert facts["skipped_because"] == {"Skipped: not today": 1}


def test_the_suite_goes_on_where_it_was_cut_off(tmp_path: Path) -> None:
    text = "import pytest, time\n@pytest.mark.parametrize('n', range(4))\ndef test_slow(n):\n    time.sleep(1.2)\n"
    first = _tests(tmp_path, text, "test_slow", seconds=1.0, shards=1)
    assert first["unfinished"] is True
    assert first["facts"]["counts"].get("passed", 0) < 4  # on a busy machine not one of them
    second = _tests(tmp_path, text, "test_slow", shards=1)
    assert second["unfinished"] is False
    assert second["facts"]["counts"] == {"passed": 4}
    assert second["failures"] == []


def test_a_test_that_hangs_ends_its_process_and_the_others_are_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suite, "_TEST_SECONDS", 0.5)
    text = "import time\ndef test_a():\n    pass\ndef test_hangs():\n    time.sleep(60)\ndef test_b():\n    pass\n"
    found = _tests(tmp_path, text, "test_generated", shards=1)
    assert found["facts"]["counts"] == {"passed": 2, "crashed": 1}
    (failed,) = found["facts"]["failed"]
    assert failed["id"].endswith("test_hangs")
    assert failed["message"] == "it ran past 0.5 s, and its process was ended"


def test_the_suite_says_when_nothing_was_tested(tmp_path: Path) -> None:
    skipped = "import pytest\n@pytest.mark.skip(reason='no device')\ndef test_a():\n    pass\n"
    assert _tests(tmp_path, skipped, "test_a", shards=1)["failures"] == ["no test ran: all were skipped"]


def test_a_file_that_cannot_be_collected_is_a_failure(tmp_path: Path) -> None:
    found = _tests(tmp_path, "import no_such_module\n", "test_a", shards=1)
    assert found["failures"]
    assert "no_such_module" in str(found["facts"]["failed"])


def test_what_was_cut_off_is_to_be_run_again_and_what_hung_is_not(tmp_path: Path) -> None:
    log = tmp_path / "a.jsonl"
    log.write_text('{"id": "a"}\n{"id": "a", "outcome": "crashed", "message": "x"}\n{"id": "b"}\n{"id": "b", "outc')
    assert set(read_log([log])) == {"a", "b"}
    cut_off(log)
    assert set(read_log([log])) == {"a"}
    log.write_text('{"id": "a"}\n{"id": "a", "outcome": "passed"}\n{"id": "b"}\n')
    cut_off(log)
    assert set(read_log([log])) == {"a"}


def test_half_a_line_of_a_log_is_passed_over(tmp_path: Path) -> None:
    log = tmp_path / "a.jsonl"
    log.write_text(
        '{"id": "a"}\n{"id": "a", "outcome": "passed", "seconds": 1, "message": ""}\n{"id": "b"}\n{"id": "c", '
    )
    assert {name: entry["outcome"] for name, entry in read_log([log]).items()} == {"a": "passed", "b": "crashed"}


def test_the_suites_files_exist_and_leave_out_what_is_a_stage_of_its_own() -> None:
    files = suite.test_files()
    assert {"tests/test_backends.py", "tests/test_determinism.py"} <= set(files)
    assert not [file for file in files if "gate" in file or "benchmarks" in file or "build" in file]


# -- programs ----------------------------------------------------------------------------------------------------------


def test_a_programs_status_and_last_words_are_recorded(tmp_path: Path) -> None:
    context = Context(None, TINY, tmp_path, time.monotonic() + 60)
    fine = programs.run_program(context, "a", [sys.executable, "-c", "print('built')"])
    assert (fine["facts"]["status"], fine["facts"]["tail"], fine["failures"]) == (0, "built\n", [])
    assert fine["facts"]["command"].startswith("python -c")
    bad = programs.run_program(context, "b", [sys.executable, "-c", "raise SystemExit('no compiler')"])
    assert bad["failures"] == ["exit status 1"]
    assert "no compiler" in bad["facts"]["tail"]
    late = programs.run_program(
        replace(context, deadline=time.monotonic() + 1), "c", [sys.executable, "-c", "import time; time.sleep(30)"]
    )
    assert late["failures"] == ["it ran past its time limit"]


def test_a_missing_module_is_a_failure_and_a_present_one_gives_its_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = Context(None, TINY, tmp_path, time.monotonic() + 60)
    missing = programs._module(context, "rmt_kernels.no_such.gate", [])
    assert missing["failures"] == ["there is no module rmt_kernels.no_such.gate"]
    (tmp_path / "present_gate.py").write_text(
        "import sys, pathlib\nassert sys.argv[1] == '--json'\npathlib.Path(sys.argv[2]).write_text('[1, 2]')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = programs._module(context, "present_gate", [])
    assert (found["facts"]["status"], found["facts"]["result"], found["failures"]) == (0, [1, 2], [])


# -- targets and the report --------------------------------------------------------------------------------------------

# Kernel time of each contestant over that of ours, in a made-up result.
FACTORS = {
    "flex": 1.6, "split_flash": 1.4, "split_cudnn": 1.1, "dense": 5.0, "dense_cudnn": 6.0, "naive": 12.0,
    "plain_flash": 1.2, "plain_cudnn": 0.8, "plain": 1.2, "again": 1.01, "sliced_flash": 1.3, "cuda": 1.1,
}  # fmt: skip


def _row(case: Case, which: str, name: str, seconds: float | None, rate: float = 300.0, **other: Any) -> compare.Record:
    every = {**contestants.decoders("reference", torch.zeros(1)), **entrants("reference", 2**40)}
    entrant = every.get(name, every["ours"])
    subject = compare._Subject(replace(entrant, name=name))
    row = compare._record(subject, case, torch.bfloat16, which)
    if seconds is not None:
        row["kernel"] = {"median": seconds, "q1": seconds * 0.99, "q3": seconds * 1.01, "rounds": 20, "by": "graph"}
        row["kernel_warm"] = row["kernel"]
        row["tflops"] = rate
        row["calls"] = {part: {"median": seconds + 2e-5, "q1": 0.0, "q3": 0.0} for part in ("call", "enqueue")}
        row["errors"] = {"out": {"rms": 2e-3, "max": 0.01, "eager_max": 0.01}}
    return row | other


def _state(stage: str, records: list[compare.Record], **other: Any) -> dict[str, Any]:
    item = {"status": "done", "attempts": 1, "seconds": 1.0, "records": records, "failures": [], "error": None}
    return {"stage": stage, "planned": ["all"], "items": {"all": item | other}, "seconds": 10.0, "complete": True}


def made_up(factors: dict[str, float] = FACTORS) -> dict[str, Any]:
    """A result with every speed stage, its rates rising with length."""
    rates = {512: 200.0, 1024: 300.0, 2048: 350.0, 4096: 380.0}
    stages: dict[str, Any] = {}
    for stage, passes in (("forward", ("forward",)), ("backward", ("backward", "forward+backward"))):
        records = []
        for which in passes:
            for case in filling(FULL):
                rate = (
                    rates[case.layout.tokens]
                    * (0.75 if which == "backward" else 1.0)
                    * (1 if case.head_dim > 64 else 0.9)
                )
                flop = case.forward_flop * compare.FLOP_FACTORS[which]
                time = flop / rate / 1e12
                records.append(_row(case, which, "ours", time, rate, peak_bytes=2**27))
                for name in (
                    "cuda",
                    "flex",
                    "split_flash",
                    "split_cudnn",
                    "dense",
                    "dense_cudnn",
                    "naive",
                    "plain_flash",
                    "plain_cudnn",
                    "again",
                ):
                    if name == "split_cudnn" and case.layout.write == 128:
                        records.append(_row(case, which, name, None, kind="refused", note="cuDNN has no such kernel"))
                    else:
                        records.append(
                            _row(case, which, name, time * factors[name], rate / factors[name], peak_bytes=2**28)
                        )
        stages[stage] = _state(stage, records)
    records = []
    for which in ("forward", "backward"):
        for case in short(FULL):
            time = 5e-6 + case.layout.tokens * (1e-8 if which == "forward" else 3e-8)
            for name in (
                "ours", "cuda", "flex", "split_flash", "split_cudnn", "dense", "plain_flash", "plain_cudnn", "plain"
            ):  # fmt: skip
                records.append(_row(case, which, name, time * factors.get(name, 1.0)))
    stages["short"] = _state("short", records)
    stages["decode"] = _state(
        "decode",
        [
            _row(decode_case(FULL, d), "forward", name, 1e-4, copy_share=share, bytes_per_second=3e12)
            for d in (64, 128)
            for name, share in (("ours", 0.65), ("cuda", 0.75))
        ],
    )
    stages["suite"] = _state(
        "suite",
        [],
        facts={"counts": {"passed": 200, "failed": 1}, "failed": [{"id": "t::a", "message": "assert 1 == 2"}]},
        failures=["1 of 201 tests failed"],
    )
    gpu = {
        "name": "A GPU",
        "driver_version": "1.2",
        "memory.total": "1 MiB",
        "power.limit": "700 W",
        "multiprocessors": 132,
    }
    about = {
        "gpu": gpu,
        "versions": {"torch": "2.11"},
        "commit": "abc",
        "date": "today",
        "command": "python -m benchmarks.gpu",
    }
    return {"environment": about, "stages": stages}


def _verdicts(results: dict[str, Any]) -> dict[str, str]:
    return {goal.what: goal.verdict for goal in targets.goals(results)}


def test_targets_that_are_reached_and_missed() -> None:
    found = _verdicts(made_up())
    assert found["forward against FlexAttention, T ≤ 1k"] == "reached"
    assert found["backward against FlexAttention"] == "reached"
    assert found["forward against SDPA with the dense mask, its fastest form"] == "reached"
    assert found["forward against the three-call split, cuDNN, T ≤ 1k"] == "partly measured"  # refused where M = 128
    assert found["forward, head_dim 128, T = 1024"] == "reached"
    assert found["forward, head_dim 64, T = 1024"] == "missed"  # 270 of 290
    assert found["backward, head_dim 128, T = 4096"] == "reached"
    assert found["stretch: forward, head_dim 128, T = 4096"] == "missed"
    assert found["batch 1, T = 512: kernel time of the fastest plain causal SDPA's"] == "reached"  # 1 / 0.8
    assert found["decoding: bandwidth as a share of the copy's"] == "reached"


def test_each_target_is_missed_where_the_opponent_is_faster() -> None:
    factors = FACTORS | {"flex": 1.25, "dense": 2.9, "split_flash": 0.99, "split_cudnn": 0.99, "plain_cudnn": 0.7}
    found = _verdicts(made_up(factors))
    for what, verdict in found.items():
        if "against" in what and "T > 1k" not in what and not what.startswith("CUDA"):
            assert verdict == "missed", what
    assert found["forward against FlexAttention, T > 1k"] == "reached"
    assert found["batch 1, T = 512: kernel time of the fastest plain causal SDPA's"] == "missed"


def test_call_overhead_compares_with_sdpas_default_call() -> None:
    results = made_up()
    for record in targets.records_of(results, "short"):
        if record["contestant"] == "plain":
            record["calls"]["enqueue"]["median"] = 1e-5
        elif record["contestant"] == "ours":
            record["calls"]["enqueue"]["median"] = 1.6e-5
    (goal,) = [goal for goal in targets.goals(results) if goal.what.startswith("batch 1, T = 512: call overhead")]
    assert goal.worst is not None
    assert goal.worst[0] == "T=512 M=16 D=64"
    assert goal.worst[1] == pytest.approx(1.6)
    assert goal.verdict == "missed"


def test_targets_of_the_cuda_backend() -> None:
    found = _verdicts(made_up())  # a tenth slower than the Triton backend
    assert found["CUDA: forward, head_dim 128, T = 1024"] == "reached"  # 300 / 1.1 of 260
    assert found["CUDA: forward, head_dim 128, T = 4096"] == "reached"  # 380 / 1.1 of 319
    assert found["CUDA: backward, head_dim 128, T = 4096"] == "missed"  # 285 / 1.1 of 266
    assert found["CUDA: forward against Triton, batch 1, T ≤ 512"] == "missed"
    assert found["CUDA: decoding: bandwidth as a share of the copy's"] == "reached"
    faster = _verdicts(made_up(FACTORS | {"cuda": 0.95}))
    assert faster["CUDA: forward, head_dim 128, T = 2048"] == "reached"
    assert faster["CUDA: backward, head_dim 128, T = 4096"] == "reached"
    for which in ("forward", "backward"):
        assert faster[f"CUDA: {which} against Triton, batch 1, T ≤ 512"] == "reached"


def test_the_cuda_backends_short_targets_are_of_both_widths_and_need_all_their_cases() -> None:
    results = made_up(FACTORS | {"cuda": 0.95})
    every = results["stages"]["short"]["items"]["all"]["records"]
    for record in every:
        wide = record["sizes"]["head_dim"] == 128
        if record["contestant"] == "cuda" and wide and record["pass"] == "backward":
            record["kernel"] = record["kernel"] | {"median": 1.0}
        record["calls"]["enqueue"]["median"] = {"cuda": 9e-6, "plain": 1e-5}.get(record["contestant"], 1.0)
    found = _verdicts(results)
    overhead = "CUDA: call overhead of SDPA's (host time of a call), batch 1, T ≤ 512"
    assert found["CUDA: forward against Triton, batch 1, T ≤ 512"] == "reached"
    assert found["CUDA: backward against Triton, batch 1, T ≤ 512"] == "missed"
    assert found[overhead] == "partly measured"  # nothing of forward + backward
    both = [record | {"pass": "forward+backward"} for record in every if record["pass"] == "forward"]
    every.extend(both)
    assert _verdicts(results)[overhead] == "reached"
    both[1]["calls"] = {"enqueue": {"median": 1.1e-5}}
    assert _verdicts(results)[overhead] == "missed"
    results["stages"]["short"]["items"]["all"]["records"] = [r for r in every if r["sizes"]["tokens"] != 256]
    assert _verdicts(results)["CUDA: forward against Triton, batch 1, T ≤ 512"] == "partly measured"


def test_targets_stand_beside_what_was_measured() -> None:
    table = tables.target_table(made_up())
    rows = {row[0]: row for row in table.rows}
    assert table.header == ["what", "wanted", "measured, worst case", "of wanted", "reached by", "verdict"]
    reached = rows["CUDA: decoding: bandwidth as a share of the copy's"]
    assert reached[1:] == ["≥ 70 %", "75 % at D=128", "1.07x", "2 of 2", "reached"]
    nothing = {row[0]: row for row in tables.target_table({"stages": {}}).rows}
    unmeasured = nothing["CUDA: forward, head_dim 128, T = 1024"]
    assert unmeasured[1:] == ["≥ 260 TFLOP/s", "-", "-", "0 of 0 (2 asked for)", "not measured"]


def test_what_was_not_measured_is_not_reached() -> None:
    assert set(_verdicts({"stages": {}}).values()) == {"not measured"}
    wrong = made_up()
    for record in targets.records_of(wrong, "forward"):
        if record["contestant"] == "ours":
            record.update(kernel=None, tflops=None, kind="wrong", note="WRONG: out", match=False)
    found = _verdicts(wrong)
    assert found["forward against FlexAttention, T ≤ 1k"] == "not measured"
    assert found["forward, head_dim 128, T = 1024"] == "not measured"


def test_a_target_of_which_only_some_cases_were_measured_is_not_reached() -> None:
    results = made_up()
    item = results["stages"]["forward"]["items"]["all"]
    item["records"] = [record for record in item["records"] if record["memory_rows"] == 16]
    found = _verdicts(results)
    assert found["forward against FlexAttention, T ≤ 1k"] == "partly measured"
    assert found["forward, head_dim 128, T = 1024"] == "partly measured"
    assert found["backward against FlexAttention"] == "reached"


def test_report_of_a_result_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "result.json"
    file.write_text(json.dumps(made_up()))
    out = tmp_path / "out"
    assert report.main([str(file), "--out", str(out)]) == 0
    page, markdown = (out / "report.html").read_text(), (out / "report.md").read_text()
    assert {f.name for f in out.glob("*.png")} == {"forward.png", "backward.png", "ratios.png", "short.png"}
    assert page.count("data:image/png;base64,") == 4
    assert "src='http" not in page
    assert "href=" not in page
    for text in (page, markdown):
        assert "cuDNN has no such kernel" in text
        assert "CUDA backend, backward alone: times faster" in text
        assert "against Triton" in text
        assert "assert 1 == 2" in text
        assert "FAILED suite, all: 1 of 201 tests failed" in text
    printed = capsys.readouterr().out
    assert "forward against FlexAttention, T ≤ 1k" in printed
    assert len(printed) < 16000
    assert all(f"({f.name})" in markdown for f in out.glob("*.png"))


def test_report_of_almost_nothing(tmp_path: Path) -> None:
    empty: dict[str, Any] = {"environment": {}, "stages": {}}
    page = report.render(empty, tmp_path).read_text()
    assert "not measured" in page
    halfway = {
        "environment": {},
        "stages": {"forward": {"stage": "forward", "planned": ["a", "b"], "seconds": 1.0, "items": {"a": {
            "status": "failed", "error": "its process died with status 9", "trace": "", "attempts": 1}}}},
    }  # fmt: skip
    assert "its process died with status 9" in report.render(halfway, tmp_path).read_text()


def test_report_without_matplotlib_keeps_its_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "benchmarks.gpu.plots", None)
    page = report.render(made_up(), tmp_path).read_text()
    assert "no pictures" in page
    assert "Times faster" not in page
    assert "Forward: visible TFLOP/s" in page


def test_report_refuses_what_is_no_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(SystemExit):
        report.main([str(tmp_path / "x.json")])
    assert "not a result of" in capsys.readouterr().err


def test_the_stage_process_without_a_gpu_says_so(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = [sys.executable, "-m", "benchmarks.gpu.child", "memory", "--out", str(tmp_path), "--seconds", "9"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no GPU" in done.stderr


def test_ours_is_the_public_call() -> None:
    inputs = make_inputs(SMALL, torch.float32)
    out = entrants("reference", 2**40)["ours"].build(SMALL, inputs)()
    want = segment_attention(inputs.query, inputs.key, inputs.value, SMALL.layout, backend="reference")
    assert torch.equal(out, want)
