"""``Segments``, ``crop`` and the schedules, against slicing sample by sample in Python."""

from __future__ import annotations

import pickle
import random
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rmt_kernels.recurrence import Curriculum, RandomNumber, Segments, crop
from tests.recurrence import span

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """A batch of samples; ``ends`` are their lengths, ``given`` says whether ``lengths`` is an argument."""

    length: int
    size: int
    align: str
    ends: tuple[int, ...]
    given: bool

    @property
    def segments(self) -> Segments:
        lengths = torch.tensor(self.ends) if self.given else None
        return Segments(len(self.ends), self.length, self.size, self.align, lengths, CPU)

    def positions(self, b: int, s: int) -> range:
        return span(self.ends[b], self.length, self.size, self.align, s)


@st.composite
def cases(draw: Any) -> Case:
    length, batch = draw(st.integers(1, 17)), draw(st.integers(1, 4))
    size, align, given_ = draw(st.integers(1, 19)), draw(st.sampled_from(["left", "right"])), draw(st.booleans())
    one = st.one_of(st.sampled_from([0, length]), st.integers(0, length)) if given_ else st.just(length)
    ends = draw(st.lists(one, min_size=batch, max_size=batch))
    return Case(length, size, align, tuple(ends), given_)


@given(cases())
@settings(max_examples=150, deadline=None)
def test_every_token_is_in_one_segment_in_order(case: Case) -> None:
    """The slices that the other tests take as the truth."""
    for b, end in enumerate(case.ends):
        slices = [case.positions(b, s) for s in range(case.segments.count)]
        assert [t for positions in slices for t in positions] == list(range(end))
        assert max(map(len, slices)) <= case.size
        filled = [len(positions) for positions in slices if len(positions)]
        short = filled[:-1] if case.align == "left" else filled[1:]
        assert set(short) <= {case.size}, "a short segment in the middle"
        if case.align == "right" and end:
            assert len(slices[-1]) == min(end, case.size), "samples aligned right end together"


