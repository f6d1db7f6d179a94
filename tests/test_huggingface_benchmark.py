"""The benchmark around models of transformers: it checks before it times, measures what it says, and can say no."""

from __future__ import annotations

import copy
import gc
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from benchmarks.gpu.device import HostDevice
from benchmarks.gpu.stage import Context
from benchmarks.huggingface import __main__ as program
from benchmarks.huggingface import contestants, generation, limits, on_gpu, runs, tables
from benchmarks.huggingface.check import Checker
from benchmarks.huggingface.contestants import READERS, TRAINERS, Contestant
from benchmarks.huggingface.models import EXACT, OURS, SHAPES, Shape, Subject
from benchmarks.measure import Check

GPT2 = Shape("gpt2-small", "gpt2", 2, 32, 2, 2, 64, 61, segment=16, memory=4)
LLAMA = Shape("llama-1b", "llama", 2, 32, 4, 2, 64, 61, segment=16, memory=4)
TINY = {shape.name: shape for shape in (GPT2, LLAMA)}
PLAN = runs.Plan(
    "tiny", tuple(TINY), segments=3, rounds=2, budget=30.0, read=(2, 6), read_rounds=2, read_budget=30.0, behind=(0, 2),
    turns=4, samples=1,
)  # fmt: skip
CPU = torch.device("cpu")
EAGER = pytest.mark.filterwarnings("ignore:replay_step runs without CUDA graphs")


@pytest.fixture(autouse=True, scope="module")
def _quick_collections() -> Iterator[None]:
    """Each weighing collects garbage, which takes half a second with all that transformers has imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "SHAPES", TINY)


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    """A real run of everything, on models so small that its times mean nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "SHAPES", TINY)
        results = runs.run(PLAN, CPU, progress=False)
    here = {"cpu": "a CPU", "cores": 1, "threads": 1, "kernel_isa": "none", "vector_units": []}
    versions = {"rmt_kernels": "0", "torch": "0", "python": "0"}
    results["environment"] = {"device": here, "versions": versions, "commit": "0", "date": "now", "command": "it"}
    return json.loads(json.dumps(results))  # type: ignore[no-any-return]


# -- correctness -------------------------------------------------------------------------------------------------------


def _check(contestant: Contestant, shape: Shape, backward: bool) -> Check:
    checker = Checker(shape, torch.bfloat16, CPU, {"it": contestant}, segments=2, backward=backward)
    return checker("it", Subject(shape, contestant.attention, torch.bfloat16))


@EAGER
@pytest.mark.parametrize("shape", TINY.values(), ids=lambda shape: shape.kind)
@pytest.mark.parametrize("backward", [True, False], ids=["training", "reading"])
def test_every_contestant_is_right(shape: Shape, backward: bool) -> None:
    every = TRAINERS if backward else READERS
    checker = Checker(shape, torch.bfloat16, CPU, every, segments=2, backward=backward)
    for name, contestant in every.items():
        found = checker(name, Subject(shape, contestant.attention, torch.bfloat16))
        assert found.ok, (name, found.reason)
        assert {what.split(", ")[1] for what in found.errors} == {"float32", "bfloat16"}


def _step(loss: Callable[[Subject, Tensor], Tensor]) -> Contestant:
    return Contestant("it", "a contestant", contestants._stock(loss))


def _detached(subject: Subject, ids: Tensor) -> Tensor:
    losses, memory, size = [], subject.memory.expand(len(ids), -1, -1), subject.shape.segment
    for first in range(0, ids.shape[1], size):
        m, piece = memory.shape[1], ids[:, first : first + size]
        hidden = subject.rows(torch.cat([memory, subject.embed(piece), memory], dim=1))
        wanted = ids[:, first + 1 : first + size + 1].flatten()
        logits = subject.logits(hidden[:, m:-m]).flatten(0, 1)[: len(wanted)]
        losses.append(torch.nn.functional.cross_entropy(logits, wanted, reduction="sum"))
        memory = hidden[:, -m:].detach()
    total: Tensor = torch.stack(losses).sum() / (ids.numel() - len(ids))
    return total


