"""What the CUDA kernels take of a GPU that need not be there: ``python -m rmt_kernels.backends.cuda.report``.

Compiles a checkout's kernels and prints their registers, memory and instructions. Exit status 1 where one does not
compile, spills registers, or lacks the tensor-core instructions of its products; 2 for a wrong call or a missing tool.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Usage", "compile_kernels", "find_nvcc", "instructions", "main", "table", "tool", "usages", "violations"]

SOURCES = Path(__file__).parents[3] / "csrc" / "cuda"
FILES = ("forward", "decode", "backward")
FLAGS = ("-std=c++20", "-O3", "-DNDEBUG", "-lineinfo")  # as far as the machine code follows from CMakeLists.txt's
# Tensor-core products, matrices from shared memory, asynchronous copies, and local memory, read and written.
COUNTED = ("HMMA", "LDSM", "LDGSTS", "LDL", "STL")
WITHOUT_PRODUCTS = ("combine_kernel", "prepare_kernel")


@dataclass(frozen=True)
class Usage:
    """What one kernel takes on one architecture, which nvcc calls ``"90a"``.

    ``registers`` is per thread; ``stack``, ``spill_stores``, ``spill_loads`` and ``shared``, which is static, are
    bytes; ``instructions`` counts those of COUNTED in the machine code.
    """

    kernel: str
    arch: str
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int
    instructions: Mapping[str, int]


def violations(usage: Usage) -> tuple[str, ...]:
    """What is wrong with the kernel, in words; empty where nothing is."""
    found = []
    if usage.spill_stores or usage.spill_loads:
        found.append(f"spills: {usage.spill_stores} bytes stored, {usage.spill_loads} loaded")
    elif local := usage.instructions["LDL"] + usage.instructions["STL"]:
        found.append(f"an array in local memory: {usage.stack} bytes of stack, {local} instructions")
    if not usage.instructions["HMMA"] and not usage.kernel.startswith(WITHOUT_PRODUCTS):
        found.append("no tensor-core instruction")
    return tuple(found)


def find_nvcc() -> str | None:
    """Path of nvcc: CUDACXX's, CUDA_HOME's, the one in PATH, or in /usr/local/cuda; None where there is none."""
    if named := os.environ.get("CUDACXX"):
        return shutil.which(named)
    if home := os.environ.get("CUDA_HOME"):
        return shutil.which(os.path.join(home, "bin", "nvcc"))
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def tool(name: str) -> str | None:
    """Path of a tool of the CUDA toolkit: nvcc's neighbour, the one in PATH, or Triton's; None where there is none."""
    folders = [os.path.dirname(nvcc)] if (nvcc := find_nvcc()) else []
    folders += [*os.environ.get("PATH", "").split(os.pathsep), "/usr/local/cuda/bin"]
    if triton := importlib.util.find_spec("triton"):
        folders += [
            os.path.join(place, "backends", "nvidia", "bin") for place in triton.submodule_search_locations or ()
        ]
    return shutil.which(name, path=os.pathsep.join(folders))


def compile_kernels(arch: str, element: str, width: int, file: str, folder: Path) -> list[Usage]:
    """Compiles one of FILES for one architecture, element type and width; ``folder`` takes the machine code.

    Raises subprocess.CalledProcessError, with nvcc's words in ``stderr``, and FileNotFoundError without a tool.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise FileNotFoundError("nvcc is not found: CUDACXX or CUDA_HOME tells where it is")
    cubin = folder / f"{file}-{element}-{width}-{arch}.cubin"
    command = [
        nvcc, *FLAGS, f"-arch=sm_{arch}", "-cubin", "-Xptxas=-v", f"-DRMT_ELEMENT={element}", f"-DRMT_WIDTH={width}",
        str(SOURCES / f"{file}.cu"), "-o", str(cubin),
    ]  # fmt: skip
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return usages(done.stdout + done.stderr, instructions(cubin))


def instructions(binary: Path) -> dict[tuple[str, str], Counter[str]]:
    """How many of each instruction a cubin, object or library has, by (mangled kernel, architecture).

    Raises FileNotFoundError without cuobjdump, and subprocess.CalledProcessError where it fails.
    """
    cuobjdump = tool("cuobjdump")
    if cuobjdump is None:
        raise FileNotFoundError("cuobjdump is not found: it comes with the CUDA toolkit, and with triton")
    code = subprocess.run([cuobjdump, "-sass", str(binary)], check=True, capture_output=True, text=True).stdout
    found: dict[tuple[str, str], Counter[str]] = {}
    arch, counts = "", Counter[str]()
    for line in code.splitlines():
        if match := re.match(r"\s*code for sm_(\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function : (\S+)", line):
            counts = found.setdefault((match[1], arch), Counter())
        elif match := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z]\w*)", line):
            counts[match[1]] += 1
    return found


