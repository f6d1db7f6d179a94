"""The benchmarks measure what they say: cases, the check before the clock, turns, memory, and the report."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import contestants, measure, report, runs, tables
from benchmarks.cases import LONG, PUBLISHED, TARGET, Case, Inputs, find, make_inputs, of_length
from benchmarks.contestants import CONTESTANTS, Contestant, opponents, plain_form
from benchmarks.environment import environment
from rmt_kernels import SegmentLayout, explain, reference_attention
from rmt_kernels.backends import cpu

SMALL = Case("small", SegmentLayout.rmt_decoder(40, 5), 2, 4, 2, 16, "a test")
STOCK = ("dense", "split", "plain", "naive")


# -- cases -------------------------------------------------------------------------------------------------------------


def test_cases_have_names_of_their_own_and_cover_every_preset() -> None:
    names = [case.name for case in (*PUBLISHED, TARGET, LONG)]
    assert len(set(names)) == len(names)
    assert {case.layout.name for case in PUBLISHED} == {
        "rmt_decoder", "causal", "rmt_encoder", "transformer_xl", "memory_transformer", "memory_bottleneck",
        "memformer_read", "memformer_write", "membart",
    }  # fmt: skip
    assert any(case.layout.window for case in PUBLISHED)
    assert any(case.heads > case.kv_heads for case in PUBLISHED)


@pytest.mark.parametrize("case", [*PUBLISHED, TARGET], ids=lambda case: case.name)
def test_inputs_fit_the_case(case: Case) -> None:
    inputs = make_inputs(case, torch.bfloat16)
    explain(inputs.query, inputs.key, inputs.value, case.layout)  # raises where shapes disagree with the layout
    assert inputs.grad.shape == inputs.query.shape
    assert case.source
    assert find(case.name) is case


def test_inputs_are_the_same_every_time_and_in_every_dtype() -> None:
    first, second = make_inputs(SMALL, torch.float32), make_inputs(SMALL, torch.float32)
    assert torch.equal(first.value, second.value)
    assert torch.equal(first.value.bfloat16(), make_inputs(SMALL, torch.bfloat16).value)
    assert not torch.equal(first.value, make_inputs(SMALL, torch.float32, seed=1).value)
    assert not torch.equal(first.query, first.grad)


def test_unknown_case_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown case 'gpt5'.*rmt_bert"):
        find("gpt5")


def test_flop_count_visible_entries_only() -> None:
    case = Case("c", SegmentLayout.causal(4, 0), 3, 2, 2, 8, "a test")
    assert case.forward_flop == 4 * 10 * 8 * 2 * 3


# -- contestants -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "form"),
    [
        (SegmentLayout.rmt_encoder(9, 2), "full"), (SegmentLayout.memformer_read(9, 2), "full"),
        (SegmentLayout.causal(9, 2), "causal"), (SegmentLayout.rmt_decoder(9, 2), "ceiling"),
        (SegmentLayout.membart(9, 2), "ceiling"), (SegmentLayout.transformer_xl(9, 9, window=9), None),
        (SegmentLayout.memformer_write(9, 2), None),
    ],
)  # fmt: skip
def test_plain_attention_counts_as_the_same_only_where_it_is(layout: SegmentLayout, form: str | None) -> None:
    assert plain_form(layout) == form


@pytest.mark.parametrize("name", STOCK)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_stock_contestants_pass_the_check(name: str, dtype: torch.dtype) -> None:
    prepared = measure.prepare(CONTESTANTS[name], SMALL, dtype, True)
    assert prepared.step is not None, prepared.note
    assert prepared.check is not None
    assert set(prepared.check.errors) == {"out", "grad query", "grad key", "grad value"}


@pytest.mark.skipif(bool(cpu.why_missing), reason="the compiled CPU module is missing")
@pytest.mark.parametrize("backward", [False, True])
def test_ours_passes_the_check(backward: bool) -> None:
    prepared = measure.prepare(CONTESTANTS["ours"], SMALL, torch.bfloat16, backward)
    assert prepared.step is not None, prepared.note


def test_ours_says_why_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "why_missing", "it was not built")
    (row,) = measure.measure(SMALL, torch.float32, False, ["ours"], rounds=1, warmup=0.0)
    assert row["note"] == "it was not built"
    assert row["seconds"] is None


def test_opponents_are_those_that_compute_the_same() -> None:
    assert opponents(SMALL, torch.float32) == ("dense", "split", "naive")
    assert opponents(find("causal_gpt2_512"), torch.float32) == ("dense", "split", "plain", "naive")
    assert opponents(find("membart"), torch.float32) == ("dense", "naive")
    assert opponents(LONG, torch.bfloat16) == ("dense", "split")


def test_flex_states_that_it_has_no_backward() -> None:
    (row,) = measure.measure(SMALL, torch.float32, True, ["flex"], rounds=1, warmup=0.0)
    assert "no backward on the CPU" in row["note"]


# -- the check ---------------------------------------------------------------------------------------------------------


def _contestant(compute: Callable[[Inputs], Tensor], name: str = "ours") -> Contestant:
    return Contestant(name, name, lambda case, inputs: lambda: compute(inputs), lambda case, dtype, backward: None)


def _exact(inputs: Inputs, layout: SegmentLayout = SMALL.layout) -> Tensor:
    return reference_attention(inputs.query, inputs.key, inputs.value, layout)[0]


def _wrong_in_one_entry(inputs: Inputs) -> Tensor:
    out = _exact(inputs).clone()
    out[0, 0, 7, 3] += 1e-3
    return out


def _nan_in_one_entry(inputs: Inputs) -> Tensor:
    out = _exact(inputs).clone()
    out[-1, -1, -1, -1] = float("nan")
    return out


def _other_mask(inputs: Inputs) -> Tensor:
    return _exact(inputs, SegmentLayout.causal(40, 5))


def _wrong_gradient(inputs: Inputs) -> Tensor:
    return _exact(replace(inputs, value=inputs.value * 1.001 - inputs.value.detach() * 0.001))


@pytest.mark.parametrize(
    ("compute", "reason"),
    [
        (_wrong_in_one_entry, "out: largest error"), (_nan_in_one_entry, "out has values that are not finite"),
        (_other_mask, "out: largest error"), (_wrong_gradient, "grad value: RMS error ratio"),
    ],
)  # fmt: skip
def test_a_wrong_contestant_gets_no_time(compute: Callable[[Inputs], Tensor], reason: str) -> None:
    prepared = measure.prepare(_contestant(compute), SMALL, torch.float32, True)
    assert prepared.step is None
    assert prepared.note.startswith("WRONG")
    assert reason in prepared.note
    assert measure.record(prepared, None)["match"] is False


def test_an_exact_contestant_passes_and_one_that_raises_is_recorded() -> None:
    assert measure.prepare(_contestant(_exact), SMALL, torch.float32, True).step is not None

    def broken(inputs: Inputs) -> Tensor:
        raise RuntimeError("no such kernel")

    prepared = measure.prepare(_contestant(broken), SMALL, torch.float32, True)
    assert prepared.step is None
    assert "failed: RuntimeError: ['no such kernel']" in prepared.note


def test_the_ceiling_is_compared_with_what_it_computes() -> None:
    assert not CONTESTANTS["plain"].same(SMALL)
    assert contestants.computed_layout(CONTESTANTS["plain"], SMALL).visible() == 50 * 51 // 2


@pytest.mark.parametrize(
    "layout",
    [
        SegmentLayout.rmt_decoder(30, 4, cache=7), SegmentLayout.transformer_xl(20, 9, memory=3, window=9),
        SegmentLayout.membart(25, 5), SegmentLayout.memformer_write(30, 4),
    ],
    ids=lambda layout: layout.name,
)  # fmt: skip
def test_the_reference_in_pieces_is_the_reference(layout: SegmentLayout, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("c", layout, 2, 2, 1, 8, "a test")
    inputs = make_inputs(case, torch.float64)
    tensors = inputs.query, inputs.key, inputs.value, inputs.grad
    whole = measure.evaluate(layout, *tensors)
    monkeypatch.setattr(measure, "_ENTRIES", 2 * 2 * layout.num_keys * 3)  # three rows at a time
    pieces = measure.evaluate(layout, *tensors)
    for name, value in whole.items():
        torch.testing.assert_close(pieces[name], value, rtol=1e-12, atol=1e-12)


def test_checked_heads_include_the_first_and_the_last() -> None:
    case = replace(SMALL, name="many heads", batch=5, heads=6, kv_heads=3)
    pairs, exact, _ = measure._truth(case, case.layout, torch.float32, False, 2 * 3 * 50 * 50)
    assert (pairs[0], pairs[-1]) == (0, 14)
    assert exact["out"].shape == (len(pairs), 2, 50, 16)
    inputs = make_inputs(case, torch.float32)
    last = _exact(Inputs(inputs.query[4:, 4:], inputs.key[4:, 2:], inputs.value[4:, 2:], inputs.grad))
    torch.testing.assert_close(exact["out"][-1:].float(), last)


# -- time and memory ---------------------------------------------------------------------------------------------------


def test_contestants_take_turns() -> None:
    calls: list[str] = []
    steps = {name: lambda name=name: calls.append(name) for name in ("a", "b", "c")}  # type: ignore[misc]
    seconds = measure.interleave(steps, rounds=4, warmup=0.0)
    assert calls == [*"abc", *"abc", *"bca", *"cab", *"abc"]  # one unmeasured round, then a different one first
    assert {name: len(values) for name, values in seconds.items()} == {"a": 4, "b": 4, "c": 4}


def test_a_budget_ends_the_rounds_but_not_before_the_least() -> None:
    assert len(measure.interleave({"a": lambda: None}, rounds=50, warmup=0.0, budget=0.0, least=4)["a"]) == 4


def test_spread_is_median_and_quartiles() -> None:
    assert measure.spread([5.0, 1.0, 2.0, 4.0, 3.0]) == {"median": 3.0, "q1": 2.0, "q3": 4.0, "rounds": 5}


def test_peak_memory_is_the_most_held_at_a_time() -> None:
    def one_after_the_other() -> Tensor:
        first = torch.ones(2**18)  # 1 MiB
        del first
        return torch.ones(2**19)  # 2 MiB

    def together() -> tuple[Tensor, Tensor]:
        return torch.ones(2**18), torch.ones(2**19)

    assert 2 * 2**20 <= measure.peak_bytes(one_after_the_other) < 2.1 * 2**20
    assert 3 * 2**20 <= measure.peak_bytes(together) < 3.1 * 2**20


def test_only_the_profilers_lines_are_held_back(capfd: pytest.CaptureFixture[str]) -> None:
    with measure._without_profiler_lines():
        os.write(2, b"USDT:2026 profiler_start\nsomething to know\n")
    assert capfd.readouterr().err == "something to know\n"


def test_a_plan_without_time_lists_everything_it_left_out() -> None:
    results = runs.run(replace(runs.QUICK, seconds=-1.0), progress=False)
    assert len(results["left_out"]) == len(set(results["left_out"])) == len(runs._experiments(runs.QUICK))
    assert sum(title.startswith("target ") for title in results["left_out"]) == 4


# -- the report --------------------------------------------------------------------------------------------------------


def _row(contestant: str, milliseconds: float | None, **other: Any) -> dict[str, Any]:
    prepared = measure.Prepared(replace(CONTESTANTS["ours"], name=contestant), SMALL, torch.bfloat16, False, peak=2**20)
    seconds = None if milliseconds is None else [milliseconds / 1e3] * 3
    return measure.record(prepared, seconds) | {"same": contestant != "plain"} | other


def _results(**sections: Any) -> dict[str, Any]:
    return {"plan": "quick", "left_out": [], "environment": environment(["-m", "benchmarks"]), **sections}


def test_headline_says_what_was_reached() -> None:
    results = _results(target=[_row("ours", 2.0), _row("dense", 6.0), _row("split", 3.0), _row("again", 2.2)])
    rows = {row[0]: row[1] for row in tables.headline(results).rows}
    assert rows["SDPA with the dense mask"] == "3.00x (≥ 2.4x reached)"
    assert rows["three-call split"] == "1.50x (≥ 1.6x missed)"
    assert rows["naive PyTorch"] == "-"
    assert rows["noise: ours against itself"] == "1.10x"


def test_published_table_compares_with_the_fastest_that_computes_the_same() -> None:
    results = _results(published=[_row("ours", 2.0), _row("dense", 3.0), _row("naive", 1.5), _row("plain", 1.0)])
    (row,) = tables.published(results).rows
    assert "0.75x slower" in row
    assert tables.published(results).note.startswith("Slower on 1 of 1")


def test_a_failure_is_shown_and_ends_in_the_summary() -> None:
    results = _results(target=[_row("ours", None, note="WRONG: out: largest error 1", match=False)])
    assert tables.failures(results) == ["rmt_kernels on small bfloat16 forward: WRONG: out: largest error 1"]
    assert "WRONG" in report.terminal(results)


def test_limits_compare_with_what_is_allowed() -> None:
    results = _results(
        overhead=[_row("ours", 0.05), _row("plain", 0.01)], long=[_row("ours", None, peak_bytes=4, score_bytes=100)]
    )
    assert [row[-1] for row in tables.limits(results).rows] == ["missed", "reached"]


def test_report_is_rendered_from_real_records(tmp_path: Path) -> None:
    names = ("dense", "split", "plain", "naive")
    measured = measure.measure(SMALL, torch.float32, True, names, rounds=3, warmup=0.0)
    lengths = [
        row
        for tokens in (16, 32)
        for row in measure.measure(of_length(tokens, heads=2), torch.float32, True, names, rounds=3, warmup=0.0)
    ]
    ours = [row | {"contestant": "ours", "label": "rmt_kernels"} for row in measured if row["contestant"] == "dense"]
    results = _results(target=measured + ours, published=measured + ours, lengths=lengths)
    (tmp_path / "results.json").write_text(json.dumps(results))
    model = {
        "naive": {"losses": [3.0, 2.5], "tokens_per_second": 1000.0}, "steps": 2, "max_loss_difference": 1e-3,
        "ours": {"losses": [3.0, 2.5], "tokens_per_second": 3000.0},
    }  # fmt: skip
    (tmp_path / "language_model.json").write_text(json.dumps(model))

    loaded = report.load(tmp_path)
    page = report.render(loaded, tmp_path).read_text()
    assert page.count("data:image/png;base64,") == 4
    assert "src='http" not in page
    assert "href=" not in page
    assert "3.00 times the tokens per second" in page
    pictures = {file.name for file in tmp_path.glob("*.png")}
    assert pictures == {"length_time.png", "length_memory.png", "published.png", "errors.png"}
    markdown = (tmp_path / "report.md").read_text()
    assert all(f"({name})" in markdown for name in pictures)
    assert "three-call split" in report.terminal(loaded)


def test_report_without_results_says_what_to_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        report.main([str(tmp_path)])
    assert "run python -m benchmarks first" in capsys.readouterr().err


def test_readme_block_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    result, readme = tmp_path / "cpu.json", tmp_path / "README.md"
    result.write_text(json.dumps(_results(target=[_row("ours", 2.0), _row("dense", 6.0)])))
    readme.write_text("before\n<!-- measured:start -->\nold\n<!-- measured:end -->\nafter\n")
    report.update_readme(result, readme)
    text = readme.read_text()
    assert "3.00x" in text
    assert "old" not in text
    assert text.startswith("before\n<!-- measured:start -->\n")
    assert text.endswith("<!-- measured:end -->\nafter\n")
    report.update_readme(result, readme)
    assert readme.read_text() == text


def test_readme_without_the_block_is_refused(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("nothing here")
    (tmp_path / "cpu.json").write_text(json.dumps(_results()))
    with pytest.raises(ValueError, match="expected one <!-- measured:start -->"):
        report.update_readme(tmp_path / "cpu.json", tmp_path / "README.md")


def test_environment_says_where_and_with_what() -> None:
    here = environment(["-m", "benchmarks", "--full"])
    assert json.loads(json.dumps(here)) == here
    assert here["command"] == "python -m benchmarks --full"
    assert here["versions"]["torch"] == torch.__version__
    assert here["device"]["threads"] >= 1
    assert here["device"]["torch_isa"] == torch.backends.cpu.get_cpu_capability()
