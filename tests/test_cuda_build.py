"""The build of the CUDA extension: what it is told, what it says, what it leaves behind, and what nvcc makes of it."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import setuptools

from rmt_kernels.backends.cuda import report
from rmt_kernels.backends.cuda.report import Usage

_CHECKOUT = Path(__file__).resolve().parent.parent
_SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
_SOURCES = ("CMakeLists.txt", "LICENSE", "README.md", "pyproject.toml", "setup.py", "csrc", "rmt_kernels")


def _load(folder: Path) -> ModuleType:
    """setup.py of a checkout, as a module."""
    spec = importlib.util.spec_from_file_location("setup_of_rmt_kernels", folder / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def script() -> ModuleType:
    if not (_CHECKOUT / "setup.py").exists():
        pytest.skip("no setup.py: not a checkout")
    return _load(_CHECKOUT)


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("RMT_KERNELS_") or name in ("CUDACXX", "CUDA_HOME"):
            monkeypatch.delenv(name)


def _checkout(target: Path) -> Path:
    """A bare copy of this checkout: nothing compiled in it."""
    target.mkdir()
    for name in _SOURCES:
        if (_CHECKOUT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.so", "_built.json")
            shutil.copytree(_CHECKOUT / name, target / name, ignore=ignored)
        else:
            shutil.copy(_CHECKOUT / name, target)
    return target


def _program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def _fake_nvcc(folder: Path, version: str = "13.0.88", known: tuple[int, ...] = (80, 86, 89, 90, 100)) -> Path:
    listed = " ".join(f"compute_{number}" for number in known)
    return _program(
        folder / "bin" / "nvcc",
        f'case "$1" in --version) echo "release 1, V{version}";; --list-gpu-arch) echo {listed};; *) exit 1;; esac',
    )


# -- what the environment says ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "expected"), [("", None), ("0", False), ("1", True)])
def test_a_wish(script: ModuleType, value: str, expected: bool | None) -> None:
    assert script.wish("RMT_KERNELS_CUDA", {"RMT_KERNELS_CUDA": value}) is expected
    assert script.wish("RMT_KERNELS_CUDA", {}) is None


@pytest.mark.parametrize(
    ("variable", "value", "accepted"),
    [
        ("RMT_KERNELS_CUDA", "yes", "accepted are 1 (demand it), 0 (leave it out), or nothing"),
        ("RMT_KERNELS_CPU", "on", "accepted are 1 (demand it), 0 (leave it out), or nothing"),
        ("RMT_KERNELS_EMULATED", "2", "accepted are 1 (demand it), 0 (leave it out), or nothing"),
        ("RMT_KERNELS_CUDA_ALL", "all", "accepted are 1 (demand it), 0 (leave it out), or nothing"),
        ("RMT_KERNELS_CUDA_ARCHS", "80;sm_90", "'sm_90' is no architecture from 80 on; accepted are numbers"),
        ("RMT_KERNELS_CUDA_ARCHS", "75", "'75' is no architecture from 80 on"),
        ("RMT_KERNELS_CUDA_ARCHS", "80,987", "does not know 987; it knows 80, 86, 89, 90, 100"),
    ],
)
def test_other_values_are_refused_whatever_is_wanted(tmp_path: Path, variable: str, value: str, accepted: str) -> None:
    nvcc = _fake_nvcc(tmp_path)
    environ = {"RMT_KERNELS_CPU": "0", "CUDACXX": str(nvcc), variable: value}
    done = _setup(_CHECKOUT, tmp_path, **environ)
    assert done.returncode != 0
    assert f"{variable}={value}: " in done.stderr
    assert accepted in done.stderr


def _setup(checkout: Path, folder: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """``setup.py build_ext`` in a process of its own, which leaves what it makes in ``folder``."""
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(folder / "lib"), *arguments]
    return subprocess.run(
        command, cwd=checkout, env={**os.environ, **environ}, capture_output=True, text=True, check=False
    )


def test_where_nvcc_is_looked_for(script: ModuleType, tmp_path: Path) -> None:
    named, home, on_path, usual = (_fake_nvcc(tmp_path / name) for name in ("named", "home", "path", "usual"))
    environ = {"CUDACXX": str(named), "CUDA_HOME": str(home.parent.parent), "PATH": str(on_path.parent)}
    for expected, gone in ((named, "CUDACXX"), (home, "CUDA_HOME"), (on_path, "PATH"), (usual, "")):
        assert script.find_nvcc(environ, usual.parent.parent) == expected
        environ.pop(gone, None)
        environ.setdefault("PATH", "")


@pytest.mark.parametrize(
    ("environ", "reason"),
    [
        ({"CUDACXX": "/nowhere/nvcc"}, "CUDACXX=/nowhere/nvcc: no such program"),
        ({"CUDA_HOME": "/nowhere"}, "CUDA_HOME=/nowhere: no bin/nvcc in it"),
        ({}, "no nvcc: CUDACXX and CUDA_HOME are not set, and it is neither in PATH nor in /nowhere/bin"),
    ],
)
def test_without_nvcc_the_reason_is_said(script: ModuleType, environ: dict[str, str], reason: str) -> None:
    with pytest.raises(script.BuildError, match=f"^{re.escape(reason)}$"):
        script.find_nvcc({"PATH": "", **environ}, Path("/nowhere"))


def test_an_old_or_broken_nvcc_is_refused(script: ModuleType, tmp_path: Path) -> None:
    assert script.nvcc_version(_fake_nvcc(tmp_path / "new")) == (13, 0, 88)
    assert script.nvcc_version(_fake_nvcc(tmp_path / "first", "12.0.0")) == (12, 0, 0)
    with pytest.raises(script.BuildError, match=r"is nvcc 11\.8\.89, needed is 12\.0"):
        script.nvcc_version(_fake_nvcc(tmp_path / "old", "11.8.89"))
    with pytest.raises(script.BuildError, match="tells no version: 'hello'"):
        script.nvcc_version(_program(tmp_path / "talks", "echo hello"))
    with pytest.raises(script.BuildError, match="does not run"):
        script.nvcc_version(_program(tmp_path / "fails", "exit 3"))


def test_architectures_and_types_that_are_asked_for(script: ModuleType, tmp_path: Path) -> None:
    nvcc = _fake_nvcc(tmp_path, known=(75, 80, 90, 100))
    environ = {"CUDACXX": str(nvcc)}
    # What is not asked for, CMakeLists.txt decides.
    assert script.cuda_options(environ) == ["-DRMT_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc}"]
    everything = script.cuda_options({**environ, "RMT_KERNELS_CUDA_ALL": "1"})
    assert everything[2:] == ["-DRMT_CUDA_ARCHITECTURES=80;90a;100a", "-DRMT_CUDA_ELEMENTS=BF16;F16"]
    some = script.cuda_options({**environ, "RMT_KERNELS_CUDA_ALL": "1", "RMT_KERNELS_CUDA_ARCHS": "90a, 100f"})
    assert some[2:] == ["-DRMT_CUDA_ARCHITECTURES=90a;100f", "-DRMT_CUDA_ELEMENTS=BF16;F16"]


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (["ok", "a.cu(3): error: no x", "  x", "2 errors detected"], "a.cu(3): error: no x"),
        (["nvcc fatal   : Unsupported gpu architecture"], "nvcc fatal   : Unsupported gpu architecture"),
        (["-- x", "CMake Error at a.txt:2 (project):", "", "  No x", "y"], "CMake Error at a.txt:2 (project): No x"),
        (["ninja: build stopped.", ""], "ninja: build stopped."),
        ([], ""),
    ],
)  # fmt: skip
def test_the_reason_is_found_in_what_a_compiler_says(script: ModuleType, said: list[str], reason: str) -> None:
    assert script.first_error(said) == reason


def test_a_failing_command_tells_its_last_lines(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    script.run(["sh", "-c", "echo fine"])
    with pytest.raises(script.BuildError, match=r"^x: error: y$") as caught:
        script.run(["sh", "-c", "seq 100; echo x: error: y; exit 1"])
    assert caught.value.output == (*map(str, range(101 - script.TAIL + 1, 101)), "x: error: y")
    assert capsys.readouterr().out.startswith("fine\n1\n2\n")


# -- what it leaves behind --------------------------------------------------------------------------------------------

Build = Callable[..., dict[str, Any]]


@pytest.fixture
def build(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Build:
    """setup.py's command, with CMake played: ``failing`` names modules that do not compile. Gives _built.json."""
    (tmp_path / "rmt_kernels").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script, "ROOT", tmp_path)
    modules = {name: replace(module, options=lambda: ()) for name, module in script.MODULES.items()}
    monkeypatch.setattr(script, "MODULES", modules)

    def run(*, failing: tuple[str, ...] = (), inplace: bool = True, **environ: str) -> dict[str, Any]:
        def played(name: str, _: object) -> Path:
            if name in failing:
                raise script.BuildError("a.cu(3): error: no x", ["FAILED: a.cu", "a.cu(3): error: no x"])
            folder = tmp_path / "build" / name
            (folder / "generated" / "_cuda").mkdir(parents=True, exist_ok=True)
            facts = {"architectures": ["80"], "elements": ["BF16"], "widths": [64], "compiler": "nvcc 13.0.88"}
            (folder / "generated" / "_cuda" / "built.json").write_text(json.dumps(facts))
            (folder / f"{name}{_SUFFIX}").write_text(name)
            return folder

        with monkeypatch.context() as patch:
            patch.setattr(script, "build", played)
            for name, value in environ.items():
                patch.setenv(f"RMT_KERNELS_{name}", value)
            extensions = [setuptools.Extension(f"rmt_kernels.{name}", [], optional=True) for name in modules]
            options = {"name": "rmt_kernels", "packages": ["rmt_kernels"], "ext_modules": extensions}
            command = script.CMakeBuild(setuptools.Distribution(options))
            command.build_lib, command.inplace = str(tmp_path / "lib"), inplace
            command.ensure_finalized()
            command.run()
        folder = tmp_path if inplace else tmp_path / "lib"
        record: dict[str, Any] = json.loads((folder / "rmt_kernels" / "_built.json").read_text())
        return record

    return run


