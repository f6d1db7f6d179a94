"""The tables of the published systems: every one runs end to end, goes on after a break, and judges its goals."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.environment import environment
from benchmarks.systems import __main__ as program
from benchmarks.systems import accuracy, bottleneck, language, report, runs
from benchmarks.systems.goals import Goal, differences, goal_table, interval
from benchmarks.systems.studies import Results, values

Evaluate = Callable[[str, int, int, bool], dict[str, float]]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Quick versions of all tables, as the command makes them."""
    folder = tmp_path_factory.mktemp("systems")
    for table in report.STUDIES:
        assert program.main([table, "--quick", "--processes", "0", "--out", str(folder)]) == 0
    return folder


def _results(out: Path, table: str) -> Results:
    found: Results = json.loads((out / f"{table}-quick" / "results.json").read_text())
    return found


# -- end to end --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", list(report.STUDIES))
def test_a_table_is_whole(table: str, out: Path) -> None:
    results = _results(out, table)
    entries = report.STUDIES[table].entries("quick")
    assert [run["entry"] for run in results["runs"]] == [entry.key for entry in entries]
    assert results["failed"] == []
    assert results["environment"]["versions"]["torch"]
    assert (out / f"{table}-quick" / f"{table}.png").stat().st_size > 5000
    for found in report.whole(results):
        assert found.rows
        assert all(cell != "-" for row in found.rows for cell in row[1:] if row[0] != "no recurrence")


def test_every_system_is_in_the_table_of_accuracies(out: Path) -> None:
    copied, associated = accuracy.tables(_results(out, "accuracy"))
    for table in (copied, associated):
        names = [row[0] for row in table.rows]
        assert names == [
            "no memory", "MemTransformer", "Transformer-XL", "RMT", "RMT, memory cut", "RMT on Tr-XL", "Memformer",
            accuracy.CHANCE,
        ]  # fmt: skip
        assert list(table.header)[1:7] == ["1", "2", "4", "8", "16", "32"]


