"""``python -m benchmarks.recurrence``: memory and time of training through many segments, on the CPU.

Exit status: 0, or 1 where a contestant's gradients were wrong or it failed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import ROOT, environment
from benchmarks.files import RESULTS
from benchmarks.recurrence.evaluation import evaluate
from benchmarks.recurrence.limits import failures
from benchmarks.recurrence.runs import FULL, QUICK, run
from benchmarks.recurrence.tables import (
    evaluation_table,
    memory_table,
    summary_lines,
    tables,
    targets,
    time_table,
)
from benchmarks.report import replace_block, source_line
from benchmarks.tables import environment_lines

__all__ = ["main", "update_docs"]

_ROUNDS, _SECONDS = 4, 240.0  # of --evaluate
PICTURE = ROOT / "docs" / "pictures" / "recurrence.png"


def _where(results: dict[str, Any]) -> str:
    device = results["environment"]["device"]
    return f"{device['cpu']}, {device['threads']} thread{'s' * (device['threads'] != 1)}"


def update_docs(results: dict[str, Any], result: Path) -> None:
    """Write a result's tables into the README and the chapter, between the ``recurrence`` comments."""
    what = environment_lines(results["environment"])
    command = "python -m benchmarks.recurrence --full"
    source = f"<sub>{'<br>'.join([*what, command, *summary_lines(results)])}<br>{source_line(result)}</sub>"
    memory, time, evaluation = memory_table(results), time_table(results), evaluation_table(results)
    picture = "![Peak activations against the number of segments, and the time of a step]"
    replace_block(
        ROOT / "docs" / "recurrence.md",
        "recurrence",
        [
            *("", f"{picture}(pictures/recurrence.png)", ""),
            *(
                line
                for table in (memory, time, evaluation)
                for line in (table.title + ":", "", table.markdown(level=0), "")
            ),
            source,
        ],
    )
    goals = targets(results)
    replace_block(
        ROOT / "README.md",
        "recurrence",
        ["", goals.markdown(level=0), "", source],
    )


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.recurrence",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="about 100 seconds (default)")
    size.add_argument("--full", action="store_true", help="every contestant and number of segments: about 12 minutes")
    size.add_argument("--render", type=Path, metavar="FILE", help="measure nothing, show the result in FILE")
    parser.add_argument("--out", type=Path, default=RESULTS / "latest", metavar="DIR", help="where results are written")
    parser.add_argument(
        "--save", metavar="NAME", help="also keep benchmarks/results/NAME.json and docs/pictures/recurrence.png"
    )
    parser.add_argument(
        "--evaluate",
        action="store_true",
        help="with --render: measure the reading of long inputs again, in more rounds",
    )
    parser.add_argument("--docs", action="store_true", help="with --render: write FILE's tables into the documentation")
    options = parser.parse_args(arguments)
    if (options.docs or options.evaluate) and options.render is None:
        parser.error("--docs and --evaluate need --render FILE")
    from benchmarks.recurrence import plots

    if options.render is not None:
        try:
            results = json.loads(options.render.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            parser.error(f"{options.render}: {error}")
        if isinstance(results, dict):
            results = results.get("recurrence", results)  # of a result of python -m benchmarks
        if not isinstance(results, dict) or not {"memory", "time", "sizes", "environment"} <= set(results):
            parser.error(f"{options.render}: not a result of python -m benchmarks.recurrence")
        if options.evaluate:
            results["evaluation"] = evaluate(
                FULL.reader, FULL.evaluated, torch.device("cpu"), rounds=_ROUNDS, budget=_SECONDS
            )
            results["evaluation_again"] = environment()  # another run than the rest
    else:
        results = run(FULL if options.full else QUICK)
        results["environment"] = environment()
    options.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=1) + "\n"
    (options.out / "recurrence.json").write_text(text, encoding="utf-8")
    plots.save(results, _where(results), options.out / "recurrence.png")
    print("\n\n".join(table.terminal() for table in tables(results)))
    print("\n" + "\n".join(summary_lines(results)))
    print(f"written: {options.out / 'recurrence.json'} and recurrence.png")
    if options.save:
        (RESULTS / f"{options.save}.json").write_text(text, encoding="utf-8")
        plots.save(results, _where(results), PICTURE)
        print(f"saved {RESULTS / options.save}.json and {PICTURE}")
    if options.docs:
        update_docs(results, options.render)
        print("wrote the tables into README.md and docs/recurrence.md")
    return 1 if failures(results) else 0


if __name__ == "__main__":
    raise SystemExit(main())
