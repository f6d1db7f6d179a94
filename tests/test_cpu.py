"""The compiled CPU module: every instruction set passes the shared suite, and the row arithmetic is the layout's."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from rmt_kernels import SegmentLayout
from rmt_kernels.backends import cpu
from rmt_kernels.reference import segment_mask
from tests.draws import NAMED, draw, free_layout, preset_layout
from tests.suite import check, make, on_backend, results

pytestmark = pytest.mark.skipif(bool(cpu.why_missing), reason=cpu.why_missing)
if not cpu.why_missing:
    from rmt_kernels import _cpu

    ISAS = _cpu.isas()
else:
    ISAS = []


@pytest.fixture(params=ISAS[1:])
def lesser_isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set that this processor has but would not choose; "baseline" is the plain path."""
    before = _cpu.isa()
    _cpu.set_isa(request.param)
    yield request.param
    _cpu.set_isa(before)


@pytest.mark.usefixtures("nan_memory", "lesser_isa")
@pytest.mark.parametrize("name", NAMED)
def test_lesser_isa_named(name: str) -> None:
    check(NAMED[name], results(make(NAMED[name]), on_backend("cpu", True)))


@pytest.mark.usefixtures("nan_memory", "lesser_isa")
@pytest.mark.parametrize("number", range(1000, 1012))
def test_lesser_isa_drawn(number: int) -> None:
    check(draw(number), results(make(draw(number)), on_backend("cpu", True)))


def test_the_plain_path_is_always_there() -> None:
    assert "baseline" in ISAS
    assert _cpu.isa() == os.environ.get("RMT_KERNELS_CPU_ISA", ISAS[0])


def _with_environment(isa: str) -> subprocess.CompletedProcess[str]:
    code = "import torch, rmt_kernels._cpu as m; print(m.isa())"
    environment = os.environ | {"RMT_KERNELS_CPU_ISA": isa}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


def test_the_environment_restricts_the_isa() -> None:
    assert _with_environment("baseline").stdout.strip() == "baseline"
    refused = _with_environment("mmx")
    assert refused.returncode != 0
    assert "RMT_KERNELS_CPU_ISA: 'mmx'" in refused.stderr
    assert "baseline" in refused.stderr


def test_set_isa_refuses_by_name() -> None:
    with pytest.raises(ValueError, match="'mmx' is not usable"):
        _cpu.set_isa("mmx")


def _mask_of_rows(layout: SegmentLayout, begin: int, end: int, cache_begin: int, query_start: int) -> torch.Tensor:
    """The mask that csrc/layout.h describes, built from its integers."""
    keys = torch.arange(layout.num_keys)
    mask = torch.zeros(layout.num_queries, layout.num_keys, dtype=torch.bool)
    for i, (lo, hi, gap_lo, gap_hi, own) in enumerate(
        _cpu.rows(list(layout.ints), begin, end, cache_begin, query_start)
    ):
        assert 0 <= lo <= hi <= layout.num_keys
        assert gap_lo == gap_hi or lo < gap_lo < gap_hi < hi, "a gap must lie strictly inside its interval"
        mask[i] = ((keys >= lo) & (keys < hi) & ~((keys >= gap_lo) & (keys < gap_hi))) | (keys == own)
    return mask


@pytest.mark.parametrize("number", range(400))
def test_rows_are_the_layout(number: int) -> None:
    """`csrc/layout.h`, which CPU and CUDA kernels share, against the dense mask, with padding at either end."""
    rng = random.Random(number)
    layout = preset_layout(rng) if number % 2 else free_layout(rng)
    begin, end = 0, layout.tokens
    if number % 3 == 1:
        begin = rng.randint(0, layout.tokens)
    elif number % 3 == 2:
        end = rng.randint(0, layout.tokens)
    cache_begin = rng.randint(0, layout.key_size("cache"))
    query_start = -1
    if number % 5 == 0 and layout.query_offset("write") - layout.query_offset("tokens") and layout.key_size("tokens"):
        layout = layout.decoding(rng.randint(0, layout.tokens))
        query_start = rng.randint(0, layout.tokens - layout.num_queries)

    def given(value: int) -> torch.Tensor:
        return torch.tensor([value], dtype=torch.int32)

    expected, _ = segment_mask(
        layout, 1, torch.device("cpu"), given(end), given(begin), given(cache_begin),
        given(query_start) if query_start >= 0 else None,
    )  # fmt: skip
    assert torch.equal(_mask_of_rows(layout, begin, end, cache_begin, query_start), expected[0])
