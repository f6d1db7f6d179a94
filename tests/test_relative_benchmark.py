"""The benchmark of distance-dependent scores: it checks before it times, and can say no."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from torch import Tensor

from benchmarks import relative
from rmt_kernels import SegmentLayout
from rmt_kernels.backends import cpu

TINY = {"wikitext-103": relative.Case("tiny", SegmentLayout.transformer_xl(15, 15, memory=2), 2, 2, 16)}


def wrong(inputs: relative.Inputs) -> Tensor:
    return 1.1 * relative.CONTESTANTS[relative.OPPONENT](inputs)


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    if cpu.why_missing:
        pytest.skip(cpu.why_missing)
    contestants = {name: call for name, call in relative.CONTESTANTS.items() if "compiled" not in name}
    return relative.run(TINY, rounds=3, seconds=1.0, contestants=contestants | {"wrong": wrong})


def test_contestants_are_checked_before_they_are_timed(results: dict[str, Any]) -> None:
    for entry in results["records"]:
        assert entry["right"] == (entry["contestant"] != "wrong"), entry
        assert ("forward" in entry) == ("forward_backward" in entry) == entry["right"]
    cells = [row for row in relative.table(results).rows if row[1] == "wrong"]
    assert len(cells) == 2
    assert all("WRONG" in row[2] and not row[4] for row in cells)


@pytest.mark.parametrize(("seconds", "verdict"), [(1.99, "missed"), (2.0, "reached")])
def test_the_verdict(results: dict[str, Any], seconds: float, verdict: str) -> None:
    found = copy.deepcopy(results)
    for entry in found["records"]:
        if entry["right"]:
            entry["forward_backward"]["median"] = seconds if entry["contestant"] == relative.OPPONENT else 1.0
    rows = [row for row in relative.table(found).rows if row[1] == relative.OPPONENT]
    assert all(verdict in row[4] for row in rows)
