"""Whether a contestant is right, before it is weighed or timed.

Twice: a small model in float32 against float64, where nothing but rounding may differ; and the model itself in the
precision that is measured against the same weights in float32, where a contestant may be off by three times as much as
the authors' loop. What is right: that loop with two products and a softmax for attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from benchmarks.huggingface.contestants import READERS, TRAINERS, Contestant
from benchmarks.huggingface.models import EXACT, Shape, Subject
from benchmarks.measure import Check
from benchmarks.recurrence.check import Truth
from benchmarks.recurrence.check import check as check_gradients

__all__ = ["Checker", "check_rows", "message"]

_LEAST = 1e-5  # the least error that a loop in float32 is taken to have; three times that passes
FACTOR = 3.0
_SMALL_SEGMENTS = 3


@dataclass(frozen=True)
class _Case:
    """Sizes and precision of one comparison."""

    shape: Shape
    segments: int
    dtype: torch.dtype
    exact: torch.dtype


class Checker:
    """Contestants of one kind on one model, by their loss and every parameter's gradient; or, where not ``backward``,
    by the memory that they return.

    Args:
        shape, dtype, device: of the model that is measured.
        segments: of the inputs on which it is compared.
    """

    def __init__(
        self, shape: Shape, dtype: torch.dtype, device: torch.device, contestants: Mapping[str, Contestant], *,
        segments: int, backward: bool,
    ) -> None:  # fmt: skip
        self.contestants, self.device, self.backward = contestants, device, backward
        self.cases = (
            _Case(shape.small(), _SMALL_SEGMENTS, torch.float32, torch.float64),
            _Case(shape, segments, dtype, torch.float32),
        )
        self._truths: dict[int, Any] = {}

    def __call__(self, name: str, subject: Subject) -> Check:
        """Check the contestant in little, and on ``subject``, which will be measured."""
        contestant, errors = self.contestants[name], dict[str, dict[str, float]]()
        for i, case in enumerate(self.cases):
            try:
                # CUDA graphs are of the shape that is measured; in little there is nothing to compile.
                one = subject if i else self._little(case, contestant)
                found = (self._gradients if self.backward else self._memory)(i, contestant, one)
            except Exception as error:  # recorded and shown in place of a time: one contestant must not end the run
                return Check(False, f"failed: {message(error)}")
            errors |= {f"{what}, {str(case.dtype).removeprefix('torch.')}": e for what, e in found.errors.items()}
            if not found.ok:
                return Check(False, found.reason, errors)
        return Check(True, "", errors)

    def _little(self, case: _Case, contestant: Contestant) -> Subject:
        return Subject(case.shape, contestant.attention, case.dtype, self.device, gelu=contestant.gelu)

    def _subjects(self, case: _Case) -> tuple[Subject, Subject]:
        """Where the truth comes from, and the authors' loop."""
        return (
            Subject(case.shape, EXACT, case.exact, self.device, weights=case.dtype),
            Subject(case.shape, "sdpa", case.dtype, self.device),
        )

    def _gradients(self, i: int, contestant: Contestant, subject: Subject) -> Check:
        case = self.cases[i]
        if i not in self._truths:
            exact, plain = self._subjects(case)
            ids = exact.inputs(case.segments)
            loss = TRAINERS["authors"].build(exact)(ids)
            truth = Truth(ids, float(loss), exact.gradients(), 0.0, case.dtype)
            error = _compare(TRAINERS["authors"], plain, truth).errors["gradients"]["relative"]
            self._truths[i] = replace(truth, error=max(error, _LEAST))
        return _compare(contestant, subject, self._truths[i])

    def _memory(self, i: int, contestant: Contestant, subject: Subject) -> Check:
        case = self.cases[i]
        if i not in self._truths:
            exact, plain = self._subjects(case)
            ids = exact.inputs(case.segments)
            self._truths[i] = (ids, *(READERS["authors"].build(one)(ids) for one in (exact, plain)))
        ids, want, stock = self._truths[i]
        return check_rows("memory", contestant.build(subject)(ids), want, stock)


def _compare(contestant: Contestant, subject: Subject, truth: Truth) -> Check:
    return check_gradients(cast(Any, contestant), cast(Any, subject), truth)


def check_rows(what: str, found: Tensor, want: Tensor, stock: Tensor) -> Check:
    """Relative RMS error of ``found``, which may be three times that of ``stock`` in the same precision."""
    want = want.double()

    def error(rows: Tensor) -> float:
        return float((rows.double() - want).norm() / want.norm())

    off, plain = error(found), error(stock)
    allowed = FACTOR * max(plain, _LEAST)
    errors = {what: {"relative": off, "plain_loop": plain, "allowed": allowed}}
    if not off <= allowed:  # NaN is wrong too
        return Check(False, f"{what}: relative error {off:.2e}, allowed {allowed:.2e}", errors)
    return Check(True, "", errors)


def message(error: Exception) -> str:
    """The kind of an error and its first line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"
