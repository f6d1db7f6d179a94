"""``python -m rmt_kernels.backends.triton.tune``"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import triton
from triton import knobs

from rmt_kernels.backends.triton import launch, tune
from rmt_kernels.backends.triton.tune.candidates import Key, selected, trials
from rmt_kernels.backends.triton.tune.report import printed
from rmt_kernels.backends.triton.tune.timer import GraphTimer
from rmt_kernels.backends.triton.tune.tuner import DeviceLostError, Tuner

__all__ = ["main", "run"]


def _environment(device: torch.device, arch: int) -> dict[str, Any]:
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(file.read_bytes())
    return {
        "device": torch.cuda.get_device_name(device), "arch": arch, "torch": torch.__version__,
        "triton": triton.__version__, "cuda": torch.version.cuda, "python": sys.version.split()[0],
        "sources": digest.hexdigest(),
    }  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m rmt_kernels.backends.triton.tune", description=tune.__doc__)
    parser.add_argument("--seconds", type=float, default=3600.0, metavar="N", help="stop by then (default: an hour)")
    parser.add_argument(
        "--only", nargs="+", default=["half"], metavar="PATTERN",
        help="keys by the beginning of their names, kind:width:length:pass:dropout; half:64:long, tf32:*:*:forward "
        "(default: half)",
    )  # fmt: skip
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write there after every key; go on where such a file has stopped"
    )
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), metavar="N", help="compilers at once")
    parser.add_argument("--specialize", action="store_true", help="also try warps apart for loads and products")
    parser.add_argument(
        "--list", type=int, nargs="?", const=90, metavar="ARCH", help="print the candidates only; needs no GPU"
    )
    return parser


def run(
    keys: Sequence[Key], tuner: Tuner, environment: Mapping[str, Any], seconds: float, file: Path | None, command: str
) -> dict[str, Any]:
    """Tune the keys in order until ``seconds`` are spent; the report, written to ``file`` after every key.

    A file of the same environment is gone on with: keys that are complete in it are not measured again.
    """
    deadline, longest = time.monotonic() + seconds, 0.0
    report: dict[str, Any] = {"command": command, "environment": dict(environment), "keys": {}}
    if file and file.exists():
        former = json.loads(file.read_text())
        if former["environment"] == report["environment"]:
            report["keys"] = {name: record for name, record in former["keys"].items() if record["complete"]}
    for key in keys:
        begin = time.monotonic()
        if key.name in report["keys"] or deadline - begin <= longest:
            continue
        lost = False
        try:
            report["keys"][key.name] = tuner.tune(key, deadline)
        except Exception as error:  # recorded: one key must not end the run
            report["keys"][key.name] = {"complete": False, "failed": f"{type(error).__name__}: {error}"}
            lost = isinstance(error, DeviceLostError)
        longest = max(longest, time.monotonic() - begin)
        report["date"] = datetime.now(UTC).isoformat(timespec="seconds")
        if file:
            partial = file.with_name(f"{file.name}.part")
            partial.write_text(json.dumps(report, indent=1) + "\n")
            partial.replace(file)
        if lost:
            break
    return report


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print: 0, 1 where a present configuration fails or is wrong, 2 for a wrong call or without a GPU."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        keys = selected(options.only)
    except ValueError as error:
        parser.error(f"--only {error}")
    if options.list is not None:
        for key in keys:
            found = trials(key, options.list, specialized=options.specialize)
            print(f"{key.name}: {len(found)} candidates, the present one first")
            print("\n".join(f"  {trial.label}" for trial in found))
        return 0
    if options.jobs < 1 or options.seconds <= 0:
        parser.error(f"--jobs and --seconds must be positive, got {options.jobs} and {options.seconds}")
    if not torch.cuda.is_available():
        parser.error("there is no GPU that torch can use; --list prints the candidates without one")
    if knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: unset it to measure kernels")
    device = torch.device("cuda", torch.cuda.current_device())
    arch, _ = launch._chip(device)
    tuner = Tuner(device, arch, GraphTimer(device), options.jobs, options.specialize)
    total = sum(len(trials(key, arch, specialized=options.specialize)) for key in keys)
    tuner.tick = _progress(total)
    command = " ".join([parser.prog, *(sys.argv[1:] if arguments is None else arguments)])
    report = run(keys, tuner, _environment(device, arch), options.seconds, options.json, command)
    print(printed(report))
    done = [key for key in keys if report["keys"].get(key.name, {}).get("complete")]
    print(f"\n{len(done)} of {len(keys)} keys measured" + ("" if len(done) == len(keys) else "; give more --seconds"))
    return 1 if any("failed" in record for record in report["keys"].values()) else 0


def _progress(total: int) -> Callable[[str], object]:
    try:
        from tqdm import tqdm
    except ImportError:
        return lambda label: None
    tqdm.monitor_interval = 0  # its thread would not survive the forks
    bar = tqdm(total=total, unit="candidate", disable=None)

    def tick(label: str) -> None:
        bar.set_description(label, refresh=False)
        bar.update()

    return tick


if __name__ == "__main__":
    sys.exit(main())
