"""Builds the compiled modules with CMake and Ninja; CMakeLists.txt is the one description of the build.

docs/building.md tells the environment variables. The build must see the torch that will run it:
pip install --no-build-isolation .
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
OLDEST_NVCC = (12, 0)
# Of these, RMT_KERNELS_CUDA_ALL=1 builds the ones that nvcc knows.
ALL_ARCHITECTURES = ("80", "86", "89", "90a", "100a", "120a")
ALL_ELEMENTS = ("BF16", "F16")
TAIL = 25  # lines of the compiler's output that a failure repeats


class BuildError(Exception):
    """Why a module cannot be built, and the end of what the compiler said."""

    def __init__(self, reason: str, output: Sequence[str] = ()) -> None:
        super().__init__(reason)
        self.output = tuple(output)


def wish(variable: str, environ: Mapping[str, str] = os.environ) -> bool | None:
    """What the environment says: demanded (True), left out (False), or nothing (None). ValueError for other words."""
    value = environ.get(variable, "")
    if value not in ("", "0", "1"):
        raise ValueError(f"{variable}={value}: accepted are 1 (demand it), 0 (leave it out), or nothing")
    return {"": None, "0": False, "1": True}[value]


def find_nvcc(environ: Mapping[str, str] = os.environ, usual: Path = Path("/usr/local/cuda")) -> Path:
    """nvcc: what CUDACXX names, else CUDA_HOME's, else the first in PATH, else the usual one, else BuildError."""
    if named := environ.get("CUDACXX"):
        found = shutil.which(named, path=environ.get("PATH"))
        if found is None:
            raise BuildError(f"CUDACXX={named}: no such program")
        return Path(found)
    if home := environ.get("CUDA_HOME"):
        nvcc = Path(home, "bin", "nvcc")
        if not os.access(nvcc, os.X_OK):
            raise BuildError(f"CUDA_HOME={home}: no bin/nvcc in it")
        return nvcc
    found = shutil.which("nvcc", path=environ.get("PATH")) or shutil.which(usual / "bin" / "nvcc")
    if found is None:
        raise BuildError(f"no nvcc: CUDACXX and CUDA_HOME are not set, and it is neither in PATH nor in {usual}/bin")
    return Path(found)


def nvcc_version(nvcc: Path) -> tuple[int, ...]:
    """``(13, 0, 88)`` of nvcc 13.0.88. BuildError where it does not run, or is too old."""
    said = _said([str(nvcc), "--version"])
    numbers = re.search(r"\bV(\d+)\.(\d+)\.(\d+)", said)
    if numbers is None:
        raise BuildError(f"{nvcc} --version tells no version: {said.strip()[:200]!r}")
    version = tuple(map(int, numbers.groups()))
    if version < OLDEST_NVCC:
        raise BuildError(f"{nvcc} is nvcc {'.'.join(numbers.groups())}, needed is {'.'.join(map(str, OLDEST_NVCC))}")
    return version


def architectures(nvcc: Path, environ: Mapping[str, str] = os.environ) -> list[str]:
    """GPU architectures to compile for, as the environment wants; empty for CMakeLists.txt's own.

    ValueError for what is no architecture, one that the kernels do not serve, or one unknown to nvcc.
    """
    wanted, everything = environ.get("RMT_KERNELS_CUDA_ARCHS", ""), wish("RMT_KERNELS_CUDA_ALL", environ)
    if not wanted and not everything:
        return []
    known = set(re.findall(r"\bcompute_(\d+)", _said([str(nvcc), "--list-gpu-arch"])))
    if not wanted:
        return [name for name in ALL_ARCHITECTURES if name.rstrip("a") in known]
    names = [name for name in re.split(r"[;,\s]+", wanted) if name]
    for name in names:
        number = re.fullmatch(r"(\d{2,3})[af]?", name)
        if number is None or int(number[1]) < 80:
            raise ValueError(
                f"RMT_KERNELS_CUDA_ARCHS={wanted}: {name!r} is no architecture from 80 on; accepted are numbers, with "
                "a letter where nvcc has one, separated by semicolons: 80;90a"
            )
        if number[1] not in known:
            raise ValueError(
                f"RMT_KERNELS_CUDA_ARCHS={wanted}: {nvcc} does not know {name}; it knows "
                + ", ".join(sorted(known, key=int))
            )
    return names