_PTXAS = re.compile(
    r"Compiling entry function '(?P<kernel>\w+)' for 'sm_(?P<arch>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def usages(log: str, counts: Mapping[tuple[str, str], Mapping[str, int]]) -> list[Usage]:
    """Joins what ``ptxas -v`` said with the instructions of the same kernels.

    Raises ValueError where one has a kernel that the other lacks.
    """
    said = {(match["kernel"], match["arch"]): match for match in _PTXAS.finditer(log)}
    if said.keys() != counts.keys() or not said:
        raise ValueError(f"ptxas tells of {sorted(said)}, cuobjdump of {sorted(counts)}")
    names = demangle(kernel for kernel, _ in said)
    found = []
    for (kernel, arch), match in said.items():
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        used = Usage(
            kernel=names[kernel],
            arch=arch,
            registers=int(match["registers"]),
            stack=int(match["stack"]),
            spill_stores=int(match["stores"]),
            spill_loads=int(match["loads"]),
            shared=int(shared[1]) if shared else 0,
            instructions={name: counts[kernel, arch].get(name, 0) for name in COUNTED},
        )
        found.append(used)
    return found


def demangle(kernels: Iterable[str]) -> dict[str, str]:
    """C++ names without namespaces, results and parameters; as they are where no tool reads them."""
    mangled = list(dict.fromkeys(kernels))
    filt = tool("cu++filt") or tool("c++filt")
    if filt is None:
        return {name: name for name in mangled}
    said = subprocess.run([filt], input="\n".join(mangled) + "\n", check=True, capture_output=True, text=True).stdout
    return dict(zip(mangled, map(_short, said.splitlines()), strict=True))


def _short(name: str) -> str:
    name = re.sub(r"\(anonymous namespace\)::|<unnamed>::|\brmt::|^void |\((?:int|bool|unsigned int)\)", "", name)
    return name.split("(", 1)[0].replace("> >", ">>")


def table(rows: Sequence[Usage]) -> str:
    """The rows as aligned text: bytes of spills and of static shared memory, numbers of instructions."""
    lines = [["kernel", "sm", "registers", "spilled", "stack", "shared", *COUNTED, ""]]
    for row in rows:
        numbers = [row.registers, row.spill_stores + row.spill_loads, row.stack, row.shared]
        numbers += [row.instructions[name] for name in COUNTED]
        verdict = "; ".join(violations(row))
        lines.append([row.kernel, row.arch, *map(str, numbers), f"FAIL: {verdict}" if verdict else "ok"])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if index in (0, len(line) - 1) else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _compile(task: tuple[str, str, int, str], folder: Path) -> list[Usage] | str:
    arch, element, width, file = task
    try:
        return compile_kernels(arch, element, width, file, folder)
    except subprocess.CalledProcessError as error:
        return f"{file}.cu, {element}, width {width}, sm_{arch}, does not compile:\n{error.stderr or error.stdout}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m rmt_kernels.backends.cuda.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--arch", nargs="+", default=["80", "90a"], metavar="SM", help="default: 80 90a")
    parser.add_argument("--element", nargs="+", choices=("BF16", "F16"), default=["BF16"], help="default: BF16")
    parser.add_argument("--width", type=int, nargs="+", default=[64, 128], metavar="N", help="default: 64 128")
    parser.add_argument("--file", nargs="+", choices=FILES, default=FILES, help="only these files of kernels")
    parser.add_argument(
        "--jobs", type=int, default=len(os.sched_getaffinity(0)), metavar="N", help="default: all cores"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, print, judge: the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {options.jobs}")
    if not SOURCES.is_dir():
        parser.error(f"no {SOURCES}: the sources are not installed with the package; run it in a checkout")
    for name, path in (("nvcc", find_nvcc()), ("cuobjdump", tool("cuobjdump"))):
        if path is None:
            parser.error(f"{name} is not found; CUDACXX or CUDA_HOME tells where the CUDA toolkit is")
    tasks = list(itertools.product(options.arch, options.element, options.width, options.file))
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:
        results = list(pool.map(lambda task: _compile(task, Path(folder)), tasks))
    rows = [row for result in results if not isinstance(result, str) for row in result]
    errors = [result for result in results if isinstance(result, str)]
    if rows:
        print(table(rows))
    for error in errors:
        print(f"\n{error}", file=sys.stderr)
    failed = sum(1 for row in rows if violations(row))
    verdict = f"{failed} FAIL" if failed else "none spills, none lacks tensor cores"
    if errors:
        verdict += f"; {len(errors)} {'file does' if len(errors) == 1 else 'files do'} not compile"
    print(f"\n{len(rows)} kernels: {verdict}")
    return 1 if failed or errors else 0


if __name__ == "__main__":
    sys.exit(main())
