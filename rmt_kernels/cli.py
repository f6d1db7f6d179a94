"""The command line: ``python -m rmt_kernels info | demo | bench | train``, also installed as ``rmt-kernels``."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import rmt_kernels
from rmt_kernels import _build
from rmt_kernels.attention import explain, segment_attention
from rmt_kernels.backends import cpu, triton
from rmt_kernels.layout import SegmentLayout
from rmt_kernels.reference import reference_attention

__all__ = ["main"]

_CHECKOUT = Path(__file__).resolve().parent.parent
_DEMO = (
    SegmentLayout.rmt_decoder(24, 4),
    SegmentLayout.causal(24, 4),
    SegmentLayout.rmt_encoder(24, 4),
    SegmentLayout.transformer_xl(24, 16, memory=4, window=16),
    SegmentLayout.memory_transformer(24, 4),
    SegmentLayout.memory_bottleneck(24, 4, step="write"),
    SegmentLayout.memory_bottleneck(24, 4, step="read"),
    SegmentLayout.memformer_read(24, 6),
    SegmentLayout.memformer_write(24, 6),
    SegmentLayout.membart(24, 6),
)


def _backends() -> list[tuple[str, str]]:
    """Each way of computing and what speaks for or against it here."""
    if cpu.why_missing:
        compiled = f"not usable: {cpu.why_missing}"
    else:
        from rmt_kernels import _cpu

        compiled = f"usable, kernels for {_cpu.isa()}, built with torch {_cpu.built_with_torch()}"
    return [
        ("cpu", compiled),
        ("cuda", _cuda()),
        ("triton", _triton()),
        ("stock", "usable: stock PyTorch, without dropout and lse"),
        ("reference", "usable: dense and slow, every call"),
    ]


def _triton() -> str:
    if triton.why_missing:
        return f"not usable: {triton.why_missing}"
    return f"usable{_on_gpus()}, triton {importlib.metadata.version('triton')}"


def _cuda() -> str:
    """Whether the extension is there and loads, and for what it was built."""
    why_not = _build.why_no_cuda()
    build = _build.cuda()
    built = "" if build.why_missing else f"built: {build.describe()}"
    return f"not usable: {why_not}{built and f'; {built}'}" if why_not else f"usable{_on_gpus()}, {built}"


def _on_gpus() -> str:
    return "" if torch.cuda.is_available() else " on a CUDA GPU, and torch sees none here"


def _gpus() -> list[tuple[str, str]]:
    if not torch.cuda.is_available():
        return [("gpu", "none that torch sees")]
    found = []
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        found.append((f"gpu {index}", f"{torch.cuda.get_device_name(index)}, compute capability {major}.{minor}"))
    return found


def _info() -> int:
    rows = [
        ("rmt_kernels", rmt_kernels.__version__),
        ("python", platform.python_version()),
        ("torch", f"{torch.__version__}, {torch.get_num_threads()} threads"),
        ("processor", f"{platform.machine()}, torch uses {torch.backends.cpu.get_cpu_capability()}"),
        *_gpus(),
        *((f"backend {name}", state) for name, state in _backends()),
    ]
    for name, value in rows:
        print(f"{name:<18} {value}")
    return 0


def _demo() -> int:
    worst = 0.0
    for layout in _DEMO:
        print(layout.show(), end="\n\n")
        generator = torch.Generator().manual_seed(0)
        rows = (layout.num_queries, layout.num_keys, layout.num_keys)
        query, key, value = (torch.randn(2, 4, n, 32, generator=generator) for n in rows)
        out = segment_attention(query, key, value, layout)
        exact, _ = reference_attention(query.double(), key.double(), value.double(), layout)
        error = float((out.double() - exact).abs().max())
        worst = max(worst, error)
        backend = explain(query, key, value, layout).backend
        share = layout.visible() / (layout.num_queries * layout.num_keys)
        print(f"  {share:.0%} of the entries visible; backend '{backend}', largest error against float64 {error:.1e}\n")
    right = worst < 1e-5
    print(f"{len(_DEMO)} layouts, largest error {worst:.1e}: {'all right' if right else 'WRONG, expected below 1e-5'}")
    return 0 if right else 1


def _bench(arguments: Sequence[str]) -> int:
    if not (_CHECKOUT / "benchmarks" / "__main__.py").exists():
        print(
            f"rmt_kernels: no benchmarks/ beside {Path(__file__).parent}: benchmarks are not installed with the "
            "package; clone the repository and run `make bench` there",
            file=sys.stderr,
        )
        return 2
    missing = [
        name for name in ("pytest", "pytest_benchmark", "matplotlib", "tqdm") if not importlib.util.find_spec(name)
    ]
    if missing:
        print(
            f"rmt_kernels: the benchmarks need {', '.join(missing)}: pip install {' '.join(missing)}", file=sys.stderr
        )
        return 2
    return subprocess.run([sys.executable, "-m", "benchmarks", *arguments], cwd=_CHECKOUT, check=False).returncode


def _train(arguments: Sequence[str]) -> int:
    from rmt_kernels.training import command

    return command.main(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and run it; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m rmt_kernels", description="Segment attention kernels.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, and which backends are usable here, or why not")
    commands.add_parser("demo", help="draw the preset layouts and check segment_attention on each")
    # No help of its own: --help, too, goes to python -m benchmarks.
    commands.add_parser("bench", add_help=False, help="run a checkout's benchmarks: python -m benchmarks with the rest")
    commands.add_parser("train", add_help=False, help="train a published system on a task: train --help says more")
    options, rest = parser.parse_known_args(arguments)
    if options.command == "bench":
        return _bench(rest)
    if options.command == "train":
        return _train(rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return _info() if options.command == "info" else _demo()