def cpu_options() -> list[str]:
    """How CMake builds ``_cpu``."""
    try:
        import torch
    except ImportError as error:
        raise BuildError("torch is not installed in the build environment") from error
    return [
        "-DRMT_CPU=ON", f"-DRMT_TORCH_DIR={Path(torch.__file__).parent}",
        f"-DRMT_TORCH_VERSION={torch.__version__.split('+')[0]}",
        f"-DRMT_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
    ]  # fmt: skip


def cuda_options(environ: Mapping[str, str] = os.environ) -> list[str]:
    """How CMake builds ``_cuda``."""
    nvcc = find_nvcc(environ)
    nvcc_version(nvcc)
    options = ["-DRMT_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc}"]
    if names := architectures(nvcc, environ):
        options.append(f"-DRMT_CUDA_ARCHITECTURES={';'.join(names)}")
    if wish("RMT_KERNELS_CUDA_ALL", environ):
        options.append(f"-DRMT_CUDA_ELEMENTS={';'.join(ALL_ELEMENTS)}")
    return options


def emulated_options() -> list[str]:
    """How CMake builds ``_emulated``, which is for tests of every instance."""
    return ["-DRMT_EMULATED=ON", f"-DRMT_CUDA_ELEMENTS={';'.join(ALL_ELEMENTS)}"]


@dataclass(frozen=True)
class Module:
    """A compiled module: the variable that demands it or leaves it out, and what is said where it is missing."""

    variable: str
    options: Callable[[], list[str]]
    what: str
    without: str
    default: bool | None = None


MODULES = {
    "_cpu": Module(
        "RMT_KERNELS_CPU", cpu_options, "compiled CPU kernels",
        "attention on the CPU will fall back to stock PyTorch. Needed: a C++20 compiler, and torch, cmake, ninja and "
        "pybind11 in this environment (pip install --no-build-isolation .)",
    ),
    "_cuda": Module(
        "RMT_KERNELS_CUDA", cuda_options, "CUDA extension",
        "attention on a GPU will run on Triton. Needed: nvcc 12.0 or later with a C++20 compiler that it knows, and "
        "cmake, ninja and pybind11 in this environment (pip install --no-build-isolation .)",
    ),
    "_emulated": Module("RMT_KERNELS_EMULATED", emulated_options, "emulated CUDA kernels", "", default=False),
}  # fmt: skip


def build(name: str, options: Sequence[str]) -> Path:
    """Runs CMake for one module in a directory of its own, which it returns. BuildError where that fails."""
    try:
        import pybind11
    except ImportError as error:
        raise BuildError("pybind11 is not installed in the build environment") from error
    tools = {}
    for tool in ("cmake", "ninja"):
        found = shutil.which(tool) or shutil.which(tool, path=sysconfig.get_path("scripts"))
        if found is None:
            raise BuildError(f"{tool} is not installed in the build environment")
        tools[tool] = found
    folder = ROOT / "build" / f"cmake-{sysconfig.get_platform()}-{sys.implementation.cache_tag}{name}"
    _begin_anew_with_other_compilers(folder, options)
    run(
        [
            tools["cmake"], "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tools['ninja']}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DPython_EXECUTABLE={sys.executable}",
            # -U: what an earlier build was told stays in the cache otherwise.
            "-URMT_CUDA_*", f"-DRMT_MODULE_SUFFIX={SUFFIX}", *options,
        ]
    )  # fmt: skip
    run([tools["cmake"], "--build", str(folder)])
    return folder


def _begin_anew_with_other_compilers(folder: Path, options: Sequence[str]) -> None:
    """CMake keeps the compilers of its first run, and what it found out about them."""
    compilers = [f"{name}={os.environ.get(name, '')}" for name in ("CXX", "CUDAHOSTCXX", "NVCC_CCBIN")]
    for option in options:
        if option.startswith("-DCMAKE_CUDA_COMPILER="):
            compilers += [option, _said([option.partition("=")[2], "--version"])]
    remembered = folder / "compilers.txt"
    if folder.exists() and (not remembered.exists() or remembered.read_text() != "\n".join(compilers)):
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    remembered.write_text("\n".join(compilers))


