"""``python -m benchmarks``: measure everything, show the tables, write the report."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.environment import ROOT, environment
from benchmarks.runs import FULL, QUICK, run
from benchmarks.tables import failures

# Written anew by each run; what an earlier run left must not be taken for this one's.
_FILES = (
    "results.json",
    "pytest_benchmark.json",
    "language_model.json",
    "language_model.png",
    "recurrence.json",
    "recurrence.png",
    "huggingface.json",
    "report.html",
    "report.md",
)
_PARTS = ("comparison", "suite", "model", "recurrence", "huggingface")


def _part(number: int, of: int, what: str) -> None:
    print(f"\n[{number}/{of}] {what}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmarks; the exit status is 1 where a result was wrong or a part failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--full", action="store_true", help="every case, dtype and length: about 30 minutes, not 5")
    parser.add_argument("--out", type=Path, default=report.LATEST, metavar="DIR", help="where results are written")
    parser.add_argument(
        "--parts", nargs="+", choices=_PARTS, default=_PARTS, metavar="PART", help=f"some of {', '.join(_PARTS)}"
    )
    options = parser.parse_args(arguments)
    out: Path = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for name in _FILES:
        (out / name).unlink(missing_ok=True)
    begin = time.perf_counter()
    broken = []

    plan = FULL if options.full else QUICK
    results: dict[str, Any] = {"plan": plan.name, "left_out": []}
    if "comparison" in options.parts:
        limit = f"at most {plan.seconds:.0f} s, what does not fit is listed"
        _part(1, 6, f"interleaved comparison with stock PyTorch ({limit})")
        results = run(plan)
    results["environment"] = environment()
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")

    if "suite" in options.parts:
        _part(2, 6, "pytest-benchmark suite" + ("" if options.full else ", a selection"))
        full = ["--full"] if options.full else []
        suite = ["-m", "pytest", "benchmarks", "-q", f"--benchmark-json={out / 'pytest_benchmark.json'}", *full]
        if subprocess.run([sys.executable, *suite], cwd=ROOT, check=False).returncode != 0:
            broken.append("the pytest-benchmark suite failed")

    if "model" in options.parts:
        _part(3, 6, "a language model on real text, with naive attention and with ours")
        quick = [] if options.full else ["--quick"]
        model = [sys.executable, "-m", "benchmarks.language_model", *quick, "--out", str(out)]
        if subprocess.run(model, cwd=ROOT, check=False).returncode != 0:
            broken.append("the language model's run failed")

    if "recurrence" in options.parts:
        _part(4, 6, "training through many segments: memory and time")
        size = "--full" if options.full else "--quick"
        many = [sys.executable, "-m", "benchmarks.recurrence", size, "--out", str(out)]
        if subprocess.run(many, cwd=ROOT, check=False).returncode != 0:
            broken.append("training through many segments: a contestant was wrong or failed")

    if "huggingface" in options.parts:
        _part(5, 6, "RMT around models of transformers")
        if find_spec("transformers") is None:
            print("left out: transformers is not installed")
        else:
            small = [] if options.full else ["--quick"]
            around = [sys.executable, "-m", "benchmarks.huggingface", "--device", "cpu", *small, "--out", str(out)]
            if subprocess.run(around, cwd=ROOT, check=False).returncode != 0:
                broken.append("RMT around models of transformers: a contestant was wrong or failed")

    _part(6, 6, "report")
    results = report.load(out)
    page = report.render(results, out)
    print("\n" + report.terminal(results))
    for line in broken:
        print(f"FAILED {line}")
    print(f"\n{time.perf_counter() - begin:.0f} s; report: {page}")
    return 1 if broken or failures(results) else 0


if __name__ == "__main__":
    raise SystemExit(main())
