"""``python -m rmt_kernels.backends.triton.tune``"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import triton
from triton import knobs

from rmt_kernels.backends.triton import LEAST_CAPABILITY, tune
from rmt_kernels.backends.triton.tune.candidates import Key, candidates, label, selected
from rmt_kernels.backends.triton.tune.report import printed
from rmt_kernels.backends.triton.tune.timer import GraphTimer
from rmt_kernels.backends.triton.tune.tuner import DeviceLostError, Tuner

__all__ = ["main", "opened", "run", "started"]

_LEAST_ARCH = 10 * LEAST_CAPABILITY[0] + LEAST_CAPABILITY[1]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m rmt_kernels.backends.triton.tune", description=tune.__doc__)
    parser.add_argument("--seconds", type=float, default=3600.0, metavar="N", help="stop by then (default: an hour)")
    parser.add_argument(
        "--only", nargs="+", default=["half"], metavar="PATTERN",
        help="keys by the beginning of their names, kind:width:length:pass:calls; half:64:long, tf32:*:*:forward "
        "(default: half)",
    )  # fmt: skip
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write there after every key; go on where such a file has stopped"
    )
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), metavar="N", help="compilers at once")
    parser.add_argument("--specialize", action="store_true", help="also try warps apart for loads and products")
    parser.add_argument(
        "--list", type=int, nargs="?", const=90, metavar="ARCH", help="print the candidates only (of 90); needs no GPU"
    )
    return parser


def opened(*, jobs: int, specialized: bool) -> Tuner:
    """A tuner of the current GPU. Raises ValueError where there is none to measure on."""
    if not torch.cuda.is_available():
        raise ValueError("there is no GPU that torch can use; --list prints the candidates without one")
    if knobs.runtime.interpret:
        raise ValueError("TRITON_INTERPRET is set: unset it to measure kernels")
    device = torch.device("cuda", torch.cuda.current_device())
    found = torch.cuda.get_device_properties(device)
    if (found.major, found.minor) < LEAST_CAPABILITY:
        raise ValueError(f"{found.name} is of compute capability {found.major}.{found.minor}, the kernels need 8.0")
    return Tuner(found.name, device, 10 * found.major + found.minor, GraphTimer(device), jobs, specialized)


def started(tuner: Tuner, file: Path | None, command: str) -> dict[str, Any]:
    """A report without keys, or with those that ``file`` has; written there.

    Raises ValueError for a file that is no such report, or of other sources, versions or another GPU, OSError for one
    that cannot be read or written.
    """
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(source.read_bytes())
    environment = {
        "device": tuner.name, "arch": tuner.arch, "torch": torch.__version__, "triton": triton.__version__,
        "cuda": torch.version.cuda, "python": sys.version.split()[0], "sources": digest.hexdigest(),
    }  # fmt: skip
    report: dict[str, Any] = {"command": command, "environment": environment, "keys": {}}
    if file and file.exists():
        try:
            former = json.loads(file.read_text())
            theirs, report["keys"] = dict(former["environment"]), dict(former["keys"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is no report of this command: {type(error).__name__}: {error}") from error
        if other := [name for name, value in environment.items() if theirs.get(name) != value]:
            raise ValueError(f"{file} was measured with other {', '.join(other)}: move it, or name another file")
    _write(report, file)
    return report


def run(keys: Sequence[Key], tuner: Tuner, report: dict[str, Any], deadline: float, file: Path | None) -> None:
    """Tune the keys in order until ``deadline`` (``time.monotonic``), into ``report`` and, after each, ``file``.

    Keys that are complete in the report are not measured again, nor is one begun that may take too long.
    """
    longest = 0.0
    for number, key in enumerate(keys, 1):
        begin = time.monotonic()
        if report["keys"].get(key.name, {}).get("complete") or deadline - begin <= longest:
            continue
        lost = False
        try:
            record = tuner.tune(key, deadline)
        except Exception as error:  # recorded: one key must not end the run
            record = {"complete": False, "failed": f"{type(error).__name__}: {error}"}
            lost = isinstance(error, DeviceLostError)
        taken = time.monotonic() - begin
        longest = max(longest, taken)
        print(f"{number} of {len(keys)}: {key.name}, {taken:.0f} s", file=sys.stderr, flush=True)
        report["keys"][key.name] = record
        _write(report, file)
        if lost:
            break


def _write(report: dict[str, Any], file: Path | None) -> None:
    report["date"] = datetime.now(UTC).isoformat(timespec="seconds")
    if file:
        partial = file.with_name(f"{file.name}.part")
        partial.write_text(json.dumps(report, indent=1) + "\n")
        partial.replace(file)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print: 0, 1 where a present configuration fails or is wrong, 2 for a wrong call or without a GPU."""
    deadline = time.monotonic()
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        keys = selected(options.only)
    except ValueError as error:
        parser.error(f"--only {error}")
    if options.list is not None:
        if options.list < _LEAST_ARCH:
            parser.error(f"--list takes a compute capability times 10, at least {_LEAST_ARCH}, got {options.list}")
        for key in keys:
            found = candidates(key, options.list, specialized=options.specialize)
            print(f"{key.name}: {len(found)} candidates, the present one first")
            print("\n".join(f"  {label(config)}" for config in found))
        return 0
    if options.jobs < 1 or not options.seconds > 0:
        parser.error(f"--jobs and --seconds must be positive, got {options.jobs} and {options.seconds}")
    command = " ".join([parser.prog, *(sys.argv[1:] if arguments is None else arguments)])
    try:
        tuner = opened(jobs=options.jobs, specialized=options.specialize)
        report = started(tuner, options.json, command)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    run(keys, tuner, report, deadline + options.seconds, options.json)
    print(printed(report))
    done = sum(report["keys"].get(key.name, {}).get("complete", False) for key in keys)
    print(f"\n{done} of {len(keys)} keys measured" + ("" if done == len(keys) else "; give more --seconds"))
    return 1 if any("failed" in record for record in report["keys"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
