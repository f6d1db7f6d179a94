"""Policies, under autograd and in the driver: exact gradients, truncation, what is computed twice, and memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.measure import peak_bytes
from rmt_kernels import RecurrentMemory, Replay, SegmentLayout, Truncate, ops, replay_step, segment_attention
from rmt_kernels.backends import cpu
from rmt_kernels.recurrence import ReplayError, TokenLoss
from rmt_kernels.tape import Tape
from tests.recurrence import (
    MEMORY,
    SEGMENT,
    VOCABULARY,
    WIDTH,
    Tiny,
    around,
    check_step,
    generator_state,
    gradients,
    largest_difference,
    numbers,
    plain_step,
    step,
    tiny,
)

F64 = torch.float64
IDS = numbers(2, 18)  # 4 segments, the last one short
needs_kernels = pytest.mark.skipif(bool(cpu.why_missing), reason=cpu.why_missing)


# -- policies ----------------------------------------------------------------------------------------------------------

POLICIES = {
    "replay": Replay(),
    "keep 0": Replay(keep=0),
    "keep 2": Replay(keep=2),
    "keep N": Replay(keep=4),
    "keep N+3": Replay(keep=7),
    "offload": Replay(keep=0, offload=True),
    "offload keep 2": Replay(keep=2, offload=True),
    "check": Replay(keep=0, check=True),
    "check keep 3": Replay(keep=3, check=True),
    "everything": Replay(keep=2, check=True, offload=True),
    "budget of all": Replay(budget_bytes=10**9),
}


@pytest.mark.parametrize("driver", [False, True], ids=["autograd", "driver"])
@pytest.mark.parametrize("name", POLICIES)
def test_replay_is_exact(name: str, driver: bool) -> None:
    """SYSTEMS.md, fault 2: dropout repeats. Gradients, loss, memory, and where the generator stands afterwards."""
    model = tiny(loss=TokenLoss(rows=4))
    every: tuple[dict[str, Any], ...] = ({}, {"lengths": [18, 4]})
    for options in every:
        wanted = plain_step(model, IDS, labels=IDS, **options)
        given: dict[str, Any] = {key: torch.tensor(value) for key, value in options.items()}
        check_step(step(model, IDS, POLICIES[name], driver=driver, labels=IDS, **given), wanted)


@pytest.mark.parametrize("driver", [False, True], ids=["autograd", "driver"])
@pytest.mark.parametrize("layout", ["causal", "rmt_encoder"])
def test_replay_of_other_layouts(layout: str, driver: bool) -> None:
    model = tiny(layout, prefix=[4], align="right", loss=TokenLoss(weights="last", shift=False, rows=4))
    wanted = plain_step(
        model, IDS, labels=IDS, lengths=[18, 9], align="right", layout=layout, weights="last", shift=False
    )
    for keep in (0, 1, 3):
        found = step(model, IDS, Replay(keep=keep), driver=driver, labels=IDS, lengths=torch.tensor([18, 9]))
        check_step(found, wanted)


def test_dropout_would_show() -> None:
    """The comparisons above can fail: another random state gives another gradient."""
    model = tiny()
    a, b = step(model, IDS, labels=IDS), step(model, IDS, labels=IDS, seed=6)
    assert largest_difference(b.gradients, a.gradients) > 0.1


@pytest.mark.parametrize("rows", [3, 100])
@pytest.mark.parametrize("keep", [0, 1, 2])
def test_driver_with_dropout_in_the_head(keep: int, rows: int) -> None:
    model = tiny(loss=TokenLoss(rows=rows))
    assert model.head is not None
    model.head = nn.Sequential(nn.Dropout(0.3), model.head)
    check_step(step(model, IDS, Replay(keep=keep), driver=True, labels=IDS), step(model, IDS, labels=IDS))


@pytest.mark.parametrize("rows", [3, 100])
@pytest.mark.parametrize("keep", [0, 1, 2])
def test_checkpoints_with_dropout_in_the_head(keep: int, rows: int) -> None:
    model = tiny(loss=TokenLoss(rows=rows))
    assert model.head is not None
    model.head = nn.Sequential(nn.Dropout(0.3), model.head)
    check_step(step(model, IDS, Replay(keep=keep), labels=IDS), step(model, IDS, labels=IDS))


class Counted(Tiny):
    """Counts its forward passes."""

    calls = 0

    def forward(self, x: Tensor, *, layout: SegmentLayout, **keywords: Any) -> Tensor:
        self.calls += 1
        return super().forward(x, layout=layout, **keywords)


def counted(**options: Any) -> tuple[RecurrentMemory, Counted]:
    model = tiny(**options)
    backbone = Counted().to(F64)
    backbone.load_state_dict(model.backbone.state_dict())
    model.backbone = backbone
    return model, backbone


@pytest.mark.parametrize("driver", [False, True], ids=["autograd", "driver"])
def test_each_segment_is_run_as_often_as_it_must(driver: bool) -> None:
    model, backbone = counted()
    for keep in (0, 1, 2, 4, 9):
        backbone.calls = 0
        step(model, IDS, Replay(keep=keep), driver=driver, labels=IDS)
        assert backbone.calls == 4 + max(0, 4 - keep)
    backbone.calls = 0
    model.bptt = Replay(keep=0)
    with torch.no_grad():
        model(IDS, labels=IDS)
    assert backbone.calls == 4


@pytest.mark.parametrize("driver", [False, True], ids=["autograd", "driver"])
def test_budget(driver: bool) -> None:
    """As many segments are kept as fit, measured once for a shape, without a trace in gradients or random state."""
    model, backbone = counted(loss=TokenLoss(rows=4))
    wanted = plain_step(model, IDS, labels=IDS)
    backbone.calls = 0
    check_step(step(model, IDS, Replay(budget_bytes=10**8), driver=driver, labels=IDS), wanted)
    assert backbone.calls == 4 + 1, "one more to measure"
    needed = next(iter(model._bytes.values()))
    assert needed > 2 * 11 * WIDTH * 8 * 10, "a segment keeps many tensors of its rows"
    for budget, kept in ((needed, 1), (2 * needed - 1, 1), (2 * needed, 2), (3 * needed + 5, 3), (9 * needed, 4)):
        backbone.calls = 0
        check_step(step(model, IDS, Replay(budget_bytes=budget), driver=driver, labels=IDS), wanted)
        assert backbone.calls == 4 + 4 - kept
    model._bytes.clear()
    model.bptt = Replay(budget_bytes=needed - 1)
    before = generator_state()
    with pytest.raises(ValueError, match=f"budget_bytes={needed - 1} is less than one segment's activations, {needed}"):
        replay_step(model, IDS, labels=IDS) if driver else model(IDS, labels=IDS)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(generator_state(), before)


def test_budget_is_kept() -> None:
    """What the kept segments hold, measured from outside, is what the policy thinks it is."""
    model = tiny(dtype=torch.float32, dropout=0.1, memory=4, segment=32)
    ids = numbers(2, 32 * 8)
    model.bptt = Replay(budget_bytes=10**9)
    model(ids, labels=ids).loss.backward()
    needed = next(iter(model._bytes.values()))

    def forward(policy: Any) -> int:
        model.bptt = policy
        held: list[Any] = []
        return peak_bytes(lambda: held.append(model(ids, labels=ids).loss))

    one, five = (forward(Replay(budget_bytes=n * needed)) for n in (1, 5))
    assert 0.8 * 4 * needed < five - one < 1.05 * 4 * needed


def test_the_measure_is_taken_anew_for_other_arguments() -> None:
    model, backbone = counted()
    model.bptt = Replay(budget_bytes=10**8)
    for options in ({}, {"segment": 6}, {"lengths": torch.tensor([18, 2])}):
        for again in (1, 0):
            backbone.calls = 0
            model(IDS, labels=IDS, **options)
            assert backbone.calls == -(-18 // options.get("segment", 5)) + again  # type: ignore[call-overload]
    backbone.calls = 0
    model(numbers(3, 18))
    assert backbone.calls == 5


def test_batch_normalisation_is_refused() -> None:
    class Normed(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.batch = nn.BatchNorm1d(WIDTH)

        def forward(self, x: Tensor, *, layout: SegmentLayout, **keywords: Any) -> Tensor:
            return super().forward(self.batch(x.flatten(0, 1)).view(x.shape), layout=layout, **keywords)

    model = around(Normed().to(F64))
    says = r"bptt: Replay runs segments twice, .* 'backbone.batch' \(BatchNorm1d\) twice"
    for policy in (Replay(), Replay(keep=3), Replay(budget_bytes=10**9)):
        model.bptt = policy
        with pytest.raises(ValueError, match=says):
            model(IDS, labels=IDS)
        with pytest.raises(ValueError, match=says):
            replay_step(model, IDS, labels=IDS)
    assert int(model.backbone.batch.num_batches_tracked) == 0  # type: ignore[union-attr, arg-type]
    for other in ("full", 2, Replay(keep=4)):
        model.bptt = other
        model(IDS, labels=IDS).loss.backward()
    assert int(model.backbone.batch.num_batches_tracked) == 12  # type: ignore[union-attr, arg-type]
    model.backbone.batch.eval()  # type: ignore[union-attr, operator]
    step(model, IDS, Replay(), labels=IDS)


# -- truncation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [False, True], ids=["last", "every"])
def test_truncation_cuts_exactly_where_it_says(every: bool) -> None:
    """SYSTEMS.md, fault 1: which memories are detached, by the gradients they leave, for every engine."""
    model = tiny(layers=1, dropout=0, loss=TokenLoss(rows=8))
    for count in range(1, 7):
        ids = numbers(1, count * SEGMENT - 1)
        full = plain_step(model, ids, labels=ids)
        seen: list[dict[str, Tensor]] = []
        for k in range(1, 8):

            def cuts(s: int, n: int, k: int = k) -> bool:
                return (s > 0 and s % k == 0) if every else 1 <= s <= n - k

            wanted = plain_step(model, ids, labels=ids, cuts=cuts)
            given = Truncate(k, every=every)
            check_step(step(model, ids, given, labels=ids), wanted, 1e-12)
            if not every:
                check_step(step(model, ids, k, labels=ids), wanted, 1e-12)
            keep = (k + count) % 4
            for driver in (False, True):
                check_step(
                    step(model, ids, Replay(keep=keep, truncate=given), driver=driver, labels=ids), wanted, 1e-12
                )
            apart = largest_difference(wanted.gradients, full.gradients)
            assert (apart < 1e-12) == (k >= count), (count, k)
            assert wanted.loss == full.loss, "every segment's own loss counts"
            assert k < count or apart < 1e-12
            assert float(wanted.gradients["initial_memory"].norm()) > 0, "the initial memory always learns"
            if k <= count:
                assert all(largest_difference(wanted.gradients, other) > 1e-9 for other in seen)
                seen.append(wanted.gradients)


@pytest.mark.parametrize("driver", [False, True], ids=["autograd", "driver"])
@pytest.mark.parametrize("keep", [0, 1, 2, 3, 4, 6])
@pytest.mark.parametrize("truncate", [1, 2, 3, Truncate(2, every=True), Truncate(3, every=True)], ids=str)
def test_truncated_replay_with_dropout(truncate: Any, keep: int, driver: bool) -> None:
    model = tiny(loss=TokenLoss(rows=4, weights=(0, 0.3, 0, 0.7)), layers=1)
    policy = Replay(keep=keep, truncate=truncate, check=True)
    assert isinstance(policy.truncate, Truncate)
    wanted = plain_step(model, IDS, labels=IDS, cuts=policy.truncate.cuts, weights=(0, 0.3, 0, 0.7))
    check_step(step(model, IDS, policy, driver=driver, labels=IDS), wanted)


def test_driver_reports_the_loss_of_segments_that_nothing_learns_from() -> None:
    """Only the initial memory is trained, and it reaches the first segment alone."""
    model = tiny(loss=TokenLoss(rows=2))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == "initial_memory")
    policy = Replay(keep=3, truncate=1)
    wanted, found = step(model, IDS, policy, labels=IDS), step(model, IDS, policy, driver=True, labels=IDS)
    assert largest_difference(found.gradients, wanted.gradients) < 1e-10
    assert found.loss == pytest.approx(wanted.loss, rel=1e-12)


@pytest.mark.parametrize("frozen", ["backbone", "embed", "head", "initial_memory", "all but initial_memory"])
def test_frozen_parts(frozen: str) -> None:
    for rows in (3, 100):
        model = tiny(loss=TokenLoss(rows=rows))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name == "initial_memory" if "all but" in frozen else not name.startswith(frozen))
        wanted = plain_step(model, IDS, labels=IDS)
        for keep in (0, 1, 2):
            for driver in (False, True):
                check_step(step(model, IDS, Replay(keep=keep), driver=driver, labels=IDS), wanted)


# -- attention that is not computed again ------------------------------------------------------------------------------


@contextmanager
def counting() -> Iterator[list[int]]:
    """The number of times that the CPU's attention kernel has run."""
    calls, original = [0], ops._FORWARD["cpu"]

    def kernel(*arguments: Any) -> Any:
        calls[0] += 1
        return original(*arguments)

    ops._FORWARD["cpu"] = kernel
    try:
        yield calls
    finally:
        ops._FORWARD["cpu"] = original


