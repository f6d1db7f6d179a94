"""``python -m benchmarks.gpu``: check and measure everything on the GPU, in stages, and write a report.

Exit status: 0 all done and right, 1 something was wrong or failed, 2 no GPU, 3 not all done yet (go on with --resume).
With --prove: 0 proven, 1 not.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path

import torch

from benchmarks.environment import ROOT
from benchmarks.gpu import prove, report
from benchmarks.gpu.about import about
from benchmarks.gpu.cases import FULL
from benchmarks.gpu.stages import STAGES
from benchmarks.gpu.store import Store, complete
from benchmarks.gpu.supervise import Command, child_command, run_stage
from benchmarks.gpu.tables import failures

__all__ = ["main"]

_REPORT_SECONDS = 20.0  # kept back for the report


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    results = ROOT / "benchmarks" / "results"
    parser.add_argument(
        "--stages", nargs="+", choices=list(STAGES), metavar="STAGE",
        help=f"some of {', '.join(STAGES)}; in the order given",
    )  # fmt: skip
    parser.add_argument("--resume", action="store_true", help="keep what was done, do the rest")
    parser.add_argument("--out", type=Path, default=results / "gpu-latest", metavar="DIR", help="where results go")
    parser.add_argument("--seconds", type=float, metavar="N", help="end after about N seconds; --resume goes on")
    parser.add_argument("--each", type=float, metavar="N", help="go on to the next stage after about N seconds of one")
    parser.add_argument("--save", metavar="NAME", help="also keep the result as benchmarks/results/NAME.json")
    parser.add_argument(
        "--prove", type=Path, metavar="FILE",
        help="measure nothing: if a result kept in benchmarks/results shows that every check of the CUDA backend "
        "passed, let backend='auto' choose it on that architecture",
    )  # fmt: skip
    return parser


def _prove(file: Path) -> int:
    try:
        print(prove.prove(file, {name: [item.key for item in STAGES[name].items(FULL)] for name in prove.STAGES}))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def main(arguments: list[str] | None = None, *, gpu: bool | None = None, command: Command = child_command) -> int:
    """Run the stages; the exit status. ``gpu`` and ``command`` stand for the machine in tests."""
    options = _parser().parse_args(arguments)
    if options.prove is not None:
        return _prove(options.prove)
    begin = time.monotonic()
    if not (torch.cuda.is_available() if gpu is None else gpu):
        print(
            "python -m benchmarks.gpu needs a CUDA GPU, and torch "
            f"{torch.__version__} sees none here; nothing was measured. On the CPU: python -m benchmarks.",
            file=sys.stderr,
        )
        return 2
    store = Store(options.out.resolve())
    store.folder.mkdir(parents=True, exist_ok=True)
    chosen = [STAGES[name] for name in dict.fromkeys(options.stages or STAGES)]
    every = tuple(STAGES)
    if not options.resume:
        for stage in chosen:
            store.forget(stage.name)
        if not options.stages:
            store.merged.unlink(missing_ok=True)
    facts = about(["-m", "benchmarks.gpu", *(sys.argv[1:] if arguments is None else arguments)])
    store.merge({"environment": facts}, every)
    for number, stage in enumerate(chosen, 1):
        state = store.load(stage.name)
        if complete(state) and (gone := stage.lost(state)):
            print(f"[{number}/{len(chosen)}] {stage.name}: again, for {gone} is gone", flush=True)
            store.forget(stage.name)
            state = store.load(stage.name)
        if complete(state):
            print(f"[{number}/{len(chosen)}] {stage.name}: done before", flush=True)
            continue
        left = float("inf") if options.each is None else options.each
        if options.seconds is not None:
            left = min(left, options.seconds - (time.monotonic() - begin) - _REPORT_SECONDS)
            if left < 15.0:
                print(f"[{number}/{len(chosen)}] {stage.name}: no time left", flush=True)
                continue
        print(f"[{number}/{len(chosen)}] {stage.name}: {stage.title}", flush=True)
        store.save(state | {"commits": list(dict.fromkeys([*state.get("commits", []), facts["commit"]]))})
        state = run_stage(store, stage, min(stage.limit, left), command)
        store.merge({}, every)
        print(f"    {state['seconds']:.0f} s{'' if state['complete'] else ', not all done'}", flush=True)
    results = store.merge({}, every)
    page = report.render(results, store.folder)
    print("\n" + report.terminal(results))
    if options.save:
        target = ROOT / "benchmarks" / "results" / f"{options.save}.json"
        shutil.copyfile(store.merged, target)
        print(f"saved {target}")
    print(f"\n{time.monotonic() - begin:.0f} s; report: {page}")
    if failures(results):
        return 1
    return 0 if all(complete(store.load(stage.name)) for stage in chosen) else 3


if __name__ == "__main__":
    raise SystemExit(main())