def _causal(subject: Subject, ids: Tensor) -> Tensor:
    rows = subject.mask.shape[-1]
    subject.mask = torch.triu(torch.full_like(subject.mask, torch.finfo(subject.dtype).min), 1)
    assert subject.mask.shape == (1, 1, rows, rows)
    return contestants.authors_loss(subject, ids)


@pytest.mark.parametrize(
    ("loss", "reason"),
    [
        (lambda s, ids: 1.001 * contestants.authors_loss(s, ids), "relative error"),
        (lambda s, ids: contestants.authors_loss(s, ids) * float("nan"), "relative error"),
        (lambda s, ids: contestants.authors_loss(s, ids[:, : -s.shape.segment]), "relative error"),
        (_detached, "gradient of"), (_causal, "relative error"),
    ],
    ids=["scaled", "NaN", "a segment short", "memory detached", "another mask"],
)  # fmt: skip
def test_a_wrong_step_has_no_time(loss: Callable[[Subject, Tensor], Tensor], reason: str) -> None:
    bench = runs.Bench(GPT2, PLAN, CPU, trainers={"authors": TRAINERS["authors"], "it": _step(loss)})
    records = bench.run("train")
    assert records[0]["seconds"]
    wrong = records[1]
    assert (wrong["match"], wrong["seconds"], wrong["peak_bytes"], wrong["rounds"]) == (False, None, None, [])
    assert wrong["note"].startswith("WRONG: ")
    assert reason in wrong["note"]
    results = {"device": "cpu", "dtype": "x", "models": {GPT2.name: bench.described()}, "records": records}
    assert "WRONG" in tables.train_table(results, GPT2.name).terminal()
    (said,) = limits.failures(results)
    assert "a contestant: WRONG" in said


@pytest.mark.parametrize(
    "read",
    [
        lambda s, ids: contestants.authors_pass(s, ids[:, : s.shape.segment])[1],
        lambda s, ids: 1.001 * contestants.authors_pass(s, ids)[1],
        lambda s, ids: contestants.authors_pass(s, ids)[1] * float("nan"),
    ],
    ids=["one segment", "scaled", "NaN"],
)
def test_a_wrong_reader_is_found(read: Callable[[Subject, Tensor], Tensor]) -> None:
    @torch.no_grad()
    def step(subject: Subject, ids: Tensor) -> Tensor:
        return read(subject, ids)

    found = _check(Contestant("it", "it", lambda subject: lambda ids: step(subject, ids)), GPT2, backward=False)
    assert not found.ok
    assert found.reason.startswith("memory: relative error")


def test_a_contestant_that_fails_is_recorded_and_the_others_are_timed() -> None:
    calls = []

    def late(subject: Subject, ids: Tensor) -> Tensor:
        calls.append(ids.shape[1])
        if len(calls) > 3:  # after both checks and the weighing
            raise torch.OutOfMemoryError("too large")
        return contestants.authors_loss(subject, ids)

    def never(subject: Subject, ids: Tensor) -> Tensor:
        raise RuntimeError("broken\nand more")

    trainers = {"authors": TRAINERS["authors"], "late": _step(late), "never": _step(never)}
    trainers = {name: replace(contestant, name=name) for name, contestant in trainers.items()}
    records = {record["contestant"]: record for record in runs.Bench(GPT2, PLAN, CPU, trainers=trainers).run("train")}
    assert len(records["authors"]["rounds"]) == PLAN.rounds
    assert (records["late"]["note"], records["late"]["seconds"]) == ("out of memory", None)
    assert records["never"]["note"] == "failed: RuntimeError: broken"


@pytest.mark.parametrize("shape", TINY.values(), ids=lambda shape: shape.kind)
def test_generated_tokens_are_those_of_recomputation(shape: Shape) -> None:
    assert generation.check_tokens(shape, CPU).reason == ""
    ours, stock = Subject(shape, OURS, torch.bfloat16), Subject(shape, "sdpa", torch.bfloat16)
    found = generation.check_cached(ours, stock)
    assert found.ok, found.reason
    assert ours.rmt is not None
    with torch.no_grad():
        ours.rmt.initial_memory.neg_()
    assert "logits: relative error" in generation.check_cached(ours, stock).reason


