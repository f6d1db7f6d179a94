"""The compile gate: every kernel in every configuration, compiled for GPUs that need not be there.

``python -m rmt_kernels.backends.triton.gate`` prints what each compiled kernel takes and fails where one spills, runs
without tensor cores, or takes more registers or shared memory than its architecture or its configuration allows.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import platform
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import triton
from triton import knobs

from rmt_kernels.backends.triton.configs import CHOSEN_WITH
from rmt_kernels.backends.triton.resources import (
    CHIPS,
    REGISTERS_PER_THREAD,
    Resources,
    Variant,
    matches,
    resources,
)

__all__ = ["Row", "main", "run", "table", "violations"]

_VARIANTS = ("rmt_kernels.backends.triton.variants", "rmt_kernels.backends.triton.relative_variants")


@dataclass(frozen=True)
class Row:
    """One line of the table; ``resources`` is None where compiling failed."""

    kernel: str
    arch: int
    dtype: str
    head_dim: int
    label: str
    num_warps: int
    num_stages: int
    resources: Resources | None
    violations: tuple[str, ...]


def tolerated() -> int:
    """Bytes of registers that any kernel may spill: none with the compiler that the table's rows were chosen with.
    Another one gives registers out a little differently, and a few bytes outside of the products cost next to nothing.
    """
    return 0 if triton.__version__ == CHOSEN_WITH else 64


def violations(variant: Variant, arch: int, used: Resources) -> tuple[str, ...]:
    """Each limit that the compiled kernel breaks, in words; empty where it breaks none."""
    chip = CHIPS[arch]
    found = []
    if max(used.stack, used.spilled, used.local_ops) > max(variant.spills, tolerated()):
        found.append(
            f"spills: {used.stack} bytes of stack, {used.spilled} bytes stored and loaded, "
            f"{used.local_ops} local-memory instructions"
        )
    if used.registers > REGISTERS_PER_THREAD:
        found.append(f"{used.registers} registers a thread, limit {REGISTERS_PER_THREAD}")
    if used.shared > chip.shared_per_program:
        found.append(f"{used.shared / 1024:.1f} KiB of shared memory, limit {chip.shared_per_program >> 10}")
    elif used.programs(arch) < variant.programs:
        found.append(
            f"an SM holds {used.programs_by_registers} programs by registers, {used.programs_by_shared(arch)} by "
            f"shared and tensor memory, {used.programs(arch)} in all; promised {variant.programs}"
        )
    if variant.tensor_cores:
        wanted = ("HMMA", *chip.tensor_ops) if variant.tensor_cores == "mma" else chip.tensor_ops
        if not any(matches(name, wanted) for name in used.tensor_ops):
            found.append(f"no tensor-core instruction {' or '.join(wanted)}, only {used.tensor_ops or 'scalar ones'}")
        elif other := [name for name in used.tensor_ops if not matches(name, wanted)]:
            found.append(f"some products use {', '.join(other)} instead of {' or '.join(wanted)}: {used.tensor_ops}")
    elif used.tensor_ops:
        found.append(f"tensor-core instructions, where exact float32 products were promised: {used.tensor_ops}")
    if variant.warp_specialized != (used.warps > variant.num_warps):
        found.append(
            f"{used.warps} warps of {variant.num_warps} configured: "
            f"warp specialisation was {'' if variant.warp_specialized else 'not '}promised"
        )
    if used.remark:
        found.append(f"ptxas: {used.remark}")
    return tuple(found)


def run(tasks: Sequence[tuple[Variant, int]], jobs: int) -> Iterator[tuple[int, Row]]:
    """Index and row of each (variant, architecture), as they finish, ``jobs`` at a time.

    Each compiles in a process of its own: LLVM aborts on some kernels, and that must cost one row, not the run.
    """
    context = multiprocessing.get_context("fork")  # a JITFunction cannot be sent, only inherited
    waiting = deque(range(len(tasks)))
    running: dict[Any, tuple[int, Any, Path]] = {}
    with tempfile.TemporaryDirectory() as folder:
        while waiting or running:
            while waiting and len(running) < jobs:
                index = waiting.popleft()
                noise = Path(folder, f"{index}.txt")
                noise.touch()
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_child, args=(sender, noise, *tasks[index]), daemon=True)
                process.start()
                sender.close()
                running[receiver] = index, process, noise
            for ready in wait(list(running)):
                index, process, noise = running.pop(ready)
                answer = _answer(ready)
                process.join()
                answer = answer or f"the compiler ended with status {process.exitcode}"
                yield index, _row(*tasks[index], answer, noise.read_text(errors="replace"))


def _child(sender: Connection, noise: Path, variant: Variant, arch: int) -> None:
    with noise.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        sender.send(resources(variant, arch))
    except Exception as error:
        sender.send(f"{type(error).__name__}: {error}")


def _answer(receiver: Any) -> Resources | str | None:
    """What the child measured, or its error; None where it died."""
    with receiver:
        try:
            answer: Resources | str = receiver.recv()
        except EOFError:
            return None
    return answer


def _row(variant: Variant, arch: int, answer: Resources | str, noise: str) -> Row:
    if isinstance(answer, Resources):
        used, broken = answer, violations(variant, arch, answer)
    else:
        errors = [line.strip()[:200] for line in f"{answer}\n{noise}".splitlines() if "error" in line.lower()]
        used, broken = None, (f"does not compile: {'; '.join(dict.fromkeys([answer.splitlines()[0], *errors[:3]]))}",)
    return Row(
        variant.kernel,
        arch,
        variant.dtype,
        variant.head_dim,
        variant.label,
        variant.num_warps,
        variant.num_stages,
        used,
        broken,
    )


_COLUMNS: dict[str, Callable[[Row, Resources], object]] = {
    "regs": lambda row, used: used.registers,
    "spilled": lambda row, used: max(used.spilled, used.stack),
    "KiB": lambda row, used: f"{used.shared / 1024:.1f}",
    "p/SM regs": lambda row, used: used.programs_by_registers,
    "p/SM smem": lambda row, used: used.programs_by_shared(row.arch),
    "tensor ops": lambda row, used: " ".join(f"{n} {name}" for name, n in used.tensor_ops.items()) or "-",
    "code": lambda row, used: used.code,
    "s": lambda row, used: f"{used.seconds:.1f}",
}

_LEFT = {"kernel", "dtype", "config", "tensor ops", "verdict"}


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text: bytes for ``spilled`` and ``code``, KiB of shared memory, seconds to compile."""
    lines = [["kernel", "sm", "dtype", "d", "config", "warps", "stages", *_COLUMNS, "verdict"]]
    for row in rows:
        used = row.resources
        measured = [str(column(row, used)) if used else "" for column in _COLUMNS.values()]
        config = (row.kernel, row.arch, row.dtype, row.head_dim, row.label, row.num_warps, row.num_stages)
        lines.append([*map(str, config), *measured, f"FAIL: {'; '.join(row.violations)}" if row.violations else "ok"])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    sides = [str.ljust if name in _LEFT else str.rjust for name in lines[0]]
    return "\n".join(
        "  ".join(side(cell, width) for side, cell, width in zip(sides, line, widths, strict=True)).rstrip()
        for line in lines
    )


