"""The compile gate passes kernels within their limits, and each check fails a kernel that breaks it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from rmt_kernels.backends.triton import gate
from rmt_kernels.backends.triton.resources import Resources, Variant

_CHECKOUT = Path(__file__).parent.parent
_HEALTHY = Resources(
    registers=128,
    warps=4,
    stack=0,
    spilled=0,
    local_ops=0,
    shared=48 << 10,
    scratch=0,
    tensor_columns=0,
    tensor_ops={"HGMMA": 8},
    code=4096,
    remark="",
    seconds=0.5,
)
_VARIANT = Variant("toy", None, {}, {}, 4, 2, "bf16", 64, "64x64", programs=4)


def _gate(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """The gate in a process of its own: in this one, kernels are interpreted where no GPU is."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "rmt_kernels.backends.triton.gate", *map(str, arguments)]
    return subprocess.run(
        command, cwd=_CHECKOUT, env={**inherited, **environment}, capture_output=True, text=True, check=False
    )


@dataclass
class _Toys:
    status: int
    printed: str
    rows: list[dict[str, Any]]
    cache: str

    def of(self, kernel: str) -> list[dict[str, Any]]:
        found = [row for row in self.rows if row["kernel"] == kernel]
        assert found, f"no row of {kernel}"
        return found


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> _Toys:
    folder = tmp_path_factory.mktemp("gate")
    cache, file = str(folder / "cache"), folder / "gate.json"
    done = _gate("--variants", "tests.toy_kernels", "--json", file, TRITON_CACHE_DIR=cache)
    assert file.exists(), done.stderr
    return _Toys(done.returncode, done.stdout, json.loads(file.read_text())["rows"], cache)


def test_kernels_within_their_limits_pass(toys: _Toys) -> None:
    for row in [*toys.of("fits"), *toys.of("narrow"), *toys.of("described")]:
        assert row["violations"] == [], row
        assert row["resources"]["registers"] > 0
        assert row["resources"]["code"] > 0
    assert {(row["arch"], row["dtype"]) for row in toys.of("fits")} == {
        (arch, dtype) for arch in (80, 90, 100) for dtype in ("bf16", "fp16", "fp32")
    }


def test_tensor_cores_are_those_of_the_architecture(toys: _Toys) -> None:
    ops = {row["arch"]: row["resources"]["tensor_ops"].keys() for row in toys.of("fits") if row["dtype"] == "bf16"}
    assert ops == {80: {"HMMA"}, 90: {"HGMMA"}, 100: {"UTCHMMA"}}
    assert all(not row["resources"]["tensor_ops"] for row in toys.of("fits") if row["dtype"] == "fp32")


@pytest.mark.parametrize(
    ("kernel", "words"),
    [
        ("spills", ["spills: ", "ptxas: (C75"]),
        ("shared", ["KiB of shared memory, limit "]),
        ("scalar", ["no tensor-core instruction "]),
        ("no_wgmma", ["no tensor-core instruction HGMMA"]),
        ("crowded", ["promised 9"]),
        ("typo", ["does not compile: ValueError: options ['maxnregs'] are unknown"]),
        ("refused", ["does not compile: CompileTimeAssertionFailure"]),
    ],
)
def test_a_kernel_that_breaks_a_rule_fails_by_that_rule(toys: _Toys, kernel: str, words: list[str]) -> None:
    for row in toys.of(kernel):
        assert len(row["violations"]) == len(words), row
        assert all(word in violation for word, violation in zip(words, row["violations"], strict=True)), row


def test_the_table_is_printed_and_the_status_tells(toys: _Toys) -> None:
    assert toys.status == 1
    lines = [line for line in toys.printed.splitlines() if " 90 " in line]
    assert len(lines) == sum(row["arch"] == 90 for row in toys.rows)
    for line in lines:
        assert line.endswith(" ok") != ("FAIL: " in line)


def test_what_was_measured_is_kept_with_the_compiled_kernels(toys: _Toys, tmp_path: Path) -> None:
    file = tmp_path / "again.json"
    call = ["--variants", "tests.toy_kernels", "--kernel", "fits", "described", "--arch", 90, "--json", file]
    done = _gate(*call, TRITON_CACHE_DIR=toys.cache)
    assert done.returncode == 0, done.stdout + done.stderr
    again = json.loads(file.read_text())["rows"]
    assert again == [row for row in toys.rows if row["kernel"] in ("fits", "described") and row["arch"] == 90]


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["--kernel", "missing"], {}, "--kernel missing: no such kernel, tests.toy_kernels has crowded, "),
        (["--jobs", "0"], {}, "--jobs must be at least 1, got 0"),
        (["--arch", "75"], {}, "invalid choice: 75"),
        (["--variants", "tests.toy_kernels", "tests.missing"], {}, "--variants tests.missing: No module named"),
        ([], {"TRITON_INTERPRET": "1"}, "TRITON_INTERPRET is set"),
    ],
)
def test_wrong_calls_are_refused(arguments: list[str], environment: dict[str, str], message: str) -> None:
    done = _gate("--variants", "tests.toy_kernels", *arguments, **environment)
    assert done.returncode == 2
    assert message in done.stderr