@given(cases())
@settings(max_examples=150, deadline=None)
def test_token_counts(case: Case) -> None:
    segments = case.segments
    assert segments.count == -(-case.length // case.size)
    for s in range(segments.count):
        wanted = [len(case.positions(b, s)) for b in range(len(case.ends))]
        found = segments.token_counts(s)
        if found is None:
            assert wanted == [case.size] * len(case.ends)
            continue
        assert found.dtype is torch.int32
        assert found.tolist() == wanted
        assert case.given or set(wanted) != {case.size}, "a full segment needs no counts"


@given(cases(), st.integers(0, 1))
@settings(max_examples=150, deadline=None)
def test_take(case: Case, trailing: int) -> None:
    batch, segments = len(case.ends), case.segments
    tensor = torch.arange(batch * case.length).view(batch, case.length) + 1000
    if trailing:
        tensor = torch.stack([tensor, -tensor], dim=-1)
    for s in range(segments.count):
        loose, filled = segments.take(tensor, s), segments.take(tensor, s, fill=-7)
        assert loose.shape == filled.shape == (batch, case.size, *tensor.shape[2:])
        assert loose.dtype is filled.dtype is torch.int64
        for b in range(batch):
            positions = case.positions(b, s)
            wanted = tensor[b, positions.start : positions.stop]
            assert torch.equal(loose[b, : len(positions)], wanted)
            assert torch.equal(filled[b, : len(positions)], wanted)
            assert bool((filled[b, len(positions) :] == -7).all())


@given(cases(), st.integers(1, 3))
@settings(max_examples=150, deadline=None)
def test_take_ahead_crosses_borders_and_stops_at_the_samples_end(case: Case, ahead: int) -> None:
    batch, segments = len(case.ends), case.segments
    labels = torch.arange(batch * case.length).view(batch, case.length)
    for s in range(segments.count):
        found = segments.take(labels, s, ahead=ahead, fill=-100)
        assert found.shape == (batch, case.size)
        for b, end in enumerate(case.ends):
            positions = case.positions(b, s)
            wanted = [int(labels[b, t + ahead]) if t + ahead < end else -100 for t in positions]
            assert found[b].tolist() == wanted + [-100] * (case.size - len(positions)), (b, s)


@given(cases())
@settings(max_examples=150, deadline=None)
def test_segment_of_and_last(case: Case) -> None:
    batch, segments = len(case.ends), case.segments
    where = segments.segment_of().expand(batch, -1)
    assert where.shape == (batch, case.length)
    last = segments.last().expand(batch)
    for b, end in enumerate(case.ends):
        for s in range(segments.count):
            assert all(int(where[b, t]) == s for t in case.positions(b, s))
        if end:
            assert int(last[b]) == max(s for s in range(segments.count) if len(case.positions(b, s)))


def test_a_full_segment_is_a_view() -> None:
    tensor = torch.arange(24).view(2, 12)
    for align in ("left", "right"):
        segments = Segments(2, 12, 4, align, None, CPU)
        for s in range(3):
            piece = segments.take(tensor, s)
            assert piece.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()


def test_int32_lengths_and_gradients_through_take() -> None:
    """A gathered segment hands its gradient to the positions that it came from, once."""
    rows = torch.randn(2, 7, 3, dtype=torch.float64, requires_grad=True)
    for align in ("left", "right"):
        segments = Segments(2, 7, 3, align, torch.tensor([7, 4], dtype=torch.int32), CPU)
        total = sum(segments.take(rows, s, fill=0).sum() for s in range(segments.count))
        (grad,) = torch.autograd.grad(total, rows)  # type: ignore[arg-type]
        wanted = torch.zeros_like(rows)
        wanted[0], wanted[1, :4] = 1, 1
        assert torch.equal(grad, wanted)


def test_a_device_length_out_of_range_gives_minus_one() -> None:
    """Only a CPU looks at the values; elsewhere -1 makes the kernels write NaN. Here the values are put in later."""
    for align in ("left", "right"):
        segments = Segments(3, 6, 3, align, torch.tensor([6, 6, 2]), CPU)
        assert segments.lengths is not None
        segments.lengths.copy_(torch.tensor([7, -1, 2]))
        for s in range(2):
            counts = segments.token_counts(s)
            assert counts is not None
            assert counts[:2].tolist() == [-1, -1]
            assert int(counts[2]) >= 0
            assert segments.take(torch.zeros(3, 6), s).shape == (3, 3)  # no index out of range


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"size": 0}, ValueError, "segment must be at least 1 token, got 0"),
        ({"size": -3}, ValueError, "segment must be at least 1 token, got -3"),
        ({"size": 2.0}, TypeError, "segment must be an int, got float"),
        ({"size": True}, TypeError, "segment must be an int, got bool"),
        ({"align": "centre"}, ValueError, "align must be 'left' or 'right', got 'centre'"),
        ({"length": 0}, ValueError, r"inputs must hold at least one token, got \(batch, length\) = \(2, 0\)"),
        ({"batch": 0}, ValueError, r"inputs must hold at least one token, got \(batch, length\) = \(0, 9\)"),
        ({"lengths": [9, 9]}, TypeError, r"lengths must be an int32 or int64 tensor of shape \(2,\), got list"),
        ({"lengths": torch.tensor([9.0, 9.0])}, TypeError, "lengths must be an int32 or int64 .* got torch.float32"),
        ({"lengths": torch.tensor([9])}, ValueError, r"lengths must have shape \(2,\) on cpu, got \(1,\)"),
        ({"lengths": torch.tensor([9, 9], device="meta")}, ValueError, "lengths must have shape .* on meta"),
        ({"lengths": torch.tensor([9, 10])}, ValueError, r"lengths must be between 0 and 9, got \[9, 10\]"),
        ({"lengths": torch.tensor([-1, 9])}, ValueError, r"lengths must be between 0 and 9, got \[-1, 9\]"),
    ],
)
def test_bad_arguments(options: dict[str, Any], error: type[Exception], says: str) -> None:
    arguments: dict[str, Any] = {"batch": 2, "length": 9, "size": 4, "align": "left", "lengths": None, "device": CPU}
    arguments |= options
    with pytest.raises(error, match=says):
        Segments(**arguments)


# -- crop --------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 12), st.integers(1, 4), st.integers(1, 5), st.sampled_from(["first", "last"]))
@settings(max_examples=60, deadline=None)
def test_crop(length: int, segments: int, segment: int, keep: str) -> None:
    ids, rows = torch.arange(2 * length).view(2, length), torch.randn(2, length, 3)
    found = crop(ids, rows, segments=segments, segment=segment, keep=keep)
    assert isinstance(found, tuple)
    rest = min(length, segments * segment)
    begin = 0 if keep == "first" else length - rest
    for cut, tensor in zip(found, (ids, rows), strict=True):
        assert torch.equal(cut, tensor[:, begin : begin + rest])
        assert cut.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
    alone = crop(ids, segments=segments, segment=segment, keep=keep)
    assert isinstance(alone, Tensor)
    assert torch.equal(alone, found[0])