def _progress(rows: Iterator[tuple[int, Row]], total: int) -> Iterator[tuple[int, Row]]:
    try:
        from tqdm import tqdm
    except ImportError:
        return rows
    tqdm.monitor_interval = 0  # its thread would not survive the forks
    progress: Iterator[tuple[int, Row]] = iter(tqdm(rows, total=total, unit="kernel", disable=None))
    return progress


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m rmt_kernels.backends.triton.gate", description=__doc__)
    parser.add_argument("--arch", type=int, nargs="+", choices=sorted(CHIPS), default=sorted(CHIPS))
    parser.add_argument("--kernel", nargs="+", metavar="NAME", help="only these kernels")
    parser.add_argument(
        "--jobs", type=int, default=len(os.sched_getaffinity(0)), metavar="N", help="default: all cores"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table there too")
    parser.add_argument(
        "--variants", nargs="+", default=_VARIANTS, metavar="MODULE", help="have variants(arch); default: every kernel"
    )
    parser.add_argument("--all", action="store_true", help="take all_variants(arch): every option, width and dtype")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, print, judge: 0 where every row is within its limits, 1 where one is not, 2 for a wrong call."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set, which makes kernels that cannot be compiled: unset it")
    if options.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {options.jobs}")
    listed = []
    for module in options.variants:
        try:
            listed.append(getattr(importlib.import_module(module), "all_variants" if options.all else "variants"))
        except ModuleNotFoundError as error:
            parser.error(f"--variants {module}: {error}")
    tasks = [(variant, arch) for arch in options.arch for variants in listed for variant in variants(arch)]
    names, modules = sorted({variant.kernel for variant, _ in tasks}), " ".join(options.variants)
    if unknown := set(options.kernel or ()) - set(names):
        parser.error(f"--kernel {' '.join(sorted(unknown))}: no such kernel, {modules} has {', '.join(names)}")
    tasks = [task for task in tasks if not options.kernel or task[0].kernel in options.kernel]
    if not tasks:
        parser.error(f"{modules} lists no kernel for {options.arch}")

    started = time.perf_counter()
    rows = [row for _, row in sorted(_progress(run(tasks, options.jobs), len(tasks)), key=lambda pair: pair[0])]
    failed = sum(1 for row in rows if row.violations)
    print(table(rows))
    if tolerated():
        print(
            f"\nThe rows were chosen with triton {CHOSEN_WITH}: {tolerated()} bytes of spilled registers are tolerated."
        )
    print(
        f"\n{len(rows)} kernels compiled by triton {triton.__version__} in {time.perf_counter() - started:.0f} s: "
        + (f"{failed} FAIL" if failed else "all within their limits")
    )
    if options.json:
        command = " ".join([parser.prog, *(sys.argv[1:] if arguments is None else arguments)])
        options.json.write_text(json.dumps({"command": command, **_result(rows)}, indent=1) + "\n")
    return 1 if failed else 0


def _result(rows: Sequence[Row]) -> dict[str, object]:
    versions = {
        "python": platform.python_version(),
        "triton": triton.__version__,
        "ptxas": knobs.nvidia.ptxas.version,
        "ptxas-blackwell": knobs.nvidia.ptxas_blackwell.version,
    }
    lines = []
    for row in rows:
        line = asdict(row)
        if row.resources:
            line["resources"]["programs"] = row.resources.programs(row.arch)
        lines.append(line)
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return {"date": date, "versions": versions, "rows": lines}


if __name__ == "__main__":
    sys.exit(main())