def test_recomputation_is_what_a_pass_over_all_segments_predicts() -> None:
    subject = Subject(GPT2, EXACT, torch.float64)
    text = subject.inputs(3)
    with torch.no_grad():
        every, memory = contestants.authors_pass(subject, text)
    for length in (1, 15, 16, 17, 32, 33, 48):
        found = generation.Recomputed(subject, text[:, :length])
        torch.testing.assert_close(found.logits(), every[:, length - 1])
    torch.testing.assert_close(generation.Recomputed(subject, text).close(), memory)


def test_other_tokens_are_found() -> None:
    def forgetful(subject: Subject, prompt: Tensor, count: int) -> Tensor:
        assert subject.rmt is not None
        with torch.no_grad():
            subject.rmt.initial_memory.zero_()
        return generation.generate(subject, prompt, count)

    def off(subject: Subject, prompt: Tensor, count: int) -> Tensor:
        found = generation.generate(subject, prompt, count)
        found[:, -1] = (found[:, -1] + 1) % subject.shape.vocabulary
        return found

    assert "tokens: the" in generation.check_tokens(GPT2, CPU, forgetful).reason
    assert "tokens: the 32. of 32 after 8 differs" in generation.check_tokens(GPT2, CPU, off).reason


def test_subjects_have_the_same_weights_rounded() -> None:
    one, other = Subject(GPT2, "sdpa", torch.bfloat16), Subject(GPT2, OURS, torch.bfloat16)
    exact = Subject(GPT2, EXACT, torch.float32, weights=torch.bfloat16)
    assert set(one.parameters) == set(other.parameters) == set(exact.parameters)
    for name, parameter in one.parameters.items():
        assert torch.equal(parameter, other.parameters[name])
        assert torch.equal(parameter.float(), exact.parameters[name])
    assert one.lm.config._attn_implementation == "sdpa"
    assert exact.lm.config._attn_implementation == EXACT


# -- what is measured --------------------------------------------------------------------------------------------------


def test_every_part_of_every_model_is_measured(measured: dict[str, Any]) -> None:
    assert limits.failures(measured) == []
    for model in TINY:
        train = {record["contestant"]: record for record in limits.find(measured, "train", model)}
        gelu = {"by_segment_gelu"} if model.startswith("gpt2") else set()
        assert set(train) == {"authors", "by_segment", "checkpoint", "full", "replay"} | gelu
        for record in train.values():
            assert len(record["rounds"]) == PLAN.rounds
            assert record["tokens_per_second"] == pytest.approx(48 / record["seconds"]["median"])
            assert record["gradient_bytes"] == measured["models"][model]["parameter_bytes"]
        assert train["checkpoint"]["peak_bytes"] < train["authors"]["peak_bytes"]
        assert train["replay"]["peak_bytes"] < train["full"]["peak_bytes"]
        prefill = limits.find(measured, "prefill", model)
        assert [record["tokens"] for record in prefill] == 3 * [32] + 3 * [96]
        assert [bool(record["seconds"]) for record in prefill] == 3 * [False] + 3 * [True]
        assert limits._growth(limits.find(measured, "prefill", model, "ours")) <= 1.0  # type: ignore[operator]
        assert limits._growth(limits.find(measured, "prefill", model, "authors")) > 20  # type: ignore[operator]
        generated = limits.find(measured, "generate", model)
        assert [record.get("behind") for record in generated] == [0, 2, None]
        assert [len(record["rounds"]) for record in generated] == [4, 4, 0]
        assert len(generated[-1]["places"]) == 4
        assert all(record["tokens_per_second"] > 0 for record in generated)
    assert {goal.verdict for goal in limits.goals(measured)} <= {"reached", "missed"}