@needs_kernels
@pytest.mark.parametrize("keep", [0, 1, 2])
@pytest.mark.parametrize("driver", [False, True], ids=["autograd", "driver"])
def test_attention_is_computed_once(driver: bool, keep: int) -> None:
    """float32, with dropout on the probabilities too: the same gradients, and each layer's attention runs once."""
    model = tiny(kernel=True, dtype=torch.float32, loss=TokenLoss(rows=4))
    cases: tuple[tuple[dict[str, Any], int | None], ...] = (
        ({}, None),
        ({"lengths": torch.tensor([18, 3])}, None),
        ({}, 2),
    )
    for lengths, truncate in cases:
        wanted = step(model, IDS, truncate or "full", labels=IDS, **lengths)
        with counting() as calls:
            again = Replay(keep=keep, truncate=truncate)
            check_step(step(model, IDS, again, driver=driver, labels=IDS, **lengths), wanted, 1e-6)
        assert calls[0] == 2 * (8 - keep)
        with counting() as calls:
            once = Replay(keep=keep, truncate=truncate, recompute="except_attention")
            check_step(step(model, IDS, once, driver=driver, labels=IDS, **lengths), wanted, 1e-6)
        assert calls[0] == 2 * 4


class Checkpointed(Tiny):
    """With a checkpoint around each block of its own."""

    def forward(
        self, x: Tensor, *, layout: SegmentLayout, token_lengths: Tensor | None = None, gain: Any = 1.0
    ) -> Tensor:
        x = x * gain + self.positions[: x.shape[1]]
        for block in self.blocks:
            x = checkpoint(block, x, layout, token_lengths, use_reentrant=False)
        return self.norm(x)  # type: ignore[no-any-return]


