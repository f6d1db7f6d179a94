"""The CUDA backend in the GPU benchmarks, on the CPU: its build, its checks on the emulated GPU, compute-sanitizer, and
which results let backend="auto" choose it."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import benchmarks.cases
from benchmarks.files import read_json, write_json
from benchmarks.gpu import __main__ as program
from benchmarks.gpu import checks, contestants, programs, prove, sanitized, sanitizer, stages, tables
from benchmarks.gpu.cases import FULL, Plan
from benchmarks.gpu.device import HostDevice
from benchmarks.gpu.stage import Context, Payload, Stage
from benchmarks.gpu.stages import STAGES
from benchmarks.gpu.store import Store
from rmt_kernels import SegmentLayout, _build, reference_attention
from rmt_kernels.backends import cpu, cuda
from tests.emulation import emulated
from tests.suite import BF16, F32, Case
from tests.test_gpu_benchmarks import TINY

# -- checks and times --------------------------------------------------------------------------------------------------


def _context(work: Path, plan: Plan = TINY) -> Context:
    return Context(HostDevice(), plan, work, time.monotonic() + 300, say=lambda line: None)


@emulated
def test_it_is_checked_like_the_other_backend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    small = Case(SegmentLayout.rmt_decoder(40, 5), batch=2, kv_heads=1, group=2, head_dim=64, dtype=BF16)
    monkeypatch.setattr(checks, "_cases", lambda: {"small": small, "f32": replace(small, dtype=F32)})
    items = {item.key: item for name in ("determinism_cuda", "memory_cuda") for item in STAGES[name].items(FULL)}
    assert not [key for key in items if "f32" in key]
    leaves = [torch.randn(1, 2, 48, 64, dtype=BF16, requires_grad=True) for _ in range(4)]
    tiny = benchmarks.cases.Case("tiny", SegmentLayout.rmt_decoder(40, 4), 1, 2, 2, 64, "a test")
    monkeypatch.setattr(checks, "_small", lambda device: (tiny, leaves))
    for key in ("alone: small", "repeats: small", "CUDA graph"):
        found = items[key].run(_context(tmp_path))
        assert (found["failures"], found["facts"]["backend"]) == ([], "cuda"), key


@emulated
def test_it_is_timed_beside_the_other_backend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plan = replace(TINY, backend="reference", head_dims=(64,), tokens=(32,))
    for names in ("_SHORT", "_SHORT_WIDE"):
        monkeypatch.setattr(stages, names, ("ours", "cuda"))

    def decoders(*given: Any) -> dict[str, contestants.Entrant]:
        return {name: entrant for name, entrant in contestants.decoders(*given).items() if entrant.own}

    monkeypatch.setattr(stages, "decoders", decoders)
    short = {item.key: item for item in STAGES["short"].items(plan)}
    wide, narrow = "rmt_decoder T=32 M=16 D=128 batch 1 forward", "rmt_decoder T=32 M=16 D=64 batch 1 backward"
    seen = set()
    for item in (short[wide], short[narrow], *STAGES["decode"].items(plan)):
        for record in item.run(_context(tmp_path, plan))["records"]:
            if record["contestant"] == "cuda":
                assert record["kind"] == "right", (item.key, record["note"])
                assert record["kernel"]["median"] > 0
                seen.add((item.key, record["pass"]))
    assert seen == {
        (wide, "forward"), (narrow, "backward"), (narrow, "forward+backward"), ("decode 48 keys D=64", "forward")
    }  # fmt: skip
    assert "cuda" in stages._FORWARD


# -- the build ---------------------------------------------------------------------------------------------------------

SETUP = """
import json, os, sys
from pathlib import Path
assert sys.argv[1:] == ["build_ext", "--inplace"], sys.argv
wishes = {name: value for name, value in os.environ.items() if name.startswith("RMT_KERNELS_CU")}
print(json.dumps(wishes))
print("forward.cu(12): error: no such tile")
if FAILS:
    sys.exit("rmt_kernels: RMT_KERNELS_CUDA=1 demands the CUDA extension, and building failed")