def test_recomputation_counts_every_place_and_the_border() -> None:
    ours, stock = (Subject(GPT2, attention, torch.float32) for attention in (OURS, "sdpa"))
    found = generation.measure(ours, stock, (0,), turns=4, samples=2)
    assert found["tokens_a_turn"] == 4
    expected = found["border"] + sum(4 * sum(values) / 2 for values in found["places"])
    assert found["recompute_seconds"] == pytest.approx(expected)
    with pytest.raises(ValueError, match="turns must divide the segment"):
        generation.measure(ours, stock, (0,), turns=5, samples=1)


def test_the_models_are_those_of_the_targets() -> None:
    gpt2, llama = SHAPES["gpt2-small"], SHAPES["llama-1b"]
    assert (gpt2.layers, gpt2.width, gpt2.heads, gpt2.vocabulary) == (12, 768, 12, 50257)
    assert (llama.layers, llama.width, llama.heads, llama.kv_heads, llama.inner) == (16, 2048, 32, 8, 8192)
    assert {(shape.segment, shape.memory) for shape in (gpt2, llama)} == {(512, 16)}
    assert runs.CPU.segments == 4
    assert max(runs.CUDA.read) * llama.segment == 131_072
    for shape in SHAPES.values():
        small = shape.small()
        assert small.heads % small.kv_heads == 0
        assert small.width // small.heads == shape.width // shape.heads
        assert runs.CPU.dtype is torch.bfloat16


# -- targets -----------------------------------------------------------------------------------------------------------


def _with(measured: dict[str, Any], part: str, contestant: str, **fields: Any) -> dict[str, Any]:
    changed = copy.deepcopy(measured)
    for record in limits.find(changed, part, "gpt2-small", contestant):
        record.update(fields)
    return changed


@pytest.mark.parametrize(
    ("part", "against", "ours", "field", "values", "what"),
    [
        ("train", "authors", "full", "tokens_per_second", (130.0, 129.0), "training step: tokens/s"),
        ("train", "authors", "replay", "peak_bytes", (50, 51), "training step: the authors' loop's peak"),
        ("generate", "recompute", "cached_2", "tokens_per_second", (500.0, 499.0), "generation: tokens/s"),
    ],
)
def test_targets_are_reached_or_missed(
    measured: dict[str, Any], part: str, against: str, ours: str, field: str, values: tuple[float, float], what: str
) -> None:
    for value, verdict in zip(values, ("reached", "missed"), strict=True):
        results = _with(_with(measured, part, against, **{field: 100}), part, ours, **{field: value})
        label = limits.find(results, part, "gpt2-small", ours)[0]["label"]
        (row,) = [
            row for row in tables.targets(results).rows if row[0].startswith(what) and f"small, {label}" in row[1]
        ]
        assert row[4] == verdict


def test_cost_behind_and_constant_memory_are_judged(measured: dict[str, Any]) -> None:
    slow = _with(_with(measured, "generate", "cached_0", rounds=[1.0] * 4), "generate", "cached_2", rounds=[1.06] * 4)
    (goal,) = [goal for goal in limits.goals(slow) if "most segments behind" in goal.what]
    assert goal.values["gpt2-small"] == pytest.approx(1.06)
    assert not goal.met(1.06)
    longer = copy.deepcopy(measured)
    limits.find(longer, "prefill", "gpt2-small", "ours")[-1]["peak_bytes"] *= 2
    (goal,) = [goal for goal in limits.goals(longer) if "between lengths" in goal.what]
    assert goal.verdict == "missed"
    gpu = copy.deepcopy(measured) | {"device": "cuda"}
    assert [goal.bound for goal in limits.goals(gpu)][:3] == [2.0, 2.0, 3.0]


def test_other_models_have_no_targets_and_what_was_not_run_no_table(measured: dict[str, Any]) -> None:
    renamed = json.loads(json.dumps(measured).replace("gpt2-small", "another").replace("llama-1b", "more"))
    assert limits.goals(renamed) == []
    assert next(table.title for table in tables.tables(renamed)).startswith("Training step")
    only = measured | {"records": [record for record in measured["records"] if record["part"] == "prefill"]}
    assert len(tables.tables(only)) == 3


