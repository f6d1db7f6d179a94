"""Which results prove the CUDA backend on an architecture, so that ``backend="auto"`` chooses it there.

``python -m benchmarks.gpu --prove benchmarks/results/NAME.json`` writes rmt_kernels/backends/cuda/proven.json:
``{architecture: {"result", "commit", "date"}}``, the result a file in benchmarks/results.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.environment import ROOT
from benchmarks.files import RESULTS, write_json
from benchmarks.gpu.sanitizer import TOOLS
from benchmarks.gpu.store import pending

__all__ = ["BACKEND", "PROVEN", "REPEATS", "STAGES", "entry", "objections", "prove", "wrong_entries"]

PROVEN = ROOT / "rmt_kernels" / "backends" / "cuda" / "proven.json"
BACKEND = "cuda"
STAGES = ("suite_cuda", "determinism_cuda", "memory_cuda", "sanitizer")
REPEATS = 1000

Results = dict[str, Any]


def _architecture(results: Results) -> str | None:
    capability = re.fullmatch(r"(\d+)\.(\d+)", str(results.get("environment", {}).get("gpu", {}).get("capability")))
    return capability and f"sm_{capability[1]}{capability[2]}"


def _commits(results: Results) -> set[str]:
    stages = results.get("stages", {})
    return {commit for name in STAGES for commit in stages.get(name, {}).get("commits", ["unknown"])}


def _facts(state: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for key, item in state["items"].items():
        yield key, item.get("facts") or {}


def _of_stage(name: str, state: dict[str, Any] | None) -> Iterator[str]:
    if state is None or not state.get("planned"):
        yield "it was not run"
        return
    if left := pending(state):
        yield f"{len(left)} of {len(state['planned'])} items are not finished: {', '.join(left)}"
    for key, item in state["items"].items():
        said = [*item.get("failures", []), *([item["error"]] if item.get("error") else [])]
        if said or item["status"] == "failed":
            yield f"{key}: {'; '.join(said)[:300] or 'failed'}"
    if state.get("error"):
        yield str(state["error"])[:300]
    if name == "suite_cuda":
        counts = [facts.get("counts", {}) for _, facts in _facts(state)]
        collected = sum(facts.get("collected", 0) for _, facts in _facts(state))
        if not sum(count.get("passed", 0) for count in counts):
            yield "no test passed"
        if sum(sum(count.values()) for count in counts) < collected:
            yield "not every test was run"
        if bad := sum(count.get("failed", 0) + count.get("crashed", 0) for count in counts):
            yield f"{bad} tests failed"
    if name == "determinism_cuda":
        repeats = {key: facts.get("repeats", 0) for key, facts in _facts(state) if key.startswith("repeats")}
        if not repeats:
            yield "nothing was repeated"
        yield from (f"{key}: {n} repeats, needed are {REPEATS}" for key, n in repeats.items() if n < REPEATS)
    if name in ("determinism_cuda", "memory_cuda"):
        others = {str(facts.get("backend")) for _, facts in _facts(state)} - {BACKEND}
        if others:
            yield f"it was run on backend {', '.join(sorted(others))}"
    if name == "sanitizer":
        yield from (f"{tool} was not run" for tool in TOOLS if tool not in state["items"])
        for tool, facts in _facts(state):
            if facts.get("found") != 0 or not facts.get("calls") or facts.get("right") != facts.get("calls"):
                yield f"{tool}: it does not show that it watched calls and found nothing"


def objections(results: Results) -> list[str]:
    """Why the results do not prove the CUDA backend; empty where they do."""
    if not isinstance(results, dict) or not isinstance(results.get("stages"), dict):
        return ["it is no result of python -m benchmarks.gpu"]
    found = [f"{name}: {said}" for name in STAGES for said in _of_stage(name, results["stages"].get(name))]
    if _architecture(results) is None:
        found.append("it does not tell the GPU's compute capability")
    if not results.get("environment", {}).get("date"):
        found.append("it does not tell its date")
    commits = _commits(results)
    if len(commits) > 1:
        found.append(f"its stages are of several commits: {', '.join(sorted(commits))}")
    for commit in sorted(commits):
        if not re.fullmatch(r"[0-9a-f]{7,64}", commit):
            found.append(f"its commit is {commit!r}, of which nobody can tell what was tested")
    return found


def _unplanned(results: Results, planned: Mapping[str, list[str]]) -> list[str]:
    """Items that would be run today, and that the results do not have."""
    return [
        f"{name}: {key!r} is not among its items, it is of an older version"
        for name, keys in planned.items()
        for key in keys
        if key not in (results["stages"][name].get("planned") or [])
    ]


def entry(file: Path, results: Results) -> tuple[str, dict[str, str]]:
    """The architecture that results without objections prove, and what is noted about them."""
    (commit,) = _commits(results)
    return str(_architecture(results)), {
        "result": file.name, "commit": commit, "date": str(results["environment"]["date"])
    }  # fmt: skip


def _read(file: Path) -> Results:
    try:
        found: Results = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from error
    return found


def prove(file: Path, planned: Mapping[str, list[str]]) -> str:
    """Write the entry for a kept result file; what was written. ``planned``: the items of STAGES, as of today.

    Raises ValueError, with every objection, where the file does not prove it.
    """
    file = file.resolve()
    if file.parent != RESULTS.resolve():
        raise ValueError(f"{file}: a proof is kept in {RESULTS}: save the result there, with --save NAME")
    results = _read(file)
    said = objections(results)
    said = said or _unplanned(results, planned)
    if said:
        raise ValueError(f"{file} proves nothing:\n" + "\n".join(f"  {line}" for line in said))
    architecture, facts = entry(file, results)
    write_json(PROVEN, dict(sorted({**_read(PROVEN), architecture: facts}.items())))
    return f"{architecture}: {json.dumps(facts)}"


def wrong_entries(proven: Path = PROVEN, folder: Path = RESULTS) -> list[str]:
    """Entries that no kept result file bears out."""
    found = []
    for architecture, facts in _read(proven).items():
        try:
            file = folder / str(facts.get("result"))
            results = _read(file)
            said = objections(results)
            if not said and (architecture, facts) != entry(file, results):
                said = [f"the entry differs from what the file says, {entry(file, results)}"]
        except ValueError as error:
            said = [str(error)]
        found += [f"{architecture}: {line}" for line in said]
    return found