def run(command: Sequence[str]) -> None:
    """Runs a command, showing its output as it comes. BuildError, with the end of it, where the command fails."""
    lines: list[str] = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as child:
        assert child.stdout is not None
        for line in child.stdout:
            print(line, end="", flush=True)
            lines.append(line.rstrip())
    if child.returncode:
        raise BuildError(first_error(lines) or f"{command[0]} ended with status {child.returncode}", lines[-TAIL:])


def first_error(lines: Sequence[str]) -> str:
    """The first line that tells of an error, and the next where it goes on there; else the last line."""
    said = [line.strip() for line in lines if line.strip()]
    for index, line in enumerate(said):
        if re.search(r"\b(error|fatal)\b", line, re.IGNORECASE):
            return " ".join(said[index : index + 2]) if line.endswith(":") else line
    return said[-1] if said else ""


def _said(command: Sequence[str]) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(f"{' '.join(command)} does not run: {error}") from error


class CMakeBuild(build_ext):  # type: ignore[misc]
    """Builds the modules that are wanted. One that is missing, and not demanded, is an explained omission.

    Leaves rmt_kernels/_built.json, which tells what the CUDA extension was built for, or why there is none.
    """

    def run(self) -> None:
        try:
            self.wishes = {name: wish(module.variable) for name, module in MODULES.items()}
            wish("RMT_KERNELS_CUDA_ALL")
        except ValueError as error:
            raise SystemExit(f"rmt_kernels: {error}") from error
        self.left_out: dict[str, str] = {}
        record = Path(self.build_lib, "rmt_kernels", "_built.json")
        record.parent.mkdir(parents=True, exist_ok=True)
        for name in MODULES:  # of an earlier build, perhaps of other sources
            self._target(name).unlink(missing_ok=True)
        super().run()
        record.write_text(json.dumps({"cuda": self._cuda()}, indent=1) + "\n")
        if self.inplace:
            shutil.copy(record, ROOT / "rmt_kernels" / record.name)
            for name in self.left_out:
                (ROOT / "rmt_kernels" / self._target(name).name).unlink(missing_ok=True)

    def build_extension(self, ext: Extension) -> None:
        name = ext.name.rpartition(".")[2]
        module, wanted = MODULES[name], self.wishes[name]
        if wanted is None:
            wanted = module.default
        if wanted is False:
            self.left_out[name] = f"left out by {module.variable}=0"
            return
        try:
            folder = build(name, module.options())
        except ValueError as error:
            raise SystemExit(f"rmt_kernels: {error}") from error
        except BuildError as error:
            if wanted:
                raise SystemExit(
                    f"rmt_kernels: {module.variable}=1 demands the {module.what}, and building failed: {error}"
                ) from error
            self.left_out[name] = str(error)
            said = "".join(f"    {line}\n" for line in error.output)
            print(
                f"\nrmt_kernels: installing WITHOUT the {module.what}: {error}\n{said}rmt_kernels: {module.without}.\n",
                file=sys.stderr,
            )
        else:
            if name == "_cuda":
                self.built = json.loads((folder / "generated" / "_cuda" / "built.json").read_text())
            shutil.copy(folder / self._target(name).name, self._target(name))

    def _target(self, name: str) -> Path:
        return Path(self.build_lib, self.get_ext_filename(f"rmt_kernels.{name}"))

    def _cuda(self) -> dict[str, Any]:
        if "_cuda" in self.left_out:
            return {"why_missing": self.left_out["_cuda"]}
        return {"module": self._target("_cuda").name, **self.built}


if __name__ == "__main__":
    setup(
        # optional: one that is left out need not be copied.
        ext_modules=[Extension(f"rmt_kernels.{name}", sources=[], optional=True) for name in MODULES],
        cmdclass={"build_ext": CMakeBuild},
    )