def test_healthy_resources_break_no_limit() -> None:
    assert gate.violations(_VARIANT, 90, _HEALTHY) == ()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"stack": 8}, "spills: 8 bytes of stack"),
        ({"spilled": 4}, "4 bytes stored and loaded"),
        ({"local_ops": 1}, "1 local-memory instructions"),
        ({"registers": 130}, "an SM holds 3 programs by registers, 4 by shared and tensor memory, 3 in all"),
        ({"shared": 57 << 10}, "an SM holds 4 programs by registers, 3 by shared and tensor memory, 3 in all"),
        ({"tensor_columns": 256}, "an SM holds 4 programs by registers, 2 by shared and tensor memory, 2 in all"),
        ({"tensor_columns": 1024}, "0 by shared and tensor memory"),
        ({"shared": (227 << 10) + 1}, "227.0 KiB of shared memory, limit 227"),
        ({"tensor_ops": {}}, "no tensor-core instruction HGMMA, only scalar ones"),
        ({"tensor_ops": {"HGMMA": 4, "HMMA": 4}}, "some products use HMMA instead of HGMMA"),
        ({"warps": 12, "registers": 40}, "12 warps of 4 configured: warp specialisation was not promised"),
        ({"remark": "(C7510) wgmma serialized"}, "ptxas: (C7510) wgmma serialized"),
    ],
)
def test_each_limit_is_checked_by_itself(change: dict[str, Any], words: str) -> None:
    broken = gate.violations(_VARIANT, 90, replace(_HEALTHY, **change))
    assert len(broken) == 1
    assert words in broken[0]


def test_another_compiler_may_spill_a_little(monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = replace(_HEALTHY, stack=16, spilled=24, local_ops=6), replace(_HEALTHY, spilled=65)
    monkeypatch.setattr(gate.triton, "__version__", gate.CHOSEN_WITH)  # type: ignore[attr-defined]
    assert gate.violations(_VARIANT, 90, few)[0].startswith("spills: 16 bytes of stack, 24 bytes")
    assert gate.violations(replace(_VARIANT, spills=24), 90, few) == ()
    monkeypatch.setattr(gate.triton, "__version__", "3.6.0")  # type: ignore[attr-defined]
    assert gate.violations(_VARIANT, 90, few) == ()
    assert "65 bytes stored and loaded" in gate.violations(_VARIANT, 90, many)[0]


def test_registers_beyond_a_threads_limit() -> None:
    broken = gate.violations(replace(_VARIANT, programs=1), 90, replace(_HEALTHY, registers=256))
    assert broken[0] == "256 registers a thread, limit 255"


def test_warp_specialisation_is_not_silently_left_out() -> None:
    variant = replace(_VARIANT, warp_specialized=True, programs=1)
    assert gate.violations(variant, 90, replace(_HEALTHY, warps=12)) == ()
    (broken,) = gate.violations(variant, 90, _HEALTHY)
    assert broken == "4 warps of 4 configured: warp specialisation was promised"


@pytest.mark.parametrize(
    ("arch", "tensor_cores", "ops", "passes"),
    [
        (80, True, {"HMMA": 1}, True),
        (90, "mma", {"HMMA": 1}, True),
        (90, "mma", {"HMMA": 1, "HGMMA": 1}, True),
        (90, "mma", {}, False),
        (90, False, {}, True),
        (90, False, {"HMMA": 1}, False),
        (100, True, {"UTCHMMA": 1}, True),
        (100, True, {"HMMA": 1}, True),
        (100, True, {"UTCHMMA": 1, "HMMA": 1}, True),
        (100, True, {}, False),
    ],
)
def test_which_tensor_cores_will_do(arch: int, tensor_cores: bool | str, ops: dict[str, int], passes: bool) -> None:
    variant = replace(_VARIANT, tensor_cores=tensor_cores, programs=1)
    assert (gate.violations(variant, arch, replace(_HEALTHY, tensor_ops=ops)) == ()) == passes


@pytest.mark.parametrize(
    ("registers", "warps", "shared", "arch", "programs"),
    [  # from NVIDIA's cuda_occupancy.h
        (168, 12, 0, 90, 1),
        (255, 8, 0, 90, 1),
        (129, 8, 0, 90, 1),
        (128, 8, 0, 90, 2),
        (64, 2, 0, 90, 16),
        (16, 1, 0, 90, 32),
        (32, 4, 163 << 10, 80, 1),
        (32, 4, (163 << 10) + 1, 80, 0),
        (32, 4, 113 << 10, 90, 2),
        (32, 4, (113 << 10) + 1, 90, 1),
    ],
)
def test_programs_per_sm(registers: int, warps: int, shared: int, arch: int, programs: int) -> None:
    assert replace(_HEALTHY, registers=registers, warps=warps, shared=shared).programs(arch) == programs


def test_a_compiler_that_dies_costs_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def resources(variant: Variant, arch: int) -> Resources:
        if variant.label == "dies":
            os.write(2, b"LLVM ERROR: unsupported\n")
            os.kill(os.getpid(), signal.SIGKILL)
        return _HEALTHY

    monkeypatch.setattr(gate, "resources", resources)
    tasks = [(replace(_VARIANT, label=label), 90) for label in ("lives", "dies", "lives")]
    rows = dict(gate.run(tasks, jobs=2))
    assert [rows[i].violations for i in range(3)] == [
        (),
        ("does not compile: the compiler ended with status -9; LLVM ERROR: unsupported",),
        (),
    ]


def test_every_kernel_in_every_configuration() -> None:
    done = _gate()
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    compiled = {(words[0], int(words[1])) for words in lines if words[1:2] and words[1] in ("80", "90", "100")}
    kernels = ("forward", "combine", "prepare", "backward", "relative_forward", "relative_backward")
    assert compiled == {(kernel, arch) for kernel in kernels for arch in (80, 90, 100)}


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_every_option_alone_too(arch: int) -> None:
    done = _gate("--all", "--arch", str(arch))
    assert done.returncode == 0, done.stdout + done.stderr