@needs_kernels
@pytest.mark.parametrize("recompute", ["all", "except_attention"])
def test_checkpoints_inside_the_backbone(recompute: str) -> None:
    model = tiny(kernel=True, dtype=torch.float32, loss=TokenLoss(rows=4))
    wanted = step(model, IDS, labels=IDS)
    backbone = Checkpointed(kernel=True)
    backbone.load_state_dict(model.backbone.state_dict())
    model.backbone = backbone
    for keep in (0, 2):
        for driver in (False, True):
            found = step(model, IDS, Replay(keep=keep, recompute=recompute), driver=driver, labels=IDS)
            check_step(found, wanted, 1e-6)


@needs_kernels
def test_attention_is_computed_once_with_offload_and_check() -> None:
    model = tiny(kernel=True, dtype=torch.float32)
    wanted = step(model, IDS, labels=IDS)
    for driver in (False, True):
        policy = Replay(keep=0, recompute="except_attention", offload=True, check=True)
        check_step(step(model, IDS, policy, driver=driver, labels=IDS), wanted, 1e-6)


def test_backward_twice() -> None:
    model = tiny(bptt=Replay(keep=1), loss=TokenLoss(rows=3))
    wanted = step(model, IDS, "full", labels=IDS).gradients
    torch.manual_seed(5)
    loss = model(IDS, labels=IDS).loss
    loss.backward(retain_graph=True)
    assert largest_difference(gradients(model), wanted) < 1e-10
    loss.backward()
    assert largest_difference(gradients(model), {name: 2 * grad for name, grad in wanted.items()}) < 1e-10


