"""``python -m benchmarks.gpu.sanitized``: small calls of a backend's kernels for a checker of memory and races.

Each result is also held to the rule of the shared test suite. Inputs are made on the host and copied, so that nearly
every kernel that runs is one of ours. Exit status 0 all right, 1 something wrong, 3 out of time.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time

import torch

from rmt_kernels import SegmentLayout
from tests.suite import BF16, F16, Case, complaints, expected, make, on_backend, results

__all__ = ["CASES", "main"]

_PADDED = SegmentLayout.rmt_decoder(150, 10, cache=65)
_OUT_OF_TIME = 3


def _cases() -> dict[str, Case]:
    """Both widths of heads; packed rows on either side of 1,024, where long tiles begin; one chunk of keys and several
    for few rows. Every case runs forward and backward, with gradients of out and of lse."""
    found: dict[str, Case] = {}
    for width in (64, 128):
        found |= {
            f"short, grouped, padded, cache apart, {width}": Case(
                _PADDED, batch=3, kv_heads=1, group=2, head_dim=width, dtype=BF16, padding="right", stale=True,
                apart=True,
            ),
            f"long, grouped, {width}": Case(
                SegmentLayout.rmt_decoder(300, 16), batch=1, kv_heads=1, group=4, head_dim=width, dtype=BF16
            ),
            f"short, dropout, {width}": Case(
                SegmentLayout.rmt_decoder(140, 8), batch=2, kv_heads=1, head_dim=width, dtype=BF16, dropout_p=0.2
            ),
            f"long, dropout, left padding, {width}": Case(
                SegmentLayout.rmt_decoder(520, 8), batch=2, kv_heads=1, group=2, head_dim=width, dtype=BF16,
                dropout_p=0.2, padding="left",
            ),
            f"decoding, one chunk, {width}": Case(
                SegmentLayout.rmt_decoder(300, 16).decoding(), batch=3, kv_heads=2, group=4, head_dim=width, dtype=BF16,
                start=True,
            ),
            f"decoding, chunks, {width}": Case(
                SegmentLayout.rmt_decoder(1300, 16).decoding(2), batch=3, kv_heads=1, group=4, head_dim=width,
                dtype=BF16, start=True,
            ),
        }  # fmt: skip
    return found | {
        "window, stale cache": Case(
            SegmentLayout.rmt_decoder(150, 10, cache=65, window=40), batch=3, kv_heads=1, head_dim=64, dtype=F16,
            stale=True,
        ),
        "slots that see themselves": Case(
            SegmentLayout.membart(100, 40), batch=3, kv_heads=1, head_dim=64, dtype=F16, padding="right"
        ),
        "rows of an odd size": Case(_PADDED, batch=1, kv_heads=2, head_dim=41, dtype=F16, strides="sliced"),
    }  # fmt: skip


CASES = _cases()


def _end_after(seconds: float) -> None:
    """End this process, whatever hangs in it: a checker that is killed would leave it running."""

    def end() -> None:
        print("out of time", flush=True)
        os._exit(_OUT_OF_TIME)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.sanitized", description=__doc__)
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="NAME")
    parser.add_argument("--seconds", type=float, default=600.0, help="end after that, whatever hangs")
    options = parser.parse_args(arguments)
    _end_after(options.seconds)
    torch.set_num_threads(1)
    wrong = 0
    for name in options.cases:
        begin, case = time.monotonic(), CASES[name]
        print(name, flush=True)  # whole lines: the checker writes to the same place
        found = results(make(case, options.device), on_backend(options.backend))
        said = complaints(case, found, expected(case))
        wrong += bool(said)
        print(f"    {'WRONG: ' + '; '.join(said) if said else 'right'} ({time.monotonic() - begin:.1f} s)", flush=True)
    print(f"{len(options.cases) - wrong} of {len(options.cases)} calls right", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