@pytest.mark.parametrize(
    ("tensors", "options", "error", "says"),
    [
        (1, {"segments": 0}, ValueError, "segments must be at least 1, got 0"),
        (1, {"segment": 0}, ValueError, "segment must be at least 1, got 0"),
        (1, {"segments": 1.5}, TypeError, "segments must be an int, got float"),
        (1, {"segment": True}, TypeError, "segment must be an int, got bool"),
        (1, {"keep": "middle"}, ValueError, "keep must be 'first' or 'last', got 'middle'"),
        (0, {}, ValueError, r"tensors must share their first two dimensions, \(batch, length\), got \[\]"),
        (2, {}, ValueError, r"tensors must share .* got \[\(2, 6\), \(2, 7\)\]"),
    ],
)
def test_crop_refuses(tensors: int, options: dict[str, Any], error: type[Exception], says: str) -> None:
    given_ = [torch.zeros(2, 6 + i) for i in range(tensors)]
    with pytest.raises(error, match=says):
        crop(*given_, **({"segments": 2, "segment": 2} | options))


# -- schedules ---------------------------------------------------------------------------------------------------------


def test_curriculum() -> None:
    schedule = Curriculum([(0, 1), (1000, 2), (3000, 4)])
    assert [schedule(step) for step in (0, 999, 1000, 2999, 3000, 10**9)] == [1, 1, 2, 2, 4, 4]
    assert pickle.loads(pickle.dumps(schedule)) == schedule == Curriculum(((0, 1), (1000, 2), (3000, 4)))
    assert Curriculum([(0, 3)])(12345) == 3
    falling = Curriculum([(0, 8), (10, 2)])
    assert [falling(9), falling(10)] == [8, 2]


def test_random_number_covers_its_range_evenly() -> None:
    draws = [RandomNumber(2, 5, seed=1)(step) for step in range(4000)]
    assert set(draws) == {2, 3, 4, 5}
    assert all(900 <= draws.count(value) <= 1100 for value in (2, 3, 4, 5))
    assert draws != [RandomNumber(2, 5, seed=2)(step) for step in range(4000)]
    assert draws[1:] != draws[:-1]


def test_random_number_within_bounds_that_change() -> None:
    growing = RandomNumber(1, Curriculum([(0, 1), (50, 6)]))
    assert {growing(step) for step in range(50)} == {1}
    assert {growing(step) for step in range(50, 400)} == {1, 2, 3, 4, 5, 6}
    with pytest.raises(ValueError, match="high must be at least low, 3 at step 7, got 1"):
        RandomNumber(3, lambda step: 1)(7)


def test_random_number_needs_no_generator_and_touches_none() -> None:
    """All processes of a run agree, and a resumed run goes on: only the step and the seed decide."""
    schedule = RandomNumber(1, 10**6, seed=4)
    before = random.getstate(), torch.get_rng_state()
    first = [schedule(step) for step in range(20)]
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    random.seed(99)
    torch.manual_seed(99)
    assert [RandomNumber(1, 10**6, seed=4)(step) for step in reversed(range(20))] == first[::-1]
    assert [pickle.loads(pickle.dumps(schedule))(step) for step in range(20)] == first

    script = (
        "from rmt_kernels.recurrence import RandomNumber; "
        "print([RandomNumber(1, 10**6, seed=4)(step) for step in range(20)])"
    )
    other = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == str(first)


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: Curriculum([]), ValueError, "stages must begin at step 0"),
        (lambda: Curriculum([(1, 2)]), ValueError, r"stages must begin at step 0 .* got \[\(1, 2\)\]"),
        (lambda: Curriculum([(0, 1), (0, 2)]), ValueError, "growing steps"),
        (lambda: Curriculum([(0, 1), (9, 2), (5, 3)]), ValueError, "growing steps"),
        (lambda: Curriculum([(0, 0)]), ValueError, "a stage's value must be at least 1, got 0"),
        (lambda: Curriculum([(0, 1.5)]), TypeError, "a stage's value must be an int, got float"),  # type: ignore[list-item]
        (lambda: Curriculum([(0, True)]), TypeError, "a stage's value must be an int, got bool"),
        (lambda: Curriculum([(0, 1)])(-1), ValueError, "step must be at least 0, got -1"),
        (lambda: RandomNumber(0, 3), ValueError, "low must be at least 1, got 0"),
        (lambda: RandomNumber(1, 0), ValueError, "high must be at least 1, got 0"),
        (lambda: RandomNumber(3, 2), ValueError, "high must be at least low, 3, got 2"),
        (lambda: RandomNumber(1.0, 2), TypeError, "low must be an int, got float"),  # type: ignore[arg-type]
        (lambda: RandomNumber(1, "2"), TypeError, "high must be an int, got str"),  # type: ignore[arg-type]
    ],
)
def test_schedules_refuse(make: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        make()