for name in MADE:
    Path("rmt_kernels", f"{name}SUFFIX").touch()
built = {"architectures": ["90a"], "elements": ["BF16", "F16"], "widths": [64, 128], "compiler": "nvcc 13.0"}
Path("rmt_kernels", "_built.json").write_text(json.dumps({"cuda": built}))
"""


def _built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: Sequence[str] = ("_cpu", "_cuda"), fails: bool = False
) -> tuple[Payload, list[str]]:
    """What the item "modules" says of a checkout whose setup.py makes some modules or fails, and its last words."""
    (tmp_path / "rmt_kernels").mkdir(exist_ok=True)
    text = SETUP.replace("FAILS", str(fails)).replace("MADE", repr(made))
    (tmp_path / "setup.py").write_text(text.replace("SUFFIX", sysconfig.get_config_var("EXT_SUFFIX")))
    monkeypatch.setattr(programs, "ROOT", tmp_path)
    monkeypatch.setattr(programs, "architecture", lambda: "90a")
    monkeypatch.delenv("RMT_KERNELS_CUDA_ARCHS", raising=False)
    told: list[str] = []
    (item,) = [item for item in STAGES["build"].items(TINY) if item.key == "modules"]
    return item.run(Context(None, TINY, tmp_path, time.monotonic() + 60, say=told.append)), told


def _state(found: Payload) -> dict[str, Any]:
    items = {"modules": found | {"status": "done"}}
    return {"stage": "build", "planned": ["modules"], "seconds": 41.0, "items": items}


def test_the_build_demands_the_cuda_extension_for_this_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = _built(tmp_path, monkeypatch)
    facts = found["facts"]
    assert found["failures"] == []
    assert json.loads(facts["tail"].splitlines()[0]) == {
        "RMT_KERNELS_CUDA": "1", "RMT_KERNELS_CUDA_ALL": "1", "RMT_KERNELS_CUDA_ARCHS": "90a"
    }  # fmt: skip
    assert 0.0 <= facts["seconds"] < 600.0
    assert facts["cuda"]["architectures"] == ["90a"]
    assert {name: len(files) for name, files in facts["modules"].items()} == {"_cpu": 1, "_cuda": 1}
    state = _state(found)
    (row,) = [row for row in tables.status_table({"stages": {"build": state}}).rows if row[0] == "build"]
    assert row[-1] == "CUDA: BF16, F16 at 64, 128 for 90a by nvcc 13.0"


def test_a_build_that_fails_repeats_the_compilers_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, told = _built(tmp_path, monkeypatch, fails=True)
    assert found["failures"][0].startswith("exit status 1: ")
    assert "forward.cu(12): error: no such tile" in found["failures"][0]
    assert "building failed" in found["failures"][0]
    assert "no such tile" in told[0]


def test_a_build_without_a_module_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = _built(tmp_path, monkeypatch, made=["_cuda"])
    assert [line.partition(":")[0] for line in found["failures"]] == ["no module _cpu was built"]


def test_modules_that_are_gone_are_built_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A result travels to the next machine, what was compiled on the last one does not."""
    found, _ = _built(tmp_path, monkeypatch)
    state = _state(found)
    assert STAGES["build"].lost(state) == ""
    (gone,) = (tmp_path / "rmt_kernels").glob("_cuda*")
    gone.unlink()
    assert STAGES["build"].lost(state) == gone.name
    store = Store(tmp_path / "out")
    store.save(state)
    monkeypatch.setattr(program, "STAGES", {"build": replace(STAGES["build"], items=lambda plan: [])})
    started: list[str] = []

    def command(stage: Stage, out: Path, seconds: float) -> list[str]:
        started.append(stage.name)
        assert store.load("build")["items"] == {}
        return [sys.executable, "-c", "pass"]

    program.main(["--out", str(tmp_path / "out"), "--resume"], gpu=True, command=command)
    assert started == ["build"]
    assert f"build: again, for {gone.name} is gone" in capsys.readouterr().out


