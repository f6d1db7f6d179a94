"""``python -m benchmarks.systems TABLE``: the published systems trained and compared.

TABLE: ``accuracy`` against the number of segments; ``language``, bits a byte; ``bottleneck``, forms of the Memory
Transformer. A call that was cut off goes on when it is made again: runs that are done are read, a run that was under
way goes on from its checkpoint. Exit status: 0, or 1 where a run failed. Taxi is ``python -m benchmarks.systems.taxi``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks.arguments import count
from benchmarks.environment import environment
from benchmarks.files import RESULTS, write_json
from benchmarks.systems.report import STUDIES, lines, update_docs, whole
from benchmarks.systems.runs import jobs, perform
from benchmarks.systems.studies import SIZES, Results

__all__ = ["main"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.systems", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", choices=list(STUDIES), help="what to measure")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--size", choices=SIZES, default="small", help="small: minutes on two cores; paper: for a GPU")
    size.add_argument(
        "--quick", action="store_const", const="quick", dest="size", help="a minute: everything runs, little is learned"
    )
    parser.add_argument("--seeds", type=count, metavar="N", help="seeds 0 to N - 1 (default: 3; quick: 1)")
    parser.add_argument("--only", default="", metavar="TEXT", help="the runs with this in their name, such as copy")
    parser.add_argument("--device", default="cpu", help="such as cpu or cuda")
    parser.add_argument(
        "--processes", type=int, choices=range(0, 65), metavar="N",
        help="runs side by side, one thread each (default: 2; on a GPU: 1); 0: in this process",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, default=RESULTS / "latest" / "systems", metavar="DIR",
        help="where runs and results are kept",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace runs in DIR that had other settings")
    parser.add_argument("--save", metavar="NAME", help="keep the result as benchmarks/results/NAME.json")
    parser.add_argument("--render", type=Path, metavar="FILE", help="train nothing, show the result in FILE")
    parser.add_argument("--docs", action="store_true", help="with --render or --save: write it into docs/systems")
    return parser


def _load(path: Path, table: str) -> Results:
    results: Results = json.loads(path.read_text(encoding="utf-8"))
    wanted = {"table", "size", "seeds", "planned", "runs", "failed", "environment"}
    if not isinstance(results, dict) or not wanted <= set(results) or results["table"] != table:
        raise ValueError(f"not a result of python -m benchmarks.systems {table}")
    return results


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.docs and not (options.render or options.save):
        parser.error("--docs needs --render FILE or --save NAME, the result that the pages name")
    study, folder = STUDIES[options.table], options.out / f"{options.table}-{options.size}"
    if options.render is not None:
        try:
            results = _load(options.render, options.table)
        except (OSError, ValueError) as error:
            parser.error(f"{options.render}: {error}")
        kept = options.render
    else:
        seeds = range(options.seeds or (1 if options.size == "quick" else 3))
        try:
            planned = jobs(study, options.size, seeds, folder, options.device, options.only)
        except (TypeError, ValueError) as error:
            parser.error(str(error))
        about = {"size": options.size, "environment": environment()}
        kept = folder / "results.json"
        processes = (2 if options.device == "cpu" else 1) if options.processes is None else options.processes
        results = about | perform(
            study, planned, processes=processes, overwrite=options.overwrite,
            keep=lambda found: write_json(folder / "results.json", about | found),
        )  # fmt: skip
    print("\n\n".join(table.terminal() for table in whole(results)))
    print("\n" + "\n".join(lines(results)))
    folder.mkdir(parents=True, exist_ok=True)
    if study.draw(results, folder / f"{study.name}.png"):
        print(f"picture: {folder / study.name}.png")
    if options.save:
        kept = RESULTS / f"{options.save}.json"
        write_json(kept, results)
    if options.docs:
        update_docs(results, kept)
        print("wrote the tables into docs/systems")
    print(f"results: {kept}")
    return 1 if results["failed"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