@needs_kernels
def test_backward_twice_through_kept_attention() -> None:
    model = tiny(kernel=True, dtype=torch.float32, bptt=Replay(keep=0, recompute="except_attention"))
    wanted = step(model, IDS, "full", labels=IDS).gradients
    torch.manual_seed(5)
    loss = model(IDS, labels=IDS).loss
    with counting() as calls:
        loss.backward(retain_graph=True)
        assert largest_difference(gradients(model), wanted) < 1e-6
        loss.backward()
    assert calls[0] == 0
    assert largest_difference(gradients(model), {name: 2 * grad for name, grad in wanted.items()}) < 1e-6


class Attending(nn.Module):
    """One attention, and a change of its output; ``fewer`` leaves calls out from its fifth pass on."""

    def __init__(self, change: Callable[[Tensor], Tensor], calls: Callable[[int], int] = lambda number: 1) -> None:
        super().__init__()
        self.project, self.change, self.calls, self.passes = nn.Linear(WIDTH, 3 * WIDTH), change, calls, 0

    def forward(self, x: Tensor, layout: SegmentLayout, token_lengths: Tensor | None = None) -> Tensor:
        self.passes += 1
        for _ in range(self.calls(self.passes)):
            q, k, v = (part.unflatten(-1, (1, -1)).transpose(1, 2) for part in self.project(x).chunk(3, -1))
            x = x + self.change(segment_attention(q, k, v, layout, token_lengths=token_lengths)).squeeze(1)
        return x