def test_what_was_built_is_loaded(tmp_path: Path) -> None:
    (item,) = [item for item in STAGES["build"].items(TINY) if item.key == "loading"]
    found = item.run(Context(None, TINY, tmp_path, time.monotonic() + 120))
    missing = [why for why in (_build.why_no_cuda(), cpu.why_missing) if why]
    assert found["facts"]["status"] == bool(missing)
    assert len(found["failures"]) == bool(missing)
    assert all(why in found["failures"][0] for why in missing)
    assert "backend cuda" in found["facts"]["tail"]


def test_the_resource_report_is_of_this_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def run(context: Context, name: str, command: list[str], **how: Any) -> Payload:
        commands.append(command)
        return {}

    monkeypatch.setattr(programs, "run_program", run)
    (item,) = [item for item in STAGES["build"].items(TINY) if item.key == "resources"]
    for architecture, extra in (("90a", ["--arch", "90a"]), (None, [])):
        monkeypatch.setattr(programs, "architecture", lambda found=architecture: found)
        item.run(Context(None, TINY, tmp_path))
        assert commands[-1][2:] == ["rmt_kernels.backends.cuda.report", "--element", "BF16", "F16", *extra]


@pytest.mark.parametrize(
    ("capability", "name"), [((8, 0), "80"), ((8, 9), "89"), ((9, 0), "90a"), ((12, 0), "120a"), (None, None)]
)
def test_architectures_have_nvccs_names(
    capability: tuple[int, int] | None, name: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert programs.architecture() == name


# -- the sanitizer -----------------------------------------------------------------------------------------------------

TOOL = """#!/bin/sh
# A compute-sanitizer that checks nothing and runs the calls on the emulated GPU.
echo "========= COMPUTE-SANITIZER"
while [ "$1" != "-m" ]; do python="$1"; echo "option $1"; shift; done
RMT_KERNELS_EMULATE=1 "$python" "$@" --device cpu --cases "decoding, one chunk, 64" || exit 5
echo "========= ERROR SUMMARY: 0 errors"
"""


def _tool(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tool = folder / "compute-sanitizer"
    tool.write_text(text)
    tool.chmod(0o755)
    return tool


@pytest.mark.parametrize("place", ["bin", "compute-sanitizer"])
def test_the_sanitizer_is_found_beside_nvcc_and_under_cuda_home(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(sanitizer, "find_nvcc", lambda: str(tmp_path / "toolkit" / "bin" / "nvcc"))
    beside = _tool(tmp_path / "toolkit" / place, TOOL)
    assert sanitizer.find_sanitizer() == str(beside)
    home = _tool(tmp_path / "home" / place, TOOL)
    assert sanitizer.find_sanitizer() == str(home)


def test_without_the_sanitizer_nothing_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sanitizer, "find_sanitizer", lambda: None)
    for item in STAGES["sanitizer"].items(FULL):
        found = item.run(Context(None, FULL, tmp_path, time.monotonic() + 60))
        assert found["failures"] == ["compute-sanitizer is neither beside nvcc, nor under CUDA_HOME, nor in PATH"]


@emulated
def test_a_sanitizer_watches_the_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = _tool(tmp_path, TOOL)
    monkeypatch.setattr(sanitizer, "find_sanitizer", lambda: str(tool))
    items = {item.key: item for item in STAGES["sanitizer"].items(FULL)}
    assert list(items) == ["memcheck", "racecheck", "synccheck", "initcheck"]
    found = items["memcheck"].run(Context(None, FULL, tmp_path, time.monotonic() + 120))
    facts = found["facts"]
    assert found["failures"] == []
    assert (facts["tool"], facts["found"], facts["right"], facts["calls"]) == ("memcheck", 0, 1, 1)
    log = (tmp_path / "memcheck.txt").read_text()
    assert "option --tool\noption memcheck\n" in log
    assert "\ndecoding, one chunk, 64\n    right (" in log


@pytest.mark.parametrize(
    ("output", "status", "complaints"),
    [
        ("5 of 5 calls right\n========= ERROR SUMMARY: 0 errors\n", 0, []),
        ("5 of 5 calls right\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", 0, []),
        (
            "========= COMPUTE-SANITIZER\n========= Invalid __global__ read of size 16 bytes\n=========     at kernel\n"
            "5 of 5 calls right\n========= ERROR SUMMARY: 3 errors\n",
            86,
            ["3 errors, the first: Invalid __global__ read of size 16 bytes at kernel"],
        ),
        ("5 of 5 calls right\n========= RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)\n", 0, ["1 error"]),
        ("4 of 5 calls right\n========= ERROR SUMMARY: 0 errors\n", 1, ["1 of 5 calls gave wrong results"]),
        ("a\nout of time\n========= ERROR SUMMARY: 0 errors\n", 3, ["the calls did not come to their end"]),
        ("5 of 5 calls right\n", 0, ["it gave no summary"]),
        ("========= Device not supported.\n", 1, ["it gave no summary", "the calls did not come to their end"]),
        ("5 of 5 calls right\n========= ERROR SUMMARY: 0 errors\n", 2, ["exit status 2"]),
        ("5 of 5 calls right\n========= ERROR SUMMARY: 0 errors\n", None, ["it ran past its time limit"]),
    ],
)
def test_what_a_sanitizer_said_is_judged(output: str, status: int | None, complaints: list[str]) -> None:
    _, failures = sanitizer.judge(output, status)
    assert len(failures) == len(complaints)
    assert all(said.startswith(wanted) for said, wanted in zip(failures, complaints, strict=True))


def test_the_sanitized_calls_reach_every_kernel() -> None:
    """Short and long tiles, forward and backward, few rows in one chunk of 512 keys and in several, both widths."""
    kinds = set()
    for case in sanitized.CASES.values():
        rows = case.layout.num_queries * case.group
        kind = "few" if rows <= 32 else "short" if rows <= 1024 else "long"
        chunks = case.layout.num_keys > 512 if kind == "few" else False
        kinds.add((kind, chunks, 64 if case.head_dim <= 64 else 128, case.dropout_p > 0))
        assert case.grads == "both"
    wanted = {("few", False), ("few", True), ("short", False), ("long", False)}
    assert {(kind, chunks, width) for kind, chunks, width, _ in kinds} == {(*w, d) for w in wanted for d in (64, 128)}
    assert {(k, d) for k, _, d, dropout in kinds if dropout} == {(k, d) for k in ("short", "long") for d in (64, 128)}
    every = list(sanitized.CASES.values())
    for given in ("padding", "stale", "start", "apart"):
        assert any(getattr(case, given) for case in every)
    assert max(case.group for case in every) > 1


def test_sanitized_calls_that_are_wrong_are_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sanitized, "_end_after", lambda seconds: None)
    arguments = ["--backend", "reference", "--device", "cpu", "--cases", "slots that see themselves"]
    assert sanitized.main(arguments) == 0
    assert "1 of 1 calls right" in capsys.readouterr().out

    def off(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        out, lse = reference_attention(*args, **options)
        return out * 1.1, lse

    monkeypatch.setattr(sanitized, "on_backend", lambda name: off)
    assert sanitized.main(arguments) == 1
    said = capsys.readouterr().out
    assert "WRONG: out: largest error" in said
    assert "0 of 1 calls right" in said


def test_sanitized_calls_end_themselves() -> None:
    code = "import time; from benchmarks.gpu.sanitized import _end_after; _end_after(0.01); time.sleep(60)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=55)
    assert (done.returncode, done.stdout) == (3, "out of time\n")


# -- proof for backend="auto" ------------------------------------------------------------------------------------------


def proof() -> dict[str, Any]:
    """A made-up result that proves the CUDA backend."""
    states: dict[str, Any] = {}
    for name in prove.STAGES:
        items: dict[str, Any] = {}
        for item in STAGES[name].items(FULL):
            facts: dict[str, Any] = {"backend": "cuda"}
            if name == "suite_cuda":
                facts = {"collected": 300, "counts": {"passed": 280, "skipped": 20}}
            elif name == "sanitizer":
                facts = {"tool": item.key, "found": 0, "right": 15, "calls": 15}
            elif item.key.startswith("repeats"):
                facts |= {"repeats": 1000, "differing": 0}
            items[item.key] = {"status": "done", "attempts": 1, "failures": [], "error": None, "facts": facts}
        states[name] = {"stage": name, "planned": list(items), "items": items, "seconds": 9.0, "commits": ["abc1234"]}
    about = {"gpu": {"capability": "9.0"}, "date": "2026-11-22T10:00:00+00:00", "commit": "abc1234"}
    return {"environment": about, "stages": states}


def _item(results: dict[str, Any], stage: str, key: str = "") -> dict[str, Any]:
    items = results["stages"][stage]["items"]
    found: dict[str, Any] = items[key or next(iter(items))]
    return found


def _forget(state: dict[str, Any], key: str) -> None:
    state["items"].pop(key)
    state["planned"].remove(key)


def _spoil(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    results = proof()
    change(results)
    return results


REFUSALS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a stage is missing": (lambda r: r["stages"].pop("sanitizer"), "sanitizer: it was not run"),
    "a stage was only begun": (
        lambda r: r["stages"]["memory_cuda"].update(planned=None), "memory_cuda: it was not run"
    ),
    "an item is not finished": (
        lambda r: _item(r, "determinism_cuda").update(status="unfinished"),
        "determinism_cuda: 1 of 18 items are not finished: alone: bf16, 64 a head",
    ),
    "an item has a failure": (
        lambda r: _item(r, "memory_cuda", "CUDA graph").update(failures=["3 elements differ"]),
        "memory_cuda: CUDA graph: 3 elements differ",
    ),
    "an item failed": (
        lambda r: _item(r, "determinism_cuda").update(status="failed", error="its process died with status 9"),
        "determinism_cuda: alone: bf16, 64 a head: its process died with status 9",
    ),
    "a stage never got going": (
        lambda r: r["stages"]["sanitizer"].update(error="its process ended"), "sanitizer: its process ended"
    ),
    "a test failed": (
        lambda r: _item(r, "suite_cuda")["facts"].update(counts={"passed": 299, "failed": 1}),
        "suite_cuda: 1 tests failed",
    ),
    "tests were left out": (
        lambda r: _item(r, "suite_cuda")["facts"].update(counts={"passed": 200}), "suite_cuda: not every test was run"
    ),
    "all tests were skipped": (
        lambda r: _item(r, "suite_cuda")["facts"].update(counts={"skipped": 300}), "suite_cuda: no test passed"
    ),
    "too few repeats": (
        lambda r: _item(r, "determinism_cuda", "repeats: window")["facts"].update(repeats=999),
        "determinism_cuda: repeats: window: 999 repeats, needed are 1000",
    ),
    "another backend": (
        lambda r: _item(r, "memory_cuda")["facts"].update(backend="triton"),
        "memory_cuda: it was run on backend triton",
    ),
    "a tool found something": (
        lambda r: _item(r, "sanitizer", "racecheck")["facts"].update(found=2),
        "sanitizer: racecheck: it does not show that it watched calls and found nothing",
    ),
    "a tool watched nothing": (
        lambda r: _item(r, "sanitizer", "initcheck")["facts"].update(right=0, calls=0),
        "sanitizer: initcheck: it does not show that it watched calls and found nothing",
    ),
    "a tool was not run": (
        lambda r: _forget(r["stages"]["sanitizer"], "memcheck"),
        "sanitizer: memcheck was not run",
    ),
    "an unknown architecture": (
        lambda r: r["environment"]["gpu"].pop("capability"), "it does not tell the GPU's compute capability"
    ),
    "no date": (lambda r: r["environment"].pop("date"), "it does not tell its date"),
    "an unknown commit": (
        lambda r: [stage.update(commits=["unknown"]) for stage in r["stages"].values()], "its commit is 'unknown'"
    ),
    "changed files": (
        lambda r: [stage.update(commits=["abc1234-dirty"]) for stage in r["stages"].values()],
        "its commit is 'abc1234-dirty'",
    ),
    "several commits": (
        lambda r: r["stages"]["sanitizer"].update(commits=["abc1234", "def5678"]),
        "its stages are of several commits: abc1234, def5678",
    ),
    "an item of today is not in it": (
        lambda r: _forget(r["stages"]["memory_cuda"], "CUDA graph"),
        "memory_cuda: 'CUDA graph' is not among its items, it is of an older version",
    ),
}  # fmt: skip


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """The folder of kept results, and proven.json, with one entry."""
    folder, proven = tmp_path / "results", tmp_path / "proven.json"
    folder.mkdir()
    proven.write_text('{"sm_80": {"result": "a100.json"}}')
    monkeypatch.setattr(prove, "RESULTS", folder)
    monkeypatch.setattr(prove, "PROVEN", proven)
    return folder, proven


def test_a_result_that_shows_every_check_passed_proves_its_architecture(
    places: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, proven = places
    write_json(folder / "h200.json", proof())
    assert program.main(["--prove", str(folder / "h200.json")], gpu=False) == 0
    entry = {"result": "h200.json", "commit": "abc1234", "date": "2026-11-22T10:00:00+00:00"}
    assert read_json(proven) == {"sm_80": {"result": "a100.json"}, "sm_90": entry}
    assert "sm_90" in capsys.readouterr().out


@pytest.mark.parametrize("name", REFUSALS)
def test_a_result_that_lacks_a_check_proves_nothing(
    name: str, places: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, proven = places
    change, said = REFUSALS[name]
    before = proven.read_bytes()
    write_json(folder / "h200.json", _spoil(change))
    assert program.main(["--prove", str(folder / "h200.json")], gpu=False) == 1
    assert f"\n  {said}" in capsys.readouterr().err
    assert proven.read_bytes() == before


def test_a_proof_must_be_kept_and_readable(
    places: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, proven = places
    before = proven.read_bytes()
    write_json(tmp_path / "elsewhere.json", proof())
    (folder / "broken.json").write_text("{")
    (folder / "list.json").write_text("[]")
    for file, said in (
        (tmp_path / "elsewhere.json", "--save NAME"), (folder / "broken.json", "broken.json: "),
        (folder / "missing.json", "No such file"), (folder / "list.json", "no result of python -m benchmarks.gpu"),
    ):  # fmt: skip
        assert program.main(["--prove", str(file)], gpu=False) == 1
        assert said in capsys.readouterr().err
    assert proven.read_bytes() == before


def test_entries_that_no_kept_result_bears_out_are_found(places: tuple[Path, Path]) -> None:
    folder, proven = places
    write_json(folder / "h200.json", proof())
    architecture, facts = prove.entry(folder / "h200.json", proof())
    for entries, said in (
        ({architecture: facts}, []),
        ({"sm_80": facts}, ["sm_80: the entry differs"]),
        ({architecture: facts | {"commit": "0000000"}}, ["sm_90: the entry differs"]),
        ({architecture: facts | {"result": "other.json"}}, ["sm_90: "]),
        ({architecture: {}}, ["sm_90: "]),
    ):
        write_json(proven, entries)
        found = prove.wrong_entries(proven, folder)
        assert len(found) == len(said)
        assert all(line.startswith(start) for line, start in zip(found, said, strict=True))
    write_json(folder / "h200.json", _spoil(REFUSALS["too few repeats"][0]))
    write_json(proven, {architecture: facts})
    assert prove.wrong_entries(proven, folder) == [f"sm_90: {REFUSALS['too few repeats'][1]}"]


def test_what_auto_trusts_is_borne_out_by_kept_results() -> None:
    assert prove.wrong_entries() == []
    assert str(prove.PROVEN) == str(cuda._PROVEN)
