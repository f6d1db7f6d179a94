"""Losses inside segments: against the full logits of a plain loop, and in chunks against at once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.measure import peak_bytes
from rmt_kernels import RecurrentMemory, Replay, Truncate, replay_step
from rmt_kernels.recurrence import SampleLoss, Segments, TokenLoss
from rmt_kernels.recurrence.chunks import chunked, gradients_at_once, without_value
from tests.recurrence import (
    SEGMENT,
    VOCABULARY,
    WIDTH,
    check_step,
    generator_state,
    gradients,
    largest_difference,
    numbers,
    plain_loop,
    step,
    tiny,
)

F64 = torch.float64
ONE = torch.ones((), dtype=F64)
# -100 beside real labels, and a whole chunk that is ignored.
LABELS = torch.tensor([3, -100, 0, 10, 7, -100, -100, -100, -100, 2, 9])


def summed(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")


def squares(logits: Tensor, labels: Tensor) -> Tensor:
    """A loss of one's own, (n,), which does not know of ignored labels."""
    return (logits.tanh().sum(dim=-1) - labels.to(logits)).square()


class Recorder(nn.Module):
    """A head that notes how many rows it is given at a time."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head
        self.rows: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.rows.append(x.shape[:-1].numel())
        return self.head(x)  # type: ignore[no-any-return]


class Sum(nn.Module):
    """A head whose weight is a sum of two parameters, which get one gradient tensor between them."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.delta = nn.Parameter(torch.randn(VOCABULARY, WIDTH)), nn.Parameter(torch.zeros(1, WIDTH))
        self.other = nn.Parameter(torch.randn(VOCABULARY, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.base + self.other + self.delta)


HEADS: dict[str, Callable[[], nn.Module | None]] = {
    "bias": lambda: nn.Linear(WIDTH, VOCABULARY),
    "no bias": lambda: nn.Linear(WIDTH, VOCABULARY, bias=False),
    "deep": lambda: nn.Sequential(
        nn.Linear(WIDTH, 5), nn.GELU(), nn.LayerNorm(5), nn.Linear(5, VOCABULARY), nn.Dropout(0.3)
    ),
    "none": lambda: None,
}


def both_ways(
    head: nn.Module | None, hidden: Tensor, labels: Tensor, rows: int | None, total: Callable[[Tensor, Tensor], Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Value and gradients in chunks of ``rows``, and at once."""
    found = []
    for chunk in (rows, 10**6):
        torch.manual_seed(1)
        x = hidden.clone().requires_grad_()
        weights = [] if head is None else [p for p in head.parameters() if p.requires_grad]
        value = chunked(total, head, x, labels, ONE / 3, chunk)
        found.append([value.detach(), *torch.autograd.grad(2.5 * value, [x, *weights])])
    return found[0], found[1]


def close(found: Sequence[Tensor], wanted: Sequence[Tensor], tolerance: float = 1e-12) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert float((a - b).detach().norm()) <= tolerance * max(1.0, float(b.detach().norm()))


# -- in chunks and at once ---------------------------------------------------------------------------------------------


@pytest.fixture(params=["in backward", "in forward"])
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """When the gradients of chunks are computed."""
    with gradients_at_once() if request.param == "in forward" else nullcontext():
        yield request.param


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 10])
def test_chunked_equals_unchunked(name: str, rows: int) -> None:
    made = HEADS[name]()
    head = None if made is None else made.to(F64).eval()
    hidden = torch.randn(len(LABELS), WIDTH if head is not None else VOCABULARY, dtype=F64)
    found, wanted = both_ways(head, hidden, LABELS, rows, summed)
    close(found, wanted)
    assert float(wanted[1].norm()) > 0.1


def test_a_function_in_place_of_a_module() -> None:
    hidden = torch.randn(len(LABELS), WIDTH, dtype=F64)
    weight = torch.randn(VOCABULARY, WIDTH, dtype=F64)
    a, b = (chunked(summed, lambda x: x @ weight.T, hidden, LABELS, ONE, rows) for rows in (3, 100))
    close([a], [b])


@pytest.mark.usefixtures("way")
def test_weights_that_share_a_gradient_tensor() -> None:
    head = Sum().to(F64)
    found, wanted = both_ways(head, torch.randn(len(LABELS), WIDTH, dtype=F64), LABELS, 3, summed)
    close(found, wanted)


@pytest.mark.usefixtures("way")
def test_one_weight_used_twice_in_the_head() -> None:
    first = nn.Linear(WIDTH, WIDTH, bias=False)
    head = nn.Sequential(first, nn.Tanh(), first).to(F64)
    labels = LABELS.remainder(WIDTH)
    found, wanted = both_ways(head, torch.randn(len(labels), WIDTH, dtype=F64), labels, 4, summed)
    close(found, wanted)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("how", ["hook", "pre-hook", "backward hook", "forward of its own", "weight hook"])
def test_what_is_done_to_a_linear_head_counts(how: str) -> None:
    """A plain ``nn.Linear`` is computed in a shorter way, but not past what somebody has hung on it."""
    head = nn.Linear(WIDTH, VOCABULARY).to(F64)
    if how == "hook":
        head.register_forward_hook(lambda module, args, out: out * 2)
    elif how == "pre-hook":
        head.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    elif how == "backward hook":
        head.register_full_backward_hook(lambda module, grad_in, grad_out: (grad_in[0] * 2,))  # type: ignore[index]
    elif how == "weight hook":
        head.weight.register_hook(lambda grad: grad * 2)
    else:
        plain = head.forward
        head.forward = lambda x: plain(x) * 2  # type: ignore[method-assign, assignment]
    found, wanted = both_ways(head, torch.randn(len(LABELS), WIDTH, dtype=F64), LABELS, 3, summed)
    close(found, wanted)


@pytest.mark.usefixtures("way")
def test_frozen_heads() -> None:
    """Wholly: the gradient of the rows alone. In part: of the rest."""
    hidden = torch.randn(len(LABELS), WIDTH, dtype=F64)
    head = nn.Linear(WIDTH, VOCABULARY).to(F64).requires_grad_(False)
    found, wanted = both_ways(head, hidden, LABELS, 3, summed)
    assert len(wanted) == 2
    close(found, wanted)
    head.bias.requires_grad_()
    found, wanted = both_ways(head, hidden, LABELS, 3, summed)
    assert len(wanted) == 3
    close(found, wanted)


@pytest.mark.usefixtures("way")
def test_hidden_rows_without_a_gradient() -> None:
    """A frozen backbone: only the head learns."""
    hidden = torch.randn(len(LABELS), WIDTH, dtype=F64)
    head = nn.Linear(WIDTH, VOCABULARY).to(F64)
    found = [
        torch.autograd.grad(chunked(summed, head, hidden, LABELS, ONE, rows), list(head.parameters()))
        for rows in (2, 100)
    ]
    close(found[0], found[1])
    assert not chunked(summed, head.requires_grad_(False), hidden, LABELS, ONE, 2).requires_grad


@pytest.mark.usefixtures("way")
def test_a_weight_that_is_not_used() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = nn.Linear(WIDTH, VOCABULARY), nn.Linear(WIDTH, VOCABULARY)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)  # type: ignore[no-any-return]

    head = Half().to(F64)
    chunked(summed, head, torch.randn(len(LABELS), WIDTH, dtype=F64), LABELS, ONE, 3).backward()
    assert head.used.weight.grad is not None
    assert head.spare.weight.grad is None


@pytest.mark.usefixtures("way")
def test_backward_twice_adds_up() -> None:
    head = nn.Sequential(nn.Dropout(0.5), nn.Linear(WIDTH, VOCABULARY)).to(F64)
    hidden = torch.randn(len(LABELS), WIDTH, dtype=F64, requires_grad=True)
    value = chunked(summed, head, hidden, LABELS, ONE, 3)
    value.backward(retain_graph=True)
    assert hidden.grad is not None
    once = hidden.grad.clone()
    torch.rand(17)  # the state that backward finds is not the one that forward left
    value.backward()
    close([hidden.grad], [2 * once], 0)


@pytest.mark.parametrize("rows", [1, 4, 10])
@pytest.mark.usefixtures("way")
def test_dropout_in_the_head_is_one_draw(rows: int) -> None:
    """The gradient belongs to the value: masks are noted, and put into a loss without random numbers."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.masks = nn.Linear(WIDTH, VOCABULARY), list[Tensor]()

        def forward(self, x: Tensor) -> Tensor:
            self.masks.append(torch.rand(x.shape, dtype=x.dtype) < 0.6)
            return self.linear(x * self.masks[-1])  # type: ignore[no-any-return]

    head = Masked().to(F64)
    hidden = torch.randn(len(LABELS), WIDTH, dtype=F64, requires_grad=True)
    value = chunked(summed, head, hidden, LABELS, ONE, rows)
    after = generator_state()
    pieces = -(-len(LABELS) // rows)
    assert len(head.masks) == pieces
    parameters = [hidden, *head.parameters()]
    found = torch.autograd.grad(value, parameters)
    assert torch.equal(generator_state(), after), "backward has moved the random state"
    assert all(torch.equal(a, b) for a, b in zip(head.masks[:pieces], head.masks[pieces:], strict=True))
    mask = torch.cat(head.masks[:pieces])
    plain = summed(head.linear(hidden * mask), LABELS)
    close([value, *found], [plain, *torch.autograd.grad(plain, parameters)])


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("rows", [2, 4, 8])
def test_random_state_afterwards_is_that_of_one_piece(rows: int) -> None:
    head = nn.Sequential(nn.Dropout(0.5), nn.Linear(WIDTH, VOCABULARY)).to(F64)
    hidden = torch.randn(len(LABELS), WIDTH, dtype=F64, requires_grad=True)
    found = []
    for chunk in (rows, 100):
        torch.manual_seed(4)
        value = chunked(summed, head, hidden, LABELS, ONE, chunk)
        value.backward()
        found.append((value.item(), generator_state()))
    assert torch.equal(found[0][1], found[1][1])
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-12)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("deep", [False, True])
def test_gradients_in_float16_wait_for_their_factor(autocast: bool, deep: bool) -> None:
    """What a factor of 2^12 keeps away from 0 is not computed without it."""
    head: nn.Module = nn.Linear(WIDTH, VOCABULARY)
    head = nn.Sequential(head) if deep else head
    rows = torch.randn(len(LABELS), WIDTH)
    exact, wide = copy.deepcopy(head).double(), rows.double().requires_grad_()
    (summed(exact(wide), LABELS) * 2.0**-8).backward()
    hidden = (rows if autocast else rows.half()).requires_grad_()
    head, factor = head if autocast else head.half(), torch.tensor(2.0**-20)
    with gradients_at_once(), torch.autocast("cpu", dtype=torch.float16, enabled=autocast):
        value = chunked(lambda x, y: summed(x.float(), y), head, hidden, LABELS, factor, 3)
    (value * 2.0**12).backward()
    assert hidden.grad is not None
    assert wide.grad is not None
    assert float((hidden.grad - wide.grad).norm()) < 0.01 * float(wide.grad.norm())


def test_value_left_out_and_reported_by_backward() -> None:
    head = nn.Linear(WIDTH, VOCABULARY).to(F64)
    hidden = torch.randn(len(LABELS), WIDTH, dtype=F64, requires_grad=True)
    whole = chunked(summed, head, hidden, LABELS, ONE / 3, 100)
    wanted = torch.autograd.grad(whole, [hidden, *head.parameters()])
    recorder, report = Recorder(head), torch.full((), 7.0, dtype=F64)
    with without_value(report):
        silent = chunked(summed, recorder, hidden, LABELS, ONE / 3, 4)
    assert silent.item() == 0
    assert recorder.rows == [], "a value that nobody reads was computed"
    found = torch.autograd.grad(silent, [hidden, *head.parameters()])
    close([report, *found], [whole + 7, *wanted])
    with without_value():
        assert chunked(summed, head, hidden, LABELS, ONE / 3, 4).item() == 0
    assert chunked(summed, head, hidden, LABELS, ONE / 3, 4).item() != 0


def test_a_value_without_a_backward_pass_is_reported_too() -> None:
    head = nn.Linear(WIDTH, VOCABULARY).to(F64).requires_grad_(False)
    hidden, report = torch.randn(len(LABELS), WIDTH, dtype=F64), torch.zeros((), dtype=F64)
    with without_value(report):
        loss = chunked(summed, head, hidden, LABELS, ONE, 4)
    close([report + loss], [summed(head(hidden), LABELS)])


@pytest.mark.usefixtures("way")
def test_second_derivatives_are_refused() -> None:
    """A gradient without a graph would leave a gradient penalty out, silently."""
    hidden = torch.randn(len(LABELS), WIDTH, dtype=F64, requires_grad=True)
    value = chunked(summed, nn.Linear(WIDTH, VOCABULARY).to(F64), hidden, LABELS, ONE, 4)
    with pytest.raises((NotImplementedError, RuntimeError), match=r"once|second derivative"):
        (torch.autograd.grad(value, hidden, create_graph=True)[0] * hidden).sum().backward()


@pytest.mark.usefixtures("way")
def test_autocast_of_the_forward_pass_holds_in_backward() -> None:
    head = nn.Linear(WIDTH, VOCABULARY)
    recorder: list[torch.dtype] = []
    head.register_forward_hook(lambda module, args, out: recorder.append(out.dtype))
    hidden = torch.randn(len(LABELS), WIDTH, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = chunked(lambda x, y: summed(x.float(), y), head, hidden, LABELS, torch.ones(()), 4)
    assert value.dtype is torch.float32
    value.backward()
    assert recorder == [torch.bfloat16] * 6
    assert hidden.grad is not None
    assert hidden.grad.dtype is torch.float32


@pytest.mark.parametrize(("tied", "bias"), [(False, True), (False, False), (True, True), (True, False)])
@pytest.mark.parametrize("rows", [1, 3, 7])
@pytest.mark.parametrize("bptt", ["full", Replay(), Replay(keep=0)], ids=["full", "replay", "keep 0"])
def test_whole_models_in_chunks(tied: bool, bias: bool, rows: int, bptt: Any) -> None:
    """Head, embedding, a weight that is both, backbone and memory; against the plain loop."""
    model = tiny(tied=tied, bias=bias, loss=TokenLoss(rows=rows), bptt=bptt, layers=1)
    ids = numbers(2, 3 * SEGMENT - 2)
    torch.manual_seed(5)
    plain = plain_loop(model, ids, labels=ids)
    assert plain.loss is not None
    plain.loss.backward()
    wanted, state = gradients(model), generator_state()
    assert ("head.weight" in wanted) is not tied
    for driver in (False, True) if bptt != "full" else (False,):
        model.zero_grad()
        torch.manual_seed(5)
        if driver:
            out = replay_step(model, ids, labels=ids)
        else:
            out = model(ids, labels=ids)
            out.loss.backward()
        assert out.loss is not None
        assert out.loss.item() == pytest.approx(plain.loss.item(), rel=1e-12)
        assert largest_difference(gradients(model), wanted) < 1e-12
        assert torch.equal(generator_state(), state)


# -- what never exists -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 4, 7])
def test_the_head_never_sees_more_rows_than_a_chunk(rows: int) -> None:
    """SYSTEMS.md, fault 3: no full logits. A head that records the rows it is given, under every policy."""
    for bptt in ("full", 2, Replay(), Replay(keep=0), Replay(keep=2)):
        model = tiny(loss=TokenLoss(rows=rows), bptt=bptt)
        assert model.head is not None
        recorder = Recorder(model.head)
        model.head = recorder
        ids = numbers(2, 3 * SEGMENT)
        model(ids, labels=ids).loss.backward()
        if isinstance(bptt, Replay):
            replay_step(model, ids, labels=ids)
        assert max(recorder.rows) <= rows
        assert sum(recorder.rows) >= 2 * ids.numel(), "forward and backward"


def test_the_head_is_run_no_more_often_than_needed() -> None:
    """Twice under autograd, whatever is recomputed; once in the driver; not at all for a loss known to be 0."""
    ids = numbers(2, 4 * SEGMENT)
    for bptt in ("full", Replay(keep=0), Replay(keep=2)):
        for weights, tokens in (("tokens", ids.numel()), ("last", 2 * SEGMENT), ([0, 1, 0, 2], 4 * SEGMENT)):
            model = tiny(loss=TokenLoss(rows=3, weights=weights), bptt=bptt)
            assert model.head is not None
            model.head = recorder = Recorder(model.head)
            model(ids, labels=ids).loss.backward()
            assert sum(recorder.rows) == 2 * tokens
            recorder.rows.clear()
            if isinstance(bptt, Replay):
                replay_step(model, ids, labels=ids)
                assert sum(recorder.rows) == tokens


@pytest.mark.parametrize("align", ["left", "right"])
@pytest.mark.parametrize(("bptt", "once"), [
    ("full", 4), (2, 4), (Replay(), 0), (Replay(keep=0), 0), (Replay(keep=3), 3),
])  # fmt: skip
def test_logits_of_kept_segments_are_computed_once(
    align: str, bptt: Any, once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the head is plain and the loss is cross entropy with one factor."""
    rows: list[int] = []

    def noted(logits: Tensor, labels: Tensor, **others: Any) -> Tensor:
        rows.append(len(logits))
        return plain(logits, labels, **others)

    plain, ids = F.cross_entropy, numbers(2, 4 * SEGMENT - 2)
    model = tiny(loss=TokenLoss(rows=3), bptt=bptt, align=align)
    torch.manual_seed(5)
    with monkeypatch.context() as patch:
        patch.setattr(F, "cross_entropy", noted)
        loss = model(ids, labels=ids).loss
        (3 * loss).backward(retain_graph=True)
    assert sum(rows) == 2 * SEGMENT * (2 * 4 - once)
    found = gradients(model)
    torch.manual_seed(5)
    model.zero_grad()
    # A function of the caller's is taken segment by segment.
    model.loss = TokenLoss(lambda x, y: plain(x, y, ignore_index=-100, reduction="none"), rows=3, shift=True)
    apart = model(ids, labels=ids).loss
    (3 * apart).backward()
    assert loss.item() == pytest.approx(apart.item(), rel=1e-12)
    assert largest_difference(found, gradients(model)) < 1e-12
    model.zero_grad()
    loss.backward()  # again: what was handed out is computed now
    assert largest_difference({name: 3 * grad for name, grad in gradients(model).items()}, found) < 1e-12


def test_small_gradients_are_not_lost_in_narrow_weights() -> None:
    """Hundreds of chunks: added up one by one in bfloat16, the later ones change nothing any more."""
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, 50).bfloat16()
    hidden = (1 + 0.1 * torch.randn(8192, WIDTH)).bfloat16()
    labels = torch.zeros(8192, dtype=torch.int64)
    for context in (nullcontext(), gradients_at_once()):
        with context:
            value = chunked(lambda x, y: summed(x.float(), y), head, hidden, labels, torch.tensor(1 / 8192), 16)
        found = torch.autograd.grad(value, list(head.parameters()))
        exact = copy.deepcopy(head).double()
        wanted = torch.autograd.grad(summed(exact(hidden.double()), labels) / 8192, list(exact.parameters()))
        for a, b in zip(found, wanted, strict=True):
            assert float((a - b).norm()) < 0.02 * float(b.norm())


@pytest.mark.parametrize("bptt", ["full", Replay(), Replay(keep=2)], ids=["full", "replay", "keep 2"])
def test_a_checkpoint_around_the_model(bptt: Any) -> None:
    """Its hooks are for the model's own graph: one run more, and not one for each chunk."""
    model, ids, found, calls = tiny(loss=TokenLoss(rows=3), bptt=bptt), numbers(2, 4 * SEGMENT), [], []
    model.backbone.register_forward_hook(lambda *_: calls.append(1))
    for around in (False, True):
        torch.manual_seed(5)
        model.zero_grad()
        calls.clear()

        def run(given: Tensor) -> Tensor:
            loss: Tensor | None = model(given, labels=given).loss
            assert loss is not None
            return loss

        loss = checkpoint(run, ids, use_reentrant=False) if around else run(ids)
        assert isinstance(loss, Tensor)
        loss.backward()
        found.append((loss.item(), gradients(model), len(calls)))
    assert found[0][0] == found[1][0]
    assert largest_difference(found[1][1], found[0][1]) < 1e-12
    assert found[1][2] <= found[0][2] + 8


def test_a_segment_in_one_chunk_is_differentiable_twice() -> None:
    model, ids = tiny(dropout=0, loss=TokenLoss(rows=2 * SEGMENT)), numbers(2, 3 * SEGMENT)
    loss = model(ids, labels=ids).loss
    (grad,) = torch.autograd.grad(loss, model.initial_memory, create_graph=True)
    grad.square().sum().backward()
    assert model.head is not None
    assert float(model.head.weight.grad.norm()) > 0  # type: ignore[union-attr, operator]


def test_a_head_that_draws_without_a_module_draws_the_same_under_every_policy() -> None:
    class Dropping(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(F.dropout(x, 0.5))

    ids, losses = numbers(2, 4 * SEGMENT), set()
    for bptt in ("full", Replay(), Replay(keep=2), Replay(keep=0)):
        torch.manual_seed(1)
        head = Dropping(WIDTH, VOCABULARY)
        model = tiny(dropout=0, bptt=bptt, head=head, loss=TokenLoss(rows=3))
        torch.manual_seed(2)
        losses.add(round(model(ids, labels=ids).loss.item(), 10))
    assert len(losses) == 1


def test_without_gradients_of_the_backbone_rows_are_not_kept() -> None:
    """A frozen backbone: the memory taken does not grow with the number of segments."""
    found = []
    for segments in (8, 32):
        model = RecurrentMemory(
            Through(), memory=1, segment=256, embed=nn.Embedding(400, 16).requires_grad_(False), own_mask=True,
            head=nn.Linear(16, 400), loss=TokenLoss(rows=64),
        )  # fmt: skip
        model.initial_memory.requires_grad_(False)
        ids = torch.randint(400, (1, 256 * segments))

        def run(model: RecurrentMemory = model, ids: Tensor = ids) -> object:
            model(ids, labels=ids)
            return None

        found.append(peak_bytes(run))
    assert found[1] - found[0] < 1.5 * 24 * 256 * 16 * 4  # the rows that the losses' own graph keeps


class Through(nn.Module):
    """A backbone without weights, for losses of given rows."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_bytes_of_the_logits_do_not_exist() -> None:
    """4,096 rows of 2,000 classes are 32 MB of float32; a chunk of 64 rows is half a megabyte."""
    width, classes, tokens = 16, 2000, 4096
    head = nn.Linear(width, classes)
    rows, labels = torch.randn(1, tokens, width), torch.randint(classes, (1, tokens))
    logits = tokens * classes * 4

    def step(chunk: int, outputs: str | None = None) -> Callable[[], object]:
        model = RecurrentMemory(
            Through(), memory=1, segment=tokens // 2, width=width, head=head, loss=TokenLoss(rows=chunk), own_mask=True
        )

        def run() -> object:
            out = model(rows, labels=labels, outputs=outputs)
            out.loss.backward()
            model.zero_grad()
            return out

        return run

    assert peak_bytes(step(tokens)) > logits, "the measure sees logits where they exist"
    assert peak_bytes(step(64)) < logits / 8
    assert peak_bytes(step(64, "logits")) > logits, "asked for"


def test_default_chunks_are_bounded() -> None:
    """Without ``rows`` a chunk holds at most 4 Mi logits on the CPU."""
    head = Recorder(nn.Linear(2, 50_000))
    hidden = torch.randn(200, 2, requires_grad=True)
    chunked(summed, head, hidden, torch.zeros(200, dtype=torch.int64), torch.ones(())).backward()
    assert 16 <= max(head.rows) <= 2**22 // 50_000
    assert sum(head.rows) == 400


# -- what counts -------------------------------------------------------------------------------------------------------

WEIGHTS: tuple[Any, ...] = ("tokens", "segments", "last", (0.5, 0.0, 2.0), (0.25, -1.0, 0.25))
RAGGED: tuple[list[int] | None, ...] = (None, [13, 4], [6, 0], [0, 0], [1, 13])


def compare(model: RecurrentMemory, ids: Tensor, options: dict[str, Any], plain_options: dict[str, Any]) -> Tensor:
    """Loss and gradients of the model against the plain loop, under autograd and in the driver; returns the loss."""
    torch.manual_seed(5)
    plain = plain_loop(model, ids, **plain_options)
    assert plain.loss is not None
    plain.loss.backward()
    wanted = gradients(model)
    for bptt in ("full", Replay()):
        model.bptt = bptt
        model.zero_grad()
        torch.manual_seed(5)
        out = model(ids, **options)
        out.loss.backward()
        assert out.loss.item() == pytest.approx(plain.loss.item(), rel=1e-12, abs=1e-15)
        assert largest_difference(gradients(model), wanted) < 1e-12
    model.zero_grad()
    torch.manual_seed(5)
    out = replay_step(model, ids, **options)
    assert out.loss is not None
    assert out.loss.item() == pytest.approx(plain.loss.item(), rel=1e-12, abs=1e-15)
    assert largest_difference(gradients(model), wanted) < 1e-12
    return plain.loss.detach()


@pytest.mark.parametrize("align", ["left", "right"])
@pytest.mark.parametrize("lengths", RAGGED, ids=str)
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_weights_of_segments(weights: Any, lengths: list[int] | None, align: str) -> None:
    model = tiny(loss=TokenLoss(weights=weights, rows=3), align=align, layers=1)
    ids = numbers(2, 13)
    labels = ids.clone()
    labels[0, 2], labels[1, 3] = -100, -100
    given_ = None if lengths is None else torch.tensor(lengths)
    loss = compare(
        model, ids, {"labels": labels, "lengths": given_},
        {"labels": labels, "lengths": lengths, "align": align, "weights": weights},
    )  # fmt: skip
    assert bool(loss.isfinite())
    assert lengths != [0, 0] or loss == 0


@given(
    st.integers(1, 14), st.integers(1, 6), st.sampled_from(["left", "right"]), st.booleans(),
    st.sampled_from(["tokens", "segments", "last"]), st.data(),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_any_labels_lengths_and_mask(
    length: int, segment: int, align: str, shift: bool, weights: str, data: st.DataObject
) -> None:
    """Labels over segment borders, at the samples' ends, ignored, and masked."""
    model = tiny(loss=TokenLoss(weights=weights, rows=4, shift=shift), align=align, layers=1, segment=segment)
    lengths = data.draw(st.none() | st.lists(st.integers(0, length), min_size=2, max_size=2))
    ids = numbers(2, length, seed=length)
    labels = ids.clone()
    for b in range(2):
        for t in data.draw(st.sets(st.integers(0, length - 1), max_size=4)):
            labels[b, t] = -100
    mask = None
    if data.draw(st.booleans()):
        mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=2 * length, max_size=2 * length)))
        mask = mask.view(2, length)
    torch.manual_seed(5)
    plain = plain_loop(
        model, ids, labels=labels, lengths=lengths, label_mask=mask, segment=segment, align=align, shift=shift,
        weights=weights,
    )  # fmt: skip
    assert plain.loss is not None
    torch.manual_seed(5)
    out = model(ids, labels=labels, label_mask=mask, lengths=None if lengths is None else torch.tensor(lengths))
    assert out.loss.item() == pytest.approx(plain.loss.item(), rel=1e-12, abs=1e-15)
    names = [name for name, _ in model.named_parameters()]
    parameters = list(model.parameters())
    found = torch.autograd.grad(out.loss, parameters, allow_unused=True, materialize_grads=True)
    wanted = torch.autograd.grad(plain.loss, parameters, allow_unused=True, materialize_grads=True)
    assert largest_difference(dict(zip(names, found, strict=True)), dict(zip(names, wanted, strict=True))) < 1e-12


def test_labels_are_shifted_over_borders() -> None:
    """The last row of a segment predicts the first token of the next: nothing but the very first label is left out."""
    ids = numbers(1, 4 * SEGMENT)
    model = tiny(loss=TokenLoss(rows=2))
    only = torch.full_like(ids, -100)
    for t in range(ids.shape[1]):
        labels = only.clone()
        labels[0, t] = 4
        loss = model(ids, labels=labels).loss
        assert (loss.item() != 0) == (t > 0), t


@pytest.mark.parametrize("weights", ["tokens", "segments", "last", (1.0, 2.0)])
@pytest.mark.parametrize("bptt", ["full", Replay(), Truncate(1)], ids=["full", "replay", "cut"])
def test_no_label_at_all_gives_zero(weights: Any, bptt: Any) -> None:
    """Not NaN, and gradients are 0."""
    model = tiny(loss=TokenLoss(weights=weights, rows=2), bptt=bptt)
    ids = numbers(2, 2 * SEGMENT)
    for options in (
        {"labels": torch.full_like(ids, -100)},
        {"labels": ids, "label_mask": torch.zeros_like(ids, dtype=torch.bool)},
        {"labels": ids, "lengths": torch.tensor([0, 0])},
    ):
        model.zero_grad()
        out = model(ids, **options)
        assert out.loss.item() == 0
        out.loss.backward()
        assert all(bool((grad == 0).all()) for grad in gradients(model).values())


def test_labels_of_another_ignored_number() -> None:
    ids = numbers(2, 13)
    labels = ids.masked_fill(ids == 3, 777)
    model = tiny(loss=TokenLoss(ignore=777, rows=2))
    plain = tiny(loss=TokenLoss(rows=2))
    torch.manual_seed(1)
    found = model(ids, labels=labels).loss
    torch.manual_seed(1)
    assert found.item() == plain(ids, labels=ids.masked_fill(ids == 3, -100)).loss.item()


def test_shift_follows_the_layout() -> None:
    for layout, shift in (("rmt_decoder", True), ("causal", True), ("rmt_encoder", False)):
        loss = tiny(layout).loss
        assert isinstance(loss, TokenLoss)
        assert loss.shift is shift
        given_ = tiny(layout, loss=TokenLoss(shift=not shift)).loss
        assert isinstance(given_, TokenLoss)
        assert given_.shift is not shift
    model = tiny("rmt_encoder", loss=TokenLoss(rows=3), layers=1)
    ids, labels = numbers(2, 13), numbers(2, 13, seed=1)
    compare(model, ids, {"labels": labels}, {"labels": labels, "layout": "rmt_encoder", "shift": False})


@pytest.mark.parametrize("rows", [2, 100])
def test_a_function_of_ones_own(rows: int) -> None:
    for loss in (TokenLoss(squares, rows=rows), squares):
        model = tiny(loss=loss, layers=1)
        ids = numbers(2, 13)
        labels = ids.masked_fill(ids == 3, -100)
        compare(model, ids, {"labels": labels}, {"labels": labels, "function": squares})


def test_labels_that_are_no_classes() -> None:
    """Regression: float labels, with a head of one output."""

    def regression(values: Tensor, labels: Tensor) -> Tensor:
        return (values[:, 0] - labels).square()

    model = tiny(loss=TokenLoss(regression, shift=False, rows=4), head=nn.Linear(WIDTH, 1))
    ids, labels = numbers(2, 13), torch.randn(2, 13, dtype=F64)
    mask = torch.rand(2, 13) < 0.7
    torch.manual_seed(5)
    plain = plain_loop(model, ids)
    torch.manual_seed(5)
    out = model(ids, labels=labels, label_mask=mask)
    wanted = (plain.logits[:, 0].view(2, 13) - labels).square()[mask].mean()
    assert out.loss.item() == pytest.approx(wanted.item(), rel=1e-12)


def test_without_a_head_the_loss_gets_hidden_rows() -> None:
    def norms(hidden: Tensor, labels: Tensor) -> Tensor:
        assert hidden.shape[-1] == WIDTH
        return hidden.square().sum(dim=-1) * labels

    model = tiny(loss=TokenLoss(norms, rows=3), head=None, layers=1)
    ids = numbers(2, 13)
    compare(model, ids, {"labels": ids}, {"labels": ids, "function": norms})


class Scaled(nn.Module):
    """A loss that learns, whose logits may be read through a weight of the head."""

    def __init__(self, head: nn.Linear | None = None) -> None:
        super().__init__()
        self.scale, self.head = nn.Parameter(torch.ones((), dtype=F64)), head

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        losses = F.cross_entropy(logits * self.scale, labels, reduction="none")
        return losses if self.head is None else losses + logits @ self.head.weight.square().sum(dim=1)


@pytest.mark.parametrize("shares", [False, True], ids=["its own", "the head's too"])
def test_a_loss_with_weights(shares: bool) -> None:
    """They are parameters of the model, and learn in chunks as well as at once, under every policy."""
    ids, found = numbers(2, 13), []
    for rows in (100, 3):
        model = tiny()
        assert isinstance(model.head, nn.Linear)
        function = Scaled(model.head if shares else None)
        model = tiny(loss=TokenLoss(function, rows=rows), head=model.head)
        assert any(parameter is function.scale for parameter in model.parameters())
        for policy, driver in (("full", False), (Replay(keep=0), False), (Replay(), True), (Replay(keep=2), True)):
            found.append(step(model, ids, policy, driver=driver, labels=ids))
        other = copy.deepcopy(model)
        found.append(step(other, ids, labels=ids))
        assert function.scale.grad is None
    for one in found[1:]:
        assert one.gradients.keys() == found[0].gradients.keys()
        check_step(one, found[0], 1e-10)
    assert all(float(grad.norm()) > 0 for grad in found[0].gradients.values())


def test_a_function_that_closes_over_a_parameter() -> None:
    """Its gradient, or an error; never none, silently."""
    scale = torch.ones((), dtype=F64, requires_grad=True)

    def function(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits * scale, labels, reduction="none")

    ids, found = numbers(2, 13), []
    for rows in (100, 3):
        scale.grad, refusal = None, ""
        torch.manual_seed(5)
        try:
            tiny(loss=TokenLoss(function, rows=rows))(ids, labels=ids).loss.backward()
        except (RuntimeError, ValueError) as error:
            refusal = str(error)
        found.append((scale.grad, refusal))
    assert found[0][0] is not None
    if not found[1][1]:
        assert found[1][0] is not None
        close([found[1][0]], [found[0][0]])
    assert "function" in found[1][1] or not found[1][1]


@pytest.mark.parametrize("own", [False, True], ids=["cross entropy", "function"])
def test_nan_in_ignored_rows_does_not_reach_the_value(own: bool) -> None:
    """A row that does not count may hold anything."""
    hidden = torch.randn(2, 6, VOCABULARY, dtype=F64)
    labels = numbers(2, 6)
    labels[0, 3], labels[1, 5] = -100, -100
    loss = TokenLoss(squares if own else None, shift=False, rows=4)
    segments = Segments(2, 6, 6, "left", None, torch.device("cpu"))
    weighed = loss.weigh(labels, None, segments, F64)
    targets = loss.targets(weighed, segments, 0)
    clean = loss.of_segment(hidden, targets, None, None, weighed.factors[0])
    hidden[0, 3] = hidden[1, 5] = torch.nan
    for rows in (4, 100):
        loss = TokenLoss(squares if own else None, shift=False, rows=rows)
        found = loss.of_segment(hidden, targets, None, None, weighed.factors[0])
        assert found.item() == pytest.approx(clean.item(), rel=1e-12)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"weights": "mean"}, r"weights must be one of \['tokens', 'segments', 'last'\] or a number .* got 'mean'"),
        ({"rows": 0}, "rows must be at least 1 or None, got 0"),
    ],
)
def test_token_loss_refuses(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        TokenLoss(**options)


@pytest.mark.parametrize(
    ("labels", "options", "error", "says"),
    [
        (numbers(2, 12), {}, ValueError, r"labels must have the inputs' shape \(2, 13\), .* got \(2, 12\)"),
        (numbers(1, 13), {}, ValueError, r"labels must have the inputs' shape \(2, 13\), .* got \(1, 13\)"),
        (numbers(2, 13).int(), {}, TypeError, "labels must be int64 class numbers, got torch.int32"),
        (numbers(2, 13).double(), {}, TypeError, "labels must be int64 class numbers, got torch.float64"),
        ([[1]], {}, TypeError, "labels must be a torch.Tensor, got list"),
        (numbers(2, 13).to("meta"), {}, ValueError, "labels must be on the model's device, cpu, got meta"),
        (numbers(2, 13), {"label_mask": torch.ones(2, 12, dtype=torch.bool)}, ValueError,
         r"label_mask must be bool of shape \(2, 13\) on cpu, .* got torch.bool \(2, 12\) on cpu"),
        (numbers(2, 13), {"label_mask": torch.ones(2, 13)}, ValueError, "label_mask must be bool .* got torch.float32"),
        (None, {"label_mask": torch.ones(2, 13, dtype=torch.bool)}, ValueError, "label_mask is given without labels"),
    ],
)  # fmt: skip
def test_bad_labels(labels: Any, options: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        tiny()(numbers(2, 13), labels=labels, **options)


def test_bad_weights_and_functions() -> None:
    ids = numbers(2, 13)
    with pytest.raises(ValueError, match="weights must hold one number for each of the 3 segments, got 2"):
        tiny(loss=TokenLoss(weights=[1, 2]))(ids, labels=ids)
    with pytest.raises(ValueError, match=r"loss must return one number a row, \(\d+,\), got \(\)"):
        tiny(loss=lambda logits, labels: logits.sum())(ids, labels=ids)
    with pytest.raises(ValueError, match=r"loss must return one number a sample, \(2,\), got \(2, 11\)"):
        tiny(loss=SampleLoss(lambda logits, labels: logits))(ids, labels=torch.zeros(2, dtype=torch.int64))
    with pytest.raises(TypeError, match="loss must be TokenLoss, SampleLoss or a function, got str"):
        tiny(loss="cross entropy")


# -- one label a sample ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("align", ["left", "right"])
@pytest.mark.parametrize("weights", ["last", "segments"])
@pytest.mark.parametrize("row", [0, 1, -1])
@pytest.mark.parametrize("lengths", [None, [13, 2], [0, 11], [0, 0]], ids=str)
@pytest.mark.parametrize("own", [False, True], ids=["cross entropy", "function"])
def test_sample_loss(own: bool, lengths: list[int] | None, row: int, weights: str, align: str) -> None:
    def function(logits: Tensor, labels: Tensor) -> Tensor:
        return (logits[:, 0] - labels).square()

    if row == 1 and align == "left" and lengths is None:
        row = 2  # the short segment's last token
    model = tiny(
        "rmt_encoder", loss=SampleLoss(function if own else None, row=row, weights=weights), align=align, layers=1,
        prefix=[7, 9],
    )  # fmt: skip
    ids, labels = numbers(2, 13), torch.tensor([3, 8])
    compare(
        model, ids, {"labels": labels, "lengths": None if lengths is None else torch.tensor(lengths)},
        {"labels": labels, "lengths": lengths, "align": align, "row": row, "weights": weights,
         "layout": "rmt_encoder", "function": function if own else None},
    )  # fmt: skip


def test_sample_loss_ignores_what_samples_without_tokens_give() -> None:
    """A sample that is empty in a segment has no loss there, even where its rows hold NaN."""
    loss = SampleLoss()
    segments = Segments(2, 10, 5, "left", torch.tensor([10, 4]), torch.device("cpu"))
    weighed = loss.weigh(torch.tensor([1, 2]), None, segments, F64)
    hidden = torch.randn(2, 5, VOCABULARY, dtype=F64)
    hidden[1] = torch.nan
    found = loss.of_segment(hidden, loss.targets(weighed, segments, 1), torch.tensor([5, 0]), None, weighed.factors[1])
    wanted = F.cross_entropy(hidden[:1, 0], torch.tensor([1])) / 2
    assert found.item() == pytest.approx(wanted.item(), rel=1e-12)


def test_sample_loss_never_reads_padding() -> None:
    model = tiny("rmt_encoder", loss=SampleLoss(row=3)).eval()
    ids, lengths = numbers(2, 10), torch.tensor([10, 7])
    other = ids.clone()
    other[1, 7:] = (other[1, 7:] + 1) % VOCABULARY
    found = [model(given_, labels=torch.tensor([1, 2]), lengths=lengths).loss.item() for given_ in (ids, other)]
    assert found[0] == found[1]


def test_sample_loss_refuses() -> None:
    ids = numbers(2, 13)
    with pytest.raises(ValueError, match="weights must be 'last' or 'segments', got 'tokens'"):
        SampleLoss(weights="tokens")
    with pytest.raises(ValueError, match="row must be at least 0, or -1 for the last token, got -2"):
        SampleLoss(row=-2)
    model = tiny("rmt_encoder", loss=SampleLoss())
    with pytest.raises(ValueError, match=r"labels must be \(batch, ...\), one for each of the 2 samples, got \(3,\)"):
        model(ids, labels=torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"labels must be \(batch, ...\), one for each of the 2 samples, got \(\)"):
        model(ids, labels=torch.zeros((), dtype=torch.int64))
    with pytest.raises(ValueError, match="label_mask is for losses of every token"):
        model(ids, labels=torch.zeros(2, dtype=torch.int64), label_mask=torch.ones(2, dtype=torch.bool))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: TokenLoss(weights=3), "weights"),  # type: ignore[arg-type]
        (lambda: TokenLoss(weights=["a"]), "weights"),  # type: ignore[list-item]
        (lambda: TokenLoss(weights=[float("nan")]), "weights"),
        (lambda: TokenLoss(rows="a"), "rows must be"),  # type: ignore[arg-type]
        (lambda: TokenLoss(rows=2.5), "rows must be"),  # type: ignore[arg-type]
        (lambda: TokenLoss(3), "function must be"),  # type: ignore[arg-type]
        (lambda: SampleLoss(3), "function must be"),  # type: ignore[arg-type]
        (lambda: SampleLoss(row="a"), "row must be"),  # type: ignore[arg-type]
        (lambda: SampleLoss(row=1.5), "row must be"),  # type: ignore[arg-type]
        (lambda: tiny(loss=TokenLoss), "loss must be"),
        (lambda: tiny()(numbers(2, 13), labels=numbers(2, 13), label_mask=[[True]]), "label_mask must be"),
        (lambda: tiny("rmt_encoder", loss=SampleLoss(row=5))(numbers(2, 13), labels=torch.tensor([1, 2])), "row"),
        (lambda: tiny("rmt_encoder", loss=SampleLoss())(numbers(2, 13), labels=torch.tensor([1.0, 2.0])), "labels"),
    ],
)  # fmt: skip
def test_other_arguments_are_refused(make: Callable[[], object], says: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{says}"):
        make()