def _modules(folder: Path) -> set[str]:
    return {file.name.removesuffix(_SUFFIX) for file in folder.glob(f"rmt_kernels/*{_SUFFIX}")}


def test_what_was_built_is_recorded(build: Build, tmp_path: Path) -> None:
    record = build()
    assert record["cuda"] == {
        "module": f"_cuda{_SUFFIX}",
        "architectures": ["80"],
        "elements": ["BF16"],
        "widths": [64],
        "compiler": "nvcc 13.0.88",
    }
    assert _modules(tmp_path) == {"_cpu", "_cuda"}
    assert build(EMULATED="1") == record
    assert _modules(tmp_path) == {"_cpu", "_cuda", "_emulated"}


def test_a_failed_extension_costs_only_itself(build: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert build(failing=("_cuda",), CPU="1") == {"cuda": {"why_missing": "a.cu(3): error: no x"}}
    assert _modules(tmp_path) == {"_cpu"}
    said = capsys.readouterr().err
    assert "installing WITHOUT the CUDA extension: a.cu(3): error: no x\n    FAILED: a.cu\n" in said
    assert "Needed: nvcc 12.0 or later" in said
    assert "architectures" in build(failing=("_cpu",), CUDA="1")["cuda"]
    assert _modules(tmp_path) == {"_cuda"}
    assert "installing WITHOUT the compiled CPU kernels" in capsys.readouterr().err


@pytest.mark.parametrize("module", ["CPU", "CUDA", "EMULATED"])
def test_what_is_demanded_and_fails_is_an_error(build: Build, module: str) -> None:
    with pytest.raises(SystemExit, match=rf"RMT_KERNELS_{module}=1 demands .*, and building failed: a\.cu\(3\): error"):
        build(failing=(f"_{module.lower()}",), **{module: "1"})


def test_what_is_left_out_does_not_stay_from_an_earlier_build(build: Build, tmp_path: Path) -> None:
    build(EMULATED="1")
    assert build(CUDA="0", CPU="0") == {"cuda": {"why_missing": "left out by RMT_KERNELS_CUDA=0"}}
    assert _modules(tmp_path) == set()
    build(EMULATED="1", inplace=False)
    build(inplace=False)
    assert _modules(tmp_path / "lib") == {"_cpu", "_cuda"}
    assert _modules(tmp_path) == set()  # an install does not touch the checkout


# -- a failure, from the command line ---------------------------------------------------------------------------------


def test_without_nvcc_a_demanded_extension_fails_loudly(tmp_path: Path) -> None:
    checkout = _checkout(tmp_path / "checkout")
    environ = {"RMT_KERNELS_CPU": "0", "CUDACXX": "/nowhere/nvcc"}
    done = _setup(checkout, tmp_path, RMT_KERNELS_CUDA="1", **environ)
    assert done.returncode != 0
    assert done.stderr.endswith(
        "rmt_kernels: RMT_KERNELS_CUDA=1 demands the CUDA extension, and building failed: CUDACXX=/nowhere/nvcc: "
        "no such program\n"
    )
    assert "Traceback" not in done.stderr
    done = _setup(checkout, tmp_path, "--inplace", **environ)
    assert done.returncode == 0, done.stderr
    assert "WITHOUT the CUDA extension: CUDACXX=/nowhere/nvcc: no such program" in done.stderr
    info = [sys.executable, "-m", "rmt_kernels", "info"]
    told = subprocess.run(info, cwd=checkout, capture_output=True, text=True, check=True).stdout
    reason = "the CUDA extension was not built: CUDACXX=/nowhere/nvcc: no such program; build it with"
    assert f"backend cuda       not usable: {reason}" in told


# -- what nvcc makes of it --------------------------------------------------------------------------------------------


@dataclass
class _Compiled:
    folder: Path
    log: str

    @property
    def module(self) -> Path:
        return self.folder / f"_cuda{_SUFFIX}"


def _need(*tools: str) -> None:
    for name in tools:
        if (report.find_nvcc() if name == "nvcc" else report.tool(name)) is None:
            pytest.skip(f"{name} is not found")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[_Compiled]:
    """``_cuda`` for sm_80 and sm_90a, with the kernels of one width, in a copy of the checkout."""
    _need("nvcc")
    pytest.importorskip("pybind11")
    checkout = _checkout(tmp_path_factory.mktemp("cuda") / "checkout")
    script = _load(checkout)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as log:
        patch.setenv("CUDAFLAGS", "-Xptxas=-v")
        options = [*script.cuda_options({"PATH": os.environ["PATH"]}), "-DRMT_CUDA_WIDTHS=64"]
        yield _Compiled(script.build("_cuda", options), log.getvalue())


def test_it_loads_without_a_driver_or_a_toolkit(compiled: _Compiled) -> None:
    code = (
        "import importlib.util, json, sys\n"
        "spec = importlib.util.spec_from_file_location('_cuda', sys.argv[1])\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "print(json.dumps(module.built()))\n"
    )
    hidden = ("LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES")
    environ = {name: value for name, value in os.environ.items() if name not in hidden}
    command = [sys.executable, "-I", "-c", code, str(compiled.module)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    built = json.loads(done.stdout)
    assert built["architectures"] == "80, 90a"
    assert re.fullmatch(r"nvcc \d+\.\d+\.\d+", built["compiler"])
    assert built["instances"] == [["bf16", 64]]
    facts = json.loads((compiled.folder / "generated" / "_cuda" / "built.json").read_text())
    assert facts == {
        "architectures": ["80", "90a"],
        "elements": ["BF16"],
        "widths": [64],
        "compiler": built["compiler"],
    }


def test_it_links_neither_cuda_nor_torch(compiled: _Compiled) -> None:
    _need("readelf")
    command = [str(report.tool("readelf")), "--dynamic", str(compiled.module)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", said)
    assert needed
    assert not [name for name in needed if re.search("cuda|torch|c10|nv", name)]


def test_its_kernels_fit_into_registers_and_use_tensor_cores(compiled: _Compiled) -> None:
    _need("cuobjdump")
    found = report.usages(compiled.log, report.instructions(compiled.module))
    assert {usage.arch for usage in found} == {"80", "90a"}
    kernels = {usage.kernel.split("<")[0] for usage in found}
    assert {"forward_kernel", "decode_kernel", "backward_kernel"} <= kernels
    broken = [usage for usage in found if report.violations(usage)]
    assert not broken, report.table(broken)
    assert all(usage.instructions["LDGSTS"] for usage in found if usage.instructions["HMMA"])


def test_newer_gpus_have_ptx_to_compile_from(compiled: _Compiled) -> None:
    _need("cuobjdump")
    command = [str(report.tool("cuobjdump")), "--list-ptx", str(compiled.module)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"sm_\w+(?=\.ptx)", said)) == {"sm_80"}


@pytest.mark.slow
def test_a_bare_checkout_builds_the_default_set(tmp_path: Path) -> None:
    _need("nvcc")
    checkout = _checkout(tmp_path / "checkout")
    done = _setup(checkout, tmp_path, "--inplace", RMT_KERNELS_CUDA="1", RMT_KERNELS_CPU="0")
    assert done.returncode == 0, done.stdout + done.stderr
    info = [sys.executable, "-m", "rmt_kernels", "info"]
    told = subprocess.run(info, cwd=checkout, capture_output=True, text=True, check=True).stdout
    assert re.search(
        r"^backend cuda +usable.*, built: BF16 at head_dim 64, 128 for sm_80, sm_90a, by nvcc \d", told, re.MULTILINE
    )


@pytest.mark.slow
@pytest.mark.parametrize("element", ["BF16", "F16"])
def test_every_kernel_of_both_architectures(element: str, capsys: pytest.CaptureFixture[str]) -> None:
    _need("nvcc", "cuobjdump")
    assert report.main(["--element", element]) == 0, capsys.readouterr()


# -- the report -------------------------------------------------------------------------------------------------------

_HEALTHY = Usage("forward_kernel<x>", "80", 128, 0, 0, 0, 0, {"HMMA": 8, "LDSM": 4, "LDGSTS": 2, "LDL": 0, "STL": 0})


@pytest.mark.parametrize(
    ("usage", "words"),
    [
        (_HEALTHY, ()),
        (replace(_HEALTHY, stack=8), ()),
        (replace(_HEALTHY, spill_stores=4, spill_loads=8), ("spills: 4 bytes stored, 8 loaded",)),
        (
            replace(_HEALTHY, stack=64, instructions={**_HEALTHY.instructions, "STL": 3}),
            ("an array in local memory: 64 bytes of stack, 3 instructions",),
        ),
        (replace(_HEALTHY, instructions={**_HEALTHY.instructions, "HMMA": 0}), ("no tensor-core instruction",)),
        (replace(_HEALTHY, kernel="combine_kernel<x>", instructions={"HMMA": 0, "LDL": 0, "STL": 0}), ()),
    ],
)
def test_violations(usage: Usage, words: tuple[str, ...]) -> None:
    assert report.violations(usage) == words


def test_a_report_needs_both_tools_words() -> None:
    log = (
        "ptxas info    : Compiling entry function '_Zk' for 'sm_90a'\n"
        "ptxas info    : Function properties for _Zk\n"
        "    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads\n"
        "ptxas info    : Used 96 registers, used 1 barriers, 8 bytes cumulative stack size, 512 bytes smem\n"
    )
    (usage,) = report.usages(log, {("_Zk", "90a"): {"HMMA": 2, "IADD": 5}})
    expected = {"HMMA": 2, "LDSM": 0, "LDGSTS": 0, "LDL": 0, "STL": 0}
    assert usage == Usage(usage.kernel, "90a", 96, 8, 4, 12, 512, expected)
    with pytest.raises(ValueError, match="ptxas tells of"):
        report.usages(log, {("_Zk", "80"): {"HMMA": 2}})
    with pytest.raises(ValueError, match="ptxas tells of"):
        report.usages("", {})


_TOYS = {
    "forward": "__global__ void __launch_bounds__(1024, 2) forward_kernel(float* x) {\n"
    "  float v[64];\n"
    "#pragma unroll\n"
    "  for (int i = 0; i < 64; ++i) v[i] = x[i * 1024];\n"
    "  __syncthreads();\n"
    "#pragma unroll\n"
    "  for (int i = 0; i < 64; ++i) x[i * 2048] = v[i] * v[63 - i];\n}\n",
    "decode": "__global__ void combine_kernel(float* x) { x[0] = 1; }\n"
    "namespace rmt { template <class T> __global__ void decode_kernel(T* x) { x[threadIdx.x] *= 2; } }\n"
    "template __global__ void rmt::decode_kernel<float>(float*);\n",
    "backward": "int x = nonsense;\n",
}


def test_the_report_fails_kernels_that_break_a_rule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _need("nvcc", "cuobjdump", "c++filt")
    for name, text in _TOYS.items():
        (tmp_path / f"{name}.cu").write_text(text)
    monkeypatch.setattr(report, "SOURCES", tmp_path)
    call = ["--arch", "80", "--width", "64", "--jobs", "1"]
    assert report.main(call) == 1
    said = capsys.readouterr()
    lines = {line.split()[0]: line for line in said.out.splitlines() if line}
    assert "FAIL: spills: " in lines["forward_kernel"]
    assert lines["decode_kernel<float>"].endswith(" FAIL: no tensor-core instruction")
    assert lines["combine_kernel"].endswith(" ok")
    assert 'error: identifier "nonsense" is undefined' in said.err
    assert said.out.endswith("3 kernels: 2 FAIL; 1 file does not compile\n")


@pytest.mark.parametrize(
    ("arguments", "environ", "words"),
    [
        (["--jobs", "0"], {}, "--jobs must be at least 1, got 0"),
        (["--element", "F32"], {}, "invalid choice: 'F32'"),
        ([], {"CUDACXX": "/nowhere/nvcc"}, "nvcc is not found; CUDACXX or CUDA_HOME tells where"),
    ],
)
def test_wrong_calls_are_refused(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    environ: dict[str, str],
    words: str,
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match="2"):
        report.main(arguments)
    assert words in capsys.readouterr().err


def test_without_the_sources_the_report_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "SOURCES", tmp_path / "csrc")
    with pytest.raises(SystemExit, match="2"):
        report.main([])
    assert "run it in a checkout" in capsys.readouterr().err