def test_nothing_is_done_again(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("trained again")

    before = _results(out, "bottleneck")
    monkeypatch.setattr(runs, "train", fail)
    assert program.main(["bottleneck", "--quick", "--processes", "0", "--out", str(out)]) == 0
    assert _results(out, "bottleneck")["runs"] == before["runs"]


def test_a_run_that_was_cut_off_goes_on(out: Path, tmp_path: Path) -> None:
    shutil.copytree(out / "language-quick", tmp_path / "language-quick")
    (tmp_path / "language-quick" / "none-0" / "summary.json").unlink()
    shutil.rmtree(tmp_path / "language-quick" / "xl-0")
    study = language.STUDY
    planned = runs.jobs(study, "quick", [0], tmp_path / "language-quick")
    seen: list[int] = []
    results = runs.perform(
        study, planned, processes=1, progress=False, keep=lambda found: seen.append(len(found["runs"]))
    )
    assert seen == list(range(1, len(planned) + 1))
    expected = _results(out, "language")
    assert [run["evaluations"] for run in results["runs"]] == [run["evaluations"] for run in expected["runs"]]


def test_a_run_of_other_settings_stays_unless_asked(out: Path, tmp_path: Path) -> None:
    shutil.copytree(out / "language-quick" / "none-0", tmp_path / "none-0")
    (job, *_) = runs.jobs(language.STUDY, "quick", [0], tmp_path)
    other = runs.Job(job.key, job.label, language.entries("quick")[0].config("quick", 7, "cpu"), job.directory)
    results = runs.perform(language.STUDY, [other], processes=0, progress=False)
    (failed,) = results["failed"]
    assert "seed" in failed
    assert "--overwrite replaces it" in failed
    assert results["runs"] == []
    results = runs.perform(language.STUDY, [other], processes=0, progress=False, overwrite=True)
    assert results["failed"] == []
    assert results["runs"][0]["config"]["seed"] == 7


def test_a_failed_run_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def diverge(*_: Any, **__: Any) -> None:
        raise FloatingPointError("loss nan")

    monkeypatch.setattr(runs, "train", diverge)
    assert program.main(["bottleneck", "--quick", "--processes", "0", "--out", str(tmp_path)]) == 1
    assert "FAILED text-memory_transformer-0: FloatingPointError: loss nan" in capsys.readouterr().out


def test_the_pages_show_it(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chapter, pictures = tmp_path / "systems", tmp_path / "pictures"
    shutil.copytree(report.CHAPTER, chapter)
    pictures.mkdir()
    monkeypatch.setattr(program, "update_docs", lambda found, kept: report.update_docs(found, kept, chapter, pictures))
    for table in report.STUDIES:
        kept = out / f"{table}-quick" / "results.json"
        assert program.main([table, "--render", str(kept), "--docs", "--out", str(tmp_path)]) == 0
        assert (pictures / f"systems_{table}.png").exists()
    page = (chapter / "README.md").read_text()
    for text in ("systems_accuracy.png", "copy: RMT over 4 segments", "RMT, BPTT-0", "MemBottleneck", "5 of 5 runs"):
        assert text in page
    assert "Transformer-XL" in (chapter / "transformer_xl.md").read_text().split("numbers:start")[1]


@pytest.mark.parametrize("text", ["[]", "{}", "no JSON", '{"table": "language"}'])
def test_what_is_no_result_is_refused(text: str, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(SystemExit):
        program.main(["accuracy", "--render", str(tmp_path / "x.json")])
    assert "x.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["speed"], ["accuracy", "--seeds", "0"], ["accuracy", "--docs"], ["accuracy", "--only", "speed"]]
)
def test_bad_arguments(arguments: list[str], capsys: Any) -> None:
    with pytest.raises(SystemExit):
        program.main(arguments)
    assert "error" in capsys.readouterr().err


@pytest.mark.parametrize("size", ["small", "paper"])
@pytest.mark.parametrize("table", list(report.STUDIES))
def test_all_sizes_can_be_configured(table: str, size: str) -> None:
    planned = runs.jobs(report.STUDIES[table], size, [0, 1, 2], Path("x"))
    assert len({job.directory for job in planned}) == len(planned)
    assert all(job.config.segments <= 5 for job in planned)


# -- goals -------------------------------------------------------------------------------------------------------------


def test_goals_are_judged() -> None:
    assert Goal("a", (0.99, 1.0), 0.99).verdict == "reached"
    assert Goal("a", (0.98, 1.0), 0.99).verdict == "missed"
    assert Goal("a", (0.98, 1.0), 0.99, by="mean").verdict == "reached"
    assert Goal("a", (0.98, None), 0.9).verdict == "not measured"
    assert Goal("a", (), 0.9).verdict == "not measured"
    assert Goal("a", (0.1, 0.3), 0.2, at_most=True).verdict == "missed"
    assert Goal("a", (0.1, 0.3), 0.2, at_most=True, by="mean").verdict == "reached"
    assert Goal("a", (0.0,), 0.0, strict=True).verdict == "missed"
    assert Goal("a", (float("nan"),), 0.0).verdict == "missed"
    assert differences((1.0, 2.0, None), (0.5, None, 1.0)) == (0.5, None, None)


def test_intervals_are_students() -> None:
    mean, half = interval([1.0, 2.0, 3.0])
    assert (mean, round(half, 3)) == (2.0, 2.484)
    goal = Goal("a before b", (1.0, 2.0, 3.0), 0.0, strict=True, paired=True, digits=2)
    assert goal_table([goal]).rows == [["a before b", "2.00 ± 2.48 (1.00 … 3.00)", "> 0, each seed", "reached"]]


def _made_up(out: Path, table: str, evaluate: Evaluate) -> Results:
    """A result of three seeds whose evaluations are what ``evaluate(entry, seed, segments, carry)`` says."""
    results = _results(out, table)
    found = []
    for seed in range(3):
        for run in copy.deepcopy(results["runs"]):
            for evaluation in run["evaluations"]:
                evaluation |= evaluate(run["entry"], seed, evaluation["segments"], evaluation["carry"])
            found.append({**run, "seed": seed})
    return results | {
        "seeds": [0, 1, 2], "runs": found, "planned": [f"{run['entry']}-{run['seed']}" for run in found],
        "environment": environment(["x"]),
    }  # fmt: skip


def _verdicts(results: Results) -> dict[str, str]:
    return {goal.what: goal.verdict for goal in report.STUDIES[results["table"]].goals(results)}


def test_accuracies_are_judged(out: Path) -> None:
    def good(entry: str, seed: int, segments: int, carry: bool) -> dict[str, float]:
        able = entry.endswith("-rmt") and carry and segments <= 8
        return {"token": 1.0 if able else 0.05, "answer": 1.0 if able else 0.0}

    found = _verdicts(_made_up(out, "accuracy", good))
    assert len(found) == 12
    assert set(found.values()) == {"reached"}

    def leaks(entry: str, seed: int, segments: int, carry: bool) -> dict[str, float]:
        return {"token": 0.9, "answer": 0.99 if (entry, seed) != ("copy-rmt", 2) else 0.9}

    found = _verdicts(_made_up(out, "accuracy", leaks))
    assert found["copy: RMT over 4 segments, whole answers"] == "missed"
    assert found["associative: RMT over 4 segments, whole answers"] == "reached"
    assert [verdict for what, verdict in found.items() if "memory cut" in what] == ["missed", "missed"]
    assert [verdict for what, verdict in found.items() if "better than" in what] == ["missed"] * 6


def test_orderings_are_judged(out: Path) -> None:
    bits = {"none": 2.5, "bptt0": 2.4, "bptt3": 2.2, "xl": 2.15, "xl_short": 2.2}
    found = _verdicts(_made_up(out, "language", lambda entry, seed, *_: {"bits": bits[entry] + seed}))
    assert set(found.values()) == {"reached"}
    bits["bptt3"] = 2.45
    found = _verdicts(_made_up(out, "language", lambda entry, seed, *_: {"bits": bits[entry] + seed}))
    assert [verdict for what, verdict in found.items() if "BPTT-3" in what] == ["missed", "missed"]

    def equal(entry: str, seed: int, *_: Any) -> dict[str, float]:
        worse = entry.endswith("bottleneck") and seed != 1
        return {"bits": 3.0 + worse, "token": 0.9 - worse}

    assert set(_verdicts(_made_up(out, "bottleneck", equal)).values()) == {"missed"}


def test_missing_runs_are_not_judged(out: Path) -> None:
    results = _made_up(out, "language", lambda entry, *_: {"bits": 2.0})
    results["runs"] = [run for run in results["runs"] if (run["entry"], run["seed"]) != ("none", 2)]
    assert values(results, "none", 2, "bits") == [2.0, 2.0, None]
    found = _verdicts(results)
    assert found["RMT, BPTT-0 before no recurrence, bits fewer"] == "not measured"
    assert any("not finished" in line for line in report.lines(results))
    assert bottleneck.tables(results | {"table": "bottleneck", "runs": []}) == []