# -- the program -------------------------------------------------------------------------------------------------------


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    found = tmp_path / "page.md"
    found.write_text("before\n<!-- huggingface:start -->\nold\n<!-- huggingface:end -->\nafter\n")
    monkeypatch.setattr(program, "PAGE", found)
    monkeypatch.setattr(program, "PICTURE", tmp_path / "picture.png")
    monkeypatch.setattr(program, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(program, "QUICK", replace(PLAN, models=("gpt2-small",), rounds=2, turns=2, behind=(0, 1)))
    return found


def test_quick_writes_and_saves(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = page.parent / "out"
    assert program.main(["--quick", "--device", "cpu", "--out", str(out), "--save", "it"]) == 0
    shown = capsys.readouterr().out
    for text in (
        "targets",
        "Training step, 3 segments",
        "Reading 96 tokens",
        "Greedy generation of 16",
        "transformers",
    ):
        assert text in shown
    saved = page.parent / "results" / "it.json"
    assert json.loads(saved.read_text()) == json.loads((out / "huggingface.json").read_text())
    text = page.read_text()
    assert text.startswith("before\n<!-- huggingface:start -->\n\n![")
    assert text.endswith("<!-- huggingface:end -->\nafter\n")
    assert "old" not in text
    assert text.count("| contestant |") == 2
    picture = page.parent / "picture.png"
    assert picture.stat().st_size > 10_000
    picture.unlink()
    assert program.main(["--render", str(saved)]) == 0
    assert page.read_text() == text
    assert picture.exists()


def test_what_cannot_be_done_is_refused(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = page.parent / "other.json"
    other.write_text("{}")
    wrong = [["--render", str(other)], ["--render", str(page.parent / "none.json")], ["--only", "nothing"]]
    if not torch.cuda.is_available():
        wrong.append(["--device", "cuda"])
    for arguments in wrong:
        with pytest.raises(SystemExit):
            program.main(arguments)
    page.write_text("no block")
    with pytest.raises(SystemExit):
        program.main(["--quick", "--save", "it"])
    assert "has no block" in capsys.readouterr().err


def test_a_wrong_result_is_the_exit_status(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "check_tokens", lambda *given: Check(False, "tokens: others"))
    arguments = ["--quick", "--device", "cpu", "--only", "generate", "--out", str(page.parent)]
    assert program.main(arguments) == 1


def test_the_gpu_stage_on_a_stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.huggingface.models.SHAPES", TINY)
    monkeypatch.setattr(runs, "QUICK", PLAN)
    said: list[str] = []
    items = {}
    context = Context(HostDevice(), None, tmp_path, time.monotonic() + 300, say=said.append)  # type: ignore[arg-type]
    stage = {item.key: item for item in on_gpu.huggingface_items(("gpt2-small", "llama-1b"))}
    assert list(stage) == [f"{model}, {part}" for model in ("gpt2-small", "llama-1b") for part in runs.PARTS]
    for key in ("gpt2-small, prefill", "llama-1b, generate"):
        payload = stage[key].run(context)
        assert payload["failures"] == []
        items[key] = {"status": "done", **payload}
    state = json.loads(json.dumps({"stages": {"huggingface": {"items": items}}}))
    found = on_gpu.collect(state)
    assert [(record["model"], record["part"]) for record in found["records"]] == [
        *[("gpt2-small", "prefill")] * 6, *[("llama-1b", "generate")] * 3
    ]  # fmt: skip
    assert len(tables.tables(found)) == 3
    assert any("tokens/s" in line for line in said)
    assert tables.tables(on_gpu.collect({})) == []
    monkeypatch.setattr(on_gpu, "find_spec", lambda name: None)
    (item, *_) = on_gpu.huggingface_items(("gpt2-small",))
    assert "not installed" in item.run(context)["facts"]["left out"]
