"""The emulated GPU by itself: its checks, in C++, are compiled and run."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMPILER = shutil.which(os.environ.get("CXX", "g++"))

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler: CXX names one, or g++ is in PATH")


def test_the_emulation_computes_what_it_says_and_finds_mistakes(tmp_path: Path) -> None:
    program = tmp_path / "checks"
    sources = [ROOT / "tests" / "emulation_checks.cpp", *sorted((ROOT / "csrc" / "cuda" / "emulation").glob("*.cpp"))]
    assert len(sources) > 1
    command = [str(COMPILER), "-std=c++20", "-O0", "-DRMT_EMULATED", *map(str, sources), "-o", str(program)]
    compiled = subprocess.run(command, capture_output=True, text=True, check=False)
    assert compiled.returncode == 0, compiled.stderr
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("all checks passed\n"), done.stdout
    assert "FAILED" not in done.stdout