def attending(change: Callable[[Tensor], Tensor], calls: Callable[[int], int] = lambda number: 1) -> RecurrentMemory:
    torch.manual_seed(0)
    return RecurrentMemory(
        Attending(change, calls), memory=MEMORY, segment=SEGMENT, embed=nn.Embedding(VOCABULARY, WIDTH),
        head=nn.Linear(WIDTH, VOCABULARY), bptt=Replay(keep=0, recompute="except_attention"),
    )  # fmt: skip


@needs_kernels
def test_attention_changed_in_place_is_noticed() -> None:
    """What was recorded is no longer what the kernel gave: an error, never a wrong gradient."""
    says = "the output of attention was changed in place after the forward pass"
    changes: tuple[Callable[[Tensor], Tensor], ...] = (
        lambda out: (out.detach().mul_(2), out)[1],
        lambda out: out.mul_(2),
    )
    for change in changes:
        with pytest.raises(RuntimeError, match="modified inplace"):  # autograd's own, where there is a graph
            attending(change)(IDS, labels=IDS)
        model = attending(change)
        before = generator_state()
        with pytest.raises(ReplayError, match=says) as caught:
            replay_step(model, IDS, labels=IDS)
        assert isinstance(caught.value.__cause__, RuntimeError)
        assert torch.equal(generator_state(), before)
    model = attending(lambda out: out * 2)
    check_step(step(model, IDS, labels=IDS), step(model, IDS, "full", labels=IDS), 1e-6)


