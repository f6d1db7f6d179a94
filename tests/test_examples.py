"""The examples, for a few steps of a tiny model: on two processes of the CPU, and on one."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TINY = "--steps 3 --segments 3 --segment 32 --memory 4 --width 32 --layers 2 --batch 2"
TORCHRUN = "-m torch.distributed.run --standalone --nproc-per-node 2"
needs_accelerate = pytest.mark.skipif(
    importlib.util.find_spec("accelerate") is None, reason="accelerate is not installed: pip install accelerate"
)


def run(command: str, seconds: float = 90.0, **environment: str) -> list[float]:
    """The losses that an example prints, one a step; they must fall."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    env |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT), **environment}
    process = subprocess.Popen(
        [sys.executable, *command.split(), *TINY.split()], cwd=ROOT, env=env, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the launcher and its processes
        raise AssertionError(f"not over after {seconds:.0f} s:\n{process.communicate()[0]}") from None
    assert process.returncode == 0, output
    lines = re.findall(r"^step +(\d+) +loss ([\d.]+) +([\d,]+) tokens/s$", output, re.MULTILINE)
    assert [int(step) for step, _, _ in lines] == [1, 2, 3], output
    assert all(int(speed.replace(",", "")) > 0 for _, _, speed in lines)
    losses = [float(loss) for _, loss, _ in lines]
    assert 4.5 < losses[2] < losses[1] < losses[0] < 6.5, output
    return losses


@cache
def two_processes() -> list[float]:
    return run(f"{TORCHRUN} examples/train_torchrun.py")


def test_torchrun_with_ddp_and_with_fsdp2() -> None:
    # Had the processes not averaged their gradients alike, the curves would part at the second step.
    sharded = run(f"{TORCHRUN} examples/train_torchrun.py --wrap fsdp2 --policy driver")
    assert sharded == pytest.approx(two_processes(), abs=3e-4)


def test_one_process() -> None:
    full = run("examples/train_torchrun.py --policy full --autocast bf16")
    assert full == pytest.approx(run("examples/train_torchrun.py"), abs=2e-2)
    assert full != pytest.approx(two_processes(), abs=2e-2), "two processes read the same text"


@needs_accelerate
def test_accelerate_on_two_processes(tmp_path: Path) -> None:
    # On the CPU its own launcher starts several processes through MPI only.
    losses = run(f"{TORCHRUN} examples/train_accelerate.py", ACCELERATE_USE_CPU="true", HF_HOME=str(tmp_path))
    assert losses == pytest.approx(two_processes(), abs=3e-4)


@needs_accelerate
def test_accelerate_launch(tmp_path: Path) -> None:
    launch = "-m accelerate.commands.launch --cpu --num_processes 1 --mixed_precision bf16"
    run(f"{launch} examples/train_accelerate.py --driver", HF_HOME=str(tmp_path))
