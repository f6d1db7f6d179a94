"""``replay_step``: its arguments, its errors, and the random state that it and the checkpoints leave."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

from rmt_kernels import RecurrentMemory, Replay, SegmentLayout, replay_step
from rmt_kernels.backends import cpu
from rmt_kernels.recurrence import ReplayError, SampleLoss, TokenLoss
from tests.recurrence import (
    MEMORY,
    SEGMENT,
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


# -- random state and errors -------------------------------------------------------------------------------------------


class Failing(Tiny):
    """Raises in its nth pass, after it has drawn random numbers."""

    def __init__(self, at: int, error: BaseException | None = None) -> None:
        super().__init__()
        self.at, self.passes = at, 0
        self.error = RuntimeError("out of luck") if error is None else error

    def forward(self, x: Tensor, *, layout: SegmentLayout, **keywords: Any) -> Tensor:
        x = super().forward(x, layout=layout, **keywords)
        self.passes += 1
        if self.passes == self.at:
            raise self.error
        return x


def failing(at: int, error: BaseException | None = None, **options: Any) -> RecurrentMemory:
    model = tiny(**options)
    backbone = Failing(at, error).to(F64)
    backbone.load_state_dict(model.backbone.state_dict())
    model.backbone = backbone
    return model


def marked(model: RecurrentMemory) -> dict[str, tuple[Tensor, Tensor]]:
    """Gradients to be found again: the tensors, and what they hold."""
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return {name: (p.grad, p.grad.clone()) for name, p in model.named_parameters() if p.grad is not None}


def check_untouched(model: RecurrentMemory, marks: dict[str, tuple[Tensor, Tensor]]) -> None:
    for name, parameter in model.named_parameters():
        assert parameter.grad is marks[name][0]
        assert torch.equal(marks[name][0], marks[name][1])


@pytest.mark.parametrize("error", [RuntimeError("out of luck"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("policy", ["full", 2, Replay(), Replay(keep=0), Replay(keep=3), Replay(keep=9)], ids=str)
@pytest.mark.parametrize("at", [1, 3, 5])
def test_an_error_in_the_forward_pass_leaves_no_trace(at: int, policy: Any, error: BaseException) -> None:
    """Not in gradients, not in the random state; neither in the model's call nor in the driver's."""
    ids = numbers(2, 5 * SEGMENT)
    for driver in (False, True) if isinstance(policy, Replay) else (False,):
        model = failing(at, error, bptt=policy)
        marks, before = marked(model), generator_state()
        with pytest.raises(type(error)) as caught:
            replay_step(model, ids, labels=ids) if driver else model(ids, labels=ids)
        assert caught.value is error
        assert torch.equal(generator_state(), before)
        check_untouched(model, marks)


@pytest.mark.parametrize("keep", [0, 1, 3])
def test_an_error_in_the_backward_sweep(keep: int) -> None:
    ids = numbers(2, 5 * SEGMENT)
    for at in range(6, 11 - keep):
        model = failing(at, bptt=Replay(keep=keep))
        before = generator_state()
        with pytest.raises(ReplayError, match=r"\.grad is partial: call zero_grad\(\)") as caught:
            replay_step(model, ids, labels=ids)
        assert "out of luck" in str(caught.value)
        assert "RuntimeError" in str(caught.value)
        assert caught.value.__cause__ is vars(model.backbone)["error"]
        assert torch.equal(generator_state(), before)
        model.zero_grad()
        model.backbone.at = 0  # type: ignore[union-attr, assignment]
        check_step(step(model, ids, driver=True, labels=ids), plain_step(model, ids, labels=ids))


def test_bad_arguments_leave_no_trace() -> None:
    model = tiny(bptt=Replay())
    marks, before = marked(model), generator_state()
    for options in (
        {"labels": IDS[:, 1:]}, {"labels": IDS, "lengths": torch.tensor([18, 19])}, {"labels": IDS, "colour": 1},
        {"labels": IDS, "memory": torch.zeros(2, MEMORY, WIDTH)}, {"labels": IDS, "segment": 0},
    ):  # fmt: skip
        for run in (model, lambda ids, **rest: replay_step(model, ids, **rest)):
            with pytest.raises((TypeError, ValueError)):
                run(IDS, **options)
            assert torch.equal(generator_state(), before)
            check_untouched(model, marks)


class Unsteady(Tiny):
    """Depends on a generator that nobody restores."""

    def forward(self, x: Tensor, *, layout: SegmentLayout, **keywords: Any) -> Tensor:
        return super().forward(x * (1 + random.random()), layout=layout, **keywords)


def test_a_recompute_unlike_the_forward_is_found_on_request() -> None:
    """SYSTEMS.md, fault 2."""
    model = around(Unsteady().to(F64), bptt=Replay(keep=0, check=True))
    before = generator_state()
    says = r"segment 3 was recomputed with a memory that differs by up to .* from that of the forward pass"
    with pytest.raises(ReplayError, match=says):
        replay_step(model, IDS, labels=IDS)
    assert torch.equal(generator_state(), before)
    model.bptt = Replay(keep=2, check=True)
    with pytest.raises(ReplayError, match="segment 1 was recomputed"):
        replay_step(model, IDS, labels=IDS)
    check_step(
        step(tiny(), IDS, Replay(keep=0, check=True), driver=True, labels=IDS), plain_step(tiny(), IDS, labels=IDS)
    )


def test_a_recompute_of_another_shape_is_found_always() -> None:
    class Growing(Tiny):
        passes = 0

        def forward(self, x: Tensor, *, layout: SegmentLayout, **keywords: Any) -> Tensor:
            self.passes += 1
            wide = torch.cat([x] * (1 if self.passes <= 4 else 2), dim=1)
            return super().forward(wide.sin()[:, : x.shape[1]] + x, layout=layout, **keywords)

    model = around(Growing().to(F64), bptt=Replay(keep=0))
    with pytest.raises(CheckpointError, match=r"different metadata|different number"):
        model(IDS, labels=IDS).loss.backward()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_has_diverged_is_not_blamed_on_the_recomputation(value: float) -> None:
    class Diverged(Tiny):
        def forward(self, x: Tensor, *, layout: SegmentLayout, **keywords: Any) -> Tensor:
            hidden = super().forward(x.nan_to_num(0, 0, 0), layout=layout, **keywords)
            return torch.cat([hidden[:, :-1], torch.full_like(hidden[:, -1:], value)], dim=1)

    model = around(Diverged().to(F64), bptt=Replay(keep=0, check=True))
    assert bool((replay_step(model, IDS, labels=IDS).memory[:, -1].isfinite() == 0).all())


@pytest.mark.parametrize("rows", [3, 100])
def test_weights_changed_between_forward_and_backward_are_noticed(rows: int) -> None:
    """As autograd does: the gradient would be that of no function."""
    model = tiny(loss=TokenLoss(rows=rows))
    loss = model(IDS, labels=IDS).loss
    assert model.head is not None
    with torch.no_grad():
        model.head.weight.add_(1)  # type: ignore[operator]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_what_was_drawn_in_between_does_not_matter() -> None:
    """Backward finds another random state than forward left, and leaves that one."""
    model = tiny(bptt=Replay(keep=0), loss=TokenLoss(rows=3))
    wanted = step(model, IDS, "full", labels=IDS)
    torch.manual_seed(5)
    loss = model(IDS, labels=IDS).loss
    assert torch.equal(generator_state(), wanted.state)
    torch.randn(1000)
    between = generator_state()
    loss.backward()
    assert torch.equal(generator_state(), between)
    assert largest_difference(gradients(model), wanted.gradients) < 1e-10


# -- the driver's own arguments ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 1, 4])
def test_driver_adds_to_gradients(keep: int) -> None:
    """Two batches, each half of the loss; what stood in ``.grad`` stays."""
    model = tiny(bptt=Replay(keep=keep), loss=TokenLoss(rows=4))
    other = numbers(2, 11, seed=4)
    wanted = [plain_step(model, ids, labels=ids).gradients for ids in (IDS, other)]
    marks = marked(model)
    for ids in (IDS, other):
        torch.manual_seed(5)
        out = replay_step(model, ids, labels=ids, loss_scale=0.5, sync=ids is other)
        assert out.loss is not None
        assert out.loss.item() == pytest.approx(plain_step(tiny(loss=TokenLoss(rows=4)), ids, labels=ids).loss)
    for name, parameter in model.named_parameters():
        assert parameter.grad is marks[name][0]
        expected = marks[name][1] + (wanted[0][name] + wanted[1][name]) / 2
        assert torch.allclose(parameter.grad, expected, rtol=1e-10, atol=1e-12)


def test_driver_gives_tensors_without_a_graph() -> None:
    out = replay_step(tiny(), IDS, labels=IDS, policy=Replay())
    assert out.loss is not None
    assert not out.loss.requires_grad
    assert not out.memory.requires_grad
    assert out.outputs is None


@pytest.mark.parametrize("driver", [False, True], ids=["autograd", "driver"])
def test_gradient_scaler(driver: bool) -> None:
    model = tiny(dtype=torch.float32, bptt=Replay())
    wanted = step(model, IDS, labels=IDS).gradients
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    torch.manual_seed(5)
    if driver:
        replay_step(model, IDS, labels=IDS, scaler=scaler)
    else:
        scaler.scale(model(IDS, labels=IDS).loss).backward()
    assert largest_difference(gradients(model), {name: 1024 * grad for name, grad in wanted.items()}) < 1e-6
    scaler.step(optimizer)
    scaler.update()
    after = {name: before[name] - parameter.detach() for name, parameter in model.named_parameters()}
    assert largest_difference(after, wanted) < 1e-4


def test_driver_refuses() -> None:
    model = tiny()
    with pytest.raises(ValueError, match=r"policy: the model's bptt is _Full\(\); give policy=Replay\(...\)"):
        replay_step(model, IDS, labels=IDS)
    model.bptt = 2
    with pytest.raises(ValueError, match=r"policy: the model's bptt is Truncate\(segments=2, every=False\)"):
        replay_step(model, IDS, labels=IDS)
    with pytest.raises(TypeError, match=r"policy must be Replay\(...\), got 'full'"):
        replay_step(model, IDS, labels=IDS, policy="full")  # type: ignore[arg-type]
    model.bptt = Replay()
    with pytest.raises(TypeError, match=r"labels must be a torch.Tensor, got NoneType; replay_step goes back from"):
        replay_step(model, IDS, labels=None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"model must be a RecurrentMemory, .* got Tiny"):
        replay_step(model.backbone, IDS, labels=IDS)
    with pytest.raises(TypeError, match=r"compile the segment, not the loop: model.backbone.compile"):
        replay_step(torch.compile(model, backend="eager"), IDS, labels=IDS)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="gathered=True is for a model that fully_shard was called on"):
        replay_step(model, IDS, labels=IDS, gathered=True)
    with torch.no_grad(), pytest.raises(ValueError, match="replay_step computes gradients: call it outside"):
        replay_step(model, IDS, labels=IDS)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_driver_has_no_outputs() -> None:
    with pytest.raises(TypeError, match="outputs"):
        replay_step(tiny(), IDS, labels=IDS, policy=Replay(), outputs="logits")


@pytest.mark.parametrize("options", [{"scaler": 3}, {"loss_scale": "a"}, {"graphs": 3}], ids=str)
def test_driver_refuses_before_it_begins(options: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError), match=next(iter(options))):
        replay_step(tiny(), IDS, labels=IDS, policy=Replay(), **options)


@pytest.mark.parametrize("name", ["inputs", "gain"])
def test_driver_with_arguments_that_have_a_graph(name: str) -> None:
    """Exact, or refused before anything has happened."""
    model = tiny(embed=None, width=WIDTH)
    front = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()).to(F64)
    rows, gain = torch.randn(2, 18, WIDTH, dtype=F64), torch.ones(2, 1, 1, dtype=F64, requires_grad=True)

    def run(driver: bool) -> dict[str, Tensor]:
        model.zero_grad()
        front.zero_grad()
        inputs = front(rows) if name == "inputs" else rows
        extra: dict[str, Any] = {"gain": gain.exp()} if name == "gain" else {}
        torch.manual_seed(5)
        if driver:
            replay_step(model, inputs, labels=IDS, policy=Replay(), **extra)
        else:
            model(inputs, labels=IDS, **extra).loss.backward()
        return gradients(model) | gradients(front)

    wanted, found, refusal = run(False), None, ""
    try:
        found = run(True)
    except ValueError as error:
        refusal = str(error)
    if found is None:
        assert name in refusal
        assert all(parameter.grad is None for parameter in model.parameters())
    else:
        assert largest_difference(found, wanted) < 1e-10


def test_classification_with_the_driver() -> None:
    """Samples aligned right, CLS and SEP in front, the loss of the last segment: arXiv 2304.11062."""
    model = tiny("rmt_encoder", loss=SampleLoss(row=0), align="right", prefix=[7, 9])
    labels, lengths = torch.tensor([3, 8]), [18, 7]
    wanted = plain_step(
        model, IDS, labels=labels, lengths=lengths, align="right", layout="rmt_encoder", row=0, weights="last"
    )
    for keep in (0, 1, 2):
        for driver in (False, True):
            found = step(model, IDS, Replay(keep=keep), driver=driver, labels=labels, lengths=torch.tensor(lengths))
            check_step(found, wanted)