@needs_kernels
def test_a_recomputed_segment_that_attends_more_often() -> None:
    says = "the recomputed segment calls attention more often than its forward pass, 1x"
    model = attending(lambda out: out, lambda number: 1 if number <= 4 else 2)
    with pytest.raises(ReplayError, match=says):
        replay_step(model, IDS, labels=IDS)
    model = attending(lambda out: out, lambda number: 1 if number <= 4 else 2)
    with pytest.raises(RuntimeError, match=r"more often|A different number of tensors was saved"):
        model(IDS, labels=IDS).loss.backward()


@needs_kernels
def test_a_recomputed_segment_that_attends_less_often() -> None:
    model = attending(lambda out: out, lambda number: 2 if number <= 4 else 1)
    with pytest.raises(ReplayError, match="attention"):
        replay_step(model, IDS, labels=IDS)


def test_tapes_know_what_they_recorded() -> None:
    tape, out, lse = Tape(), torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3)
    with tape.recording():
        assert tape.run(out, lambda: (out, lse))[0] is out
    assert len(tape) == 1
    with tape.replaying():
        again = tape.run(torch.ones(1, 2, 3, 4), lambda: pytest.fail("computed"))
        assert again[0].data_ptr() == out.data_ptr()
        with pytest.raises(RuntimeError, match="more often than its forward pass, 1x"):
            tape.run(out, lambda: (out, lse))
    for query, what in ((torch.zeros(1, 2, 4, 4), r"\(1, 2, 4, 4\)"), (torch.zeros(1, 2, 3, 4, dtype=F64), "float64")):
        with pytest.raises(RuntimeError, match=f"attention call 0 has a query of .*{what}"), tape.replaying():
            tape.run(query, lambda: (out, lse))
    with tape.recording():
        tape.run(out, lambda: (out, lse))
    assert len(tape) == 1, "recording begins anew"


@pytest.mark.parametrize("driver", [False, True], ids=["autograd", "driver"])
def test_nothing_to_keep_is_refused(driver: bool) -> None:
    """A backbone without this package's kernels; gradients and random state are as before."""
    model = tiny(bptt=Replay(recompute="except_attention"))
    before = generator_state()
    with pytest.raises(ValueError, match="recompute='except_attention' keeps the attention of rmt_kernels' own"):
        replay_step(model, IDS, labels=IDS) if driver else model(IDS, labels=IDS)
    assert torch.equal(generator_state(), before)
    assert all(parameter.grad is None for parameter in model.parameters())


# -- memory ------------------------------------------------------------------------------------------------------------


def bytes_of_a_segment(way: str, **options: Any) -> tuple[float, int]:
    """Bytes that each segment from the 5th to the 64th adds to a training step's peak, and those that are allowed."""
    rows, size, batch = 8, 32, 2
    model = RecurrentMemory(
        Tiny(64, layers=1, heads=2, dropout=0.1), memory=rows, segment=size, embed=nn.Embedding(VOCABULARY, 64),
        head=nn.Linear(64, VOCABULARY), bptt=options.pop("policy", Replay()),
    )  # fmt: skip
    model.backbone.positions.data = torch.randn(size + 2 * rows, 64)  # type: ignore[union-attr]
    peaks: list[int] = []
    for count in (4, 64):
        ids = numbers(batch, count * size)
        if options.get("padded"):
            options["lengths"] = torch.tensor([count * size, count * size - 40])
        given = {key: value for key, value in options.items() if key != "padded"}

        def run(ids: Tensor = ids, given: dict[str, Any] = given) -> None:
            if way == "driver":
                replay_step(model, ids, labels=ids, **given)
            else:
                model(ids, labels=ids, **given).loss.backward()

        if not peaks:
            run()  # gradients exist from here on
        peaks.append(peak_bytes(run))
    return (peaks[1] - peaks[0]) / 60, int(1.1 * batch * rows * 64 * 4 + 8192)


@pytest.mark.parametrize(
    ("way", "options"),
    [
        ("autograd", {}),
        ("autograd", {"policy": Replay(keep=0)}),
        ("autograd", {"padded": True}),
        ("driver", {}),
        ("driver", {"padded": True}),
    ],
    ids=str,
)
def test_a_segment_costs_its_memory_rows_and_the_random_state(way: str, options: dict[str, Any]) -> None:
    extra, allowed = bytes_of_a_segment(way, **options)
    assert 2 * 8 * 64 * 4 < extra <= allowed


@pytest.mark.parametrize("way", ["autograd", "driver"])
def test_a_view_of_the_memory_would_show(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the test above is for: memories that are views keep the hidden states of every segment alive."""
    clone = Tensor.clone

    def lazy(self: Tensor, **options: Any) -> Tensor:
        return self if self.shape == (2, 8, 64) else clone(self, **options)

    monkeypatch.setattr(Tensor, "clone", lazy)
    extra, allowed = bytes_of_a_segment(way)
    assert extra > 1.5 * allowed


def test_full_back_propagation_would_show() -> None:
    extra, allowed = bytes_of_a_segment("autograd", policy="full")
    assert extra > 20 * allowed


def test_evaluation_keeps_nothing() -> None:
    model = tiny(dtype=torch.float32).eval()
    ids = {count: numbers(1, count * SEGMENT) for count in (8, 200)}

    def run(count: int) -> Callable[[], object]:
        def reading() -> object:
            with torch.no_grad():
                return model(ids[count], labels=ids[count])

        return reading

    short, long = peak_bytes(run(8)), peak_bytes(run(200))
    assert long - short < 200 * SEGMENT * 40, "no more than a few numbers for each label"
    with torch.inference_mode():
        found = model(ids[8], labels=ids[8])
    with torch.no_grad():
        wanted = model(ids[8], labels=ids[8])
    assert torch.equal(found.memory, wanted.memory)
    assert torch.equal(found.loss, wanted.loss)


# -- autocast ----------------------------------------------------------------------------------------------------------


def errors_under_autocast(count: int) -> dict[str, float]:
    """Relative error of the whole gradient in bf16, against float64."""
    model = tiny(dtype=torch.float32, dropout=0)
    ids = numbers(1, count * SEGMENT)
    exact = plain_step(model.double(), ids, labels=ids).gradients
    model.float()

    def flat(found: dict[str, Tensor]) -> Tensor:
        return torch.cat([found[name].double().flatten() for name in exact])

    def error(run: Callable[[], dict[str, Tensor]]) -> float:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return float((flat(run()) - flat(exact)).norm() / flat(exact).norm())

    def uncached() -> dict[str, Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
            return plain_step(model, ids, labels=ids).gradients

    return {
        "cached": error(lambda: plain_step(model, ids, labels=ids).gradients),
        "uncached": error(uncached),
        "full": error(lambda: step(model, ids, "full", labels=ids).gradients),
        "replay": error(lambda: step(model, ids, Replay(), labels=ids).gradients),
        "driver": error(lambda: step(model, ids, Replay(), driver=True, labels=ids).gradients),
    }


@pytest.mark.parametrize("count", [4, 64, pytest.param(512, marks=pytest.mark.slow)])
def test_weight_gradients_are_summed_in_the_weights_dtype(count: int) -> None:
    errors = errors_under_autocast(count)
    assert all(errors[way] <= 1.2 * errors["uncached"] for way in ("full", "replay", "driver")), errors
    if count >= 64:
        assert all(errors[way] < errors["cached"] for way in ("full", "replay", "driver")), errors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_policies_agree_under_autocast(dtype: torch.dtype) -> None:
    model = tiny(dtype=torch.float32, kernel=not cpu.why_missing, loss=TokenLoss(rows=4))
    with torch.autocast("cpu", dtype=dtype):
        wanted = step(model, IDS, labels=IDS)
        for policy in (Replay(keep=0), Replay(keep=2)):
            for driver in (False, True):
                check_step(step(model, IDS, policy, driver=driver, labels=IDS), wanted, 1e-5)
        assert model(IDS).memory.dtype is torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_models(dtype: torch.dtype) -> None:
    """Parameters in bf16 or fp16: memories in their dtype, the loss in float32, the policies alike."""
    model = tiny(dtype=dtype, kernel=not cpu.why_missing, loss=TokenLoss(rows=4))
    out = model(IDS, labels=IDS)
    assert out.memory.dtype is dtype
    assert out.loss.dtype is torch.float32
    wanted = step(model, IDS, labels=IDS)
    for driver in (False, True):
        found = step(model, IDS, Replay(keep=0), driver=driver, labels=IDS)
        assert torch.equal(found.memory, wanted.memory)
        assert found.loss == pytest.approx(wanted.loss, rel=1e-5)
        assert largest_difference(found.gradients, wanted.gradients) < 3e-2
        assert torch.equal(found.state, wanted.state)


# -- compiled segments -------------------------------------------------------------------------------------------------


def check_compiled(backend: str) -> None:
    """Compiled against eager without dropout; with dropout, which may draw otherwise, the policies among themselves."""
    torch._dynamo.reset()
    for dropout in (0.0, 0.2):
        model = tiny(dropout=dropout, dtype=torch.float32, kernel=not cpu.why_missing, layers=1)
        wanted = step(model, IDS, labels=IDS)
        model.backbone.compile(backend=backend)
        assert model.compiled()
        if dropout:
            wanted = step(model, IDS, labels=IDS)
        check_step(step(model, IDS, labels=IDS), wanted, 1e-5)
        for policy in (Replay(keep=0, check=True), Replay(keep=2, check=True)):
            for driver in (False, True):
                check_step(step(model, IDS, policy, driver=driver, labels=IDS), wanted, 1e-5)
        for driver in (False, True) if not cpu.why_missing else ():
            with counting() as calls:
                policy = Replay(keep=0, check=True, recompute="except_attention")
                check_step(step(model, IDS, policy, driver=driver, labels=IDS), wanted, 1e-5)
            assert calls[0] == 4


def test_compiled_segments() -> None:
    check_compiled("aot_eager")


@pytest.mark.slow
def test_compiled_segments_with_inductor() -> None:
    check_compiled("inductor")


# -- refused -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: Truncate(0), ValueError, "segments must be at least 1, got 0"),
        (lambda: Truncate(1.5), TypeError, "segments must be an int, got float"),  # type: ignore[arg-type]
        (lambda: Truncate(True), TypeError, "segments must be an int, got bool"),
        (lambda: Truncate(1, every=1), TypeError, "every must be True or False, got int"),  # type: ignore[arg-type]
        (lambda: Replay(keep=-1), ValueError, "keep must be at least 0, got -1"),
        (lambda: Replay(keep=1.0), TypeError, "keep must be an int, got float"),  # type: ignore[arg-type]
        (lambda: Replay(budget_bytes=0), ValueError, "budget_bytes must be at least 1, got 0"),
        (lambda: Replay(budget_bytes=1e9), TypeError, "budget_bytes must be an int, got float"),  # type: ignore[arg-type]
        (lambda: Replay(keep=2, budget_bytes=9), ValueError, "keep=2 and budget_bytes=9: give one of them"),
        (lambda: Replay(recompute="none"), ValueError, "recompute must be 'all' or 'except_attention', got 'none'"),
        (lambda: Replay(offload=1), TypeError, "offload must be True or False, got int"),  # type: ignore[arg-type]
        (lambda: Replay(check="yes"), TypeError, "check must be True or False, got str"),  # type: ignore[arg-type]
        (lambda: Replay(truncate="x"), TypeError, "truncate must be an int, got str"),  # type: ignore[arg-type]
        (lambda: Replay(truncate=0), ValueError, "truncate must be at least 1, got 0"),
    ],
)
def test_policies_refuse(make: Callable[[], object], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        make()
